"""What a test must know of a running pool that nobody outside can see; tests do not reach inside.

Most tests need none of it: ``pool.workers()`` tells what each worker does. Here are the moments in
between, which a race has to be forced into, and what makes a pool take one way of several.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safepool.workers.describe import name_of

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Mapping

    from safepool import ClusterPool, ProcessPool
    from safepool.pool.core.events import Force
    from safepool.pool.shell.memory import MemoryWatch
    from safepool.pool.shell.turns import Turns
    from safepool.pool.shell.worker import Worker


def workers_of(pool: ProcessPool) -> list[Worker]:
    """Return the workers themselves, with their boards, channels and ledgers."""
    return pool._scheduler.workers()


def ready_pids(pool: ProcessPool) -> list[int]:
    """Return those that have begun to work: a few killed before that rightly break a pool."""
    return sorted(worker.pid for worker in workers_of(pool) if worker.ready)


def start_all(pool: ProcessPool) -> None:
    """Let all workers start, though no call waits."""
    pool._scheduler.staff_up()


def expect(pool: ProcessPool, each_ns: float, *functions: Callable[..., Any]) -> None:
    """Let the pool think that calls of these take so long: short ones are sent ahead."""
    for function in functions:
        pool._scheduler._core.pace._nanoseconds[name_of(function)] = each_ns


def room_of(pool: ProcessPool, each_ns: int) -> int:
    """Return how many calls of that time a busy worker is sent ahead."""
    pace = pool._scheduler._core.pace
    pace.note("f", each_ns)
    return pace.room("f", each_ns, idle=False)


def expected_ns(pool: ProcessPool, name: str) -> float:
    """Return how long the pool thinks that a call of this name takes."""
    return pool._scheduler._core.pace.expected_ns(name)


def waits_for_its_reader(pool: ProcessPool) -> bool:
    """Tell whether no worker has anything to do, because nobody takes what they have done."""
    held = pool._scheduler._core.backlog._held
    return bool(held) and all(worker.is_idle for worker in workers_of(pool))


def has_calls_aside(pool: ProcessPool) -> bool:
    """Tell whether a call that is pickled elsewhere is kept."""
    return bool(pool._scheduler._dispatch.aside)


def has_taken_all_in(pool: ProcessPool) -> bool:
    """Tell whether the scheduler's thread has got all that callers have brought it."""
    return not pool._scheduler._inbox


def knows_who_has_left(pool: ProcessPool) -> bool:
    """Tell whether that thread has learnt of each map whose iterator was closed."""
    return not pool._scheduler._dropped_runs


def is_closed(pool: ProcessPool) -> bool:
    """Tell whether a shutdown has begun, though it may wait."""
    return pool._scheduler._closing


def wake(pool: ProcessPool) -> None:
    """Let the scheduler's thread look again, though it may have looked just before."""
    pool._scheduler.wake()


def may_send_alone(pool: ProcessPool) -> bool:
    """Tell whether a caller may send its call to a worker itself."""
    return bool(turns_of(pool).idle)


def turns_of(pool: ProcessPool) -> Turns:
    """Return what lets callers send calls to workers themselves."""
    return pool._scheduler._turns


def end(pool: ProcessPool, force: Force, *, wait: bool) -> None:
    """End a pool as Ctrl-C does ("terminate"), or as `kill_workers`."""
    pool._scheduler.shut_down(wait=wait, end=force)


def thread_of(pool: ProcessPool) -> threading.Thread | None:
    """Return the scheduler's thread."""
    return pool._scheduler._thread


def memory_watch_of(pool: ProcessPool) -> MemoryWatch:
    """Return what compares workers with ``memory_limit=``."""
    watch = pool._scheduler._memory
    assert watch is not None
    return watch


# Of cluster pools.


def unused_places(pool: ClusterPool) -> Mapping[str, str]:
    """Return why each place is not used; a pool that waits for others tells nobody."""
    return pool._scheduler.unused_places()


def wait_for_answers(pool: ClusterPool) -> None:
    """Return when each place has answered, and that has had its effect."""
    pool._scheduler.wait_for_answers(60)


def listed_places(pool: ClusterPool) -> tuple[str, ...]:
    """Return the places that the pool has found in the engine's list."""
    return pool._scheduler._listed


def kept_by_nodes(pool: ClusterPool) -> list[tuple[list[str], list[str]]]:
    """Return which large arguments each node keeps, and which it is told next to forget."""
    return [([*one.kept], [*one.forget]) for one in pool._scheduler._nodes.values()]


def reaches_all_nodes(pool: ClusterPool) -> bool:
    """Tell whether messages go to each node's process directly, past Dask's scheduler."""
    carrier: Any = pool._scheduler._carrier
    reached = carrier._reached
    return all(reached.get(node.place, (False,))[0] for node in pool.nodes())


def put_before_carrier(pool: ClusterPool, make: Callable[[Any], Any]) -> Any:
    """Let another carry the messages, made of the one that does."""
    pool._scheduler._carrier = made = make(pool._scheduler._carrier)
    return made


def let_answers_be_late(pool: ClusterPool, place: str) -> None:
    """Let all that a place owes have been due long ago."""
    node = pool._scheduler._nodes.get(place)
    if node is not None:
        node.due.update(dict.fromkeys(node.due, 0.0))
