"""Engram: the layer that adds what a table knows of the last n-grams to a model's hidden states.

The rows of a token's n-grams, side by side, are one vector. It is projected to a value, which all branches of the hidden state
share, and to a key for each branch. How well key and hidden state agree opens a gate:

    agreement = <RMSNorm(key), RMSNorm(hidden)> / sqrt(d)
    gate = sigmoid(sign(agreement) * sqrt(max(|agreement|, 1e-6)))

`Engram` is the form of the paper's demo, with a short convolution over the gated values; `FusedEngram` that of
DeepSeek-V4.1-Flash. Parameters have the names and shapes of the demo and of the released checkpoint. Both return what is to be
added to the hidden states before the block's attention.

The table is an `nn.Embedding`, which trains, densely or with `sparse=True`, or a `TieredEmbedding`, which does not: then the
gradient reaches all other parameters and the hidden states. They are called the same way and may replace one another.

    state = engram.new_state(batch)            # of one batch of texts; None where each call has whole texts
    rows = engram.prefetch(tokens, state)      # when the tokens are known
    ...                                        # the layers below
    hidden = hidden + engram(hidden, rows, state)

A model that trained with a resident table is served from its own checkpoint. The table's name there is the module's and
`multi_head_embedding.embedding.weight` (`Engram`) or `embed.weight` (`FusedEngram`), and a store reads it where it lies:

    save_file(model.state_dict(), "model.safetensors")
    name = "engram.multi_head_embedding.embedding.weight"
    config = {"table": [{"path": "model.safetensors", "fields": [name]}], "host": {"capacity": "4GiB"}}
    model = Model(TieredEmbedding.open(config))
    model.load_state_dict(load_file("model.safetensors"))  # all but the table, which is compared

Where sequences come and go, one `NgramState` of a slot for each keeps their tokens, and its `append` gives the rows that
`prefetch` and `forward` take instead of token ids. An `Engram` keeps its convolution in one `EngramState` of as many slots
beside it: the lines of `conv` in use are gathered for a step and scattered after it, and zeroed when a slot is reset.

Gradient checkpointing runs a forward twice, and a state would move on twice: a layer with a state raises RuntimeError there.
Truncated backpropagation without checkpointing may use one; no gradient goes through it.

Cheng et al., "Conditional Memory via Scalable Lookup", arXiv 2601.07372.
"""

import math
from typing import Any

import torch
from torch import nn

from tiercache.engram.conv import ShortConv
from tiercache.engram.embedding import TieredEmbedding
from tiercache.engram.hasher import Hasher, Ids
from tiercache.engram.lookup import (
    EngramState,
    begun,
    check_hidden,
    check_state,
    check_table,
    embed,
    expect,
    look_up,
    move_on,
    rows_of,
)
from tiercache.expectation import Expectation


class MultiHeadEmbedding(nn.Module):
    """The table of an `Engram`, where the demo's checkpoints have it.

    Their `offsets` int64[num_heads], each head's first row, is compared with the hasher's, whose row numbers hold them: others
    are an error of load_state_dict.
    """

    def __init__(self, embedding: nn.Module, offsets: Ids) -> None:
        super().__init__()
        self.embedding = embedding
        self._offsets = offsets

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        _, _, _, unexpected, error_msgs = args
        key = prefix + "offsets"
        if key in unexpected:
            unexpected.remove(key)
        offsets = state_dict.get(key)
        if offsets is not None and not offsets.is_meta and offsets.tolist() != self._offsets.tolist():
            error_msgs.append(f"{key} = {offsets.tolist()}: this layer's hasher has {self._offsets.tolist()}")


