"""Signals' handlers that raise, or wait for the pool, above any call: no call hangs by them.

A trace function stands for the handler. It is called before every instruction of a call, so in
turn at each place where the interpreter may run one. After each the pool must work.
"""

from __future__ import annotations

import _thread
import concurrent.futures
import gc
import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import support_tasks as tasks
from support_interrupts import Interrupt, instructions, interrupted_at, others_uncollected, places

from safepool import ProcessPool
from safepool.errors import let_handlers_pass
from safepool.limits.files import Machine
from safepool.transport import trusted
from safepool.transport.descriptors import Outgoing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def raise_it(_: ProcessPool, __: Any) -> None:
    raise Interrupt


def wait_for_another(pool: ProcessPool, _: Any) -> None:
    assert pool.submit(abs, -5).result(timeout=30) == 5


def wait_for_all(pool: ProcessPool, future: Any) -> None:
    wait_for_another(pool, future)
    if not isinstance(future, concurrent.futures.Future):
        return
    try:
        future.exception(timeout=30)
    except concurrent.futures.CancelledError:
        pass


def cancel_it(pool: ProcessPool, future: Any) -> None:
    if isinstance(future, concurrent.futures.Future):
        future.cancel()
    wait_for_another(pool, future)


HANDLERS: dict[str, Callable[[ProcessPool, Any], object]] = {
    "raises": raise_it,
    "waits for another call": wait_for_another,
    "waits for all": wait_for_all,
    "cancels and waits": cancel_it,
}


def result_or_none(future: concurrent.futures.Future[Any]) -> object:
    try:
        return future.result(timeout=30)
    except concurrent.futures.CancelledError:
        return None


# One row per call: what is there before, what is called, and which part of its places is tried.
CALLS: dict[str, tuple[Callable[[ProcessPool], Any], Callable[[ProcessPool, Any], object], int]]
CALLS = {
    "submit": (lambda _: None, lambda pool, _: pool.submit(abs, -1), 3),
    "result": (lambda pool: pool.submit(abs, -1), lambda _, it: result_or_none(it), 2),
    "cancel": (lambda pool: pool.submit(abs, -1), lambda _, it: it.cancel(), 1),
    "exception": (lambda pool: pool.submit(abs, "a"), lambda _, it: _exception(it), 3),
    "wait": (
        lambda pool: pool.submit(abs, -1),
        lambda _, it: concurrent.futures.wait([it], timeout=30),
        5,
    ),
    "as_completed": (
        lambda pool: pool.submit(abs, -1),
        lambda _, it: [*concurrent.futures.as_completed([it], timeout=30)],
        5,
    ),
    "map": (lambda _: None, lambda pool, _: [*pool.map(abs, [-1, -2])], 13),
    "cancel by kill": (
        lambda pool: pool.submit(time.sleep, 0.001),
        lambda pool, it: pool.cancel(it, kill=True),
        23,
    ),
    "workers": (lambda _: None, lambda pool, _: pool.workers(), 29),
}


def _exception(future: concurrent.futures.Future[Any]) -> object:
    try:
        return future.exception(timeout=30)
    except concurrent.futures.CancelledError:
        return None


# These functions of concurrent.futures hold locks of their own meanwhile.
LOCKED = {*itertools.product(("wait", "as_completed"), ("raises", "waits for all"))}


# A file that is dropped between open() and the block of its with closes itself, and says so.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize(
    ("call", "handler"),
    [(call, handler) for call in CALLS for handler in HANDLERS if (call, handler) not in LOCKED],
)
def test_a_handler_may_come_at_any_moment_of_a_call(call: str, handler: str) -> None:
    make, act, step = CALLS[call]
    handle = HANDLERS[handler]
    with ProcessPool(1) as pool:
        pool.submit(abs, -1).result(timeout=30)
        for place in places(step):
            made = make(pool)
            reached = interrupted_at(
                place, lambda made=made: act(pool, made), lambda made=made: handle(pool, made)
            )
            assert pool.submit(abs, -3).result(timeout=30) == 3
            if made is not None:
                assert not concurrent.futures.wait([made], timeout=30).not_done
            if not reached:
                break


class StopError(Exception):
    """An error that a handler raises, as those of time limits do."""


class Stopping:
    """A handler that is no function."""

    def __call__(self, *_: object) -> None:
        raise StopError


def stop(*_: object) -> None:
    raise StopError


@pytest.mark.parametrize("handler", [stop, Stopping(), Stopping().__call__, partial(stop, 1)])
def test_an_error_of_a_handlers_is_known_as_such(handler: Any) -> None:
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(StopError) as raised:
            signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(StopError):
            let_handlers_pass(raised.value)
    finally:
        signal.signal(signal.SIGUSR1, before)
    let_handlers_pass(raised.value)  # nobody's any more
    let_handlers_pass(StopError())


