"""Warm restart: what tiers held is saved while a store serves, and the next store begins with it, exact or refused."""

import errno
import itertools
import json
import os
import threading

import numpy as np
import pytest
import torch
from fake_device import FakeDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from stores import config_of, descriptors_of, is_exact, open_with, oracle_tensor, store_threads, write_rows

from tiercache import ConfigError, FormatError, StorageError, Store, warm
from tiercache.errors import ClosedError
from tiercache.level import PINNED, Level, new_plan
from tiercache.policies import POLICIES
from tiercache.storage import image as images
from tiercache.storage import open_table
from tiercache.storage.image import about_tables, open_image
from tiercache.storage.pack import pack
from tiercache.storage.safetensors import read_header
from tiercache.testing import oracle
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


@pytest.mark.parametrize("change", [
    {"stride": 256}, {"stride": 8}, {"stride": 288}, {"stride": 1 << 40}, {"tables": [5]}, {"tables": [[]]}, {"tables": [None]},
    {"tiers": ["host", "host"]}, {"tiers": ["disk"]}, {"tiers": []}, {"format": 2}, {"more": 1},
])  # fmt: skip
def test_images_made_by_hand(table, image, change, monkeypatch):
    """Their checksums are right, and what they say is not."""
    real = json.dumps

    def dumps(value, **options):
        return real(value | change if "stride" in value else value, **options)

    monkeypatch.setattr(json, "dumps", dumps)
    with Store.open({**config_of(table), **THREE}) as store:
        store.fetch(range(50))
        store.save(image)
    monkeypatch.undo()
    with pytest.raises(FormatError, match=r"^.{,600}$"):
        restored(table, image)


def test_rows_made_by_hand(table, image, monkeypatch):
    """Rows that occur twice are taken once, rows that the tables have not are refused."""
    for rows, used in (([7] * 300, 1), ([-1] * 300, 0), ([NUM_ROWS] * 300, None), ([-2] * 300, None)):
        with Store.open({**config_of(table), **THREE}) as store:
            store.fetch([7] * 2)
            store.fetch(range(300))
            real = warm._hold
            monkeypatch.setattr(warm, "_hold", lambda *given, rows=rows, real=real: real(*given) * 0 + rows[: given[1].size])
            store.save(image)
            monkeypatch.undo()
        if used is None:
            with pytest.raises(FormatError, match="it has rows that the tables have not"):
                restored(table, image)
        else:
            with restored(table, image, device=None) as store:
                assert store.stats().host.used_slots == used


