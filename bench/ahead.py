"""Look-ahead: what it is worth to the default policy that a sequence's next tokens are known, batches of one row.

The traces are `race`'s: documents one after the other, and 64 of them in turns, a token each. Before a token is asked for, it
and the tokens behind it in its document are announced, 512 in all; of a document that has not begun nothing is known. Hits are
counted in the second half. The gap is that between the policy without look-ahead and Belady, which knows all of the future.

What a policy holds that sees a window ahead, one that sees nothing ahead can hold too, if it decides late by the window and has
slots for the window's rows besides. So the policy with so many slots more shows about as much as a window can bring.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from _common import Figure, Rows, parser, report
from race import FORMS, SHARES, turns
from rich.progress import track

from tiercache.engram.demo import demo_hashers
from tiercache.lab.ahead import replay_ahead, windows
from tiercache.lab.bounds import bounds, uses_of
from tiercache.lab.tokens import SHIPPED, SHIPPED_VOCABULARY, load_tokens
from tiercache.lab.trace import Trace, single
from tiercache.level import Level
from tiercache.policies import DEFAULT, POLICIES

SEQUENCES = 64


def main() -> None:
    """Measure and report."""
    options = parser(__doc__, directory=False)
    options.add_argument("--trace", type=Path, default=SHIPPED, help="token stream (%(default)s)")
    options.add_argument("--accesses", type=int, default=4_000_000, help="of each trace (%(default)s)")
    options.add_argument("--tokens", type=int, default=512, help="that are known of a sequence (%(default)s)")
    options.add_argument("--form", choices=FORMS, help="one form of hashing only")
    arguments = options.parse_args()
    figures: list[Figure] = []
    closed = []
    for name, trace, sequences, heads, together in _traces(arguments):
        num_touched = np.unique(trace.rows).size
        uses = uses_of(trace), uses_of(single(trace.rows[: trace.num_batches // 2]))
        announced = windows(trace, sequences, heads, arguments.tokens)
        window = _distinct(trace.rows, arguments.tokens * heads * together)
        for share in track(SHARES, name, transient=True):
            capacity = int(num_touched * share)
            blind = _rate(Level(POLICIES[DEFAULT], capacity).replay(*trace)[0])
            larger = _rate(Level(POLICIES[DEFAULT], capacity + window).replay(*trace)[0])
            ahead = _rate(replay_ahead(Level(POLICIES[DEFAULT], capacity), trace, announced))
            best = bounds(capacity, uses[0]).belady - bounds(capacity, uses[1]).belady
            belady = 100 * best / (trace.num_batches - trace.num_batches // 2)
            closed.append(100 * (ahead - blind) / (belady - blind))
            what = f"{name}, {share:.0%} of {num_touched:,} rows: {closed[-1]:.0f} % of the gap"
            bound = f"without (Belady {belady:.1f}, {window:,} slots more {larger:.1f})"
            figures.append(Figure(what, ahead, "% hits", bound, blind))
    figures.append(Figure("mean part of the gap that is closed", float(np.mean(closed)), "%", at_least=50))
    title = f"Look-ahead of {arguments.tokens} tokens: {DEFAULT} on {arguments.accesses:,} accesses of text"
    report("ahead", title, figures, arguments)


def _traces(arguments: argparse.Namespace) -> Iterator[tuple[str, Trace, Rows, int, int]]:
    """(name, rows one by one, document of each token, rows a token, documents at a time)."""
    stream = load_tokens(arguments.trace)
    document = np.repeat(np.arange(stream.documents.size), stream.documents)
    for form, sizes in FORMS.items():
        if arguments.form not in (None, form):
            continue
        hasher = demo_hashers(vocabulary=SHIPPED_VOCABULARY, table_vocabularies=sizes)[0]
        num_tokens = min(arguments.accesses // hasher.num_heads, stream.tokens.size)
        rows = hasher.rows(stream.tokens, stream.documents)
        for together in (1, SEQUENCES):
            order = np.arange(num_tokens) if together == 1 else turns(stream, together, num_tokens)[:num_tokens]
            name = f"{form}, in order" if together == 1 else f"{form}, {together} in turns"
            yield name, single(rows[order].reshape(-1)), document[order], hasher.num_heads, together


def _distinct(rows: Rows, window: int) -> int:
    """Distinct rows of so many accesses in the second half, on average over a dozen places."""
    begins = np.linspace(rows.size // 2, max(rows.size - window, rows.size // 2), 12).astype(int)
    return int(np.mean([np.unique(rows[begin : begin + window]).size for begin in begins]))


def _rate(hits: Rows) -> float:
    """Hits in the second half, in percent."""
    return 100 * float(hits[hits.size // 2 :].mean())


if __name__ == "__main__":
    main()
