"""Compression of a tokenizer's ids: tokens that mean the same to the hashing get one id.

Tokens are one if their texts are equal after normalisation: compatibility forms (NFKC), accents off, lower case, white
space in one piece and none at the ends; a token of nothing but white space is one space. A token whose text is empty
after that keeps its text, and one that is no valid UTF-8 its raw form. New ids are handed out in the order in which
tokens are met, so that every multiplier and prime that derives from their number is the same for everybody with the
same tokenizer.

A map is kept in a file beside the table that was trained with it, with its identity; the map of another tokenizer, or
another map of the same size, is refused.
"""

import hashlib
import io
import os
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.errors import FormatError

Tokenizer = str | os.PathLike[str] | bytes
"""Path of a tokenizer.json, or what stands in one."""

_SPACE = "\ue000"
_REPLACEMENT = "\ufffd"


class Identity(NamedTuple):
    """What a table says of the map that it was trained with: plain text and numbers, for a config or a file's attributes."""

    map_sha256: str
    """Of the map as little-endian int64, in hexadecimal digits."""
    tokenizer_sha256: str
    """Of the bytes of tokenizer.json."""
    num_ids: int
    num_compressed: int


@dataclass(frozen=True, eq=False)
class Compression:
    """A map and the tokenizer it is of. ids: int64[tokenizer's ids], read-only, a copy of what was given.

    Raises TypeError for ids that are no integers, ValueError for ids of more than one dimension.
    """

    ids: npt.NDArray[np.int64]
    tokenizer_sha256: str

    def __post_init__(self) -> None:
        given = np.asarray(self.ids)
        if given.ndim != 1:
            raise ValueError(f"ids of shape {given.shape}: expected one dimension")
        if given.dtype.kind not in "iu":
            raise TypeError(f"ids: expected integers, got {given.dtype}")
        ids = np.array(given, np.int64)
        ids.flags.writeable = False
        object.__setattr__(self, "ids", ids)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Compression":
        """The map of a tokenizer; takes seconds. Raises as `compress_vocabulary`."""
        content = _content(tokenizer)
        return cls(_map_of(content, _name(tokenizer)), hashlib.sha256(content).hexdigest())

    @classmethod
    def load(cls, path: str | os.PathLike[str], expected: Identity) -> "Compression":
        """The map that `save` wrote to a file.

        Raises FormatError for a file that is none, is damaged, or holds another map than is expected, and TypeError where
        `expected` is no identity.
        """
        if not isinstance(expected, tuple | list) or len(expected) != len(Identity._fields):
            raise TypeError(f"expected = {expected!r}: allowed is an Identity of {', '.join(Identity._fields)}")
        with Path(path).open("rb") as file:
            loaded = cls(*_read(path, file))
        for name, found, wanted in zip(Identity._fields, loaded.identity, expected, strict=True):
            if found != wanted:
                raise FormatError(f"{os.fspath(path)}: {name} = {found}: allowed is {wanted}")
        return loaded

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the map, or replace what is there, as .npz: the map and the digests, and nothing that is text."""
        target = Path(path)
        temporary = target.with_name(target.name + ".partial")
        digests = self.identity.map_sha256, self.tokenizer_sha256
        of_map, of_tokenizer = (np.frombuffer(bytes.fromhex(digest), np.uint8) for digest in digests)
        with temporary.open("wb") as file:
            np.savez(file, ids=self.ids.astype("<i8"), map_sha256=of_map, tokenizer_sha256=of_tokenizer)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)

    @cached_property
    def identity(self) -> Identity:
        """What a table that is trained with this map should keep."""
        digest = hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest()
        return Identity(digest, self.tokenizer_sha256, self.ids.size, int(self.ids.max(initial=-1)) + 1)


def to_map(compression: Compression | npt.ArrayLike | None) -> npt.NDArray[np.int64] | None:
    """The ids of a map, however it is given; None for none. ValueError for what is no map."""
    if compression is None:
        return None
    ids = compression.ids if isinstance(compression, Compression) else np.asarray(compression)
    check_map(ids)
    return ids


def check_map(ids: npt.NDArray[Any]) -> None:
    """Raise ValueError unless ids are contiguous int64 of one dimension."""
    if ids.dtype != np.int64 or ids.ndim != 1 or not ids.flags.c_contiguous:
        raise ValueError(f"compression = {ids.dtype}{list(ids.shape)}: allowed is contiguous int64[ids]")


def compress_vocabulary(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """int64[tokenizer's ids], id to compressed id, read-only. Added tokens count as any other.

    Needs the package `tokenizers`, which the extra `engram` brings; raises ImportError without it, FormatError for what is
    no tokenizer.json, and ValueError for ids that are not 0..n-1.
    """
    return _map_of(_content(tokenizer), _name(tokenizer))


def _map_of(content: bytes, name: str) -> npt.NDArray[np.int64]:
    """The map of what stands in the tokenizer.json of this name."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("compressing a vocabulary needs tokenizers: pip install 'tiercache[engram]'") from error
    try:
        made = tokenizers.Tokenizer.from_buffer(content)
    except ValueError as error:
        raise FormatError(f"{name}: is no tokenizer.json: {error}") from None
    normaliser = _normaliser(tokenizers)
    num_ids = made.get_vocab_size(with_added_tokens=True)
    places: dict[str, int] = {}
    ids = np.empty(num_ids, np.int64)
    for token in range(num_ids):
        raw = made.id_to_token(token)
        if raw is None:
            raise ValueError(f"{name}: of {num_ids} tokens none has the id {token}: allowed are ids from 0 without a gap")
        text = made.decode([token], skip_special_tokens=False)
        key = raw if _REPLACEMENT in text else normaliser.normalize_str(text) or text
        ids[token] = places.setdefault(key, len(places))
    ids.flags.writeable = False
    return ids


def _normaliser(tokenizers: Any) -> Any:
    """A lone space is marked before the ends are stripped, and comes back behind that."""
    normalizers, pattern = tokenizers.normalizers, tokenizers.Regex
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(pattern("[ \t\r\n]+"), " "),
            normalizers.Replace(pattern("^ $"), _SPACE),
            normalizers.Strip(),
            normalizers.Replace(_SPACE, " "),
        ]
    )


def _name(tokenizer: Tokenizer) -> str:
    return "tokenizer" if isinstance(tokenizer, bytes) else os.fspath(tokenizer)


def _content(tokenizer: Tokenizer) -> bytes:
    return tokenizer if isinstance(tokenizer, bytes) else Path(tokenizer).read_bytes()


def _read(path: str | os.PathLike[str], file: io.BufferedReader) -> tuple[npt.NDArray[np.int64], str]:
    """The map and the tokenizer's digest, if the file is one that `save` wrote, and whole."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            parts = {name: arrays[name] for name in ("ids", "map_sha256", "tokenizer_sha256")}
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise FormatError(f"{os.fspath(path)}: is no token compression: {error}") from None
    kinds = {name: (array.dtype.str, array.ndim) for name, array in parts.items()}
    if kinds != {"ids": ("<i8", 1), "map_sha256": ("|u1", 1), "tokenizer_sha256": ("|u1", 1)}:
        raise FormatError(f"{os.fspath(path)}: is no token compression: arrays {kinds}")
    ids = parts["ids"]
    if hashlib.sha256(ids.tobytes()).digest() != parts["map_sha256"].tobytes():
        raise FormatError(f"{os.fspath(path)}: the map is not the one that was written: its digest differs")
    return ids, parts["tokenizer_sha256"].tobytes().hex()
