"""The engines under the contract of engines."""

import time

import numpy as np

from tiercache.storage import queue as q
from tiercache.storage.threads import ThreadsEngine
from tiercache.storage.uring import UringEngine
from tiercache.testing import EngineContract


class TestUring(EngineContract):
    kind = UringEngine


class TestThreads(EngineContract):
    kind = ThreadsEngine


def submit(queue, num_reads, deadline_ns=0):
    """A job of reads that touch nothing of each other's; what must stay alive."""
    reads = np.zeros((num_reads, q.READ_COLUMNS), np.int64)
    reads[:, q.AT], reads[:, q.LENGTH] = 4096 * np.arange(num_reads), 512
    memory = reads, np.zeros((1, q.PIECE_COLUMNS), np.int64), np.empty(0, np.int64), np.zeros(8, np.int64)
    assert q.submit(queue, *memory, deadline_ns) > 0
    return memory


def test_a_small_job_overtakes_a_big_one_however_slow_the_disk_is():
    queue = q.new_queue()
    memory = [submit(queue, 100)]
    assert [q.take(queue) for _ in range(50)] == [(0, read) for read in range(50)]
    time.sleep(20 * 100 * q.FAIR_NS / 1e9)
    memory.append(submit(queue, 1))
    assert q.take(queue) == (1, 0)
    memory.append(submit(queue, 40, time.monotonic_ns() + 1000 * q.FAIR_NS))
    memory.append(submit(queue, 60))
    assert [q.take(queue)[0] for _ in range(150)] == [0] * 50 + [3] * 60 + [2] * 40
    assert q.take(queue) == (-1, -1)
