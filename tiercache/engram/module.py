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

Cheng et al., "Conditional Memory via Scalable Lookup", arXiv 2601.07372.
"""

import math
from typing import Any

import torch
from torch import nn

from tiercache.engram.conv import ShortConv
from tiercache.engram.hasher import Hasher
from tiercache.engram.lookup import EngramState, begun, check_table, embed, look_up, rows_of


class MultiHeadEmbedding(nn.Module):
    """The table of an `Engram`, where the demo's checkpoints have it.

    Their `offsets` int64[num_heads], each head's first row, is taken and not used: the hasher's row numbers hold them.
    """

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        unexpected = args[3]
        if prefix + "offsets" in unexpected:
            unexpected.remove(prefix + "offsets")


class Engram(nn.Module):
    """The paper's layer. hidden: [B, T, branches, hidden]."""

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
        self.hasher, self.hidden, self.branches = hasher, hidden, branches
        self.multi_head_embedding = MultiHeadEmbedding(table)
        width = hasher.num_heads * int(table.embedding_dim)  # type: ignore[arg-type]
        self.key_projs = nn.ModuleList(nn.Linear(width, hidden) for _ in range(branches))
        self.value_proj = nn.Linear(width, hidden)
        self.norm1 = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(branches))
        self.norm2 = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(branches))
        self.short_conv = ShortConv(hidden, branches, kernel=kernel, dilation=dilation or hasher.context + 1)

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
        return look_up(self.hasher, self.table, ids, state, deadline)

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, state: EngramState | None = None) -> torch.Tensor:
        """What is added to hidden: the same shape. ids: as `prefetch` returns them, or as it takes them."""
        _check(hidden, ids, self.branches, self.hidden)
        embedded = self._embedded(ids, state)
        value = self._gates(hidden, embedded) * self.value_proj(embedded).unsqueeze(2)
        return value + self.short_conv(value, None if state is None else state.conv)

    def gates(self, hidden: torch.Tensor, ids: torch.Tensor, state: EngramState | None = None) -> torch.Tensor:
        """How far each token's gates open, 0 to 1: [B, T, branches]. To look at; moves a state's tokens on."""
        _check(hidden, ids, self.branches, self.hidden)
        return self._gates(hidden, self._embedded(ids, state)).squeeze(3)

    def _embedded(self, ids: torch.Tensor, state: EngramState | None) -> torch.Tensor:
        rows = rows_of(self.hasher, ids, state)
        return embed(self.table, rows, self.value_proj.weight.dtype)

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
        return look_up(self.hasher, self.embed, ids, state, deadline)

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, state: EngramState | None = None) -> torch.Tensor:
        """What is added to hidden, float32 of the same shape. ids: as `prefetch` returns them, or as it takes them."""
        _check(hidden, ids, self.branches, self.hidden)
        rows = rows_of(self.hasher, ids, state)
        fused = self.wkv(embed(self.embed, rows, self.wkv.weight.dtype)).float()
        keys, value = fused.unflatten(2, (self.branches + 1, self.hidden)).split((self.branches, 1), 2)
        query = hidden.float()
        dot = (query * self.q_weight.float() * self.k_weight.float() * keys).sum(-1, keepdim=True)
        agreement = dot * _scale(query, self.eps) * _scale(keys, self.eps) / math.sqrt(self.hidden)
        return gate(agreement) * value


def gate(agreement: torch.Tensor) -> torch.Tensor:
    """sigmoid of the signed square root: of any shape. Zero has no sign, so its gate is one half."""
    return (agreement.sign() * agreement.abs().clamp_min(1e-6).sqrt()).sigmoid()


def _scale(values: torch.Tensor, eps: float) -> torch.Tensor:
    return (values.square().mean(-1, keepdim=True) + eps).rsqrt()


def _check(hidden: torch.Tensor, ids: torch.Tensor, branches: int, width: int) -> None:
    if hidden.ndim != 4 or hidden.shape[2:] != (branches, width):
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; allowed is [B, T, {branches}, {width}]")
    if ids.shape[:2] != hidden.shape[:2]:
        there, here = (" x ".join(str(length) for length in shape[:2]) for shape in (ids.shape, hidden.shape))
        raise ValueError(f"ids are of {there} tokens; hidden is of {here}")
