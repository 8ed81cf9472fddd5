"""Reading a recording: batch by batch in constant memory. A damaged one is read up to the damage, which is told."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tiercache.errors import FormatError
from tiercache.recording.blocks import DATA, END, HEAD, Block, Damaged, bases_of, batches_of, blocks, tables_of
from tiercache.storage.table import failures


class DamagedRecording(RuntimeWarning):
    """A recording that could be read only in part, or was never closed.

    path, why, and where: `offset`, the byte from which on nothing was read; `num_batches`, whole ones before it.
    """

    def __init__(self, path: Path, offset: int, num_batches: int, why: str) -> None:
        super().__init__(f"{path}: {why}, at byte {offset}; {num_batches:,} whole batches are before it")
        self.path, self.offset, self.num_batches, self.why = path, offset, num_batches, why


class Recording:
    """A recording on disk.

    tables  of which it is, in the order in which their rows follow one another as rows of the store
    Raises StorageError where it cannot be read, FormatError where it is none.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.dropped = (0, 0)
        """(batches, rows) that were not recorded, as far as `blocks` has read."""
        with failures(self.path), open(self.path, "rb") as file:
            try:
                found = next(blocks(file), None)
                if found is None or found[1]["kind"] != HEAD:
                    raise Damaged("it begins with no head")
                self.tables = tables_of(found[2])
            except Damaged as error:
                raise FormatError(f"{self.path}: not a recording of a store: {error}") from error

    @property
    def bases(self) -> npt.NDArray[np.int64]:
        """int64[t], the row of the store that each table begins with."""
        return bases_of(self.tables)

    def blocks(self) -> Iterator[Block]:
        """Blocks of batches. Warns of DamagedRecording, and ends, where the rest cannot be read or the end is missing."""
        self.dropped = (0, 0)
        num_batches, offset, ended = 0, 0, False
        with failures(self.path), open(self.path, "rb") as file:
            try:
                for offset, header, payload in blocks(file):
                    if header["kind"] == HEAD and tables_of(payload) != self.tables:
                        raise Damaged("what was appended is of other tables")
                    dropped = int(header["dropped_batches"]), int(header["dropped_rows"])
                    if header["kind"] == DATA:
                        block = batches_of(header, payload, self.tables)
                        num_batches += block.sizes.size
                    self.dropped = self.dropped[0] + dropped[0], self.dropped[1] + dropped[1]
                    ended = header["kind"] == END
                    if header["kind"] == DATA:
                        yield block
                    offset = file.tell()
                why = "" if ended else "the recording was not closed"
            except Damaged as error:
                why = str(error)
        if why:
            warnings.warn(DamagedRecording(self.path, offset, num_batches, why), stacklevel=2)

    def batches(self) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
        """(table, its rows int64[n]) of each batch, in the order in which the store planned them."""
        for block in self.blocks():
            ends = np.cumsum(block.sizes)
            for table, start, end in zip(block.tables, ends - block.sizes, ends, strict=True):
                yield self.tables[table].name, block.rows[start:end]
