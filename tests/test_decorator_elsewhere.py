"""``@safepool.worker`` in programs whose processes are started by somebody else.

Each row is a program of its own, as these start threads and children that they keep.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest
from support_processes import cpus

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="forks, and signals"),
    pytest.mark.skipif(cpus() < 2, reason="libraries start one thread on one CPU"),
]

# What every program begins with. It prints, as JSON, what a worker found: threads of its
# native pools before a decorated call, inside of it, and after it.
HEAD = """
import json, multiprocessing, os, signal, subprocess, sys, threading, time, urllib.request
import numpy as np
import scipy.linalg
from threadpoolctl import threadpool_info
import safepool

def pools():
    import scipy.linalg
    return sorted((pool["user_api"], pool["num_threads"]) for pool in threadpool_info())

@safepool.worker
def decorated():
    import sklearn.utils._openmp_helpers  # brings a runtime of its own
    np.linalg.svd(np.ones((50, 50)))
    return pools()

def look():
    np.linalg.svd(np.ones((50, 50)))  # its threads are there
    before = pools()
    inside = decorated()
    return before, inside, [pool for pool in pools() if pool[0] == "blas"]

def tell(found):
    print(json.dumps(found), flush=True)

@safepool.worker
def hold(inside, may_go):
    inside.set()
    may_go.wait(60)
"""

DASK = """
from distributed import Client, LocalCluster
import dask
if __name__ == "__main__":
    # Its workers set these to 1 otherwise.
    dask.config.set({"distributed.nanny.pre-spawn-environ": {"OPENBLAS_NUM_THREADS": "2"}})
    with LocalCluster(
        n_workers=1, threads_per_worker=2, processes=PROCESSES, dashboard_address=None
    ) as cluster, Client(cluster) as client:
        before = client.submit(pools, pure=False).result()
        many = client.gather(client.map(lambda _: decorated(), range(20), pure=False))
        after = client.submit(pools, pure=False).result()
        tell([before, sorted(sum(many, [])), [pool for pool in after if pool[0] == "blas"]])
"""

# The start method is fork for those that are not named: the parent has NumPy's threads.
DAEMON = """
def child():
    tell(look())

def stuck(path):
    def endless():
        open(path, "x").close()
        time.sleep(60)
    safepool.worker(endless)()

if __name__ == "__main__":
    look()
    context = multiprocessing.get_context(METHOD)
    process = context.Process(target=child, daemon=True)
    process.start()
    process.join()
    assert process.exitcode == 0
    # A daemon is ended by SIGTERM, also in the middle of such a call.
    process = context.Process(target=stuck, args=("there",), daemon=True)
    process.start()
    while not os.path.exists("there"):
        time.sleep(0.01)
    process.terminate()
    process.join(30)
    assert process.exitcode == -signal.SIGTERM
"""

PREFORK = """
look()
pid = os.fork()
if not pid:
    tell(look())
    os._exit(0)
os.waitpid(pid, 0)
"""

# A thread of the parent is inside of a capped call, or many enter and leave, when it forks.
FORKED_INSIDE = """
look()
inside, may_go = threading.Event(), threading.Event()
thread = threading.Thread(target=hold, args=(inside, may_go))
thread.start()
inside.wait()
pid = os.fork()
if not pid:
    decorated()  # gives the cap back that the other thread had
    tell(look())
    os._exit(0)
os.waitpid(pid, 0)
may_go.set()
thread.join()

stop = False
def churn():
    while not stop:
        decorated()
threads = [threading.Thread(target=churn) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(30):
    pid = os.fork()
    if not pid:
        signal.alarm(30)
        decorated()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
stop = True
for thread in threads:
    thread.join()
"""

CELERY = """
from celery import Celery
here = os.path.dirname(os.path.abspath(__file__))
queue, control, results = (f"{here}/{name}" for name in ("queue", "control", "results"))
for folder in (queue, control, results):
    os.makedirs(folder, exist_ok=True)
app = Celery("program", broker="filesystem://", backend=f"file://{results}")
app.conf.broker_transport_options = {
    "data_folder_in": queue, "data_folder_out": queue, "control_folder": control,
    "polling_interval": 0.05,
}
plain = app.task(name="plain")(pools)
capped = app.task(name="capped")(decorated)

if __name__ == "__main__":
    worker = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "program", "worker", "--pool", "prefork", "-c", "1",
         "--without-heartbeat", "--without-gossip", "--without-mingle"],
        stdout=open("log", "w"), stderr=subprocess.STDOUT,
    )
    try:
        before, inside, after = (
            task.delay().get(timeout=60, interval=0.05) for task in (plain, capped, plain)
        )
        tell([before, inside, [pool for pool in after if pool[0] == "blas"]])
    finally:
        worker.terminate()
        assert worker.wait(60) == 0
"""

GUNICORN = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(look()).encode()]

if __name__ == "__main__":
    import socket
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "gunicorn", "--preload", "-w", "1", "-b", f"127.0.0.1:{port}",
         "program:app"],
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(800):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=60) as answer:
                    tell(json.load(answer))
                break
            except OSError:
                time.sleep(0.1)
    finally:
        server.terminate()
        assert server.wait(60) == 0
"""

# One row per program: what it needs beside what is there anyway, and its text.
PROGRAMS: dict[str, tuple[str, str]] = {
    "Dask, processes": ("distributed", DASK.replace("PROCESSES", "True")),
    "Dask, threads": ("distributed", DASK.replace("PROCESSES", "False")),
    "daemons, fork": ("", DAEMON.replace("METHOD", "'fork'")),
    "daemons, spawn": ("", DAEMON.replace("METHOD", "'spawn'")),
    "daemons, forkserver": ("", DAEMON.replace("METHOD", "'forkserver'")),
    "prefork": ("", PREFORK),
    "prefork, inside of a call": ("", FORKED_INSIDE),
    "Celery": ("celery", CELERY),
    "gunicorn": ("gunicorn", GUNICORN),
}
_SLOW = {"daemons, forkserver", "prefork, inside of a call"}


# A child of the fork server is started afresh, as by spawn.
@pytest.mark.parametrize(
    "program",
    [pytest.param(one, marks=[pytest.mark.slow] * (one in _SLOW)) for one in PROGRAMS],
)
def test_it_caps_and_restores_in(program: str, tmp_path: Path) -> None:
    """Also what the call itself has imported, and for each process that the program starts."""
    needs, text = PROGRAMS[program]
    if needs and find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed: pip install 'safepool[foreign]'")
    path = tmp_path / "program.py"
    path.write_text(HEAD + text)

    done = subprocess.run(
        # Python 3.12 warns of every fork beside threads, which is what these are about.
        [sys.executable, "-W", "ignore::DeprecationWarning", str(path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},  # what Dask leaves there
        timeout=100,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    before, inside, after = json.loads(done.stdout)
    assert {threads for _, threads in inside} == {1}
    assert {api for api, _ in inside} == {"blas", "openmp"}
    assert {threads for _, threads in before} != {1}
    assert after == [pool for pool in before if pool[0] == "blas"]
