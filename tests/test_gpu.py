"""The device tier on a GPU. `make gpu` runs these; without a GPU they are skipped."""

import numpy as np
import pytest
import torch
from stores import ENGRAM, config_of, open_with, write_rows

from tiercache import Store
from tiercache.storage.memory import MemoryTable
from tiercache.storage.table import open_file
from tiercache.testing import oracle

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

NUM_ROWS = 2000
RECORDS = oracle(np.arange(NUM_ROWS), 264)


def open_store(*, capacity=500, device_capacity=100, most=50, config_dtype="bfloat16", paths=None):
    settings = {"device": "cuda", "capacity": 272 * device_capacity, "promotion": 272 * most}
    sources = {} if paths else {"t": MemoryTable(RECORDS, ENGRAM)}
    return open_with("lru", {}, 272 * capacity, paths or {}, sources, device=("lru", {}, settings, None))


def same(one, other):
    one, other = one.cpu(), other.cpu()
    return torch.equal(one.nan_to_num(nan=5.0), other.nan_to_num(nan=5.0))


@pytest.mark.parametrize("raw", [True, False])
def test_rows_of_every_tier_are_exact(raw):
    draw = np.random.default_rng(0)
    with open_store() as store:
        for _ in range(50):
            rows = draw.zipf(1.2, int(draw.integers(1, 600))) % NUM_ROWS
            fetched = store.fetch(rows, raw=raw)
            assert fetched.is_cuda
            expected = torch.from_numpy(RECORDS[rows])
            assert same(fetched, expected if raw else ENGRAM.decode(expected))
        store.check()
        assert store.stats().device.hits > 0


@pytest.mark.parametrize("engine", ["uring", "threads"])
def test_rows_from_disk_are_exact(tmp_path, engine):
    path = write_rows(tmp_path / "t.safetensors", NUM_ROWS, 264)
    with open_store(paths={"t": path}, capacity=200) as store:
        for seed in range(20):
            rows = np.random.default_rng(seed).integers(0, NUM_ROWS, 700)
            assert np.array_equal(store.fetch(rows, raw=True).cpu().numpy(), RECORDS[rows])


def test_many_streams_and_tickets_without_a_wait():
    draw = np.random.default_rng(1)
    streams = [torch.cuda.Stream() for _ in range(4)]
    results, tickets = [], []
    with open_store(capacity=60, device_capacity=20, most=10) as store:
        for _ in range(400):
            rows = draw.zipf(1.3, int(draw.integers(1, 40))) % NUM_ROWS
            stream = streams[int(draw.integers(4))]
            if draw.random() < 0.4:
                tickets.append((store.prefetch(rows), rows))
            elif tickets and draw.random() < 0.5:
                ticket, asked = tickets.pop(int(draw.integers(len(tickets))))
                results.append((asked, ticket.take(stream, raw=True)))
            else:
                results.append((rows, store.fetch(rows, stream, raw=True)))
        torch.cuda.synchronize()
        for rows, result in results:
            assert np.array_equal(result.cpu().numpy(), RECORDS[rows])


def test_indices_may_be_on_the_device():
    with open_store() as store:
        rows = torch.tensor([[5, 7], [5, 1999]], device="cuda")
        assert np.array_equal(store.fetch(rows, raw=True).cpu().numpy(), RECORDS[rows.cpu().numpy()])


def test_a_cuda_graph_serves_whatever_was_loaded():
    with open_store() as store:
        static = store.static_fetch((8, 3), raw=True)
        static.load(torch.zeros(8, 3, dtype=torch.int64))
        static.launch()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            static.launch()
        for seed in range(30):
            rows = np.random.default_rng(seed).integers(0, NUM_ROWS, (8, 3))
            static.load(rows)
            graph.replay()
            assert np.array_equal(static.out.cpu().numpy(), RECORDS[rows])
        static.close()


def test_a_bulk_load_goes_straight_to_the_device(tmp_path):
    gds = pytest.importorskip("tiercache.storage.gds", reason="kvikio is not installed")
    content = oracle(np.arange(1), 1 << 20)[0]
    (tmp_path / "b.bin").write_bytes(content.tobytes())
    target = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    gds.load(open_file(tmp_path / "b.bin"), 0, 1 << 20, target)
    assert np.array_equal(target.cpu().numpy(), content)


@pytest.mark.filterwarnings("ignore:tiercache:RuntimeWarning")
def test_a_device_tier_is_saved_and_restored(tmp_path):
    pytest.importorskip("kvikio", reason="kvikio is not installed")
    table = write_rows(tmp_path / "t.safetensors", NUM_ROWS, 264)
    config = {**config_of(table), "device": {"device": "cuda", "capacity": 272 * 100}}
    with Store.open(config) as store:
        for _ in range(3):
            store.fetch(range(100), raw=True)
        torch.cuda.synchronize()
        assert store.save(tmp_path / "tiers") >= 200
    with Store.open({**config, "restore": str(tmp_path / "tiers")}) as store:
        assert store.stats().device.used_slots == 100
        assert np.array_equal(store.fetch(range(NUM_ROWS), raw=True).cpu().numpy(), RECORDS)
