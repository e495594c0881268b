"""A cluster pool on real Dask schedulers and workers: what holds in a pool holds on each node."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING, Any

from support_cgroups import control_group
from support_dask import NODE_A, NODE_B, WITH_DASK, dask_cluster
from support_processes import has_ended, wait_until

from safepool.cli import report

if TYPE_CHECKING:
    from pathlib import Path

# ruff: noqa: E501 -- programs
pytestmark = WITH_DASK

TOUR = """
import asyncio, threading, numpy as np
from concurrent.futures import CancelledError, as_completed
from pickle import PicklingError

FACTOR = 3

def times(x):
    return x * FACTOR

def where(_=None):
    return os.environ.get("LOKY_MAX_CPU_COUNT", "") + os.environ.get("SLURM_CPUS_PER_TASK", "b")

def who(_):
    time.sleep(0.05)
    return os.getpid()

def fragile(x):
    if x == 5:
        os._exit(7)
    return x

def raises(x):
    raise ValueError(f"no {x}")

def pools(_):
    import scipy.linalg, threadpoolctl
    return sorted({one["num_threads"] for one in threadpoolctl.threadpool_info()})

def kwargs(**words):
    return words

def total(array, factor):
    return float(array.sum()) * factor, array.flags.writeable

def changed(array, n):
    array += n
    return float(array[0])

def error_of(call):
    try:
        call()
    except BaseException as error:
        return type(error).__name__, str(error)[:60], type(error.__cause__).__name__

async def awaited(pool):
    return [await pool.run(times, 2), sorted([one async for one in pool.amap(times, range(3), ordered=False)])]

def counted(path):
    with open(path, "a") as file:
        file.write("x")
    os._exit(1)

with Client(sys.argv[1]) as client:
    client.wait_for_workers(2)
    with ClusterPool(client, trace="run.json") as pool:
        told(first=pool.submit(times, 14).result())
        await_(lambda: len(pool.nodes()) == 2, "both nodes")
        told(size=pool.size, places=[node.place for node in pool.nodes()])
        told(ordered=list(pool.map(times, range(2000))) == [3 * x for x in range(2000)])
        told(generator=list(pool.map(times, (x for x in range(5)))), two=list(pool.map(pow, [2, 3], [3, 2])))
        told(unordered=sorted(pool.map(times, range(50), ordered=False)))
        told(awaited=asyncio.run(awaited(pool)))
        told(nodes=sorted(set(pool.map(where, range(40)))))
        told(caps=sorted({n for found in pool.map(pools, range(4)) for n in found}))
        found = list(pool.map(fragile, range(12), return_exceptions=True))
        told(alone=[type(one).__name__ for one in found], code=found[5].exitcode, node=hasattr(found[5], "node"))
        told(raised=error_of(lambda: pool.submit(raises, 1).result()))
        told(exits=error_of(lambda: pool.submit(sys.exit, 3).result()))
        told(unpicklable_result=error_of(lambda: pool.submit(threading.Lock).result()))
        told(unpicklable_argument=error_of(lambda: pool.submit(print, threading.Lock()).result()))
        told(random=len({pool.submit(os.urandom, 8).result() for _ in range(5)}))
        told(words=pool.submit(kwargs, key=1, workers="x", retries=2, pure=0).result())
        told(late=error_of(lambda: pool.submit(safepool.worker(time.sleep, timeout=0.3), 60).result()))
        told(retried=error_of(lambda: pool.submit(safepool.worker(counted, retries=2), "starts").result())[0],
             starts=len(open("starts").read()))
        future = pool.submit(time.sleep, 60)
        await_(future.running, "it runs")
        busy = []
        await_(lambda: busy.extend(one for one in pool.workers() if one.state == "busy") or busy, "a worker is busy")
        told(busy=[one.task for one in busy], there={one.node for one in busy} <= {one.name for one in pool.nodes()})
        stacks = pool.dump_tracebacks(timeout=30)
        told(stacks="most recent call first" in stacks[busy[0].node, busy[0].pid], every=len(stacks) == len(pool.workers()))
        told(killed=pool.cancel(future, kill=True), is_cancelled=future.cancelled())
        await_(lambda: not any(node.calls for node in pool.nodes()), "no node counts the call")
        array = np.ones(1 << 19)
        told(large=pool.submit(total, array, 2).result(), back=float(pool.submit(np.ones, 1 << 19).result().sum()))
        told(repeated=[pool.submit(changed, array, n).result() for n in range(4)], same=float(array.sum()))
        told(sent_once=max(len(kept) for kept, _ in inside.kept_by_nodes(pool)))
        await_(lambda: inside.reaches_all_nodes(pool), "messages go to the workers")
        told(directly=pool.submit(total, np.ones(1 << 18), 3).result())
        shared = safepool.share(array)
        told(shared=[pool.submit(total, shared, n).result() for n in range(4)])
        table = bytes(100_000)
        told(closure=sum(pool.map(lambda n: len(table) + n, range(4))))
        waiting = [pool.submit(time.sleep, 0.01) for _ in range(20)]
        told(completed=len(list(as_completed(waiting))))
        with ClusterPool(client) as other:
            told(together=bool({*other.map(who, range(4))} & {*pool.map(who, range(20))}))
        hanging = [pool.submit(time.sleep, 60) for _ in range(6)]
        await_(lambda: hanging[0].running(), "it runs")
        pool.shutdown(wait=False, cancel_futures=True)
        pool.kill_workers()
        told(ended=[error_of(one.result)[0] for one in hanging])
        told(closed=error_of(lambda: pool.submit(abs, 1)))
    pool = ClusterPool(client)
    waiting = [pool.submit(time.sleep, 60) for _ in range(4)]
    await_(lambda: waiting[0].running(), "it runs")
