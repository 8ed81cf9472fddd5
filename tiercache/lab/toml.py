"""Writes TOML, which the standard library only reads: the values of a config, with comments above its sections."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
"""What TOML has in no comment, beside the ends of lines."""

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def dumps(data: Mapping[str, Any], *, head: Sequence[str] = (), comments: Mapping[str, Sequence[str]] | None = None) -> str:
    """TOML of a mapping as `tomllib` reads it: text, numbers, booleans, lists and mappings. TypeError for other values.

    Mappings at the top are sections, and lists of them repeated ones.

    head: comment lines at the begin. comments: such lines above the section of a name.
    """
    comments = {} if comments is None else comments
    blocks = [_comment(head)] if head else []
    plain = {key: value for key, value in data.items() if not _sections(value)}
    if plain:
        blocks.append(_pairs(plain))
    for key, value in data.items():
        if not _sections(value):
            continue
        repeated = not isinstance(value, Mapping)
        name = f"[[{_key(key)}]]" if repeated else f"[{_key(key)}]"
        for number, section in enumerate(value if repeated else [value]):
            above = _comment(comments[key]) + "\n" if key in comments and not number else ""
            blocks.append(f"{above}{name}\n{_pairs(section)}".rstrip("\n"))
    return "\n\n".join(blocks) + "\n"


def _sections(value: object) -> bool:
    """Whether a value at the top is written as sections."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(each, Mapping) for each in value)
    return isinstance(value, Mapping)


def _comment(lines: Sequence[str]) -> str:
    """Each line behind a #, also those within a text of several; what UTF-8 or TOML cannot have there is replaced."""
    parts = [part for line in lines for part in line.splitlines() or [""]]
    text = "\n".join(f"# {_CONTROL.sub('?', part)}".rstrip() for part in parts)
    return text.encode(errors="replace").decode()


def _pairs(section: Mapping[str, Any]) -> str:
    return "\n".join(f"{_key(key)} = {_value(value)}" for key, value in section.items())


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _value(key)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(float(value) if isinstance(value, float) else value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_key(key)} = {_value(each)}" for key, each in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    raise TypeError(f"{value!r}: TOML of it is not written here")
