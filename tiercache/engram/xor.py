"""The hashing that Engram's descendants share: exclusive or of products, modulo a prime for each head.

Position t has one n-gram of each order 2..N that ends there. An n-gram is mixed into one integer, the exclusive or of
each symbol's product with an odd multiplier of its distance, and each head of the order takes that integer modulo a
prime of its own. The heads' ranges follow one another in one table. Families differ in their multipliers and primes, in
what ends the look-back, and in the pad symbol that stands for whatever lies beyond that end.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from tiercache.engram.compression import check_map
from tiercache.engram.hasher import Hasher, Ids, Placed, check_least, checked_tensors, raise_outside
from tiercache.engram.remainder import LANES, LARGEST, SMALLEST, place_eight, reciprocals
from tiercache.engram.window import ABSENT, advance, new_line, start, take
from tiercache.native import lean


@dataclass(frozen=True, kw_only=True, eq=False)
class XorHasher(Hasher):
    """What the families share.

    multipliers  one integer a distance, this token's first; their number is the highest order N
    primes       rows of each head, one tuple an order 2..N, all of one length H
    vocabulary   number of symbols: of compressed ids, or of token ids without a compression
    pad          symbol of whatever lies beyond the end of the look-back
    stop         token id behind which the look-back ends; ABSENT for none
    compression  int64[tokenizer's ids], id to compressed id; None where ids come compressed, or the model has no compression

    Raises ValueError where these do not fit together: a product must fit int64.
    """

    low: ClassVar[int] = 0
    """The least token id: 0, or ANY_NEGATIVE for a family that has positions without a token."""

    multipliers: tuple[int, ...]
    primes: tuple[tuple[int, ...], ...]
    vocabulary: int
    pad: int
    stop: int = ABSENT
    compression: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        check_least(1, vocabulary=self.vocabulary)
        if len(self.primes) != len(self.multipliers) - 1 or len(set(map(len, self.primes))) != 1 or not self.primes[0]:
            heads = [len(order) for order in self.primes]
            raise ValueError(f"primes of {heads} heads an order: allowed is one number for {len(self.multipliers) - 1} orders")
        for name, values, largest in (
            ("multipliers", self.multipliers, (2**63 - 1) // max(self.vocabulary - 1, 1)),
            ("primes", [prime for order in self.primes for prime in order], LARGEST),
        ):
            if not 1 <= min(values) <= max(values) <= largest:
                raise ValueError(f"{name} from {min(values)} to {max(values)}: allowed is 1..{largest}")
        if self.num_rows > LARGEST:
            raise ValueError(f"primes sum to {self.num_rows}: allowed is {LARGEST}")
        if not 0 <= self.pad < self.vocabulary:
            raise ValueError(f"pad = {self.pad}: allowed is 0..{self.vocabulary - 1}")
        if self.compression is not None:
            check_compression(self.compression, self.vocabulary)
        # Made now, as torch's compiler cannot look into a property that is still to be computed.
        self._placed  # noqa: B018

    @cached_property
    def num_rows(self) -> int:
        """Rows of the table: the sum of all primes."""
        return sum(map(sum, self.primes))

    @property
    def num_heads(self) -> int:
        """Rows that one token reads: (N - 1) * H."""
        return sum(map(len, self.primes))

    @property
    def context(self) -> int:
        """Look-back: N - 1."""
        return len(self.primes)

    @property
    def num_ids(self) -> int:
        """Token ids that there are."""
        return self.vocabulary if self.compression is None else self.compression.size

    @cached_property
    def moduli(self) -> Ids:
        """int64[num_heads], the primes."""
        return np.array(self.primes, np.int64).reshape(-1)

    @cached_property
    def offsets(self) -> Ids:
        """int64[num_heads], first row of each head."""
        return np.cumsum(self.moduli) - self.moduli

    def runs(self, tokens: Ids, lengths: Ids, previous: Ids, out: Ids) -> None:
        """See Hasher."""
        before, bounds = previous.reshape(-1), (self.low, self.num_ids)
        arrays = *self._arrays, out.reshape(-1)
        bad = _hash_runs(tokens, lengths, before, new_line(self.context), *bounds, self.stop, self.pad, *arrays)
        raise_outside(bad, tokens, before, *bounds)

    def torch_rows(self, tokens: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """See Hasher."""
        ids = checked_tensors(tokens, previous, self.context, self.num_ids, self.low)
        moduli, offsets, compression = self._placed.on(ids.device)
        symbols = ids if self.compression is None else compression[ids.clamp(min=0)]
        first, last = self.context, ids.shape[1]
        ended = ids[:, first:] < 0
        mix = torch.where(ended, self.pad, symbols[:, first:]) * self.multipliers[0]
        orders = []
        for distance in range(1, self.context + 1):
            there = slice(first - distance, last - distance)
            ended = ended | (ids[:, there] < 0) | (ids[:, there] == self.stop)
            mix = mix ^ (torch.where(ended, self.pad, symbols[:, there]) * self.multipliers[distance])
            orders.append(mix[..., None] % moduli[distance - 1] + offsets[distance - 1])
        return torch.cat(orders, -1)

    @cached_property
    def _arrays(self) -> tuple[Any, ...]:
        """What the kernel takes of the hasher: the compression, and from the multipliers to the offsets."""
        by_eight = len(self.primes[0]) % LANES == 0 and min(map(min, self.primes)) >= SMALLEST
        compression = np.empty(0, np.int32) if self.compression is None else self.compression.astype(np.int32)
        multipliers = np.array(self.multipliers, np.int64)
        return compression, multipliers, by_eight, self.moduli, reciprocals(self.moduli), self.offsets

    @cached_property
    def _placed(self) -> Placed:
        """moduli and offsets, int64[N - 1, H], and the compression."""
        shape = len(self.primes), len(self.primes[0])
        compression = self._arrays[0].astype(np.int64)
        return Placed(self.moduli.reshape(shape), self.offsets.reshape(shape), compression)


def check_compression(compression: npt.NDArray[np.int64], vocabulary: int) -> None:
    """Raise ValueError for a map that does not lead to exactly the symbols 0..vocabulary - 1, each of them."""
    check_map(compression)
    size = int(compression.max(initial=-1)) + 1
    if size != vocabulary:
        raise ValueError(f"compression leads to {size} ids: the hashing is for {vocabulary}")
    if (least := compression.min()) < 0:
        raise ValueError(f"compression leads to {least}: allowed is 0..{vocabulary - 1}")
    if (used := np.unique(compression).size) != vocabulary:
        raise ValueError(f"compression leads to {used} of the ids 0..{vocabulary - 1}: allowed is a map that leads to each")


@lean
def _write(line: Any, count: int, multipliers: Any, moduli: Any, reciprocals: Any, offsets: Any, out: Any, place: int) -> None:
    """Write the rows of a line's tokens to out[place:] without a division, heads by eight."""
    num_orders = multipliers.size - 1
    for at in range(num_orders, num_orders + count):
        mix, head = line[at] * multipliers[0], 0
        for distance in range(1, num_orders + 1):
            mix ^= line[at - distance] * multipliers[distance]
            for _ in range(moduli.size // num_orders // LANES):
                place_eight(mix, moduli, reciprocals, offsets, head, out, place)
                head += LANES
                place += LANES


@lean
def _write_any(line: Any, count: int, multipliers: Any, moduli: Any, offsets: Any, out: Any, place: int) -> None:
    """`_write` for any number of heads and any moduli."""
    num_orders = multipliers.size - 1
    for at in range(num_orders, num_orders + count):
        mix, head = line[at] * multipliers[0], 0
        for distance in range(1, num_orders + 1):
            mix ^= line[at - distance] * multipliers[distance]
            for _ in range(moduli.size // num_orders):
                out[place] = mix % moduli[head] + offsets[head]
                head += 1
                place += 1


@lean
def _hash_runs(
    tokens: Any,
    lengths: Any,
    previous: Any,
    line: Any,
    low: int,
    num_ids: int,
    stop: int,
    pad: int,
    compression: Any,
    multipliers: Any,
    by_eight: bool,
    moduli: Any,
    reciprocals: Any,
    offsets: Any,
    out: Any,
) -> int:
    """As `Hasher.runs` says; `previous` and `out` are flat.

    Returns the position of an id outside the vocabulary, -1 if there is none; positions in `previous` follow the tokens'.
    """
    context, num_previous = multipliers.size - 1, previous.size // max(lengths.size, 1)
    begin = 0
    for run in range(lengths.size):
        past, end = run * num_previous, begin + lengths[run]
        came = start(line, context, previous, past, past + num_previous, low, num_ids, stop, pad, compression)
        if came < past + num_previous:
            return tokens.size + came
        last = previous[came - 1] if num_previous else ABSENT
        while begin < end:
            count = take(line, context, tokens, begin, end, last, low, num_ids, stop, pad, compression)
            if count == 0:
                return begin
            if by_eight:
                _write(line, count, multipliers, moduli, reciprocals, offsets, out, begin * moduli.size)
            else:
                _write_any(line, count, multipliers, moduli, offsets, out, begin * moduli.size)
            advance(line, context, count)
            begin += count
            last = tokens[begin - 1]
    return -1
