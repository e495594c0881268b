"""What people do with a cluster: joblib and scikit-learn on real Dask workers."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support_cgroups import control_group
from support_dask import NODE_A, NODE_B, WITH_DASK, another_host, dask_cluster
from support_processes import wait_until

if TYPE_CHECKING:
    from support_dask import DaskCluster, Host

# ruff: noqa: E501 -- programs
pytestmark = WITH_DASK

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


# The agent of the host that will be cut off is told to give up the program soon, and the program
# gives up that host when it is. On a machine that has too much to do, the other would seem silent.
HOSTS = """
import socket
from safepool.cluster import agent, shell

shell._COLLECT_S = 0.5

def shorten():
    agent._LAPSE_S = 6.0

def note(path):
    with open(path, "a") as file:
        file.write(f"{socket.gethostname()} {os.getpid()}\\n")
    while not os.path.exists(f"{os.path.dirname(path)}/go on"):
        time.sleep(0.05)
    return socket.gethostname()

client = Client(f"tcp://127.0.0.1:{sys.argv[1].rpartition(':')[2]}")
client.wait_for_workers(2)
with ClusterPool(client, nodes=["safepool-2"]) as pool:
    told(named=sorted(set(pool.map(lambda _: socket.gethostname(), range(10)))))
pool = ClusterPool(client, workers_per_node=1)
pool.submit(abs, 1).result()
await_(lambda: len(pool.nodes()) == 2, "both hosts")
told(hosts=sorted(node.name.rpartition("(")[2] for node in pool.nodes()))
place = next(node.place for node in pool.nodes() if "safepool-1" in node.name)
again, lost = safepool.worker(note, retries=1), note
futures = [pool.submit(function, os.path.abspath("starts")) for function in (lost, again, again)]
await_(lambda: os.path.exists("starts") and open("starts").read().count("\\n") == 2, "two calls run")
told(both="run")
sys.stdin.readline()
client.run(shorten, workers=[place])
told(both="will be apart")
sys.stdin.readline()

def is_lost():
    inside.let_answers_be_late(pool, place)
    return len(pool.nodes()) == 1

await_(is_lost, "the host is lost")
open("go on", "w").close()
found = [one.result() if one.exception() is None else str(one.exception()) for one in futures]
told(found=found, place=place)
os._exit(0)
"""


def _shown(address: str, *options: str) -> tuple[int, str]:
    """Return exit code and output of ``safepool --cluster``."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "safepool", "--cluster", address, *options],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def _look_at_both(cluster: DaskCluster, one: Host) -> None:
    """Check what ``safepool --cluster`` shows."""
    address = f"tcp://127.0.0.1:{cluster.address.rpartition(':')[2]}"
    code, text = _shown(address, "--json")
    screens = {node["name"].rpartition("(")[2]: node for node in json.loads(text)["nodes"]}
    assert {*screens} == {"safepool-1)", "safepool-2)"}
    screen = screens["safepool-1)"]
    assert screen["workers"] == screen["budget"]["workers"] == 1
    assert screen["because"]["name"] in ("cpu.max", "cpu.cfs_quota_us")
    assert screen["throttling"]["periods"] >= 0
    code, text = _shown(address)
    assert code in (0, 1)
    assert f"what node tcp://{one.address}:" in text
    assert "workers on 2 nodes" in text


def test_two_hosts_of_which_one_is_cut_off(tmp_path: Path) -> None:
    """They have limits of their own, and reach the scheduler but not each other."""
    with (
        control_group(cpus=1) as group,
        dask_cluster(tmp_path, "0.0.0.0") as cluster,
        another_host(1) as one,
        another_host(2) as two,
    ):
        cluster.worker(host=one, group=group)
        cluster.worker(host=two, nanny=True)
        program = cluster.start_program(HOSTS)
        assert program.stdin is not None
        assert program.stdout is not None
        facts: dict[str, Any] = {}
        for line in program.stdout:
            told = json.loads(line)
            facts.update(told)
            if told == {"both": "run"}:
                _look_at_both(cluster, one)
                program.stdin.write("\n")
                program.stdin.flush()
            elif "both" in told:
                starts = [
                    line.split() for line in (cluster.folder / "starts").read_text().splitlines()
                ]
                (pid,) = [int(pid) for host, pid in starts if host == one.name]
                one.cut()
                # Its calls end there as well: nobody asks for them any more.
                wait_until(lambda pid=pid: not one.has_process(pid), within_s=600)
                program.stdin.write("\n")
                program.stdin.flush()
        program.communicate()
        assert program.returncode == 0, cluster.logs()
    assert facts["both"] == "will be apart"
    assert facts["named"] == ["safepool-2"]
    assert facts["hosts"] == ["safepool-1)", "safepool-2)"]
    lost = [found for found in facts["found"] if found != "safepool-2"]
    assert len(lost) <= 1
    assert all(facts["place"] in found and "has not answered" in found for found in lost)
    assert facts["found"][1:] == ["safepool-2"] * 2


