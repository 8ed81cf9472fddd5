"""The rows that a text asks for, by the hashing of a model family."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tiercache.engram.deepseek import deepseek_hashers
from tiercache.engram.demo import fit_hasher
from tiercache.engram.hasher import Hasher
from tiercache.engram.longcat import longcat_hasher
from tiercache.engram.qwen import qwen_hashers

_PAD = 2
_TABLE_ROWS = 8_134_407
"""Of the demo's table where nobody says, the number of 264 B records in 2 GiB."""


def _demo(vocabulary: int, num_rows: int | None) -> Hasher:
    return fit_hasher(_TABLE_ROWS if num_rows is None else num_rows, vocabulary=vocabulary)


def _deepseek(vocabulary: int, num_rows: int | None) -> Hasher:
    return deepseek_hashers((1,), compression=None, compressed_vocab_size=vocabulary)[0]


def _qwen(vocabulary: int, num_rows: int | None) -> Hasher:
    return qwen_hashers(vocab_size=vocabulary, eos_token_id=vocabulary - 1)[0]


def _longcat(vocabulary: int, num_rows: int | None) -> Hasher:
    return longcat_hasher(eos_token_id=_PAD, vocab_size=vocabulary)


FAMILIES: dict[str, Callable[[int, int | None], Hasher]] = {
    "demo": _demo,
    "deepseek": _deepseek,
    "qwen": _qwen,
    "longcat": _longcat,
}
"""By name, (vocabulary, rows of the table or None) -> the hasher of a family's first layer. Ids are hashed as they are.

Only the demo's heads fit themselves to a table. For Qwen the last id ends a text, for LongCat id 2.
"""


def order_edges(family: str, *, vocabulary: int, num_rows: int | None = None) -> npt.NDArray[np.int64]:
    """Where the rows of each order of n-grams begin in a family's table, and where it ends: int64[N], orders 2..N.

    vocabulary, num_rows: as for `hashed`.
    """
    hasher = FAMILIES[family](vocabulary, num_rows)
    return np.append(hasher.offsets[:: hasher.num_heads // hasher.context], hasher.num_rows)


def hashed(
    family: str,
    tokens: npt.NDArray[np.int64],
    documents: npt.NDArray[np.int64],
    *,
    vocabulary: int,
    num_rows: int | None = None,
) -> npt.NDArray[np.int64]:
    """Rows of each token, int64[T, heads]. tokens int64[T]; documents int64[D], lengths.

    num_rows: of the table that they are for; None for the family's own.

    ValueError where an id is not below `vocabulary`, or the family's table has more rows.
    """
    hasher = FAMILIES[family](vocabulary, num_rows)
    if num_rows is not None and hasher.num_rows > num_rows:
        raise ValueError(f"num_rows = {num_rows}: the hashing of {family!r} is for a table of {hasher.num_rows} rows")
    return hasher.rows(tokens, documents)
