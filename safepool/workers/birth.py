"""From a fresh fork of the server to a worker like any other, and to its end.

What a worker would have inherited, had the program itself started it, is set here: directory,
environment, path, streams, mask, priority. And what must differ from worker to worker: the
state of random number generators.
"""

from __future__ import annotations

import atexit
import io
import itertools
import os
import resource
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Sequence
from multiprocessing import process, resource_tracker
from typing import Any

from safepool import linux
from safepool.transport import marks
from safepool.workers import lifeline, off_path, script
from safepool.workers.fork import code_of, flush
from safepool.workers.main import be_worker

assert sys.platform == "linux"


def be_born(details: dict[str, Any], line: int, own: Sequence[int]) -> int:
    """Run as a worker until the pool sends a stop; return the exit code.

    The details are ``launch._circumstances``, and the pool's own entries. ``line`` is the reading
    end of the life-line, ``own`` what else this worker gets.
    """
    folder, out, err, tracker, channel, *more = own
    board = more.pop(0) if details["board"] else None
    server = os.getppid()
    try:
        line = lifeline.hold(line)
    except OSError:
        end_with(server)  # which ends with the program
    run = details.get("run")
    if run:
        problem = run_script({**details, **run}, line, os.dup(folder), tracker)["problem"]
        if problem:
            raise RuntimeError(f"the script cannot be run in this worker: {problem}")
    _set_streams(out, err)
    _inherit(details, folder)
    if not details["script"]:
        # The server's ``-c`` text is not the program's ``__main__``.
        sys.modules["__main__"] = types.ModuleType("__main__")
        marks.alias_main()
    _draw_other_numbers()
    _be_a_child(details, line, tracker)
    script.be_worker()
    try:
        be_worker(socket.socket(fileno=channel), board, details["told"], more)
    except BaseException as error:  # noqa: BLE001 -- as the interpreter itself reports it
        code = code_of(error)
    else:
        code = 0
    _finish()
    if run:
        script.finish()
    return code


def run_script(details: dict[str, Any], line: int, folder: int, tracker: int) -> dict[str, Any]:
    """Run the program's script in this process, which has the state of a child."""
    known: Any = process
    known.ORIGINAL_DIR = details["original_dir"]
    _go(details, folder)
    _be_a_child(details, line, tracker)
    name, path, held = details["module"], details["file"], details["changes"]
    with script.silence():
        return script.run_script(name, path, held, details["code"])


def end_with(parent: int) -> None:
    """End with the parent, which has one thread and starts no other program."""
    import ctypes  # noqa: PLC0415

    # prctl(2), PR_SET_PDEATHSIG = 1: of the thread, which is all that the parent has.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _set_streams(out: int, err: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for wanted, number in ((nothing, 0), (out, 1), (err, 2)):
        os.dup2(wanted, number)
    for descriptor in {nothing, out, err} - {0, 1, 2}:
        os.close(descriptor)
    # Written by lines where a person looks on, as at the start of an interpreter.
    if isinstance(sys.stdout, io.TextIOWrapper):  # or the script has replaced it
        sys.stdout.reconfigure(line_buffering=os.isatty(1))


def _inherit(details: dict[str, Any], folder: int) -> None:
    _go(details, folder)
    for name, limit in details["limits"].items():
        if limit is not None and linux.limit_of(name) != limit:
            _try(resource.setrlimit, getattr(resource, name), limit)
    nice, cpus = details["nice"], set(details["told"].cpus) or details["affinity"]
    if nice is not None and linux.asked(os.getpriority, os.PRIO_PROCESS, 0) != nice:
        _try(os.setpriority, os.PRIO_PROCESS, 0, nice)
    if cpus is not None and linux.asked(os.sched_getaffinity, 0) != cpus:
        _try(os.sched_setaffinity, 0, cpus)


def _go(details: dict[str, Any], folder: int) -> None:
    try:
        os.fchdir(folder)
    except OSError:
        pass  # the program is in a directory that it may not enter
    os.close(folder)
    wanted, now = details["environ"], dict(os.environ)
    if wanted != now:
        # Only the differences: each variable that is set costs copies of shared pages.
        for name in now.keys() - wanted.keys():
            del os.environ[name]
        for name, value in wanted.items():
            if now.get(name) != value:
                os.environ[name] = value
        if wanted.get("TZ") != now.get("TZ"):
            time.tzset()
    sys.path[:] = details["path"]
    off_path.find_modules(details["off_path"])
    sys.argv[:] = details["argv"]
    sys.setrecursionlimit(details["recursion"])
    if details["umask"] is not None:
        _try(os.umask, details["umask"])


def _draw_other_numbers() -> None:
    # Python's own generator reseeds itself after a fork; NumPy's legacy one does not, and
    # every worker would draw the same numbers.
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()


def _be_a_child(details: dict[str, Any], line: int, tracker_descriptor: int) -> None:
    """Look like a child of ``multiprocessing``: programs ask whether they run in one."""
    known: Any = process
    child: Any = process.BaseProcess(name=details["name"])
    child._identity = details["identity"]
    child._parent_pid = details["parent"]
    child._config = {"authkey": known.AuthenticationString(details["authkey"]), "semprefix": "/mp"}
    child._popen = None
    known._current_process = child
    known._process_counter = itertools.count(1)  # for its own children
    # The life-line turns readable when the program is gone, as this sentinel should.
    known._parent_process = known._ParentProcess(details["parent_name"], details["parent"], line)
    threading.current_thread().name = "MainThread"
    tracker: Any = resource_tracker
    tracker._resource_tracker._fd = tracker_descriptor


def _finish() -> None:
    """Do the steps of an interpreter's end that concern the program."""
    known: Any = threading
    for step in (known._shutdown, getattr(atexit, "_run_exitfuncs")):  # noqa: B009 -- not in the stubs
        try:
            step()
        except BaseException as error:  # noqa: BLE001 -- the rest is to be done as well
            sys.excepthook(type(error), error, error.__traceback__)
    flush(sys.stdout, sys.stderr)


def _try(call: Any, *arguments: Any) -> None:
    try:
        call(*arguments)
    except (OSError, ValueError):
        pass  # not allowed to the server any more, or to this user
