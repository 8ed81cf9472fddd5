"""The smallest use of a store: a table larger than its tier, behind the interface of an embedding."""

import numpy as np
import torch

from tiercache import Store


def main() -> torch.Tensor:
    """Fetch a few rows of a table of 10,000 through a tier of 1,000; float32[2, 3, 16]."""
    table = np.arange(10_000 * 16, dtype=np.float32).reshape(10_000, 16)
    with Store.open({"host": {"capacity": 64_000}}, tables={"embed": table}) as store:
        ticket = store.prefetch(torch.tensor([[1, 2, 3], [9_999, 2, 1]]))
        return ticket.take()


if __name__ == "__main__":
    print(main())
