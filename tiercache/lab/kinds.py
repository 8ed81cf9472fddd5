"""Misses by kind of rows: of each table of a store, or of each order of n-grams, whose heads follow one another."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.lab.bounds import Uses


class Kinds(NamedTuple):
    """Kind k has the rows edges[k] : edges[k + 1]; names has one a kind, edges int64[k + 1] ascends."""

    names: tuple[str, ...]
    edges: npt.NDArray[np.int64]

    def of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The kind of each row, int64[n]. Rows beyond the edges are of the first or the last kind."""
        return np.clip(np.searchsorted(self.edges, rows, side="right") - 1, 0, len(self.names) - 1)

    def sizes(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many rows are of each kind, int64[k]."""
        if len(self.names) == 1:
            return np.array([rows.size], np.int64)
        return np.bincount(self.of(rows), minlength=len(self.names))

    def accesses(self, uses: Uses) -> npt.NDArray[np.int64]:
        """Uses of each kind's rows, int64[k]: distinct rows of each batch."""
        return np.bincount(self.of(uses.rows)[uses.number], minlength=len(self.names))


def everything(name: str) -> Kinds:
    """All rows as one kind."""
    return Kinds((name,), np.array([0, 2**62], np.int64))


def by_table(names: Sequence[str], num_rows: Sequence[int]) -> Kinds:
    """The tables of a store, in the order in which their rows follow one another."""
    return Kinds(tuple(names), np.append(0, np.cumsum(num_rows)).astype(np.int64))