told(client_closed=[error_of(one.result)[0] for one in waiting], later=error_of(pool.submit(abs, 1).result)[0])
pool.shutdown()
"""


# What the program above has told.
FACTS: dict[str, Any] = {
    "first": 42,
    "size": 2,
    "ordered": True,
    "generator": [0, 3, 6, 9, 12],
    "two": [8, 9],
    "unordered": [3 * x for x in range(50)],
    "awaited": [6, [0, 3, 6]],
    "caps": [1],
    "alone": [*["int"] * 5, "WorkerDiedError", *["int"] * 6],
    "code": 7,
    "node": True,
    "raised": ["ValueError", "no 1", "_RemoteTraceback"],
    "random": 5,
    "words": {"key": 1, "workers": "x", "retries": 2, "pure": 0},
    "retried": "WorkerDiedError",
    "starts": 3,
    "busy": ["time.sleep"],
    "there": True,
    "stacks": True,
    "every": True,
    "killed": True,
    "is_cancelled": True,
    "large": [2 * 2.0**19, True],
    "directly": [3 * 2.0**18, True],
    "back": 2.0**19,
    "repeated": [1.0, 2.0, 3.0, 4.0],
    "same": 2.0**19,
    "sent_once": 1,
    "shared": [[n * 2.0**19, False] for n in range(4)],
    "closure": 400_006,
    "completed": 20,
    "together": True,
    "later": "PoolBrokenError",
    "closed": ["RuntimeError", "cannot schedule new futures after shutdown", "NoneType"],
}


# Of errors whose text is another library's: the class.
KINDS = {
    "exits": "SystemExit",
    "unpicklable_result": "TypeError",
    "unpicklable_argument": "TypeError",
    "late": "TaskTimeoutError",
}


# The program and the calls on its nodes end together, whatever becomes of it.
KILLED = """
import subprocess
from safepool.cluster import agent, shell

shell._COLLECT_S = 0.5

def shorten():
    agent._LAPSE_S = agent._IDLE_S = 0.5

def note(path):
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(600)

