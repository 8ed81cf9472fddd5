"""TieredEmbedding: an `nn.Embedding` whose table lies in a Store.

The rows are the store's, and so are their dtype and device: `to`, `half` and `cuda` leave the module as it is. It has no
parameter and no `weight`: a table in tiers is read-only, no gradient reaches it, and an optimizer never sees it. Tables that
train are an ordinary `nn.Embedding`, which is called the same way.

A state dict holds nothing of the table. A checkpoint that holds it loads all the same, strictly too: its tensors are compared
with the store, a sample of rows of each, and left where they are.
"""

import warnings
from collections import deque
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from tiercache.expectation import Expectation
from tiercache.flight import Ticket
from tiercache.op import as_operator
from tiercache.records import DTYPES
from tiercache.request import is_traced
from tiercache.source import Source
from tiercache.store import Store

_PENDING = 8
"""Prefetches that wait for their forward at most; the oldest is let go of when another one comes."""

_SAMPLE = 16
"""Rows of a checkpoint's table that are compared with the store's: whole groups of any size."""


class TieredEmbedding(nn.Module):
    """Rows of one table of a store, by number: integers of any shape to dtype[*indices.shape, embedding_dim].

    Errors of `forward` and `prefetch` are those of `Store.fetch` and `Store.prefetch`. Over a store with `group_rows` the last
    dimension of indices is a multiple of that, as a hasher's rows have it. Not safe from several threads.
    """

    num_embeddings: int
    embedding_dim: int

    def __init__(self, store: Store, table: str | None = None) -> None:
        """table: may be left out where the store has one. The store stays the caller's, to share and to close. KeyError."""
        super().__init__()
        self.store = store
        self.table = store._table(table).name
        self.num_embeddings = store.num_rows(self.table)
        self.embedding_dim = store.dim(self.table)
        self._rows = as_operator(store, self.table)
        self._pending: deque[Ticket] = deque(maxlen=_PENDING)

    @classmethod
    def open(cls, config: Any, table: str | None = None, *, tables: Mapping[str, Source | Any] | None = None) -> Self:
        """Over a store of its own, opened as by `Store.open` and with its errors; `embedding.store.close()` ends it."""
        return cls(Store.open(config, tables=tables), table)

    def prefetch(self, indices: torch.Tensor, *, deadline: float | None = None) -> Ticket:
        """Begin to read the rows of a `forward` to come, which finds them by its indices: it takes rows of no others.

        At most 8 prefetches wait for their forward; the oldest of more is dropped, and its rows arrive in the tier. The
        ticket is for the caller who wants to `cancel` it, or to take the rows past the module. `drop` gives up those whose
        forward is not going to come; forwards that are compiled take none, and leave them waiting.

        indices: a tensor, which may be changed afterwards.
        """
        if not isinstance(indices, torch.Tensor):
            raise TypeError(f"indices are a {type(indices).__name__}; allowed is a torch.Tensor")
        ticket = self.store.prefetch(indices, deadline=deadline, table=self.table)
        while self._pending and not self._pending[0].open:
            self._pending.popleft()
        self._pending.append(ticket)
        return ticket

    def expect(self, indices: torch.Tensor) -> Expectation:
        """Say which rows the lookups to come ask for, in this order, and read nothing; as `Store.expect`."""
        return self.store.expect(indices, table=self.table)

    def drop(self) -> None:
        """Cancel every prefetch that waits for its forward: what has not been read yet is not read."""
        while self._pending:
            self._pending.popleft().cancel()

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """The rows, without a gradient. In a graph that is traced the fetch is `as_operator`'s, which finds prefetched rows
        in the tier."""
        if not torch.compiler.is_compiling() and self._pending and not is_traced(indices):
            for place, ticket in enumerate(self._pending):
                if ticket.asks_for(indices):
                    del self._pending[place]
                    return ticket.take()
        return self._rows(indices)

    def extra_repr(self) -> str:
        """As nn.Embedding's, with the table's name."""
        return f"{self.num_embeddings}, {self.embedding_dim}, table={self.table!r}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Another module over the same store: a store is not copied."""
        made = type(self)(self.store, self.table)
        memo[id(self)] = made
        made.train(self.training)
        return made

    def __getstate__(self) -> Any:
        raise TypeError("a TieredEmbedding cannot be pickled, as its store cannot: save the model's state dict")

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Compare a checkpoint's table with the store's: shapes, and a sample of rows.

        The tensors that make up the table are `weight` and, by the last part of their names, the fields of its records.
        None need be there. What does not agree is an error of load_state_dict, and other tensors are unexpected. A tensor
        whose rows cannot be compared, as on meta, is warned of.
        """
        record = self.store._table(self.table).record
        places = {field.name.rpartition(".")[2]: place for place, field in enumerate(record.fields)}
        places.setdefault("weight", record.values)
        for key, value in state_dict.items():
            if not key.startswith(prefix):
                continue
            place = places.get(key[len(prefix) :])
            if place is None:
                if strict:
                    unexpected_keys.append(key)
                continue
            wanted = (self.num_embeddings, record.fields[place].width)
            if tuple(value.shape) != wanted:
                error_msgs.append(f"{key} has shape {tuple(value.shape)}; the store's table {self.table!r} has {wanted}")
            elif value.is_meta or not (value.is_floating_point() or value.dtype == DTYPES[record.fields[place].dtype]):
                what = "on meta" if value.is_meta else str(value.dtype)
                text = f"{key} is {what}: its rows were not compared with the store's table {self.table!r}, which serves"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            elif (row := self._first_difference(value, place)) is not None:
                error_msgs.append(
                    f"{key}: row {row} differs from the store's table {self.table!r}, which serves; "
                    "open the store over this checkpoint, or leave the tensor out"
                )

    def _first_difference(self, tensor: torch.Tensor, place: int) -> int | None:
        """A row that is not the store's, out of a sample of them; None where all are.

        A tensor of its field's dtype is compared by its bytes. One of another floating-point dtype is compared as numbers: its
        rows have to be the store's, decoded, after a cast to either one's dtype.
        """
        record = self.store._table(self.table).record
        rows = torch.linspace(0, self.num_embeddings - 1, _SAMPLE, dtype=torch.float64).long()
        theirs = tensor[rows.to(tensor.device)].cpu().contiguous()
        raw = self.store.fetch(rows, table=self.table, raw=True).cpu()
        own = record.part(raw, place)
        if theirs.dtype == own.dtype:
            same = (theirs.view(torch.uint8) == own.view(torch.uint8)).all(1)
        elif place == record.values:
            served = self.store.dtype(self.table)
            same = _equal(theirs, record.decode(raw, theirs.dtype)) | _equal(theirs.to(served), record.decode(raw, served))
        else:
            same = _equal(theirs, own.to(theirs.dtype)) | _equal(theirs.to(own.dtype), own)
        different = (~same).nonzero()
        return int(rows[different[0, 0]]) if len(different) else None


def _equal(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """bool[n], which rows of [n, width] are the same numbers; NaN is NaN."""
    one, other = one.double(), other.double()
    return ((one == other) | (one.isnan() & other.isnan())).all(1)
