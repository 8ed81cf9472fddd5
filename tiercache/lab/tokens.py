"""Token streams: the ids of many documents one after another, and the documents' lengths."""

import os
from pathlib import Path
from tokenize import TokenError
from typing import NamedTuple
from zipfile import BadZipFile, is_zipfile
from zlib import error as ZlibError

import numpy as np
import numpy.typing as npt

from tiercache.errors import FormatError

SHIPPED = Path(__file__).parent.parent / "data" / "public_domain.npz"
"""State of the Union addresses and chapters of Moby-Dick; `data/README.md` says more."""

SHIPPED_VOCABULARY = 129_280
"""Token ids of the shipped stream are below this."""


_DAMAGE = (ValueError, KeyError, TypeError, BadZipFile, ZlibError, EOFError, NotImplementedError, RuntimeError, TokenError)
"""What numpy and zipfile raise for archives that are damaged, encrypted, or of a kind that they do not read."""


class TokenStream(NamedTuple):
    """tokens int64[T]: ids; documents int64[D]: lengths, which sum to T."""

    tokens: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]

    def first(self, num_tokens: int) -> "TokenStream":
        """The stream cut after `num_tokens`; all of it where it is shorter."""
        lengths = np.diff(np.minimum(np.cumsum(self.documents), num_tokens), prepend=0)
        return TokenStream(self.tokens[:num_tokens], lengths[lengths > 0])


def load_tokens(path: str | os.PathLike[str] = SHIPPED) -> TokenStream:
    """The stream in an .npz file: integers `tokens` [T] and, unless it is one document, `documents` [D].

    Raises FormatError where the file holds something else, OSError where it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            if not is_zipfile(file):
                raise FormatError(f"{path}: not an .npz file")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                tokens = archive["tokens"].astype(np.int64, casting="same_kind")
                documents = archive.get("documents", np.array([tokens.size])).astype(np.int64, casting="same_kind")
    except FormatError:
        raise
    except _DAMAGE as error:
        raise FormatError(f"{path}: not a token stream: {error}") from error
    if tokens.ndim != 1 or documents.ndim != 1 or documents.sum() != tokens.size:
        raise FormatError(f"{path}: documents of {documents.sum()} tokens in all, but tokens of shape {tokens.shape}")
    return TokenStream(tokens, documents)
