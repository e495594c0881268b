"""The program's script, run once in the fork server for all workers.

The run is that of the standard library's ``spawn`` and ``forkserver``: as ``__mp_main__``, in a
process that is a child of ``multiprocessing``, with the program's arguments, path, directory and
environment. The script's imports, settings, registrations and data exist once, and all workers
share them.

    Unlike there, functions of the script and ``sys.modules["__main__"]`` have one namespace, so
    that functions see a global that a worker receives.

    Exit functions run once, when the server ends, and in no worker: they would remove folders that
    all workers use.

The server lives on only if a fork of it can work: no exception, no thread, no child process that
stays. Otherwise the reason is reported, and the program starts another server without the script.

Source: Python, Lib/multiprocessing/spawn.py, ``_fixup_main_from_name`` and ``_from_path``.

Not covered:
    * Writing of files, sending of messages and deletion of files at the top level: they are
      repeated once for each server, as under ``spawn``, and belong below the guard.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.machinery
import importlib.util
import io
import logging
import marshal
import os
import pickle
import signal
import sys
import time
import types
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from safepool import procfs
from safepool.errors import text_of
from safepool.transport.fingerprints import ABSENT, fingerprint
from safepool.transport.marks import find_attribute, marks_of
from safepool.workers import loading
from safepool.workers.describe import trace_of
from safepool.workers.fork import flush

assert sys.platform == "linux"

# Time for the script's own classes to be pickled.
_PRINTS_S = 30.0
# For processes that it has started, between SIGTERM and SIGKILL.
_ENDING_S = 1.0


# Exit functions of the script.
_at_exit: list[Callable[[], object]] = []
# And with which signals.
_handlers: dict[signal.Signals, Any] = {}


def run_script(
    name: str, path: str, held: Mapping[str, str | None], code: bytes = b""
) -> dict[str, Any]:
    """Run the program's script in this process, and return a report.

    Directory, environment, path and arguments are those of the program by now.

    Args:
        name: The module, as for ``python -m``; ``""`` if it is a file.
        path: The file.
        held: Variables that the script cannot change: the caps on native threads.
        code: Code that was run first; the file may have been changed since.
    """
    server = os.getpid()
    module = types.ModuleType("__mp_main__")
    problem, trace, begin = "", "", time.monotonic()
    before = {key: sys.modules.get(key) for key in ("__main__", "__mp_main__")}
    others = _children()  # started by a start file of every interpreter
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module
    _share_loggers()
    with _as_imported(), _held(held), _exits_kept(module):
        try:
            prepared = _prepared(module, name, path, code)
            code = marshal.dumps(prepared)
            exec(prepared, vars(module))
        except BaseException as error:  # noqa: BLE001 -- user code; SystemExit too
            problem = _described(error, path or str(getattr(module, "__file__", "")))
            trace = trace_of(error, _frames_of(error))
    if os.getpid() != server:  # a fork of the script's own has come to its end
        _flush()
        os._exit(0)
    seconds = time.monotonic() - begin
    _flush()
    problem = loading.asked_for or problem
    children = {pid: told for pid, told in _children().items() if pid not in others}
    if children and not problem:
        problem = f"it starts a process that stays ({', '.join(children.values())})"
    marks: dict[str, bytes] = {}
    if problem:
        end_children(children)
        sys.modules.update({key: found for key, found in before.items() if found is not None})
    else:
        marks = marks_of(module)
    return {
        "problem": problem,
        "trace": trace,
        "seconds": seconds,
        "marks": marks,
        "exits": bool(_at_exit),
        "code": code,
    }


def be_worker() -> None:
    """Handle signals as the script wants it, in a worker."""
    for number, handler in _handlers.items():
        signal.signal(number, handler)


def finish() -> None:
    """Run the script's exit functions, in the server that has run the script."""
    while _at_exit:
        try:
            _at_exit.pop()()
        except BaseException as error:  # noqa: BLE001 -- user code; the rest is to be done as well
            sys.excepthook(type(error), error, error.__traceback__)


def tell_prints(names: list[str], pipe: int) -> None:
    """Write fingerprints of the script's globals, in a process that does nothing else.

    Args:
        names: Names of the globals, and paths to attributes of its functions and classes.
        pipe: Pipe that the program reads (``upkeep``). The content may end early: this process
            ends after half a minute, or by code of the script.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, _PRINTS_S)
    with open(pipe, "wb", buffering=0) as file:
        for name in names:
            found = find_attribute(name)
            print_ = fingerprint(*found) if found else ABSENT
            file.write(pickle.dumps((name, print_), protocol=5))
    signal.setitimer(signal.ITIMER_REAL, 0)


def _prepared(module: types.ModuleType, name: str, path: str, known: bytes) -> types.CodeType:
    """Return the script's code, and prepare the module for its run."""
    spec: Any = None
    if name:
        parent = name.rpartition(".")[0]
        if parent:
            importlib.import_module(parent)
            spec = importlib.util.find_spec(name)
        else:
            # find_spec() is not used: ``__main__`` of a folder or a zip file is the script here,
            # too.
            spec = importlib.machinery.PathFinder.find_spec(name, sys.path)
        loader = None if spec is None else spec.loader
        code = marshal.loads(known) if known else loader and loader.get_code(name)
        if spec is None or code is None:
            raise ImportError(f"cannot find the code of {name}")
        file = spec.origin
    else:
        code, file = marshal.loads(known) if known else _code_of(path), path
    vars(module).update(
        __file__=file,
        __spec__=spec,
        __loader__=None if spec is None else spec.loader,
        __package__="" if spec is None else spec.parent,
        __cached__=None if spec is None else spec.cached,
        __builtins__=__builtins__,
    )
    found: types.CodeType = code
    return found


