"""What this process and its family hold, before a test and after it.

A fixture that every test has, and what it is made of: a snapshot, and what is new since an
older one. A test whose module has a shared fixture set up is checked with the module: it may
be the shared pool that has started a worker.

Not covered:
    * An orphan that was started with an empty environment *and* left the process group:
      nothing ties it to this session any more.
    * Threads that no Python code runs in (OpenBLAS's, OpenMP's): a library keeps them for
      good once it is loaded.
    * Elsewhere than Linux: processes, descriptors and mappings. ``/proc`` is the source.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import secrets
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

# Inherited by every process that this session starts; a nested session appends its own
# mark, so that the outer one still recognises the inner one's orphans.
MARK_VARIABLE = "SAFEPOOL_TEST_SESSION"
MARK = f"{os.getpid()}-{secrets.token_hex(4)}"

# What ends by itself after a test: a reaped worker's thread, a helper whose pipe was closed.
# The sum of the pauses between looks, not a time on the clock: while the whole machine stands
# still, what is to end cannot end either.
GRACE_S = 2.0

# Without those for real-time use, of which there are many.
_SIGNALS = [one for one in signal.valid_signals() if isinstance(one, signal.Signals)]

ON_LINUX = sys.platform == "linux"

# The names that safepool and the libraries under it give to shared memory, one folder for
# all users and programs of the machine. In the session's own folder every name counts.
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_NAME = re.compile(r"(sem\.)?(joblib|loky|safepool|pymp|psm_)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Helper:
    """A process that a library keeps for good, one per program, and that is no leak.

    Attributes:
        module: Where the library keeps the one object that stands for it.
        holder: That object's name in the module.
        pid: The object's attribute that holds the process id.
        descriptors: Its attributes that hold this program's ends of the helper's pipes.
        why: Why the library may keep it.
    """

    module: str
    holder: str
    pid: str
    descriptors: tuple[str, ...]
    why: str


# Looked up in the library itself rather than by command line: a worker that was forked
# from multiprocessing's fork server has the server's command line.
HELPERS = (
    Helper(
        module="multiprocessing.resource_tracker",
        holder="_resource_tracker",
        pid="_pid",
        descriptors=("_fd",),
        why="one per program until exit; unlinks named shared memory",
    ),
    Helper(
        module="multiprocessing.forkserver",
        holder="_forkserver",
        pid="_forkserver_pid",
        descriptors=("_forkserver_alive_fd",),
        why="one per program until exit; the workers that it forked are not exempt",
    ),
    Helper(
        module="loky.backend.resource_tracker",
        holder="_resource_tracker",
        pid="_pid",
        descriptors=("_fd",),
        why="as multiprocessing's, for loky's semaphores and folders",
    ),
    Helper(
        module="joblib.externals.loky.backend.resource_tracker",
        holder="_resource_tracker",
        pid="_pid",
        descriptors=("_fd",),
        why="joblib carries a copy of loky, which has a tracker of its own",
    ),
    Helper(
        module="support_programs",
        holder="ZYGOTE",
        pid="pid",
        descriptors=("fd",),
        why="ours: what the tests' programs are forked from, until exit",
    ),
)

# How conftest.py names the thread that waits for a test's time limit; it ends with the test,
# after the last look.
TIMER = "time limit of "

# The reusable executors of joblib and loky outlive a test by design. A test that says so
# (`@pytest.mark.foreign_pools`) has them ended for it, and is then checked like any other.
REUSABLE_EXECUTORS = (
    "joblib.externals.loky.reusable_executor",
    "loky.reusable_executor",
)


# The library under ctypes keeps its own file open from the first call-back on, for good
# (libffi 3.5, src/tramp.c).
KEPT_FILE = re.compile(r"/libffi\.so[.0-9]*$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One row of ``/proc``.

    Attributes:
        pid: Its process id.
        parent: Process id of its parent; a dead parent's place is taken by an ancestor.
        group: Its process group.
        state: One letter, as in proc_pid_stat(5); ``Z`` is a zombie.
        command: Its command line, blanks between the arguments.
    """

    pid: int
    parent: int
    group: int
    state: str
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """One thing that is there and was not before.

    Attributes:
        what: The kind and the name, for the failing test's message.
        process: The process, where it is one.
    """

    what: str
    process: Process | None = None

    @property
    def key(self) -> str:
        """The same at every look, whatever a process does meanwhile."""
        return f"process {self.process.pid}" if self.process else self.what


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What there was at one moment.

    Attributes:
        pids: Every process of the machine: only younger ones have to be looked at later.
        threads: This process's threads that run Python, by their ident. ``None`` for one
            that :mod:`threading` did not start.
        descriptors: Open descriptors, and what each one leads to.
        memory_files: Mappings of unnamed memory files (``memfd_create``).
        names: Files and folders, in the temporary folder and in shared memory.
        handlers: This process's handlers of signals.
    """

    pids: frozenset[int]
    threads: dict[int, threading.Thread | None]
    descriptors: dict[int, str]
    memory_files: frozenset[str]
    names: frozenset[Path]
    handlers: dict[int, object]


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> None:
    """Note a fixture that the tests define for longer than one test."""
    # Without a base it is a plugin's, as pytest's own and those in this file.
    if fixturedef.scope != "function" and fixturedef.baseid:
        _SHARED_FIXTURES.add(fixturedef)


def pytest_fixture_post_finalizer(fixturedef: pytest.FixtureDef[object]) -> None:
    """Note its end."""
    _SHARED_FIXTURES.discard(fixturedef)


@pytest.fixture(autouse=True, scope="session")
def _the_session_leaves_nothing_behind() -> Iterator[None]:
    """Look for processes once more, when every fixture has ended."""
    before = frozenset(_every_pid())
    yield
    end_kept_pools()
    end_reusable_executors()
    _fail_for(_what_stays(lambda: _new_processes(before)), "the session left behind")


@pytest.fixture(autouse=True, scope="module")
def _the_module_leaves_nothing_behind() -> Iterator[None]:
    """Look again when the fixtures that a module's tests share have ended."""
    # What was imported and collected stays. The collector, which has a look after most tests,
    # need not look at that: a tenth of a second each time.
    gc.collect()
    gc.freeze()
    before = take_snapshot()
    yield
    if not _SHARED_FIXTURES:
        _fail_for(left_since(before), "the module left behind")


