"""Replacement policies: which key leaves a full tier. One file each; `README.md` beside them says how to add one."""

from collections.abc import Callable
from typing import Any

from tiercache.policies import arc, belady, fifo, foresight, gittins, lfu, lru, s3fifo, sieve, static, wtinylfu
from tiercache.policies.base import Policy

DEFAULT = "gittins"
"""Policy of a tier whose config names none."""

POLICIES: dict[str, Policy] = {
    "fifo": fifo.POLICY,
    "lru": lru.POLICY,
    "lfu": lfu.POLICY,
    "sieve": sieve.POLICY,
    "s3fifo": s3fifo.POLICY,
    "arc": arc.POLICY,
    "gittins": gittins.POLICY,
    "wtinylfu": wtinylfu.POLICY,
    "static": static.POLICY,
    "belady": belady.POLICY,
}
"""Every policy by the name that the config uses. `static` and `belady` need parameters that only code can give."""

LOOK_AHEAD: dict[str, tuple[Policy, Callable[..., Any]]] = {"gittins": (foresight.POLICY, foresight.look_ahead)}
"""By the name of a policy that can: what it is once rows are announced, and how its state becomes that one's."""

__all__ = ["DEFAULT", "LOOK_AHEAD", "POLICIES", "Policy"]
