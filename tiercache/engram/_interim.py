"""The hashers' shared interface over `rows`, until they bring it themselves."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tiercache.engram.hashing import NgramHasher


class Interim:
    def __init__(self, hasher: NgramHasher) -> None:
        self.hasher = hasher
        self.num_rows, self.num_heads, self.context = hasher.num_rows, hasher.num_heads, len(hasher.multipliers) - 1

    def batch(self, tokens: Any, previous: Any) -> npt.NDArray[np.int64]:
        if (previous < 0).all():
            flat = self.hasher.rows(tokens.ravel(), np.full(tokens.shape[0], tokens.shape[1]))
            return flat.reshape(*tokens.shape, self.num_heads)
        context = self.context
        if (previous >= 0).all():
            both = np.concatenate([previous, tokens], 1)
            flat = self.hasher.rows(both.ravel(), np.full(both.shape[0], both.shape[1]))
            return np.ascontiguousarray(flat.reshape(*both.shape, self.num_heads)[:, context:])
        return np.stack([self.hasher.rows(t, previous=p[p >= 0]) for t, p in zip(tokens, previous, strict=True)])

    def torch_rows(self, tokens: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.batch(tokens.numpy(), previous.numpy()))
