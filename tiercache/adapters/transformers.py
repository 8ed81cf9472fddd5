"""transformers: Qwen4Exp models whose n-gram tables (PLE, per-layer embeddings) lie in a store.

    with without_tables():  # the tables of the checkpoint are not read
        model = AutoModelForCausalLM.from_pretrained(path)
    config = {"table": checkpoint_tables(path), "host": {"capacity": "4GiB"}}
    with offload(model, config) as offloaded:
        model.generate(...)
        print(offloaded.store.stats())

A model that is in memory as a whole is offloaded likewise; `write_tables` brings its tables to disk first. Only the module
that holds a table is exchanged: the model hashes its tokens by its own code, so that rows are the same by construction.

Written for transformers 5.23.0, models/qwen4_exp.
"""

import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextModel, Qwen4ExpTextNGramEmbedding

from tiercache.adapters.ahead import Ahead
from tiercache.config import StoreConfig
from tiercache.op import as_operator
from tiercache.storage.safetensors import INDEX_SUFFIX, read_header
from tiercache.store import Store

_TABLE = re.compile(r".*\blayers\.(\d+)\.ple\.ple_embedding\.ngram_embedding\.(?:shard_\d+\.)?weight")
_ROWS_AT_ONCE = 1 << 16
_SAMPLE = 16
"""Rows of a table in memory that are compared with the store's."""


class Offload:
    """A model whose tables a store holds. `close`, or leaving `with`, ends the store; then the model's forward raises.

    store: what serves; open it by hand, and give it to `offload`, to share it. Then `close` leaves it open.
    """

    def __init__(self, store: Store, own: bool, places: "list[_Place]", hooks: list[Any]) -> None:
        """For `offload`."""
        self.store = store
        self._own = own
        self._places = places
        self._hooks = hooks

    def undo(self) -> None:
        """Read the tables back into memory, give the model its own modules again, and `close`.

        Tables that were not in memory before `offload` are not afterwards. StorageError, ClosedError and torch's
        OutOfMemoryError leave everything as it was.
        """
        tables = [None if place.device is None else place.stored.whole(place.device) for place in self._places]
        for place, table in zip(self._places, tables, strict=True):
            if table is not None:
                place.module.weight = nn.Parameter(table, place.module.weight.requires_grad)
            place.parent.ngram_embedding = place.module
        for hook in self._hooks:
            hook.remove()
        self._places, self._hooks = [], []
        self.close()

    def close(self) -> None:
        """Close the store, if `offload` opened it."""
        if self._own:
            self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def offload(model: nn.Module, source: Store | StoreConfig | str | os.PathLike[str] | Mapping[str, Any]) -> Offload:
    """Serve the n-gram tables of a Qwen4Exp model from a store, and free their memory.

    model: any that contains one Qwen4ExpTextModel with PLE layers; its tables may be in memory, on meta, or left out by
    `without_tables`. source: an open store, or a config as of `Store.open`. The table of layer L (from zero) is "layers.L",
    or, where model and store have just one, that one, whatever its name.

    The model's outputs, its cache, `generate` and its other weights stay as they are, to the bit. When a forward begins, the
    rows of all its tables are prefetched; a layer takes them if they are the ones that it asks for, and reads its rows
    itself if not. Threads may run forwards at once. Under torch.compile there is no prefetch, and rows are read by
    `tiercache::fetch`. `state_dict` and `save_pretrained` have everything but the tables. Tables are not trained: their rows
    have no gradient. What still refers to a table's parameter, such as an optimizer, keeps its memory.

    Some rows of a table in memory are compared with the store's before its memory is freed. Raises ValueError for a model that
    has no such table, is on meta or was offloaded before, or a table of another shape or dtype than the model's or of other
    rows, StorageError where these cannot be read, TypeError for a table that is quantized or sharded, KeyError for one that
    the store does not have, and whatever `Store.open` raises; then nothing has changed.
    """
    text = _text_model(model)
    tables = _tables(text)
    own = not isinstance(source, Store)
    with ExitStack() as undo:
        store = source if isinstance(source, Store) else undo.enter_context(Store.open(source))
        store.stats()  # a closed store raises
        places = [_place(text, index, store, _name(store, index, len(tables))) for index in tables]
        undo.pop_all()
    for place in places:
        if place.device is not None:
            place.module.weight = nn.Parameter(place.module.weight.to("meta"), place.module.weight.requires_grad)
        place.parent.ngram_embedding = place.stored
    return Offload(store, own, places, _prefetching(text, places))


