"""Hashing: rows of DeepSeek-V4.1's n-grams, against the same arithmetic in numpy, and a decode step against `F.embedding`.

A text of random token ids goes through the token compression (a map of the real size) to 24 rows a token of one layer.
numpy gets the best of three ways to write it, and both write to an array that is there. A decode step is
`NgramState.append` of one token for each of 64 sequences, everything included that its caller pays; the embedding reads
the 1,536 rows that this gives, of 256 bytes, out of a table that no cache holds. Every step has tokens of its own.
"""

from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import numpy.typing as npt
import torch
from _common import GIB, Figure, Rows, console, latencies, parser, report, timed

from tiercache.engram.deepseek import DeepseekHasher, deepseek_hashers
from tiercache.engram.state import NgramState

NUM_IDS, NUM_COMPRESSED, SEQUENCES = 129_280, 99_092, 64


def main() -> None:
    """Measure and report."""
    options = parser(__doc__, directory=False)
    options.add_argument("--tokens", type=int, default=1_000_000, help="of the text (%(default)s)")
    options.add_argument("--steps", type=int, default=300, help="decode steps a round (%(default)s)")
    options.add_argument("--rounds", type=int, default=9, help="(%(default)s)")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    compression = random.permutation(np.concatenate([np.arange(NUM_COMPRESSED), np.arange(NUM_IDS - NUM_COMPRESSED)]))
    hashers = deepseek_hashers(compression=compression)
    figures = _text(hashers[0], random.integers(0, NUM_IDS, arguments.tokens), arguments.rounds)
    figures += _decode(hashers, random, arguments.steps, arguments.rounds)
    report("hashing", f"Hashing: {arguments.tokens:,} tokens, and decode steps of {SEQUENCES} sequences", figures, arguments)


def _text(hasher: DeepseekHasher, tokens: Rows, rounds: int) -> list[Figure]:
    out = np.zeros((tokens.size, hasher.num_heads), np.int64)
    calls: dict[str, Callable[[], Rows]] = {
        "out": partial(hasher.rows, tokens, out=out),
        "new": partial(hasher.rows, tokens),
        **{name: partial(_in_numpy, hasher, tokens, out, write) for name, write in NUMPY.items()},
    }
    expected = hasher.rows(tokens)
    for name, call in calls.items():
        out[:] = 0
        if not np.array_equal(call(), expected):
            raise SystemExit(f"{name}: other rows")
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(timed(call).cpu_seconds)
    # Both are one thread's arithmetic: CPU time says what it takes also where others use the cores.
    rate = {name: tokens.size / median(runs) / 1e6 for name, runs in samples.items()}
    best = max(NUMPY, key=lambda name: rate[name])
    baseline = f"numpy, {best}", rate[best]
    figures = [
        Figure("rows(out=), 24 rows a token", rate["out"], "M tokens/CPU s", *baseline, at_least=10),
        Figure("rows(), a new array each time", rate["new"], "M tokens/CPU s", *baseline),
    ]
    others = [name for name in NUMPY if name != best]
    return figures + [Figure("rows(out=)", rate["out"], "M tokens/CPU s", f"numpy, {name}", rate[name]) for name in others]


def _decode(hashers: tuple[DeepseekHasher, ...], random: np.random.Generator, steps: int, rounds: int) -> list[Figure]:
    one, both = (NgramState(of, SEQUENCES) for of in (hashers[:1], hashers))
    slots = np.arange(SEQUENCES)
    table = torch.zeros((GIB // 256, 256), dtype=torch.uint8)
    samples: dict[str, list[float]] = {"one": [], "both": [], "embedding": []}
    with console.status("Decoding"):
        for _ in range(rounds):
            tokens = list(random.integers(0, NUM_IDS, (steps, SEQUENCES)))
            rows = [torch.from_numpy(random.integers(0, table.shape[0], SEQUENCES * hashers[0].num_heads)) for _ in tokens]
            samples["one"] += latencies(partial(one.append, slots), tokens)
            samples["embedding"] += latencies(partial(_embedding, table), rows)
            samples["both"] += latencies(partial(both.append, slots), tokens)
    p50 = {name: 1e6 * median(runs) for name, runs in samples.items()}
    baseline = "F.embedding of 1,536 rows of 256 B", p50["embedding"]
    return [
        Figure("NgramState.append, one layer", p50["one"], "us", *baseline, at_most=3),
        Figure("NgramState.append, both layers", p50["both"], "us", *baseline),
    ]


def _embedding(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.embedding(rows, table)


def _in_numpy(hasher: DeepseekHasher, tokens: Rows, out: Rows, write: Callable[[Rows, Rows, Rows], None]) -> Rows:
    """The rows of a text without images, an order at a time."""
    assert hasher.compression is not None
    symbols = np.concatenate([np.full(hasher.context, hasher.pad), hasher.compression[tokens]])
    moduli = np.array(hasher.primes)
    mix = symbols[hasher.context :] * hasher.multipliers[0]
    for order in range(hasher.context):
        first = hasher.context - 1 - order
        mix = mix ^ (symbols[first : first + tokens.size] * hasher.multipliers[order + 1])
        heads = slice(order * moduli.shape[1], (order + 1) * moduli.shape[1])
        write(mix, moduli[order], out[:, heads])
    out += hasher.offsets
    return out


def _broadcast(mix: Rows, moduli: Rows, out: Rows) -> None:
    np.remainder(mix[:, None], moduli, out=out)


def _by_head(mix: Rows, moduli: Rows, out: Rows) -> None:
    for head, modulus in enumerate(moduli):
        out[:, head] = mix % modulus


def _by_quotient(mix: Rows, moduli: Rows, out: Rows) -> None:
    for head, modulus in enumerate(moduli):
        quotient: npt.NDArray[np.int64] = mix // modulus
        out[:, head] = mix - quotient * modulus


NUMPY = {"by order": _broadcast, "by head": _by_head, "by quotient": _by_quotient}


if __name__ == "__main__":
    main()
