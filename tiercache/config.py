"""The configuration of a store: every setting with its default, unit and reason. Nothing below `store` reads it.

The first six settings say what a store does, the two sections how fast. `StoreConfig.load` takes a TOML file or a
mapping of the same shape; whatever it refuses is a ConfigError that names the field, the value and what is allowed.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tiercache.errors import ConfigError

PolicyName = Literal["fifo", "lru", "lfu", "sieve", "s3fifo", "arc", "gittins", "wtinylfu", "static"]

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{kind}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for kind, base in (("iB", 1024), ("B", 1000))
}
_CAPACITY = re.compile(rf"\s*(\d+(?:\.\d+)?)\s*({'|'.join(sorted(_UNITS, reverse=True))})\s*")


def parse_bytes(value: object) -> int:
    """Bytes of "64MiB", "1.5GiB", "8GB" or a plain int. ValueError for anything else and for less than one byte."""
    if isinstance(value, np.generic):
        value = value.item()
    match = _CAPACITY.fullmatch(value) if isinstance(value, str) else None
    if match:
        value = int(Fraction(match[1]) * _UNITS[match[2]])
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 63:
        raise ValueError('allowed are a number of bytes above zero, as an integer or like "64MiB", "1.5GiB", "8GB"')
    return value


def _number(value: object) -> int | float:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("allowed is a number")
    return value


def _group_rows(value: int) -> int:
    if value not in (1, 2, 4, 8, 16):
        raise ValueError("allowed are 1, 2, 4, 8 and 16")
    return value


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


def _beside_the_config(path: Path, info: ValidationInfo) -> Path:
    base: Path = (info.context or {}).get("base", Path())
    if "\0" in str(path):
        raise ValueError("allowed is a path without a zero byte")
    try:
        return base / path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"allowed is a path that begins with ~ only where there is such a home: {error}") from error


_Path = Annotated[Path, AfterValidator(_beside_the_config)]


class TableConfig(_Section):
    """One table: rows of one layout."""

    name: Annotated[str, Field(min_length=1)] = "table"
    """What `fetch(table=...)` calls it; distinct within a store."""
    path: _Path
    """A .safetensors file, a .safetensors.index.json or a packed directory. Relative paths start at the config file."""
    fields: tuple[str, ...] = ()
    """Safetensors only: the tensors that make up a row, in this order. In the name of a tensor in pieces, "{shard}"
    stands for the number of the piece. Default: the only 2-D tensor there is."""
    resident: tuple[str, ...] = ()
    """Fields held in RAM whole, beside the host tier: a small field in its own tensor costs a second read a row."""


class TierConfig(_Section):
    """What every tier has."""

    capacity: Annotated[int, BeforeValidator(parse_bytes)] = 1 << 30
    """Bytes for records (bookkeeping comes on top). 1 GiB hurts no machine that runs a model; more is better."""
    policy: PolicyName = "gittins"
    """What stays. gittins keeps most of long n-gram text, also in a tier that one batch fills, and takes no parameter. In a
    tier that holds a fifth and more of all that is ever asked for, arc keeps some tenths of a point more; s3fifo costs a hit a
    few ns less."""
    policy_options: dict[str, Annotated[int | float, BeforeValidator(_number)]] = {}
    """Parameters of the policy by name; each policy's file says which it takes."""
    hot_set: _Path | None = None
    """.npy of row numbers of the store, hottest first, such as `Store.save_hot_set` writes. The tier begins with as many of
    them as it has room for, read at open, unless an image is restored to it. The policy "static" needs one: it keeps these
    rows and no others, each from its first use on."""

    @model_validator(mode="after")
    def _static_has_a_hot_set(self) -> Self:
        if self.policy == "static" and self.hot_set is None:
            raise ValueError('policy "static" needs a hot_set')
        return self


class HostConfig(TierConfig):
    """The tier in host memory."""


class DeviceConfig(TierConfig):
    """The tier above it, in the memory of a device. Rows rise into it when they are used again."""

    device: str = "cuda"
    """A torch device, "cuda" or "cuda:1". "cpu" is a second buffer in host memory: for tests of three tiers."""
    promotion: Annotated[int, BeforeValidator(parse_bytes)] = 4 << 20
    """Bytes that rise in one fetch at most, so that a step's copies take a known share of the bus: 4 MiB take 0.2 ms of
    PCIe 4."""


