"""Race: hit rates of the default policy against libcachesim's on n-gram text, batches of one row.

Each trace is run in one go; hits are counted in its second half. Nobody is tuned: all policies run as they are by default. The
traces are a stream's documents one after the other, and 64 of them in turns, a token each, hashed by the paper's demo (2- and
3-grams, 16 rows a token) and by DeepSeek-V4.1's form (2- to 4-grams, 24 rows a token).
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import libcachesim
import numpy as np
from _common import Figure, Rows, parser, report
from rich.progress import track

from tiercache.engram.demo import demo_hashers
from tiercache.lab.formats import save_oracle
from tiercache.lab.simulator import simulate
from tiercache.lab.tokens import SHIPPED, SHIPPED_VOCABULARY, TokenStream, load_tokens
from tiercache.lab.trace import single
from tiercache.policies import DEFAULT

PEERS = ("S3FIFO", "ARC", "GDSF", "TwoQ", "SLRU", "Clock2QPlus", "LIRS", "WTinyLFU", "LRU")
BOUND = "Belady"
SHARES = (0.01, 0.05, 0.10)
FORMS = {"demo": (646_400,) * 2, "V4.1": (16_000_000,) * 3}


def main() -> None:
    """Measure and report."""
    options = parser(__doc__, directory=False)
    options.add_argument("--trace", type=Path, default=SHIPPED, help="token stream (%(default)s)")
    options.add_argument("--accesses", type=int, default=4_000_000, help="of each trace (%(default)s)")
    arguments = options.parse_args()
    figures: list[Figure] = []
    margins = []
    for name, rows in _traces(arguments):
        num_touched = np.unique(rows).size
        half = rows.size // 2
        with tempfile.TemporaryDirectory() as directory:
            paths = [Path(directory) / f"{part}.bin" for part in ("half", "whole")]
            save_oracle(paths[0], single(rows[:half]))
            save_oracle(paths[1], single(rows))
            for share in track(SHARES, name, transient=True):
                capacity = int(num_touched * share)
                ours = simulate(DEFAULT, capacity, rows).hits - simulate(DEFAULT, capacity, rows[:half]).hits
                theirs = {peer: _second_half(peer, capacity, paths, rows.size) for peer in (*PEERS, BOUND)}
                best = max(PEERS, key=theirs.__getitem__)
                rate = 100 * ours / (rows.size - half)
                margins.append(rate - theirs[best])
                what = f"{name}, {share:.0%} of {num_touched:,} rows"
                bound = f"best of {len(PEERS)}: {best} (Belady {theirs[BOUND]:.1f})"
                figures.append(Figure(what, rate, "% hits", bound, theirs[best], at_least=1.0))
    figures.append(Figure("mean margin over the best of each line", float(np.mean(margins)), "points", at_least=1.0))
    report("race", f"Race: {DEFAULT} on {arguments.accesses:,} accesses of text", figures, arguments)


def _traces(arguments: argparse.Namespace) -> Iterator[tuple[str, Rows]]:
    stream = load_tokens(arguments.trace)
    for form, sizes in FORMS.items():
        hasher = demo_hashers(vocabulary=SHIPPED_VOCABULARY, table_vocabularies=sizes)[0]
        num_tokens = -(-arguments.accesses // hasher.num_heads)
        rows = hasher.rows(stream.tokens, stream.documents)
        yield f"{form}, in order", rows[:num_tokens].reshape(-1)[: arguments.accesses]
        yield f"{form}, 64 in turns", rows[turns(stream, 64, num_tokens)].reshape(-1)[: arguments.accesses]


def turns(stream: TokenStream, sequences: int, num_tokens: int) -> Rows:
    """Positions of tokens: one of each of so many documents in turn; a finished one makes room for the next."""
    ends = np.cumsum(stream.documents)
    waiting = [range(int(end - length), int(end)) for length, end in zip(stream.documents, ends, strict=True)][::-1]
    active: list[Iterator[int]] = []
    order: list[int] = []
    while (waiting or active) and len(order) < num_tokens:
        while waiting and len(active) < sequences:
            active.append(iter(waiting.pop()))
        steps = [next(document, -1) for document in active]
        active = [document for document, step in zip(active, steps, strict=True) if step >= 0]
        order += [step for step in steps if step >= 0]
    return np.array(order, np.int64)


def _second_half(peer: str, capacity: int, paths: list[Path], num_accesses: int) -> float:
    """Hits in percent. In processes of their own: some of their policies end the process on some traces."""
    rates = []
    for path in paths:
        command = [sys.executable, __file__, "--peer", peer, str(capacity), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return 0.0
        rates.append(1 - float(done.stdout.split()[-1]))
    half = num_accesses // 2
    return 100 * (rates[1] * num_accesses - rates[0] * half) / (num_accesses - half)


def _run_peer(peer: str, capacity: str, path: str) -> None:
    reader = libcachesim.TraceReader(
        path, libcachesim.TraceType.ORACLE_GENERAL_TRACE, libcachesim.ReaderInitParam(ignore_obj_size=True)
    )
    print(getattr(libcachesim, peer)(cache_size=int(capacity)).process_trace(reader)[0])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        _run_peer(*sys.argv[2:])
    else:
        main()
