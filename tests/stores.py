"""Stores for tests: tables on disk whose bytes are the oracle's, and small configs."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from tiercache.config import DeviceConfig, StoreConfig
from tiercache.records import Field, Record
from tiercache.storage import open_table
from tiercache.storage.memory import MemoryTable
from tiercache.storage.threads import ThreadsEngine
from tiercache.storage.uring import UringEngine
from tiercache.store import Store
from tiercache.testing import oracle

ENGRAM = Record((Field("weight", "F8_E4M3", 256), Field("scale", "F8_E8M0", 8)))
KINDS = {"uring": UringEngine, "threads": ThreadsEngine}
ENGINES = tuple(KINDS)


def write_rows(path: Path, num_rows: int, num_bytes: int, first_row: int = 0) -> Path:
    """A safetensors file of one U8 tensor, whose rows are the oracle's from `first_row` on."""
    save_file({"rows": torch.from_numpy(oracle(np.arange(first_row, first_row + num_rows), num_bytes))}, path)
    return path


def write_shards(directory: Path, records: np.ndarray, num_shards: int) -> Path:
    """The index of as many files with consecutive rows: uint8[num_rows, n]."""
    weight_map = {}
    for number, part in enumerate(np.array_split(records, num_shards)):
        save_file({f"rows.{number}": torch.from_numpy(part.copy())}, directory / f"{number}.safetensors")
        weight_map[f"rows.{number}"] = f"{number}.safetensors"
    index = directory / "model.safetensors.index.json"
    index.write_text(f'{{"weight_map": {weight_map}}}'.replace("'", '"'))
    return index


def write_engram(path: Path, records: np.ndarray) -> Path:
    """Weights and scales of uint8[num_rows, 264] in two tensors."""
    weight, scale = (torch.from_numpy(part.copy()) for part in (records[:, :256], records[:, 256:]))
    save_file({"weight": weight.view(torch.float8_e4m3fn), "scale": scale.view(torch.float8_e8m0fnu)}, path)
    return path


def config_of(path=None, *, capacity=1 << 20, policy="s3fifo", engine="threads", **storage):
    """A config of at most one table, "file"."""
    return {
        "table": [{"name": "file", "path": path}] if path else [],
        "host": {"capacity": capacity, "policy": policy},
        "storage": {"engine": engine, "queue_depth": 8, **storage},
    }


def open_with(policy, options, capacity_bytes, paths, sources, *, device=None, group_rows=1, **storage):
    """A store under any policy, with parameters that a config cannot give.

    device: None, or (policy, options, config of the device tier, Device or None).
    """
    config = StoreConfig.load(config_of(capacity=capacity_bytes, **storage) | {"group_rows": group_rows})
    update = {"host": config.host.model_copy(update={"policy": policy})}
    options, on = {"host": options}, None
    if device is not None:
        device_policy, options["device"], settings, on = device
        update["device"] = DeviceConfig(**settings).model_copy(update={"policy": device_policy})
    config = config.model_copy(update=update)
    described = {name: open_table(name, path) for name, path in paths.items()}
    described |= {name: MemoryTable(s) if isinstance(s, np.ndarray) else s for name, s in sources.items()}
    return Store(config, described, options, on)


class StoreSource:
    """A store's only table as a Source."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.num_rows = store.num_rows()
        self.record = store._table(None).record

    def read(self, rows, out):
        self.store.fetch(rows, out=torch.from_numpy(out), raw=True)

    def close(self):
        self.store.check()
        self.store.close()


def oracle_tensor(rows, num_bytes):
    """The oracle's rows as a tensor."""
    return torch.from_numpy(oracle(rows, num_bytes))


def is_exact(store, rows, table=None):
    """Whether a store of 264-byte rows serves the oracle's."""
    return torch.equal(store.fetch(rows, table=table, raw=True), oracle_tensor(rows, 264))


def store_threads():
    """Threads that belong to stores."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("tiercache-")]


def descriptors_of(path):
    """How many descriptors this process has of a file."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            count += os.path.samefile(f"/proc/self/fd/{name}", path)
        except OSError:
            continue
    return count


def in_process(code, *arguments):
    """Run a program of its own; what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
