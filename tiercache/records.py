"""Record: the bytes of one row, as fields that lie one behind the other, and what they mean as numbers.

A record is one of four kinds:

    one plain field                    BF16, F16, F32, U8 or I8: the row as it is
    one F8_E4M3 field                  the row as it is, or times one scale for the whole table
    F8_E4M3 values, F8_E8M0 scales     each scale belongs to a block of `width // num_scales` neighbouring values

Dtype names are those of safetensors. `Record.decode` is the reference: every faster path must give the same bits.
"""

import operator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from tiercache.errors import FormatError

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""Every dtype that a field can have."""

_DECODED = {"F8_E4M3": torch.bfloat16} | {name: DTYPES[name] for name in ("BF16", "F16", "F32", "I8", "U8")}


class Field(NamedTuple):
    """One tensor's share of a record."""

    name: str
    dtype: str  # a key of DTYPES
    width: int  # elements per row

    @property
    def nbytes(self) -> int:
        """Bytes of this field in one record."""
        return self.width * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Record:
    """Layout and meaning of the bytes of one row. FormatError where the fields make no kind of record."""

    fields: tuple[Field, ...]
    scale: float | None = None  # multiplies every value of an F8_E4M3 row; float32 value

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", tuple(field._replace(width=_count(field)) for field in self.fields))
        for field in self.fields:
            if field.dtype not in DTYPES:
                raise FormatError(f"field {field.name!r} is {field.dtype}; supported are {', '.join(DTYPES)}")
            if field.width < 1:
                raise FormatError(f"field {field.name!r} has {field.width} elements per row; at least 1 is needed")
        kinds = sorted(field.dtype for field in self.fields)
        blocks = kinds == ["F8_E4M3", "F8_E8M0"]
        if not blocks and (len(kinds) != 1 or kinds == ["F8_E8M0"]):
            described = ", ".join(f"{field.name!r} {field.dtype}" for field in self.fields) or "no fields"
            raise FormatError(
                f"{described}: a record is one field of {', '.join(_DECODED)}, or F8_E4M3 values with F8_E8M0 scales"
            )
        if self.scale is not None and kinds != ["F8_E4M3"]:
            raise FormatError(f"a global scale belongs to one F8_E4M3 field, not to {', '.join(kinds)}")
        if blocks and self.dim % (num_blocks := self.fields[1 - self.values].width):
            raise FormatError(f"{self.dim} values per row cannot be cut into {num_blocks} blocks")

    @cached_property
    def values(self) -> int:
        """Place of the field that holds the values."""
        return next(place for place, field in enumerate(self.fields) if field.dtype != "F8_E8M0")

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Byte in the record at which each field begins."""
        return tuple(sum(field.nbytes for field in self.fields[:place]) for place in range(len(self.fields)))

    @cached_property
    def record_bytes(self) -> int:
        """Bytes of one record."""
        return sum(field.nbytes for field in self.fields)

    @property
    def dim(self) -> int:
        """Values in a decoded row."""
        return self.fields[self.values].width

    @property
    def default_dtype(self) -> torch.dtype:
        """The values' own dtype; bfloat16 for fp8."""
        return _DECODED[self.fields[self.values].dtype]

    def decode(self, raw: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows as numbers. raw: uint8[n, record_bytes]; returns dtype[n, dim] in new memory. None: `default_dtype`.

        Scaled rows are multiplied in float32 and rounded to `dtype` once. Scale byte 0 means 2^-127, 255 means NaN.
        """
        dtype = self.default_dtype if dtype is None else dtype
        values = self.part(raw, self.values)
        if len(self.fields) == 2:
            scales = self.part(raw, 1 - self.values).float()
            return (values.float() * scales.repeat_interleave(self.dim // scales.shape[-1], -1)).to(dtype)
        if self.scale is not None:
            return (values.float() * self.scale).to(dtype)
        return values.to(dtype)

    def decode_to(self, raw: torch.Tensor, out: torch.Tensor) -> None:
        """Write `decode(raw, out.dtype)` to out: [n, dim]."""
        out.copy_(self.decode(raw, out.dtype))

    def is_verbatim(self, dtype: torch.dtype) -> bool:
        """Whether the bytes of a record are those of its row in `dtype`."""
        return len(self.fields) == 1 and self.scale is None and DTYPES[self.fields[0].dtype] == dtype

    def part(self, raw: torch.Tensor, place: int) -> torch.Tensor:
        """A field of rows as it is stored: its dtype[n, width] in new memory. raw: uint8[n, record_bytes]."""
        field, offset = self.fields[place], self.offsets[place]
        piece = raw[..., offset : offset + field.nbytes].clone(memory_format=torch.contiguous_format)
        return piece.view(DTYPES[field.dtype])


def _count(field: Field) -> int:
    """A field's width as Python's own int: sizes are products of it, and numpy's would overflow at the width of their type."""
    try:
        return int(operator.index(field.width))
    except TypeError as error:
        raise FormatError(f"field {field.name!r} has a width of {field.width!r}; allowed are integers") from error


def plain(dtype: str, width: int, name: str = "rows") -> Record:
    """Record of one field."""
    return Record((Field(name, dtype, width),))
