"""Warm restart: what tiers held is saved while a store serves, and the next store begins with it, exact or refused."""

import errno
import os
import threading

import numpy as np
import pytest
import torch
from fake_device import FakeDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import config_of, descriptors_of, is_exact, open_with, oracle_tensor, store_threads, write_rows

from tiercache import ConfigError, FormatError, StorageError, Store
from tiercache.level import PINNED, Level, new_plan
from tiercache.policies import POLICIES
from tiercache.storage import open_table
from tiercache.storage.image import about_tables, open_image
from tiercache.storage.pack import pack
from tiercache.warm import hold

NUM_ROWS = 2000
THREE = {"device": {"device": "cpu", "capacity": 272 * 30}, "host": {"capacity": 272 * 300, "policy": "lru"}}


@pytest.fixture
def table(tmp_path):
    return write_rows(tmp_path / "t.safetensors", NUM_ROWS, 264)


@pytest.fixture
def image(tmp_path, table):
    """An image of both tiers, full."""
    path = tmp_path / "tiers"
    with Store.open({**config_of(table), **THREE}) as store:
        for _ in range(2):
            store.fetch(range(100, 200))
        store.fetch(range(500, 700))
        assert store.save(path) == 330
    return path


def restored(path, image, **settings):
    return Store.open({**config_of(path), **THREE, "restore": str(image), **settings})


def test_the_tiers_begin_with_what_they_held_and_it_counts_as_no_use(table, image):
    with restored(table, image) as store:
        stats = store.stats()
        assert (stats.device.used_slots, stats.host.used_slots) == (30, 300)
        assert (stats.host.hits, stats.host.misses, stats.host.pinned_slots, stats.device.pinned_slots) == (0, 0, 0, 0)
        assert is_exact(store, [*range(100, 200), *range(500, 700)])
        assert store.stats().storage.reads == 0
        assert is_exact(store, range(NUM_ROWS))
        store.check()


def test_a_smaller_tier_takes_what_was_used_last(table, image):
    with restored(table, image, host={"capacity": 272 * 50, "policy": "lru"}) as store:
        assert store.stats().host.used_slots == 50
        store.fetch(range(650, 700))
        assert store.stats().storage.reads == 0


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"static", "belady"}))
def test_every_policy_takes_a_whole_image_and_goes_on(table, tmp_path, policy):
    settings = {"host": {"capacity": 264 * 64, "policy": policy}}
    random = np.random.default_rng(3)
    with Store.open({**config_of(table), **settings}) as store:
        for _ in range(40):
            store.fetch(random.zipf(1.3, 20) % NUM_ROWS)
        used = store.stats().host.used_slots
        assert store.save(tmp_path / "i") == used
    with Store.open({**config_of(table), **settings, "restore": str(tmp_path / "i")}) as store:
        assert store.stats().host.used_slots == used
        store.check()
        for _ in range(40):
            assert is_exact(store, random.zipf(1.3, 20) % NUM_ROWS)
        store.check()


def test_a_packed_table_whose_pages_are_verified(table, tmp_path):
    pack(table, tmp_path / "packed")
    config = {**config_of(tmp_path / "packed", verify="page"), **THREE}
    with Store.open(config) as store:
        store.fetch(range(300))
        store.save(tmp_path / "i")
    with Store.open({**config, "restore": str(tmp_path / "i")}) as store:
        assert is_exact(store, range(300))
        assert store.stats().storage.reads == 0


def test_an_image_is_an_ordinary_safetensors_file(image):
    from safetensors import safe_open

    with safe_open(image, "numpy") as file:
        assert file.get_slice("device.slots").get_shape() == [30, 272]
        rows = file.get_tensor("host.rows")
    assert sorted(rows) == [*range(100, 200), *range(500, 700)]


# what is not there yet, or is something else


def test_nothing_is_there_yet(table, tmp_path):
    with pytest.warns(RuntimeWarning, match="restore: nothing is at .*/none yet, the tiers begin empty"):
        store = restored(table, tmp_path / "none")
    with store:
        assert store.stats().host.used_slots == 0


