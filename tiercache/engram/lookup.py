"""Which rows a token reads, and what a text in chunks carries from one chunk to the next."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tiercache.engram.embedding import TieredEmbedding
from tiercache.engram.hasher import Hasher
from tiercache.engram.window import ABSENT


@dataclass(frozen=True)
class EngramState:
    """Where an Engram stands in a batch of texts. Made by `new_state`; its tensors are moved on in place.

    tokens  int64[B, context]        last tokens whose rows were looked up, oldest first: `prefetch` moves them on
    conv    [B, channels, span]      last positions that the convolution saw: `forward` does; None without a convolution

    So prefetches may run ahead of the forward passes, if both go through the text in order.
    """

    tokens: torch.Tensor
    conv: torch.Tensor | None

    def clone(self) -> "EngramState":
        """A state of its own at the same place, to come back to."""
        return EngramState(self.tokens.clone(), None if self.conv is None else self.conv.clone())


def check_table(table: nn.Module, hasher: Hasher) -> None:
    """TypeError for what is no embedding, ValueError for one with fewer rows than the hasher reads."""
    if not isinstance(table, nn.Embedding | TieredEmbedding):
        raise TypeError(f"table is a {type(table).__name__}; allowed are nn.Embedding and TieredEmbedding")
    if table.num_embeddings < hasher.num_rows:
        raise ValueError(f"table has {table.num_embeddings} rows; its hasher needs {hasher.num_rows}")


def look_up(
    hasher: Hasher, table: nn.Module, ids: torch.Tensor, state: EngramState | None, deadline: float | None
) -> torch.Tensor:
    """Rows int64[B, T, num_heads] of `ids`, token ids [B, T] or rows already; begins to read them from a table in tiers.

    The state's tokens move on by the token ids; None: the ids begin their texts. ValueError for ids of another shape.
    """
    rows = rows_of(hasher, ids, state)
    if isinstance(table, TieredEmbedding):
        table.prefetch(rows, deadline=deadline)
    return rows


def rows_of(hasher: Hasher, ids: torch.Tensor, state: EngramState | None) -> torch.Tensor:
    """As `look_up`, without reading."""
    if ids.ndim == 3 and ids.shape[2] == hasher.num_heads:
        return ids
    if ids.ndim != 2:
        raise ValueError(f"ids have shape {tuple(ids.shape)}; allowed are token ids [B, T] and rows [B, T, {hasher.num_heads}]")
    batch, length = ids.shape
    tokens = begun(hasher, batch, ids.device) if state is None else state.tokens
    if tokens.shape != (batch, hasher.context):
        raise ValueError(f"state is of {len(tokens)} sequences; these ids are of {batch}")
    previous = tokens.to(ids.device)
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        rows = torch.from_numpy(hasher.batch(ids.numpy(), previous.numpy()))
    else:
        rows = hasher.torch_rows(ids, previous)
    if state is not None:
        tokens.copy_(torch.cat([previous, ids], 1)[:, length:])
    return rows


def begun(hasher: Hasher, batch: int, device: torch.device) -> torch.Tensor:
    """The tokens before the start of `batch` sequences: int64[batch, context]."""
    return torch.full((batch, hasher.context), ABSENT, dtype=torch.int64, device=device)


def embed(table: nn.Module, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The heads' rows side by side: dtype[B, T, num_heads * dim], of int64[B, T, num_heads]."""
    if isinstance(table, nn.Embedding):
        rows = rows.to(table.weight.device)
    embedded: Any = table(rows)
    return embedded.flatten(2).to(dtype)
