"""The lab: the simulator against a list model and the live store, the bounds against exhaustive search, traces, plots."""

from collections import OrderedDict
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.errors import FormatError
from tiercache.lab.bounds import bounds, uses_of
from tiercache.lab.curves import ONLINE, curves
from tiercache.lab.plot import plot_curves
from tiercache.lab.replay import replay_live, replay_simulated
from tiercache.lab.simulator import Counts, simulate
from tiercache.lab.tokens import SHIPPED_VOCABULARY, TokenStream, load_tokens
from tiercache.lab.trace import Trace, chunks, serving, single
from tiercache.store import Store

small_batches = st.lists(st.lists(st.integers(0, 5), max_size=5), max_size=7)
batches_of_rows = st.lists(st.lists(st.integers(0, 20), max_size=12), max_size=25)


def trace_of(batches: list[list[int]]) -> Trace:
    rows = np.array([row for batch in batches for row in batch], np.int64)
    return Trace(rows, np.cumsum([0, *map(len, batches)], dtype=np.int64))


def zipf_trace(num_batches: int, seed: int = 0) -> Trace:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 60, num_batches)
    rows = (rng.zipf(1.3, sizes.sum()) - 1) % 3000
    return Trace(rows.astype(np.int64), np.append(0, np.cumsum(sizes)))


def lru_model(capacity: int, batches: list[list[int]]) -> Counts:
    """LRU with a dict: the hits of a batch come first and stay, and so does what the batch brought."""
    resident: OrderedDict[int, None] = OrderedDict()
    hits = misses = bypasses = 0
    for batch in batches:
        rows = list(dict.fromkeys(batch))
        in_use = [row for row in rows if row in resident]
        hits += len(in_use)
        for row in in_use:
            resident.move_to_end(row)
        for row in [row for row in rows if row not in in_use]:
            misses += 1
            if len(in_use) >= capacity:
                bypasses += 1
                continue
            if len(resident) == capacity:
                del resident[next(old for old in resident if old not in in_use)]
            resident[row] = None
            in_use.append(row)
    return Counts(hits + misses, hits, misses, bypasses)


def belady_model(capacity: int, batches: list[list[int]]) -> int:
    """Most hits of any choice of what to keep, by trying all."""
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for batch in map(frozenset, batches):
        after: dict[frozenset[int], int] = {}
        for resident, hits in best.items():
            known = sorted(resident | batch)
            for kept in map(frozenset, combinations(known, min(capacity, len(known)))):
                after[kept] = max(after.get(kept, 0), hits + len(resident & batch))
        best = after
    return max(best.values())


def static_model(capacity: int, batches: list[list[int]]) -> int:
    """Most hits of any fixed content, first uses missing, by trying all."""
    rows = sorted({row for batch in batches for row in batch})
    uses = {row: sum(row in batch for batch in batches) for row in rows}
    return max(sum(uses[row] - 1 for row in kept) for kept in combinations(rows, min(capacity, len(rows))))


@given(st.integers(1, 15), batches_of_rows)
def test_lru_counts_as_a_dict_does(capacity: int, batches: list[list[int]]) -> None:
    assert simulate("lru", capacity, *trace_of(batches)) == lru_model(capacity, batches)


@given(st.integers(1, 15), st.lists(st.integers(0, 20), max_size=60))
def test_without_offsets_every_row_is_a_batch(capacity: int, rows: list[int]) -> None:
    assert simulate("lru", capacity, np.array(rows, np.int64)) == lru_model(capacity, [[row] for row in rows])


@given(st.integers(1, 4), small_batches)
def test_the_bounds_are_what_exhaustive_search_finds(capacity: int, batches: list[list[int]]) -> None:
    found = bounds(capacity, uses_of(trace_of(batches)))
    assert found.accesses == sum(len(set(batch)) for batch in batches)
    assert found.belady == belady_model(capacity, batches)
    assert found.static == static_model(capacity, batches)
    assert found.unbounded == found.accesses - len({row for batch in batches for row in batch})


@pytest.mark.parametrize("capacity", [1, 30, 300])
@pytest.mark.parametrize("policy", ONLINE)
def test_no_policy_beats_the_bounds(policy: str, capacity: int) -> None:
    trace = zipf_trace(400)
    found = bounds(capacity, uses_of(trace))
    counts = simulate(policy, capacity, *trace)
    assert counts.accesses == found.accesses == counts.hits + counts.misses
    assert counts.hits <= found.belady <= found.unbounded


@pytest.mark.parametrize("capacity", [1, 30, 300, 5000])
def test_static_optimal_is_the_static_policy_with_the_hottest_rows(capacity: int) -> None:
    trace = zipf_trace(400)
    uses = uses_of(trace)
    counts = simulate("static", capacity, *trace, hot_rows=uses.hottest(capacity))
    assert counts.hits == bounds(capacity, uses).static


def test_with_room_for_everything_every_bound_and_policy_agree() -> None:
    trace = zipf_trace(300)
    found = bounds(3000, uses_of(trace))
    assert found.belady == found.static == found.unbounded
    assert {simulate(policy, 6000, *trace).hits for policy in ONLINE} == {found.unbounded}


