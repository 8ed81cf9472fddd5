"""What a page says that it is of, and how its rows fall into kinds."""

from collections.abc import Sequence
from typing import NamedTuple
from warnings import WarningMessage

from tiercache.engram.families import order_edges
from tiercache.lab.kinds import Kinds, by_table
from tiercache.recording.blocks import RecordedTable
from tiercache.report.facts import Subject


class Text(NamedTuple):
    """How a text became rows: as `hashed` takes it, in batches of so many tokens or as a server would ask.

    base: the row of the store that its table begins with.
    """

    family: str
    vocabulary: int
    batch: int | None
    num_rows: int | None
    base: int


def of_text(
    title: str, text: Text, tables: Sequence[RecordedTable], command: str, told: Sequence[WarningMessage]
) -> Subject:
    """A text, whose rows are told apart by the order of their n-grams."""
    batches = "prefill chunks and decode steps of a server, mixed" if text.batch is None else f"{text.batch:,} tokens each"
    hashing = f"{text.family}, {text.vocabulary:,} token ids"
    about = [("what", "a text, hashed"), ("hashing", hashing), ("a batch", batches), *_more(tables, told)]
    edges = text.base + order_edges(text.family, vocabulary=text.vocabulary, num_rows=text.num_rows)
    kinds = Kinds(tuple(f"{order + 2}-grams" for order in range(edges.size - 1)), edges)
    why = "By the order of the n-grams that rows are hashed from: longer ones repeat less."
    return Subject(title, tuple(about), command, kinds, why)


def of_rows(
    title: str, what: str, tables: Sequence[RecordedTable], command: str, told: Sequence[WarningMessage]
) -> Subject:
    """A trace of rows, which are told apart by their tables where there are several."""
    about = (("what", what), *_more(tables, told))
    if len(tables) > 1:
        kinds = by_table([each.name for each in tables], [each.num_rows for each in tables])
        why = "By table of the store. Of which n-grams the rows are, a trace of rows does not tell."
        return Subject(title, about, command, kinds, why)
    why = "Of which n-grams the rows are, a trace of rows does not tell; a text that is hashed here does."
    return Subject(title, about, command, None, why)


def _more(tables: Sequence[RecordedTable], told: Sequence[WarningMessage]) -> list[tuple[str, str]]:
    """Tables, and what was warned of."""
    known = [("table", f"{each.name}: {each.num_rows:,} rows of {each.record_bytes} B") for each in tables]
    return [*known, *(("warning", str(each.message)) for each in told)]
