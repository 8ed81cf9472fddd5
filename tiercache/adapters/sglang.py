"""SGLang, experimental: the n-gram tables of DeepSeek-V4.1 and Qwen4Exp in a store, instead of host memory.

    tiercache.adapters.sglang.install("store.toml")  # before the model is built, in the process that builds it

Tables of the store are named "layers.L" by the layer, from zero; for Qwen4Exp, whose embedding does not know its layer, the
store has that one table. Written for SGLang 0.5.23, one GPU; for Qwen4Exp with `ple_offload_embedding`.

What was run: the modules below, on the CPU, against the sources of SGLang 0.5.23 with what they import left out: their tables
answer as SGLang's modules ask. What was not: a GPU, a whole server, CUDA graphs. To be expected there:

- A lookup waits on the host for ids and rows, so that it must not be captured: `--disable-cuda-graph`.
- DeepSeek's rows are prefetched for all layers when the hasher has run, before the first layer, and taken in their layers.
  Rows are not staged by the scheduler (EngramRowStager), which is for tables that are in memory as a whole.
- Qwen4Exp reads its rows when its prefetch begins, a layer ahead; the host waits for them there.
"""

import functools
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from tiercache.adapters.ahead import Ahead, without_rows
from tiercache.config import StoreConfig
from tiercache.store import Store


class EngramTable(nn.Module):
    """What DeepSeek-V4.1's `Engram` has as `embed`: SGLang's EngramEmbedding, unsharded."""

    staged_by_scheduler = shared_host_table_without_ats = False

    def __init__(self, store: Store, table: str, num_embeddings: int, dim: int) -> None:
        """num_embeddings and dim are the model's. ValueError where the store's table has others."""
        super().__init__()
        _require(store, table, num_embeddings, dim)
        self.dim = dim
        self.ahead = Ahead(store, table)
        self.weight = without_rows(dim, torch.float8_e4m3fn)
        self.scale = without_rows(dim // 32, torch.float8_e8m0fnu)

    def forward(
        self, indices: torch.Tensor, forward_batch: Any = None, *, cp_all_tokens: bool = False
    ) -> torch.Tensor:
        """bfloat16[*indices.shape, dim], on the device of indices."""
        return self.ahead.take(indices).to(indices.device)

    def new_rows(self, indices: torch.Tensor) -> torch.Tensor:
        """An output for the rows of `indices`, not initialised."""
        return torch.empty(*indices.shape, self.dim, dtype=torch.bfloat16, device=indices.device)

    def finish_load(self, label: str) -> None:
        """Nothing was loaded."""


class PLETable(nn.Module):
    """What Qwen4Exp's n-gram embedding has as `ngram_embedding`: SGLang's Qwen4ExpPinnedHostEmbedding, unsharded.

    SGLang multiplies what it gets by `weight_scale`, of FP8 the global scale: leave it out of the fields of the store's table.
    """

    def __init__(self, store: Store, embedding: Any) -> None:
        """embedding: SGLang's, on meta. ValueError where the store's table has another shape, KeyError where it has several."""
        super().__init__()
        self.store, self.embedding_dim, self.org_vocab_size = store, embedding.embedding_dim, embedding.org_vocab_size
        _require(store, None, embedding.num_embeddings, self.embedding_dim)
        self.shard_indices = _Shard(0, 0)
        self.weight = without_rows(self.embedding_dim, embedding.weight.dtype, embedding.weight_scale.device)
        self.register_buffer("weight_scale", embedding.weight_scale)

    def allocate_output(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """Memory for rows."""
        return torch.empty(shape, dtype=torch.bfloat16, device=device)

    def gather(self, input_ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """bfloat16[*input_ids.shape, dim], on the current stream of the device of the ids; written to `out` if given."""
        if out is None:
            out = self.allocate_output((*input_ids.shape, self.embedding_dim), input_ids.device)
        return out.copy_(self.store.fetch(input_ids.cpu()))

    def reduce(self, output: torch.Tensor) -> torch.Tensor:
        """The rows: there is one rank."""
        return output

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """As `gather`."""
        return self.gather(input_ids)


class _Shard(NamedTuple):
    """Rows that SGLang's loader copies of the checkpoint's: none."""

    org_vocab_start_index: int
    org_vocab_end_index: int


def install(config: StoreConfig | str | os.PathLike[str] | Mapping[str, Any]) -> None:
    """From now on models of this process read their tables from a store, opened when the first one is built.

    config: as of `Store.open`. A model is then refused with ValueError where its table does not fit or it is sharded over
    several ranks, and with KeyError where the store has no such table.
    """
    from sglang.srt.layers import engram
    from sglang.srt.models import qwen4_exp
    from sglang.srt.runtime_context import get_parallel

    opened = functools.cache(lambda: Store.open(config))
    tables: dict[int, EngramTable] = {}

    def embed(num_embeddings: int, dim: int, layer_id: int, column_bounds: Any) -> EngramTable:
        _require_one(get_parallel().tp_size)
        tables[layer_id] = EngramTable(opened(), f"layers.{layer_id}", num_embeddings, dim)
        return tables[layer_id]

    class Pinned(PLETable):
        """As SGLang builds it, which asks for its type as well."""

        def __init__(self, embedding: Any, **_: Any) -> None:
            _require_one(embedding.tp_size)
            super().__init__(opened(), embedding)

    def begin(layers: tuple[int, ...], ids: torch.Tensor) -> None:
        """Begin to read the rows of all layers: ids[T, layers, columns]."""
        for index, layer in enumerate(layers):
            if layer in tables:
                tables[layer].ahead.begin(ids[:, index])

    original = engram.EngramHasher.__init__

    def init(self: Any, layout: Any, *args: Any, **kwargs: Any) -> None:
        original(self, layout, *args, **kwargs)
        self.register_forward_hook(lambda _, args, ids: begin(layout.layer_ids, ids))

    engram.EngramEmbedding = embed
    engram.EngramHasher.__init__ = init
    qwen4_exp.Qwen4ExpPinnedHostEmbedding = Pinned


def _require_one(num_ranks: int) -> None:
    if num_ranks != 1:
        raise ValueError(f"tp_size = {num_ranks}: tables in a store are not sharded; allowed is 1")


def _require(store: Store, table: str | None, num_rows: int, dim: int) -> None:
    if (found := (store.num_rows(table), store.dim(table))) != (num_rows, dim):
        raise ValueError(f"table of the store: {found[0]} rows of {found[1]} values; needed are {num_rows} of {dim}")