def test_a_resident_field_in_a_file_of_its_own_is_part_of_what_must_be_unchanged(tmp_path):
    records = oracle(np.arange(200), 264)
    weight, scale = (torch.from_numpy(part.copy()) for part in (records[:, :256], records[:, 256:]))
    save_file({"weight": weight.view(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    save_file({"scale": scale.view(torch.float8_e8m0fnu)}, tmp_path / "b.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text('{"weight_map": {"weight": "a.safetensors", "scale": "b.safetensors"}}')
    config = {"table": [{"path": index, "fields": ["weight", "scale"], "resident": ["scale"]}]}
    with Store.open(config) as store:
        store.fetch(range(50))
        store.save(tmp_path / "i")
    Store.open({**config, "restore": tmp_path / "i"}).close()
    os.utime(tmp_path / "b.safetensors", ns=(1, 1))
    with pytest.raises(FormatError, match="files that have changed since"):
        Store.open({**config, "restore": tmp_path / "i"})


def test_an_image_that_is_replaced_while_it_is_opened(table, image, monkeypatch):
    replaced = []

    def read(path):
        header = read_header(path)
        if len(replaced) < 2:
            replaced.append(path)
            image.with_name("new").write_bytes(image.read_bytes())
            image.with_name("new").replace(image)
        return header

    monkeypatch.setattr(images, "read_header", read)
    with restored(table, image) as store:
        assert store.stats().host.used_slots == 300
    assert len(replaced) == 2


# saving: what is in the way


def test_nothing_but_an_image_is_overwritten(table, image, tmp_path):
    content = table.read_bytes()
    (tmp_path / "text").write_text("precious")
    (tmp_path / "link").symlink_to(image)
    with restored(table, image) as store:
        for path, message in ((table, "something else than an image"), (tmp_path / "text", "something else than an image"),
                              (tmp_path, "a directory"), ("", "a directory"), (tmp_path / "no" / "i", "No such file"),
                              ("a\0b", "null byte"), (table / "x", "Not a directory")):  # fmt: skip
            with pytest.raises(StorageError, match=message):
                store.save(path)
        image.chmod(0o600)
        store.save(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert image.stat().st_mode & 0o777 == 0o600
        (tmp_path / ".new.saving").symlink_to(tmp_path / "text")
        with pytest.raises(StorageError, match="symbolic links"):
            store.save(tmp_path / "new")
    assert (table.read_bytes(), (tmp_path / "text").read_text()) == (content, "precious")


def test_paths_that_are_wrong_are_no_first_start(table, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    for path in ("loop", "dangling", "no/i", "t.safetensors/x"):
        with pytest.raises(StorageError):
            restored(table, tmp_path / path)


@pytest.mark.parametrize("at", range(6))
def test_an_interrupt_leaves_no_slot_pinned(table, image, monkeypatch, at):
    """It comes when the lock is taken or let go, or while slots are copied."""
    with restored(table, image) as store:
        moments = itertools.count()

        def moment():
            if next(moments) == at:
                raise KeyboardInterrupt

        class Lock:
            def __enter__(self):
                moment()
                store._flights.lock.acquire()

            def __exit__(self, *_):
                store._flights.lock.release()
                moment()

        real = store._device.read_slots
        store._device.read_slots = lambda slots: (moment(), real(slots))[1]
        with pytest.raises(KeyboardInterrupt):
            warm.save(image, store._tiers, store._about("save"), store._stride, Lock(), store._flights.require_open)
        store.check()
        assert store.save(image) == 330


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


def on_streams(table, device, capacity=30, **storage):
    settings = {"device": "cpu", "capacity": 272 * capacity}
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


def save_on_streams(table, path, **storage):
    """An image whose device part has rows 0 to 19."""
    device = FakeDevice(lambda n: 0)
    with on_streams(table, device, **storage) as store:
        for _ in range(3):
            store.fetch(range(20))
        device.run_all()
        store.save(path)


@pytest.mark.parametrize("capacity", [30, 7])
def test_a_direct_load_is_verified(table, tmp_path, capacity):
    save_on_streams(table, tmp_path / "i")
    with open_image(tmp_path / "i", about_tables({"file": open_table("file", table)}), 264) as parts:
        offset = parts["device"].offset
    with on_streams(table, FakeDevice(lambda n: 0), capacity) as store:
        assert store._restore(tmp_path / "i", NUM_ROWS) == ("loaded by a fake",)
        assert store.stats().device.used_slots == min(capacity, 20)
    with open(tmp_path / "i", "r+b") as file:
        file.seek(offset + 272 * 19 + 5)
        file.write(b"\x00\x01")
    damaged = pytest.raises(FormatError, match="damaged: the checksum of slots 0 to 19 is wrong")
    with on_streams(table, FakeDevice(lambda n: 0), capacity) as store, damaged:
        store._restore(tmp_path / "i", NUM_ROWS)


def test_a_device_that_reads_something_else(table, tmp_path):
    save_on_streams(table, tmp_path / "i")
    for capacity, message in ((30, "the checksum of slots"), (7, "what the device read of it is not what the host reads")):
        device = FakeDevice(lambda n: 0)
        device.load = lambda file, offset, target: ()
        with on_streams(table, device, capacity) as store, pytest.raises(FormatError, match=message):
            store._restore(tmp_path / "i", NUM_ROWS)


def test_launches_of_a_static_fetch_that_is_closed(table):
    with on_streams(table, FakeDevice(lambda n: 0)) as store:
        static = store.static_fetch([2])
        static.load([1, 2])
        static.launch()
        static.close()
        with pytest.raises(ClosedError, match="the static fetch, or its store, is closed"):
            static.launch()
        for shape, error in ((5, TypeError), ((2.0,), TypeError), ((-1,), ValueError)):
            with pytest.raises(error, match="shape = "):
                store.static_fetch(shape)


def test_an_open_that_fails_lets_go_of_everything(table, image):
    image.write_bytes(image.read_bytes()[:-1])
    with pytest.raises(FormatError):
        restored(table, image)
    assert not store_threads()
    assert descriptors_of(table) == descriptors_of(image) == 0
