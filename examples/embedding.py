"""The smallest embedding of a store in a model: a module whose rows come from disk, read while earlier layers compute.

It writes its checkpoint with safetensors, which `pip install safetensors` brings, and the extra `[dev]`.
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from tiercache.engram.embedding import TieredEmbedding


class Model(torch.nn.Module):
    """Two layers, the second of which reads rows by token. embed: an `nn.Embedding`, or a `TieredEmbedding` in its place."""

    def __init__(self, embed: torch.nn.Module) -> None:
        super().__init__()
        self.first = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
        self.embed = embed

    def forward(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """hidden: bfloat16[B, T, 64]; tokens: int64[B, T]."""
        if isinstance(self.embed, TieredEmbedding):
            self.embed.prefetch(tokens)  # as soon as the indices are known
        hidden = self.first(hidden)
        rows: torch.Tensor = self.embed(tokens)
        return hidden + rows


def main(directory: Path) -> torch.Tensor:
    """Run a model with its table in memory, and through a tier of a tenth of its size; bfloat16[2, 3, 64], the same bits."""
    resident = Model(torch.nn.Embedding(10_000, 64, dtype=torch.bfloat16))
    save_file(resident.state_dict(), directory / "model.safetensors")
    table = {"path": directory / "model.safetensors", "fields": ["embed.weight"]}
    embedding = TieredEmbedding.open({"table": [table], "host": {"capacity": "128KB"}})
    with embedding.store as store, torch.inference_mode():
        model = Model(embedding)
        model.load_state_dict(resident.state_dict())  # all but the table, which is compared with the store's
        hidden, tokens = torch.randn(2, 3, 64).bfloat16(), torch.tensor([[1, 2, 3], [9_999, 2, 1]])
        before = store.stats().host.misses
        result: torch.Tensor = model(hidden, tokens)
        assert torch.equal(result, resident(hidden, tokens))
        print(f"{store.stats().host.misses - before} rows read from disk")
        return result


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(main(Path(folder)).shape)
