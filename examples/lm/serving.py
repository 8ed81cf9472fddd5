"""The trained model served three ways: with its table in memory, and from three tiers with prefetch on and off.

The table lies on disk, ten times as large as the tier in host memory. Texts that nobody trained on are served as by a server
that has many sequences at once: a prompt each, then token after token, each step's token from the text, so that all three
compute the same. A step's rows are asked for when its tokens are known, never sooner. Each has its own store, where it has
tiers.

What else the machine does is to hit all alike. They take turns at every step, in changing order. Where caches of keys and
values lie in memory makes up to 2 % of a step: as all compute the same, the three exchange theirs after every step. And the
models compute on one core while the stores' threads plan and read on the others, as on a server, whose computing threads are
bound: else the kernel may let a thread that a disk wakes take a model's core away, for half a millisecond a step.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lm.model import Cache, LanguageModel, with_engram
from lm.text import Text
from tiercache import Store, Ticket
from tiercache.engram.embedding import TieredEmbedding

KINDS = ("resident", "tiers, prefetch on", "tiers, prefetch off")


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """sequences at once, with a prompt of `prompt` tokens each and `steps` tokens after it; then the next ones.

    chunk: tokens of each prompt that are read at once; prompt is a multiple of it.
    warm: rounds of training text before those that are timed, 1 or more. share: host tier's bytes over the table's; the
    device tier has a quarter of it.
    """

    sequences: int = 240
    prompt: int = 64
    chunk: int = 8
    steps: int = 32
    rounds: int = 3
    warm: int = 1
    share: float = 0.1


@dataclass
class Served:
    """Seconds of each chunk of prefill and each decode step of one kind, and what of them went into asking for rows and taking.

    decode_cpu: of the caller's thread alone, which other work of the machine does not lengthen. reads: distinct rows that
    came from disk in the timed decode steps, of `rows` asked for.
    """

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    decode_cpu: list[float] = field(default_factory=list)
    asking: list[float] = field(default_factory=list)
    taking: list[float] = field(default_factory=list)
    reads: int = 0
    rows: int = 0


class DifferentLogits(AssertionError):
    """A model served from tiers computed other bits than the resident one."""


def serve(
    model: LanguageModel, text: Text, traffic: Traffic, directory: Path, told: Callable[[], Any]
) -> tuple[dict[str, Served], dict[str, int]]:
    """(what each of KINDS took, bytes of the table and its tiers). Raises DifferentLogits where one bit differs.

    told: called after each round.
    """
    assert model.engram is not None
    table = model.engram.table
    assert isinstance(table, torch.nn.Embedding)
    model.eval()
    weight = table.weight.detach()
    path = directory / "table.safetensors"
    save_file({"engram.table.weight": weight}, path)
    num_bytes = weight.numel() * weight.element_size()
    tiers = {"host": int(num_bytes * traffic.share), "device": int(num_bytes * traffic.share / 4)}
    config = {
        "table": [{"path": path}],
        "host": {"capacity": tiers["host"]},
        "device": {"device": "cpu", "capacity": tiers["device"]},
    }
    length, each = traffic.prompt + traffic.steps, traffic.sequences
    rounds = [*torch.split(text.windows(length, traffic.warm * each, held_out=False), each)]
    rounds += torch.split(text.windows(length, traffic.rounds * each), each)
    with ExitStack() as stack:
        models = {KINDS[0]: model}
        first, *others = sorted(os.sched_getaffinity(0))
        for kind in KINDS[1:]:
            with _on(others or [first]):  # where a thread runs, those that it begins run
                store = stack.enter_context(Store.open(config))
                asker = stack.enter_context(ThreadPoolExecutor(1))
                asker.submit(int).result()
            models[kind] = with_engram(model.sizes, Clocked(store, asker)).eval()
            models[kind].load_state_dict(model.state_dict(), assign=True)
        stack.enter_context(_on([first]))
        results = {kind: Served() for kind in KINDS}
        for number, tokens in enumerate(rounds):
            timed = {kind: results[kind] if number >= traffic.warm else Served() for kind in KINDS}
            _round(models, tokens, traffic, timed, number)
            told()
    return results, {"table": num_bytes, **tiers}


@contextmanager
def _on(cores: list[int]) -> Iterator[None]:
    """This thread, and those that it begins, run on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@torch.inference_mode()
def _round(
    models: dict[str, LanguageModel], tokens: torch.Tensor, traffic: Traffic, timed: dict[str, Served], turn: int
) -> None:
    """Serve int64[sequences, prompt + steps] by all models, chunk by chunk and then step by step."""
    prompt, chunk = traffic.prompt, traffic.chunk
    places = [*range(0, prompt, chunk), *range(prompt, tokens.shape[1] - 1)]
    orders = list(permutations(KINDS))
    caches = [Cache(model, len(tokens), tokens.shape[1]) for model in models.values()]
    for step, place in enumerate(places):
        piece = tokens[:, place : place + (chunk if place < prompt else 1)]
        logits = {}
        for kind in orders[(turn + step) % len(orders)]:
            model, served = models[kind], timed[kind]
            table = model.engram.table if model.engram else None
            before = table.counts() if isinstance(table, Clocked) else (0, 0)
            cache = caches[(KINDS.index(kind) + step) % len(caches)]
            began, began_cpu = time.perf_counter(), time.thread_time()
            logits[kind] = model(piece, cache, prefetch=kind != KINDS[2])
            took, took_cpu = time.perf_counter() - began, time.thread_time() - began_cpu
            (served.prefill if place < prompt else served.decode).append(took)
            if place >= prompt:
                served.decode_cpu.append(took_cpu)
            if isinstance(table, Clocked):
                _note(table, served if place >= prompt else Served(), before)
        for kind in KINDS[1:]:
            if not torch.equal(logits[kind], logits[KINDS[0]]):
                raise DifferentLogits(f"{kind}: other logits at position {place}")


class Clocked(TieredEmbedding):
    """Has another thread ask for rows ahead, as to plan a thousand reads takes a millisecond, and times what the caller's
    thread spends on asking and taking: seconds since they were last set back.
    """

    asking = taking = 0.0

    def __init__(self, store: Store, asker: Executor) -> None:
        super().__init__(store)
        self._asker = asker
        self._asked: Future[Ticket] | None = None

    def prefetch(self, indices: torch.Tensor, *, deadline: float | None = None) -> Any:
        """Have it asked for; `forward` waits until that is done, and raises its errors."""
        began = time.perf_counter()
        self._asked = self._asker.submit(super().prefetch, indices, deadline=deadline)
        self.asking += time.perf_counter() - began

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """The rows."""
        began = time.perf_counter()
        if self._asked is not None:
            self._asked.result()
            self._asked = None
        rows = super().forward(indices)
        self.taking += time.perf_counter() - began
        return rows

    def counts(self) -> tuple[int, int]:
        """Distinct rows that came from disk so far, and rows asked for."""
        stats = self.store.stats()
        return stats.host.misses, stats.rows


def _note(table: Clocked, served: Served, before: tuple[int, int]) -> None:
    """Write down a step of a model in tiers, and set the clock back."""
    served.asking.append(table.asking)
    served.taking.append(table.taking)
    table.asking = table.taking = 0.0
    reads, rows = table.counts()
    served.reads += reads - before[0]
    served.rows += rows - before[1]