def test_no_handler_is_looked_up_for_an_error_of_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To ask for all handlers takes longer than a call."""
    monkeypatch.setattr(signal, "getsignal", None)
    with pytest.raises(trusted.UntrustedError):
        trusted.dumps(lambda: 1)


# Here the handler is a real one: its errors are told from others by that.
@pytest.mark.parametrize("value", [-1, Path("a"), Stopping()], ids=["plain", "library", "own"])
def test_no_error_of_a_handlers_is_lost_in_a_submit(value: object) -> None:
    """What goes on after any error, of a library or a class of the program, lets this one pass."""
    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with ProcessPool(1) as pool:
            pool.submit(repr, value).result(timeout=30)
            for place in places(3):
                try:
                    reached = interrupted_at(
                        place,
                        lambda: pool.submit(repr, value),
                        lambda: signal.raise_signal(signal.SIGUSR1),
                    )
                except StopError:
                    continue
                assert not reached
                break
            assert pool.submit(abs, -3).result(timeout=30) == 3
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("handler", ["raises", "waits for another call"])
def test_a_handler_may_come_at_any_moment_of_the_first_call(handler: str) -> None:
    """Threads are started, and the first worker: nothing of it is left half done."""
    handle = HANDLERS[handler]
    # It looks at each module that there is: after other tests at ten times as many.
    with ProcessPool(1) as pool:
        count = instructions(lambda: pool.submit(abs, -1).result(timeout=30))
    for place in places(max(31, count // 60)):
        with ProcessPool(1) as pool:
            reached = interrupted_at(
                place,
                lambda pool=pool: pool.submit(abs, -1).result(timeout=30),
                lambda pool=pool: handle(pool, None),
            )
            assert pool.submit(abs, -3).result(timeout=30) == 3
        if not reached:
            break


# One row per call above which a handler shuts the pool down.
SHUT: dict[str, Callable[[ProcessPool], object]] = {
    "submit": lambda pool: pool.submit(abs, -1),
    "result": lambda pool: result_or_none(pool.submit(abs, -1)),
    "cancel": lambda pool: pool.submit(abs, -1).cancel(),
    "map": lambda pool: [*pool.map(abs, [-1, -2])],
    "shutdown": lambda pool: pool.shutdown(),
}


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("call", SHUT)
def test_a_handler_may_shut_the_pool_down_at_any_moment(call: str, used: bool) -> None:
    for place in places(41):
        pool = ProcessPool(1)
        if used:
            pool.submit(abs, -1).result(timeout=30)
        try:
            reached = interrupted_at(
                place,
                lambda pool=pool: SHUT[call](pool),
                lambda pool=pool: pool.shutdown(cancel_futures=True),
            )
        except (RuntimeError, concurrent.futures.CancelledError):
            reached = True  # the call was refused, or cancelled
        pool.shutdown()
        if not reached:
            break


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGALRM")
def test_real_signals_at_random_moments() -> None:
    """Handlers that raise, as a time limit of the program's own does."""
    rng, ended = random.Random(1), 0

    def ring(*_: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, ring)
    try:
        with ProcessPool(2) as pool, others_uncollected():
            # The first call reads files by functions of Python's that may be cut off there.
            pool.submit(tasks.square, 3).result()
            futures: list[concurrent.futures.Future[int]] = []
            for _ in range(300):
                try:
                    signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.00005, 0.004))
                    while True:
                        futures.append(pool.submit(tasks.square, 3))
                        futures[-1].result()
                except Interrupt:
                    ended += 1
                if len(futures) > 100:
                    del futures[:-100]
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert [future.result(timeout=30) for future in futures] == [9] * len(futures)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ended == 300


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGTERM for another process")
@pytest.mark.parametrize(
    "end", ["shutdown(wait=True, cancel_futures=True)", "__exit__(*[None] * 3)"]
)
def test_a_program_that_ends_its_pool_in_a_handler_of_sigterm(tmp_path: Path, end: str) -> None:
    script = tmp_path / "service.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, signal, sys, safepool

            class StopError(Exception): pass

            def stop(*_):
                pool.{end}
                raise StopError

            if __name__ == "__main__":
                parent = os.getppid()
                pool = safepool.ProcessPool(2)
                pool.submit(abs, 1).result()
                signal.signal(signal.SIGTERM, stop)
                try:
                    print("ready", flush=True)
                    while os.getppid() == parent:  # else its test was killed
                        pool.submit(abs, 1)
                except StopError:
                    print("stopped", flush=True)
            """
        )
    )
    for attempt in range(4):
        with subprocess.Popen(
            [sys.executable, str(script)],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.03 * attempt)
            process.send_signal(signal.SIGTERM)
            try:
                told, _ = process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            assert (told, process.returncode) == ("stopped\n", 0)


def test_a_finalizer_may_not_wait_for_the_thread_that_runs_it(tmp_path: Path) -> None:
    """The collector may run it in the scheduler's thread: an error there, and no hang."""
    raised: list[BaseException] = []
    gate = tmp_path / "gate"
    with ProcessPool(1) as pool:
        first, second = pool.submit(tasks.wait_for, str(gate)), pool.submit(abs, -2)

        def wait(_: object) -> None:
            try:
                second.result(timeout=30)
            except RuntimeError as error:
                raised.append(error)

        # By the scheduler's own thread, as a finalizer would be.
        wait.__module__ = "asyncio.futures"
        first.add_done_callback(wait)
        gate.touch()
        assert second.result(timeout=30) == 2
    assert "would wait for itself" in str(raised[0])


