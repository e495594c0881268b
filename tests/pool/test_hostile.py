"""What tasks, callbacks and exceptions do to harm a pool, and the pool goes on."""

from __future__ import annotations

import _thread
import contextvars
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import support_errors as errors
import support_tasks as tasks
from support_processes import run_python, still_alive, wait_until

import safepool
from safepool import ProcessPool
from safepool.pool.hands import ThreadThatStarts
from safepool.pool.shell.loop import Loop

if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path

    from safepool.pool.shell.staff import Staff

OWNER = os.getpid()


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    """Forbids to set any attribute, ``__traceback__`` and ``__cause__`` included."""

    number: int


class TextlessError(Exception):
    """Raises when it is formatted."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class ElsewhereError(Exception):
    """Can be rebuilt in the worker, where that is tried, and not in the program."""

    def __reduce__(self) -> tuple[object, ...]:
        return _build, (OWNER,)


def _build(owner: int) -> Exception:
    if os.getpid() == owner:
        raise TextlessError
    return ValueError("rebuilt in the worker")


def raise_it(error: BaseException) -> None:
    raise error


# One row per exception that resists: how it is made, and what the caller gets.
RESISTING = {
    "a frozen dataclass": (lambda: FrozenError(3), "FrozenError"),
    "without a text": (TextlessError, "TextlessError"),
    "rebuilt here only": (ElsewhereError, "ElsewhereError"),
    "a group": (lambda: ExceptionGroup("two", [ValueError(1), KeyError(2)]), "two"),
    "KeyboardInterrupt": (KeyboardInterrupt, "KeyboardInterrupt"),
    "GeneratorExit": (GeneratorExit, "GeneratorExit"),
}


@pytest.mark.parametrize("case", RESISTING)
def test_exceptions_that_resist_cost_their_own_task(case: str) -> None:
    """The future ends, the worker lives, and the next task runs in it."""
    make, words = RESISTING[case]
    with ProcessPool(1) as pool:
        worker = pool.submit(tasks.pid).result(timeout=30)
        error = pool.submit(lambda: raise_it(make())).exception(timeout=30)
        assert pool.submit(tasks.pid).result(timeout=30) == worker

    assert words in f"{type(error).__name__} {_text(error)}"


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of descriptors")
@pytest.mark.parametrize("case", errors.ERRORS)
def test_an_error_without_descriptors_is_told(case: str) -> None:
    """What its description takes was imported before; the worker lives, and has its type."""
    with ProcessPool(1) as pool:
        worker = pool.submit(tasks.pid).result(timeout=30)
        error = pool.submit(errors.fail_without_descriptors, case).exception(timeout=30)
        assert pool.submit(tasks.pid).result(timeout=30) == worker

    assert errors.ERRORS[case][1] in f"{type(error).__name__} {error}"
    assert "in fail_without_descriptors" in str(getattr(error, "__cause__", None) or error)


@pytest.mark.parametrize("method", [None, "spawn"])
def test_an_error_that_python_cannot_format_is_told(method: str | None) -> None:
    """With the places it went through, by hand."""
    with ProcessPool(1, mp_context=method) as pool:
        worker = pool.submit(tasks.pid).result(timeout=30)
        pool.submit(errors.break_formatting).result(timeout=30)
        error = pool.submit(tasks.raise_value_error).exception(timeout=30)
        assert pool.submit(tasks.pid).result(timeout=30) == worker

    assert type(error) is ValueError
    assert "in raise_value_error\nbuiltins.ValueError (not formatted: no desc" in str(
        error.__cause__
    )


# A thread that the program has, one that a fork may lose (workers/preload.py), warnings as errors.
STRICT = """
import ctypes, sys, threading, warnings
import safepool

if __name__ == "__main__":
    begun, end = threading.Event(), threading.Event()
    threading.Thread(target=lambda: (begun.set(), end.wait())).start()
    begun.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        with safepool.ProcessPool(2, sys.argv[1], preload=["background"]) as pool:
            print(sum(pool.map(abs, range(-3, 3))))
    end.set()
"""

BACKGROUND = """
import ctypes, threading, time
named = threading.Event()
def run():
    ctypes.CDLL(None).prctl(15, b"jemalloc_bg_thd", 0, 0, 0)
    named.set()
    time.sleep(600)
