"""Training on random windows of the text, deterministic by seed, and the loss on held-out documents."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from lm.model import LanguageModel
from lm.text import Text

_BALANCE = 0.01  # weight of the routers' auxiliary loss
_TABLE_RATE = 5  # the table's learning rate over the others', as in the paper
_WARMUP = 0.1  # share of the steps


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """steps of batch * length tokens each; the held-out loss is measured `looks` times, on `windows` windows."""

    steps: int = 300
    batch: int = 8
    length: int = 128
    rate: float = 2e-3
    looks: int = 10
    windows: int = 128


def train(
    model: LanguageModel, text: Text, schedule: Schedule, seed: int, told: Callable[[], Any]
) -> tuple[list[float], list[tuple[int, float]]]:
    """(training loss of each step, (step, held-out loss) of each look), in nats a token. told: called after each step.

    The same seed gives two models the same windows in the same order.
    """
    generator = np.random.default_rng(seed)
    windows = text.windows(schedule.length + 1, schedule.windows)
    table = [model.engram.table.weight] if model.engram else []
    others = [parameter for parameter in model.parameters() if not any(parameter is one for one in table)]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": 0.1, "times": 1},
        {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0, "times": 1},
        {"params": table, "weight_decay": 0.0, "times": _TABLE_RATE},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.95), fused=True)
    losses, seen = [], []
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate * group["times"] * _pace(step / schedule.steps)
        tokens = text.batch(generator, schedule.batch, schedule.length + 1)
        loss = _loss(model, tokens)
        torch.autograd.backward(loss + _BALANCE * model.balance)
        nn.utils.clip_grad_norm_(others, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) * schedule.looks // schedule.steps > step * schedule.looks // schedule.steps:
            seen.append((step + 1, evaluate(model, windows)))
        told()
    return losses, seen


@torch.no_grad()
def evaluate(model: LanguageModel, windows: torch.Tensor) -> float:
    """Mean loss over windows int64[n, length + 1]."""
    losses = [_loss(model, part).item() * len(part) for part in torch.split(windows, 16)]
    return sum(losses) / len(windows)


def _loss(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _pace(done: float) -> float:
    """Share of the learning rate at a share of the training: up, then down along a cosine."""
    if done < _WARMUP:
        return done / _WARMUP + 0.01
    return 0.05 + 0.95 * 0.5 * (1 + float(np.cos(np.pi * (done - _WARMUP) / (1 - _WARMUP))))
