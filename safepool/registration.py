"""Registration of the backend ``"safepool"`` with joblib, once the program has imported joblib."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from safepool.threads.imports import AfterImport, imported

_JOBLIB = "joblib.parallel"


def register() -> None:
    """Register the backend with joblib: now, or when the program has imported it.

    joblib itself is not imported, which takes a tenth of a second. Until the program imports it,
    ``sys.meta_path`` holds a finder that waits for joblib.

    Source:
        joblib, ``register_parallel_backend``.
    """
    module = imported(_JOBLIB)
    if module is not None:
        _register(_JOBLIB, module)
    elif _JOBLIB not in sys.modules:
        _finder.start(frozenset({_JOBLIB}))


def _register(_name: str, module: ModuleType) -> None:
    _finder.stop()
    module.register_parallel_backend("safepool", _backend)


def _backend(**parameters: Any) -> Any:
    from safepool.joblib_backend import SafepoolBackend  # noqa: PLC0415 -- only when it is used

    return SafepoolBackend(**parameters)


_finder = AfterImport(_register)