@pytest.fixture(autouse=True)
def _the_test_leaves_nothing_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test after which something is there that was not there before."""
    # The look after the last test is the one before this one, if nothing but tests came between.
    before = _LAST_LOOK.pop(request.node.parent, None) or take_snapshot()
    _LAST_LOOK.clear()
    yield
    end_kept_pools()
    if request.node.get_closest_marker("foreign_pools"):
        end_reusable_executors()
    # A pool that several tests share starts and replaces workers in any of them.
    if not _SHARED_FIXTURES:
        left, after = compare(before)
        _fail_for(left, "the test left behind")
        _LAST_LOOK[request.node.parent] = after


def _fail_for(left: list[Leak], title: str) -> None:
    if left:
        _CHARGED.update(leak.key for leak in left)
        kill([leak.process for leak in left if leak.process])
        pytest.fail(title + ":" + "".join(f"\n  {leak.what}" for leak in left), pytrace=False)


def take_snapshot() -> Snapshot:
    """Look once. Costs about a millisecond."""
    return Snapshot(
        pids=frozenset(_every_pid()),
        threads=_threads(),
        descriptors=_descriptors(),
        memory_files=_memory_files(),
        names=frozenset(_names()),
        handlers={number: signal.getsignal(number) for number in _SIGNALS},
    )


def left_since(before: Snapshot) -> list[Leak]:
    """Name what is new since ``before`` and stays, once garbage and stragglers are gone."""
    return compare(before)[0]


def compare(before: Snapshot) -> tuple[list[Leak], Snapshot]:
    """Do the same, and return the last look too."""
    after = before

    def look() -> Iterator[Leak]:
        nonlocal after
        after = take_snapshot()
        return _new_since(before, after)

    return _what_stays(look), after


def shared_names() -> frozenset[Path]:
    """List the names in shared memory, which all programs of the machine share."""
    return frozenset(name for name in _names() if name.parent == SHARED_MEMORY)


def names_since(before: frozenset[Path]) -> list[Leak]:
    """Name those that are new and stay, whoever of this session made them."""
    return _what_stays(
        lambda: (
            Leak(what=f"name {name}")
            for name in shared_names() - before
            if not _is_someone_elses(name)
        )
    )


def _what_stays(look: Callable[[], Iterator[Leak]]) -> list[Leak]:
    """Look once; only when something is found, collect garbage and wait for it to go."""
    waited_s = 0.0
    pause_s = 0.005
    while (found := _uncharged(look())) and waited_s < GRACE_S:
        # Each time: a thread that just ended may have held a cycle until now.
        gc.collect()
        time.sleep(pause_s)
        waited_s += pause_s
        pause_s = min(2 * pause_s, 0.1)
    return found


def _uncharged(found: Iterator[Leak]) -> list[Leak]:
    return [leak for leak in found if leak.key not in _CHARGED]


def end_kept_pools() -> None:
    """End the pools that our joblib backend keeps from one call, or block, to the next.

    Their tasks are waited for: one that does not end is a leak all the same.
    """
    pools = sys.modules.get("safepool.joblib_pools")
    if pools is not None:
        pools.SHARED.close(end=False)


def end_reusable_executors() -> None:
    """End the executors that joblib and loky keep from one call to the next."""
    for name in REUSABLE_EXECUTORS:
        executor = getattr(sys.modules.get(name), "_executor", None)
        if executor is None:
            continue
        # joblib's own subclass removes its memory-mapping folder in `terminate`.
        end = getattr(executor, "terminate", executor.shutdown)
        end(kill_workers=True)


def kill(processes: list[Process]) -> None:
    """Kill these processes, so that they neither disturb later tests nor outlive the run."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, signal.SIGKILL)


