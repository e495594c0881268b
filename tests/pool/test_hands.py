"""The threads of a pool: what they do, and what is done where none can be started."""

from __future__ import annotations

import _thread
import array
import functools
import math
import threading
import weakref
from concurrent.futures import InvalidStateError
from typing import TYPE_CHECKING, Any

import pytest

from safepool.pool import hands
from safepool.pool.calls import prints, tasks
from safepool.pool.calls.tasks import PoolFuture

if TYPE_CHECKING:
    from collections.abc import Callable


def refuse_thread(*_: object, **__: object) -> None:
    raise RuntimeError("can't start new thread")


def in_teller(run: Callable[[], None]) -> None:
    hands.Teller("safepool-test").do(run)


def in_hands(run: Callable[[], None]) -> None:
    working = hands.Hands("safepool-test", lambda: None, 2)
    working.do(run, lambda: None, 60.0)
    working.close()


# One row per way to have something done in another thread.
WAYS: dict[str, Callable[[Callable[[], None]], object]] = {
    "within": lambda run: hands.within(60.0, run),
    "in_a_thread": lambda run: hands.in_a_thread(run, "safepool-test"),
    "Teller": in_teller,
    "Hands": in_hands,
}


@pytest.mark.parametrize("way", WAYS)
def test_where_no_thread_can_be_started_it_is_done_here(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[threading.Thread] = []
    monkeypatch.setattr(hands.ThreadThatStarts, "start", refuse_thread)
    WAYS[way](lambda: done.append(threading.current_thread()))
    assert done == [threading.current_thread()]


def test_a_late_job_holds_nothing_when_it_was_finished() -> None:
    """Arguments, above all. Its thread may get no processor for long before it drops the job."""
    ends, ended, goes_on = threading.Event(), threading.Event(), threading.Event()

    def wake() -> None:
        ended.set()
        goes_on.wait(60)

    working = hands.Hands("safepool-test", wake, 1)
    held = array.array("d")
    seen = weakref.ref(held)
    finish: Any = functools.partial(len, held)
    run: Any = functools.partial(ends.wait, 60)
    assert working.do(run, finish, 0.0)
    del finish
    del held
    ends.set()
    assert ended.wait(60)
    working.come_back()
    assert seen() is None
    goes_on.set()
    working.close()


# One row per kind of interpreter: what its threading module has not.
LACKING: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "nothing": lambda _: None,
    "no list of threads that start": lambda patch: patch.setattr(threading, "_limbo", None),
}


@pytest.mark.parametrize("lacking", LACKING)
def test_a_thread_starts_in_any_interpreter(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    thread = hands.ThreadThatStarts(lambda: done.append(1), "safepool-test")
    with monkeypatch.context() as patch:
        limbo = threading._limbo  # type: ignore[attr-defined]
        if lacking != "nothing":
            patch.setattr(hands, "threading", _Without(threading))
        thread.start()
    thread.join(60)
    assert done == [1]
    assert thread not in limbo


class _Without:
    """A module without the private names."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if name == "_limbo":
            raise AttributeError(name)
        return getattr(self._module, name)


def test_a_thread_without_a_handle_is_started_as_before_python_3_13(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[tuple[object, ...]] = []
    monkeypatch.setattr(_thread, "start_new_thread", lambda *call: started.append(call))
    thread = hands.ThreadThatStarts(lambda: None, "safepool-test")
    vars(thread).pop("_os_thread_handle", None)
    vars(thread).pop("_handle", None)
    thread.start()
    assert len(started) == 1


def test_a_thread_that_has_ended_uses_no_processor() -> None:
    clock = 0
    if hasattr(hands, "_clock_of"):
        clock = -(1 << 20)  # of a process that is not there
    assert math.isnan(hands._busy_for(clock))
    assert hands._busy_for(0) == 0.0


def test_there_may_be_nothing_to_begin() -> None:
    working = hands.Hands("safepool-test", lambda: None, 2)
    working.pump()
    working.come_back()
    assert working.next_pump() is None
    assert not working.let_go()


# --- what is compared, and pickled in spite of others ------------------------------------


# One row per pair of buffers: whether they hold the same.
PAIRS: dict[str, tuple[bytes, bytes, bool]] = {
    "equal": (b"a" * 100, b"a" * 100, True),
    "another length": (b"a" * 100, b"a" * 99, False),
    "another word": (b"a" * 100, b"b" + b"a" * 99, False),
    "another rest": (b"a" * 100, b"a" * 99 + b"b", False),
}


@pytest.mark.parametrize("numpy", [True, False], ids=["with NumPy", "without"])
@pytest.mark.parametrize("pair", PAIRS)
def test_buffers_are_compared(pair: str, numpy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, equal = PAIRS[pair]
    if numpy:
        pytest.importorskip("numpy")
    else:
        monkeypatch.setattr(prints, "loaded", lambda *_: None)
    assert prints.is_equal(one, other) is equal


def test_what_is_a_buffer_is_not_copied() -> None:
    class bytearray(list[int]):  # noqa: A001, N801 -- has the name alone
        pass

    mine = bytearray()
    assert prints._exposed(mine) is mine
    assert prints._exposed(array.array("d", [1.0]))[0] == "d"  # type: ignore[index]


# One row per error of pickling: how often it is tried.
TRIED: dict[str, int] = {
    "dictionary changed size during iteration": prints._ATTEMPTS,
    "something else": 1,
}


@pytest.mark.parametrize("text", TRIED)
def test_what_another_thread_changes_is_pickled_again(text: str) -> None:
    tried: list[int] = []

    def attempt() -> None:
        tried.append(1)
        raise RuntimeError(text)

    with pytest.raises(RuntimeError, match=text):
        prints.steadily(attempt)
    assert len(tried) == TRIED[text]
    assert prints.steadily(lambda: 3) == 3


# --- futures -----------------------------------------------------------------------------


def test_a_future_runs_once() -> None:
    future = PoolFuture()
    assert future.set_running_or_notify_cancel()
    with pytest.raises(InvalidStateError):
        future.set_running_or_notify_cancel()
    with pytest.raises(AttributeError, match="no_such"):
        _ = future.no_such  # type: ignore[attr-defined]


def test_a_callback_that_ends_the_program_costs_no_other_call(
    caplog: pytest.LogCaptureFixture,
) -> None:
    future = PoolFuture()

    def leave(_: object) -> None:
        raise SystemExit

    future.add_done_callback(leave)
    tasks.finish(future, 3)
    assert future.result() == 3
    assert "a callback of a future raised" in caplog.text


def test_a_callback_that_another_thread_has_called_is_not_called_again() -> None:
    PoolFuture()._call([])


def test_a_reader_that_comes_first_is_told_the_state() -> None:
    future = PoolFuture()
    assert future._tell_now() is None
    tasks.finish(future, 3)
    assert future._tell_now() == "FINISHED"
    with future._condition:
        assert future._tell_now() is None