def test_a_table_that_was_written_anew_since(table, image):
    write_rows(table, NUM_ROWS, 264)
    os.utime(table, ns=(1, 1))
    with pytest.raises(FormatError, match="image of another table 'file', or of files that have changed since: delete it"):
        restored(table, image)


def test_other_names(table, image):
    with pytest.raises(FormatError, match=r"image of tables \['file'\]; this store has \['other'\]"):
        restored(table, image, table=[{"name": "other", "path": table}])


def test_tiers_come_and_go_between_two_runs(table, image):
    """Slots are 264 bytes wide without a device tier, and 272 with one."""
    with restored(table, image, device=None) as store:
        assert store.stats().host.used_slots == 300
        assert is_exact(store, [*range(100, 200), *range(500, 700)])
        assert store.stats().storage.reads == 0
        store.save(image)
    with restored(table, image) as store:
        assert (store.stats().device.used_slots, store.stats().host.used_slots) == (0, 300)
        assert is_exact(store, [*range(100, 200), *range(500, 700)])
        assert store.stats().storage.reads == 0


def test_files_that_are_no_images(table, tmp_path):
    for content, message in ((b"", "0 bytes"), (b"x" * 5000, "header of"), (table.read_bytes(), "not an image of tiers")):
        (tmp_path / "i").write_bytes(content)
        with pytest.raises(FormatError, match=message):
            restored(table, tmp_path / "i")
    with pytest.raises(FormatError, match="not a regular file"):
        restored(table, tmp_path)