LOCAL = """
import asyncio, json, sys, time
import numpy as np
import support_inside as inside
from distributed import Client, LocalCluster
from distributed.security import Security
from safepool.cluster import ClusterPool

def told(**facts):
    print(json.dumps(facts), flush=True)

def changed(array):
    array += 1
    return array

def kind_of(call):
    return type(call.exception()).__name__, str(call.exception()).partition(" was lost")[2]

def use(name, client):
    with ClusterPool(client) as pool, ClusterPool(client, workers_per_node=1) as other:
        given = np.zeros(1 << 18)
        first = pool.submit(changed, given).result()
        while not inside.reaches_all_nodes(pool):
            time.sleep(0.01)
        second = pool.submit(changed, first).result()
        second += 1
        told(**{name: [float(one.sum()) / (1 << 18) for one in (given, first, second)]})
        told(**{f"{name} together": [one.submit(abs, -3).result() for one in (pool, other)]})

def main():
    common = {"dashboard_address": ":0", "threads_per_worker": 1}
    with LocalCluster(n_workers=2, **common) as cluster, Client(cluster) as client:
        use("processes", client)
    with LocalCluster(n_workers=2, processes=False, **common) as cluster, Client(cluster) as client:
        use("threads", client)
        with Client(cluster, set_as_default=False) as other:
            pool = ClusterPool(other, workers_per_node=1)
            call = pool.submit(time.sleep, 60)
            while not call.running():
                time.sleep(0.01)
        told(closed=kind_of(call), later=kind_of(pool.submit(abs, 1)))
        pool.shutdown()
    asyncio.run(asynchronous(common))

async def asynchronous(common):
    async with LocalCluster(n_workers=1, processes=False, asynchronous=True, **common) as cluster:
        async with Client(cluster, asynchronous=True) as client:
            pool = ClusterPool(client)
            call = asyncio.create_task(pool.run(time.sleep, 60))
            while not any(node.calls for node in pool.nodes()):
                await asyncio.sleep(0.01)
            call.cancel()
            await asyncio.wait([call])
            while any(node.calls for node in pool.nodes()):
                await asyncio.sleep(0.01)
            told(cancelled=call.cancelled(), nbytes=(await pool.run(np.ones, 1 << 18)).nbytes)
            pool.shutdown()

def encrypted():
    files = {"tls_ca_file": "certificate.pem"}
    for role in "client", "scheduler", "worker":
        files |= {f"tls_{role}_cert": "certificate.pem", f"tls_{role}_key": "key.pem"}
    security = Security(require_encryption=True, **files)
    common = {"protocol": "tls://", "security": security, "dashboard_address": ":0"}
    with LocalCluster(n_workers=1, threads_per_worker=1, **common) as cluster:
        with Client(cluster, security=security) as client:
            use(cluster.scheduler_address.partition(":")[0], client)

if __name__ == "__main__":
    globals()[sys.argv[1]]()
"""


def _of_its_own(folder: Path, start: str) -> dict[str, Any]:
    """Run LOCAL; return what it told."""
    (folder / "program.py").write_text(LOCAL)
    command = [sys.executable, "-W", "ignore", "program.py", start]
    env = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, cwd=folder, env=env
    )
    facts: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        facts.update(json.loads(line))
    return facts


@pytest.mark.skipif(not shutil.which("openssl"), reason="the command openssl is not installed")
def test_a_cluster_with_tls_is_used_with_tls(tmp_path: Path) -> None:
    """Its nodes are reached directly, too: they refuse what is not encrypted."""
    made = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    made += " -keyout key.pem -out certificate.pem"
    subprocess.run(shlex.split(made), check=True, cwd=tmp_path, stderr=subprocess.DEVNULL)
    facts = _of_its_own(tmp_path, "encrypted")
    assert facts == {"tls": [0.0, 1.0, 3.0], "tls together": [3, 3]}


def test_clusters_of_the_program_itself(tmp_path: Path) -> None:
    facts = _of_its_own(tmp_path, "main")
    assert facts == {
        "processes": [0.0, 1.0, 3.0],
        "processes together": [3, 3],
        "threads": [0.0, 1.0, 3.0],
        "threads together": [3, 3],
        "closed": ["NodeLostError", " while it ran time.sleep: the Dask client was closed"],
        "later": ["PoolBrokenError", ""],
        "cancelled": True,
        "nbytes": 1 << 21,
    }
