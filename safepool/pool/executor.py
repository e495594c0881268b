"""``ProcessPool``: the executor that people hold."""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
import threading
import weakref
from concurrent.futures import Future, process
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, overload

from safepool.arguments import MOST_WORKERS, checked, parse_bytes
from safepool.budget import Request
from safepool.machine import BudgetWatch, log_once, read_budget, tell_once
from safepool.pool.calls.front import PoolCalls
from safepool.pool.core.policy import Policy, policy_of
from safepool.pool.inherited import WatchingScheduler, shared_with_forks
from safepool.pool.shell.hiring import Hiring
from safepool.pool.shell.listener import Listener
from safepool.pool.shell.memory import MemoryWatch
from safepool.pool.shell.scheduler import Scheduler
from safepool.pool.shell.size import Size
from safepool.pool.shell.variables import Variables, devices_of
from safepool.pool.watch import Stacks, look_at, worker_table
from safepool.procfs import named_threads
from safepool.shown import printable
from safepool.threads.environment import overridden, worker_environment
from safepool.threads.placement import Placement, why_not_bound
from safepool.transport.lazy import load_own
from safepool.workers.describe import name_of
from safepool.workers.methods import find_context, method_of
from safepool.workers.start import WorkerStart

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Coroutine, Mapping, Sequence
    from multiprocessing.context import BaseContext

    from safepool.budget import Rounding
    from safepool.errors import PoolBrokenError
    from safepool.pool.tracing.trace import Trace
    from safepool.pool.watch import WorkerInfo

