"""The shipped text as the model reads it: its most frequent ids, and one for all the others; some documents held out."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tiercache.lab.tokens import load_tokens

UNKNOWN = 0


@dataclass(frozen=True)
class Text:
    """Documents in the model's ids, int64. originals: those held out, in the tokenizer's ids."""

    train: list[npt.NDArray[np.int64]]
    held_out: list[npt.NDArray[np.int64]]
    originals: list[npt.NDArray[np.int64]]

    def batch(self, generator: np.random.Generator, batch: int, length: int) -> torch.Tensor:
        """int64[batch, length] from random places of the training documents, each position as likely as the next."""
        usable = [document for document in self.train if len(document) >= length]
        starts = np.array([len(document) - length + 1 for document in usable])
        ends = starts.cumsum()
        picked = generator.integers(0, ends[-1], batch)
        which = np.searchsorted(ends, picked, side="right")
        places = picked - (ends - starts)[which]
        return torch.from_numpy(np.stack([usable[w][p : p + length] for w, p in zip(which, places, strict=True)]))

    def windows(self, length: int, most: int, *, held_out: bool = True) -> torch.Tensor:
        """int64[n, length]: held-out (or training) text in pieces that follow one another, evenly picked, `most` at most."""
        documents = self.held_out if held_out else self.train
        pieces = [d[i : i + length] for d in documents for i in range(0, len(d) - length + 1, length)]
        picked = np.linspace(0, len(pieces) - 1, min(most, len(pieces))).astype(np.int64)
        return torch.from_numpy(np.stack([pieces[i] for i in picked]))


def load_text(vocabulary: int, *, held_out: float = 0.08) -> Text:
    """held_out: share of the tokens; whole documents, the last ones of the shuffled stream."""
    stream = load_tokens()
    documents = np.split(stream.tokens, stream.documents.cumsum()[:-1])
    last = int(np.searchsorted(stream.documents.cumsum(), (1 - held_out) * stream.tokens.size))
    counts = np.bincount(np.concatenate(documents[:last]))
    kept = np.argsort(-counts, kind="stable")[: vocabulary - 1]
    ids = np.full(stream.tokens.max() + 1, UNKNOWN, np.int64)
    ids[kept] = np.arange(1, len(kept) + 1)
    reduced = [ids[document] for document in documents]
    return Text(reduced[:last], reduced[last:], documents[last:])
