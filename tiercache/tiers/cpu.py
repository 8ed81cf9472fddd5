"""The device tier of `device = "cpu"`: a second host buffer, so that three tiers behave the same on any machine.

Everything is done when a call returns: there are no streams, and nothing is ever on its way up.
"""

import numpy as np
import numpy.typing as npt
import torch

from tiercache.level import Level
from tiercache.stack import StackPlan, plan_stack
from tiercache.tiers.host import CpuMemory, HostBuffer, HostTier, Memories, copy_slots


class CpuTier(CpuMemory):
    """A level above the host tier's, and its buffer; at most `most` rows rise in one batch. The store locks."""

    def __init__(self, level: Level, host: HostTier, most: int) -> None:
        self.level = level
        self.members = None if host.groups is None else host.groups.upper
        self.capacity_bytes = level.capacity * host.stride
        self._host, self._most = host, most
        buffer = HostBuffer(level.capacity, host.stride)
        resident = Memories(buffer.slots.ctypes.data, level.capacity, host.at.address, 0, host.stride)
        super().__init__(buffer, resident, host.groups)

    def room(self, rows: npt.NDArray[np.int64]) -> StackPlan:
        """Room for the plan of a batch."""
        return StackPlan(rows.size, above=True) if self.groups is None else self.groups.room(rows, above=True)

    def plan(self, plan: StackPlan, rows: npt.NDArray[np.int64], num_reads: int) -> None:
        """Plan a batch over both tiers, into new room, and copy up what rises."""
        self._plan(plan, rows, num_reads, idly=False)

    def serve(
        self, plan: StackPlan, rows: npt.NDArray[np.int64], num_reads: int, records: torch.Tensor, num_bytes: int
    ) -> bool:
        """Plan a batch; True if this tier had every row: then its records, of `num_bytes` bytes, are in `records`."""
        served = self._plan(plan, rows, num_reads, idly=True)
        if served:
            self._gather(plan.where, self._resident, records.data_ptr(), num_bytes)
        return served

    def _plan(self, plan: StackPlan, rows: npt.NDArray[np.int64], num_reads: int, *, idly: bool) -> bool:
        """What rises is copied before anybody else may look; if that is interrupted, it has not risen."""
        groups = self.groups
        keys, pieces = (rows, num_reads) if groups is None else (plan.keys, num_reads * groups.size)
        try:
            served = plan_stack(self.level, self._host.level, plan, keys, pieces, self._most, idly=idly)
            self._fill(plan)
            if groups is not None:
                served = groups.settle(plan, self.level, served=served)
        except BaseException:
            assert plan.above is not None
            self.level.forget(plan.above)
            raise
        return served

    def release(self, plan: StackPlan) -> None:
        """Let go of the slots of a plan, in both tiers."""
        assert plan.above is not None
        self.level.release(plan.above)
        self._host.level.release(plan.below)

    def _fill(self, plan: StackPlan) -> None:
        assert plan.above is not None
        sources, slots = plan.above.fill, plan.above.held[plan.above.hits :]
        if sources.size:
            copy_slots(sources, self._host.at, slots, self.at)
