"""Hasher: what turns the tokens of a sequence into rows of one layer's table, whatever the family of the model."""

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import torch

from tiercache.engram.window import ABSENT

Ids = npt.NDArray[np.int64]

ANY_NEGATIVE = -(2**63)
"""The least token id of families that have positions without a token."""


class Hasher(ABC):
    """Hashing of one layer. Immutable, pure and thread-safe.

    `rows`, `batch` and `torch_rows` give the same integers: on the host for a text, on the host for a batch, and in plain
    torch operations on any device. Token ids are those of the tokenizer, or compressed ones where the hasher has no
    compression. ABSENT, -1, stands for what lies before the start of a sequence; whatever stands before an ABSENT is ignored.
    """

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Rows of the layer's table."""

    @property
    @abstractmethod
    def num_heads(self) -> int:
        """Rows that one token reads, those of all orders."""

    @property
    @abstractmethod
    def context(self) -> int:
        """Look-back: tokens before the current one that matter."""

    @property
    @abstractmethod
    def offsets(self) -> Ids:
        """int64[num_heads], first row of each head in the table."""

    @abstractmethod
    def runs(self, tokens: Ids, lengths: Ids, previous: Ids, out: Ids) -> None:
        """Write the rows of several sequences' next tokens. The arguments are not checked, only the ids are.

        tokens: int64[T], contiguous. lengths: int64[R], tokens of each sequence, which sum to T. previous: int64[R, any],
        oldest first. out: int64[T, num_heads], contiguous. Raises ValueError for an id outside the vocabulary; `out` may be
        written in part then.
        """

    @abstractmethod
    def torch_rows(self, tokens: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """Rows of a batch as int64[B, T, num_heads], on the tensors' device.

        tokens: integers [B, T]. previous: integers [B, context], oldest first. On the CPU ids are checked as in `batch`; on
        other devices, and where a compiler traces, an id outside the vocabulary gives rows without a meaning.
        """

    def rows(
        self,
        tokens: npt.ArrayLike,
        documents: npt.ArrayLike | None = None,
        previous: npt.ArrayLike = (),
        *,
        out: Ids | None = None,
    ) -> Ids:
        """Rows of each position of a text: int64[T, num_heads], by ascending order.

        tokens: integers [T]. documents: integers [D], the documents' lengths, which sum to T; None for one document.
        previous: the tokens that came before in the first document, oldest first; all but the last `context` are ignored,
        so that a text hashed in chunks gives the rows of the whole. out: int64[T, num_heads], contiguous, to be written and
        returned; else a new array. Raises ValueError for an id outside the vocabulary; `out` may be written in part then.
        """
        ids, before = to_ids("tokens", tokens, 1), to_ids("previous", previous, 1)
        lengths = np.array([ids.size], np.int64) if documents is None else to_ids("documents", documents, 1)
        check_counts("documents", lengths, ids.size)
        look_back = np.full((lengths.size, self.context), ABSENT, np.int64)
        before = before[max(0, before.size - self.context) :]
        if lengths.size and before.size:
            look_back[0, -before.size :] = before
        out = self._room(ids.size) if out is None else self._checked(out, ids.size)
        self.runs(ids, lengths, look_back, out)
        return out

    def batch(self, tokens: npt.ArrayLike, previous: npt.ArrayLike) -> Ids:
        """Rows of a batch of sequences' next tokens: int64[B, T, num_heads].

        tokens: integers [B, T]. previous: integers [B, context], oldest first. Raises ValueError for an id outside the
        vocabulary.
        """
        ids, before = to_ids("tokens", tokens, 2), to_ids("previous", previous, 2)
        num_sequences, num_tokens = ids.shape
        check_previous(before.shape, num_sequences, self.context)
        out = self._room(ids.size)
        self.runs(ids.reshape(-1), np.full(num_sequences, num_tokens, np.int64), before, out)
        return out.reshape(num_sequences, num_tokens, self.num_heads)

    def _room(self, num_tokens: int) -> Ids:
        return np.empty((num_tokens, self.num_heads), np.int64)

    def _checked(self, out: Ids, num_tokens: int) -> Ids:
        shape = (num_tokens, self.num_heads)
        if not isinstance(out, np.ndarray):
            raise TypeError(f"out is a {type(out).__name__}: allowed is a numpy array int64{list(shape)}")
        if out.shape != shape or out.dtype != np.int64 or not out.flags.c_contiguous:
            order = "" if out.flags.c_contiguous else ", not contiguous"
            raise ValueError(f"out = {out.dtype}{list(out.shape)}{order}: allowed is contiguous int64{list(shape)}")
        if not out.flags.writeable:
            raise ValueError("out is read-only: allowed is an array that may be written")
        return out


def to_ids(name: str, values: npt.ArrayLike, num_dimensions: int) -> Ids:
    """Integers as a contiguous int64 array. Raises TypeError or ValueError that names the argument."""
    array = np.asarray(values)
    if array.ndim != num_dimensions:
        raise ValueError(f"{name} of shape {array.shape}: expected {'one dimension' if num_dimensions == 1 else '[B, T]'}")
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got {array.dtype}")
    if array.dtype == np.uint64 and array.size and array.max() > np.uint64(2**63 - 1):
        raise ValueError(f"{name}: {array.max()} is no int64")
    return np.ascontiguousarray(array, np.int64)


def check_counts(name: str, counts: Ids, total: int) -> None:
    """Raise ValueError for counts that do not sum to `total`. Each is compared first, so that no sum can wrap."""
    wrong = np.flatnonzero((counts < 0) | (counts > total))
    if wrong.size:
        at = wrong[counts[wrong].argmin()]
        raise ValueError(f"{name}: {counts[at]} at position {at}: allowed is 0..{total}")
    if counts.sum() != total:
        raise ValueError(f"{name} of {counts.sum()} tokens for {total} tokens")


def check_least(least: int, **values: int) -> None:
    """Raise TypeError for a value that is no integer, ValueError for one below `least`."""
    for name, value in values.items():
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise TypeError(f"{name} = {value!r}: allowed is an integer")
        if value < least:
            raise ValueError(f"{name} = {value}: allowed is {least} and more")


def check_previous(shape: tuple[int, ...], num_sequences: int, context: int) -> None:
    """Raise ValueError for a `previous` of another shape than [num_sequences, context]."""
    if shape != (num_sequences, context):
        raise ValueError(f"previous of shape {list(shape)}: allowed is {[num_sequences, context]}")


def raise_outside(bad: int, tokens: Ids, previous: Ids, low: int, num_ids: int) -> None:
    """Raise ValueError for the position that a kernel found, first those of the tokens, then `previous`; nothing for -1."""
    if bad >= tokens.size:
        raise _outside("previous", previous[bad - tokens.size], min(low, ABSENT), num_ids)
    if bad >= 0:
        raise _outside("tokens", tokens[bad], low, num_ids)


def _outside(name: str, token: int, low: int, num_ids: int) -> ValueError:
    if low == ANY_NEGATIVE:
        return ValueError(f"{name}: token id {token} is outside 0..{num_ids - 1} (negative: a position without a token)")
    return ValueError(f"{name}: token id {token} is outside {low}..{num_ids - 1}")


def checked_tensors(
    tokens: torch.Tensor, previous: torch.Tensor, context: int, num_ids: int, low: int
) -> torch.Tensor:
    """int64[B, context + T], previous and then tokens, checked as `Hasher.torch_rows` says."""
    for name, tensor in (("tokens", tokens), ("previous", previous)):
        if tensor.ndim != 2:
            raise ValueError(f"{name} of shape {list(tensor.shape)}: expected [B, T]")
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{name}: expected integers, got {tensor.dtype}")
    check_previous(tuple(previous.shape), tokens.shape[0], context)
    checked = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
    for name, tensor in (("tokens", tokens), ("previous", previous)):
        if tensor.dtype == torch.uint64 and checked and (tensor.view(torch.int64) < 0).any():
            raise ValueError(f"{name}: {to_largest(tensor)} is no int64")
    tokens, previous = tokens.long(), previous.long()
    if checked:
        for name, tensor, least in (("tokens", tokens, low), ("previous", previous, min(low, ABSENT))):
            bad = tensor[(tensor < least) | (tensor >= num_ids)]
            if bad.numel():
                raise _outside(name, int(bad[0]), least, num_ids)
    return torch.cat([previous, tokens], 1)


def to_largest(tensor: torch.Tensor) -> int:
    """The largest number of a tensor of uint64 on the CPU, for a message."""
    return int(tensor.numpy().max())


class Placed:
    """Copies of constant arrays on each device where they were asked for."""

    def __init__(self, *arrays: npt.NDArray[np.int64]) -> None:
        self._host = tuple(torch.tensor(array) for array in arrays)
        self._tensors = {torch.device("cpu"): self._host}

    def on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """The arrays as tensors on a device."""
        if device not in self._tensors:
            self._tensors[device] = tuple(tensor.to(device) for tensor in self._host)
        return self._tensors[device]