threading.Thread(target=run, daemon=True).start()
named.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a fork server, and a thread's name")
@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("safepool", ["-W", "error::DeprecationWarning"]),
        ("fork", ["-W", "error::DeprecationWarning"]),
        # As on free-threaded builds: who starts a thread hands its filters down.
        ("fork", ["-X", "context_aware_warnings=1", "-X", "thread_inherit_context=1"]),
    ],
    ids=["safepool", "fork", "fork, filters of a context"],
)
def test_a_fork_beside_threads_where_warnings_are_errors(
    method: str, flags: list[str], tmp_path: Path
) -> None:
    """Python 3.15 would raise one of them when the child is there already."""
    (tmp_path / "background.py").write_text(BACKGROUND)
    (tmp_path / "program.py").write_text(STRICT)
    done = run_python(*flags, "program.py", method, cwd=tmp_path)

    told = "RuntimeWarning: mp_context=" if method == "fork" else ""
    assert done.stdout == "9\n"
    assert told in done.stderr
    assert "Deprecat" not in done.stderr
    assert "Traceback" not in done.stderr


def _text(error: BaseException | None) -> str:
    try:
        return str(error)
    except RuntimeError:
        return ""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_worker_that_ends_after_its_last_task_costs_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers and dies, and the pool wants to tell it to stop."""
    first, second, there = tmp_path / "first", tmp_path / "second", tmp_path / "there"
    gone: list[int] = []

    def answer_and_die(x: int) -> int:
        there.touch()
        tasks.wait_for(str(second))

        def watch(frame: Any, event: str, argument: object) -> None:
            name = frame.f_code.co_qualname if event == "return" else ""
            if name == "Answers.flush" and frame.f_locals.get("frame"):  # with something to send
                os._exit(0)
            if name == "Runner._run_alone" and argument:
                os._exit(0)

        sys.setprofile(watch)
        return x

    with ProcessPool(2, max_tasks_per_child=1) as pool:
        begun = pool.submit(tasks.wait_for, str(first))
        step = Loop._step

        def step_when_it_has_gone(self: Loop, staff: Staff) -> bool:
            """Keep the scheduler's thread busy so long."""
            if begun.done() and not gone:
                gone.extend(worker.pid for worker in staff if worker.ledger.owed)
                second.touch()
                wait_until(lambda: not still_alive(gone, after_s=0))
            return step(self, staff)

        monkeypatch.setattr(Loop, "_step", step_when_it_has_gone)
        last = pool.submit(answer_and_die, 1)
        wait_until(there.exists)
        first.touch()
        rest = [pool.submit(tasks.square, n) for n in range(5)]
        assert [future.result(timeout=30) for future in rest] == [0, 1, 4, 9, 16]
        assert last.result(timeout=30) == 1
    assert len(gone) == 1


def test_a_task_that_forks_and_returns_answers_once() -> None:
    """Its child must neither answer for it nor take the next task."""

    def fork() -> int:
        return os.fork()

    with ProcessPool(1) as pool:
        future = pool.submit(fork)
        after = [pool.submit(tasks.square, n) for n in range(5)]
        assert future.result(timeout=30) > 0
        assert [f.result(timeout=30) for f in after] == [0, 1, 4, 9, 16]


class Forks:
    """Forks when it is pickled, waits for the child, and arrives as 7."""

    def __reduce__(self) -> tuple[Any, ...]:
        child = os.fork()
        if not child:
            sys.exit()
        os.waitpid(child, 0)
        return int, (7,)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("code", [None, 3])
def test_a_fork_that_a_callback_makes_ends_with_it(code: int | None, tmp_path: Path) -> None:
    """Also one that pickling makes: as where the program's own thread forks."""
    codes: list[int] = []
    gate = tmp_path / "gate"

    def fork(_future: object) -> None:
        child = os.fork()
        if child:
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        elif code is not None:
            sys.exit(code)

    with ProcessPool(1) as pool:
        # Not done before it has its callback, which this thread would call then.
        first = pool.submit(tasks.wait_for, str(gate), 4)
        first.add_done_callback(fork)
        gate.touch()
        assert pool.submit(abs, Forks()).result(timeout=30) == 7
        assert first.result(timeout=30) == 4
    assert codes == [code or 0]


