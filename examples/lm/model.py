"""The model, in two forms that have the same number of parameters and of multiply-adds a token.

A transformer: RMSNorm, attention with rotary positions, feed-forward layers with squared ReLU, tied embeddings. One form has an
Engram before one of its blocks. The other is the baseline of the paper, whose sparse parameters are experts: in some blocks a
router sends each token to one of several feed-forward layers (Switch), so that their number costs parameters and no compute.
The multiply-adds of the Engram's projections go into wider feed-forward layers of the baseline.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from tiercache.engram.demo import DemoHasher, demo_hashers
from tiercache.engram.module import Engram

ORDERS = 2  # n-grams of 2 and 3 tokens


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of both forms. vocabulary: ids of the model's own. experts: in each block of `expert_blocks` of the baseline."""

    vocabulary: int = 2048
    hidden: int = 256
    blocks: int = 4
    heads: int = 4
    feed_forward: int = 1024
    engram_block: int = 2
    row_heads: int = 2
    row_dim: int = 64
    experts: int = 6
    expert_blocks: tuple[int, ...] = (1, 3)


class Expert(nn.Module):
    """A feed-forward layer."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.rise = nn.Linear(hidden, width, bias=False)
        self.fall = nn.Linear(width, hidden, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same shape: [.., hidden]."""
        return cast("torch.Tensor", self.fall(self.rise(hidden).relu().square()))


class Experts(nn.Module):
    """One of several feed-forward layers for each token, chosen by a router that learns; `balance` is its auxiliary loss."""

    def __init__(self, hidden: int, width: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden, width) for _ in range(experts))
        self.balance = torch.zeros(())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same shape: [B, T, hidden]."""
        flat = hidden.flatten(0, 1)
        chances = self.router(flat).softmax(-1)
        weight, chosen = chances.max(-1)
        counts = torch.bincount(chosen, minlength=len(self.experts))
        self.balance = len(self.experts) * (counts / len(flat) * chances.mean(0)).sum()
        order = chosen.argsort(stable=True)
        parts = torch.split(flat[order], counts.tolist())
        mixed = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        back = torch.empty_like(mixed).index_copy(0, order, mixed)
        return cast("torch.Tensor", (back * weight.unsqueeze(1)).view_as(hidden))


class Attention(nn.Module):
    """Causal attention, with a cache of keys and values for texts that come in pieces."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, hidden: torch.Tensor, turn: torch.Tensor, cache: "tuple[torch.Tensor, int] | None") -> torch.Tensor:
        """hidden: [B, T, hidden]. turn: [T, head, 2], cosines and sines. cache: ([2, B, heads, most, head], positions in it);
        with positions in it, T is 1."""
        batch, length, width = hidden.shape
        query, key, value = self.qkv(hidden).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key = _turned(query, turn), _turned(key, turn)
        if cache is not None:
            kept, past = cache
            kept[0, :, :, past : past + length] = key
            kept[1, :, :, past : past + length] = value
            key, value = kept[:, :, :, : past + length]
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=length > 1)
        return cast("torch.Tensor", self.out(mixed.transpose(1, 2).reshape(batch, length, width)))