__all__ = ["ProcessPool"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor as _Standard
else:
    # "safepool run --patch" has put this pool in its place, and left it there.
    _Standard = vars(process).get("_safepool_replaces") or process.ProcessPoolExecutor


# Programs ask isinstance(pool, ProcessPoolExecutor). Nothing of what that class does is used, and
# its __init__() is not called.
# map() there takes no items as well, and does not compare them with the function.
class ProcessPool(PoolCalls, _Standard):  # type: ignore[misc]
    """A process pool that fits the machine, in the place of ``ProcessPoolExecutor``.

    Workers are sized to the CPUs that the kernel grants, hold every native thread pool at
    one thread, and share nothing with each other: a worker that dies costs the one task it
    ran, which ends with :class:`safepool.WorkerDiedError`, and is replaced.

    Args:
        *Size*
        max_workers (int; default None): The most workers at a time, at least 1 (on Windows at most
            61). ``None`` is the number that fits, or ``SAFEPOOL_MAX_WORKERS`` of the environment:
            see :func:`safepool.cpu_count`. Example: ``max_workers=4``.
        rounding (str; default "floor"): Treatment of a fraction of a CPU: ``"floor"`` leaves it to
            this process, ``"ceil"`` starts one worker more, which the kernel then freezes together
            with all others for a part of every period, ``"nearest"`` is in between. Example:
            ``rounding="ceil"`` for a batch job.
        reserve (float, CPUs; default 0): CPUs kept for this process and whatever runs beside it,
            such as 0.5. Example: ``reserve=0.5``.
        memory_per_worker (int or str, bytes; default None): Bytes, or text such as ``"2GiB"``:
            start no more workers than fit into what the control groups have left. ``None`` does
            not ask. Example: ``memory_per_worker="2GiB"``.
        gpus ("auto", int or list; default None): Give each worker one GPU, one worker after the
            other, by ``CUDA_VISIBLE_DEVICES`` or the variable that the program itself has for that
            (``HIP_VISIBLE_DEVICES``, ``ROCR_VISIBLE_DEVICES``). ``"auto"`` is all that the program
            may use: those of that variable, ids of devices and of parts of them (MIG) included,
            else as many as NVIDIA's driver has files for; where there is none, that is said once,
            and nothing is set. A number is the first so many of them. A list names devices, or
            several for one worker: ``["0,1", "2,3"]``. What ``env`` says wins. Example:
            ``gpus="auto"``.

        *Threads*
        threads_per_worker (int or "auto", threads; default 1): Threads that each native pool in a
            worker may have, at least 1; the number of workers that fit is the limit divided by it.
            ``"auto"`` is what the limit leaves to each of ``max_workers``. Example:
            ``threads_per_worker=2``.
        pin_workers (bool; default False): Bind each worker to ``threads_per_worker`` CPUs of this
            process's affinity mask, as few workers to each CPU as can be, before it imports
            anything: libraries whose threads no variable bounds start as many as they find CPUs.
            What was imported before a worker was forked keeps its size, and what a task starts is
            bound as well. The price: the kernel can no longer move a worker whose CPU somebody
            else uses too, another pool in another container of a shared host for one, so it may
            wait beside idle CPUs. Worth it where the CPUs are this program's own. Linux only:
            elsewhere, and where it is refused, it is said once and nothing is bound.
        env (dict or function; default None): Variables to set in the workers. One that bounds
            native threads takes the place of the cap (``{"OMP_NUM_THREADS": "2"}``), which is said
            in the log. Or a function that returns those of one worker, called here in the program
            with its :func:`safepool.worker_index`, once for each: ``lambda i: {"PORT": str(9000 +
            i)}``. They are set when the worker is born, after a guarded script was run.

        *Memory*
        max_memory_per_worker (int or str, bytes; default None): Bytes, or text such as ``"2GiB"``:
            a worker that holds more when a task ends is replaced. ``None`` does not ask. A
            free-threaded Python keeps freed memory for its next objects: there it counts as held.
            Example: ``max_memory_per_worker="2GiB"``.
        memory_limit (int or str, bytes; default None): Bytes, or text such as ``"2GiB"``: a worker
            that holds more while it runs a task is killed, with every process that the task has
            started, and the task ends with :class:`safepool.WorkerDiedError`, which has the
            figures and the Python stack, or runs again, if it has ``retries``. It is looked at ten
            times a second, and more often when it grows. What counts is its own memory: resident,
            without what is shared or mapped from files, what it was born with, and what processes
            hold that the task has started. A worker that still holds too much when a task has
            ended is replaced. ``None`` does not ask. Linux only. Example: ``memory_limit="2GiB"``.

        *Failure*
        timeout (float, seconds; default None): Seconds that a task may run, from its start; above
            0. Then its worker is killed with every process that the task started, and the task
            ends with :class:`safepool.TaskTimeoutError`. ``None`` does not limit. Example:
            ``timeout=30``.
        retries (int, runs; default 0): Number of times that a task is run again after its worker
            died, at least 0. Never after an exception, nor after a timeout. A function may have a
            timeout and retries of its own: see :func:`safepool.worker`. Example: ``retries=2``.
        on_worker_death (str; default "replace"): ``"replace"`` loses the one task; ``"break"``
            ends the pool as a whole, as the standard pool does, when a task is lost that has no
            retries left. Example: ``on_worker_death="break"``.
        end_subprocesses (bool; default False): Whether what tasks have started, and what that has
            started, ends with the program, a second later at most: also a daemon, and also after
            ``kill -9`` of the program, of a worker or of the server. Until then it goes on, after
            the end of its task and of the pool as well. The workers' server then has a small
            process above it that waits for this. ``False`` lets a program that no task has waited
            for go on, as with any pool; either way a timeout, or the end of a running task by
            force, ends what that task has started. Only for workers that are forked from a server:
            where each has to be started afresh, the log says once that it does not hold.

        *Start*
        mp_context (context or str; default None): A ``multiprocessing`` context that starts the
            workers, or the name of one. ``None`` is ``"safepool"`` on Linux, which forks them from
            a server of our own that has no threads, and ``"loky"`` elsewhere, which starts a fresh
            interpreter for each. A script needs no ``if __name__ == "__main__"`` for either.
            ``"fork"`` is as safe as the program has few threads: those that there are when the
            pool is made are named by a warning. Example: ``mp_context="spawn"``.
        initializer (function; default None): Function that each worker calls once before its first
            task, after the caps. Example: ``initializer=connect, initargs=("db",)``.
        initargs (tuple; default ()): Arguments of ``initializer``; locks, queues and values of
            ``multiprocessing`` as well, made by ``multiprocessing.get_context("spawn")`` unless
            the workers are forks.
        max_tasks_per_child (int, tasks; default None): Replace a worker after this many tasks, at
            least 1; ``None`` keeps workers as long as the pool. Not with ``"fork"``, as in the
            standard pool: the process that is copied for each new worker is busy by then. Example:
            ``max_tasks_per_child=1000``.
        preload ("auto" or list; default "auto"): Modules that are imported once, ahead of the
            workers, which then share their memory: ``"auto"`` is what the program, and tasks of
            earlier workers, have imported of installed libraries, as long as their import leaves
            no thread, open file or child process; with more than one thread per worker none of
            them. A list names others, to which the same must apply. ``[]`` is nothing. One whose
            import raises is left to the tasks. Without effect where workers are not forked from a
            server. Example: ``preload=["mylib"]``.
        main (str; default "auto"): Way of the program's ``__main__`` into the workers that are
            forked from a server. ``"run"``: the server runs the script once, as ``__mp_main__``,
            before it forks workers. They have what its top level imports, sets and computes;
            functions and classes travel by name. ``"value"``: nothing is run, and functions,
            classes and data of the script are sent, each before the first call that uses it.
            ``"auto"`` runs a script or module that has ``if __name__ == "__main__":`` at its top
            level, and is otherwise ``"value"``: for a script without that guard, a prompt, a
            notebook, ``-c``. A top level that cannot be run there is told once by the logger
            ``safepool``, and is ``"value"`` then. The same as ``"run"`` is ``"__main__"`` in
            ``preload``. Workers of ``"spawn"`` and ``"forkserver"`` run such a script by
            themselves, as the standard pool's; ``"value"`` sends them what they need beside it.
            Example: ``main="value"``.

        *Observation*
        trace (path; default None): A file for a picture of the run, such as ``"run.json"``: what
            each worker did when, which https://ui.perfetto.dev and ``safepool report`` show. An
            existing one is replaced. Good at any moment, also after a crash; what it holds and how
            large it may become is told in ``safepool/pool/tracing/events.py``.

    A global of the script is the worker's own once it was there: what the initializer or a task
    does to it stays in that worker. When the program changes it, also in place, it is delivered
    again with the next call that uses it, and takes the place of the worker's.

    A pool that is sized from the limits follows them: while it has work it reads them again
    once a second, starts workers when they grow, and lets workers end after their task when
    they shrink.

    Workers have the settings of the program, such as warning filters, decimal's context or
    options of pandas, as they are when a call is submitted: :func:`safepool.register_setting`
    says more, and adds others. A setting that each thread has for itself is that of the thread
    which made the pool.

    Workers are numbered by ``multiprocessing.current_process()._identity`` and its name as those
    of the standard pools: from 1, all pools of the program together, and no number is used again.

    Raises:
        ValueError: A value is out of its range; ``main`` is ``"run"``, and there is no script;
            ``end_subprocesses`` is ``True``, and the workers are not forked from a server;
            ``memory_limit`` is given, and this system does not tell what a worker holds.
        TraceFileError: The file for ``trace`` cannot be written, or another running pool does.
        TypeError: A value has a wrong type, or there is no argument of a name.
        ModuleNotFoundError: ``preload`` names a module that is not there.

    Source:
        Python, Doc/library/concurrent.futures.rst, "ProcessPoolExecutor".

    Example:
        >>> with ProcessPool(1) as pool:
        ...     list(pool.map(lambda x: x * x, [1, 2, 3]))
        [1, 4, 9]
    """

    _scheduler: Scheduler

    # Under "safepool run --patch": it may have to share with its workers what a fork shares.
    _inherits = True

    @checked("ProcessPool")
    def __init__(  # noqa: PLR0913 -- the standard pool's arguments, and ours by name
        self,
        max_workers: int | None = None,
        mp_context: BaseContext | str | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        threads_per_worker: int | Literal["auto"] = 1,
        rounding: Rounding = "floor",
        reserve: float = 0.0,
        memory_per_worker: float | str | None = None,
        pin_workers: bool = False,
        env: Mapping[str, str] | Callable[[int], Mapping[str, str]] | None = None,
        gpus: Literal["auto"] | int | Sequence[int | str] | None = None,
        timeout: float | None = None,
        retries: int = 0,
        max_memory_per_worker: float | str | None = None,
        memory_limit: float | str | None = None,
        on_worker_death: Literal["replace", "break"] = "replace",
        preload: Literal["auto"] | Sequence[str] = "auto",
        main: Literal["auto", "run", "value"] = "auto",
        trace: str | os.PathLike[str] | None = None,
        end_subprocesses: bool = False,
    ) -> None:
        memory = None if memory_per_worker is None else parse_bytes(memory_per_worker)
        request = Request(
            max_workers=max_workers,
            threads_per_worker=threads_per_worker,
            rounding=rounding,
            reserve=reserve,
            memory_per_worker=memory,
        )
        self._budget, limits = read_budget(request)
        self._policy = Policy(timeout_s=timeout, retries=retries)
        names, main = _names(preload, main)
        self._mp_context = find_context(mp_context, names, main, end_subprocesses=end_subprocesses)
        stands_for_forks = mp_context is None and not end_subprocesses and _stands_for_forks()
        if stands_for_forks and self._inherits and (shared := shared_with_forks()):
            self._mp_context = find_context("fork")
            tell_once(
                "workers are forked from this process, because nothing else can give them "
                f'{shared}. To have clean workers: make it by get_context("spawn") of '
                "multiprocessing, and pass it by initializer= and initargs="
            )
        method = method_of(self._mp_context)
        if main == "run" and method.by_value:
            tell_once(
                'main="run" has no effect on workers that loky starts: functions of the script '
                "travel by value there. Leave it out"
            )
        load_own()
        if method.is_fork:
            if max_tasks_per_child is not None and not stands_for_forks:
                raise ValueError(
                    "max_tasks_per_child is incompatible with the 'fork' multiprocessing start "
                    "method; supply a different mp_context."
                )
            if not stands_for_forks:
                _warn_of_threads()
        threads = self._budget.threads_per_worker
        workers = min(self._budget.workers, MOST_WORKERS)
        of_all: Mapping[str, str] = {} if env is None or callable(env) else env
        self._own = _own_variables(env, gpus, of_all)
        if self._own is not None:
            self._own.prepare(workers)
        of_first = {} if self._own is None else self._own.of(0)
        for override in overridden(threads, {**of_all, **of_first}):
            log_once(
                f"{override.variable}={override.value} for workers takes the place of the cap "
                f"on {override.runtime}, {override.instead_of}"
            )
        placement = _placement(threads) if pin_workers else None
        hiring = Hiring(
            method,
            WorkerStart(
                environment=worker_environment(threads, overrides=of_all), threads=threads
            ),
            initializer=initializer,
            initargs=() if initargs is None else tuple(initargs),
            placement=placement,
            own=self._own,
            main=main,
            may_fork=stands_for_forks,
        )
        listener = Listener() if trace is None else _trace(trace)
        watches = stands_for_forks and self._inherits and not method.is_fork
        kind = WatchingScheduler if watches and max_tasks_per_child is None else Scheduler
        self._scheduler = kind(
            size=Size(
                workers,
                BudgetWatch(request, limits) if max_workers is None else None,
                free_to_move=placement is None,
                listener=listener,
            ),
            hiring=hiring,
            tasks_per_worker=max_tasks_per_child,
            memory_per_worker=(
                None if max_memory_per_worker is None else parse_bytes(max_memory_per_worker)
            ),
            memory=None if memory_limit is None else MemoryWatch(parse_bytes(memory_limit)),
            break_on_death=on_worker_death == "break",
            listener=listener,
        )
        self._stacks = Stacks()
        # The scheduler lives on until the submitted work is done; it must not keep the
        # pool alive, nor the pool's end need the pool.
        self._finalizer = weakref.finalize(self, self._scheduler.abandon)
        self._finalizer.atexit = False

    @property
    def size(self) -> int:
        """The most workers that the pool may have now; libraries ask a pool for it (dynesty).

        It follows the limits, and :meth:`resize`. Workers are started as tasks need them.

        Example:
            >>> with ProcessPool(3) as pool:
            ...     pool.size
            3
        """
        return self._scheduler.size.now

    @property
    def _max_workers(self) -> int:
        return self.size

    @property
    def _processes(self) -> dict[int, Any]:  # type: ignore[override]
        """The live workers by process id; programs look here in the standard pool.

        After a submit() there is one, as there.
        """
        self._scheduler.wait_for_a_worker()
        return {worker.pid: worker.process for worker in self._scheduler.workers()}

    @property
    def _broken(self) -> PoolBrokenError | bool:  # type: ignore[override]
        return self._scheduler.broken or False

    # The standard pool's runs no coroutine.
    @overload
    def submit(
        self, fn: Callable[_P, Coroutine[Any, Any, _T]], /, *args: _P.args, **kwargs: _P.kwargs
    ) -> Future[_T]: ...

    @overload
    def submit(
        self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs
    ) -> Future[_T]: ...

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Schedule ``fn(*args, **kwargs)`` in a worker and return its future.

        Args:
            fn: Any callable; lambdas, closures and functions of ``__main__`` as well. A coroutine
                function is run there by ``asyncio.run()``.
            *args: Its positional arguments, pickled when a worker takes the task, or at once if
                one is idle; what runs code of the program for that (``__reduce__``,
                ``__getstate__``) by a thread of its own, so that it may wait, for this pool as
                well. Large
                arrays in them are copied once, arrive writable and are the task's own; one that
                is mapped from a file (``numpy.memmap``) is mapped again. What many tasks need is
                placed once by :func:`safepool.share`.
            **kwargs: Its keyword arguments.

        Returns:
            A future. It raises ``MemoryError`` if there is no room for the arguments or the
            result (:class:`safepool.MemoryLimitError` if the memory limits leave less); what
            ``fn`` raised, with the remote traceback as its cause;
            :class:`safepool.WorkerDiedError` if the worker died; what the pickler raised
            if the call or its result could not be pickled.

        Raises:
            BrokenProcessPool: The pool gave up as a whole.
            RuntimeError: The pool was shut down.

        Example:
            >>> with ProcessPool(1) as pool:
            ...     pool.submit(pow, 2, 10).result()
            1024
        """
        policy = policy_of(fn, self._policy)
        return self._scheduler.submit(fn, args, kwargs, name=name_of(fn), policy=policy)

    def terminate_workers(self) -> None:
        """Send every worker ``SIGTERM`` and give the pool up, without waiting.

        Tasks that have not begun are cancelled, those that a worker does not finish in spite
        of the signal end with :class:`safepool.WorkerDiedError`, and the pool takes no more.
        A worker that has not ended after 30 seconds is killed.

        Example:
            >>> import time
            >>> pool = ProcessPool(1)
            >>> future = pool.submit(time.sleep, 60)
            >>> pool.terminate_workers()
            >>> pool.submit(abs, -1)
            Traceback (most recent call last):
                ...
            RuntimeError: cannot schedule new futures after shutdown
            >>> pool.shutdown()  # waits for the workers' end
        """
        self._scheduler.shut_down(wait=False, end="ask")

    def kill_workers(self) -> None:
        """Kill every worker and give the pool up, as :meth:`terminate_workers` does.

        Example:
            >>> import time
            >>> pool = ProcessPool(1)
            >>> future = pool.submit(time.sleep, 60)
            >>> pool.kill_workers()
            >>> pool.shutdown()  # waits for the workers' end
            >>> future.done()  # cancelled, or with an error if it had started
            True
        """
        self._scheduler.shut_down(wait=False, end="kill")

    @checked("resize")
    def resize(self, max_workers: int) -> None:
        """Keep at most this many workers from now on, whatever the limits say.

        More are started when tasks wait for them; too many end after their task.

        Args:
            max_workers: At least 1.

        Raises:
            ValueError: The number is below 1, or above 61 on Windows.
            TypeError: The number is no integer.

        Example:
            >>> with ProcessPool(1) as pool:
            ...     pool.resize(2)
            ...     sorted(pool.map(abs, [-1, -2]))
            [1, 2]
        """
        if self._own is not None:
            self._own.prepare(max_workers)
        self._scheduler.resize(max_workers)

    def workers(self) -> tuple[WorkerInfo, ...]:
        """Return what each worker does at this moment.

        From any thread; it waits for nothing, also when the pool is stuck.

        Returns:
            One entry for each worker process, oldest first; none before the first task.

        Source:
            ``/proc/pid/status`` and ``/proc/pid/statm``, proc(5), for memory and threads.

        Example:
            >>> with ProcessPool(1) as pool:
            ...     pool.submit(abs, -1).result()
            ...     [(worker.state, worker.tasks_done) for worker in pool.workers()]
            1
            [('idle', 1)]
        """
        return look_at(self._scheduler.workers())

    def dump_tracebacks(self, timeout: float = 1.0) -> dict[int, str]:
        """Return the Python stacks of every thread of every worker: where does it hang?

        Workers are not disturbed: each is sent a real-time signal, whose handler writes the
        stacks down, also in the middle of C code. A system call that such code is in may
        return early (``EINTR``), as after any signal. From any thread.

        Args:
            timeout: Seconds to wait for all of them together, at least 0.

        Returns:
            By process id the stacks, as :mod:`faulthandler` writes them, or in parentheses
            why there are none: the worker is stopped (``SIGSTOP``), still starting, has ended,
            does not answer in time, or this system is not Linux.

        Example:
            >>> import time
            >>> with ProcessPool(1) as pool:
            ...     future = pool.submit(time.sleep, 0.5)
            ...     while not future.running() or pool.workers()[0].task is None:
            ...         time.sleep(0.01)
            ...     (stack,) = pool.dump_tracebacks().values()
            >>> "most recent call first" in stack or stack
            True
        """
        return self._stacks.of(self._scheduler.workers(), timeout)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks, finish those submitted, end the workers.

        Args:
            wait: Return only when that is done.
            cancel_futures: Cancel the tasks that have not begun.

        Example:
            >>> pool = ProcessPool(1)
            >>> pool.shutdown()
            >>> pool.submit(abs, -1)
            Traceback (most recent call last):
                ...
            RuntimeError: cannot schedule new futures after shutdown
        """
        self._scheduler.shut_down(wait=wait, cancel=cancel_futures)

    def __repr__(self) -> str:
        why = f"{self._budget.because.name}: {printable(self._budget.because.raw)}"
        most = f"{self._max_workers} worker{'s' * (self._max_workers != 1)}"
        first = f"{self._budget.workers} at first ({why})"
        plan = getattr(self._mp_context, "plan", None)
        how = "" if plan is None else f", main={plan.mode!r} ({plan.because})"
        return f"<{self._scheduler.state}ProcessPool of at most {most}, {first}{how}>"

    def _repr_html_(self) -> str:
        """Return a table for a notebook: what each worker does now."""
        return worker_table(repr(self)[1:-1], self.workers())


def _names(
    preload: str | Sequence[str], main: Literal["auto", "run", "value"]
) -> tuple[str | list[str], Literal["auto", "run", "value"]]:
    """Return what is preloaded, and how ``__main__`` gets into workers."""
    if preload == "auto":
        return "auto", main
    names = [name for name in preload if name != "__main__"]
    if len(names) < len(preload):
        if main == "value":
            raise ValueError(
                'preload names "__main__", which means main="run", and main="value" contradicts '
                "it: leave one of them out"
            )
        main = "run"
    for name in names:
        # The first part alone: for the others it would have to be imported here.
        top = name.partition(".")[0]
        if not top or (top not in sys.modules and importlib.util.find_spec(top) is None):
            raise ModuleNotFoundError(
                f"preload names {name!r}: no module named {top!r}. Install it, or leave it out",
                name=top,
            )
    return names, main


def _warn_of_threads() -> None:
    """Say which threads a forked worker would find gone, with the locks that they held."""
    ours = threading.current_thread()
    names = [thread.name for thread in threading.enumerate() if thread is not ours]
    known = {thread.native_id for thread in threading.enumerate()}
    names += [f"{name} (native)" for task, name in named_threads() if task not in known]
    if names:
        tell_once(
            f'mp_context="fork" copies a process with {len(names)} more threads: '
            f"{', '.join(sorted(names))}. A lock that one of them holds at that moment is never "
            "released in the worker, which then hangs. Leave mp_context= out: workers are then "
            "forked from a clean server"
        )


def _stands_for_forks() -> bool:
    """Tell whether the program does not know of this pool, and expects forks of itself.

    Under ``safepool run --patch`` it may hand over what only they can get, such as a lock of
    ``multiprocessing``'s default context. Until Python 3.13 the standard pool forks.
    """
    asked = multiprocessing.get_start_method(allow_none=True)
    default = multiprocessing.get_all_start_methods()[0]
    return "_safepool_replaces" in vars(process) and (asked or default) == "fork"


def _own_variables(
    env: Mapping[str, str] | Callable[[int], Mapping[str, str]] | None,
    gpus: Literal["auto"] | int | Sequence[int | str] | None,
    of_all: Mapping[str, str],
) -> Variables | None:
    """Return what each worker has for itself; ``None`` if all have the same."""
    if gpus is None and not callable(env):
        return None
    devices = {} if gpus is None else devices_of(gpus)
    said = {name: ids for name, ids in devices.items() if name not in of_all}
    return Variables(said, env if callable(env) else None)


def _placement(threads: int) -> Placement | None:
    why_not = why_not_bound()
    if why_not:
        tell_once(f"pin_workers=True binds no worker to CPUs: {why_not}")
    return None if why_not else Placement(threads)


def _trace(path: str | os.PathLike[str]) -> Trace:
    from safepool.pool.tracing.trace import Trace  # noqa: PLC0415 -- seldom

    return Trace(path)