@pytest.mark.parametrize("kind", [KeyboardInterrupt, StopError])
def test_what_a_handler_raises_while_items_are_taken_waits_for_no_call(
    kind: type[BaseException],
) -> None:
    def handle(*_: object) -> None:
        raise kind

    def items() -> Iterator[float]:
        yield 0.0
        yield 600.0
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, handle)
    try:
        with ProcessPool(1) as pool:
            try:
                results = pool.map(tasks.sleep_and_return, items(), buffersize=2)
                next(results)
                with pytest.raises(kind):
                    next(results)
                assert list(results) == []
            finally:
                pool.kill_workers()
    finally:
        signal.signal(signal.SIGINT, before)


def test_no_descriptor_is_lost_that_a_handler_strikes_at_its_opening(tmp_path: Path) -> None:
    """What a handler raises right after the call comes before anybody has kept its result."""
    if sys.platform == "win32":
        pytest.skip("files have no numbers there")
    file = tmp_path / "file"
    file.write_text("1")

    def strike(function: object) -> Callable[..., None]:
        def strike_at(_frame: object, event: str, what: object) -> None:
            if event == "c_return" and what is function:
                sys.setprofile(None)
                raise StopError

        return strike_at

    outgoing = Outgoing(allowed=True)
    rows = [(open, lambda: Machine().read(str(file))), (os.dup, lambda: outgoing.take(1))]
    for function, act in rows:
        before = os.listdir("/dev/fd")
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):
            sys.setprofile(strike(function))
            try:
                act()
            except StopError:
                pass
            finally:
                sys.setprofile(None)
            outgoing.drop()
            gc.collect()
        assert os.listdir("/dev/fd") == before, function


def test_a_pool_imports_nothing_of_ours_later_than_its_class(tmp_path: Path) -> None:
    """A handler above an import, that makes a pool itself, would find half a module."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from safepool import ProcessPool\n"
        "before = set(sys.modules)\n"
        "if __name__ == '__main__':\n"
        "    with ProcessPool(1) as pool:\n"
        "        assert pool.submit(abs, -1).result() == 1\n"
        "        assert [*pool.map(abs, [-1])] == [1]\n"
        "    print([name for name in sys.modules if name not in before and 'safepool' in name])\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


def submit_some(pool: ProcessPool, count: int) -> list[Any]:
    return [pool.submit(tasks.sleep_and_return, 600.0) for _ in range(count)]


# One row per way to wait for the pool.
WAITS: dict[str, Callable[[ProcessPool], object]] = {
    "result": lambda pool: submit_some(pool, 1)[0].result(),
    "result, in time": lambda pool: submit_some(pool, 1)[0].result(600.0),
    "result of a queued call": lambda pool: submit_some(pool, 2)[1].result(),
    "map": lambda pool: list(pool.map(tasks.sleep_and_return, [600.0] * 3)),
    "shutdown": lambda pool: submit_some(pool, 1) and pool.shutdown(),
}


@pytest.mark.parametrize("wait", WAITS)
def test_an_interrupt_that_wakes_no_thread_is_noticed(wait: str) -> None:
    """As one that comes in the moment before the thread sleeps."""
    here = threading.get_ident()

    def names() -> Iterator[str]:
        frame = sys._current_frames()[here]
        while frame:
            yield frame.f_code.co_name
            frame = frame.f_back

    def interrupt() -> None:
        while not {"arrives", "_await"} & {*names()}:
            time.sleep(0.01)
        _thread.interrupt_main()

    with ProcessPool(1) as pool:
        pool.submit(abs, -1).result(timeout=60.0)
        interrupter = threading.Thread(target=interrupt)
        # A finalizer of what earlier tests have left may wait as well, and swallow the interrupt.
        gc.collect()
        gc.disable()
        try:
            interrupter.start()
            with pytest.raises(KeyboardInterrupt):
                WAITS[wait](pool)
        finally:
            gc.enable()
        interrupter.join()
        pool.kill_workers()
