"""Kernels: the compiler's report on the device tier's Triton kernels, for GPUs that need not be there.

Each kernel is launched as the tier launches it, but on a stand-in for the GPU's driver: Triton compiles it, and nothing runs.
Loads and stores are those of global memory in the machine code, which moves two to four vectors of a record per thread.
"""

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from _common import parser, tabulate
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from tiercache.records import Field, Record, plain
from tiercache.tiers import kernels

CAPABILITIES = (80, 90, 100)

_BLOCKS = Record((Field("weight", "F8_E4M3", 256), Field("scale", "F8_E8M0", 8)))
_SCALED = Record((Field("weight", "F8_E4M3", 256),), 0.5)
_PLAIN = plain("BF16", 160)
_TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_COLUMNS = ("kernel", "cc", "registers", "spills", "local", "loads", "stores", "instructions")


class Report(NamedTuple):
    """What the compiler made of one kernel."""

    kernel: str
    capability: int
    registers: int
    spills: int  # accesses to local memory
    local_bytes: int  # local memory and stack of a thread
    loads: dict[int, int]  # accesses to global memory in the code of one thread: how many of so many bytes
    stores: dict[int, int]
    instructions: int
    flushes: bool  # whether subnormal numbers are flushed anywhere

    def cells(self) -> tuple[str, ...]:
        """The line as text."""
        memory = f"{self.local_bytes} B", _widths(self.loads), _widths(self.stores)
        return self.kernel, f"{self.capability}", f"{self.registers}", f"{self.spills}", *memory, f"{self.instructions}"


def main() -> None:
    """Compile and report."""
    options = parser(__doc__, directory=False)
    options.add_argument("--json", action="store_true", help="print the reports as JSON instead")
    arguments = options.parse_args()
    reports = [each for capability in CAPABILITIES for each in compiled(capability)]
    if arguments.json:
        print(json.dumps([each._asdict() for each in reports]))
    else:
        tabulate("kernels", "Kernels: the compiler's report", _COLUMNS, [each.cells() for each in reports], arguments)


def launches() -> dict[str, Callable[[], None]]:
    """Each kernel that is reported, and a launch of it."""
    bfloat16, float32, raw = torch.bfloat16, torch.float32, torch.uint8
    places = torch.zeros(9, dtype=torch.int32)
    return {
        "gather, 264 B of fp8 and scales to bf16": partial(_gather, _BLOCKS, bfloat16),
        "gather, 264 B, raw": partial(_gather, _BLOCKS, raw),
        "gather, 256 B of fp8 to bf16": partial(_gather, _SCALED, bfloat16),
        "gather, 160 bf16": partial(_gather, _PLAIN, bfloat16),
        "gather, 160 bf16 to f32": partial(_gather, _PLAIN, float32),
        "fill, 272 B": partial(kernels.fill, places, places, _slots(272), _slots(272)),
    }


def compiled(capability: int) -> Iterator[Report]:
    """Reports of all launches for GPUs of one compute capability, such as 90."""
    stand_in = _StandIn(capability)
    driver.set_active(stand_in)
    for name, launch in launches().items():
        launch()
        yield _read(name, capability, stand_in.binaries.pop())


class _StandIn:
    """What Triton asks of a GPU's driver to compile and launch. Keeps what was compiled, and launches nothing."""

    def __init__(self, capability: int) -> None:
        self.binaries: list[bytes] = []
        self.utils = self
        self._capability = capability

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 16}

    def load_binary(self, name: str, binary: bytes, *_: Any) -> tuple[Any, ...]:
        self.binaries.append(binary)
        return None, None, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *_: None


def _read(name: str, capability: int, binary: bytes) -> Report:
    """What a binary's machine code and resource table say."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage, code = (
            subprocess.run([_TOOL, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    used = {what: int(number) for what, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = [each for each in _INSTRUCTION.findall(code) if each != "NOP"]
    kinds = Counter(each.split(".")[0] for each in instructions)
    return Report(
        kernel=name,
        capability=capability,
        registers=used["REG"],
        spills=kinds["LDL"] + kinds["STL"],
        local_bytes=used["STACK"] + used["LOCAL"],
        loads=_count(instructions, ("LDG", "LD")),
        stores=_count(instructions, ("STG", "ST")),
        instructions=len(instructions),
        flushes=any(".FTZ" in each for each in instructions),
    )


def _count(instructions: list[str], names: tuple[str, ...]) -> dict[int, int]:
    """How many of these accesses there are of each width in bytes, widest first."""
    widths = Counter(_width(each.split(".")[1:]) for each in instructions if each.split(".")[0] in names)
    return dict(sorted(widths.items(), reverse=True))


def _width(modifiers: list[str]) -> int:
    """Bytes of an access, which are 4 unless a modifier such as U8 or 128 says otherwise."""
    sizes = (re.fullmatch(r"[US]?(8|16|64|128|256)", each) for each in modifiers)
    return next((int(size[1]) // 8 for size in sizes if size), 4)


def _widths(counts: dict[int, int]) -> str:
    return ", ".join(f"{count} x {width} B" for width, count in counts.items())


def _gather(record: Record, dtype: torch.dtype) -> None:
    """Launch of a gather of a few records."""
    slots = _slots(-(-record.record_bytes // 16) * 16)
    out = torch.empty((9, record.record_bytes if dtype == torch.uint8 else record.dim), dtype=dtype)
    kernels.gather(torch.zeros(9, dtype=torch.int32), slots, slots, slots, out, record)


def _slots(stride: int) -> torch.Tensor:
    return torch.zeros((4, stride), dtype=torch.uint8)


if __name__ == "__main__":
    main()
