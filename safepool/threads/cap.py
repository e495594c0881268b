"""Cap the native thread pools that are loaded in this process, and those that will be.

A worker is capped in three layers, because none of them reaches everything:

    environment   set before the interpreter starts; read by a library when it is loaded.
                  Some pools have no variable, and a forked worker has them loaded already.
    initializer   what is loaded by then, before the user's and after it. What a task
                  imports later it cannot know.
    each task     a look at the loader's list; capped again if it has grown. In between, a
                  task's own imports are met as they end (``imports``).

Not covered:
    * OpenMP and MKL in another thread: their run-time cap is one of the calling thread
      alone (OpenMP 5.2, section 2.4, nthreads-var). A worker runs its tasks in the thread
      that was capped; for threads that a task starts the variables count, so in a worker
      that was forked from a process with these libraries loaded they are not capped.
    * A task that raises a cap itself: the number stays until something new is loaded.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from safepool.threads.environment import (
    change_environment,
    runtime_threads,
    worker_environment,
)
from safepool.threads.imports import AfterImport, imported
from safepool.threads.libraries import LoadedLibraries
from safepool.threads.registry import call_of, modules_to_cap, runtimes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import ModuleType

    from safepool.threads.calls import Call
    from safepool.threads.table import NativeRuntime

__all__ = ["WorkerCap", "apply_again", "cap_worker", "capped", "find_ahead"]


class WorkerCap:
    """The caps of this process for the rest of its life as a worker.

    Attributes:
        threads: Threads for each native pool.
    """

    def __init__(self, threads: int, environment: Mapping[str, str | None]) -> None:
        """Decide the caps; :meth:`apply` sets them.

        Args:
            threads: Threads for each native pool, at least 1.
            environment: What the worker was born with: where the user has set a variable,
                its runtime follows it.
        """
        self.threads = threads
        self._environment = environment
        self._of: dict[str, int] = {}
        self._native = _found or _NativeLibraries()
        self._imports = AfterImport(self._cap_new)

    def apply(self) -> None:
        """Cap everything that is loaded, and watch what will be."""
        self._of = runtime_threads(self.threads, self._environment)
        _try(self._native.set, lambda name: self._of.get(name, self.threads))
        self._cap_imported()
        self._imports.start(modules_to_cap())

    def recheck(self) -> None:
        """Cap again if a library was loaded since. 0.1 microseconds if none was."""
        if self._native.changed():
            self.apply()

    def _cap_imported(self) -> None:
        for row, call, module in _imported_runtimes():
            _try(call.write, module, self._of.get(row.name, self.threads))

    def _cap_new(self, name: str, module: ModuleType) -> None:
        for row, call in _brought_by(name):
            _try(call.write, module, self._of.get(row.name, self.threads))
        # Importing blosc2 sets NumExpr to all CPUs; others may do the like.
        self._cap_imported()


_worker_cap: WorkerCap | None = None
_found: _NativeLibraries | None = None


def find_ahead() -> None:
    """Find what is loaded here, for workers that are forked from this process.

    It takes milliseconds, most of a worker's start. Nothing is set, and the libraries are
    asked for nothing but their names and versions.
    """
    global _found  # noqa: PLW0603 -- a fact about the process
    _found = _NativeLibraries()
    _try(_found.find)


def cap_worker(threads: int, environment: Mapping[str, str | None] | None = None) -> WorkerCap:
    """Cap every native pool of this process for the rest of its life as a worker.

    Args:
        threads: Threads for each pool, at least 1.
        environment: The changes that the worker was born with, which the caps follow where
            the user has set a variable. ``None`` is :func:`worker_environment`.

    Returns:
        The cap, to be checked again before each task.
    """
    global _worker_cap, _blocks, _shared_libraries  # noqa: PLW0603 -- facts about the process
    # A forked worker has its parent's, and the locks may be held by threads that it has not.
    _blocks, _shared_libraries = _Blocks(), _NativeLibraries()
    if environment is None:
        environment = worker_environment(threads)
    _worker_cap = WorkerCap(threads, environment)
    _worker_cap.apply()
    return _worker_cap


def apply_again() -> None:
    """Cap what is loaded once more, if this process is a worker: a row was added."""
    if _worker_cap is not None:
        _worker_cap.apply()


@contextmanager
def capped(threads: int) -> Iterator[None]:
    """Hold native pools at ``threads`` inside the block, then restore what was loaded before.

    A library that is first imported inside the block is capped when it has been imported,
    and keeps to it afterwards. In a block within a block, or beside one in another thread,
    the number of the last one to begin holds for what belongs to the whole process.

    Args:
        threads: Threads for each pool, at least 1. In a worker that is capped to the same
            number already, the block costs next to nothing.

    Example:
        >>> with capped(1):
        ...     pass
    """
    if _worker_cap is not None and _worker_cap.threads == threads:
        _worker_cap.recheck()
        yield
        return
    with _blocks.holding(threads), _shared_libraries.limited_to(threads):
        yield


class _NativeLibraries:
    """What threadpoolctl caps: found once, and looked for again when something was loaded."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._libraries: LoadedLibraries | None = None
        self._controller: Any = None
        # While blocks are open: their numbers, and what belonged to the process before.
        self._inside: list[int] = []
        self._before: dict[str, tuple[Any, int]] = {}

    def changed(self) -> bool:
        return self._libraries is None or self._libraries.changed()

    def set(self, threads_of: Callable[[str], int]) -> None:
        """Set each library to the threads of its runtime, for good."""
        controller = self.find()
        if controller is None:
            return
        for library in controller.lib_controllers:
            # An OpenBLAS that computes with OpenMP's threads has no number of its own.
            on_openmp = getattr(library, "threading_layer", None) == "openmp"
            _write(library, threads_of("openmp" if on_openmp else library.internal_api))

    @contextmanager
    def limited_to(self, threads: int) -> Iterator[None]:
        """Set all of them to ``threads`` inside the block, for OpenMP in this thread.

        What belongs to the whole process is restored by the last block to leave, in
        whatever order the blocks of several threads do.
        """
        controller = self.find()
        if controller is None:
            yield
            return
        with self._lock:
            for library in controller.lib_controllers:
                if _is_of_the_process(library) and library.filepath not in self._before:
                    self._before[library.filepath] = (library, library.num_threads)
            limiter = controller.limit(limits=threads)
            self._inside.append(threads)
            self._write_for_the_process()
        try:
            yield
        finally:
            with self._lock:
                limiter.restore_original_limits()
                _remove_last(self._inside, threads)
                self._write_for_the_process()

    def _write_for_the_process(self) -> None:
        for library, before in self._before.values():
            _write(library, self._inside[-1] if self._inside else before)
        if not self._inside:
            self._before.clear()

    def find(self) -> Any:
        """Return threadpoolctl's controller of what is loaded; ``None`` before any is."""
        with self._lock:
            if self._libraries is None:
                self._libraries = LoadedLibraries()
            if self._libraries.changed():
                fresh = self._libraries.fresh()
                # threadpoolctl reads the whole map of the process, which takes milliseconds:
                # not for a library that it would pass over.
                if fresh is None or any(map(_is_capped_by_threadpoolctl, fresh)):
                    # Imported here: it is the worker's, and importing safepool must stay
                    # free of third-party packages.
                    from threadpoolctl import ThreadpoolController  # noqa: PLC0415

                    self._controller = ThreadpoolController()
            return self._controller


