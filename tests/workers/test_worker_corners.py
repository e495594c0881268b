"""What a worker and its server do with what seldom comes: user code, systems and processes."""

from __future__ import annotations

import errno
import importlib
import logging
import marshal
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from safepool.transport.channel import ChannelClosedError
from safepool.transport.frames import Kind
from safepool.transport.reductions import Reductions
from safepool.workers import (
    answers,
    board,
    contained,
    describe,
    fork,
    loading,
    logs,
    messages,
    namespace,
    plan,
    preload,
    settings,
    settings_table,
    standard,
    start,
    traces,
    tree,
)
from safepool.workers.runner import Runner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


# --- errors in words ---------------------------------------------------------------------


class ClosedError(Exception):
    """Allows no attributes."""

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)

    def add_note(self, note: str) -> None:
        raise AttributeError(note)


class SilentError(Exception):
    def __str__(self) -> str:
        raise ValueError("it has no text")


class Nameless(type):
    def __getattribute__(cls, name: str) -> Any:
        if name == "__qualname__":
            raise ValueError("it has no name")
        return super().__getattribute__(name)


class Odd(metaclass=Nameless):
    """Has a metaclass that does anything."""


def test_errors_that_refuse_everything_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    describe.say_what(ClosedError(), threading.Lock(), Reductions(), look=True)
    assert not describe._speaks(SilentError())
    assert describe._speaks(ValueError("text"))
    assert describe._name(Odd) == "(an exception whose type has no name)"
    monkeypatch.setattr(describe, "_LATE", ("no_such_module", "ast"))
    describe.get_ready()


def test_a_name_that_is_missing_is_explained_where_the_error_allows_it() -> None:
    names = namespace.MainNamespace()
    names._missing["config"] = "it cannot be pickled"

    class RefusingError(ClosedError, NameError):
        name = "config"

    names.explain(RefusingError())
    names._put_into_modules({1: [b"no pickle"]})
    assert names._added == {1}
    error = NameError("text", name="config")
    names.explain(error)
    assert error.__notes__ == ["'config' of __main__ is not in this worker: it cannot be pickled"]


# One row per way in which a process ends with SystemExit.
CODES: dict[str, tuple[BaseException | None, int, str]] = {
    "nothing": (None, 0, ""),
    "exit()": (SystemExit(), 0, ""),
    "a number": (SystemExit(0x103), 3, ""),
    "a text": (SystemExit("good bye"), 1, "good bye\n"),
    "an error": (ValueError("text"), 1, "ValueError: text\n"),
}