@pytest.mark.parametrize("capacity", [1, 25, 400])
@pytest.mark.parametrize("policy", ONLINE)
def test_the_simulator_counts_what_the_live_store_counts(policy: str, capacity: int) -> None:
    trace = zipf_trace(200)
    uses = uses_of(trace)
    table = np.arange(3000 * 8, dtype=np.uint8).reshape(3000, 8)
    seen = 0

    def compare(rows: npt.NDArray[np.int64], records: npt.NDArray[np.uint8]) -> None:
        nonlocal seen
        assert np.array_equal(records, table[rows])
        seen += rows.size

    with Store.open({"host": {"capacity": capacity * 8, "policy": policy}}, tables={"t": table}) as store:
        live = replay_live(store, trace, uses, on_batch=compare)
        again = replay_live(store, trace, uses)
    simulated = replay_simulated(policy, capacity, trace, uses, record_bytes=8)
    assert live.counts == simulated.counts
    assert (live.tier, live.capacity, live.bounds) == (policy, capacity, simulated.bounds)
    assert simulated.bytes_read == 8 * simulated.counts.misses
    assert live.latency_ns.size == trace.num_batches
    assert seen == trace.rows.size
    assert again.counts.accesses == live.counts.accesses, "a second replay counts only itself"


def test_curves_hold_every_policy_and_bound_at_every_size(tmp_path: Path) -> None:
    trace = zipf_trace(200)
    found = curves(trace, (0.01, 0.1, 1.0))
    assert found.touched_rows == np.unique(trace.rows).size
    assert found.capacities[-1] == found.touched_rows
    assert list(found.policies) == list(ONLINE)
    for policy, counts in found.policies.items():
        assert counts == [simulate(policy, capacity, *trace) for capacity in found.capacities]
    assert found.bounds[-1].belady == found.bounds[-1].unbounded
    plot_curves(tmp_path / "curves.png", found, record_bytes=264, title="Zipf", mark_slots=found.capacities[1])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def numbered(num_tokens: int, heads: int = 3) -> npt.NDArray[np.int64]:
    """Rows that say where they come from."""
    return np.arange(num_tokens * heads, dtype=np.int64).reshape(num_tokens, heads)


def test_single_puts_every_row_in_a_batch_of_its_own() -> None:
    trace = single(numbered(4))
    assert [batch.tolist() for batch in trace.batches()] == [[row] for row in range(12)]


@pytest.mark.parametrize("num_tokens", [0, 1, 10, 11])
def test_chunks_cut_the_text_in_order(num_tokens: int) -> None:
    rows = numbered(num_tokens)
    batches = list(chunks(rows, 5).batches())
    assert [batch.size for batch in batches] == [15] * (num_tokens // 5) + [3] * (num_tokens % 5)
    assert np.array_equal(np.concatenate([np.empty(0, np.int64), *batches]), rows.reshape(-1))


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(1, 4))
def test_serving_asks_for_every_token_once_and_each_document_in_order(lengths: list[int], sequences: int) -> None:
    rows = numbered(sum(lengths))
    trace = serving(rows, lengths, sequences=sequences, prompt=10, answer=4, chunk=4)
    tokens = trace.rows[::3] // 3
    assert np.array_equal(trace.rows, rows[tokens].reshape(-1))
    assert sorted(tokens.tolist()) == list(range(sum(lengths)))
    document = np.repeat(np.arange(len(lengths)), lengths)[tokens]
    for number in range(len(lengths)):
        assert (np.diff(tokens[document == number]) > 0).all()


def test_serving_reads_prompts_in_chunks_and_writes_for_all_at_once() -> None:
    trace = serving(numbered(20), [10, 10], sequences=2, prompt=6, answer=2, chunk=4)
    batches = [(batch[::3] // 3).tolist() for batch in trace.batches()]
    assert batches == [
        [0, 1, 2, 3],
        [10, 11, 12, 13],
        [4, 5],
        [14, 15],
        [6, 16],
        [7, 17],
        [8, 9],
        [18, 19],
    ]


def test_the_shipped_text_is_whole() -> None:
    stream = load_tokens()
    assert stream.tokens.size == stream.documents.sum() == 901_848
    assert stream.documents.size == 127
    assert 0 <= stream.tokens.min() <= stream.tokens.max() < SHIPPED_VOCABULARY


def test_a_stream_is_cut_between_and_inside_documents() -> None:
    stream = TokenStream(np.arange(10), np.array([4, 0, 6]))
    assert [part.tolist() for part in stream.first(6)] == [[0, 1, 2, 3, 4, 5], [4, 2]]
    assert [part.tolist() for part in stream.first(4)] == [[0, 1, 2, 3], [4]]
    assert stream.first(99).tokens.size == 10


def test_a_stream_without_documents_is_one_document(tmp_path: Path) -> None:
    np.savez(tmp_path / "text.npz", tokens=np.array([3, 1, 2], np.uint16))
    assert [part.tolist() for part in load_tokens(tmp_path / "text.npz")] == [[3, 1, 2], [3]]


@pytest.mark.parametrize(
    "arrays",
    [{"ids": [1]}, {"tokens": [1.5]}, {"tokens": [[1, 2]]}, {"tokens": [1, 2], "documents": [1]}],
    ids=["no tokens", "floats", "two dimensions", "documents do not sum up"],
)
def test_a_file_that_is_no_stream_is_named(tmp_path: Path, arrays: dict[str, list[int]]) -> None:
    path = tmp_path / "text.npz"
    np.savez(path, **{name: np.array(values) for name, values in arrays.items()})  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=r"text\.npz"):
        load_tokens(path)


def test_a_file_that_is_no_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(FormatError, match=r"text\.npz: not an \.npz file"):
        load_tokens(tmp_path / "text.npz")
