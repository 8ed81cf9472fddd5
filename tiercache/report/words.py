"""Numbers as a reader wants them. A number and its unit stay on one line."""

_SPACE = "\N{NO-BREAK SPACE}"

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_TIMES = ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1, "ns"))


def size(num_bytes: float) -> str:
    """Bytes to three digits: 64 MiB, 1.13 GiB."""
    power = 0
    while power + 1 < len(_BINARY) and num_bytes >= 999.5:
        num_bytes, power = num_bytes / 1024, power + 1
    digits = 0 if num_bytes >= 99.95 or not power else 1 if num_bytes >= 9.995 else 2
    shown = f"{num_bytes:.{digits}f}"
    return f"{shown.rstrip('0').rstrip('.') if digits else shown}{_SPACE}{_BINARY[power]}"


def percent(share: float, digits: int = 1) -> str:
    """A share: 28.2 %."""
    return f"{100 * share:.{digits}f}{_SPACE}%"


def points(difference: float) -> str:
    """A difference of shares, in points and with its sign."""
    shown = f"{100 * difference:+.1f}".replace("-", "\N{MINUS SIGN}")
    return "0.0" if shown[1:] == "0.0" else shown


def count(number: float) -> str:
    """A whole number: 1,234,567."""
    return f"{number:,.0f}"


def short(number: float) -> str:
    """A number for an axis or a tile, to three digits: 4.51 M."""
    for unit_size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit_size and (number >= 1e4 or number % 100 == 0):
            shown = f"{number / unit_size:.3g}" if number < 999.5 * unit_size else f"{number / unit_size:,.0f}"
            return f"{shown}{_SPACE}{unit}"
    return f"{number:,.0f}" if number >= 100 or number == round(number) else f"{number:.3g}"


def time(ns: float) -> str:
    """A time to three digits: 1.25 ms."""
    for unit_ns, unit in _TIMES:
        if ns >= 0.9995 * unit_ns:
            shown = f"{ns / unit_ns:.3g}" if ns < 999.5 * unit_ns else f"{ns / unit_ns:,.0f}"
            return f"{shown}{_SPACE}{unit}"
    return f"{ns:.3g}{_SPACE}ns"


def listed(names: list[str]) -> str:
    """Several as part of a sentence: a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