def family(*, apart_from: frozenset[int] = frozenset()) -> list[Process]:
    """List every process that this session started, orphans included, helpers too.

    Args:
        apart_from: Process ids that are not looked at.
    """
    if not ON_LINUX:
        return []
    own_group = os.getpgrp()
    known: dict[int, Process | None] = {}

    def look(pid: int) -> Process | None:
        if pid not in known:
            known[pid] = _read_process(pid)
        return known[pid]

    def belongs(process: Process) -> bool:
        ancestor: Process | None = process
        while ancestor is not None and ancestor.parent > 1:
            if ancestor.parent == os.getpid():
                return True
            ancestor = look(ancestor.parent)
        if process.state == "Z":
            # Dead, and not ours to reap: it waits for whoever adopted it.
            return False
        # The environment shows what a process was started with by exec. One that was only
        # forked shows its parent's; its process group tells. The rest of a pipeline is in
        # the group too (`pytest | tail`), but was there before; and what a shell in the
        # group starts later has a parent in the group, which an orphan has not. Nor has one of
        # another session there (`pytest a & pytest b`), but it has that one's mark.
        mark = _initial_mark(process.pid)
        if MARK in mark:
            return True
        if process.pid in _PRESENT_AT_START or mark not in ("", _OWN_INITIAL_MARK):
            return False
        parent = look(process.parent)
        return process.group == own_group and (parent is None or parent.group != own_group)

    candidates = (look(pid) for pid in _every_pid() - apart_from - {os.getpid()})
    return [process for process in candidates if process is not None and belongs(process)]


def stacks(*, apart_from: int | None = None) -> str:
    """Tell where every thread of this process is.

    Args:
        apart_from: Ident of a thread to leave out.
    """
    by_ident = {thread.ident: thread.name for thread in threading.enumerate()}
    return "".join(
        f"~~~ {by_ident.get(ident, 'a thread that threading did not start')} ({ident})\n"
        + "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
        if ident != apart_from
    )