client = Client(sys.argv[1])
client.wait_for_workers(2)
# Workers of its own: those of the tour run the calls of its closed client for 30 s more.
pool = ClusterPool(client, max_tasks_per_child=1000)
futures = [pool.submit(note, os.path.abspath("pids")) for _ in range(2)]
await_(lambda: os.path.exists("pids") and open("pids").read().count("\\n") == 2, "both run")
# Not earlier: this program is slower to ask than that on a machine that has too much to do.
client.run(shorten)
os.kill(os.getpid(), signal.SIGKILL)
"""


# One test for all of it: another process of a parallel run would start a cluster of its own.
def test_what_holds_in_a_pool_holds_on_nodes(tmp_path: Path) -> None:
    with dask_cluster(tmp_path) as cluster:
        cluster.worker(env=NODE_A)
        cluster.worker(nanny=True, env=NODE_B)
        tour = cluster.run(TOUR)
        assert {fact: tour[fact] for fact in FACTS} == FACTS
        assert {fact: tour[fact][0] for fact in KINDS} == KINDS
        assert len(tour["nodes"]) == 2
        trace = report.read(str(cluster.folder / "run.json"))
        assert trace.damaged_lines == 0
        assert trace.total().calls > 2000
        assert {row.node.partition(" (")[0] for row in trace.workers.values()} == {
            f"node {place}" for place in tour["places"]
        }
        assert trace.outcomes["timed out"] == 1
        assert trace.outcomes["retried"] == 2
        assert {*tour["ended"]} <= {"CancelledError", "NodeLostError"}
        # Those that had begun, and those that waited.
        assert {*tour["client_closed"]} <= {"PoolBrokenError", "NodeLostError"}

        program = cluster.start_program(KILLED)
        program.communicate()
        assert program.returncode == -signal.SIGKILL, cluster.logs()
        pids = [int(pid) for pid in (cluster.folder / "pids").read_text().split()]
        assert len(pids) == 2
        wait_until(lambda: all(has_ended(pid) for pid in pids))


LOSSES = """
from concurrent.futures import wait

def slow(path):
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(0.4)
    return path

def starts(path):
    return open(path).read().split() if os.path.exists(path) else []

def run(pool, name, count, kill):
    paths = [os.path.abspath(f"{name}-{n}") for n in range(count)]
    futures = [pool.submit(slow, path) for path in paths]
    place = kill(paths)
    wait(futures)
    errors = [one.exception() for one in futures]
    lost = [one for one in errors if isinstance(one, NodeLostError)]
    told(**{name: {
        "lost": len(lost),
        "named": [place in str(one) and place in one.node for one in lost],
        "right": sum(one.exception() is None and one.result() == path for one, path in zip(futures, paths)),
        "starts": sorted(len(starts(path)) for path in paths),
    }})

