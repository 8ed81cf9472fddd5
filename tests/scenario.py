"""A small run of everything: tables of all kinds, both engines, prefetches, faults. Run as a script: prints what came of it.

Prints a digest of every byte served, and the counts, as JSON; `python scenario.py EMPTY_DIRECTORY`.
"""

import errno
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from stores import ENGRAM, config_of, write_engram, write_shards

from tiercache.errors import StorageError
from tiercache.recording.reader import Recording
from tiercache.storage.memory import MemoryTable
from tiercache.storage.pack import pack_rows
from tiercache.store import Store
from tiercache.testing import FaultySource, broken, oracle


def attempt(failures, call, *arguments, **options):
    """What a call returns; None where a read failed, which is noted."""
    try:
        return call(*arguments, **options)
    except StorageError as error:
        failures.append(error.errno)
        return None


def run(directory, engine, direct, policy, group_rows=1):
    """Digest and counts of one store; bytes are compared with the oracle on the way."""
    records = oracle(np.arange(90), 264)
    config = config_of(capacity=12 * 264 * group_rows, engine=engine, direct=direct, policy=policy, verify="off")
    config["group_rows"] = group_rows
    config["table"] = [
        {"name": "shards", "path": directory / "model.safetensors.index.json", "fields": ["rows.{shard}"]},
        {"name": "fields", "path": directory / "engram.safetensors", "fields": ["weight", "scale"]},
        {"name": "resident", "path": directory / "engram.safetensors", "fields": ["weight", "scale"], "resident": ["scale"]},
        {"name": "packed", "path": directory / "packed"},
    ]
    faulty = FaultySource(MemoryTable(records, ENGRAM), errors=dict.fromkeys(range(0, 90, 9), errno.EIO))
    digest, failures = hashlib.sha256(), []
    random = np.random.default_rng(1)
    path = directory / f"{engine}-{direct}-{policy}-{group_rows}.trace"
    with Store.open(config, tables={"memory": records, "faulty": faulty}) as store, store.record(path) as recording:
        for number in range(24):
            table = store.tables[number % len(store.tables)]
            rows = random.integers(0, 90, group_rows * int(random.integers(0, 20)))
            ticket = store.prefetch(rows[::-1].copy(), table=table, deadline=float(random.random()))
            served = attempt(failures, store.fetch, rows, table=table, raw=True)
            ahead = attempt(failures, ticket.take, raw=True)
            if served is None or ahead is None:  # both have ended, so what the next batch finds hangs on no thread
                continue
            assert np.array_equal(ahead.numpy(), records[rows][::-1])
            assert np.array_equal(served.numpy(), records[rows])
            digest.update(served.numpy().tobytes())
            digest.update(store.fetch(rows[: 3 * group_rows], table=table).float().numpy().tobytes())
        with broken(directory / "0.safetensors"):
            for row in range(3):
                try:
                    store.fetch(np.resize([row, 80], 2 * group_rows), table="shards")
                except StorageError as error:
                    failures.append(error.errno)
        digest.update(store.fetch(range(90 // group_rows * group_rows), table="shards").numpy().tobytes())
        store.check()
        stats = store.stats()
    recorded = list(Recording(path).batches())
    assert len(recorded) == recording.stats().batches > 30
    for name, rows in recorded:
        digest.update(name.encode() + rows.tobytes())
    counts = [stats.host.hits, stats.host.misses, stats.host.bypasses, stats.fetches, stats.rows]
    return [digest.hexdigest(), counts, failures]


def verified(directory):
    """Digest of rows whose pages are checked."""
    config = config_of(directory / "packed", capacity=264 * 5, verify="page")
    with Store.open(config) as store:
        return hashlib.sha256(store.fetch([0, 5, 17], raw=True).numpy().tobytes()).hexdigest()


def main(directory):
    records = oracle(np.arange(90), 264)
    write_shards(directory, records, 3)
    write_engram(directory / "engram.safetensors", records)
    pack_rows(MemoryTable(records, ENGRAM), directory / "packed")
    results = {"verified": verified(directory)}
    for engine, direct, policy in [("uring", True, "s3fifo"), ("threads", False, "wtinylfu"), ("uring", False, "sieve")]:
        results[f"{engine} {direct} {policy}"] = run(directory, engine, direct, policy)
    results["groups"] = run(directory, "threads", True, "lru", group_rows=8)
    return results


if __name__ == "__main__":
    json.dump(main(Path(sys.argv[1])), sys.stdout)
