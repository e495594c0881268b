"""Libraries that people run in pools, each by its own pattern: the results are the serial ones.

With the extra ``clients``; elsewhere each is skipped. What one of them has found has a small
stand-in among the other tests.
"""

from __future__ import annotations

import functools
import operator
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import safepool
from safepool import ProcessPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# What they say of each other's versions is theirs.
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

HERE = os.getpid()


@pytest.fixture
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(2) as made:
        yield made


@pytest.fixture(params=[ProcessPool, safepool.Pool])
def either(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A pool that is handed over: an executor, and one of multiprocessing's interface."""
    with request.param(2) as made:
        yield made


@pytest.fixture(autouse=True)
def _no_workers_but_ours() -> Iterator[None]:
    """Joblib's own backend starts none: everything of a block runs in the block's."""
    yield
    loky = sys.modules.get("joblib.externals.loky.reusable_executor")
    assert getattr(loky, "_executor", None) is None


def data(samples: int = 200, features: int = 10) -> Any:
    from sklearn.datasets import make_classification

    return make_classification(samples, features, random_state=0)


# --- a pool that is handed over


def log_probability(position: Any) -> float:
    return float(-0.5 * np.sum(position**2))


def test_emcee(either: Any) -> None:
    emcee = pytest.importorskip("emcee")
    start = np.random.default_rng(0).standard_normal((8, 3))

    def chain(**pools: Any) -> Any:
        sampler = emcee.EnsembleSampler(8, 3, log_probability, **pools)
        sampler.random_state = np.random.RandomState(1).get_state()
        sampler.run_mcmc(start, 20)
        return sampler.get_chain()

    np.testing.assert_array_equal(chain(pool=either), chain())


def unit_cube(position: Any) -> Any:
    return 10 * position - 5


def test_dynesty(either: Any) -> None:
    """It reads pool.size, to know how many points to propose at a time."""
    dynesty = pytest.importorskip("dynesty")

    def evidence(**pools: Any) -> float:
        sampler = dynesty.NestedSampler(
            log_probability, unit_cube, 2, nlive=50, rstate=np.random.default_rng(0), **pools
        )
        sampler.run_nested(dlogz=1.0, print_progress=False)
        return float(sampler.results.logz[-1])

    # As many proposals at a time: else other random numbers are drawn.
    class Serial:
        size = either.size
        map = staticmethod(map)

    assert evidence(pool=either) == evidence(pool=Serial())


# Programs that nobody changes, under "safepool run --patch": what they need, and what they print.
UNCHANGED: dict[str, tuple[str, str, str]] = {
    "schwimmbad": (
        "schwimmbad",
        """
from schwimmbad import MultiPool, choose_pool
def square(n): return n * n
if __name__ == "__main__":
    told = []
    with MultiPool(processes=2) as pool:
        print(pool.size, [*pool.map(square, range(4), callback=told.append)], told)
    with choose_pool(processes=2) as pool:
        print(*pool.map(square, [5]))
""",
        "2 [0, 1, 4, 9] [0, 1, 4, 9]\n25\n",
    ),
    "as num_proc of Hugging Face's datasets": (
        "multiprocess",
        """
import queue
from multiprocess import Manager, Pool
def shard(results, rank):
    for n in range(3): results.put((rank, n))
    return rank
if __name__ == "__main__":
    found = []
    with Pool(2) as pool, Manager() as manager:
        results = manager.Queue()
        pids = {process.pid for process in pool._pool}
        calls = [pool.apply_async(shard, (results, rank)) for rank in range(2)]
        while not (all(call.ready() for call in calls) and results.empty()):
            try: found.append(results.get(timeout=0.05))
            except queue.Empty: pass
            assert {process.pid for process in pool._pool} == pids
        print(sorted(found), [call.get() for call in calls])
""",
        "[(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)] [0, 1]\n",
    ),
    "as pandarallel": (
        "multiprocess",
        """
import multiprocessing, dill
fork = multiprocessing.get_context("fork")
def call(job): return dill.loads(job[0])(job[1])
if __name__ == "__main__":
    with fork.Manager() as manager:
        done = manager.Queue()
        pool = fork.Pool(2)
        result = pool.map_async(call, [(dill.dumps(lambda n: n + 1), n) for n in range(4)])
        pool.close()
        print(result.get())
        pool.join()
""",
        "[1, 2, 3, 4]\n",
    ),
    "SciPy's own workers": (
        "scipy",
        """
from scipy.optimize import differential_evolution
def valley(x): return float(((x - 0.5) ** 2).sum())
if __name__ == "__main__":
    found = differential_evolution(valley, [(0, 1)] * 2, workers=2, updating="deferred", maxiter=3)
    print(found.fun < 1)
""",
        "True\n",
    ),
}


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize(
    "program",
    [
        # SciPy's optimizers are imported three times.
        pytest.param(one, marks=pytest.mark.slow if one.startswith("SciPy") else ())
        for one in UNCHANGED
    ],
)
def test_a_program_that_nobody_changes(program: str, tmp_path: Path) -> None:
    needs, text, expected = UNCHANGED[program]
    pytest.importorskip(needs)
    script = tmp_path / "program.py"
    script.write_text(text, encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "-m", "safepool", "run", "--patch", "--", sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )

    assert (ended.returncode, ended.stdout) == (0, expected), ended.stderr


def valley(position: Any) -> float:
    return float(np.sum((position - 0.5) ** 2))


def test_differential_evolution(either: Any) -> None:
    optimize = pytest.importorskip("scipy.optimize")

    def lowest(workers: Any) -> Any:
        return optimize.differential_evolution(
            valley,
            [(0, 1)] * 2,
            seed=1,
            maxiter=3,
            polish=False,
            workers=workers,
            updating="deferred",
        ).x

    np.testing.assert_array_equal(lowest(either.map), lowest(map))


def fit_line(seed: int) -> Any:
    from astropy import units
    from astropy.modeling import fitting, models
    from astropy.table import Table

    x = np.linspace(0, 10, 50)
    y = 3 * np.exp(-0.5 * (x - 5) ** 2) + np.random.default_rng(seed).normal(0, 0.1, 50)
    fitted = fitting.TRFLSQFitter()(models.Gaussian1D(1, 4, 2), x, y)
    return Table({"mean": [fitted.mean.value] * units.m}), fitted


def _loggers() -> list[tuple[str, int]]:
    import logging

    import absl.logging
    import astropy

    assert absl.logging.get_absl_logger() is logging.getLogger("absl")
    assert astropy.log is logging.getLogger("astropy")
    return [(type(one).__name__, one.level) for one in map(logging.getLogger, ("astropy", "absl"))]


@pytest.mark.parametrize("method", ["safepool", "loky", "spawn", "fork"])
def test_libraries_with_loggers_of_their_own(method: str) -> None:
    """Each makes its logger, of its class, when a worker imports it; the program's levels hold."""
    import logging

    pytest.importorskip("astropy")
    pytest.importorskip("absl.logging")
    here = _loggers()
    loggers = [logging.getLogger(name) for name in ("astropy", "absl")]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with ProcessPool(1, mp_context=method) as pool:
            there = pool.submit(_loggers).result(timeout=100)
    finally:
        for logger, (_, level) in zip(loggers, here, strict=True):
            logger.setLevel(level)

    assert there == [("AstropyLogger", logging.ERROR), ("ABSLLogger", logging.ERROR)]


def test_astropy(pool: ProcessPool) -> None:
    """Its own logger, quantities, tables and models, imported in the worker first."""
    pytest.importorskip("astropy.modeling")
    for (table, fitted), seed in zip(pool.map(fit_line, range(4)), range(4), strict=True):
        expected, model = fit_line(seed)
        assert table["mean"].unit == expected["mean"].unit
        np.testing.assert_allclose(table["mean"], expected["mean"])
        np.testing.assert_allclose(fitted.parameters, model.parameters)


def differentiate(expression: Any) -> Any:
    import sympy

    return sympy.integrate(sympy.diff(expression, sympy.Symbol("x")), sympy.Symbol("x"))


def test_sympy(pool: ProcessPool) -> None:
    sympy = pytest.importorskip("sympy")
    x = sympy.Symbol("x")
    expressions = [sympy.sin(x) * x**n for n in range(3)]
    found = [*pool.map(differentiate, expressions)]
    assert all(sympy.simplify(a - b) == 0 for a, b in zip(found, expressions, strict=True))


def test_dask(pool: ProcessPool) -> None:
    """Its multiprocessing scheduler takes an executor, and reads _max_workers."""
    dask = pytest.importorskip("dask")
    parts = [dask.delayed(operator.mul)(number, number) for number in range(20)]
    pids = [dask.delayed(os.getpid)() for _ in range(4)]
    total = dask.delayed(sum)(parts)
    found = dask.compute(total, *pids, scheduler="processes", pool=pool)
    assert found[0] == sum(n * n for n in range(20))
    assert HERE not in found[1:]


def test_tsfresh(pool: ProcessPool, monkeypatch: pytest.MonkeyPatch) -> None:
    tsfresh = pytest.importorskip("tsfresh")
    # Its bars, hidden or not, start a thread that stays.
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)
    pandas = pytest.importorskip("pandas")
    from tsfresh.feature_extraction import MinimalFCParameters
    from tsfresh.utilities.distribution import MapDistributor

    class InOurPool(MapDistributor):  # type: ignore[misc]
        def distribute(self, func: Any, partitioned_chunks: Any, kwargs: Any) -> Any:
            return pool.map(functools.partial(func, **kwargs), partitioned_chunks)

    frame = pandas.DataFrame(
        {
            "id": np.repeat(np.arange(6), 30),
            "time": np.tile(np.arange(30), 6),
            "value": np.random.default_rng(0).standard_normal(180),
        }
    )

    def features(**how: Any) -> Any:
        return tsfresh.extract_features(
            frame,
            column_id="id",
            column_sort="time",
            default_fc_parameters=MinimalFCParameters(),
            disable_progressbar=True,
            **how,
        )

    ours = features(distributor=InOurPool(disable_progressbar=True))
    pandas.testing.assert_frame_equal(ours, features(n_jobs=0))