def _code_of(path: str) -> types.CodeType:
    with io.open_code(path) as file:
        data = file.read()
    if data[:4] == importlib.util.MAGIC_NUMBER:
        code: types.CodeType = marshal.loads(data[16:])  # importlib/_bootstrap_external.py
        return code
    return compile(data, path, "exec", dont_inherit=True)


def _share_loggers() -> None:
    """Make ``getLogger(__name__)`` of the script return the program's logger ``__main__``.

    The program's settings for that name apply, and handlers and filters see it in the records.
    """
    manager: Any = logging.root.manager
    get_logger = manager.getLogger

    def get(name: str) -> logging.Logger:
        if isinstance(name, str) and name.partition(".")[0] == "__mp_main__":
            name = name.replace("__mp_main__", "__main__", 1)
        found: logging.Logger = get_logger(name)
        return found

    manager.getLogger = get


@contextmanager
def _as_imported() -> Iterator[None]:
    """Refuse pools and processes of ``multiprocessing`` meanwhile; keep the server's signals."""
    from multiprocessing import process  # noqa: PLC0415 -- for the time of a run

    kind: Any = process.BaseProcess
    start = kind.start

    def refuse(self: object) -> None:
        loading.refuse(f"it starts a process of multiprocessing ({type(self).__name__})")

    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    known: Any = process.current_process()
    kind.start, loading.script_is_run, known._inheriting = refuse, True, True
    try:
        yield
    finally:
        kind.start, loading.script_is_run = start, False
        known._inheriting = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            own = signal.getsignal(number)
            if handler is not None and own is not None and own is not handler:
                _handlers[number] = own
                signal.signal(number, handler)


@contextmanager
def _exits_kept(module: types.ModuleType) -> Iterator[None]:
    """Keep for :func:`finish` the exit functions of the script, but not those of libraries.

    Exit functions of objects that it has made are kept too: temporary folders remove themselves.
    """
    from multiprocessing import util  # noqa: PLC0415 -- for the time of a run

    registry: Any = vars(weakref.finalize)["_registry"]
    of_util: Any = util
    before, register = {*registry}, atexit.register
    of_util_before = {*of_util._finalizer_registry}

    def keep(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        if sys._getframe(1).f_globals is not vars(module):
            return register(function, *args, **kwargs)
        _at_exit.append(functools.partial(function, *args, **kwargs))
        return function

    atexit.register = keep
    try:
        yield
    finally:
        atexit.register = register
        for finalizer in [*registry]:
            if finalizer not in before and finalizer.atexit:
                finalizer.atexit = False
                _at_exit.append(finalizer)
        # Locks and queues of multiprocessing; they look themselves whose process it is.
        if not of_util_before.issuperset(of_util._finalizer_registry):
            _at_exit.append(of_util._run_finalizers)


@contextmanager
def _held(held: Mapping[str, str | None]) -> Iterator[None]:
    """Keep some variables unchanged by the script: modules that it imports read them."""
    environ: Any = os.environ
    kind: Any = type(environ)
    before = {key: environ[key] for key in held if key in environ}

    class Held(kind):  # type: ignore[misc]
        def __setitem__(self, key: str, value: str) -> None:
            if key not in held:
                super().__setitem__(key, value)

        def __delitem__(self, key: str) -> None:
            if key not in held:
                super().__delitem__(key)
            elif self._data.pop(self.encodekey(key), None) is None:  # C code still finds it
                raise KeyError(key)

    environ.__class__ = Held
    try:
        yield
    finally:
        environ.__class__ = kind
        environ.update(before)


def _described(error: BaseException, path: str) -> str:
    """Return the script's exception, and the line that raised it."""
    if isinstance(error, loading.AskedForPoolError):
        return text_of(error)
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    where = f"line {line} of its top level" if line else "it"
    return f"{where} raises {type(error).__name__}: {text_of(error)}"


def _frames_of(error: BaseException) -> types.TracebackType | None:
    """Return the frames of an exception without those of this module."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_globals is globals():
        frames = frames.tb_next
    return frames


def _children() -> dict[int, str]:
    """Return the processes that this one has started and that run: by their number, in words."""
    pids = [pid for one in procfs.threads() for pid in procfs.children(f"self/task/{one}")]
    found = {pid: procfs.read_stat(pid) for pid in pids}
    return {pid: f"{stat.name} {pid}" for pid, stat in found.items() if stat and stat.state != "Z"}


def end_children(children: Collection[int]) -> None:
    """End processes that the script, or an import, has started: no other process knows them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in children:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass
        end = time.monotonic() + _ENDING_S
        while _children().keys() & set(children) and time.monotonic() < end:
            time.sleep(0.01)


@contextmanager
def silence() -> Iterator[None]:
    """Suppress the output of imports: the program has printed it already."""
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        _flush()  # or each worker would write it once more
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _flush() -> None:
    """Flush the output, so that no fork prints it again."""
    flush(*{sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__})
    import ctypes  # noqa: PLC0415

    ctypes.CDLL(None).fflush(None)  # what C code has printed