class StoredEmbedding(nn.Module):
    """`nn.Embedding` for rows of a store: what `offload` puts where the model had its table.

    `weight` has no rows: it says, as the model does its own modules, on which device and in which dtype the rows are wanted.
    """

    def __init__(self, store: Store, table: str, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.store, self.table = store, table
        self.weight = nn.Buffer(torch.empty(0, store.dim(table), dtype=dtype, device=device), persistent=False)
        self.ahead = Ahead(store, table)
        self._fetch = as_operator(store, table)
        self._here = _Here()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the table: dtype[*rows.shape, dim], on the store's device. rows: int64, any shape."""
        if torch.compiler.is_compiling():
            return self._fetch(rows.cpu()).to(self.weight.dtype)
        if self._here.planning:
            self.ahead.begin(rows)
            return rows
        return self.ahead.take(rows).to(self.weight.dtype)

    def plan(self, lookup: Callable[[], Any]) -> None:
        """Begin to read the rows that `lookup` is going to ask this module for. What it gets is no rows."""
        self._here.planning = True
        try:
            lookup()
        finally:
            self._here.planning = False

    def whole(self, device: torch.device) -> torch.Tensor:
        """The table: dtype[num_rows, dim]."""
        num_rows = self.store.num_rows(self.table)
        table = self.weight.new_empty((num_rows, self.weight.shape[1]), device=device)
        for begin in range(0, num_rows, _ROWS_AT_ONCE):
            rows = torch.arange(begin, min(begin + _ROWS_AT_ONCE, num_rows))
            table[begin : begin + _ROWS_AT_ONCE] = self.store.fetch(rows, table=self.table)
        return table

    def __getstate__(self) -> NoReturn:
        raise TypeError("an offloaded model is not copied or pickled: offload the copy, or save the state dict")

    def extra_repr(self) -> str:
        return f"{self.store.num_rows(self.table)}, {self.weight.shape[1]}, table={self.table!r}"


class _Here(threading.local):
    """Whether one thread only looks which rows are going to be asked for."""

    planning = False


class _Place(NamedTuple):
    """Where a table was: `parent.ngram_embedding`, once `module`, now `stored`. device: where its memory was, if it had any."""

    layer: int
    parent: Any
    module: Any
    device: torch.device | None
    stored: StoredEmbedding


class _Peek:
    """A cache for looking: the token history that a layer is going to find, and nothing that it writes."""

    def __init__(self, cache: Any) -> None:
        self.get_conv_state = cache.get_conv_state

    def update_conv_state(self, *args: Any, **kwargs: Any) -> None:
        pass


def _text_model(model: nn.Module) -> Any:
    found = [module for module in model.modules() if isinstance(module, Qwen4ExpTextModel)]
    if len(found) != 1:
        raise ValueError(
            f"model is a {type(model).__name__} with {len(found)} parts of type Qwen4ExpTextModel; allowed is one that has one"
        )
    return found[0]


def _tables(text: Any) -> list[int]:
    """Layers that have a table, all of which can be offloaded."""
    layers = [index for index, layer in enumerate(text.layers) if layer.ple is not None]
    if not layers:
        raise ValueError(f"model.config.ple_layer_ids = {text.config.ple_layer_ids}: this model has no n-gram table")
    for index in layers:
        parent = text.layers[index].ple.ple_embedding
        where, module = f"table of layer {index}", parent.ngram_embedding
        if isinstance(module, StoredEmbedding):
            raise ValueError(f"{where}: was offloaded before")
        kind = type(module.weight.data)
        if not isinstance(module, nn.Embedding | LeftOut) or kind is not torch.Tensor:
            raise TypeError(f"{where}: is a {type(module).__name__} of {kind.__name__}; allowed is nn.Embedding of Tensor")
        if parent.layer_multipliers.is_meta:
            raise ValueError(f"{where}: the model is on meta, its hash as well; load it before its tables are offloaded")
    return layers


def _name(store: Store, layer: int, num_layers: int) -> str:
    """Which table of the store a layer's is."""
    name = f"layers.{layer}"
    return store.tables[0] if num_layers == 1 and len(store.tables) == 1 else name


def _place(text: Any, layer: int, store: Store, name: str) -> _Place:
    """A layer's table and what is to take its place. ValueError unless the store's table is such a one."""
    parent = text.layers[layer].ple.ple_embedding
    module = parent.ngram_embedding
    wanted = module.num_embeddings, module.embedding_dim, module.weight.dtype
    found = store.num_rows(name), store.dim(name), store.dtype(name)
    if found != wanted:
        raise ValueError(
            f"table {name!r} of the store: {found[0]} rows of {found[1]} values of {found[2]}; "
            f"layer {layer} needs {wanted[0]} rows of {wanted[1]} values of {wanted[2]}"
        )
    in_memory = isinstance(module, nn.Embedding) and not module.weight.is_meta
    if in_memory:
        _compare(module.weight.detach(), layer, store, name)
    stored = StoredEmbedding(store, name, module.weight.dtype, parent.layer_multipliers.device)
    return _Place(layer, parent, module, module.weight.device if in_memory else None, stored)


def _compare(weight: torch.Tensor, layer: int, store: Store, name: str) -> None:
    """ValueError where the bits of some row, out of a sample of the table, are not those of the store's."""
    rows = torch.linspace(0, len(weight) - 1, min(_SAMPLE, len(weight)), dtype=torch.float64).long()
    theirs = store.fetch(rows, table=name).cpu().view(torch.uint8)
    ours = weight[rows.to(weight.device)].cpu().contiguous().view(torch.uint8)
    for row in rows[(ours != theirs).any(1)][:1].tolist():
        raise ValueError(
            f"layer {layer}: row {row} of its table differs from that of table {name!r} of the store; "
            "write the table that the model has, or load the model without it"
        )


def _prefetching(text: Any, places: list[_Place]) -> list[Any]:
    """Hooks by which a forward of the text model begins with its reads, and leaves none behind, however it ends.

    The reads begin in front of the first layer, where the tokens that the PLE layers hash are first complete. What is
    recomputed outside of a forward, as by gradient checkpointing, prefetches nothing.
    """
    here = _Forward()

    def begin(module: Any, args: Any) -> None:
        if not torch.compiler.is_compiling():
            here.running = True

    def end(module: Any, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            here.running = False
            for place in places:
                place.stored.ahead.drop()

    def plan(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("ple_input_ids")
        if torch.compiler.is_compiling() or not here.running or tokens is None:
            return
        cache = kwargs.get("past_key_values")
        peek = None if cache is None else _Peek(cache)
        for place in places:
            place.stored.plan(partial(place.parent.forward, tokens, peek))

    return [
        text.register_forward_pre_hook(begin),
        text.register_forward_hook(end, always_call=True),
        text.layers[0].register_forward_pre_hook(plan, with_kwargs=True),
    ]


class _Forward(threading.local):
    """Whether one thread is inside a forward of the text model."""

    running = False


class LeftOut(nn.Module):
    """A table that was left out by `without_tables`: what `nn.Embedding` says of itself, and no rows."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.weight = nn.Buffer(torch.empty(0, embedding_dim), persistent=False)

    def forward(self, rows: torch.Tensor) -> NoReturn:
        raise RuntimeError("this model was loaded without its n-gram tables: offload it before its first forward")


@contextmanager
def without_tables() -> Iterator[None]:
    """Inside, Qwen4Exp models are built without their n-gram tables, and `from_pretrained` leaves those of its checkpoint.

    It then warns of the tables' names as not used. `offload` is to follow: until then a forward raises RuntimeError. The
    class is changed while the block runs, for every thread.
    """
    original = Qwen4ExpTextNGramEmbedding.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)  # under from_pretrained, on meta
        self.ngram_embedding = LeftOut(self.ngram_embedding.num_embeddings, self.ngram_embedding.embedding_dim)

    hashing: Any = Qwen4ExpTextNGramEmbedding
    hashing.__init__ = init
    try:
        yield
    finally:
        hashing.__init__ = original


def checkpoint_tables(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """`table` of a config, for the n-gram tables of a checkpoint as it was released or as `save_pretrained` writes it.

    Tables lie there in one tensor or in shards, and FP8 tables have a global scale. ValueError where there are none.
    """
    path = Path(directory) / f"model{INDEX_SUFFIX}"
    if path.exists():
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    else:
        path = Path(directory) / "model.safetensors"
        names = set(read_header(path))
    fields: dict[int, str] = {}
    for name in names:
        if match := _TABLE.fullmatch(name):
            fields[int(match[1])] = re.sub(r"shard_\d+", "shard_{shard}", name)
    if not fields:
        raise ValueError(f"{path}: has no tensor that is named like an n-gram table of Qwen4Exp")
    scales = {layer: re.sub(r"(shard_\{shard\}\.)?weight$", "weight_scale", field) for layer, field in fields.items()}
    return [
        {"name": f"layers.{layer}", "path": path, "fields": [field, *({scales[layer]} & names)]}
        for layer, field in sorted(fields.items())
    ]


def write_tables(model: nn.Module, directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Write the n-gram tables of a model in memory, a file each; returns `table` of a config that opens them."""
    text, sections = _text_model(model), []
    for layer in _tables(text):
        weight = text.layers[layer].ple.ple_embedding.ngram_embedding.weight
        if weight.is_meta or not weight.numel():
            raise ValueError(f"table of layer {layer}: is not in memory")
        path = Path(directory) / f"layers.{layer}.safetensors"
        save_file({"weight": weight.detach()}, path)
        sections.append({"name": f"layers.{layer}", "path": path, "fields": ["weight"]})
    return sections
