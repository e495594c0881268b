"""The pools that work are found at any time, whoever makes and drops others meanwhile."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING

from safepool import ProcessPool
from safepool.pool.shell import exits

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from safepool.pool.shell.worker import Worker


STRESS_S = 1.5


class Pool:
    """As much of a pool as the interpreter's exit asks for."""

    def exit(self) -> None:
        pass

    def descriptors(self) -> Iterable[int]:
        return ()

    def workers(self) -> list[Worker]:
        return []


def test_pools_that_others_make_and_drop_are_no_obstacle() -> None:
    """Each call that is forked asks for them, in whichever thread."""
    kept = [Pool() for _ in range(500)]
    for pool in kept:
        exits.finish_at_exit(pool)
    stop = threading.Event()
    failures: list[BaseException] = []

    def make_and_drop() -> None:
        try:
            while not stop.is_set():
                made = [Pool() for _ in range(20)]
                for pool in made:
                    exits.finish_at_exit(pool)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=make_and_drop) for _ in range(2)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + STRESS_S
        while time.monotonic() < deadline:
            found = exits.working()
            assert len(found) >= len(kept)
            del found
    finally:
        sys.setswitchinterval(before)
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures


def test_a_pool_that_is_made_during_the_look_does_not_end_it() -> None:
    """Another thread's turn comes between two pools: the look begins again."""
    looks = 0

    class Set:
        def __iter__(self) -> Iterator[Pool]:
            nonlocal looks
            looks += 1
            yield Pool()
            if looks == 1:
                raise RuntimeError("Set changed size during iteration")

    before = exits._working
    exits._working = Set()  # type: ignore[assignment]
    try:
        assert len(exits.working()) == 1
    finally:
        exits._working = before
    assert looks == 2


def test_a_pool_that_is_dropped_is_not_found_any_more() -> None:
    with ProcessPool(1) as pool:
        assert pool.submit(abs, -1).result(timeout=30) == 1
        mine = [one for one in exits.working() if [*one.workers()]]
        assert mine
        del mine
    del pool
    assert not [one for one in exits.working() if one.workers()]