def test_networkx(pool: ProcessPool) -> None:
    """The parallel betweenness of its own examples: the graph with each part of the nodes."""
    networkx = pytest.importorskip("networkx")
    graph = networkx.gnp_random_graph(40, 0.2, seed=1)
    nodes = list(graph)
    parts = [nodes[start::4] for start in range(4)]
    between = networkx.betweenness_centrality_subset
    found = pool.map(between, [graph] * 4, parts, [nodes] * 4, [True] * 4)
    total = dict.fromkeys(nodes, 0.0)
    for part in found:
        for node, share in part.items():
            total[node] += share
    assert total == pytest.approx(networkx.betweenness_centrality(graph))


# --- inside a block


def test_optuna() -> None:
    """Its trials run in threads of its own, each with a parallel call."""
    optuna = pytest.importorskip("optuna")
    from joblib import Parallel, delayed
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sample, threads = data(), set()
    pids: set[int] = set()

    def objective(trial: Any) -> float:
        strength = trial.suggest_float("C", 1e-2, 1e2, log=True)
        threads.add(threading.get_ident())
        pids.update(Parallel(n_jobs=-1)(delayed(os.getpid)() for _ in range(4)))
        model = LogisticRegression(C=strength)
        return float(cross_val_score(model, *sample, cv=3, n_jobs=2).mean())

    study = optuna.create_study(direction="maximize")
    with safepool.parallel_backend(n_jobs=2):
        study.optimize(objective, n_trials=6, n_jobs=2)
    for trial in study.trials:
        model = LogisticRegression(C=trial.params["C"])
        assert trial.value == pytest.approx(cross_val_score(model, *sample, cv=3).mean())
    assert threading.get_ident() not in threads
    assert HERE not in pids or safepool.cpu_count() == 1


