"""``ProcessPool``: the executor that people hold."""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
import threading
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

_P = ParamSpec("_P")
_T = TypeVar("_T")


if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor as _Standard
else:
    # "safepool run --patch" has put this pool in its place, and left it there.
    _Standard = vars(process).get("_safepool_replaces") or process.ProcessPoolExecutor


# Programs ask isinstance(pool, ProcessPoolExecutor). No method of that class is used, and its
# __init__() is not called. The overrides of map() differ in their types: they accept no items at
# all, and are not checked against the function.
class ProcessPool(PoolCalls, _Standard):  # type: ignore[misc]
    """A process pool that fits the machine, in the place of ``ProcessPoolExecutor``.

    The number of workers follows from the CPUs that the kernel grants. Every native thread pool
    in a worker has one thread. Workers share nothing with each other: a worker that dies fails
    its own task with :class:`safepool.WorkerDiedError`, and is replaced.

    Args:
        *Size*
        max_workers (int; default None): The most workers at a time, at least 1 (on Windows at most
            61). ``None`` is the number that fits, or the environment variable
            ``SAFEPOOL_MAX_WORKERS``: see :func:`safepool.cpu_count`. Example: ``max_workers=4``.
        rounding (str; default "floor"): Treatment of a fraction of a CPU. ``"floor"`` leaves it to
            this process. ``"ceil"`` starts one more worker: the kernel then freezes all workers
            for a part of every period. ``"nearest"`` rounds to the nearest whole number. Example:
            ``rounding="ceil"`` for a batch job.
        reserve (float, CPUs; default 0): CPUs kept for this process and for programs beside it.
            Example: ``reserve=0.5``.
        memory_per_worker (int or str, bytes; default None): Memory that one worker needs, in bytes
            or as text such as ``"2GiB"``. The pool starts no more workers than the free memory of
            the control groups holds. ``None`` ignores memory. Example:
            ``memory_per_worker="2GiB"``.
        gpus ("auto", int or list; default None): One GPU for each worker, assigned in turn. The
            pool sets ``CUDA_VISIBLE_DEVICES``, or the variable that the program itself has set
            (``HIP_VISIBLE_DEVICES``, ``ROCR_VISIBLE_DEVICES``). ``"auto"`` uses every device that
            this variable lists, MIG ids included; without the variable, every NVIDIA device with a
            file in ``/dev``. Without a device, the pool logs that once and sets nothing. A number
            uses that many of the devices, from the first. A list names the devices; one entry may
            name several: ``["0,1", "2,3"]``. Variables in ``env=`` take precedence. Example:
            ``gpus="auto"``.

        *Threads*
        threads_per_worker (int or "auto", threads; default 1): The most threads of each native
            pool in a worker, at least 1. The number of workers that fit is the CPU limit divided
            by it. ``"auto"`` divides the CPU limit by ``max_workers``. Example:
            ``threads_per_worker=2``.
        pin_workers (bool; default False): Bind each worker to ``threads_per_worker`` CPUs of this
            process's affinity mask, before it imports anything. This bounds libraries that have no
            variable and start a thread per visible CPU. Workers share a CPU only if there are too
            few. Libraries imported before the fork keep their size; child processes of tasks are
            bound too. The price: the kernel can no longer move a worker away from a busy CPU, so
            use it where no other container uses the same CPUs. Linux only. Where it is impossible,
            the pool logs that once and binds nothing. Example: ``pin_workers=True``.
        env (dict or function; default None): Environment variables of the workers. A variable that
            bounds native threads replaces the cap (``{"OMP_NUM_THREADS": "2"}``), and the pool
            logs that. A function returns the variables of one worker: the pool calls it in this
            process, once for each :func:`safepool.worker_index`. They are set when the worker is
            born, after the fork server has run a guarded script. Example: ``env=lambda i:
            {"PORT": str(9000 + i)}``.

        *Memory*
        max_memory_per_worker (int or str, bytes; default None): The pool replaces a worker that
            holds more than this after a task. ``None`` sets no limit. A free-threaded Python keeps
            freed memory for new objects, and that memory counts. Example:
            ``max_memory_per_worker="2GiB"``.
        memory_limit (int or str, bytes; default None): The pool kills a worker that holds more
            than this during a task, with every process that the task started. The task ends with
            :class:`safepool.WorkerDiedError`, which has the figures and the Python stack, or runs
            again if it has ``retries``. The pool measures ten times a second, and more often while
            the memory grows. It counts resident memory of the worker and of the processes that its
            task started, without shared memory, mapped files and the memory the worker was born
            with. A worker that holds more after a task is replaced. ``None`` sets no
            limit. Linux only. Example: ``memory_limit="2GiB"``.

        *Failure*
        timeout (float, seconds; default None): Seconds that a task may run, from its start, above
            0. Then the pool kills its worker with every process that the task started, and the
            task ends with :class:`safepool.TaskTimeoutError`. ``None`` sets no limit. Example:
            ``timeout=30``.
        retries (int, runs; default 0): Number of times that a task runs again after its worker
            died, at least 0. A task that raised an exception or exceeded its timeout never runs
            again. :func:`safepool.worker` sets timeout and retries of one function. Example:
            ``retries=2``.
        on_worker_death (str; default "replace"): Consequence of a worker's death. ``"replace"``
            fails the worker's task and replaces the worker. ``"break"`` ends the whole pool, as
            the standard pool does, if the task has no retries left. Example:
            ``on_worker_death="break"``.
        end_subprocesses (bool; default False): ``True`` ends all processes that tasks started, and
            their descendants, within a second after the end of this program, even daemons and
            after ``kill -9`` of the program, a worker or the server. While the program runs, such
            processes go on, even after their task and after the pool. The option costs one small
            process above the fork server. ``False`` leaves such processes alone. In both cases a
            timeout, or a kill of the task, ends the processes that the task started. The option
            needs workers that a server forks; where each worker is a fresh interpreter, the pool
            logs once that the option has no effect. Example: ``end_subprocesses=True``.

        *Start*
        mp_context (context or str; default None): A ``multiprocessing`` context that starts the
            workers, or its name. ``None`` is ``"safepool"`` on Linux: workers are forked from a
            server process without threads. Elsewhere it is ``"loky"``: each worker is a fresh
            interpreter; on Linux the extra ``safepool[loky]`` brings it. Neither needs ``if
            __name__ == "__main__"`` in the script. ``"fork"`` copies this process, and its threads
            may leave a lock held: a warning names the threads that exist when the pool is made.
            Example: ``mp_context="spawn"``.
        initializer (function; default None): Function that each worker calls once before its first
            task, after the native threads are capped. Example: ``initializer=connect,
            initargs=("db",)``.
        initargs (tuple; default ()): Arguments of ``initializer``. They may contain locks, queues
            and values of ``multiprocessing.get_context("spawn")``; with forked workers, those of
            any context. Example: ``initargs=("db",)``.
        max_tasks_per_child (int, tasks; default None): The pool replaces a worker after this many
            tasks, at least 1. ``None`` sets no limit. Not allowed with ``"fork"``, as in the
            standard pool: a later fork would copy a process with busy threads. Example:
            ``max_tasks_per_child=1000``.
        preload ("auto" or list; default "auto"): Modules that the fork server imports once;
            workers share their memory. ``"auto"`` is each installed library that the program or a
            task of an earlier worker has imported, unless its import leaves a thread, an open file
            or a child process. With more than one thread per worker ``"auto"`` is empty. A list
            names modules, to which the same condition applies; ``[]`` is none. The server skips a
            module whose import raises, and tasks import it themselves. Without effect where
            workers are not forked from a server. Example: ``preload=["mylib"]``.
        main (str; default "auto"): Source of the program's ``__main__`` in workers that are forked
            from a server. ``"run"``: the server runs the script once, as ``__mp_main__``, before
            it forks workers. They have all that its top level imports, sets and computes, and its
            functions and classes travel by name. ``"value"``: nothing is run; functions, classes
            and data of the script are sent before the first call that uses them. ``"auto"`` is
            ``"run"`` for a script or module with ``if __name__ == "__main__":`` at its top level.
            ``"auto"`` is ``"value"`` without that guard, at a prompt, in a notebook and with
            ``-c``. If the top level fails in the server, ``"auto"`` becomes ``"value"`` too, and
            the logger ``safepool`` says so once. ``"__main__"`` in ``preload`` is the same as
            ``"run"``. Workers of ``"spawn"`` and ``"forkserver"`` run a guarded script themselves,
            as in the standard pool; ``"value"`` also sends them functions, classes and data that
            their run did not define. Example: ``main="value"``.

        *Observation*
        trace (path; default None): File for a timeline of the run, for https://ui.perfetto.dev
            and ``safepool report``. An existing file is replaced. The file is valid at any moment,
            also after a crash; ``help("safepool.pool.tracing.events")`` describes its content and
            size. Example: ``trace="run.json"``.

    A change of a global by the initializer or a task stays in that worker. When the program
    changes its value of the global, also in place, the next call that uses the global delivers the
    new value, and replaces the worker's.

    A pool whose size comes from the limits follows them. While it has work, the pool reads the
    limits once a second, starts workers when they grow, and ends workers after their task when
    they shrink.

    Workers have the settings that the program has when a call is submitted, such as warning
    filters, the context of decimal or the options of pandas: :func:`safepool.register_setting`
    lists them, and adds others. A setting with a value for each thread is taken from the thread
    that made the pool.

    ``multiprocessing.current_process()._identity`` numbers workers as in the standard pools: from
    1, over all pools of the program, and no number is used again.

    Raises:
        ValueError: A value is out of its range; ``main`` is ``"run"`` without a script;
            ``end_subprocesses`` is ``True`` but workers are not forked from a server;
            ``memory_limit`` is given where the system does not report a worker's memory.
        TraceFileError: The file for ``trace`` cannot be written, or another running pool writes
            it.
        TypeError: A value has a wrong type, or an argument has an unknown name.
        ModuleNotFoundError: ``preload`` names a module that does not exist.

    Source:
        Python, Doc/library/concurrent.futures.rst, "ProcessPoolExecutor".

    Example:
        >>> with ProcessPool(1) as pool:
        ...     list(pool.map(lambda x: x * x, [1, 2, 3]))
        [1, 4, 9]
    """

    _scheduler: Scheduler

    # Under "safepool run --patch": it may have to share objects with its workers as a fork does.
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
                f"workers are forks of this process, because only forks inherit {shared}. "
                'Make it by multiprocessing.get_context("spawn") and pass it by initializer= and '
                "initargs= to have clean workers"
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
        devices = {} if gpus is None else devices_of(gpus)
        self._own = Variables(
            {name: ids for name, ids in devices.items() if name not in of_all},
            env if callable(env) else None,
        )
        self._own.prepare(workers)
        for override in overridden(threads, {**of_all, **self._own.of(0)}):
            log_once(
                f"{override.variable}={override.value} in env= replaces the cap on "
                f"{override.runtime}, {override.instead_of}. Leave it out of env= to keep the cap"
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
            memory=_memory_watch(memory_limit, max_memory_per_worker),
            break_on_death=on_worker_death == "break",
            listener=listener,
        )
        self._stacks = Stacks()
        # The scheduler lives until the submitted work is done. So the scheduler must not keep the
        # pool alive, and its end must not need the pool.
        self._scheduler.serve(self)

    @property
    def size(self) -> int:
        """The most workers that the pool may have now. Libraries such as dynesty read it.

        The number follows the limits and :meth:`resize`. Workers are started as tasks need them.

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
                function is run in the worker by ``asyncio.run()``.
            *args: Positional arguments of ``fn``. The pool pickles them at once if a worker is
                idle, otherwise when a worker takes the task. Pickling that runs code of the
                program (``__reduce__``, ``__getstate__``) has a separate thread, so that it may
                wait, even for a result of this pool. Large arrays are copied once; the task may
                write to its copy. A ``numpy.memmap`` maps its file again. Place an object that
                many tasks need with :func:`safepool.share`.
            **kwargs: Keyword arguments of ``fn``.

        Returns:
            A future. ``result()`` raises the exception of ``fn``, with the remote traceback as its
            cause; :class:`safepool.WorkerDiedError` if the worker died; the pickler's exception if
            the call or its result cannot be pickled; ``MemoryError`` if there is no room for the
            arguments or the result (:class:`safepool.MemoryLimitError` if the memory limits are
            the reason).

        Raises:
            BrokenProcessPool: The whole pool is broken.
            RuntimeError: The pool was shut down.

        Example:
            >>> with ProcessPool(1) as pool:
            ...     pool.submit(pow, 2, 10).result()
            1024
        """
        policy = policy_of(fn, self._policy)
        return self._scheduler.submit(fn, args, kwargs, name=name_of(fn), policy=policy)

    _own_submit = submit

    def terminate_workers(self) -> None:
        """Send every worker ``SIGTERM`` and close the pool, without waiting.

        Tasks that have not begun are cancelled. A running task ends with
        :class:`safepool.WorkerDiedError`, unless it handles the signal and returns. The pool
        accepts no more tasks, and kills a worker that has not ended after 30 seconds.

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
        """Send every worker ``SIGKILL`` and close the pool, without waiting.

        Tasks that have not begun are cancelled. A running task ends with
        :class:`safepool.WorkerDiedError`.

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
        """Set the most workers of the pool, in place of the number that follows from the limits.

        A larger pool starts workers when tasks wait. In a smaller one, surplus workers end after
        their task.

        Args:
            max_workers: The new number, at least 1.

        Raises:
            ValueError: The number is below 1, or above 61 on Windows.
            TypeError: The number is no integer.

        Example:
            >>> with ProcessPool(1) as pool:
            ...     pool.resize(2)
            ...     sorted(pool.map(abs, [-1, -2]))
            [1, 2]
        """
        self._own.prepare(max_workers)
        self._scheduler.resize(max_workers)

    def workers(self) -> tuple[WorkerInfo, ...]:
        """Return the present state of each worker: its task, memory and threads.

        Can be called from any thread. The call never waits, even if the pool is stuck. From
        another terminal ``safepool top PID`` shows the same. From Python 3.15 on, ``python -m
        profiling.sampling attach PID`` profiles one of the workers.

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
        """Return the Python stacks of every thread of every worker, to find where a task hangs.

        Workers go on: the handler of a real-time signal writes the stacks, also in the middle of C
        code. A system call that such code is in may return early (``EINTR``), as after any signal.
        Can be called from any thread.

        Args:
            timeout: Seconds to wait for all workers together, at least 0.

        Returns:
            Stacks by process id, in the format of :mod:`faulthandler`. A worker without stacks has
            the reason in parentheses: it is stopped (``SIGSTOP``), is still starting, has ended or
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
        """Accept no more tasks, finish the submitted tasks, and end the workers.

        Args:
            wait: Whether to return only after the last worker has ended.
            cancel_futures: Whether to cancel the tasks that have not begun.

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
    """Return the modules to preload, and the way of ``__main__`` into workers."""
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


def _placement(threads: int) -> Placement | None:
    why_not = why_not_bound()
    if why_not:
        tell_once(f"pin_workers=True binds no worker to CPUs: {why_not}")
    return None if why_not else Placement(threads)


def _memory_watch(*limits: float | str | None) -> MemoryWatch | None:
    found = [None if limit is None else parse_bytes(limit) for limit in limits]
    return None if found == [None, None] else MemoryWatch(*found)


def _trace(path: str | os.PathLike[str]) -> Trace:
    from safepool.pool.tracing.trace import Trace  # noqa: PLC0415 -- seldom

    return Trace(path)