class _Blocks:
    """What belongs to the whole process while blocks in any of its threads hold it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: list[int] = []
        self._variables: dict[str, str | None] = {}
        self._calls: dict[str, tuple[Call, ModuleType, int]] = {}
        self._imports = AfterImport(self._cap_module)

    @contextmanager
    def holding(self, threads: int) -> Iterator[None]:
        """Set it for a block that enters, restore it with the last that leaves."""
        with self._lock:
            environment = worker_environment(threads)
            if not self._numbers:
                self._remember(environment)
            self._numbers.append(threads)
            self._set(threads, environment)
        try:
            yield
        finally:
            with self._lock:
                _remove_last(self._numbers, threads)
                if self._numbers:
                    self._set(self._numbers[-1], worker_environment(self._numbers[-1]))
                else:
                    self._restore()

    def _remember(self, variables: Iterable[str]) -> None:
        self._variables = {name: os.environ.get(name) for name in variables}
        for row, call, module in _imported_runtimes():
            before = _try(call.read, module) if call.read and call.undone else None
            if before is not None:
                self._calls[row.name] = (call, module, before)
        self._imports.start(modules_to_cap())

    def _set(self, threads: int, environment: Mapping[str, str | None]) -> None:
        for name in environment.keys() - self._variables.keys():
            # Only with another number of threads: a switch, or a row that was added since.
            self._variables[name] = os.environ.get(name)
        change_environment(environment)
        for call, module, _ in self._calls.values():
            _try(call.write, module, threads)

    def _restore(self) -> None:
        self._imports.stop()
        change_environment(self._variables)
        for call, module, before in self._calls.values():
            _try(call.write, module, before)
        self._calls.clear()

    def _cap_module(self, name: str, module: ModuleType) -> None:
        for threads in self._numbers[-1:]:  # none, if the last block has just ended
            for _, call in _brought_by(name):
                _try(call.write, module, threads)


_shared_libraries = _NativeLibraries()
_blocks = _Blocks()


def _is_of_the_process(library: Any) -> bool:
    # OpenMP's and MKL's numbers are the calling thread's own, and so is that of a BLAS which
    # computes with OpenMP's threads.
    on_openmp = getattr(library, "threading_layer", None) == "openmp"
    return library.internal_api in ("openblas", "blis") and not on_openmp


def _write(library: Any, threads: int) -> None:
    # threadpoolctl 3.8 and later keeps OpenBLAS for the thread that set it first, and passes
    # over what other threads set.
    release = getattr(library, "clear_controlling_thread", None)
    if release is not None:
        release(force=True)
    library.set_num_threads(threads)
    if release is not None:
        release(force=True)


def _remove_last(numbers: list[int], number: int) -> None:
    del numbers[len(numbers) - 1 - numbers[::-1].index(number)]


def _imported_runtimes() -> Iterator[tuple[NativeRuntime, Call, ModuleType]]:
    """Yield the rows with a call whose module is imported, and both."""
    for row in runtimes():
        call = call_of(row)
        module = None if call is None else imported(row.modules[0])
        if call is not None and module is not None:
            yield row, call, module


def _brought_by(module: str) -> list[tuple[NativeRuntime, Call]]:
    """Return the rows whose call is made with the module of that name."""
    return [
        (row, call)
        for row in runtimes()
        if row.modules[:1] == (module,) and (call := call_of(row)) is not None
    ]


def _is_capped_by_threadpoolctl(path: str) -> bool:
    prefixes = tuple(
        prefix for row in runtimes() if row.call == "threadpoolctl" for prefix in row.libraries
    )
    names = [path]
    # A distribution's name for its default BLAS is a link to the one that was chosen.
    if os.path.islink(path):
        names.append(os.path.realpath(path))
    return any(os.path.basename(name).lower().startswith(prefixes) for name in names)


def _try(call: Callable[..., Any], *arguments: Any) -> Any:
    # A cap that a library refuses, because its pool has been used or its release lacks the
    # call, must not cost the task: the table's ``fixed`` says what cannot be changed, and
    # ``safepool.threads.inspect()`` what there is.
    try:
        return call(*arguments)
    except Exception:  # noqa: BLE001 -- any library's own errors
        return None