def test_boruta() -> None:
    """It fits forests again and again, which ask for threads."""
    boruta = pytest.importorskip("boruta")
    from sklearn.ensemble import RandomForestClassifier

    def support(jobs: int | None) -> Any:
        forest = RandomForestClassifier(20, n_jobs=jobs, max_depth=3, random_state=0)
        found = boruta.BorutaPy(forest, n_estimators=20, max_iter=8, random_state=0)
        return found.fit(*data(100, 6)).ranking_

    with safepool.parallel_backend():
        ours = support(-1)
    np.testing.assert_array_equal(ours, support(None))


def test_statsmodels() -> None:
    pytest.importorskip("statsmodels")
    from statsmodels.tools.parallel import parallel_func

    with safepool.parallel_backend(n_jobs=2):
        parallel, function, _ = parallel_func(fit_poisson, n_jobs=-1, verbose=0)
        ours = parallel(function(seed) for seed in range(4))
    np.testing.assert_allclose(ours, [fit_poisson(seed) for seed in range(4)])


def fit_poisson(seed: int) -> Any:
    import statsmodels.api as models

    random = np.random.default_rng(seed)
    x = models.add_constant(random.standard_normal((50, 2)))
    return models.GLM(random.poisson(3, 50), x, family=models.families.Poisson()).fit().params


# One row per model that has an n_jobs of its own: its module, and how it is made.
MODELS: dict[str, tuple[str, Callable[[Any, int | None], Any]]] = {
    "imbalanced-learn": (
        "imblearn.ensemble",
        lambda module, jobs: module.BalancedRandomForestClassifier(
            10, n_jobs=jobs, random_state=0
        ),
    ),
    "LightGBM": (
        "lightgbm",
        lambda module, jobs: module.LGBMClassifier(n_estimators=5, n_jobs=jobs, verbose=-1),
    ),
    "mapie": (
        "mapie.classification",
        lambda module, jobs: module.CrossConformalClassifier(n_jobs=jobs, random_state=0),
    ),
}


@pytest.mark.parametrize("library", MODELS)
def test_a_model_with_jobs_of_its_own(library: str) -> None:
    name, make = MODELS[library]
    module = pytest.importorskip(name)
    sample = data()

    def predicted(jobs: int | None) -> Any:
        model = make(module, jobs)
        fitted = getattr(model, "fit", None) or model.fit_conformalize
        return fitted(*sample).predict(sample[0])

    expected = predicted(1)
    with safepool.parallel_backend(n_jobs=2):
        np.testing.assert_array_equal(predicted(2), expected)
        np.testing.assert_array_equal(predicted(-1), expected)


def test_a_library_in_a_search() -> None:
    """A model with native threads of its own, in a search of scikit-learn's."""
    lightgbm = pytest.importorskip("lightgbm")
    from sklearn.model_selection import GridSearchCV

    def scores(jobs: int | None) -> Any:
        search = GridSearchCV(
            lightgbm.LGBMClassifier(n_estimators=5, verbose=-1, n_jobs=1),
            {"num_leaves": [3, 7]},
            cv=3,
            n_jobs=jobs,
        )
        return search.fit(*data()).cv_results_["mean_test_score"]

    with safepool.parallel_backend(n_jobs=2):
        ours = scores(-1)
    np.testing.assert_allclose(ours, scores(None))
