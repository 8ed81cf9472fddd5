"""A sequence's tokens as every family's kernel sees them: a line of symbols, whose look-back is already as it should be.

A symbol is what a token counts as, its id or its compressed id. A line holds the symbols of a block of tokens, and
before them those of the `context` tokens that came before. Where the look-back ends, what lies before counts as the pad
symbol. It ends before the start of a sequence, at a position without a token (a negative id), and at a stop token once
another token follows it. A block stops short of such an end, and the next one begins with a look-back of padding: so
the arithmetic asks for no ends.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from tiercache.native import int64, lean

ABSENT = -1
"""Stands for the tokens before the start of a sequence, and for the stop token of a family that has none."""

_BLOCK = 1024


def new_line(context: int) -> npt.NDArray[np.int64]:
    """Room for a line with a look-back of `context` tokens."""
    return np.empty(context + _BLOCK, np.int64)


@lean
def take(
    line: Any,
    context: int,
    tokens: Any,
    begin: int,
    end: int,
    last: int,
    low: int,
    num_ids: int,
    stop: int,
    pad: int,
    compression: Any,
) -> int:
    """Fill the line from tokens[begin:end], which follow the token `last`. Returns how many were taken.

    That is one at least, and 0 only where tokens[begin] is not in low..num_ids - 1. compression: int32[ids], the symbol of each
    id; int32[0] where ids are symbols.
    """
    count, most = 0, min(end - begin, line.size - context)
    while count < most:
        token = tokens[begin + count]
        if token >= num_ids or token < low:
            break
        if token < 0 or last == stop:
            if count:
                break
            for at in range(context):
                line[at] = pad
        symbol = token
        if token < 0:
            symbol = pad
        elif compression.size:
            symbol = int64(compression[token])
        line[context + count] = symbol
        last = token
        count += 1
    return count


@lean
def advance(line: Any, context: int, count: int) -> None:
    """Make the end of a block of `count` tokens the look-back of the next one."""
    for at in range(context):
        line[at] = line[count + at]


@lean
def start(
    line: Any,
    context: int,
    previous: Any,
    begin: int,
    end: int,
    low: int,
    num_ids: int,
    stop: int,
    pad: int,
    compression: Any,
) -> int:
    """Set the look-back to previous[begin:end], oldest first. Returns the position of an id that `take` refuses, else `end`.

    ABSENT is allowed too.
    """
    last = ABSENT
    for at in range(context):
        line[at] = pad
    while begin < end:
        count = take(line, context, previous, begin, end, last, min(low, ABSENT), num_ids, stop, pad, compression)
        if count == 0:
            break
        advance(line, context, count)
        begin += count
        last = previous[begin - 1]
    return begin
