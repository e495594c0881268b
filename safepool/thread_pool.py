"""``safepool.ThreadPool``: as many threads as fit, with capped native pools in each call.

The pool suits work that releases Python's lock (NumPy, SciPy, I/O), and free-threaded Python: no
argument or result is copied or pickled.

Not covered:
    * Properties of a process: nothing can end a call, and a crash in native code ends the program.
    * Later changes of the limits: the number of threads is fixed when the pool is made.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from safepool.arguments import RULES, checked
from safepool.budget import Request
from safepool.machine import read_budget
from safepool.threads.cap import capped

_P = ParamSpec("_P")
_T = TypeVar("_T")


class ThreadPool(ThreadPoolExecutor):
    """A ``ThreadPoolExecutor`` of as many threads as fit the limits, each call capped.

    Native thread pools have ``threads_per_worker`` threads while a call runs, as with
    :func:`safepool.worker`, and their former number when no call runs.

    Args:
        max_workers: The most threads at a time, at least 1; ``None`` is the number that fits, as
            for :class:`safepool.ProcessPool`.
        thread_name_prefix: The same as for ``ThreadPoolExecutor``.
        initializer: Function that each thread calls once before its first call.
        initargs: Arguments of ``initializer``.
        threads_per_worker: Threads for each native pool in a call, at least 1; the number of
            workers that fit is the limit divided by it.

    Raises:
        ValueError: A value is out of its range.
        TypeError: A value has a wrong type, or an argument has an unknown name.

    Source:
        Python, Doc/library/concurrent.futures.rst, "ThreadPoolExecutor".

    Example:
        >>> with ThreadPool() as pool:
        ...     list(pool.map(abs, [-1, -2]))
        [1, 2]
    """

    @checked("ThreadPool", threads_per_worker=RULES["threads"])
    def __init__(
        self,
        max_workers: int | None = None,
        thread_name_prefix: str = "",
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        threads_per_worker: int = 1,
    ) -> None:
        budget, _ = read_budget(
            Request(max_workers=max_workers, threads_per_worker=threads_per_worker)
        )
        super().__init__(budget.workers, thread_name_prefix, initializer, initargs or ())
        self._threads_per_worker = threads_per_worker

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Schedule ``fn(*args, **kwargs)`` in a thread and return its future.

        Args:
            fn: Any callable.
            *args: Positional arguments of ``fn``, not copied.
            **kwargs: Keyword arguments of ``fn``, not copied.

        Raises:
            RuntimeError: The pool was shut down.

        Example:
            >>> with ThreadPool(1) as pool:
            ...     pool.submit(pow, 2, 10).result()
            1024
        """
        threads = self._threads_per_worker

        def run_capped() -> _T:
            with capped(threads):
                return fn(*args, **kwargs)

        return super().submit(run_capped)
