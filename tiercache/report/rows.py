"""The table of a replay, as it is printed and as it stands on a page."""

from collections.abc import Sequence

from tiercache.lab.replay import Replay

COLUMNS = ("MiB", "hits", "static", "Belady", "unbounded", "misses", "reads", "MiB read", "amplification")
"""Behind the name of the policy or the tier."""

WARM = "The tiers did not begin empty; the bounds are those of tiers that do."
"""Of a replay that is `warm`: it may have more hits than any bound."""


def title(accesses: int, group_rows: int = 1) -> str:
    """What the shares are of."""
    unit = "row" if group_rows == 1 else f"group of {group_rows} rows"
    return f"Share of {accesses:,} accesses, each a distinct {unit} of a batch"


def result_rows(results: Sequence[Replay]) -> tuple[str, list[tuple[str, ...]]]:
    """(head of the first column, rows of text): policies, each of one tier; or the tiers of a store.

    Where a store has two there is a row for each and one for both together: each tier's hits are a share of all accesses.
    """
    result = results[0]
    above = result.device
    if above is None:
        return "policy", [(each.tier, *_cells(each, each.capacity)) for each in results]
    rows: list[tuple[str, ...]] = []
    for tier, policy, slots, counts in (
        ("device", above.policy, above.capacity, above.counts),
        ("host", result.tier, result.capacity, result.counts),
    ):
        size = f"{slots * result.slot_bytes / 2**20:,.1f}"
        share = f"{100 * counts.hits / max(result.bounds.accesses, 1):.2f}%"
        rows.append((f"{tier}, {policy}", size, share, "", "", "", f"{counts.misses:,}", "", "", ""))
    return "tier", [*rows, ("both", *_cells(result, above.capacity + result.capacity))]


def _cells(result: Replay, slots: int) -> tuple[str, ...]:
    limits = result.bounds
    shares = (result.hits, limits.static, limits.belady, limits.unbounded)
    return (
        f"{slots * result.slot_bytes / 2**20:,.1f}",
        *(f"{100 * each / max(limits.accesses, 1):.2f}%" for each in shares),
        f"{result.counts.misses:,}",
        f"{result.reads:,}",
        f"{result.bytes_read / 2**20:,.0f}",
        f"{result.amplification:.2f} x" if result.amplification else "",
    )
