"""CPython's own tests of process pools, run with ours in the standard pool's place.

    python support_cpython_suite.py MODULE CONTEXT ON_WORKER_DEATH [EXCLUDED ... | --only NAME]

prints one JSON object: the name of each test method of that module and start method, and how it
ended: ``ok``, ``skipped: why``, ``excluded`` or the traceback. The tests are the interpreter's
(``test.test_concurrent_futures``); none of their code is here.

A process of its own: the suite stops multiprocessing's resource tracker, counts the threads
and children of its process, and imports the standard pool under our name.
"""

from __future__ import annotations

import concurrent.futures
import faulthandler
import importlib
import json
import sys
import unittest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import support_inside

import safepool
from safepool.workers import forkserver

if TYPE_CHECKING:
    from types import ModuleType

# Seconds after which a module that has not ended shows where each of its threads is.
HANGS_S = 300.0

# Set before anything of the suite is imported, which binds the name.
_IN_A_SCRIPT = """\
import multiprocessing, sys
sys.path.insert(0, {tests!r})
import support_cpython_suite
support_cpython_suite.install({on_worker_death!r})
"""


class _Queue:
    """Stands for the standard pool's queue, of which tests wait for the thread; we have none."""

    def join_thread(self) -> None:
        pass


class Pool(safepool.ProcessPool):
    """Ours, with the two private names that the suite's tests of an orderly end look at."""

    on_worker_death: Any = "replace"

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, on_worker_death=self.on_worker_death, **keywords)
        self._call_queue = _Queue()

    @property
    def _executor_manager_thread(self) -> Any:
        return support_inside.thread_of(self)


def install(on_worker_death: str) -> None:
    """Let ``concurrent.futures.ProcessPoolExecutor`` be ours."""
    Pool.on_worker_death = on_worker_death
    concurrent.futures.ProcessPoolExecutor = _named_as_the_standard_one()  # type: ignore[assignment,misc]


def _named_as_the_standard_one() -> type[Pool]:
    # The suite writes scripts with the name of the class that it tests.
    return type("ProcessPoolExecutor", (Pool,), {})


def load(name: str, on_worker_death: str) -> ModuleType:
    """Import a module of the suite that uses our pool, its scripts as well."""
    install(on_worker_death)
    importlib.import_module("test.support").verbose = False  # else it prints each test's time
    package = "test.test_concurrent_futures"
    util = importlib.import_module(f"{package}.util")
    # Not the very class that a test compares with, to skip what the standard pool cannot do.
    kind = _named_as_the_standard_one()
    for mixin in (
        util.ProcessPoolForkMixin,
        util.ProcessPoolSpawnMixin,
        util.ProcessPoolForkserverMixin,
    ):
        mixin.executor_type = kind
    module = importlib.import_module(f"{package}.{name}")
    if hasattr(module, "assert_python_ok"):
        run = module.assert_python_ok
        first = _IN_A_SCRIPT.format(
            tests=str(Path(__file__).parent), on_worker_death=on_worker_death
        )

        def run_with_ours(option: str, code: str, **environment: str) -> Any:
            return run(option, first + code, **environment)

        module.assert_python_ok = run_with_ours  # type: ignore[attr-defined]
    # A test stops the tracker of resources, and waits for all that may use it: our servers, too.
    tracker: Any = importlib.import_module("multiprocessing.resource_tracker")._resource_tracker
    stop = tracker._stop

    def stop_after_servers(*arguments: Any, **keywords: Any) -> None:
        forkserver.stop_all()
        stop(*arguments, **keywords)

    tracker._stop = stop_after_servers
    return module


class OurMixin:
    """Our default start method, which is none of the suite's."""

    ctx = ""  # to the suite's scripts: make the pool without a context

    def get_context(self) -> Any:
        from safepool.workers.methods import find_context

        return find_context(None)


def cases(module: ModuleType, context: str) -> list[unittest.TestCase]:
    """Return the module's tests for one start method."""
    like = "spawn" if context == "default" else context
    found: list[unittest.TestCase] = []
    for kind in [*vars(module).values()]:
        if not (isinstance(kind, type) and issubclass(kind, unittest.TestCase)):
            continue
        names = unittest.defaultTestLoader.getTestCaseNames(kind)
        if getattr(kind, "ctx", None) == like:
            chosen: Any = kind if like == context else type(kind.__name__, (OurMixin, kind), {})
            found += [chosen(name) for name in names]
        elif not hasattr(kind, "executor_type"):  # each of its methods names its start method
            found += [kind(name) for name in names if name == f"test_{context}"]
    return found


class Outcomes(unittest.TestResult):
    """How each test method ended."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}

    def _note(self, test: unittest.TestCase, outcome: str) -> None:
        # Two classes may have a method of one name; a failure is kept.
        name = getattr(test, "_testMethodName", str(test))  # or that of a class, as a whole
        if self.found.get(name, "ok") == "ok":
            self.found[name] = outcome

    def addSuccess(self, test: Any) -> None:  # noqa: N802 -- unittest's, as the next ones
        self._note(test, "ok")

    def addSkip(self, test: Any, reason: str) -> None:  # noqa: N802
        self._note(test, f"skipped: {reason}")

    def addFailure(self, test: Any, err: Any) -> None:  # noqa: N802
        self._note(test, self._exc_info_to_string(err, test))  # type: ignore[attr-defined]

    addError = addFailure  # noqa: N815

    def addSubTest(self, test: Any, _subtest: Any, err: Any) -> None:  # noqa: N802
        if err is not None:
            self.addFailure(test, err)


def main() -> None:
    faulthandler.dump_traceback_later(HANGS_S, exit=True)
    name, context, on_worker_death, *excluded = sys.argv[1:]
    only = excluded.pop() if "--only" in excluded else ""
    module = load(name, on_worker_death)
    outcomes = Outcomes()
    todo = [case for case in cases(module, context)[::-1] if only in case._testMethodName]
    while todo:
        case = todo.pop()  # not kept: a test looks for what an earlier one has leaked
        if case._testMethodName in excluded:
            outcomes.found[case._testMethodName] = "excluded"
        else:
            case.run(outcomes)
        del case
    print(json.dumps(outcomes.found))


if __name__ == "__main__":
    main()
