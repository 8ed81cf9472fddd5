"""How long a machine takes for batches: the model behind `tiercache tune`.

A fetch plans all its rows, waits for all its reads, and gathers: nothing of that overlaps. So its time is a sum,

    resident(rows)                               probe and gather; with a device tier as if it had every row
    + below.call + below.row * rows below        the host tier's rows: their places, and their way up
    + disk.row * rows missed                     slots for them, and where their bytes lie
    + disk(reads) + disk.byte * further bytes    the wait, by how many reads are in flight together

where neighbouring rows share a read. A caller who fetches one batch after the other waits for this sum. For one who always has
the next batch's reads begun, the disk works while the processor does, and the longer of the two counts. Two batches are then in
flight, and the disk never runs dry: of a batch counts what its reads take behind as many others, disk(2 reads) - disk(reads),
but at least half of disk(reads), as there are never more than the two.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.lab.machine import Machine

Numbers = npt.NDArray[np.float64]


class Work(NamedTuple):
    """What batches ask of the tiers; float64[b] each.

    weight     batches that this one stands for
    rows       rows asked for, duplicates included
    below      distinct rows that the host tier had and the device tier had not; none without a device tier
    misses     distinct rows that no tier had
    reads      requests to the disk for them
    num_bytes  bytes of these requests
    """

    weight: Numbers
    rows: Numbers
    below: Numbers
    misses: Numbers
    reads: Numbers
    num_bytes: Numbers

    def total(self, column: Numbers) -> float:
        """A column, summed over all batches."""
        return float((self.weight * column).sum())

    @property
    def resident(self) -> "Work":
        """The same batches, had the top tier all their rows."""
        nothing = np.zeros_like(self.rows)
        return Work(self.weight, self.rows, nothing, nothing, nothing, nothing)


class Times(NamedTuple):
    """Seconds of each batch, float64[b]: on the processor, and waiting for the disk."""

    processor: Numbers
    disk: Numbers


def times(machine: Machine, work: Work, *, ahead: bool = False) -> Times:
    """Seconds of each batch. ahead: its reads are begun behind those of another."""
    processor = _along(work.rows, machine.resident.rows, machine.resident.seconds)
    processor += machine.disk.row_seconds * work.misses
    if machine.below is not None:
        alone = (work.below > 0) & (work.misses == 0)  # what a call takes more is in the disk's figures where it reads
        processor += machine.below.call_seconds * alone + machine.below.row_seconds * work.below
    disk = _disk_seconds(machine, work.reads)
    if ahead:
        disk = np.clip(_disk_seconds(machine, 2 * work.reads) - disk, disk / 2, disk)
    disk += machine.disk.byte_seconds * np.maximum(work.num_bytes - machine.disk.read_bytes * work.reads, 0)
    return Times(processor, disk)


def seconds(machine: Machine, work: Work, *, ahead: bool = False) -> float:
    """Seconds of all batches, one after the other. ahead: the next batch's reads are always begun before this one is taken."""
    processor, disk = times(machine, work, ahead=ahead)
    return work.total(np.maximum(processor, disk) if ahead else processor + disk)


def _disk_seconds(machine: Machine, reads: Numbers) -> Numbers:
    return _along(reads, (0, *machine.disk.reads), (0, *machine.disk.seconds))


def _along(at: Numbers, points: tuple[float, ...], values: tuple[float, ...]) -> Numbers:
    """A value at each place: on the lines between the points, level before the first, on the last line behind the last.

    One point makes a line from nothing.
    """
    if len(points) == 1:
        points, values = (0, *points), (0, *values)
    found = np.interp(at, points, values)
    slope = max((values[-1] - values[-2]) / (points[-1] - points[-2]), 0)
    return found + slope * np.maximum(at - points[-1], 0)
