"""Many threads of the program use one pool; on a Python without the GIL they do it at once."""

from __future__ import annotations

import logging
import os
import random
import sys
import sysconfig
import threading
import warnings
from concurrent.futures import CancelledError, wait
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import support_tasks as tasks
from support_processes import wait_until

from safepool import ProcessPool

if TYPE_CHECKING:
    from collections.abc import Callable

THREADS = 16
ROUNDS = 40
SCRIPT = """
factor, table = 3, {}
def scaled(x):
    return factor * x if table is not None else 0
"""


def in_threads(do: Callable[[int], None]) -> None:
    """Call it in as many threads at the same moment; raise what the first of them has raised."""
    errors: list[BaseException] = []
    begin = threading.Barrier(THREADS)

    def run(number: int) -> None:
        begin.wait(60)
        try:
            do(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def is_gil_enabled() -> bool:
    return getattr(sys, "_is_gil_enabled", lambda: True)()


def test_each_thread_gets_its_own_answers() -> None:
    """Single calls, maps that are read to the end, maps that are left, and a lambda of each."""

    def use(number: int) -> None:
        drawn = random.Random(number)
        for turn in range(ROUNDS):
            base = number * 1000 + turn
            futures = [pool.submit(tasks.add, base, more=one) for one in range(3)]
            if drawn.random() < 0.3:
                found = pool.map(lambda x, base=base: x + base, range(20))
                assert list(found) == list(range(base, base + 20))
            if drawn.random() < 0.3:
                found = pool.map(tasks.square, range(base, base + 500))
                assert next(found) == base * base
                del found
            assert [future.result(60) for future in futures] == [base, base + 1, base + 2]

    with ProcessPool(2) as pool:
        in_threads(use)


def test_calls_are_cancelled_while_others_are_made() -> None:
    """Each call is either done or cancelled, and its future says which."""
    outcomes: list[bool] = []

    def use(number: int) -> None:
        drawn = random.Random(number)
        for turn in range(ROUNDS):
            futures = [pool.submit(tasks.square, turn) for _ in range(5)]
            chosen = drawn.choice(futures)
            taken_back = chosen.cancel()
            wait(futures, 60)
            for future in futures:
                try:
                    assert future.result(60) == turn * turn
                except CancelledError:
                    assert future is chosen
                    assert taken_back
            outcomes.append(taken_back)

    with ProcessPool(2) as pool:
        in_threads(use)
        wait_until(lambda: pool.submit(tasks.square, 3).result(60) == 9)

    assert len(outcomes) == THREADS * ROUNDS


def test_callbacks_are_called_once_each() -> None:
    called: list[int] = []

    def use(number: int) -> None:
        for turn in range(ROUNDS):
            future = pool.submit(tasks.square, turn)
            for _ in range(3):
                future.add_done_callback(lambda _: called.append(number))

    with ProcessPool(2) as pool:
        in_threads(use)

    assert sorted(called) == sorted(list(range(THREADS)) * ROUNDS * 3)


def test_a_pool_is_shut_down_while_others_submit() -> None:
    """A call is refused, or its future ends: nobody waits for ever."""
    pool = ProcessPool(2)

    def use(number: int) -> None:
        futures = []
        for turn in range(ROUNDS * 10):
            if number == 0 and turn == ROUNDS:
                pool.shutdown(wait=False, cancel_futures=True)
            try:
                futures.append(pool.submit(tasks.square, turn))
            except RuntimeError:
                break
        done, not_done = wait(futures, 60)
        assert not not_done, len(done)

    in_threads(use)
    pool.shutdown()


def test_the_script_changes_while_its_calls_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, variables, settings and modules come and go in some threads; others submit."""
    script: Any = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", script)
    exec(SCRIPT, vars(script))
    monkeypatch.setattr(warnings, "filters", [*warnings.filters])
    names = [f"many_threads_{number}" for number in range(4)]

    def change(number: int) -> None:
        name = f"many_threads_{number}"
        for turn in range(ROUNDS * 5):
            setattr(script, f"extra_{number}_{turn}", turn)
            script.table[name] = turn
            os.environ[name] = str(turn)
            sys.modules[f"{name}.{turn}"] = ModuleType(f"{name}.{turn}")
            logging.getLogger(f"{name}.{turn % 7}").setLevel(turn % 50)
            warnings.filterwarnings("ignore", message=f"{name} {turn}")
            sys.path.append(f"/{name}")
            delattr(script, f"extra_{number}_{turn}")
            sys.path.remove(f"/{name}")
            del sys.modules[f"{name}.{turn}"], os.environ[name]

    def use(number: int) -> None:
        if number < len(names):
            change(number)
            return
        for turn in range(ROUNDS // 4):
            assert pool.submit(script.scaled, turn).result(60) == 3 * turn
            assert pool.submit(lambda x, base=turn: base + x, 2).result(60) == turn + 2
            assert list(pool.map(script.scaled, range(5))) == [0, 3, 6, 9, 12]

    with ProcessPool(2) as pool:
        in_threads(use)


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="there is the GIL")
def test_the_gil_stays_off() -> None:
    """Nothing that a pool loads switches it on, in the program or in a worker."""
    with ProcessPool(1) as pool:
        assert not pool.submit(is_gil_enabled).result(timeout=60)
        assert pool.submit(lambda: [is_gil_enabled()]).result(timeout=60) == [False]
    assert not is_gil_enabled()