def test_a_thread_may_be_joined_before_it_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool is shut down right after its first callback."""
    begins, ran = threading.Event(), threading.Event()
    bootstrap = vars(threading.Thread)["_bootstrap"]

    def begin_late(thread: threading.Thread) -> None:
        begins.wait(30)
        bootstrap(thread)

    monkeypatch.setattr(ThreadThatStarts, "_bootstrap", begin_late, raising=False)
    thread = ThreadThatStarts(ran.set, "late")
    thread.start()
    thread.join(0.01)
    assert not ran.is_set()
    begins.set()
    thread.join()
    assert ran.is_set()
    assert not thread.is_alive()


def test_a_thread_has_the_context_that_threads_have_here() -> None:
    """On free-threaded builds a copy of its starter's, in which its filters of warnings are."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    found: list[str] = []

    def start_both() -> None:
        variable.set("the starter's")
        for thread in (
            ThreadThatStarts(lambda: found.append(variable.get()), "ours"),
            threading.Thread(target=lambda: found.append(variable.get())),
        ):
            thread.start()
            thread.join()

    contextvars.copy_context().run(start_both)
    assert found in (["none"] * 2, ["the starter's"] * 2)


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="threads are started by another call")
def test_a_thread_that_an_error_after_its_start_hides_runs(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What a signal's handler raises in ``start`` may come when the thread is there already."""
    start, begins, ran = _thread.start_new_thread, threading.Event(), threading.Event()

    def start_and_raise(function: Any, arguments: tuple[()]) -> int:
        def wait_and_begin() -> None:
            begins.wait(30)
            function(*arguments)

        start(wait_and_begin, ())
        raise KeyboardInterrupt

    thread = ThreadThatStarts(ran.set, "hidden")
    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", start_and_raise)
        with pytest.raises(KeyboardInterrupt):
            thread.start()
    begins.set()
    thread.join(30)
    assert ran.is_set()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("raised", [SystemExit, KeyboardInterrupt, RuntimeError])
def test_a_callback_that_raises_costs_nobody(raised: type[BaseException], tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    def fail(_future: object) -> None:
        raise raised

    with ProcessPool(1) as pool:
        first = pool.submit(tasks.wait_for, str(gate), 4)
        first.add_done_callback(fail)
        gate.touch()
        assert first.result(timeout=30) == 4
        assert pool.submit(tasks.square, 3).result(timeout=30) == 9


def test_a_future_that_the_caller_ends_costs_nobody(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with ProcessPool(1) as pool:
        busy = pool.submit(tasks.wait_for, str(gate), "busy")
        ours: list[Future[int]] = [pool.submit(tasks.square, n) for n in range(3)]
        ours[1].set_result(-1)
        gate.touch()
        assert busy.result(timeout=30) == "busy"
        assert [future.result(timeout=30) for future in ours] == [0, -1, 4]


def test_a_pool_first_used_while_the_interpreter_ends_is_refused() -> None:
    """A thread that is started by then may never run; the error comes instead."""
    code = (
        "import safepool\n"
        "safepool.ProcessPool(1).submit(abs, 1).result()\n"
        "class Late:\n"
        "    def __init__(self): self.pool = safepool.ProcessPool(1)\n"
        "    def __del__(self):\n"
        "        try: self.pool.submit(abs, 2)\n"
        "        except RuntimeError as error: print(error)\n"
        "late = Late()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.stdout == "cannot schedule new futures after interpreter shutdown\n"


@pytest.mark.skipif(sys.platform == "win32", reason="a shell closes the streams")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_program_without_streams_works(closed: str) -> None:
    """As a daemon's: the exit code says that the sum was right."""
    code = (
        "import safepool, sys\n"
        "with safepool.ProcessPool(2) as pool:\n"
        "    sys.exit(sum(pool.map(abs, range(5))))\n"
    )
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", code],
        timeout=60,
        check=False,
    )

    assert done.returncode == 10


def test_an_initializer_whose_arguments_cannot_be_pickled_breaks_the_pool() -> None:
    with ProcessPool(1, initializer=print, initargs=(threading.Lock(),)) as pool:
        error = pool.submit(tasks.square, 1).exception(timeout=30)

    assert isinstance(error, safepool.PoolBrokenError)
    assert "the initializer cannot be pickled" in str(error)


def test_two_pools_one_after_the_other() -> None:
    for _ in range(2):
        with ProcessPool(2) as pool:
            assert list(pool.map(tasks.square, range(4))) == [0, 1, 4, 9]


def test_fork_from_a_process_with_threads_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning: whose locks a forked worker may wait for."""
    import multiprocessing
    import warnings

    from safepool import machine

    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork here")
    monkeypatch.setattr(machine, "_told", set())
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name="holds-a-lock")
    thread.start()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                ProcessPool(1, mp_context="fork").shutdown()
    finally:
        release.set()
        thread.join()

    (warning,) = [w for w in caught if "holds-a-lock" in str(w.message)]
    assert issubclass(warning.category, RuntimeWarning)


@pytest.mark.parametrize("name", ["spawn", "loky"])
def test_contexts_are_found_by_name(name: str) -> None:
    with ProcessPool(1, mp_context=name) as pool:
        assert pool.submit(tasks.square, 3).result(timeout=60) == 9


def test_an_unknown_context_is_refused() -> None:
    with pytest.raises(ValueError, match="quantum"):
        ProcessPool(1, mp_context="quantum")


# One row per argument that is refused at once, not by a worker that dies of it.
LATE_MISTAKES: dict[str, dict[str, object]] = {
    "workers as a float": {"max_workers": 1.5},
    "a number in env": {"env": {"OMP_NUM_THREADS": 2}},
    "no name in env": {"env": {3: "x"}},
}


@pytest.mark.parametrize("mistake", LATE_MISTAKES)
def test_mistakes_are_told_to_who_makes_them(mistake: str) -> None:
    with pytest.raises(TypeError):
        ProcessPool(**LATE_MISTAKES[mistake])  # type: ignore[arg-type]


def test_resize_refuses_a_float() -> None:
    with ProcessPool(1) as pool:
        with pytest.raises(TypeError):
            pool.resize(2.5)  # type: ignore[arg-type]
        assert pool.submit(tasks.square, 2).result(timeout=30) == 4


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_dead_worker_does_not_end_a_program_that_dies_of_sigpipe(tmp_path: Path) -> None:
    """As scripts do that end quietly when their reader has left."""
    code = (
        "import os, signal, time, safepool, support_inside as inside\n"
        "signal.signal(signal.SIGPIPE, signal.SIG_DFL)\n"
        "with safepool.ProcessPool(1) as pool:\n"
        "    pid = pool.submit(os.getpid).result()\n"
        "    os.kill(pid, signal.SIGSTOP)\n"
        "    while os.path.exists('/proc') and ' T ' not in open(f'/proc/{pid}/stat').read():\n"
        "        time.sleep(0.01)\n"
        "    (worker,) = inside.workers_of(pool)\n"
        "    future = pool.submit(len, bytes(20_000_000))\n"
        "    while getattr(worker.ledger.head, 'pickled', 0) is not None:  # handed over\n"
        "        time.sleep(0.01)\n"
        "    os.kill(pid, signal.SIGKILL)\n"
        "    print(type(future.exception(30)).__name__, pool.submit(abs, -1).result(30))\n"
    )
    done = run_python("-c", code, cwd=tmp_path)

    assert (done.stdout, done.returncode) == ("WorkerDiedError 1\n", 0)


def test_a_pool_that_breaks_while_it_hires_ends_its_workers() -> None:
    """The second worker's initializer can no longer be pickled; the first is in a task."""
    argument: list[object] = []
    with ProcessPool(2, initializer=len, initargs=(argument,)) as pool:
        running = pool.submit(tasks.sleep_and_return, 20)
        while not running.running():
            time.sleep(0.01)
        argument.append(threading.Lock())
        started = time.monotonic()
        assert isinstance(pool.submit(abs, 1).exception(timeout=30), safepool.PoolBrokenError)
        assert isinstance(running.exception(timeout=30), safepool.PoolBrokenError)
    assert time.monotonic() - started < 10


def test_a_child_that_a_task_forks_ends_as_any_other() -> None:
    """A task that looks at its child's status must not see success instead of a failure."""

    def code_of_child(how: str) -> int:
        pid = os.fork()
        if pid == 0:
            if how == "exits":
                sys.exit(3)
            if how == "raises":
                os.close(2)  # its traceback is not this test's output
                raise ValueError(how)
            return 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    with ProcessPool(1) as pool:
        codes = [pool.submit(code_of_child, how) for how in ("exits", "raises", "returns")]
        assert [future.result(timeout=30) for future in codes] == [3, 1, 0]
        assert list(pool.map(code_of_child, ["exits", "raises"])) == [3, 1]


def test_a_result_that_was_in_time_counts_though_the_program_was_stopped() -> None:
    code = (
        "import safepool, time\n"
        "with safepool.ProcessPool(1, timeout=2) as pool:\n"
        "    pool.submit(abs, 1).result()\n"
        "    future = pool.submit(time.sleep, 0.5)\n"
        "    print('ready', flush=True)\n"
        "    print(future.result())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        program.send_signal(signal.SIGSTOP)
        time.sleep(3)
        program.send_signal(signal.SIGCONT)
        assert program.stdout.read() == "None\n"


def test_what_cannot_be_pickled_is_told_with_the_call_that_it_was_in() -> None:
    lock = threading.Lock()
    with ProcessPool(1) as pool:
        error = pool.submit(tasks.square, lock).exception(timeout=30)  # type: ignore[arg-type]
    assert isinstance(error, TypeError)
    assert "while the call of support_tasks.square was pickled" in "\n".join(error.__notes__)


@pytest.mark.parametrize("name", ["", "A=B", "A\0"])
def test_a_variable_that_cannot_be_is_refused_at_once(name: str) -> None:
    with pytest.raises(ValueError, match="env must be a mapping of variables"):
        ProcessPool(1, env={name: "1"})


class WithALock:
    """A callable that cannot be pickled."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, x: int) -> int:
        return x


@pytest.mark.parametrize("items", [[1], [1, 2, 3]])
def test_a_map_of_what_cannot_be_pickled_ends_with_that_error(items: list[int]) -> None:
    """And costs the pool nothing."""
    with ProcessPool(1) as pool:
        with pytest.raises(TypeError, match="cannot pickle"):
            list(pool.map(WithALock(), items, timeout=60))
        assert list(pool.map(abs, [-1])) == [1]
