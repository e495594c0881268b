"""joblib's backends beside ours, under real CPU quotas.

    python benchmarks/joblib_backend.py                    # a quota of 1.5 CPUs
    python benchmarks/joblib_backend.py --cpus 1.5 --only tiny array
    python benchmarks/joblib_backend.py --backends safepool loky
    python benchmarks/joblib_backend.py --here             # without a group of its own

Each pair of case and backend has fresh processes in the group, which time the first call,
the start of workers included, the mean of repeated ones, and the first call of a second block; the
backends take turns, and figures are medians. ``n_jobs=-1`` throughout, which each backend reads in
its own way: the last column is the workers it took.
Needs scikit-learn, and the right to make a control group (Linux).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import signal
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import figures
from contenders import last_line
from figures import OURS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LOKY, FLOORED = "loky", "safepool, floor"
# What joblib.parallel_config() is given.
BACKENDS: dict[str, dict[str, str]] = {
    OURS: {"backend": OURS},
    FLOORED: {"backend": OURS, "rounding": "floor"},
    LOKY: {"backend": LOKY},
    "multiprocessing": {"backend": "multiprocessing"},
    "threading": {"backend": "threading"},
}
# The product's aims; the run fails when one is missed.
MOST_TIMES_LOKY = 1.05
MOST_TIMES_LOKY_AT_FIRST = 0.5

# Repeated calls: so many at least, and for so many seconds. A quota holds over 100 ms; what is
# shorter may use more than its share, and pays for it in the next calls.
REPEATED = 3
REPEATED_S = 0.3
TINY_TASKS = 10_000
ARRAY_TASKS = 100
ARRAY_BYTES = 100_000_000
# Seconds for one process, and for those of one backend: a forked worker that waits for its
# parent's OpenMP threads never ends.
LIMIT_S, SHARE_S = 20.0, 10.0


def sum_of_part(array: Any, part: int) -> float:
    """Read a hundredth of the array, all over it."""
    return float(array[part::ARRAY_TASKS].sum())


def prepare_few() -> Callable[[], object]:
    """4 calls that do nothing: what a Parallel call costs by itself."""
    from joblib import Parallel, delayed

    return lambda: Parallel()(delayed(abs)(n) for n in range(4))


def prepare_tiny() -> Callable[[], object]:
    """10,000 calls that do nothing."""
    from joblib import Parallel, delayed

    return lambda: Parallel()(delayed(abs)(n) for n in range(TINY_TASKS))


def prepare_array() -> Callable[[], object]:
    """100 calls that are given the same 100 MB."""
    import numpy as np
    from joblib import Parallel, delayed

    array = np.ones(ARRAY_BYTES // 8)
    return lambda: Parallel()(delayed(sum_of_part)(array, part) for part in range(ARRAY_TASKS))


def prepare_arrays() -> Callable[[], object]:
    """100 calls that are given 2 MB each, which no other call is given."""
    import numpy as np
    from joblib import Parallel, delayed

    arrays = [np.ones(ARRAY_BYTES // ARRAY_TASKS // 4) for _ in range(ARRAY_TASKS)]
    return lambda: Parallel()(delayed(sum_of_part)(array, 0) for array in arrays)


def _data(samples: int) -> Any:
    from sklearn.datasets import make_classification

    return make_classification(samples, 20, random_state=0)


def prepare_grid() -> Callable[[], object]:
    """GridSearchCV of 40 fits of a few milliseconds each."""
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC

    search = GridSearchCV(SVC(), {"C": [0.1, 1, 10, 100], "gamma": [0.01, 0.1]})
    data = _data(600)
    return lambda: search.fit(*data)


def prepare_scores() -> Callable[[], object]:
    """cross_val_score of a model that has OpenMP threads of its own."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import cross_val_score

    model, data = HistGradientBoostingClassifier(max_iter=30), _data(1500)
    return lambda: cross_val_score(model, *data, cv=8)


def prepare_forest_fit() -> Callable[[], object]:
    """RandomForestClassifier.fit, 100 trees."""
    from sklearn.ensemble import RandomForestClassifier

    model, data = RandomForestClassifier(n_jobs=-1, random_state=0), _data(1000)
    return lambda: model.fit(*data)


def prepare_boruta() -> Callable[[], object]:
    """Forests fitted again and again on other columns and their shadows, as boruta does."""
    import numpy as np
    from sklearn.ensemble import RandomForestClassifier

    data, labels = _data(1000)

    def select() -> None:
        random = np.random.default_rng(0)
        for left in (20, 18, 15):
            columns = data[:, random.permutation(20)[:left]]
            shadows = random.permuted(columns, axis=0)
            forest = RandomForestClassifier(100, max_depth=5, n_jobs=-1, random_state=0)
            forest.fit(np.hstack([columns, shadows]), labels)

    return select


