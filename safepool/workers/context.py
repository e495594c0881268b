"""Start of workers by default: forked from a server that has no threads (``forkserver``).

One `ServerContext` belongs to one pool: the modules that its server preloads, and the way of
``__main__``. It decides what becomes of a script that cannot be run in a server: its functions
travel by value.
"""

from __future__ import annotations

import logging
import multiprocessing.context
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from safepool.workers import asking, forkserver
from safepool.workers.contained import ContainedLogger
from safepool.workers.plan import MainPlan, ScriptFailedError, ScriptLostError
from safepool.workers.preload import modules_learned, modules_of_the_program
from safepool.workers.start import StartMethod, WorkerStart

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from types import FrameType

    from safepool.workers import forked, upkeep
    from safepool.workers.board import Board

assert sys.platform == "linux"

_log = ContainedLogger()


class ServerContext(multiprocessing.context.SpawnContext, StartMethod):
    """Start of workers by default: forked from a server that has no threads.

    All other attributes of a ``multiprocessing`` context are those of ``spawn``.

    Args:
        preload: Modules that the server imports ahead: ``"auto"``, or names of modules.
        plan: Way of ``__main__`` into the workers; ``None`` is by value. Replaced here if a script
            cannot be run.
        asked_only: ``True`` if nothing is forked, and the server only reports the names that
            workers have which run the script themselves.
    """

    _name = "safepool"

    def __init__(
        self,
        preload: str | Sequence[str] = "auto",
        plan: MainPlan | None = None,
        *,
        kept: bool = False,
        asked_only: bool = False,
    ) -> None:
        super().__init__()
        self.preload = preload
        self.plan = plan
        self._kept = kept
        self._asked_only = asked_only
        self._learns = False
        self._imported: list[str] | None = None
        # What the server was asked for last.
        self._wished: list[str] = []
        self._marks: Mapping[str, bytes] | None = None
        # Whether a worker has the script's names: the pool's calls refer to them.
        self._relied_on = False

    def prepare(self, told: WorkerStart) -> bool:
        """Start the server, if none runs; ``False`` if each worker is a fresh interpreter."""
        with self._server(told, self._plan_now(told)) as server:
            return server.start()

    def _plan_now(self, told: WorkerStart) -> MainPlan | None:
        """Return the plan that is carried out; ``None`` where nothing is run."""
        plan = self.plan
        if plan is None or plan.mode == "value":
            return None
        if self._marks is not None:  # the pool's calls refer to it by now
            return plan
        error = forkserver.not_runnable.get(forkserver.attempt_of(plan, told.environment))
        if error is not None:
            self._do_without(plan, error)
            return None
        return plan

    def _do_without(self, plan: MainPlan, error: asking.CannotRunError) -> None:
        self.plan, self._marks = plan.without(str(error)), None
        if self._asked_only and error.ends:
            self.script_error: BaseException | None = ScriptFailedError(
                f"each worker runs {plan.name or plan.path}, and {error}. Move work that workers "
                'do not need below if __name__ == "__main__":, or leave mp_context= out'
            )
            self.script_error.__cause__ = error.__cause__

    def is_asked_by(self, frame: FrameType | None) -> None:
        """Take note of the caller: the script is not run if its top level itself asks."""
        if self.plan is not None and self.plan.mode == "run":
            line = self.plan.asked_at_top_level(frame)
            if line:
                problem = f"line {line} of its top level asks for the pool, outside of a guard"
                self.plan = self.plan.without(problem)

    def finish(self, told: WorkerStart) -> None:
        """Let the server import what this pool's tasks have imported."""
        if self._learns and self._known() != self._wished:
            try:
                with self._server(told, self._plan_now(told)) as server:
                    server.preload_ahead(self._known())
            except OSError:
                pass  # no descriptor is left: the next pool asks again

    def run_script(self, told: WorkerStart, given_up: Callable[[], bool]) -> Mapping[str, bytes]:
        """Run the script in the server; if it cannot be run there, functions travel by value.

        Raises:
            ScriptFailedError: Workers have the script's names, and its own code fails now.
            OSError: Workers have the script's names, and later ones cannot have them now.
        """
        plan = self._plan_now(told)
        if plan is None:
            return {}
        wish = self._wish(told, given_up)
        try:
            with self._server(told, plan) as server:
                self._marks = server.run_script(wish)
                return self._marks
        except asking.CannotRunError as error:
            self._lose_script(plan, error, told)
            return {}

    def prints(
        self, told: WorkerStart, names: list[str], given_up: Callable[[], bool]
    ) -> Mapping[str, bytes | None]:
        """Return what globals of the script are like in the server."""
        plan = self._plan_now(told)
        if plan is None:
            return {}
        try:
            with self._server(told, plan) as server:
                return server.prints(names, given_up)
        except OSError:  # no descriptor is left
            return {}

    def _server(
        self, told: WorkerStart, plan: MainPlan | None
    ) -> AbstractContextManager[upkeep.Server]:
        return forkserver.server_for(
            told.environment, plan, kept=self._kept, asked_only=self._asked_only
        )

    def _lose_script(
        self, plan: MainPlan, error: asking.CannotRunError, told: WorkerStart
    ) -> None:
        """Let functions travel by value from now on, if no worker has the script's names."""
        problem = str(error)
        if self._relied_on:
            raise _cannot_again(plan, error) from error.__cause__
        self._do_without(plan, error)
        attempt = forkserver.attempt_of(plan, told.environment)
        if attempt not in forkserver.not_runnable:
            error.__traceback__ = error.__context__ = None  # it is kept, without the frames
            forkserver.not_runnable[attempt] = error
            _log.log(
                # With more threads a BLAS starts some when the script imports it. This also tells
                # a user of the standard library's way.
                logging.INFO if told.threads > 1 or self._asked_only else logging.WARNING,
                "%s is not run in the fork server: %s. Its functions travel to workers by value. "
                'Move work that workers do not need below if __name__ == "__main__":, or pass '
                'main="value"',
                plan.name or plan.path,
                problem,
            )

    def _wish(self, told: WorkerStart, given_up: Callable[[], bool]) -> asking.Wish:
        if self.preload != "auto":
            return asking.Wish(list(self.preload), True, given_up)
        # With more threads a BLAS starts them when it is loaded, and the process could not be
        # forked.
        self._learns = told.threads == 1
        self._wished = self._known() if self._learns else []
        return asking.Wish(self._wished, False, given_up)

    def _known(self) -> list[str]:
        """Return the modules that the program and its tasks have imported."""
        if self._imported is None:  # the modules at the start of the pool's work
            self._imported = modules_of_the_program()
        return [*dict.fromkeys([*self._imported, *modules_learned()])]

    def start(
        self, told: WorkerStart, end: socket.socket, board: Board, given_up: Callable[[], bool]
    ) -> forked.ForkedProcess:
        """Fork a worker from the server.

        Raises:
            OSError: Also if no server could be kept running, or the script, which was run for
                this pool's workers, cannot be run again.
            ScriptFailedError: The same, and the script's own code is the reason.
            ScriptLostError: The script cannot be run again, and the pool has had no worker.
        """
        try:
            return self._start(told, end, board, given_up)
        except asking.HasReadError:
            told = replace(told, environment=told.variables, own={})
            return self._start(told, end, board, given_up)

    def _start(
        self, told: WorkerStart, end: socket.socket, board: Board, given_up: Callable[[], bool]
    ) -> forked.ForkedProcess:
        wish = self._wish(told, given_up)
        files = [end.fileno(), *([board.fileno()] if board else []), *told.descriptors]
        told = replace(told, learns=self._learns, descriptors=(), foreign=())
        details = {"told": told, "board": bool(board)}
        plan = self._plan_now(told)
        try:
            with self._server(told, plan) as server:
                marks = server.run_script(wish) if plan else None
                if marks != self._marks:
                    raise asking.CannotRunError(  # noqa: TRY301 -- it is what a run that raises is
                        "its top level defined other functions or classes when it was run in "
                        "another server"
                    )
                worker = server.fork_worker(details, files, wish)
        except asking.CannotRunError as error:
            assert plan is not None
            self._lose_script(plan, error, told)
            raise ScriptLostError(
                f"{plan.name or plan.path} was run in the fork server and cannot be run there "
                f"again: {error}"
            ) from None
        self._relied_on = plan is not None
        return worker


def _cannot_again(plan: MainPlan, error: asking.CannotRunError) -> Exception:
    told = ScriptFailedError(
        f"{plan.name or plan.path}, which the pool's calls refer to, cannot be run in another "
        f"fork server: {error}. Move work that workers do not need below "
        'if __name__ == "__main__":, or pass main="value"'
    )
    return told if error.by_script else OSError(str(told))
