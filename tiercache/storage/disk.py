"""Disk: the file tables of a store, opened; one engine over all their files."""

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

from tiercache.errors import ConfigError, FormatError
from tiercache.stats import StorageStats
from tiercache.storage import queue as q
from tiercache.storage.checksum import PAGE_BYTES
from tiercache.storage.engine import Engine
from tiercache.storage.files import OpenFiles, open_files
from tiercache.storage.probe import Choice, start_engine
from tiercache.storage.reader import FileReader
from tiercache.storage.reads import FILE_BITS, Files, bounce_bytes, longest_piece, new_layout
from tiercache.storage.table import FileTable


class Disk:
    """File tables behind one engine; `readers` has one reader a table, in their order.

    `verify` compares the checksum of every page read: ConfigError where a table has none, or where the engine needs what
    is not installed. StorageError where a file is not what it was when its table was described.
    """

    def __init__(
        self, tables: Sequence[FileTable], *, engine: str, queue_depth: int, direct: bool, verify: bool
    ) -> None:
        for table in tables:
            if verify and table.checksums is None:
                raise ConfigError(
                    f'storage.verify = "page": table {table.name!r} has no page checksums; allowed are packed tables, or "off"'
                )
            for file in table.files:
                if file.size >> FILE_BITS:
                    raise FormatError(f"{file.path}: {file.size} bytes; files of up to {1 << FILE_BITS} bytes are served")
        sums = [table.checksums.load() for table in tables if table.checksums is not None and verify]
        with ExitStack() as begun:
            self._files: OpenFiles = open_files([file for table in tables for file in table.files], direct=direct)
            begun.callback(self._files.close)
            slot_bytes = bounce_bytes(longest_piece(tables), self._files.alignment)
            self._choice: Choice = start_engine(engine, self._files, queue_depth, slot_bytes)
            begun.callback(self.engine.close)
            self.readers = self._new_readers(tables, sums, slot_bytes, verify)
            self._alive = (tuple(tables), sums)
            begun.pop_all()

    def _new_readers(
        self, tables: Sequence[FileTable], sums: Sequence[npt.NDArray[np.int64]], slot_bytes: int, verify: bool
    ) -> list[FileReader]:
        files = Files(
            self._files.descriptors,
            np.array([file.size for file in self._files.files], np.int64),
            _addresses(sums, len(self._files.files)),
            np.array([identity.ctypes.data for identity in self._files.identities], np.int64),
        )
        alignment = max(self._files.alignment, PAGE_BYTES) if verify else self._files.alignment
        first_file = 0
        readers = []
        for table in tables:
            layout = new_layout(table, first_file)
            readers.append(FileReader(layout, files, self._files, self.engine, alignment, slot_bytes))
            first_file += len(table.files)
        return readers

    @property
    def engine(self) -> Engine:
        """The engine that serves."""
        return self._choice.engine

    @property
    def notes(self) -> tuple[str, ...]:
        """What the tables should be known for, and what was asked for and could not be had."""
        return (*(note for table in self._alive[0] for note in table.notes), *self._choice.notes)

    def stats(self) -> StorageStats:
        """Counts since open."""
        control = self.engine.queue.control
        return StorageStats(
            engine=self.engine.name,
            alignment=self._files.alignment,
            reads=int(control[q.READS_DONE]),
            bytes_read=int(control[q.BYTES_READ]),
            jobs=int(control[q.ACTIVE]),
            probe_reads_per_s=dict(self._choice.reads_per_s),
            notes=self.notes,
        )

    def close(self) -> None:
        """End the engine once what is in flight has landed; close the files."""
        self.engine.close()
        self._files.close()


def _addresses(sums: Sequence[npt.NDArray[np.int64]], num_files: int) -> npt.NDArray[np.int64]:
    """Address of each file's row of checksums, or zeros where they are not used."""
    rows = [table.ctypes.data + number * table.strides[0] for table in sums for number in range(len(table))]
    return np.array(rows or [0] * num_files, np.int64)
