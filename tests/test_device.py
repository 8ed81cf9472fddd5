"""The device tier: its config, what it says where it cannot be, and three tiers on the CPU."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_policies import zipf_trace
from stores import ENGRAM, config_of, in_process, open_with, write_engram, write_rows

from tiercache import ConfigError, Store
from tiercache.level import HITS, MISSES, Level
from tiercache.policies import POLICIES
from tiercache.stack import StackPlan, plan_stack
from tiercache.testing import oracle

RECORDS = oracle(np.arange(500), 264)
THREE = {"device": {"device": "cpu", "capacity": 272 * 30}, "host": {"capacity": 272 * 100, "policy": "lru"}}


def test_three_tiers_serve_exact_rows_and_count_what_is_where(tmp_path: Path) -> None:
    config = {**config_of(write_rows(tmp_path / "t.safetensors", 500, 264)), **THREE}
    with Store.open(config) as store:
        for _ in range(3):
            fetched = store.fetch([[7, 8], [7, 499]], raw=True)
            assert np.array_equal(fetched.numpy(), RECORDS[[[7, 8], [7, 499]]])
        stats = store.stats()
        assert (stats.device.hits, stats.device.misses, stats.device.bypasses) == (3, 6, 3)
        assert (stats.host.hits, stats.host.misses) == (3, 3)
        assert stats.device.used_slots == 3
        assert stats.device.capacity_bytes == 272 * 30
        store.check()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_of_every_tier_are_decoded(tmp_path: Path, dtype: str) -> None:
    path = write_engram(tmp_path / "e.safetensors", RECORDS)
    config = {"dtype": dtype, "table": [{"path": path, "fields": ["weight", "scale"]}], **THREE}
    with Store.open(config) as store:
        for rows in ([1, 2], [1, 2, 3], [0, 1, 2, 3, 3, 400]):
            expected = ENGRAM.decode(torch.from_numpy(RECORDS[rows]), getattr(torch, dtype))
            assert torch.equal(store.fetch(rows).nan_to_num(nan=5), expected.nan_to_num(nan=5))
        assert store.stats().device.hits > 0


def test_a_batch_larger_than_both_tiers_is_exact() -> None:
    settings = {"device": "cpu", "capacity": 272, "promotion": 272}
    with open_with("lru", {}, 272 * 2, {}, {"t": RECORDS}, device=("lru", {}, settings, None)) as store:
        for _ in range(3):
            assert np.array_equal(store.fetch(range(500), raw=True).numpy(), RECORDS)
            store.check()


@pytest.mark.parametrize("policy", ["lru", "s3fifo", "wtinylfu"])
def test_the_plans_of_both_levels_count_what_a_live_store_counts(policy: str) -> None:
    trace = zipf_trace(4000, 300, 1)
    device, host = (Level(POLICIES[policy], capacity, {}, 500) for capacity in (20, 60))
    settings = {"device": "cpu", "capacity": 272 * 20, "promotion": 272 * 5}
    with open_with(policy, {}, 272 * 60, {}, {"t": RECORDS}, device=(policy, {}, settings, None)) as store:
        for rows in np.split(trace, 80):
            plan = StackPlan(rows.size, above=True)
            plan_stack(device, host, plan, rows, 1, 5)
            host.slots["pending"] = 0
            device.release(plan.above)
            host.release(plan.below)
            store.fetch(rows)
        stats = store.stats()
    for level, counted in ((device, stats.device), (host, stats.host)):
        level.check()
        assert level.counters[[HITS, MISSES]].tolist() == [counted.hits, counted.misses]


@pytest.mark.parametrize("name", ["gpu0", "mps", "meta"])
def test_a_device_that_is_none_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"device.device = {name!r}: allowed are")):
        Store.open({"device": {"device": name}}, tables={"t": RECORDS})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_the_config_error_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"device\.device = 'cuda': needs (a torch that is built for CUDA|a GPU)"):
        Store.open({"device": {"capacity": "1MiB"}}, tables={"t": RECORDS})


def test_a_device_capacity_of_no_row_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"device\.capacity = 271: holds no row of 272 bytes"):
        Store.open({"device": {"device": "cpu", "capacity": 271}}, tables={"t": RECORDS})


def test_a_promotion_of_no_row_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"device\.promotion = 100: holds no row of 272 bytes"):
        Store.open({"device": {"device": "cpu", "promotion": 100}}, tables={"t": RECORDS})


def test_three_tiers_on_the_cpu_import_nothing_of_a_gpu() -> None:
    code = """
import sys
import numpy as np
from tiercache import Store
with Store.open({"device": {"device": "cpu"}}, tables={"t": np.zeros((9, 4), np.float32)}) as store:
    store.fetch([1])
print([name for name in ("cupy", "kvikio", "triton") if name in sys.modules])
"""
    assert in_process(code) == "[]\n"


def test_streams_are_for_devices() -> None:
    with (
        Store.open({"device": {"device": "cpu"}}, tables={"t": RECORDS}) as store,
        pytest.raises(ValueError, match="stream = 'x'"),
    ):
        store.fetch([1], "x")

