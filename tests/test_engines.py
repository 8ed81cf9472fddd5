"""The engines under the contract of engines."""

from tiercache.storage.threads import ThreadsEngine
from tiercache.storage.uring import UringEngine
from tiercache.testing import EngineContract


class TestUring(EngineContract):
    kind = UringEngine


class TestThreads(EngineContract):
    kind = ThreadsEngine
