"""What a policy is: a NamedTuple of arrays, and two compiled functions that read and write it.

`on_hit(state, keys, slot)` says that the record in `slot` was used. `on_miss(state, keys, pins, key)` says that `key`
was wanted and is absent, and returns the slot to overwrite, or BYPASS to keep it out of the tier. Both are told of each
distinct key of a batch once. `keys` is int64[capacity], the key of each slot or EMPTY; `pins` is int16[capacity], and a
slot with a pin is in use and must not be returned. Slots are handed out from 0 up, then reused.

The generic functions of this module find the policy's own by the type of its state, so that one compiled caller serves
every policy and can be cached on disk.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from numba.extending import overload

from tiercache.native import lean

BYPASS = -1
"""Answer of `on_miss`: do not keep this key."""

EMPTY = -1
"""Key of a slot that holds nothing that may be served."""

MAX_PINNED_VICTIMS = 64
"""A policy that has met this many pinned victims in one call answers BYPASS."""


class Policy(NamedTuple):
    """A replacement policy by name.

    `init(capacity, **parameters)` makes the state for `capacity` slots; `check(state, keys)` raises AssertionError
    where the state contradicts itself. A field `marks`, uint8[capacity] of zeros, of a state may be replaced by another
    array, strided, before the first call: so the level keeps that byte beside the slot's key.

    `rank(state, keys, slots)` tells of the rows that a tier begins with, before the first access, which slots they have: int32,
    hottest first. For a policy to which this is more than that they came in the other order.
    """

    name: str
    init: Callable[..., Any]
    check: Callable[[Any, Any], None]
    rank: Callable[[Any, Any, Any], None] | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of what `init` has defaults for: what a config may set."""
        parameters = inspect.signature(self.init).parameters.values()
        return tuple(parameter.name for parameter in parameters if parameter.default is not parameter.empty)


def bind(
    state_type: Any,
    *,
    on_hit: Callable[..., Any],
    on_miss: Callable[..., Any],
    ask: Callable[..., Any] | None = None,
    ask_miss: Callable[..., Any] | None = None,
) -> None:
    """Tie a policy's compiled functions to the type of its state."""
    state_type.on_hit = staticmethod(on_hit)
    state_type.on_miss = staticmethod(on_miss)
    state_type.ask = staticmethod(_ask_nothing if ask is None else ask)
    state_type.ask_miss = staticmethod(_ask_nothing if ask_miss is None else ask_miss)


@lean
def _ask_nothing(state: Any, slot_or_key: int) -> None:
    """For a policy that reads no memory of its own then."""


def on_hit(state: Any, keys: Any, slot: int) -> None:
    """The record in `slot` was used."""
    type(state).on_hit(state, keys, slot)


def on_miss(state: Any, keys: Any, pins: Any, key: int) -> int:
    """`key` is wanted and absent: the slot to overwrite, or BYPASS."""
    return int(type(state).on_miss(state, keys, pins, key))


def ask(state: Any, slot: int) -> None:
    """A hit of this slot may follow: ask for the memory that `on_hit` will read."""
    type(state).ask(state, slot)


def ask_miss(state: Any, key: int) -> None:
    """A miss of this key may follow: ask for the memory that `on_miss` will read."""
    type(state).ask_miss(state, key)


@overload(on_hit, jit_options={"forceinline": True})
def _on_hit(state, keys, slot):  # type: ignore[no-untyped-def]
    function = state.instance_class.on_hit
    return lambda state, keys, slot: function(state, keys, slot)


@overload(on_miss)
def _on_miss(state, keys, pins, key):  # type: ignore[no-untyped-def]
    function = state.instance_class.on_miss
    return lambda state, keys, pins, key: function(state, keys, pins, key)


@overload(ask, jit_options={"forceinline": True})
def _ask(state, slot):  # type: ignore[no-untyped-def]
    function = state.instance_class.ask
    return lambda state, slot: function(state, slot)


@overload(ask_miss, jit_options={"forceinline": True})
def _ask_miss(state, key):  # type: ignore[no-untyped-def]
    function = state.instance_class.ask_miss
    return lambda state, key: function(state, key)
