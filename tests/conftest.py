"""What holds for every test: whatever it built is checked when it ends."""

import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

from tiercache.level import Level
from tiercache.store import Store

# Read when a Triton kernel is defined: it then runs in Triton's interpreter, on tensors of the CPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

# The first example of a test may compile for seconds; pytest's own timeout ends what hangs.
settings.register_profile("tiercache", deadline=None)
settings.load_profile("tiercache")


@pytest.fixture(autouse=True)
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[], Any]]]:
    """References to every Level and Store that the test made; each `check()` runs after it.

    A store is referred to weakly, so that a test may let go of it; its level is checked all the same. A test that breaks
    one on purpose clears the list.
    """
    references: list[Callable[[], Any]] = []

    def register(kind: type, refer: Callable[[Any], Callable[[], Any]]) -> None:
        original = kind.__init__

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            references.append(refer(self))

        monkeypatch.setattr(kind, "__init__", init)

    register(Level, lambda level: lambda: level)
    register(Store, weakref.ref)
    yield references
    for reference in references:
        thing = reference()
        if thing is not None:
            thing.check()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch computes in the caller's thread: small models are faster so, and sums come in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
