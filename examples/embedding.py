"""The smallest embedding of a store in a model: a module whose rows come from disk, read while earlier layers compute.

It writes its checkpoint with safetensors, which `pip install safetensors` brings, and the extra `[dev]`.
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from tiercache import Store, Ticket


class StoredEmbedding(torch.nn.Module):
    """`torch.nn.Embedding` for a table that no memory holds. Call `prefetch` as soon as the indices are known."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store
        self.pending: tuple[torch.Tensor, Ticket] | None = None

    def prefetch(self, indices: torch.Tensor) -> None:
        """Begin to read the rows of the next `forward`."""
        self.pending = indices.clone(), self.store.prefetch(indices)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows: [*indices.shape, dim], of these indices, whatever was prefetched."""
        pending, self.pending = self.pending, None
        if pending is not None:
            prefetched, ticket = pending
            if torch.equal(prefetched, indices):
                return ticket.take()
            ticket.cancel()
        return self.store.fetch(indices)


def main(directory: Path) -> torch.Tensor:
    """Look rows of a checkpoint up through a tier of a tenth of its size; bfloat16[2, 3, 64], as nn.Embedding has them."""
    weight = torch.randn(10_000, 64).to(torch.bfloat16)
    save_file({"embed.weight": weight}, directory / "model.safetensors")
    config = {"table": [{"path": directory / "model.safetensors"}], "host": {"capacity": "128KB"}}
    with Store.open(config) as store:
        embedding = StoredEmbedding(store)
        indices = torch.tensor([[1, 2, 3], [9_999, 2, 1]])
        embedding.prefetch(indices)
        # ... the layers before this one compute ...
        rows: torch.Tensor = embedding(indices)
        assert torch.equal(rows, torch.nn.functional.embedding(indices, weight))
        print(f"{store.stats().host.misses} rows read from disk")
        return rows


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(main(Path(folder)).shape)
