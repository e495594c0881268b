"""A plugin of pytest's for scikit-learn's own tests: their parallel calls run in our workers.

    python -m pytest -p support_sklearn_suite --pyargs sklearn.ensemble.tests.test_bagging

Kept are the tests whose source says ``n_jobs``. The backend is set as a program's
``parallel_config`` sets it, so a call that merely prefers threads comes to ours as well; one
that needs shared memory does not. The last line of the report says how many calls came.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import joblib

import safepool  # noqa: F401 -- registers the backend
from safepool.joblib_backend import SafepoolBackend

if TYPE_CHECKING:
    import pytest

_calls: list[int] = []


def pytest_sessionstart() -> None:
    configure = SafepoolBackend.configure

    def counted(self: Any, *args: Any, **keywords: Any) -> Any:
        workers = configure(self, *args, **keywords)
        _calls.append(workers)  # not where it is one: joblib is told that by an exception
        return workers

    SafepoolBackend.configure = counted  # type: ignore[method-assign]
    # For the rest of the process: what it gives back is a context manager.
    joblib.parallel_config(backend="safepool")


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    says = {item: "n_jobs" in inspect.getsource(item.function) for item in items}
    config.hook.pytest_deselected(items=[item for item in items if not says[item]])
    items[:] = [item for item in items if says[item]]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"parallel calls in safepool's workers: {len(_calls)}")
