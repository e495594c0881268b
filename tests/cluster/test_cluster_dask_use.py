"""What people do with a cluster: joblib and scikit-learn on real Dask workers."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import pytest
from support_dask import NODE_A, NODE_B, dask_cluster

if TYPE_CHECKING:
    from pathlib import Path

# ruff: noqa: E501 -- programs
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("distributed") is None,
        reason="distributed is not installed: pip install 'safepool[dask]'",
    ),
    pytest.mark.slow,
    pytest.mark.timeout(400),
]

JOBLIB = """
import threading
import joblib, numpy as np
from joblib import Parallel, delayed, effective_n_jobs
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

def where(_=None):
    return os.environ.get("LOKY_MAX_CPU_COUNT", "") + os.environ.get("SLURM_CPUS_PER_TASK", "b")

def pools(_):
    import scipy.linalg, threadpoolctl
    return sorted({one["num_threads"] for one in threadpoolctl.threadpool_info()})

def total(array, factor):
    return float(array.sum()) * factor

def note_and_wait(folder, n):
    open(f"{folder}/{n}-{os.getpid()}", "w").close()
    time.sleep(600)

def kill_one(folder):
    await_(lambda: os.listdir(folder), "a task")
    os.kill(int(os.listdir(folder)[0].partition("-")[2]), signal.SIGKILL)

def error_of(call):
    try:
        call()
    except BaseException as error:
        return type(error).__name__, getattr(error, "exitcode", None)

X, y = load_iris(return_X_y=True)
with Client(sys.argv[1]) as client:
    client.wait_for_workers(2)
    with safepool.parallel_backend(cluster=client):
        told(effective=effective_n_jobs(-1))
        told(nodes=sorted(set(Parallel(n_jobs=-1)(delayed(where)() for _ in range(20)))))
        told(caps=Parallel(n_jobs=-1)(delayed(pools)(n) for n in range(2)))
        os.mkdir("tasks")
        killer = threading.Thread(target=kill_one, args=["tasks"])
        killer.start()
        folder = os.path.abspath("tasks")
        told(killed=error_of(lambda: Parallel(n_jobs=-1)(delayed(note_and_wait)(folder, n) for n in range(2))))
        killer.join()
        array = np.ones(1 << 20)
        told(large=Parallel(n_jobs=-1)(delayed(total)(array, n) for n in range(4)))
        search = GridSearchCV(SVC(), {"C": [0.1, 1.0]}, n_jobs=-1, cv=3).fit(X, y)
        told(grid=search.best_params_["C"])
        told(forest=RandomForestClassifier(10, n_jobs=-1, random_state=0).fit(X, y).score(X, y) > 0.9)
    told(left=[one.name for one in threading.enumerate() if one.name.startswith("safepool")])
"""


def test_joblib_and_scikit_learn_use_all_nodes(tmp_path: Path) -> None:
    with dask_cluster(tmp_path) as cluster:
        cluster.worker(env=NODE_A)
        cluster.worker(nanny=True, env=NODE_B)
        facts = cluster.run(JOBLIB)
    assert len(facts.pop("nodes")) == 2
    assert facts == {
        "effective": 2,
        "caps": [[1], [1]],
        "killed": ["WorkerDiedError", -9],
        "large": [n * 2.0**20 for n in range(4)],
        "grid": 1.0,
        "forest": True,
        "left": [],
    }
