"""CPython's own tests of ``multiprocessing.Pool``, run with ours in its place.

    python support_cpython_pool_suite.py CONTEXT [EXCLUDED ...]

prints one JSON object: the name of each test method, and how it ended, as
``support_cpython_suite.py``, which says why this is a process of its own. The tests are the
interpreter's (``test._test_multiprocessing``); none of their code is here.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import multiprocessing
import sys
import unittest
from typing import Any

import support_cpython_suite
import support_inside

import safepool

# Seconds after which a run that has not ended shows where each of its threads is.
HANGS_S = 300.0

# By the name of their class, the tests that are about a pool; None is all of them.
CLASSES: dict[str, set[str] | None] = {
    "WithProcessesTestPool": None,
    "WithProcessesTestPoolWorkerErrors": None,
    "WithProcessesTestPoolWorkerLifetime": None,
    "TestInitializers": {"test_pool_initializer"},
    "TestPoolNotLeakOnFailure": None,
    "TestStdinBadfiledescriptor": {"test_pool_in_process"},
}


class Pool(safepool.Pool):
    """Ours, with the one private method that a test calls."""

    context: Any = None

    def __init__(self, processes: Any = None, *args: Any, **keywords: Any) -> None:
        keywords.setdefault("context", self.context)
        super().__init__(processes, *args, **keywords)

    def _repopulate_pool(self) -> None:
        support_inside.start_all(self._engine)


# At the top level, so that a worker has the classes as well: some of their methods run there.
suite: Any = importlib.import_module("test._test_multiprocessing")
suite.ProcessesMixin.Pool = staticmethod(Pool)
suite.install_tests_in_module_dict(globals(), "spawn")
# Of the whole module: they stop what every program of multiprocessing's has one of.
del globals()["setUpModule"], globals()["tearDownModule"]


def main() -> None:
    faulthandler.dump_traceback_later(HANGS_S, exit=True)
    context, *excluded = sys.argv[1:]
    multiprocessing.Pool = Pool  # type: ignore[misc,assignment]
    if context != "default":
        multiprocessing.set_start_method(context, force=True)
        Pool.context = multiprocessing.get_context(context)
    importlib.import_module("test.support").verbose = False
    outcomes = support_cpython_suite.Outcomes()
    todo: list[unittest.TestCase] = []
    for kind, chosen in CLASSES.items():
        for name in unittest.defaultTestLoader.getTestCaseNames(globals()[kind]):
            if name in excluded:
                outcomes.found[name] = "excluded"
            elif chosen is None or name in chosen:
                todo.append(globals()[kind](name))
    unittest.TestSuite(todo).run(outcomes)
    print(json.dumps(outcomes.found))


if __name__ == "__main__":
    # By a name that workers can import.
    importlib.import_module("support_cpython_pool_suite").main()