def prepare_forest_predict() -> Callable[[], object]:
    """RandomForestClassifier.predict, which asks for threads whatever the backend."""
    from sklearn.ensemble import RandomForestClassifier

    data = _data(1000)
    model = RandomForestClassifier(random_state=0).fit(*data).set_params(n_jobs=-1)
    many = _data(20_000)[0]
    return lambda: model.predict(many)


CASES = {
    "few": prepare_few,
    "tiny": prepare_tiny,
    "array": prepare_array,
    "arrays": prepare_arrays,
    "grid": prepare_grid,
    "scores": prepare_scores,
    "forest-fit": prepare_forest_fit,
    "forest-predict": prepare_forest_predict,
    "boruta": prepare_boruta,
}


# They ask for threads: without processes there is no start to save.
IN_THREADS = ("forest-fit", "forest-predict", "boruta")


def measure(case: str, backend: str) -> None:
    """Print what one backend takes for one case: runs in the group, in its own process."""
    import joblib

    import safepool

    # What a program has imported by then anyway is not the backend's.
    call = CASES[case]()
    took = []
    options = {**BACKENDS[backend]}
    block = joblib.parallel_config
    if options["backend"] == OURS:
        block = safepool.parallel_backend
        del options["backend"]
    with block(n_jobs=-1, **options):
        workers = joblib.effective_n_jobs(-1)
        while len(took) <= REPEATED or sum(took[1:]) < REPEATED_S:
            begun = time.perf_counter()
            call()
            took.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    with block(n_jobs=-1, **options):
        call()
    second = time.perf_counter() - begun
    found = {"workers": workers, "first": took[0], "next": statistics.mean(took[1:])}
    print(json.dumps({**found, "second": second}))


def run(case: str, backend: str, members: Path | None) -> list[float]:
    """Measure in a process of its own that joins the group before it begins."""
    command = [sys.executable, __file__, "--measure", case, backend]
    if members is not None:
        command = ["sh", "-c", f'echo 0 > "{members}"; exec "$@"', "sh", *command]
    output = last_line(command, limit_s=LIMIT_S)
    if output is None:
        return [*[math.inf] * 3, math.nan]
    found = json.loads(output)
    return [*(found[key] * 1e3 for key in ("first", "next", "second")), found["workers"]]


@contextlib.contextmanager
def group(cpus: float | None) -> Iterator[Path | None]:
    """Make a group with a quota; ``None`` is no group."""
    from host.groups import quota_group

    if cpus is None:
        yield None
        return
    with quota_group(cpus) as made:
        yield made.members_file
        made.empty()


def compare(cpus: float | None, cases: list[str], backends: list[str], rounds: int) -> list[str]:
    """Print one table; return which aims were missed."""
    missed = []
    where = "no quota" if cpus is None else f"a quota of {cpus:g} CPUs"
    with group(cpus) as members:
        for case in cases:
            runs = {one: functools.partial(run, case, one, members) for one in backends}
            rows = figures.compare(
                f"{where}: {case}",
                ("first call ms", "repeated ms", "second block ms", "workers"),
                runs,
                rounds,
                base=backends[0],
                turn_s=LIMIT_S,
                share_s=SHARE_S,
            )
            best = {
                backend: [
                    statistics.median(column) for column in list(zip(*turns, strict=True))[:2]
                ]
                for backend, turns in rows.items()
            }
            if not {OURS, LOKY} <= best.keys():
                continue
            first_ratio, ratio = (
                ours / loky for ours, loky in zip(best[OURS], best[LOKY], strict=True)
            )
            if ratio > MOST_TIMES_LOKY:
                missed.append(f"{where}, {case}: {ratio:.2f} of loky's time")
            if case not in IN_THREADS and first_ratio > MOST_TIMES_LOKY_AT_FIRST:
                missed.append(f"{where}, {case}, first call: {first_ratio:.2f} of loky's time")
    return missed


def main() -> int:
    """Print the tables; return 1 if an aim is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpus", type=float, nargs="+", default=[1.5])
    parser.add_argument("--here", action="store_true", help="no quota, no group")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure)
        return 0
    # Ended by kill, it takes its group away all the same.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    missed = []
    for cpus in [None] if options.here else options.cpus:
        missed += compare(cpus, options.only, options.backends, options.rounds)
    for aim in missed:
        print(f"missed: {aim}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
