"""Which rows a token reads, and what a text in chunks carries from one chunk to the next."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tiercache.engram.embedding import TieredEmbedding
from tiercache.engram.hasher import Hasher
from tiercache.engram.window import ABSENT
from tiercache.expectation import Expectation


@dataclass(frozen=True)
class EngramState:
    """Where an Engram stands in a batch of texts. Made by `new_state`; its tensors are moved on in place.

    tokens  int64[B, context]        last tokens whose rows were looked up, oldest first: `prefetch` moves them on
    conv    [B, channels, span]      last positions that the convolution saw: `forward` does; None without a convolution

    So prefetches may run ahead of the forward passes, if both go through the text in order. A call that raises leaves the state
    as it was, so that it may be repeated. A state that is made under `torch.inference_mode` serves under it alone.
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

    The state's tokens move on by the token ids once the reads have begun; None: the ids begin their texts. Errors: `rows_of`'s
    and those of `Store.prefetch`.
    """
    rows, tokens = rows_of(hasher, ids, state)
    if isinstance(table, TieredEmbedding):
        table.prefetch(rows, deadline=deadline)
    move_on(state, tokens)
    return rows


def expect(hasher: Hasher, table: nn.Module, ids: torch.Tensor, state: EngramState | None) -> Expectation | None:
    """Say that `ids`, as of `look_up`, come next: token by token, of all texts of the batch. The state stays where it is.

    None where the table is not in tiers. Errors: `rows_of`'s and those of `Store.expect`.
    """
    if not isinstance(table, TieredEmbedding):
        return None
    return table.expect(rows_of(hasher, ids, state)[0].transpose(0, 1))


def rows_of(
    hasher: Hasher, ids: torch.Tensor, state: EngramState | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(rows int64[B, T, num_heads] of `ids`, tokens int64[B, context] where the state is then; None: where it is now).

    Changes nothing. ValueError for ids of another shape, TypeError for what are no integers.
    """
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"ids are {ids.dtype}; allowed are integers")
    if ids.ndim == 3 and ids.shape[2] == hasher.num_heads:
        return ids, None
    if ids.ndim != 2:
        raise ValueError(f"ids have shape {tuple(ids.shape)}; allowed are token ids [B, T] and rows [B, T, {hasher.num_heads}]")
    batch, length = ids.shape
    previous = begun(hasher, batch, ids.device) if state is None else state.tokens.to(ids.device)
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        rows = torch.from_numpy(hasher.batch(ids.numpy(), previous.numpy()))
    else:
        rows = hasher.torch_rows(ids, previous)
    return rows, None if state is None else torch.cat([previous, ids.long()], 1)[:, length:]


def move_on(state: EngramState | None, tokens: torch.Tensor | None) -> None:
    """Put a state where `rows_of` says."""
    if state is not None and tokens is not None:
        state.tokens.copy_(tokens)


def check_hidden(hidden: torch.Tensor, dtype: torch.dtype) -> None:
    """TypeError for hidden states that parameters of `dtype` do not compute with. Under autocast they do."""
    if not _holds(dtype, hidden):
        raise TypeError(f"hidden is {hidden.dtype}; this layer's parameters are {dtype}")


def _holds(dtype: torch.dtype, tensor: torch.Tensor) -> bool:
    return torch.promote_types(tensor.dtype, dtype) == dtype or torch.is_autocast_enabled(tensor.device.type)


def check_state(
    state: EngramState | None, ids: torch.Tensor, context: int, dtype: torch.dtype, conv: tuple[int, int] | None
) -> None:
    """Raise where a state is not one of this layer and of these texts, or is asked to go through a text for a second time.

    context: the hasher's. dtype: of the layer's parameters. conv: (channels, span) of its convolution. TypeError, ValueError,
    and RuntimeError inside of a backward pass.
    """
    if state is None:
        return
    if not isinstance(state, EngramState):
        raise TypeError(f"state is a {type(state).__name__}; allowed are what new_state makes, and None")
    batch = ids.shape[0] if ids.ndim else 0
    if state.tokens.ndim != 2 or state.tokens.shape[1] != context:
        raise ValueError(f"state has tokens of shape {tuple(state.tokens.shape)}; this layer's are [B, {context}]")
    if state.tokens.shape[0] != batch:
        raise ValueError(f"state is of {state.tokens.shape[0]} sequences; these ids are of {batch}")
    found, wanted = None if state.conv is None else tuple(state.conv.shape), None if conv is None else (batch, *conv)
    if found != wanted:
        raise ValueError(f"state has a convolution of shape {found}; this layer's is {wanted}: the state is another layer's")
    if state.conv is not None and not _holds(dtype, state.conv):
        raise TypeError(f"state has a convolution of {state.conv.dtype}; this layer's parameters are {dtype}")
    # The graph task is -1 outside of a backward pass.
    if (ids.ndim == 2 or conv is not None) and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0:
        raise RuntimeError("a layer with a state was called in a backward pass: gradient checkpointing needs state = None")


def begun(hasher: Hasher, batch: int, device: torch.device) -> torch.Tensor:
    """The tokens before the start of `batch` sequences: int64[batch, context]."""
    return torch.full((batch, hasher.context), ABSENT, dtype=torch.int64, device=device)


def embed(table: nn.Module, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The heads' rows side by side: dtype[B, T, num_heads * dim], of int64[B, T, num_heads]."""
    if isinstance(table, nn.Embedding):
        rows = rows.to(table.weight.device, torch.int64)
    embedded: Any = table(rows)
    return embedded.flatten(2).to(dtype)
