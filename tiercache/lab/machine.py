"""What a machine takes for a fetch: figures that `measure` finds, and that a file keeps for later or for another machine.

    about         where the figures come from, to be read
    record_bytes  of the rows that were fetched
    device        the device tier that the store had, as in a config: "cuda", "cpu", or "" for none
    [resident]    a fetch of so many rows that the top tier has
    [below]       what rows add that the host tier has and the device tier has not: with a device tier only
    [disk]        what rows add that no tier has
"""

import os
import tomllib
import unicodedata
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tiercache.errors import ConfigError

_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Counts = Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _require_curve(name: str, counts: tuple[float, ...], seconds: tuple[float, ...]) -> None:
    if len(counts) != len(seconds):
        raise ValueError(f"{len(counts)} {name} and {len(seconds)} seconds; allowed are as many of one as of the other")
    if any(after <= before for before, after in pairwise(counts)):
        raise ValueError(f"{name} = {list(counts)}: allowed are ascending ones")
    if not all(isfinite(each) and each > 0 for each in seconds):
        raise ValueError(f"seconds = {list(seconds)}: allowed are numbers above 0")


def _explain(problem: Any) -> str:
    """One refused figure: field, value, what is allowed."""
    where = ".".join(str(part) for part in problem["loc"]) or "figures"
    if problem["type"] == "missing":
        return f"{where}: is required"
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown"
    given = f" = {problem['input']!r}" if isinstance(problem["input"], int | float | str) else ""
    return f"{where}{given}: {problem['msg'].removeprefix('Value error, ')}"


class Resident(_Section):
    """Seconds of a fetch of so many rows, all of them in the top tier: straight lines between the points."""

    rows: _Counts
    seconds: tuple[float, ...]

    @model_validator(mode="after")
    def _curve(self) -> Self:
        _require_curve("rows", self.rows, self.seconds)
        return self


class Below(_Section):
    """What a fetch takes more for rows that the host tier has and the device tier has not; they rise."""

    call_seconds: _Seconds
    """Once, where there are such rows."""
    row_seconds: _Seconds
    """For each."""


class DiskFigures(_Section):
    """What a fetch takes more for rows that no tier has.

    reads, seconds: so many reads at once, waited for; straight lines between the points, from nothing for no reads.
    """

    row_seconds: _Seconds
    """Planning a row, before its read begins."""
    reads: _Counts
    seconds: tuple[float, ...]
    read_bytes: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Bytes of each of these reads."""
    byte_seconds: _Seconds
    """Each byte more of a longer read."""
    alignment: Annotated[int, Field(ge=1)] = 512
    """Bytes that offsets and lengths of reads are multiples of: a power of two, up to 1 MiB."""
    engine: str = ""

    @field_validator("alignment")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value > 1 << 20 or value & (value - 1):
            raise ValueError("allowed are powers of two up to 1048576")
        return value

    @model_validator(mode="after")
    def _curve(self) -> Self:
        _require_curve("reads", self.reads, self.seconds)
        return self


class Machine(_Section):
    """All figures."""

    about: str = ""
    record_bytes: Annotated[int, Field(ge=1)]
    device: str = ""
    resident: Resident
    below: Below | None = None
    disk: DiskFigures

    @field_validator("about")
    @classmethod
    def _one_line(cls, value: str) -> str:
        if any(unicodedata.category(character) == "Cc" for character in value):
            raise ValueError("allowed is text without control characters")
        return value

    @model_validator(mode="after")
    def _below_a_device(self) -> Self:
        if (self.below is None) != (not self.device):
            raise ValueError("[below] belongs to figures of a device tier, and those need it")
        return self

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """From a TOML file. ConfigError where it cannot be read, or names the field, its value and what is allowed."""
        try:
            return cls.model_validate(tomllib.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(f"{path}: cannot read the figures: {error.strerror}") from error
        except ValidationError as error:
            raise ConfigError(f"{path}: {'; '.join(_explain(problem) for problem in error.errors())}") from None
        except ValueError as error:
            raise ConfigError(f"{path}: not TOML: {error}") from error