def test_sources_can_be_neither_saved_nor_restored(table, image, tmp_path):
    source = {"s": np.zeros((4, 8), np.uint8)}
    with Store.open(config_of(table), tables=source) as store, pytest.raises(ConfigError, match="save: table 's' is a source"):
        store.save(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match=r"restore = '.*': table 's' is a source"):
        Store.open({**config_of(table), **THREE, "restore": str(image)}, tables=source)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_anywhere_is_refused_or_does_not_matter(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("damage")
    table, image = write_rows(directory / "t.safetensors", NUM_ROWS, 264), directory / "tiers"
    with Store.open({**config_of(table), **THREE}) as store:
        for _ in range(2):
            store.fetch(range(300))
        store.save(image)
    content = bytearray(image.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    image.write_bytes(content)
    try:
        store = restored(table, image)
    except FormatError:
        return
    with store:
        assert len(content) == image.stat().st_size
        assert is_exact(store, range(NUM_ROWS))


# saving while others work


def test_threads_fetch_while_images_are_saved(table, tmp_path):
    wrong, stop = [], threading.Event()

    def fetch(seed):
        random = np.random.default_rng(seed)
        while not stop.is_set():
            if not is_exact(store, random.integers(0, NUM_ROWS, 60)):
                wrong.append(seed)

    with Store.open({**config_of(table), **THREE}) as store:
        store.fetch(range(1000))
        threads = [threading.Thread(target=fetch, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for number in range(8):
            store.save(tmp_path / f"{number % 2}")
        stop.set()
        for thread in threads:
            thread.join()
        store.check()
    assert not wrong
    for number in range(2):
        with restored(table, tmp_path / f"{number}") as store:
            assert store.stats().host.used_slots > 100
            assert is_exact(store, range(NUM_ROWS))


def test_slots_whose_bytes_are_on_their_way_are_left_out():
    level = Level(POLICIES["lru"], 8, {}, 100)
    arrived, underway = level.plan(np.arange(3)), level.plan(np.arange(3, 5))
    level.slots["pending"][underway.held] = 1
    level.release(arrived)
    held, rows = new_plan(8), np.empty(8, np.int64)
    hold(level.slots, level.counters, np.arange(8, dtype=np.int32), rows, held)
    assert sorted(rows) == [-1] * 5 + [0, 1, 2]
    assert level.counters[PINNED] == 5
    level.release(held)
    assert level.counters[PINNED] == 2


def test_a_full_disk_leaves_the_old_image_and_no_slot_pinned(table, image, monkeypatch):
    before = image.read_bytes()
    with restored(table, image) as store:
        for failing in (1, 2, 3, 4):
            calls = iter(range(100))

            def pwrite(*arguments, failing=failing, calls=calls, real=os.pwrite):
                if next(calls) == failing:
                    raise OSError(errno.ENOSPC, "no space")
                return real(*arguments)

            with monkeypatch.context() as patch:
                patch.setattr(os, "pwrite", pwrite)
                with pytest.raises(StorageError, match="no space") as raised:
                    store.save(image)
            assert raised.value.filename == str(image)
            store.check()
    assert image.read_bytes() == before
    assert sorted(path.name for path in image.parent.iterdir()) == ["t.safetensors", "tiers"]


def test_one_saves_at_a_time(table, image):
    with restored(table, image) as store:
        entered, go = threading.Event(), threading.Event()
        read = store._host.read_slots

        def slowly(slots):
            entered.set()
            go.wait(30)
            return read(slots)

        store._host.read_slots = slowly
        thread = threading.Thread(target=store.save, args=(image,))
        thread.start()
        entered.wait(30)
        with pytest.raises(StorageError, match="an image is being saved there"):
            store.save(image)
        go.set()
        thread.join()
    with restored(table, image) as store:
        assert is_exact(store, range(NUM_ROWS))


def test_a_save_that_was_killed_leaves_a_file_that_the_next_takes_over(table, image):
    leftover = image.with_name(".tiers.saving")
    leftover.write_bytes(b"x" * 10_000_000)
    with restored(table, image) as store:
        store.save(image)
    assert not leftover.exists()
    assert image.stat().st_size < 1_000_000


# a device with streams


def on_streams(table, device, **storage):
    settings = {"device": "cpu", "capacity": 272 * 30}
    return open_with("lru", {}, 272 * 300, {"file": table}, {}, device=("lru", {}, settings, device), **storage)


@pytest.mark.parametrize("seed", range(4))
def test_a_device_tier_is_saved_behind_its_copies_and_loaded_in_one_piece(table, tmp_path, seed):
    random = np.random.default_rng(seed)
    device = FakeDevice(lambda n: int(random.integers(n)))
    with on_streams(table, device) as store:
        for _ in range(20):
            store.fetch(random.integers(0, 60, 20), raw=True)
        device.run_all()
        store.save(tmp_path / "i")
        store.check()
    after = FakeDevice(lambda n: int(random.integers(n)))
    with on_streams(table, after) as store:
        assert store._restore(tmp_path / "i", NUM_ROWS) == ("loaded by a fake",)
        assert len(after.loads) == 1
        assert after.loads[0][0] % 4096 == 0
        used = store.stats().device.used_slots
        assert used == 30
        fetched = [store.fetch(rows, raw=True) for rows in (range(60), range(NUM_ROWS))]
        after.run_all()
        assert after.num_faults == 0
        for rows in fetched:
            assert torch.equal(rows, oracle_tensor(np.arange(len(rows)), 264))
        store.check()


def test_a_direct_load_is_verified_where_pages_are(table, tmp_path):
    pack(table, tmp_path / "packed")
    described = {"file": open_table("file", tmp_path / "packed")}
    device = FakeDevice(lambda n: 0)
    with on_streams(tmp_path / "packed", device, verify="page") as store:
        for _ in range(3):
            store.fetch(range(20))
        device.run_all()
        store.save(tmp_path / "i")
    part = open_image(tmp_path / "i", about_tables(described))["device"]
    with open(tmp_path / "i", "r+b") as file:
        file.seek(part.offset + 5)
        file.write(b"\x00\x01")
    damaged = pytest.raises(FormatError, match="damaged: the checksum of slots 0 to 19 is wrong")
    with on_streams(tmp_path / "packed", FakeDevice(lambda n: 0), verify="page") as store, damaged:
        store._restore(tmp_path / "i", NUM_ROWS)


def test_an_open_that_fails_lets_go_of_everything(table, image):
    image.write_bytes(image.read_bytes()[:-1])
    with pytest.raises(FormatError):
        restored(table, image)
    assert not store_threads()
    assert descriptors_of(table) == descriptors_of(image) == 0
