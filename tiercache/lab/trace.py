"""Traces: the rows that a text asks for, batch after batch, as a model that reads or writes it would ask.

All functions take `rows` int64[T, heads], the rows of each token, and only decide which tokens share a batch.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.errors import ConfigError
from tiercache.groups import keys_of


class Trace(NamedTuple):
    """Batch i is rows[offsets[i] : offsets[i + 1]]; rows int64[n], offsets int64[b + 1]."""

    rows: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]

    @property
    def num_batches(self) -> int:
        return self.offsets.size - 1

    def batches(self) -> Iterator[npt.NDArray[np.int64]]:
        """The rows of each batch, views of `rows`."""
        for start, stop in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True):
            yield self.rows[start:stop]


def single(rows: npt.NDArray[np.int64]) -> Trace:
    """Every row a batch of its own, as cache simulators see a trace. rows: int64 of any shape."""
    return Trace(rows.reshape(-1), np.arange(rows.size + 1, dtype=np.int64))


def chunks(rows: npt.NDArray[np.int64], tokens: int) -> Trace:
    """The text in order, `tokens` tokens a batch."""
    num_tokens, heads = rows.shape
    starts = np.arange(0, num_tokens, tokens, dtype=np.int64)
    return Trace(rows.reshape(-1), np.append(starts, num_tokens) * heads)


def in_groups(trace: Trace, group_rows: int) -> Trace:
    """The trace as tiers with this `group_rows` see it: a key for each group. ConfigError where a batch is not whole groups."""
    if group_rows == 1:
        return trace
    sizes = np.diff(trace.offsets)
    broken = np.flatnonzero(sizes % group_rows)
    if broken.size:
        number = int(broken[0])
        raise ConfigError(f"group_rows = {group_rows}: batch {number} of the trace has {sizes[number]} rows, not whole groups")
    return Trace(keys_of(trace.rows, group_rows), trace.offsets // group_rows)


def serving(
    rows: npt.NDArray[np.int64],
    documents: Sequence[int] | npt.NDArray[np.int64],
    *,
    sequences: int = 16,
    prompt: int = 1536,
    answer: int = 512,
    chunk: int = 512,
) -> Trace:
    """What a server asks for that works on `sequences` documents at a time.

    A document is a conversation: `prompt` tokens that are read in chunks of `chunk`, then `answer` tokens that are
    written one by one, and again. In one step each document advances by one chunk, a batch of its own, or by one token,
    in a batch with the others that write. A finished document makes room for the next.
    """
    edges = np.append(0, np.cumsum(np.asarray(documents, np.int64))).tolist()
    waiting = [_spans(start, end, prompt, answer, chunk) for start, end in pairwise(edges)]
    waiting.reverse()
    active: list[Iterator[tuple[int, int]]] = []
    batches: list[npt.NDArray[np.int64]] = []
    while waiting or active:
        while waiting and len(active) < sequences:
            active.append(waiting.pop())
        steps = [next(spans, None) for spans in active]
        active = [spans for spans, step in zip(active, steps, strict=True) if step is not None]
        taken = [step for step in steps if step is not None]
        batches += [np.arange(start, stop) for start, stop in taken if stop - start > 1]
        written = [start for start, stop in taken if stop - start == 1]
        if written:
            batches.append(np.array(written, np.int64))
    order = np.concatenate([np.empty(0, np.int64), *batches])
    sizes = [0, *(batch.size for batch in batches)]
    return Trace(rows[order].reshape(-1), np.cumsum(sizes, dtype=np.int64) * rows.shape[1])


def _spans(start: int, end: int, prompt: int, answer: int, chunk: int) -> Iterator[tuple[int, int]]:
    """What one document does in each of its steps."""
    while start < end:
        read = min(start + prompt, end)
        for at in range(start, read, chunk):
            yield at, min(at + chunk, read)
        start = min(read + answer, end)
        for at in range(read, start):
            yield at, at + 1
