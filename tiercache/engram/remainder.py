"""Remainders by moduli known beforehand, eight at a time, without a division.

The quotient of x by m is taken from a product in float64: x times the reciprocal of m, a little lowered, rounded down.
A multiplication of integers gives what is left of x, and one subtraction of m corrects a quotient that is one too
small.

This is exact. With u = 2**-53, conversion of x, reciprocal, its lowering by 8u and the product are four roundings, each
off by at most u of its value: the product lies below x / m, and above it by less than 13u of it. So the quotient is
never too large, and at most one too small if 13u * x / m < 1, which holds for x < 2**63 and m >= 2**14. Smaller moduli
are for a division.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

LANES = 8
SMALLEST = 1 << 14
"""The least modulus that `place_eight` takes."""

LARGEST = 1 << 62
"""The largest modulus: twice of it must stay an int64."""


def reciprocals(moduli: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """float64[n], what `place_eight` multiplies by."""
    return (1.0 / moduli) * (1 - 2.0**-50)


def place_eight(value: int, moduli: Any, reciprocals: Any, offsets: Any, head: int, out: Any, at: int) -> None:
    """out[at + j] = value % moduli[head + j] + offsets[head + j] for j in 0..7; 0 <= value < 2**63.

    moduli: int64[n], SMALLEST..LARGEST. reciprocals: float64[n]. offsets: int64[n]. out: int64[m]. All contiguous.
    """
    heads = slice(head, head + LANES)
    out[at : at + LANES] = value % moduli[heads] + offsets[heads]


@overload(place_eight)
def _place_eight_twin(value, moduli, reciprocals, offsets, head, out, at):  # type: ignore[no-untyped-def]
    def place(value, moduli, reciprocals, offsets, head, out, at):  # type: ignore[no-untyped-def]
        _eight(value, moduli, reciprocals, offsets, head, out, at)

    return place


@intrinsic
def _eight(context, value, moduli, reciprocals, offsets, head, out, at):  # type: ignore[no-untyped-def]
    integers = ir.VectorType(ir.IntType(64), LANES)
    floats = ir.VectorType(ir.DoubleType(), LANES)

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        def address(argument: int, index: int, vector: Any) -> Any:
            array = context.make_array(signature.args[argument])(context, builder, arguments[argument])
            return builder.bitcast(builder.gep(array.data, [arguments[index]]), vector.as_pointer())

        def load(argument: int, vector: Any) -> Any:
            return builder.load(address(argument, 4, vector), align=8)

        value = arguments[0]
        divisor, reciprocal, offset = load(1, integers), load(2, floats), load(3, integers)
        product = builder.fmul(_repeated(builder, builder.sitofp(value, ir.DoubleType()), floats), reciprocal)
        quotient = builder.fptosi(product, integers)
        left = builder.sub(_repeated(builder, value, integers), builder.mul(quotient, divisor))
        # One more or one less: a difference below zero is a large unsigned number.
        lower = builder.sub(left, divisor)
        left = builder.select(builder.icmp_unsigned("<", lower, left), lower, left)
        builder.store(builder.add(left, offset), address(5, 6, integers), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, moduli, reciprocals, offsets, types.int64, out, types.int64), emit


def _repeated(builder: Any, value: Any, vector: Any) -> Any:
    int32 = ir.IntType(32)
    nothing = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(int32, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(int32, LANES), [0] * LANES))
