"""The ledger against a list of what is owed, whatever is done in whatever order."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safepool.pool.core.ledger import Ledger

pytestmark = pytest.mark.unit


class Calls:
    """Work whose calls have names, so that a test sees where each has gone."""

    def __init__(self, names: list[int]) -> None:
        self.names = names
        self.position = self.done = 0
        self.expected_ns = 10

    @property
    def count(self) -> int:
        return len(self.names)

    def split(self, at: int) -> Calls:
        assert 0 < at < self.count
        rest = Calls(self.names[at:])
        del self.names[at:]
        return rest

    def left(self) -> list[int]:
        return self.names[self.done :]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["give", "give", "settle", "take back", "withdraw", "strike", "again"]),
        st.integers(0, 7),
    ),
    max_size=60,
)


@given(STEPS)
def test_each_call_is_owed_until_it_is_settled_or_taken_back(steps: list[tuple[str, int]]) -> None:
    ledger = Ledger()
    names = itertools.count()
    owed: dict[int, int] = {}  # names by position, in order
    last = 0
    for step, number in steps:
        head = ledger.head
        if step == "give":
            given_now = [next(names) for _ in range(number + 1)]
            ledger.give(Calls(given_now))
            owed |= dict(enumerate(given_now, last + 1))
            last += len(given_now)
        elif step == "settle" and head is not None:
            position = head.position + head.done
            count = min(number + 1, head.count - head.done)
            settled = ledger.settle(position, number + 1)
            assert settled == (head, position - head.position, count)
            for place in range(count):
                assert owed.pop(position + place) == head.names[position - head.position + place]
        elif step == "take back":
            begun = min(owed, default=last) - 1 + number
            back = [name for work in ledger.take_back(begun) for name in work.left()]
            assert back == [owed.pop(position) for position in [*owed] if position > begun]
        elif step == "withdraw" and head is not None:
            positions = range(head.position + head.done, head.position + head.count)
            assert ledger.withdraw().left() == [owed.pop(position) for position in positions]
        elif step == "strike" and head is not None:
            work, place = ledger.strike()
            assert owed.pop(min(owed)) == work.names[place]
        elif step == "again" and last:
            gone = min(min(owed, default=last + 1) - 1, number + 1)
            assert gone <= 0 or ledger.settle(gone) is None
        assert [name for work in ledger for name in work.left()] == [*owed.values()]
        assert ledger.owed == len(owed)
        assert ledger.expected_ns == 10 * len(owed)
        assert ledger.last == last


def test_what_is_withdrawn_leaves_what_is_behind_it() -> None:
    """The worker may have begun that; a part that is answered is not withdrawn."""
    ledger = Ledger()
    for names in ([1, 2, 3], [4]):
        ledger.give(Calls(names))
    ledger.settle(1)

    assert ledger.withdraw().names == [2, 3]
    assert ledger.settle(4) is not None
    assert ledger.owed == 0


def test_calls_that_were_never_written_down_have_positions() -> None:
    ledger, work = Ledger(), Calls([7])
    ledger.skip(2)
    ledger.skip(1)
    assert ledger.last == 3
    ledger.give(work)
    assert (work.position, ledger.last, ledger.owed) == (4, 4, 1)


# One row per answer that cannot be right: its position.
WRONG = {"never sent": 5, "out of turn": 3}


@pytest.mark.parametrize("answer", WRONG)
def test_an_answer_that_cannot_be_right_is_refused(answer: str) -> None:
    ledger = Ledger()
    for names in ([1, 2, 3], [4]):
        ledger.give(Calls(names))

    ledger.settle(1)
    told = {"never sent": "5, last sent 4", "out of turn": "3, expected 2"}[answer]
    with pytest.raises(ValueError, match=f"answer for position {told}"):
        ledger.settle(WRONG[answer])
    assert ledger.owed == 3


def test_nothing_owed_cannot_be_struck_withdrawn_or_answered() -> None:
    with pytest.raises(IndexError):
        Ledger().strike()
    with pytest.raises(IndexError):
        Ledger().withdraw()
    with pytest.raises(ValueError, match="answer for position 1, last sent 0"):
        Ledger().settle(1)


def test_what_is_answered_is_done_wherever_it_was_divided() -> None:
    ledger, work = Ledger(), Calls([1, 2, 3])
    assert (ledger.owed, ledger.expected_ns) == (0, 0)
    ledger.give(work)
    assert (ledger.owed, ledger.expected_ns) == (3, 30)
    assert ledger.settle(1) == (work, 0, 1)
    assert (work.done, ledger.owed, ledger.expected_ns) == (1, 2, 20)
    assert ledger.settle(2, 9) == (work, 1, 2)
    assert (work.done, ledger.owed, ledger.expected_ns) == (3, 0, 0)


# One row per number of calls that have begun, of two and two, the first of which is answered: what
# is taken back, and the time that is left.
BACK: dict[int, tuple[list[list[int]], int]] = {
    1: ([[2], [3, 4]], 0),
    2: ([[3, 4]], 10),
    3: ([[4]], 20),
    4: ([], 30),
}


@pytest.mark.parametrize("begun", BACK)
def test_calls_that_have_not_begun_are_taken_back(begun: int) -> None:
    ledger = Ledger()
    for names in ([1, 2], [3, 4]):
        ledger.give(Calls(names))
    ledger.settle(1)
    back, left_ns = BACK[begun]
    assert [work.left() for work in ledger.take_back(begun)] == back
    assert ledger.expected_ns == left_ns