class Engram(nn.Module):
    """The paper's layer. hidden: [B, T, branches, hidden], of the parameters' dtype or one that it holds."""

    def __init__(
        self,
        hasher: Hasher,
        table: nn.Module,
        hidden: int,
        *,
        branches: int = 4,
        kernel: int = 4,
        dilation: int | None = None,
    ) -> None:
        """hidden: width of a branch. table: rows of one head each. dilation: None: the highest order of the n-grams."""
        super().__init__()
        check_table(table, hasher)
        dilation = hasher.context + 1 if dilation is None else dilation
        self.hasher, self.hidden, self.branches = hasher, hidden, branches
        self.multi_head_embedding = MultiHeadEmbedding(table, hasher.offsets)
        width = hasher.num_heads * int(table.embedding_dim)  # type: ignore[arg-type]
        self.key_projs = nn.ModuleList(nn.Linear(width, hidden) for _ in range(branches))
        self.value_proj = nn.Linear(width, hidden)
        self.norm1 = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(branches))
        self.norm2 = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(branches))
        self.short_conv = ShortConv(hidden, branches, kernel=kernel, dilation=dilation)

    @property
    def table(self) -> nn.Module:
        """The `nn.Embedding` or `TieredEmbedding`; set `multi_head_embedding.embedding` to replace it."""
        return self.multi_head_embedding.embedding

    def new_state(self, batch: int) -> EngramState:
        """At the start of `batch` texts."""
        conv = self.short_conv.new_state(batch)
        return EngramState(begun(self.hasher, batch, conv.device), conv)

    def prefetch(self, ids: torch.Tensor, state: EngramState | None = None, *, deadline: float | None = None) -> torch.Tensor:
        """Rows of these tokens, int64[B, T, num_heads], for `forward`; begins to read them where the table lies in tiers.

        ids: token ids int64[B, T], or such rows. state: its tokens move on; None: the ids begin their texts. deadline: as in
        `Store.prefetch`.
        """
        check_state(state, ids, self.hasher.context, self.value_proj.weight.dtype, self._conv)
        return look_up(self.hasher, self.table, ids, state, deadline)

    def expect(self, ids: torch.Tensor, state: EngramState | None = None) -> Expectation | None:
        """Say which tokens come next, as far as they are known, so that their rows are kept; reads nothing, moves no state.

        ids, state: as of `prefetch`. What comes back may cancel it, see `Store.expect`; None where the table is not in tiers.
        """
        check_state(state, ids, self.hasher.context, self.value_proj.weight.dtype, self._conv)
        return expect(self.hasher, self.table, ids, state)

    def drop(self) -> None:
        """Give up the prefetches whose forward is not going to come."""
        drop(self.table)

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, state: EngramState | None = None) -> torch.Tensor:
        """What is added to hidden: the same shape. ids: as `prefetch` returns them, or as it takes them."""
        rows, tokens = self._looked_up(hidden, ids, state)
        embedded = embed(self.table, rows, self.value_proj.weight.dtype)
        value = self._gates(hidden, embedded) * self.value_proj(embedded).unsqueeze(2)
        past = None if state is None or state.conv is None else state.conv.clone()
        added = value + self.short_conv(value, past)
        move_on(state, tokens)
        if state is not None and state.conv is not None and past is not None:
            state.conv.copy_(past)
        return added

    def gates(self, hidden: torch.Tensor, ids: torch.Tensor, state: EngramState | None = None) -> torch.Tensor:
        """How far each token's gates open, 0 to 1: [B, T, branches]. To look at; moves a state's tokens on."""
        rows, tokens = self._looked_up(hidden, ids, state)
        opened = self._gates(hidden, embed(self.table, rows, self.value_proj.weight.dtype)).squeeze(3)
        move_on(state, tokens)
        return opened

    @property
    def _conv(self) -> tuple[int, int]:
        """Channels and span of the convolution."""
        return self.branches * self.hidden, self.short_conv.span

    def _looked_up(
        self, hidden: torch.Tensor, ids: torch.Tensor, state: EngramState | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `rows_of`, after all that can be checked."""
        _check(hidden, ids, self.branches, self.hidden)
        check_hidden(hidden, self.value_proj.weight.dtype)
        check_state(state, ids, self.hasher.context, self.value_proj.weight.dtype, self._conv)
        return rows_of(self.hasher, ids, state)

    def _gates(self, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        opened = []
        for branch, (project, norm1, norm2) in enumerate(zip(self.key_projs, self.norm1, self.norm2, strict=True)):
            agreement = (norm1(project(embedded)) * norm2(hidden[:, :, branch])).sum(-1, keepdim=True)
            opened.append(gate(agreement / math.sqrt(self.hidden)))
        return torch.stack(opened, 2)


class FusedEngram(nn.Module):
    """The layer of DeepSeek-V4.1-Flash: one projection to keys and value, no convolution, the gate in float32.

    Returns float32, so that the sum with the hidden states is rounded once. wkv: [(branches + 1) * hidden, width], the
    branches' keys and then the value. q_weight, k_weight: [branches, hidden], of the norms.

    At an image's position (a negative token id) it returns numbers without a meaning, those of padding: the model masks them,
    as in `torch.where((tokens < 0)[:, :, None, None], 0, added)`.
    """

    def __init__(self, hasher: Hasher, table: nn.Module, hidden: int, *, branches: int = 4, eps: float = 1e-6) -> None:
        """hidden: width of a branch. table: rows of one head each. eps: of the norms."""
        super().__init__()
        check_table(table, hasher)
        self.hasher, self.hidden, self.branches, self.eps = hasher, hidden, branches, eps
        self.embed = table
        width = hasher.num_heads * int(table.embedding_dim)  # type: ignore[arg-type]
        self.wkv = nn.Linear(width, (branches + 1) * hidden, bias=False)
        self.q_weight = nn.Parameter(torch.ones(branches, hidden))
        self.k_weight = nn.Parameter(torch.ones(branches, hidden))

    def new_state(self, batch: int) -> EngramState:
        """At the start of `batch` texts."""
        return EngramState(begun(self.hasher, batch, self.wkv.weight.device), None)

    def prefetch(self, ids: torch.Tensor, state: EngramState | None = None, *, deadline: float | None = None) -> torch.Tensor:
        """As `Engram.prefetch`."""
        check_state(state, ids, self.hasher.context, self.wkv.weight.dtype, None)
        return look_up(self.hasher, self.embed, ids, state, deadline)

    def expect(self, ids: torch.Tensor, state: EngramState | None = None) -> Expectation | None:
        """As `Engram.expect`."""
        check_state(state, ids, self.hasher.context, self.wkv.weight.dtype, None)
        return expect(self.hasher, self.embed, ids, state)

    def drop(self) -> None:
        """Give up the prefetches whose forward is not going to come."""
        drop(self.embed)

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, state: EngramState | None = None) -> torch.Tensor:
        """What is added to hidden, float32 of the same shape. ids: as `prefetch` returns them, or as it takes them."""
        _check(hidden, ids, self.branches, self.hidden)
        check_state(state, ids, self.hasher.context, self.wkv.weight.dtype, None)
        rows, tokens = rows_of(self.hasher, ids, state)
        fused = self.wkv(embed(self.embed, rows, self.wkv.weight.dtype)).float()
        keys, value = fused.unflatten(2, (self.branches + 1, self.hidden)).split((self.branches, 1), 2)
        query = hidden.float()
        dot = (query * self.q_weight.float() * self.k_weight.float() * keys).sum(-1, keepdim=True)
        agreement = dot * _scale(query, self.eps) * _scale(keys, self.eps) / math.sqrt(self.hidden)
        added = gate(agreement) * value
        move_on(state, tokens)
        return added


def drop(table: nn.Module) -> None:
    """Give up what waits in a table in tiers; a resident one has nothing."""
    if isinstance(table, TieredEmbedding):
        table.drop()


def gate(agreement: torch.Tensor) -> torch.Tensor:
    """sigmoid of the signed square root: of any shape. Zero has no sign, so its gate is one half."""
    return (agreement.sign() * agreement.abs().clamp_min(1e-6).sqrt()).sigmoid()


def _scale(values: torch.Tensor, eps: float) -> torch.Tensor:
    return (values.square().mean(-1, keepdim=True) + eps).rsqrt()


def _check(hidden: torch.Tensor, ids: torch.Tensor, branches: int, width: int) -> None:
    if hidden.ndim != 4 or hidden.shape[2:] != (branches, width):
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; allowed is [B, T, {branches}, {width}]")
    if not hidden.is_floating_point():
        raise TypeError(f"hidden is {hidden.dtype}; allowed are floating-point numbers")
    if ids.shape[:2] != hidden.shape[:2]:
        there, here = (" x ".join(str(length) for length in shape[:2]) for shape in (ids.shape, hidden.shape))
        raise ValueError(f"ids are of {there} tokens; hidden is of {here}")