class Block(nn.Module):
    """Attention and a feed-forward layer, or experts."""

    def __init__(self, hidden: int, heads: int, layer: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.attention = Attention(hidden, heads)
        self.layer = layer

    def forward(self, hidden: torch.Tensor, turn: torch.Tensor, cache: "tuple[torch.Tensor, int] | None") -> torch.Tensor:
        """The same shape: [B, T, hidden]."""
        hidden = hidden + self.attention(self.norm1(hidden), turn, cache)
        return hidden + cast("torch.Tensor", self.layer(self.norm2(hidden)))


class Cache:
    """What a batch of texts leaves behind: keys and values of each block, and the Engram's state."""

    def __init__(self, model: "LanguageModel", batch: int, most: int) -> None:
        sizes = model.sizes
        shape = (2, batch, sizes.heads, most, sizes.hidden // sizes.heads)
        self.kept = [torch.zeros(shape) for _ in range(sizes.blocks)]
        self.past = 0
        self.engram = model.engram.new_state(batch) if model.engram else None


class LanguageModel(nn.Module):
    """Token ids to logits. `engram` is None in the baseline."""

    def __init__(self, sizes: Sizes, layers: list[nn.Module], engram: Engram | None) -> None:
        super().__init__()
        self.sizes = sizes
        self.embed = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.blocks = nn.ModuleList(Block(sizes.hidden, sizes.heads, layer) for layer in layers)
        self.engram = engram
        self.norm = nn.RMSNorm(sizes.hidden)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(
        self, tokens: torch.Tensor, cache: Cache | None = None, *, prefetch: bool = True, watch: Any = None
    ) -> torch.Tensor:
        """tokens: int64[B, T]; logits [B, T, vocabulary].

        prefetch: the Engram's rows are on their way before the first block; else it asks for them when it needs them.
        watch: called with the Engram, its hidden states and the rows, to look at them.
        """
        state = cache.engram if cache else None
        ids = tokens
        if self.engram is not None and prefetch:
            ids = self.engram.prefetch(tokens, state)
        past, length = cache.past if cache else 0, tokens.shape[1]
        turn = _turn(past, length, self.sizes.hidden // self.sizes.heads)
        hidden = self.embed(tokens)
        for number, block in enumerate(self.blocks):
            if self.engram is not None and number == self.sizes.engram_block:
                if watch is not None:
                    watch(self.engram, hidden.unsqueeze(2), ids)
                hidden = hidden + self.engram(hidden.unsqueeze(2), ids, state).squeeze(2)
            hidden = block(hidden, turn, (cache.kept[number], past) if cache else None)
        if cache:
            cache.past += length
        return functional.linear(self.norm(hidden), self.embed.weight)

    @property
    def balance(self) -> torch.Tensor:
        """The routers' auxiliary loss in the last pass."""
        losses = [layer.balance for layer in self.modules() if isinstance(layer, Experts)]
        return torch.stack(losses).sum() if losses else torch.zeros(())


class Cost(NamedTuple):
    """parameters: all. multiply_adds: of a token's matrix products and convolutions, without attention's own and the norms'."""

    parameters: int
    multiply_adds: int


def cost_of(model: nn.Module, sizes: Sizes) -> Cost:
    """Counted from the modules: a Linear costs its weights, an expert layer its router and one expert."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    products = sizes.vocabulary * sizes.hidden
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d):
            products += module.weight.numel()
        if isinstance(module, Experts):
            products -= sum(weight.numel() for expert in list(module.experts)[1:] for weight in expert.parameters())
    return Cost(parameters, products)


def baseline(sizes: Sizes) -> LanguageModel:
    """The form with experts. One dense layer is as much wider as an Engram's projections cost."""
    width = ORDERS * sizes.row_heads * sizes.row_dim
    routers = len(sizes.expert_blocks) * sizes.hidden * sizes.experts
    extra = (2 * width * sizes.hidden + 4 * sizes.hidden - routers) // (2 * sizes.hidden)
    layers: list[nn.Module] = []
    for number in range(sizes.blocks):
        if number in sizes.expert_blocks:
            layers.append(Experts(sizes.hidden, sizes.feed_forward, sizes.experts))
        else:
            layers.append(Expert(sizes.hidden, sizes.feed_forward + (extra if number == 0 else 0)))
    return LanguageModel(sizes, layers, None)


def with_engram(sizes: Sizes, table: nn.Module | None = None) -> LanguageModel:
    """The form with an Engram, whose table has the rows that make the parameters those of the baseline.

    table: None: an nn.Embedding to train.
    """
    with torch.device("meta"):
        wanted = cost_of(baseline(sizes), sizes).parameters
        huge = nn.Embedding(1 << 40, sizes.row_dim)
        without = cost_of(_engram_model(sizes, 0, huge), sizes).parameters - huge.weight.numel()
    num_rows = (wanted - without) // sizes.row_dim
    return _engram_model(sizes, num_rows, table)


def save_model(model: LanguageModel, path: Path) -> None:
    """A safetensors file of the weights, with the sizes in its metadata."""
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, path, metadata={"sizes": json.dumps(asdict(model.sizes))})


def load_model(path: Path) -> LanguageModel:
    """What `save_model` saved of a model with an Engram."""
    with safe_open(path, "pt") as file:
        sizes = json.loads(file.metadata()["sizes"])
    model = with_engram(Sizes(**{**sizes, "expert_blocks": tuple(sizes["expert_blocks"])}))
    model.load_state_dict(load_file(path))
    return model


def _engram_model(sizes: Sizes, num_rows: int, table: nn.Module | None) -> LanguageModel:
    heads = ORDERS * sizes.row_heads
    size = max(num_rows // heads, 1)
    while (hasher := _hasher(sizes, size)).num_rows > num_rows and size > 1:
        size = max(size - -(-(hasher.num_rows - num_rows) // heads), 1)
    if table is None:
        table = nn.Embedding(hasher.num_rows, sizes.row_dim)
        nn.init.zeros_(table.weight)  # an n-gram that was never seen says nothing
    engram = Engram(hasher, table, sizes.hidden, branches=1)
    return LanguageModel(sizes, [Expert(sizes.hidden, sizes.feed_forward) for _ in range(sizes.blocks)], engram)


def _hasher(sizes: Sizes, size: int) -> DemoHasher:
    """Of n-grams of the model's ids, with heads of about `size` rows."""
    (hasher,) = demo_hashers(
        (sizes.engram_block,), vocabulary=sizes.vocabulary, table_vocabularies=(size,) * ORDERS, heads=sizes.row_heads, pad_id=0
    )
    return hasher


def _turn(past: int, length: int, head: int) -> torch.Tensor:
    rates = 10_000.0 ** (-torch.arange(0, head, 2) / head)
    angles = torch.arange(past, past + length).unsqueeze(1) * rates
    return torch.stack([angles.cos(), angles.sin()])


def _turned(values: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    first, second = values.chunk(2, -1)
    cosine, sine = turn
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)
