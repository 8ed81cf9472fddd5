"""NgramState: whatever the order of chunks, drafts, forks and rollbacks, the rows are those of the sequence in one pass."""

from itertools import chain
from typing import Any

import numpy as np
import pytest
from families import FAMILIES
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tiercache.engram.state import NgramState
from tiercache.engram.window import ABSENT

NUM_SLOTS = 4
slots_of_a_call = st.lists(st.integers(0, NUM_SLOTS - 1), unique=True)


class Machine(RuleBasedStateMachine):
    """Sequences as plain lists, whole from their first token on."""

    family: Any
    window: int

    def __init__(self) -> None:
        super().__init__()
        self.state = NgramState(self.family.hashers, NUM_SLOTS, window=self.window)
        self.tokens: list[list[int]] = [[] for _ in range(NUM_SLOTS)]
        self.fixed = [0] * NUM_SLOTS  # tokens that a slot was reset with
        self.longest = [0] * NUM_SLOTS

    def can_forget(self, slot: int) -> int:
        """From the longest that the sequence ever was, `window` tokens back, but nothing that it was reset with."""
        least = max(self.longest[slot] - self.window, self.fixed[slot])
        return len(self.tokens[slot]) - least

    @rule(slots=slots_of_a_call, data=st.data())
    def prefill(self, slots: list[int], data: st.DataObject) -> None:
        chunks = [data.draw(self.family.tokens(2 * self.window + 9)) for _ in slots]
        rows = self.state.append(slots, [*chain(*chunks)], [len(chunk) for chunk in chunks])
        self.grow(slots, chunks, rows)

    @rule(slots=slots_of_a_call, data=st.data())
    def decode(self, slots: list[int], data: st.DataObject) -> None:
        tokens = [data.draw(st.sampled_from(self.family.ids)) for _ in slots]
        self.grow(slots, [[token] for token in tokens], self.state.append(slots, tokens))

    def grow(self, slots: list[int], chunks: list[list[int]], rows: list[Any]) -> None:
        for slot, chunk in zip(slots, chunks, strict=True):
            self.tokens[slot] += chunk
            self.longest[slot] = max(self.longest[slot], len(self.tokens[slot]))
        for hasher, found in zip(self.family.hashers, rows, strict=True):
            expected = []
            for slot, chunk in zip(slots, chunks, strict=True):
                before = len(self.tokens[slot]) - len(chunk)
                expected += self.family.oracle(hasher, self.tokens[slot])[before:]
            assert found.tolist() == expected

    @rule(slots=slots_of_a_call, data=st.data())
    def rollback(self, slots: list[int], data: st.DataObject) -> None:
        counts = [data.draw(st.integers(0, self.can_forget(slot))) for slot in slots]
        self.state.rollback(slots, counts)
        for slot, count in zip(slots, counts, strict=True):
            del self.tokens[slot][len(self.tokens[slot]) - count :]

    @rule(slot=st.integers(0, NUM_SLOTS - 1), excess=st.integers(1, 5))
    def too_much_is_not_forgotten(self, slot: int, excess: int) -> None:
        allowed = self.can_forget(slot)
        with pytest.raises(ValueError, match=rf"counts: {allowed + excess} tokens of slot {slot}: allowed is 0\.\.{allowed}"):
            self.state.rollback([slot], [allowed + excess])

    @rule(chosen=slots_of_a_call, data=st.data())
    def fork(self, chosen: list[int], data: st.DataObject) -> None:
        sources = [data.draw(st.integers(0, NUM_SLOTS - 1)) for _ in chosen]
        self.state.fork(sources, chosen)
        copies = [(list(self.tokens[slot]), self.fixed[slot], self.longest[slot]) for slot in sources]
        for slot, copied in zip(chosen, copies, strict=True):
            self.tokens[slot], self.fixed[slot], self.longest[slot] = copied

    @rule(slots=slots_of_a_call)
    def reset(self, slots: list[int]) -> None:
        self.state.reset(slots)
        for slot in slots:
            self.tokens[slot], self.fixed[slot], self.longest[slot] = [], 0, 0

    @rule(slots=slots_of_a_call, data=st.data())
    def resume(self, slots: list[int], data: st.DataObject) -> None:
        texts = [data.draw(self.family.tokens(10)) for _ in slots]
        context = self.state.context
        self.state.reset(slots, [([ABSENT] * context + text)[-context:] for text in texts] or np.zeros((0, context), np.int64))
        for slot, text in zip(slots, texts, strict=True):
            self.tokens[slot], self.fixed[slot], self.longest[slot] = text, len(text), len(text)

    @precondition(lambda self: any(self.tokens))
    @rule(slots=st.lists(st.integers(0, NUM_SLOTS - 1), min_size=1, unique=True))
    def what_is_refused_changes_nothing(self, slots: list[int]) -> None:
        for tokens in ([10**6] * len(slots), [1] * (len(slots) + 1)):
            with pytest.raises(ValueError, match=r"(tokens|lengths)"):
                self.state.append(slots, tokens, [1] * len(slots))
        with pytest.raises(ValueError, match=f"slots: {slots[0]} stands twice"):
            self.state.append([*slots, slots[0]], [1] * (len(slots) + 1))

    @invariant()
    def the_last_tokens_are_kept(self) -> None:
        context = self.state.context
        kept = self.state.previous(range(NUM_SLOTS))
        assert kept.tolist() == [([ABSENT] * context + tokens)[-context:] for tokens in self.tokens]
        self.state.check()