def is_there(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

def children(pid):
    return [int(one) for task in os.listdir(f"/proc/{pid}/task")
            for one in open(f"/proc/{pid}/task/{task}/children").read().split()]

def kill_node(place, pids, paths):
    def family():
        servers = children(pids[place])
        return servers + [one for server in servers for one in children(server)]
    running = lambda: {pid for path in paths for pid in starts(path)} & {str(pid) for pid in family()}
    await_(running, "a call on the node")
    mine.extend(family())
    os.kill(pids[place], signal.SIGKILL)
    return place

mine = []
client = Client(sys.argv[1])
client.wait_for_workers(3)
pids = client.run(os.getpid)
where = client.run(lambda: os.environ.get("SLURM_CPUS_PER_TASK"))
(place_b,) = [place for place, is_b in where.items() if is_b]
with ClusterPool(client) as pool:
    await_(lambda: pool.submit(abs, 1).result() and len(pool.nodes()) == 2, "both nodes")
    run(pool, "no_retries", 8, lambda paths: kill_node(place_b, pids, paths))
    await_(lambda: len(pool.nodes()) == 1, "the node is gone")
with ClusterPool(client, retries=1) as pool:
    pool.submit(abs, 1).result()
    (node,) = pool.nodes()
    run(pool, "retries", 4, lambda paths: kill_node(node.place, pids, paths))
    (other,) = pool.nodes()
    await_(lambda: not any(map(is_there, mine)), "processes of the nodes")
    told(left=bool(mine))
    told(another_process=other.place != node.place)
    last = other.place
pool = ClusterPool(client, no_nodes_timeout=0.5)
pool.submit(abs, 1).result()
os.kill(pids[last], signal.SIGKILL)
await_(lambda: not pool.nodes(), "no node")
error = pool.submit(abs, 1).exception()
told(no_nodes=[type(error).__name__, "no node could take a call" in str(error)])
pool.shutdown()
pool = ClusterPool(client, no_nodes_timeout=None)
future = pool.submit(abs, -5)
told(waits=not future.done())
sys.stdin.readline()
told(joined=future.result())
futures = [pool.submit(slow, os.path.abspath("gone")) for _ in range(100)]
await_(lambda: starts("gone"), "one has begun")
told()
sys.stdin.readline()
wait(futures)
told(scheduler_gone=sorted({type(one.exception()).__name__ for one in futures if one.exception()}))
pool.shutdown()
os._exit(0)
"""


def test_a_node_that_is_lost_costs_what_it_had_begun(tmp_path: Path) -> None:
    with dask_cluster(tmp_path) as cluster:
        for env in (NODE_A, NODE_A, NODE_B):
            cluster.worker(env=env)
        program = cluster.start_program(LOSSES)
        assert program.stdin is not None
        assert program.stdout is not None
        facts: dict[str, Any] = {}
        for line in program.stdout:
            told = json.loads(line)
            facts.update(told)
            if "waits" in told:
                cluster.worker()
                program.stdin.write("\n")
                program.stdin.flush()
            elif not told:
                cluster.scheduler.kill()
                program.stdin.write("\n")
                program.stdin.flush()
        program.communicate()
        assert program.returncode == 0, cluster.logs()
    one = {"lost": 1, "named": [True], "right": 7, "starts": [1] * 8}
    assert facts.pop("no_retries") == one
    assert facts.pop("retries") == {"lost": 0, "named": [], "right": 4, "starts": [1, 1, 1, 2]}
    assert set(facts.pop("scheduler_gone")) <= {"NodeLostError", "PoolBrokenError"}
    assert facts == {
        "left": True,
        "another_process": True,
        "no_nodes": ["NoNodesError", True],
        "waits": True,
        "joined": 5,
    }


# A program beside it, whose cluster pools begin at the same moments.
QUOTA = """
def in_worker(_=None):
    return os.getppid(), os.getpid()

with Client(sys.argv[1]) as client:
    client.wait_for_workers(2)
    pids = client.run(os.getpid)
    with ClusterPool(client) as pool:
        told(size=pool.submit(abs, 1).result() and pool.size, nodes=len(pool.nodes()))
    pools = [ClusterPool(client, retries=1) for _ in range(5)]
    pools.append(ClusterPool(client, retries=1, max_tasks_per_child=100))
    futures = [pool.submit(in_worker) for pool in pools]
    told(workers=len({one.result() for one in futures}))
    (place,) = {node.place for pool in pools for node in pool.nodes()}
    told(place=place)
    if len(sys.argv) > 2:
        os.kill(pids[place], signal.SIGKILL)
        await_(lambda: all(place not in [node.place for node in pool.nodes()] for pool in pools), "it is lost")
        told(again=[pool.submit(abs, -n).result() for n, pool in enumerate(pools)])
        told(others=len({node.place for pool in pools for node in pool.nodes()}))
    for pool in pools:
        pool.shutdown()
"""


def test_workers_of_one_quota_are_one_node_that_fits_it(tmp_path: Path) -> None:
    """Dask itself believes in two threads for each of the two."""
    with control_group(cpus=1) as group, dask_cluster(tmp_path) as cluster:
        cluster.worker(group=group)
        cluster.worker(group=group)
        programs = [cluster.start_program(QUOTA) for _ in range(2)]
        found = [cluster.told_by(program) for program in programs]
        (place,) = {facts.pop("place") for facts in found}
        # Those of other options have workers of their own.
        assert found == [{"size": 1, "nodes": 1, "workers": 2}] * 2
        last = cluster.run(QUOTA, "kill it")
        assert last["place"] == place
        assert last["again"] == [0, 1, 2, 3, 4, 5]
        assert last["others"] == 1
