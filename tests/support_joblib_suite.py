"""A plugin for joblib's own tests: safepool's backend in the place of loky's.

python -m pytest -p support_joblib_suite --pyargs joblib.test.test_parallel
"""

from __future__ import annotations

import joblib.parallel

from safepool.joblib_backend import SafepoolBackend

# Under the other name alone: the tests take their rows from this table.
joblib.parallel.BACKENDS.pop("safepool", None)
joblib.parallel.BACKENDS["loky"] = SafepoolBackend
