"""vLLM, experimental: the n-gram tables of DeepSeek-V4.1 and Qwen4Exp in a store, instead of pinned host memory.

    tiercache.adapters.vllm.install("store.toml")  # before the model is built, in the process that builds it

is to be called by a plugin of the group `vllm.general_plugins`, which vLLM loads in each of its processes. Tables of the
store are named "layers.L" by the layer, from zero. Written for vLLM 0.33.0, its models for NVIDIA,
`engram_config.cpu_offload`, one GPU.

What was run: the modules below, on the CPU, against the sources of vLLM 0.33.0 with what they import left out: their tables
answer as vLLM's modules ask. What was not: a GPU, a whole engine, CUDA graphs. To be expected there:

- A lookup waits on the host for the ids, and DeepSeek's for the rows as well, so that it must not be captured: vLLM calls it
  in the breaks of piecewise graphs (`cudagraph_mode=PIECEWISE`); full graphs fail when they are captured.
- Qwen4Exp prefetches while the layer before computes. DeepSeek's rows are read before the first layer begins.
- The checkpoint's tables are still opened by vLLM's loader, which copies nothing of them.
"""

import functools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tiercache.adapters.ahead import Ahead, without_rows
from tiercache.config import StoreConfig
from tiercache.store import Store


class EngramTable(nn.Module):
    """What DeepSeek-V4.1's `Engram` has as `embed_tokens`: vLLM's ParallelEngramEmbedding, unsharded."""

    cpu_offload = True
    dp_size = tp_size = 1

    def __init__(self, store: Store, table: str, num_embeddings: int, dim: int, num_heads: int) -> None:
        """num_embeddings and dim are the model's. ValueError where the store's table has others."""
        super().__init__()
        _require(store, table, num_embeddings, dim)
        self.store, self.table, self.dim = store, table, dim
        self.n_hash_cols = self.part_n_hash_cols = num_heads
        self.weight = without_rows(dim, torch.float8_e4m3fn)
        self.weight_scale_inv = without_rows(dim // 32, torch.uint8)

    def lookup(self, indices: torch.Tensor, out: torch.Tensor, background: bool = False) -> None:
        """Write the rows indices[T, n_hash_cols] to out[T, n_hash_cols, dim], bfloat16, on the current stream."""
        out.copy_(self.store.fetch(indices.cpu(), table=self.table))

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """bfloat16[T, n_hash_cols, dim] on the device of indices[T, n_hash_cols]."""
        out = torch.empty((*indices.shape, self.dim), dtype=torch.bfloat16, device=indices.device)
        self.lookup(indices, out)
        return out

    def collapse_huge_pages(self) -> None:
        """There are none."""


class PLETable(nn.Module):
    """What Qwen4Exp's n-gram embedding has as `ngram_embedding`: vLLM's Qwen4ExpPLEPinnedHostEmbedding, unsharded.

    Rows arrive decoded, in the store's dtype: a global scale of FP8 is a field of its table. The scale is not rounded to
    bfloat16 before it is applied, as vLLM does, and the product is rounded once.
    """

    supports_prefetch = True

    def __init__(
        self, store: Store, table: str, num_embeddings: int, dim: int, num_heads: int, eager: Callable[[Any], Any]
    ) -> None:
        """eager: vLLM's decorator for what runs between the pieces of a CUDA graph."""
        super().__init__()
        _require(store, table, num_embeddings, dim)
        self.org_vocab_size, self._num_heads, self._dtype = num_embeddings, num_heads, store.dtype(table)
        self.weight = without_rows(dim, self._dtype)
        self.weight_scale = without_rows(1, torch.float32)
        self.start_prefetch = eager(self._start)
        self._finish_between_graphs = eager(self._finish)
        self._ahead, self._ids = Ahead(store, table), torch.empty(0, num_heads, dtype=torch.int64)

    def finalize_prefetch(self, total_tokens: int) -> torch.Tensor:
        """The rows of the last `start_prefetch`: dtype[total_tokens, num_heads * dim], on the module's device."""
        out = self.weight.new_empty((total_tokens, self._num_heads * self.weight.shape[1]))
        self._finish_between_graphs(out)
        return out

    def dequantize(self, embeddings: torch.Tensor, output_dtype: torch.dtype) -> torch.Tensor:
        """Rows in the activations' dtype."""
        return embeddings.to(output_dtype)

    def _start(self, ngram_ids: torch.Tensor) -> None:
        """Begin to read the rows int64[T, num_heads]."""
        self._ids = ngram_ids.cpu().clone()
        self._ahead.begin(self._ids)

    def _finish(self, out: torch.Tensor) -> None:
        if len(out) != len(self._ids):
            raise RuntimeError(f"rows of {len(out)} tokens are wanted, those of {len(self._ids)} were prefetched")
        out.copy_(self._ahead.take(self._ids).flatten(-2))


def install(config: StoreConfig | str | os.PathLike[str] | Mapping[str, Any]) -> None:
    """From now on models of this process read their tables from a store, opened when the first one is built.

    config: as of `Store.open`. A model is then refused with ValueError where its table does not fit or it is sharded over
    several ranks, and with KeyError where the store has no such table.
    """
    from vllm.compilation.breakable_cudagraph import eager_break_during_capture
    from vllm.distributed import get_etp_group, get_tensor_model_parallel_world_size
    from vllm.models.deepseek_v41.common import engram
    from vllm.models.qwen4_exp.nvidia import ngram_embedding

    opened = functools.cache(lambda: Store.open(config))

    def create(self: Any, layout: Any, layer_hash_index: int) -> EngramTable:
        _require_one(get_tensor_model_parallel_world_size())
        name = f"layers.{layout.layer_ids[layer_hash_index]}"
        return EngramTable(opened(), name, layout.num_embeddings[layer_hash_index], layout.head_dim, layout.n_hash_cols)

    def pinned(num_embeddings: int, embedding_dim: int, *, prefix: str, num_ngram_heads: int, **_: Any) -> PLETable:
        _require_one(get_etp_group().world_size)
        name = re.search(r"layers\.\d+", prefix)
        assert name is not None, prefix
        return PLETable(opened(), name[0], num_embeddings, embedding_dim, num_ngram_heads, eager_break_during_capture)

    engram.Engram._create_embedding = create
    ngram_embedding.Qwen4ExpPLEPinnedHostEmbedding = pinned


def _require_one(num_ranks: int) -> None:
    if num_ranks != 1:
        raise ValueError(f"tensor_parallel_size = {num_ranks}: tables in a store are not sharded; allowed is 1")


def _require(store: Store, table: str, num_rows: int, dim: int) -> None:
    if (found := (store.num_rows(table), store.dim(table))) != (num_rows, dim):
        raise ValueError(f"table {table!r} of the store: {found[0]} rows of {found[1]} values; needed are {num_rows} of {dim}")