class StorageConfig(_Section):
    """How the disk is read."""

    engine: Literal["auto", "uring", "threads", "gds"] = "auto"
    """auto: uring, unless a short measurement at open shows threads to be faster by a quarter, or the kernel refuses it.
    gds: kvikio, of the gpu extras; never chosen by auto, since a row costs it about ten times the CPU."""
    queue_depth: Annotated[int, Field(strict=True, ge=1, le=4096)] = 128
    """Reads in flight at once. NVMe drives need 64 or more for their full rate; beyond 256 only latency grows."""
    direct: Annotated[bool, Field(strict=True)] = True
    """O_DIRECT: the tier is the cache, so the page cache would hold every row a second time."""
    verify: Literal["off", "page"] = "off"
    """page: compare the checksum of every page read (packed tables). Costs about 1 us a page and reads whole pages."""


class TraceConfig(_Section):
    """Recording of what is asked for, for `tiercache replay`."""

    path: _Path
    """The file. One that is there and of the same tables is continued. It takes 3 to 4 bytes a row."""


class StoreConfig(_Section):
    """A whole store."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What `fetch` returns. auto: the table's own dtype, bfloat16 for fp8."""
    mode: Literal["r"] = "r"
    """Read-only; the one mode there is."""
    group_rows: Annotated[int, Field(strict=True), AfterValidator(_group_rows)] = 1
    """Rows that are always asked for together, as the heads of one n-gram, and that the tiers then keep together: one probe
    and one copy for all of them. `fetch` takes whole groups, each with its rows in one order. 1: every row by itself."""
    restore: _Path | None = None
    """An image that `Store.save` wrote: the tiers begin with what they held. Where nothing is there yet they begin empty."""
    tables: tuple[TableConfig, ...] = Field((), alias="table")
    """Tables on disk. They share the tiers."""
    device: DeviceConfig | None = None
    """Absent: no device tier, and rows are served on the CPU."""
    host: HostConfig = HostConfig()
    storage: StorageConfig = StorageConfig()
    trace: TraceConfig | None = None
    """Absent: nothing is recorded."""

    @field_validator("tables")
    @classmethod
    def _distinct_names(cls, tables: tuple[TableConfig, ...]) -> tuple[TableConfig, ...]:
        names = [table.name for table in tables]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"each table needs a name of its own; given more than once: {', '.join(twice)}")
        return tables

    @classmethod
    def load(cls, source: str | os.PathLike[str] | Mapping[str, Any] | Self) -> Self:
        """From a TOML file, a mapping or a config. Relative table paths start at the file's directory. ConfigError."""
        if isinstance(source, cls):
            return source
        if not isinstance(source, str | os.PathLike | Mapping):
            raise ConfigError(f"config = {source!r}: allowed are the path of a TOML file, a mapping and a StoreConfig")
        base, data = (Path(), source) if isinstance(source, Mapping) else _read_toml(Path(source))
        try:
            return cls.model_validate(dict(data), context={"base": base})
        except ValidationError as error:
            raise ConfigError("; ".join(_explain(problem) for problem in error.errors())) from None


_SECTIONS: dict[str, Any] = {
    "table": TableConfig,
    "tables": TableConfig,
    "device": DeviceConfig,
    "host": HostConfig,
    "storage": StorageConfig,
    "trace": TraceConfig,
}
_HINTS = {"mode": "this release only reads; "}
_SHAPES = {
    "tuple_type": "allowed is a list of names",
    "dict_type": "allowed is a section of settings by name",
    "model_type": "allowed is a section of settings by name",
    "string_type": "allowed is text",
    "path_type": "allowed is a path",
}
_TABLES = "allowed is a list of sections, each of which a TOML file begins with [[table]]"


def _read_toml(path: Path) -> tuple[Path, dict[str, Any]]:
    try:
        return path.parent, tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error


def _explain(problem: Any) -> str:
    """One refused setting: field, value, what is allowed."""
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{where}: is required"
    message = _SHAPES.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    if problem["type"] == "tuple_type" and where in ("table", "tables"):
        message = _TABLES
    if problem["type"] == "extra_forbidden":
        section = _SECTIONS[problem["loc"][0]] if len(problem["loc"]) > 1 else StoreConfig
        message = (
            f"unknown; allowed are {', '.join(field.alias or name for name, field in section.model_fields.items())}"
        )
    return f"{where} = {problem['input']!r}: {_HINTS.get(where, '')}{message}"
