"""A task that is a coroutine function: the worker runs its coroutine to the end.

The check is of a task's result and not of its function: a partial, a decorated function, and an
object with an asynchronous ``__call__`` return a coroutine as well. The first coroutine imports
``asyncio``.

Not covered:
    * An asynchronous generator: it has no single result and, like a generator, cannot be pickled.
    * Coroutines inside of a result, such as a list of coroutines: they cannot be pickled.
"""

from __future__ import annotations

from typing import Any


def run_to_its_end(awaitable: Any) -> Any:
    """Run a coroutine by ``asyncio.run()`` in a new event loop, and return its result.

    Its exception is raised without the frames of the event loop.

    Example:
        >>> async def two() -> int:
        ...     return 2
        >>> run_to_its_end(two())
        2
    """
    import asyncio  # noqa: PLC0415 -- 40 ms, of use to few workers

    async def wait() -> Any:
        return await awaitable

    try:
        return asyncio.run(wait())
    except BaseException as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code is not wait.__code__:
            trace = trace.tb_next
        # By the base class: a frozen dataclass forbids to set an attribute.
        if trace is not None and trace.tb_next is not None:
            BaseException.with_traceback(error, trace.tb_next)
        raise