def describe(process: Process) -> str:
    """Name a process in one line."""
    zombie = process.state == "Z"
    state = "a zombie that nobody waited for" if zombie else f"state {process.state}"
    return f"process {process.pid} ({state}, parent {process.parent}): {process.command}"


def _new_since(before: Snapshot, after: Snapshot) -> Iterator[Leak]:
    yield from _new_processes(before.pids)
    yield from _new_threads(before)

    _, helper_descriptors = _helpers()
    for number, target in after.descriptors.items():
        known = before.descriptors.get(number) == target or number in helper_descriptors
        if not known and not KEPT_FILE.search(target):
            yield Leak(what=f"file descriptor {number}: {target}")

    for mapping in after.memory_files - before.memory_files:
        yield Leak(what=f"mapped memory file {mapping}")

    for name in after.names - before.names:
        if not _is_someone_elses(name):
            yield Leak(what=f"name {name}")

    for number, handler in after.handlers.items():
        if handler is not before.handlers[number]:
            yield Leak(what=f"handler of {signal.Signals(number).name}: {handler}")


def _new_processes(known: frozenset[int]) -> Iterator[Leak]:
    helper_pids, _ = _helpers()
    for process in family(apart_from=known):
        if process.pid not in helper_pids:
            yield Leak(what=describe(process), process=process)


def _new_threads(before: Snapshot) -> Iterator[Leak]:
    frames = sys._current_frames()
    for ident, thread in _threads().items():
        known = ident in before.threads and before.threads[ident] is thread
        # A dummy stands for a foreign thread that once called into Python; it never ends.
        if known or isinstance(thread, threading._DummyThread):
            continue
        if thread is None or not thread.name.startswith(TIMER):
            yield Leak(what=_describe_thread(ident, thread, frames.get(ident)))


def _describe_thread(ident: int, thread: threading.Thread | None, frame: FrameType | None) -> str:
    name = repr(thread.name) if thread else f"{ident}, which threading did not start"
    daemon = " (daemon)" if thread and thread.daemon else ""
    place = f", in {frame.f_code.co_qualname} ({frame.f_code.co_filename})" if frame else ""
    return f"thread {name}{daemon}{place}"


def _held_by(servers: Any) -> list[int]:
    """Return what this process keeps open for fork servers and their workers."""
    if hasattr(servers, "descriptors"):
        found: list[int] = servers.descriptors()
        return found
    running = [one.running for one in [*servers._servers.values()] if one.running is not None]
    sockets = [one._sock for one in (*running, *servers.launch._kept)]
    return [*servers.launch.line, *(sock.fileno() for sock in sockets)]


def _helpers() -> tuple[set[int], set[int]]:
    pids: set[int] = set()
    descriptors: set[int] = set()
    for name in ("safepool.workers.forkserver", "safepool.workers.capped_server"):
        # One for each setting, until exit: the next pool starts in milliseconds.
        servers = sys.modules.get(name)
        if servers is not None:
            pids.update(servers.running())
            pids.update(getattr(servers, "keepers", list)())
            descriptors.update(_held_by(servers))
    for row in HELPERS:
        holder = getattr(sys.modules.get(row.module), row.holder, None)
        pids.add(getattr(holder, row.pid, None) or 0)
        descriptors |= {getattr(holder, name, None) or 0 for name in row.descriptors}
    # 0 stands for a helper that does not run. It is nobody's process id, but a descriptor.
    return pids, descriptors - {0}


def _every_pid() -> set[int]:
    if not ON_LINUX:
        return set()
    return {int(name) for name in os.listdir("/proc") if name.isdecimal()}


def _read_process(pid: int) -> Process | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return None
    # The name stands in parentheses and may hold any character, a parenthesis too.
    name, _, rest = stat.partition("(")[2].rpartition(") ")
    state, parent, group, *_ = rest.split()
    words = command.replace(b"\0", b" ").decode(errors="replace").strip()
    return Process(
        pid=pid, parent=int(parent), group=int(group), state=state, command=words or f"[{name}]"
    )


