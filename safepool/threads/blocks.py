"""Blocks that hold native pools at a number: the first block sets it, the last one restores it.

Some numbers belong to the whole process (the environment, OpenBLAS, most further runtimes), others
to the calling thread alone (OpenMP's, MKL's). A block sets both when it begins. At its end its
thread has the former numbers again, and the process has those of the remaining blocks, in whatever
order blocks of several threads end.

Not covered:
    * A library whose number is fixed once it is loaded (the table's ``fixed``): if a block is the
      first to import it, the library keeps the block's number.
    * OpenMP and MKL in threads that start inside a block: such a thread begins with the values
      that the variables had when the library was loaded.
    * A fork while another thread computes in several threads of OpenBLAS: the child inherits
      OpenBLAS's lock, and hangs when it sets the number. No pool of this package forks like that.
    * Changes by a block's body: the end of the block undoes them.
"""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safepool.threads.calls import Call, attempt
from safepool.threads.environment import (
    block_environment,
    change_environment,
    lowered_environment,
    ruled_threads,
)
from safepool.threads.imports import AfterImport
from safepool.threads.native import NativeLibraries, is_of_the_process, runtime_of, set_threads
from safepool.threads.placement import own_cpus
from safepool.threads.registry import (
    brought_by,
    imported_runtimes,
    modules_to_cap,
    revision,
    runtimes,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

    from safepool.threads.table import NativeRuntime

# A block begins or ends in a millisecond, or in as long as an import takes. Longer means that
# it waits for the thread that forks, as for a module that this one imports.
_FORK_WAITS_S = 5.0


@dataclass(slots=True, eq=False, repr=False)
class Hold:
    """An open block.

    Attributes:
        lowers: ``True`` if the block only lowers larger numbers, and keeps smaller ones.
        thread: The thread in which the block is open.
        own: Former numbers of libraries with a number for each thread.
    """

    threads: int
    lowers: bool = False
    thread: int = field(default_factory=threading.get_ident)
    own: dict[str, tuple[Any, int]] = field(default_factory=dict)

    def number(self, before: int) -> int:
        """Return the number of a pool inside, given ``before`` outside; 0 is all CPUs."""
        return min(before, self.threads) if self.lowers and before > 0 else self.threads

    def environment(self, values: Mapping[str, str | None]) -> Mapping[str, str | None]:
        """Return the variables that it changes, given their values outside."""
        if self.lowers:
            return lowered_environment(self.threads, values)
        return block_environment(self.threads)


def enter(threads: int, *, lowers: bool = False) -> Hold:
    """Begin a block in this thread.

    Args:
        threads: Threads for each native pool, at least 1.
        lowers: No pool is raised to that number.
    """
    hold = Hold(threads, lowers)
    _blocks.enter(hold)
    return hold


def leave(hold: Hold) -> None:
    """End a block, in the thread that began it."""
    _blocks.leave(hold)


def start_anew(threads: int) -> None:
    """Forget every block: this process is a worker from now on."""
    global _blocks  # noqa: PLW0603 -- a fact about this process
    _blocks = _Blocks(threads)


class _Blocks:
    """State of this process while blocks are open in any of its threads, and before.

    Args:
        threads: Threads of a library here that no variable rules; ``None`` is one for each CPU.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        # An RLock: a finalizer that runs while it is held may end a block.
        self._lock = threading.RLock()
        self._holds: list[Hold] = []
        self._native = NativeLibraries()
        self._imports = AfterImport(self._cap_module)
        # Changed properties of the process, with their former values.
        self._variables: dict[str, str | None] = {}
        self._written: dict[str, str | None] = {}
        self._calls: dict[str, tuple[Call, ModuleType, int]] = {}
        self._libraries: dict[str, tuple[Any, int]] = {}
        # For which blocks the environment and the calls were set last, and of which rows.
        self._set_for: list[tuple[int, bool]] = []
        self._revision = -1

    def enter(self, hold: Hold) -> None:
        with self._lock:
            try:
                self._begin(hold)
            except BaseException:  # Ctrl-C, or no stack left; its block will not be left
                if hold in self._holds:
                    self._holds.remove(hold)
                self._end(hold)
                raise

    def leave(self, hold: Hold) -> None:
        with self._lock:
            if hold not in self._holds:  # of the process that has forked this worker
                return
            try:
                self._remember(hold, loaded_inside=True)
            finally:
                # After any exception: a block that stayed would cap the process for ever. The
                # outer blocks set everything again at their end.
                self._holds.remove(hold)
                try:
                    self._end(hold)
                except KeyboardInterrupt:
                    self._end(hold)
                    raise

    def _begin(self, hold: Hold) -> None:
        first = not self._holds
        if first and (self._libraries or self._variables):  # the last end was cut short
            self._end(hold)
        self._remember(hold, loaded_inside=not first)
        self._holds.append(hold)
        if first or self._revision != revision():
            self._revision = revision()
            self._set_for.clear()
            self._imports.start(modules_to_cap())
            self._remember_calls()
        self._set()
        for library, before in hold.own.values():
            set_threads(library, hold.number(before))

    def _end(self, hold: Hold) -> None:
        """Give everything the numbers that it has without a block that is over."""
        for library, before in hold.own.values():
            set_threads(library, before)
        self._set()
        if not self._holds:
            self._imports.stop()
            self._variables.clear()
            self._written = {}
            self._calls.clear()
            self._libraries.clear()

    def fork_begins(self) -> None:
        """Wait for blocks that other threads begin or end.

        OpenBLAS's own lock, which a thread holds while it sets the number, would be locked in the
        child without end.
        """
        self._lock.acquire(timeout=_FORK_WAITS_S)

    def fork_ended(self) -> None:
        """Let blocks begin and end again, in the parent."""
        try:
            self._lock.release()
        except RuntimeError:
            pass  # another thread held it for too long

    def forked(self) -> None:
        """Be usable in a forked child, which has none of the parent's other threads.

        Another thread may have held a lock, and may have been about to set a number that is noted
        here as set. The next block that ends here restores what their blocks have changed.
        """
        self._lock = threading.RLock()
        here = threading.get_ident()
        self._holds = [hold for hold in self._holds if hold.thread == here or hold.lowers]
        self._set_for.clear()
        self._forget_what_is_written()
        self._native.forked()

    def _remember(self, hold: Hold, *, loaded_inside: bool) -> None:
        """Note the numbers that the libraries have, or would have, without the blocks."""
        for library in self._native.found():
            path = library.filepath
            of_the_process = is_of_the_process(library)
            if path in (self._libraries if of_the_process else hold.own):
                continue
            if of_the_process:
                # A library that is loaded while a block is open has read the block's variables.
                before = self._unruled(library) if loaded_inside else library.num_threads
                self._libraries[path] = (library, before)
            elif hold in self._holds:
                before = self._unruled(library)
                for other in self._holds:
                    before = before if other is hold else other.number(before)
                hold.own[path] = (library, before)
            else:
                hold.own[path] = (library, library.num_threads)

    def _unruled(self, library: Any) -> int:
        name = runtime_of(library)
        row = next((row for row in runtimes() if row.name == name), None)
        return self._otherwise(row, None)

    def _otherwise(self, row: NativeRuntime | None, default: int | None) -> int:
        """Return the threads that a runtime would have chosen outside of every block."""
        outside = {**os.environ, **self._variables}
        ruled = None if row is None else ruled_threads(row, outside)
        return ruled or self._threads or default or len(own_cpus()) or os.cpu_count() or 1

    def _remember_calls(self) -> None:
        for row, call, module in imported_runtimes():
            if row.name not in self._calls and call.read and call.undone:
                before = attempt(call.read, module)
                if before is not None:
                    self._calls[row.name] = (call, module, before)

    def _set(self) -> None:
        """Apply the open blocks to the process, from the first to the last."""
        for library, before in self._libraries.values():
            set_threads(library, self._number(before))
        asked = self._asked()
        if asked == self._set_for and asked:
            return
        self._set_for = []  # until it is done
        self._set_environment()
        for call, module, before in self._calls.values():
            attempt(call.write, module, self._number(before))
        self._set_for = asked

    def _set_environment(self) -> None:
        values = dict(self._variables)
        for hold in self._holds:
            if hold.lowers:
                values = {**os.environ, **values}
            changes = hold.environment(values)
            for name in changes.keys() - self._variables.keys():
                self._variables[name] = os.environ.get(name)
            values.update(changes)
        # Only variables whose value changes: reading an unset variable costs a microsecond, and
        # there are some forty.
        try:
            change_environment(
                {
                    name: values.get(name)
                    for name, before in self._variables.items()
                    if values.get(name) != self._written.get(name, before)
                }
            )
        except BaseException:  # Ctrl-C: the state is unknown
            self._forget_what_is_written()
            raise
        self._written = values

    def _forget_what_is_written(self) -> None:
        self._written = dict.fromkeys(self._variables, "")  # as if another value were there

    def _asked(self) -> list[tuple[int, bool]]:
        """Return the blocks that matter: a block that sets a number hides the blocks below it."""
        asked: list[tuple[int, bool]] = []
        for hold in self._holds:
            key = (hold.threads, hold.lowers)
            if not hold.lowers:
                asked = [key]
            elif asked[-1:] != [key]:
                asked.append(key)
        return asked

    def _number(self, before: int) -> int:
        for hold in tuple(self._holds):
            before = hold.number(before)
        return before

    def _cap_module(self, name: str, module: ModuleType) -> None:
        # Without the lock: it is called by an import, and a block that begins imports too.
        for row, call in brought_by(name):
            if not self._holds:  # the last block has just ended
                return
            found = attempt(call.read, module) if call.read and call.undone else None
            otherwise = self._otherwise(row, call.default)
            if found is not None:
                # A number other than the variables' is the library's own start value.
                ruled = found == self._number(otherwise)
                self._calls[row.name] = (call, module, otherwise if ruled else found)
            attempt(call.write, module, self._number(otherwise))


_blocks = _Blocks()


def _fork_begins() -> None:
    _blocks.fork_begins()


def _fork_ended() -> None:
    _blocks.fork_ended()


def _forked() -> None:
    _blocks.forked()


if sys.platform != "win32":
    os.register_at_fork(before=_fork_begins, after_in_parent=_fork_ended, after_in_child=_forked)