@pytest.mark.parametrize("window", [0, 1, 5])
@pytest.mark.parametrize("name", FAMILIES)
def test_any_sequence_of_calls_gives_the_rows_of_the_single_pass(name: str, window: int) -> None:
    machine = type("Machine", (Machine,), {"family": FAMILIES[name], "window": window})
    # A hypothesis state machine runs as a unittest case.
    case = machine.TestCase
    case.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
    case("runTest").runTest()


def state() -> NgramState:
    return NgramState(FAMILIES["demo"].hashers, 3, window=2)


@pytest.mark.parametrize("slot", [-1, 3])
def test_a_slot_that_does_not_exist_is_named(slot: int) -> None:
    histories = state()
    for call in (
        lambda: histories.append([0, slot], [1, 1]),
        lambda: histories.previous([slot]),
        lambda: histories.rollback([slot], [0]),
        lambda: histories.reset([slot]),
        lambda: histories.fork([0], [slot]),
    ):
        with pytest.raises(ValueError, match=f"slots: {slot} is outside 0..2"):
            call()
    with pytest.raises(ValueError, match=f"sources: slot {slot}: allowed is 0..2"):
        histories.fork([slot], [0])


def test_wrong_arguments_are_refused() -> None:
    histories = state()
    with pytest.raises(ValueError, match="hashers"):
        NgramState([], 1)
    with pytest.raises(ValueError, match="num_slots = 0: allowed is 1 and more"):
        NgramState(FAMILIES["demo"].hashers, 0)
    with pytest.raises(ValueError, match="window = -1: allowed is 0 and more"):
        NgramState(FAMILIES["demo"].hashers, 1, window=-1)
    with pytest.raises(ValueError, match="3 for 2 slots"):
        histories.append([0, 1], [1, 2, 3])
    for slots, tokens in (([], [1, 2]), ([], [1])):
        with pytest.raises(ValueError, match=f"tokens: {len(tokens)} for 0 slots"):
            histories.append(slots, tokens)
    for lengths, message in (
        ([2, -1], r"lengths: -1 at position 1: allowed is 0\.\.2"),
        ([2**62] * 2, f"lengths: {2**62} at position 0"),
        ([1, 0], "lengths of 1 tokens for 2 tokens"),
        ([2], "lengths: 1 for 2 slots"),
    ):
        with pytest.raises(ValueError, match=message):
            histories.append([0, 1], [1, 2], lengths)
    with pytest.raises(ValueError, match=f"lengths: {2**62} at position 0"):
        histories.append([0, 1, 2], [1], [2**62, 2**63 - 1, 2**62 + 2])
    hashers = FAMILIES["demo"].hashers
    for wrong, error in ((3, "hashers is a int"), (hashers[0], "hashers is a DemoHasher"), ([3], "hashers: has a int")):
        with pytest.raises(TypeError, match=error):
            NgramState(wrong, 1)
    assert NgramState(iter(hashers), 1).hashers == hashers
    with pytest.raises(ValueError, match="counts: 1 for 2 slots"):
        histories.rollback([0, 1], [1])
    with pytest.raises(ValueError, match="counts: -1 tokens of slot 0"):
        histories.rollback([0], [-1])
    with pytest.raises(ValueError, match=r"previous: token id 50 is outside -1\.\.49"):
        histories.reset([0], [[1, 2, 50]])
    with pytest.raises(TypeError, match="slots: expected integers"):
        histories.append([0.5], [1])
    assert (histories.previous([0, 1, 2]) == ABSENT).all()