def _initial_mark(pid: int) -> str:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return ""
    prefix = f"{MARK_VARIABLE}=".encode()
    return next(
        (entry.decode() for entry in environment.split(b"\0") if entry.startswith(prefix)), ""
    )


def _threads() -> dict[int, threading.Thread | None]:
    # Not only `threading.enumerate()`: it misses what `_thread.start_new_thread` started.
    named = {thread.ident: thread for thread in threading.enumerate()}
    return {ident: named.get(ident) for ident in sys._current_frames()}


def _descriptors() -> dict[int, str]:
    found: dict[int, str] = {}
    if not ON_LINUX:
        return found
    for number in os.listdir("/proc/self/fd"):
        # The listing's own descriptor is closed by now.
        with contextlib.suppress(FileNotFoundError):
            found[int(number)] = os.readlink(f"/proc/self/fd/{number}")
    return found


def _memory_files() -> frozenset[str]:
    if not ON_LINUX:
        return frozenset()
    # proc_pid_maps(5): address, permissions, offset, device, inode, path.
    lines = Path("/proc/self/maps").read_text(errors="replace")
    if "/memfd:" not in lines:
        return frozenset()
    return frozenset(
        f"{columns[5]} (inode {columns[4]})"
        for line in lines.splitlines()
        if len(columns := line.split(maxsplit=5)) == 6 and columns[5].startswith("/memfd:")
    )


def _names() -> Iterator[Path]:
    for folder in (Path(tempfile.gettempdir()), SHARED_MEMORY):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            for name in os.listdir(folder):
                if folder != SHARED_MEMORY or SHARED_MEMORY_NAME.match(name):
                    yield folder / name


def _is_someone_elses(name: Path) -> bool:
    if name.parent != SHARED_MEMORY:
        # multiprocessing makes one folder per program, and removes it at exit.
        process = sys.modules.get("multiprocessing.process")
        config = getattr(getattr(process, "_current_process", None), "_config", {})
        return str(name) == config.get("tempdir")
    # tqdm keeps one lock for the program. Its semaphore has a name until exit where
    # multiprocessing does not fork (Python 3.14).
    kept = getattr(sys.modules.get("tqdm.std"), "TqdmDefaultWriteLock", None)
    semaphore = getattr(getattr(kept, "mp_lock", None), "_semlock", None)
    if semaphore is not None and name.name == f"sem.{str(semaphore.name).lstrip('/')}":
        return True
    # joblib and loky write the maker's process id into the name.
    numbers = {int(number) for number in re.findall(r"(?<=[-_])\d+(?=[-_])", name.name)}
    alive = {number for number in numbers if _read_process(number) is not None}
    if alive:
        return alive.isdisjoint({os.getpid(), *(process.pid for process in family())})
    # Its maker has ended, or the name is multiprocessing's, without a process id: nothing tells
    # whose it is where two sessions of these tests share a machine, or two processes this run.
    return run_is_shared or _another_session_runs()


def _another_session_runs() -> bool:
    ours = {MARK, *os.environ.get(MARK_VARIABLE, "").split()}
    marks = (set(_initial_mark(pid).partition("=")[2].split()) for pid in _every_pid())
    return any(theirs and theirs.isdisjoint(ours) for theirs in marks)


# The session's state. The keys of leaks that a test has failed for: nothing fails twice.
_CHARGED: set[str] = set()

# Whether other processes run tests of the same run; conftest.py tells.
run_is_shared = False

# Fixtures that are set up, and belong to more than one test.
_SHARED_FIXTURES: set[pytest.FixtureDef[object]] = set()

# What there was after the last test, by the module or class whose tests it is between.
_LAST_LOOK: dict[object, Snapshot] = {}

# That of a session around this one, if any: what is forked here shows it.
_OWN_INITIAL_MARK = _initial_mark(os.getpid())

# The processes of the machine when this session began.
_PRESENT_AT_START = frozenset(_every_pid())
