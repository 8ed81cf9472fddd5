"""The gds engine: what it needs and says where that is missing; its contract, run over a driver in a process of its own.

A process of its own, since the stub driver that stands in for a missing one would stay loaded, and later tests would find a
driver that the machine does not have. The stub is found as a driver is: by name, along the library path of that process.
"""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stores import write_rows

_TESTS = Path(__file__).parent


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.fixture
def kvikio() -> None:
    if importlib.util.find_spec("kvikio") is None:
        pytest.skip("kvikio is not installed: pip install --no-deps -r requirements-gds.txt")


@pytest.fixture
def driver(tmp_path, kvikio) -> dict[str, str]:
    """The environment of a process that has a driver: the machine's own, or the stub."""
    if _has_driver():
        return dict(os.environ)
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("this machine has neither a CUDA driver nor a C compiler to build the stub")
    stub = tmp_path / "driver" / "libcuda.so.1"
    stub.parent.mkdir()
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(stub), str(_TESTS / "libcuda_stub.c")]
    subprocess.run(command, check=True, timeout=60)
    paths = [str(stub.parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(paths)}


@pytest.fixture
def file(tmp_path) -> Path:
    return write_rows(tmp_path / "t.safetensors", 500, 264)


def in_process(code, *arguments, environment=None):
    """Run a program of its own; what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        cwd=_TESTS,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.timeout(230)
def test_the_contract_over_a_driver(driver, tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", _TESTS.parent / "pyproject.toml"]
    command += ["--basetemp", tmp_path / "child", _TESTS / "gds_contract.py"]
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=driver, capture_output=True, text=True, timeout=220, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "cufile.log").exists()


def test_a_process_that_ends_with_an_open_store(driver, file):
    code = """
import sys, warnings
from stores import config_of
from tiercache.store import Store
warnings.simplefilter("ignore", RuntimeWarning)
store = Store.open(config_of(sys.argv[1], engine="gds"))
tickets = [store.prefetch(range(500), deadline=60) for _ in range(3)]
print("end")
"""
    assert in_process(code, file, environment=driver) == "end\n"


REFUSED = """
import os, sys
import numpy as np
from stores import config_of, descriptors_of, store_threads
from tiercache.errors import ConfigError
from tiercache.storage.gds import load
from tiercache.store import Store
for call in (lambda: Store.open(config_of(sys.argv[1], engine="gds")), lambda: load(sys.argv[1], 0, 9, np.zeros(9, np.uint8))):
    try:
        call()
    except ConfigError as error:
        print(error)
assert descriptors_of(sys.argv[1]) == 0
assert not store_threads()
"""


def test_without_kvikio(file):
    blocked = "import sys\nsys.modules['kvikio'] = None\n"
    lines = in_process(blocked + REFUSED, file).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("storage.engine = 'gds': needs the [gpu] extra (kvikio): ") for line in lines)


def test_without_a_driver(file, kvikio):
    if _has_driver():
        pytest.skip("this machine has a CUDA driver")
    lines = in_process(REFUSED, file).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("storage.engine = 'gds': needs the CUDA driver") and "libcuda.so.1" in line for line in lines)


def test_a_driver_that_does_not_tell_its_version(file, tmp_path, kvikio):
    """kvikio itself would wait forever."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("this machine has no C compiler to build the stub")
    (tmp_path / "driver.c").write_text("int cuDriverGetVersion(int *version) { *version = 0; return 3; }\n")
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1", "driver.c"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    lines = in_process(REFUSED, file, environment=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}).splitlines()
    assert len(lines) == 2
    assert all("cuDriverGetVersion fails with 3" in line for line in lines)


@pytest.mark.parametrize("engine", ["auto", "uring", "threads"])
def test_other_engines_load_neither_kvikio_nor_cupy(file, engine):
    code = """
import sys
from stores import config_of, is_exact
from tiercache.store import Store
with Store.open(config_of(sys.argv[1], engine=sys.argv[2])) as store:
    assert is_exact(store, [3, 499, 3])
print([name for name in sys.modules if name.partition(".")[0] in ("cupy", "kvikio", "libkvikio")])
"""
    assert in_process(code, file, engine) == "[]\n"
