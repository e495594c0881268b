"""Whatever is harmed at random moments, each call is accounted for.

First in thousands of short calls whose workers are killed, then in rounds of everything
(``support_chaos.py``): the same ones in each run, for ``SAFEPOOL_TEST_CHAOS_S`` seconds; with
``-m slow`` others each time. ``SAFEPOOL_TEST_CHAOS_SEED`` chooses them.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import support_machine as calls
from support_chaos import ROUND_LIMIT_S, chaos
from support_inside import ready_pids

from safepool import ProcessPool, WorkerDiedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills workers")

# Beside the killing, one call in so many has an array of 1 MB, or returns one of 100 KB.
LARGE_EVERY = 400
# Between two kills, on average: what some eight hundred calls leave in the log.
APART_BYTES = 4_800
TASKS_AT_ONCE = 250
# The slow version goes on for so long.
SLOW_S = float(os.environ.get("SAFEPOOL_TEST_SLOW_S", "10"))
# Of everything that is harmed, in every run and for each seed of the slow version.
CHAOS_S = float(os.environ.get("SAFEPOOL_TEST_CHAOS_S", "10"))
SLOW_CHAOS_S = max(CHAOS_S, 2 * SLOW_S)
CHAOS_SEED = os.environ.get("SAFEPOOL_TEST_CHAOS_SEED")


class Killer(threading.Thread):
    """Sends a random signal to a random worker again and again, until it is told to stop.

    The moments are drawn by how far the work is, not by the clock: on a busy machine there are
    as many.
    """

    def __init__(self, pool: ProcessPool, log: str, rng: random.Random) -> None:
        super().__init__()
        self.pool, self.log, self.rng = pool, log, rng
        self.kills = 0
        self.over = threading.Event()

    def run(self) -> None:
        next_bytes = 0.0
        while not self.over.wait(self.rng.uniform(0.0, 0.004)):
            if os.stat(self.log).st_size < next_bytes:
                continue
            # Only those that have begun to work: three in a row that have not break the pool.
            ready = ready_pids(self.pool)
            number = self.rng.choice([signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
            if ready:
                self.kills += 1
                try:
                    os.kill(self.rng.choice(ready), number)
                except ProcessLookupError:
                    self.kills -= 1
                next_bytes = os.stat(self.log).st_size + self.rng.expovariate(1 / APART_BYTES)


class Chaos:
    """One run: calls by submit and by map, whose ends are counted."""

    def __init__(self, log: Path, *, count: int, retries: int, number: int) -> None:
        self.log = str(log)
        log.touch()
        self.rng = random.Random(number)
        self.values = self.lost = self.dropped = 0
        with ProcessPool(2, retries=retries) as pool:
            killer = Killer(pool, self.log, self.rng)
            pool.submit(abs, -1).result(timeout=60)
            killer.start()
            try:
                for first in range(0, count, 2 * TASKS_AT_ONCE):
                    self.account_for(pool, first)
            finally:
                killer.over.set()
                killer.join()
        self.kills = killer.kills
        self.runs = calls.runs_of(self.log)

    def account_for(self, pool: ProcessPool, first: int) -> None:
        submitted = range(first, first + TASKS_AT_ONCE)
        mapped = range(first + TASKS_AT_ONCE, first + 2 * TASKS_AT_ONCE)
        results = self.map(pool, mapped)
        futures = [
            pool.submit(calls.run, self.log, n, *self.sort_of(n), self.argument(n))
            for n in submitted
        ]
        for n, future in zip(submitted, futures, strict=True):
            error = future.exception(timeout=60)
            if error is None:
                assert future.result() == n
                self.values += 1
            else:
                assert isinstance(error, WorkerDiedError)
                self.lost += 1
        # A map ends with the first call that is lost; what it had not begun is dropped.
        at = mapped.start
        try:
            for result in results:
                assert result == at
                at += 1
        except WorkerDiedError:
            self.lost += 1
            at += 1
            self.dropped += mapped.stop - at
            self.values -= 1
        else:
            assert at == mapped.stop
        self.values += at - mapped.start

    def map(self, pool: ProcessPool, numbers: range) -> Iterator[Any]:
        return pool.map(
            calls.run,
            [self.log] * len(numbers),
            numbers,
            [self.sort_of(n)[0] for n in numbers],
            [self.argument(n) for n in numbers],
            chunksize=self.rng.choice([1, 1, 16]),
        )

    def sort_of(self, n: int) -> tuple[str]:
        return ("large" if n % LARGE_EVERY == 7 else "quick",)

    def argument(self, n: int) -> bytearray | None:
        return bytearray(1_000_000) if n % LARGE_EVERY == 3 else None


def test_what_is_lost_is_no_more_than_what_was_killed(tmp_path: Path) -> None:
    """Without retries nothing runs twice, and everything else arrives."""
    count = 20_000

    chaos = Chaos(tmp_path / "log", count=count, retries=0, number=1)

    assert chaos.kills > 3
    assert chaos.lost <= chaos.kills
    assert chaos.values + chaos.lost + chaos.dropped == count
    assert max(chaos.runs.values()) == 1
    assert chaos.values <= len(chaos.runs) <= count


def test_with_retries_nothing_is_lost(tmp_path: Path) -> None:
    count = 4_000

    chaos = Chaos(tmp_path / "log", count=count, retries=5, number=2)

    assert chaos.kills > 1
    assert (chaos.values, chaos.lost, chaos.dropped) == (count, 0, 0)
    assert len(chaos.runs) == count
    assert sum(chaos.runs.values()) <= count + chaos.kills


@pytest.mark.slow
@pytest.mark.timeout(SLOW_S + 200)
def test_chaos_of_any_seed(tmp_path: Path) -> None:
    """As above, with another seed each time."""
    deadline = time.monotonic() + SLOW_S
    while time.monotonic() < deadline:
        number = time.time_ns()
        count, log = 4_000, tmp_path / str(number)
        chaos = Chaos(log, count=count, retries=0, number=number)
        assert chaos.lost <= chaos.kills, number
        assert chaos.values + chaos.lost + chaos.dropped == count, number
        assert max(chaos.runs.values()) == 1, number


@pytest.mark.timeout(CHAOS_S + 2 * ROUND_LIMIT_S)
def test_all_is_accounted_for_whatever_is_harmed() -> None:
    """Kills, stops, limits, forks and signals while calls of every kind run; see `HARMS`."""
    # With this seed the first four rounds have every harm, the first six most endings.
    done = chaos(CHAOS_SEED or "17117", CHAOS_S)

    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(SLOW_CHAOS_S + 2 * ROUND_LIMIT_S)
@pytest.mark.parametrize("number", range(3))
def test_all_is_accounted_for_with_any_seed(number: int) -> None:
    """As above, for longer."""
    done = chaos(f"{CHAOS_SEED or time.time_ns()}-{number}", SLOW_CHAOS_S)

    assert done.returncode == 0, done.stdout