@pytest.mark.parametrize("how", CODES)
def test_the_exit_code_is_that_of_an_interpreter(
    how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error, code, said = CODES[how]
    assert fork.code_of(error) == code
    assert capsys.readouterr().err.endswith(said)


# One row per error that cannot be printed.
UNPRINTABLE: dict[str, str] = {
    "standard error is closed": "sys.stderr = None; fork.leave_fork(SystemExit('good bye'))",
    "a hook raises": "sys.excepthook = lambda *_: 1 / 0; fork.leave_fork(ValueError('text'))",
}


@pytest.mark.parametrize("why", UNPRINTABLE)
def test_a_fork_of_a_worker_ends_also_if_its_error_cannot_be_printed(why: str) -> None:
    code = (
        "import os, sys\nfrom safepool.workers import fork\n"
        f"try:\n    {UNPRINTABLE[why]}\nfinally:\n    os._exit(9)  # it has gone on\n"
    )

    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 1


# --- logging -----------------------------------------------------------------------------


class Sent:
    """Stands for a channel that takes everything, or is closed."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.while_sending: Callable[[], object] = bool
        self.is_closed = False

    def send(self, pieces: list[bytes]) -> None:
        self.while_sending()
        self.sent.append(b"".join(pieces))

    def offer(self, frame: bytes) -> bool:
        if self.is_closed:
            raise ChannelClosedError
        self.sent.append(frame)
        return True

    def hand_over(self, _segments: object) -> object:
        raise MemoryError("no room for a file")


@pytest.fixture
def outbox() -> logs.Outbox:
    return logs.Outbox(Sent())  # type: ignore[arg-type]


def log_into(outbox: logs.Outbox, text: str) -> None:
    outbox.add(logging.makeLogRecord({"msg": text}), filtered=False)


def test_a_record_of_the_time_of_an_answer_follows_it(outbox: logs.Outbox) -> None:
    sent: Any = outbox._channel
    sent.while_sending = lambda: log_into(outbox, "meanwhile")
    outbox.send_answer(b"answer")
    assert sent.sent[0] == b"answer"
    assert b"meanwhile" in sent.sent[1]


def test_what_was_dropped_is_said_with_what_comes_next(
    outbox: logs.Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: Any = outbox._channel
    monkeypatch.setattr(logs, "_WAITING_BYTES", 0)
    with outbox._lock:
        log_into(outbox, "first")
        log_into(outbox, "second")
    outbox.send([b"answer"])
    assert b"first" in sent.sent[0]
    assert b"records were dropped" in sent.sent[1]
    assert sent.sent[2] == b"answer"


def test_records_for_a_pool_that_is_gone_are_dropped(outbox: logs.Outbox) -> None:
    sent: Any = outbox._channel
    sent.is_closed = True
    log_into(outbox, "text")
    assert not outbox._waiting
    assert outbox._lock.acquire(blocking=False)


class Endless:
    def __repr__(self) -> str:
        raise RecursionError

    def __reduce__(self) -> Any:
        raise RecursionError


def test_a_recursion_without_end_is_the_tasks_own(outbox: logs.Outbox) -> None:
    for call in (logs._pickle, logs._words):
        with pytest.raises(RecursionError):
            call(Endless())
    forward = logs._forwarding(outbox, lambda *_: None)
    logger = logging.getLogger("apart of all")
    logger.propagate = False
    record = logger.makeRecord("apart", 30, "f", 1, "text", (), None)
    record.extra = Endless()
    with pytest.raises(RecursionError):
        forward(logger, record)


class Broken:
    def __call__(self, *_: object) -> Any:
        raise ValueError("a filter of the program's")


def test_a_filter_that_raises_costs_the_record_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("safepool")
    monkeypatch.setattr(logger, "filters", [Broken()])
    monkeypatch.setattr(contained, "has_handlers_elsewhere", lambda: False)
    contained.ContainedLogger().warning("text")
    assert "a filter of the program's" in capsys.readouterr().err
    monkeypatch.setattr(contained._errors, "handleError", Broken())
    contained.ContainedLogger().warning("text")


def test_a_logger_without_a_handler_is_heard_by_the_last_resort() -> None:
    assert contained._is_heard(logging.getLogger("apart of all"))


def test_levels_are_set_where_loggers_remember_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "root", SimpleNamespace())
    assert settings_table._glance_at_levels(logging) is None
    monkeypatch.undo()
    disabled = logging.root.manager.disable
    here = settings_table._Levels()
    here._watches = True
    try:
        here.apply(disabled, {"never.made": 10})
        assert here._waiting == {"never.made": 10}
        here.apply(disabled, {})
        assert here._waiting == {}
    finally:
        logging.disable(disabled)


# --- messages ----------------------------------------------------------------------------


def test_what_is_no_message_is_refused() -> None:
    assert messages.read_answers(b"short", 7, 3, pickle.loads) is None
    runner = object.__new__(Runner)
    with pytest.raises(RuntimeError, match="unexpected message"):
        runner._handle((Kind.RESULT, 0, []))  # type: ignore[arg-type]


def test_a_function_that_has_no_name_has_that_of_its_type() -> None:
    class Function:
        def __getattr__(self, name: str) -> Any:
            raise ValueError(name)

    told: list[str] = []
    runner: Any = object.__new__(Runner)
    runner._board = SimpleNamespace(tell=told.append)
    runner._tell(1, Function())
    assert told[0].endswith("Function")


def test_a_result_whose_file_is_refused_is_an_error_of_its_call() -> None:
    sent: list[bytes] = []
    here: Any = object.__new__(answers.Answers)
    here._outbox = Sent()
    here._send = lambda pieces: sent.append(b"".join(map(bytes, pieces)))
    here._send_large(1, Kind.RESULT, [b"x"])
    assert b"no room for a file" in sent[0]


def test_what_is_learnt_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preload, "_learned", {})
    monkeypatch.setattr(preload, "_MOST_LEARNED", 0)
    preload.learn(b"numpy\npytest")
    assert preload.modules_learned() == []


def test_an_import_outside_of_a_task_is_in_no_worker() -> None:
    assert not loading._in_a_worker(sys._getframe())


def test_a_directory_that_is_gone_has_no_path(tmp_path: Path) -> None:
    before = os.getcwd()
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    try:
        gone.rmdir()
        assert traces._directory() == ""
    finally:
        os.chdir(before)
    assert traces._directory() == before


# --- the source of __main__ --------------------------------------------------------------


def space_of(spec: object, path: object) -> dict[str, Any]:
    return {"__spec__": spec, "__file__": path}


# One row per program without a script of its own: its globals, and what is said.
NO_SCRIPT: dict[str, tuple[dict[str, Any], str]] = {
    "module of Python": (space_of(SimpleNamespace(loader=1, name="timeit"), None), "timeit"),
    "runner": (space_of(SimpleNamespace(loader=1, name="pytest.__main__"), None), "pytest"),
    "runner by its path": (space_of(None, "PATH/pytest.py"), "not the program's own"),
    "no file": (space_of(None, "PATH/gone.py"), "is not a file"),
    "no path": (space_of(None, None), "-c or standard input"),
}


@pytest.mark.parametrize("program", NO_SCRIPT)
def test_a_program_without_a_script_says_why(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, said = NO_SCRIPT[program]
    (tmp_path / "pytest.py").touch()
    path = space["__file__"]
    if path:
        space = {**space, "__file__": path.replace("PATH", str(tmp_path))}
    monkeypatch.setattr(plan, "main_space", lambda: space)
    monkeypatch.setattr(plan, "find_space", lambda: None)
    found = plan.plan_main("auto")
    assert found.mode == "value"
    assert said in found.because
    with pytest.raises(ValueError, match='main="run" runs the program'):
        plan.plan_main("run")


def test_a_prompt_has_no_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    assert "a prompt or a notebook" in plan.plan_main("auto").because
    with pytest.raises(ValueError, match="main must be"):
        plan.plan_main("other")


def test_what_is_compiled_has_no_source(tmp_path: Path) -> None:
    code = compile("x = 3", "script.py", "exec")
    compiled = tmp_path / "script.pyc"
    compiled.write_bytes(importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code))
    assert plan._source_of("", str(compiled)) is None
    assert plan._source_of("", str(tmp_path / "gone.py")) is None


# --- settings ----------------------------------------------------------------------------


def test_a_warning_filter_that_cannot_be_pickled_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Local(Warning):
        __module__ = "no_such_module"

    found = settings._dumps_filters([("ignore", None, Local, None, 0), warnings.filters[0]])
    assert len(found) == 1
    assert "workers do not have the warning filter" in caplog.text


def packed(name: str, module: str, value: object) -> settings.Packed:
    return settings.Packed(name, module, [[pickle.dumps(value)]], None)


def test_a_setting_that_cannot_be_set_is_said_or_waits(caplog: pytest.LogCaptureFixture) -> None:
    here = settings.WorkerSettings()
    here._set(packed("no row of the table", "sys", 3))
    here._set(packed("levels of loggers", "logging", "no levels"))
    assert "the setting levels of loggers of the program is not set" in caplog.text
    here._set(packed("levels of loggers", "no_such_module", 3))
    elsewhere = settings.Packed("other", "sys", [[b"cno_such_module\nx\n."]], None)
    here._set(elsewhere)
    assert {*here._waiting} == {"no_such_module"}


def test_a_module_of_the_interpreter_is_imported_for_its_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = settings.WorkerSettings()
    monkeypatch.setattr(here, "_there", lambda _: None)
    here._set(packed("no row of the table", "sys", 3))
    assert not here._waiting


def test_options_of_pandas_are_read_and_set_by_their_full_names() -> None:
    options = {"display": {"width": 80, "html": {"border": 1}}, "mode": {"copy": True}}
    done: list[tuple[str, object]] = []
    pandas = SimpleNamespace(
        options=SimpleNamespace(d=options), set_option=lambda *what: done.append(what)
    )
    read = settings_table._read_pandas(pandas)
    assert read == {"display.width": 80, "display.html.border": 1, "mode.copy": True}
    settings_table._write_pandas(pandas, {**read, "display.width": 100, "gone": 1})
    assert done == [("display.width", 100)]


def test_filters_of_warnings_are_those_that_count() -> None:
    module = SimpleNamespace(filters=[1])
    assert settings_table.filters_of(module) == [1]
    assert settings_table.filters_of(warnings) is not None


# --- start methods -----------------------------------------------------------------------


def test_a_start_method_does_nothing_by_itself() -> None:
    method, told = start.StartMethod(), start.WorkerStart(environment={}, threads=1)
    assert method.prints(told, ["x"], bool) == {}
    assert method.run_script(told, bool) == {}
    with pytest.raises(NotImplementedError):
        method.start(None, None, None, bool)  # type: ignore[arg-type]


def test_a_program_without_streams_has_some_for_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with standard._no_missing_streams():
        sys.stderr.write("something")
    assert sys.stderr is None


def test_the_pipe_that_loky_leaves_open_is_closed() -> None:
    pipes: list[int] = []

    def fork_exec() -> None:
        raise OSError(errno.EAGAIN, "no process")

    def _launch() -> None:
        parent_r, parent_w = os.pipe()
        pipes.extend((parent_r, parent_w))
        fork_exec()

    try:
        _launch()
    except OSError as error:
        standard._close_lost_pipe(error)
    os.close(pipes[0])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pipes[1])


if sys.platform == "linux":
    from safepool import linux, procfs
    from safepool.transport import letters
    from safepool.workers import asking, birth, fence, forked, identity, launch, lifeline, script
    from safepool.workers.server import _Server

    @pytest.fixture
    def child() -> Iterator[subprocess.Popen[bytes]]:
        """A process that runs until it is ended."""
        with subprocess.Popen(
            [sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE
        ) as one:
            yield one
            one.kill()

    def ended() -> int:
        """Return the number of a process of this one that has ended, and was waited for."""
        with subprocess.Popen([sys.executable, "-S", "-c", ""]) as one:
            one.wait()
            return one.pid

    def test_a_process_of_multiprocessing_is_signalled_without_a_descriptor_too(
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Before Linux 5.3, and where a filter refuses it."""
        monkeypatch.setattr(linux, "find_pidfd", lambda _: None)
        process: Any = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
        process.start()
        found = standard.StandardProcess(process)
        assert found.wait(0.0) is None
        found.signal(signal.SIGKILL)
        assert found.wait(60) == -signal.SIGKILL
        found.signal(signal.SIGKILL)
        found.close()
        assert not found.is_alive()

    def forked_process(pid: int, status: int) -> forked.ForkedProcess:
        return forked.ForkedProcess("a worker", pid, None, status)

    def test_a_process_whose_pipe_is_gone_has_no_exit_code() -> None:
        pid = ended()
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        process = forked_process(pid, reader)
        assert process.ident == pid
        assert process.is_alive()
        process.signal(signal.SIGKILL)  # nobody has the number
        assert repr(process) == f"<ForkedProcess name='a worker' pid={pid} exitcode=None>"
        os.close(reader)
        assert process.exitcode is None
        assert not process.is_alive()
        process._status = -1
        process.close()
        os.close(writer)

    def test_a_child_that_the_program_has_waited_for_is_lost(
        child: subprocess.Popen[bytes],
    ) -> None:
        reader, writer = os.pipe()
        process = forked.ChildProcess("a worker", child, reader, -1)
        assert not process._hear(0.0)
        child.returncode = None
        child.kill()
        child.wait()
        assert process.wait(60) is None
        process.close()
        os.close(writer)

    def test_a_keeper_says_how_its_server_ended_or_not(child: subprocess.Popen[bytes]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            found = launch.KeptServer(child, ours)
            with pytest.raises(subprocess.TimeoutExpired):
                found.wait(0.0)
            assert not found._hear()
            assert not found.has_ended()
            found.kill()
            child.returncode = None
            child.wait()
            found.kill()
            assert found.has_ended()
            assert found.returncode == 0
            found.close()

    def test_a_process_that_may_not_be_signalled_is_left_alone(
        child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tree.try_to_signal(ended(), signal.SIGTERM)
        stat = procfs.read_stat(child.pid)
        assert stat is not None
        one = tree.Descendant(child.pid, stat.started)
        assert tree.bury([one]) == {one}
        waitpid = os.waitpid

        def another_thread_waits(pid: int, options: int) -> tuple[int, int]:
            waitpid(pid, 0)
            return waitpid(pid, options)

        monkeypatch.setattr(os, "waitpid", another_thread_waits)
        child.kill()
        assert tree.bury([one]) == set()
        child.returncode = 0

    # --- the board ---

    def test_a_board_whose_descriptor_a_task_has_closed_says_nothing() -> None:
        made = board.Board.create()
        if not made:
            pytest.skip("this system gives no board")
        os.close(made.fileno())
        assert made.written == 0
        made.drop_faults()
        assert made.fault() == ""
        made.close()
        made.close()

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "a filter")

    def test_where_a_board_is_refused_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(board.os, "ftruncate", refuse)
        assert board.Board.create() is board.NO_BOARD

    def test_a_machine_without_the_barrier_has_no_board(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fence.os, "uname", lambda: SimpleNamespace(machine="none"))
        call = fence._membarrier.__wrapped__()
        assert call is None
        monkeypatch.setattr(fence, "_membarrier", lambda: call)
        assert not fence.has_barrier.__wrapped__()
        assert not fence.register()

    def test_a_life_line_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
        reader, writer = os.pipe()
        monkeypatch.setattr(linux, "F_SETSIG", -1)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match="Invalid argument"):
            lifeline.hold(reader)
        assert len(os.listdir("/proc/self/fd")) == before
        os.close(reader)
        os.close(writer)

    # --- the server ---

    @pytest.fixture
    def server() -> Iterator[tuple[_Server, socket.socket]]:
        """A server in this process, and the program's end of its socket."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            server = _Server(theirs, -1)
            yield server, ours
            server._wake_receiver.close()
            server._wake_sender.close()

    def said(ours: socket.socket) -> Any:
        found = letters.receive(ours)
        assert found is not None
        return found[0]

    def test_a_fork_whose_descriptors_did_not_all_come_is_refused(
        server: tuple[_Server, socket.socket],
    ) -> None:
        here, ours = server
        reader, writer = os.pipe()
        here._fork({"files": 3}, [reader, writer])
        assert said(ours) == ("refused", errno.EMFILE)
        for descriptor in (reader, writer):
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(descriptor)

    def test_a_server_with_threads_forks_nothing(server: tuple[_Server, socket.socket]) -> None:
        here, ours = server
        goes_on = threading.Event()
        thread = threading.Thread(target=goes_on.wait)
        thread.start()
        try:
            here._fork({"files": 1}, [os.open(os.devnull, os.O_RDONLY)])
            what, names = said(ours)
        finally:
            goes_on.set()
            thread.join()
        assert what == "threads"
        assert names

    def test_a_server_gives_up_the_programs_rights(
        server: tuple[_Server, socket.socket], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Or keeps them if it may not, and says which it has."""
        here, ours = server
        groups, group, user = os.getgroups(), os.getresgid(), os.getresuid()
        here._take_rights((groups, group, user))
        first = said(ours)
        monkeypatch.setattr(identity, "take", refuse)
        here._take_rights((groups, group, user))
        assert said(ours) == first == ("rights", (identity.rights(), identity.place()))

    def test_prints_that_no_fork_can_make_are_unknown(
        server: tuple[_Server, socket.socket], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here, _ = server
        here._forks = True
        reader, writer = os.pipe()
        monkeypatch.setattr(os, "fork", refuse)
        here._tell_prints(["x"], writer)
        with os.fdopen(reader, "rb") as file:
            assert file.read() == b""

    def test_a_worker_that_has_ended_is_no_orphan(
        server: tuple[_Server, socket.socket],
    ) -> None:
        here, _ = server
        process = subprocess.Popen([sys.executable, "-S", "-c", ""])
        status = os.open(os.devnull, os.O_WRONLY)
        here._workers[process.pid] = status
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        here._bury_orphans()
        here._reap()
        process.returncode = 0
        assert here._workers == {}

    class Unending:
        """Stands for a server in a system call that nothing ends."""

        returncode: int | None = None

        def poll(self) -> int | None:
            return self.returncode

        def wait(self, timeout: float) -> int:
            raise subprocess.TimeoutExpired("a server", timeout)

        def kill(self) -> None:
            """Have no effect."""

    def test_a_server_that_nothing_ends_is_left_to_itself() -> None:
        server: Any = object.__new__(asking.RunningServer)
        server._process, server._exits = Unending(), True
        server._sock, theirs = socket.socketpair()
        server.marks = None
        assert not server.ask_prints(["x"], -1)
        assert server.await_the_end() == "closed its socket"
        assert server.stop() == "did not answer and was ended"
        assert server._process.returncode == 0
        theirs.close()

    # --- the script ---

    def test_exit_functions_that_raise_keep_no_other(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        done: list[int] = []

        def fail() -> None:
            raise ValueError("at the exit")

        monkeypatch.setattr(script, "_at_exit", [lambda: done.append(1), fail])
        script.finish()
        assert done == [1]
        monkeypatch.setattr(threading, "_shutdown", fail)
        monkeypatch.setattr(birth.atexit, "_run_exitfuncs", lambda: done.append(2))
        birth._finish()
        assert done == [1, 2]
        assert capsys.readouterr().err.count("ValueError: at the exit") == 2

    def test_a_script_may_be_compiled_or_not_be_found(tmp_path: Path) -> None:
        code = compile("x = 3", "script.py", "exec")
        compiled = tmp_path / "script.pyc"
        compiled.write_bytes(importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code))
        assert script._code_of(str(compiled)) == code
        with pytest.raises(ImportError, match="no_such_script"):
            script._prepared(ModuleType("m"), "no_such_script", "", b"")

    def test_variables_that_are_held_cannot_be_deleted_twice(
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("SAFEPOOL_TEST_HELD", "1")
        with script._held({"SAFEPOOL_TEST_HELD": "1"}):
            del os.environ["SAFEPOOL_TEST_HELD"]
            with pytest.raises(KeyError):
                del os.environ["SAFEPOOL_TEST_HELD"]
            os.environ["SAFEPOOL_TEST_HELD"] = "2"
            os.environ["SAFEPOOL_TEST_OTHER"] = "3"
            del os.environ["SAFEPOOL_TEST_OTHER"]
        assert os.environ["SAFEPOOL_TEST_HELD"] == "1"

    def test_children_of_a_script_are_ended(child: subprocess.Popen[bytes]) -> None:
        script.end_children([child.pid, ended()])
        assert child.wait(60) == -signal.SIGTERM
