"""Startup: what importing costs, and how long a new process takes to its first rows.

Each sample is a process of its own. The very first one compiles everything, into a cache that begins empty; those after
it find the compiled code there.
"""

import json
import os
import subprocess
import sys
import tempfile
from statistics import median

from _common import Figure, bench_table, console, parser, report

_IMPORT = """
import time, torch, numba
begin = time.perf_counter()
import tiercache
print(time.perf_counter() - begin)
"""
_FETCH = """
import json, sys, time
from tiercache import Store
import torch
rows = torch.arange(0, 4800, 100)
begin = time.perf_counter()
store = Store.open({"table": [{"path": sys.argv[1]}], "host": {"capacity": 1 << 28}})
opened = time.perf_counter()
store.fetch(rows)
first = time.perf_counter()
store.fetch(rows + 1)
second = time.perf_counter()
store.close()
print(json.dumps([opened - begin, first - opened, first - begin, second - first]))
"""


def main() -> None:
    """Measure and report."""
    options = parser(__doc__)
    options.set_defaults(size=1 / 16)
    options.add_argument("--runs", type=int, default=7, help="processes of each kind (%(default)s)")
    arguments = options.parse_args()
    table = bench_table(arguments.dir, int(arguments.size * 2**30))
    with tempfile.TemporaryDirectory() as empty, console.status("Starting processes"):
        path = str(table.path)
        _run(_IMPORT, path, empty)  # writes the .pyc files
        imports = [float(_run(_IMPORT, path, empty)) for _ in range(arguments.runs)]
        very_first = json.loads(_run(_FETCH, path, empty))
        later = [json.loads(_run(_FETCH, path, empty)) for _ in range(arguments.runs)]
    opened, fetched, both, second = (median(run[part] for run in later) for part in range(4))
    figures = [
        Figure("import tiercache, after torch and numba", median(imports), "s", at_most=0.5),
        Figure("later process: Store.open", opened, "s"),
        Figure("later process: first fetch", fetched, "s", at_most=1.0),
        Figure("later process: Store.open and first fetch", both, "s", at_most=1.0),
        Figure("later process: second fetch", 1e3 * second, "ms"),
        Figure("very first process: Store.open, compiling", very_first[0], "s"),
        Figure("very first process: first fetch, compiling", very_first[1], "s"),
    ]
    report("startup", "Startup: a new process, 48 rows", figures, arguments)


def _run(code: str, path: str, cache: str) -> str:
    """What a new process prints."""
    environment = os.environ | {"NUMBA_CACHE_DIR": cache}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run([sys.executable, "-c", code, path], check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return done.stdout


if __name__ == "__main__":
    main()
