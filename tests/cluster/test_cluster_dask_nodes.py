"""Limits, devices, memory and the end of real Dask workers: what is true on each node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from support_cgroups import control_group
from support_dask import NODE_A, NODE_B, WITH_DASK, dask_cluster

if TYPE_CHECKING:
    from pathlib import Path

# ruff: noqa: E501 -- programs
pytestmark = WITH_DASK

# Node A is the first of two; its workers are in a control group of their own.
HEAD = """
import threading
import numpy as np

here = os.getcwd()

def note(name, text=""):
    with open(f"{here}/{name}", "a") as file:
        file.write(f"{text or os.getpid()}\\n")

def noted(name):
    return open(f"{here}/{name}").read().split() if os.path.exists(f"{here}/{name}") else []

def is_a():
    return "SLURM_CPUS_PER_TASK" not in os.environ

def is_there(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

client = Client(sys.argv[1])
client.wait_for_workers(2)
place_a, place_b = sorted(client.nthreads(), key=lambda place: not client.run(is_a)[place])
"""

LIMITS = """
def eat(name):
    note(name)
    held = []
    while True:
        held.append(bytes(range(256)) * 4096)

def together(name, *values):
    # Both workers run one: neither ends before the other has begun.
    note(name)
    while len(noted(name)) < 2:
        time.sleep(0.01)
    return [os.environ[value] for value in values]

def told_of(error):
    return [type(error).__name__, error.exitcode, error.node.partition(" ")[0] == place_a, *error.__notes__]

with ClusterPool(client, nodes=[place_a], workers_per_node=2, gpus="auto",
                 env=lambda index: {"PORT": str(9000 + index)}) as pool:
    calls = [pool.submit(together, "devices", "CUDA_VISIBLE_DEVICES", "PORT") for _ in range(2)]
    told(devices=sorted(one.result() for one in calls))
with ClusterPool(client, nodes=[place_a], workers_per_node=2, gpus=["0,1", 2]) as pool:
    calls = [pool.submit(together, "lists", "CUDA_VISIBLE_DEVICES") for _ in range(2)]
    told(lists=sorted(one.result() for one in calls))

with ClusterPool(client, nodes=[place_a], memory_limit="60MB", retries=1) as pool:
    error = pool.submit(eat, "limit").exception()
    told(limited=told_of(error), most=error.exceeded.limit_bytes, limit_starts=len(noted("limit")))
    told(after_limit=pool.submit(abs, -1).result())
with ClusterPool(client, nodes=[place_a]) as pool:
    error = pool.submit(eat, "oom").exception()
    told(oom=told_of(error), killed=error.oom.limit_bytes, oom_starts=len(noted("oom")))
    told(after_oom=pool.submit(abs, -1).result(), same=[node.place for node in pool.nodes()] == [place_a])
client.close()
"""


def test_limits_and_devices_of_a_node(tmp_path: Path) -> None:
    limit = 640 << 20
    with control_group(memory_bytes=limit) as group, dask_cluster(tmp_path) as cluster:
        cluster.worker(env={**NODE_A, "CUDA_VISIBLE_DEVICES": "3,GPU-7"}, group=group)
        cluster.worker(env=NODE_B)
        facts = cluster.run(HEAD + LIMITS)
    for kind in ("limited", "oom"):
        name, code, is_on_a, *notes = facts.pop(kind)
        assert (name, code, is_on_a) == ("WorkerDiedError", -9, True)
        assert any(told.startswith("on node ") for told in notes)
    assert facts == {
        "devices": [["3", "9000"], ["GPU-7", "9001"]],
        "lists": [["0,1"], ["2"]],
        "most": 60_000_000,
        "limit_starts": 2,
        "after_limit": 1,
        "killed": limit,
        "oom_starts": 1,
        "after_oom": 1,
        "same": True,
    }


CALLS = """
def tiny(n):
    if n >= 0:
        note("starts", str(n))
        while is_a() and os.path.exists(f"{here}/block"):
            time.sleep(0.01)
    return n

def block(array):
    while os.path.exists(f"{here}/block"):
        time.sleep(0.01)
    return array.nbytes

def placed(array, name):
    # The file that the array's memory is a mapping of, when both workers have it.
    note(name)
    while len(noted(name)) < 2:
        time.sleep(0.01)
    at = array.ctypes.data
    for line in open("/proc/self/maps"):
        begin, end = (int(one, 16) for one in line.split()[0].split("-"))
        if begin <= at < end:
            return line.split()[3:5], os.getpid(), float(array[5])

def held(dask_worker):
    from safepool.cluster.agent import _agent
    return len(dask_worker.data) + sum(len(one._answers) for one in _agent._sessions.values())

def at_scheduler(dask_scheduler):
    return len(dask_scheduler.tasks)

def hang(name):
    note(name)
    while not os.path.exists(f"{here}/go on"):
        time.sleep(0.01)

def shorten():
    from safepool.cluster import agent
    agent._IDLE_S = 0.0
    agent._LAPSE_S = 0.5 if noted("lost") else 30.0

class Counted:
    # In the place of the carrier.
    def __init__(self, carrier):
        self.carrier, self.at_once, self.places, self.count = carrier, False, carrier.places, 0
        self.is_in_this_thread = carrier.is_in_this_thread

    def submit(self, *args):
        self.count += 1
        return self.carrier.submit(*args)

with ClusterPool(client, nodes=[place_a, place_b]) as pool:
    counted = inside.put_before_carrier(pool, Counted)
    pool.submit(abs, 1).result()
    await_(lambda: len(pool.nodes()) == 2, "both nodes")
    told(tiny=list(pool.map(tiny, [-1] * 3000)) == [-1] * 3000, messages_are_few=counted.count < 1500)
    open("block", "w").close()
    calls = [pool.submit(tiny, n) for n in range(100)]
    await_(lambda: sum(one.done() for one in calls) == 99, "all but the call that node A holds up")
    (node,) = [node for node in pool.nodes() if node.calls]
    told(slow=node.place == place_a, calls=node.calls, waits=[one.done() for one in calls].count(False))
    os.remove("block")
    told(right=[one.result() for one in calls] == [*range(100)], once=sorted(map(int, noted("starts"))) == [*range(100)])

    # A result is here though another call runs, and nothing of either is kept.
    open("block", "w").close()
    large = [pool.submit(block, np.ones(1 << 19)) for _ in range(2)]
    found = [pool.submit(np.zeros, 1 << 18) for _ in range(2)]
    await_(lambda: all(one.running() for one in large), "both run")
    os.remove("block")
    told(large=[one.result() for one in large], found=[one.result().nbytes for one in found])
    await_(lambda: not any(client.run(held).values()), "the nodes keep nothing")
    told(tasks=client.run_on_scheduler(at_scheduler))

with ClusterPool(client, workers_per_node=2, retries=1) as pool:
    shared = safepool.share(np.arange(1 << 18, dtype=float))
    calls = [safepool.worker(placed)] * 2
    of_a = ClusterPool(client, nodes=[place_a], workers_per_node=2)
    (where, *first), (where_too, *second) = [one.result() for one in [of_a.submit(placed, shared, "shared") for _ in range(2)]]
    told(one_copy=where == where_too and where[1] != "0", workers=len({first[0], second[0]}), value=first[1])
    told(alive=all(is_there(pid) for pid in map(int, noted("shared"))))

    # Without cluster pools the agent ends its workers, while the Dask worker goes on.
    client.run(shorten)
    of_a.shutdown()
    await_(lambda: not any(is_there(pid) for pid in map(int, noted("shared"))), "the idle pool of node A")

    # A Dask worker that is retired.
    calls = [pool.submit(hang, "retired") for _ in range(4)]
    await_(lambda: len(noted("retired")) == 4, "they run")
    children = [int(pid) for pid in noted("retired")]
    client.retire_workers([place_a], close_workers=True)
    await_(lambda: [node.place for node in pool.nodes()] == [place_b], "it is gone")
    open("go on", "w").close()
    told(retired=[one.result() for one in calls], starts=len(noted("retired")))
    told(survives=pool.submit(lambda: float(shared[7])).result())
    await_(lambda: sum(map(is_there, children)) <= 2, "workers of the Dask worker that was retired")

# A client that is closed, and a pool that is not: nobody asks for answers any more.
os.remove("go on")
other = Client(sys.argv[1], set_as_default=False)
lost = ClusterPool(other)
call = lost.submit(hang, "lost")
await_(lambda: noted("lost"), "it runs")
client.run(shorten)
other.close()
told(lost=type(call.exception()).__name__ in ("NodeLostError", "PoolBrokenError"))
await_(lambda: not is_there(int(noted("lost")[0])), "a call of a program that is gone")
lost.shutdown()
client.close()
"""


def test_calls_results_and_shared_objects_of_nodes(tmp_path: Path) -> None:
    with dask_cluster(tmp_path) as cluster:
        cluster.worker(env=NODE_A)
        cluster.worker(nanny=True, env=NODE_B)
        facts: dict[str, Any] = cluster.run(HEAD + CALLS)
    assert facts == {
        "tiny": True,
        "messages_are_few": True,
        "slow": True,
        "calls": 1,
        "waits": 1,
        "right": True,
        "once": True,
        "large": [1 << 22] * 2,
        "found": [1 << 21] * 2,
        "tasks": 0,
        "one_copy": True,
        "workers": 2,
        "value": 5.0,
        "alive": True,
        "lost": True,
        "retired": [None] * 4,
        "starts": 6,
        "survives": 7.0,
    }
