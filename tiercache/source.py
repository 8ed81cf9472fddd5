"""Source: anything that can produce rows. Tables in memory, test doubles and remote stores are sources."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tiercache.records import Record


class Source(Protocol):
    """Rows by number.

    The store calls `read` from its own threads, never twice at the same time, and serves nothing of a read that raised.
    """

    num_rows: int
    """At least 1, and less than 2**62 with the other sources of the store. Like `record`, it is looked at once, at open."""
    record: Record

    def read(self, rows: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]) -> Any:
        """Write the record of `rows[i]` to `out[i]`. rows: int64[n], distinct, in range; out: uint8[n, record_bytes].

        Raises OSError where bytes cannot be had; what `out` then holds is not used.
        """

    def close(self) -> Any:
        """Let go of what the source holds. Called once, by the store's `close`."""
