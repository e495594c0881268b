"""Start of the workers of one pool, also when the system gives none."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from safepool.errors import PoolBrokenError, let_handlers_pass, text_of
from safepool.machine import tell_once
from safepool.pool.latch import Latch
from safepool.pool.shell.exits import has_exited, working
from safepool.pool.shell.worker import Worker
from safepool.transport.descriptors import under_way
from safepool.transport.main_names import MainNames
from safepool.workers import inheritance
from safepool.workers.board import Board
from safepool.workers.contained import ContainedLogger
from safepool.workers.inheritance import Inheritance
from safepool.workers.methods import find_context, method_of, script_method

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from safepool.pool.shell.variables import Variables
    from safepool.threads.placement import Placement
    from safepool.workers.start import StartMethod, WorkerStart

_log = ContainedLogger()


class Hiring:
    """Starts workers.

    Args:
        told: Facts that each worker receives.
        placement: Chooses the CPUs that each worker is bound to; ``None`` binds none.
        own: Variables of each single worker.
        may_fork: Whether workers are forks of this process if the initializer cannot be pickled.
        main: Source of the script in workers.

    Attributes:
        inheritance: Content of the first message to a new worker.
        need: Function that gets the names of the script that the initializer uses, when it is
            pickled.
        started: Set when the first worker was started, or never will be (the scheduler's
            race F).
        hired: Set when the first worker is on the list, or when there will be none.
        given_up: Function that returns ``True`` when the pool no longer needs the worker; called
            repeatedly during a slow start.
    """

    def __init__(
        self,
        method: StartMethod,
        told: WorkerStart,
        *,
        initializer: Callable[..., object] | None,
        initargs: tuple[Any, ...],
        placement: Placement | None,
        own: Variables,
        may_fork: bool,
        main: str,
    ) -> None:
        self._method = method
        self._script = script_method(method, main)
        self._told = told
        self._initialize = (initializer, initargs)
        self._placement = placement
        self._own = own
        self._may_fork = may_fork
        self.inheritance: Inheritance = Inheritance([], [])
        self._packed: Inheritance | None = None
        self._not_packed: PoolBrokenError | None = None
        self.need: Callable[[frozenset[str]], object] = frozenset
        self.names: MainNames = MainNames()
        self.started: Latch = Latch()
        self.hired: Latch = Latch()
        self.given_up: Callable[[], bool] = bool

    def pack_ahead(self) -> None:
        """Pickle the initializer in the caller's thread, as the standard pool does.

        It may be in a module that this thread is importing. Another thread would wait for the end
        of that import, which waits for the first worker.
        """
        self._script.is_asked_by(sys._getframe(1))
        if self._packed is not None or self._initialize[0] is None:
            return
        try:
            self._packed = self._pack()
        except Exception as error:  # noqa: BLE001 -- user code; told to every task when a worker is wanted
            let_handlers_pass(error)

    def prepare(self) -> None:
        """Prepare the start of one or more workers, before :meth:`pack`.

        Raises:
            OSError: The system lacks memory, processes or descriptors.
            RuntimeError: The interpreter shuts down.
        """
        if not self.started.is_open and self._method.prepare(self._told):
            # submit() need not wait for imports: what comes needs no new process.
            self.started.open()
        marks = self._script.run_script(self._told, self.given_up)
        self.names.learn(marks, self._prints if marks else None)

    @property
    def script_error(self) -> BaseException | None:
        """Exception of the script, where each worker runs it."""
        return self._script.script_error

    @property
    def packs_at_once(self) -> bool:
        """Whether :meth:`pack` runs no code of the program."""
        return self._initialize[0] is None

    def pack(self) -> None:
        """Pickle the initializer, in any thread. :meth:`take_packed` raises what that raised."""
        if self._not_packed is not None:
            return  # it took longer than the scheduler waits for, and failed
        try:
            self._packed = self._packed or self._pack()
            self.need(self._packed.names)
        except BaseException as error:  # noqa: BLE001 -- user code
            reason = f"the initializer cannot be pickled: {error!r}"
            if "fork context" in text_of(error):
                reason += (
                    '. Make it by multiprocessing.get_context("spawn"), from which it can go to '
                    'workers that are no forks of this process, or pass mp_context="fork"'
                )
            self._not_packed = PoolBrokenError(reason)
            # Frames hold what there was no memory for.
            self._not_packed.__cause__ = (
                error.with_traceback(None) if isinstance(error, MemoryError) else error
            )

    def take_packed(self) -> None:
        """Give workers that are started from now on the pickled initializer.

        Raises:
            PoolBrokenError: The initializer cannot be pickled.
        """
        error, self._not_packed = self._not_packed, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # which holds this frame
        packed, self._packed = self._packed, None
        if packed is not None:
            self.inheritance = packed

    def start(self, place: int) -> Worker:
        """Start one worker, with this index in the pool.

        Raises:
            ScriptLostError: The caller must begin again with :meth:`prepare`.
            ScriptFailedError: The script has ended the fork server of ``multiprocessing``.
            OSError: The system lacks memory, processes or descriptors.
            RuntimeError: The interpreter shuts down.
        """
        told = replace(
            self._told,
            index=place,
            own=self._own.of(place),
            cpus=() if self._placement is None else self._placement.choose(_taken_cpus()),
            by_name=bool(self.names),
            descriptors=tuple(self.inheritance.descriptors),
            initializer=self.inheritance.itself,
            foreign=tuple(_descriptors_of_all_pools()),
        )
        try:
            worker = Worker(self._method, told, board=Board.create(), given_up=self.given_up)
        except (ConnectionError, EOFError):
            if (error := self.script_error) is None:
                raise
            # From Python 3.14 on multiprocessing's fork server itself runs the script.
            raise error from error.__cause__
        worker.index = place
        self.started.open()
        return worker

    def close(self) -> None:
        """Start no more, keep nothing of the caller's."""
        # A lock of multiprocessing among them is to be freed with the program's last one.
        self._initialize, self.inheritance = (None, ()), Inheritance([], [])
        self._packed = None
        self.started.open()
        self.hired.open()
        if not has_exited():
            try:
                self._method.finish(self._told)
            except Exception:  # noqa: BLE001 -- it looks at modules of the program
                _log.exception("internal error: the next pool's fork server preloads no modules")

    def _prints(self, names: list[str]) -> Mapping[str, bytes | None]:
        return self._script.prints(self._told, names, self.given_up)

    def _pack(self) -> Inheritance:
        try:
            return inheritance.pack(self._initialize, forked=self._method.is_fork)
        except Exception as error:
            if not self._may_fork or self._method.is_fork:
                raise
            tell_once(
                "workers are forks of this process, because only forks inherit their "
                f"initializer and its arguments: {text_of(error)}. Pass initargs= that can be "
                "pickled"
            )
        self._method = self._script = method_of(find_context("fork"))
        return self._pack()


def _descriptors_of_all_pools() -> Iterable[int]:
    for pool in working():
        yield from pool.descriptors()
    yield from under_way()


def _taken_cpus() -> Iterable[tuple[int, ...]]:
    """Yield the CPUs of each remaining worker of all pools of this process."""
    for pool in working():
        yield from (worker.cpus for worker in pool.workers() if not worker.leaving)
