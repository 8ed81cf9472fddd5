"""`tiercache::fetch`: `Store.fetch` as an operator of torch, opaque to whatever traces it.

Schema: `fetch(Tensor indices, str store, str table) -> Tensor`, from integers of any shape to dtype[*indices.shape, dim].
A graph can hold no store, so it holds a name, by which the kernel finds the store in this process.
"""

import secrets
import threading
from collections.abc import Callable
from weakref import WeakValueDictionary

import torch
from torch._compile import _disable_dynamo

from tiercache.errors import ClosedError
from tiercache.request import check_tensor
from tiercache.store import Store

_lock = threading.Lock()
_stores: WeakValueDictionary[str, Store] = WeakValueDictionary()


def as_operator(
    store: Store, table: str | None = None, *, name: str | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`Store.fetch` of one table as a function that torch.compile and torch.export can trace.

        class Embedding(torch.nn.Module):
            def __init__(self, store: Store) -> None:
                super().__init__()
                self.rows = as_operator(store)

            def forward(self, indices: torch.Tensor) -> torch.Tensor:
                return self.rows(indices)  # [*indices.shape, dim]

        model = torch.compile(Embedding(store), fullgraph=True)

    The function takes an integer tensor of any shape and returns dtype[*indices.shape, dim], as `fetch` does and with its
    errors. Rows have no gradient. table: may be left out where there is one. name: by which programs that torch.export
    saved find the store in another process, where `as_operator` gives it to a store with the same table; without one they
    find none, never another.

    The function keeps no store alive: one that was closed, or that nothing refers to, raises ClosedError. Raises KeyError
    for an unknown table, ValueError for a name that another open store has.
    """
    handle, wanted = _handle(store, name), store._table(table).name

    def fetch(indices: torch.Tensor) -> torch.Tensor:
        """Rows of the store: dtype[*indices.shape, dim]."""
        return _OPERATOR(indices, handle, wanted)

    return fetch


def _handle(store: Store, name: str | None) -> str:
    """The name under which this process finds a store from now on."""
    handle = f"unnamed-{secrets.token_hex(8)}" if name is None else name
    with _lock:
        known = _stores.get(handle)
        if known is not None and known is not store and not known._flights.closed:
            raise ValueError(f"name = {name!r}: another open store has it; allowed are other names")
        _stores[handle] = store
    return handle


def _find(handle: str) -> Store:
    store = _stores.get(handle)
    if store is None:
        raise ClosedError(f"the store of this operator, {handle!r}, is gone or belongs to another process")
    return store


@_disable_dynamo  # torch.compile would look into a kernel that is called from code that it gave up on
def _fetch(indices: torch.Tensor, store: str, table: str) -> torch.Tensor:
    return _find(store).fetch(indices, table=table)


def _fetch_fake(indices: torch.Tensor, store: str, table: str) -> torch.Tensor:
    """Shape, dtype and device of the rows; of meta indices they are on meta."""
    found = _find(store)
    wanted, device = found._table(table), found._top.torch_device
    if indices.is_meta:
        device = indices.device
    else:
        check_tensor(indices, device)
    return torch.empty((*indices.shape, wanted.record.dim), dtype=wanted.dtype, device=device)


# A fetch plans on the host, so that CUDA graphs must be split around it; older releases of torch have no word for that.
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
# Not custom_op, whose wrapper takes several times as long as the dispatcher does.
torch.library.define("tiercache::fetch", "(Tensor indices, str store, str table) -> Tensor", tags=_TAGS)
torch.library.impl("tiercache::fetch", "default", _fetch)
torch.library.register_fake("tiercache::fetch", _fetch_fake)
_OPERATOR = torch.ops.tiercache.fetch.default
