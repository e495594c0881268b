"""What safepool uses of Dask beyond its documentation: each name is there, and does what it did.

A release of Dask that drops or changes one would break cluster pools somewhere in the middle. This
file fails first, and names it.
"""

from __future__ import annotations

import inspect
import json
import os
import pkgutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

# ruff: noqa: E501 -- a program
pytestmark = pytest.mark.slow  # with Dask, which is there where the slow tests run

# One row per function: positional arguments, and keywords, as `safepool.cluster.carriers.dask` and
# a worker of Dask pass them.
CALLS: dict[str, tuple[int, list[str]]] = {
    "distributed:Client.nthreads": (1, []),
    "distributed:Client.run": (3, ["workers"]),
    "distributed:Client.scatter": (2, ["workers", "hash", "direct"]),
    "distributed:Client": (1, ["timeout", "set_as_default"]),
    "distributed:Security.get_connection_args": (2, []),
    "distributed.comm:connect": (1, ["timeout"]),
    "distributed.core:ConnectionPool.__call__": (2, []),
    "distributed.core:ConnectionPool.connect": (2, []),
    "distributed.core:ConnectionPool.reuse": (3, []),
    "distributed.protocol:to_serialize": (1, []),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_function_of_dask_takes_what_it_is_given(name: str) -> None:
    pytest.importorskip("distributed", reason="pip install 'safepool[dask]'")
    count, words = CALLS[name]
    signature = inspect.signature(pkgutil.resolve_name(name))

    signature.bind(*range(count), **dict.fromkeys(words))
    # A function of any keywords would drop one that it does not know.
    assert set(words) <= set(signature.parameters)


PROGRAM = """
import asyncio, json, logging, warnings
from distributed import Client, Scheduler, Security, Worker
from distributed.comm import connect
from distributed.protocol import to_serialize

def who(word, dask_worker=None):
    return word, dask_worker.id

async def in_loop(dask_worker=None):
    return asyncio.get_running_loop() is dask_worker.loop.asyncio_loop

async def answer(segments):
    kinds = [type(one).__name__ for one in segments]
    return {"kinds": kinds, "segments": to_serialize([bytearray(b"ab"), b"c"])}

class Told(logging.Handler):
    def emit(self, record):
        args.append(record.args)

args = []
facts = {}

# Each fact is one that safepool.cluster.carriers.dask needs.
async def main():
    log = logging.getLogger("distributed.worker")
    log.setLevel(logging.INFO)
    async with Scheduler(host="127.0.0.1", port=0, dashboard_address=":0") as scheduler:
        async with Worker(scheduler.address, nthreads=1, host="127.0.0.1") as worker:
            async with Client(scheduler.address, asynchronous=True, set_as_default=False) as client:
                place = worker.address
                facts["status"] = client.status
                facts["loop"] = client.loop.asyncio_loop is asyncio.get_running_loop()
                facts["nthreads"] = await client.nthreads() == {place: 1}
                facts["run"] = await client.run(who, "x", workers=[place]) == {place: ("x", worker.id)}
                facts["run in loop"] = await client.run(in_loop, workers=[place]) == {place: True}
                log.addHandler(Told())
                await client.run(who, "x", workers=[place])
                facts["log"] = ("who",) in args
                (future,) = await client.scatter([[b"a"]], workers=[place], hash=False, direct=False)
                facts["data"] = worker.data[future.key] == [b"a"]
                connection = await client.rpc.connect(place)
                client.rpc.reuse(place, connection)
                facts["identity"] = (await client.rpc(place).identity())["id"] == worker.id
                facts["unknown"] = await client.rpc(place).safepool_call(segments=1)
                worker.handlers["safepool_call"] = answer
                told = await client.rpc(place).safepool_call(segments=to_serialize([b"a", bytearray(b"b")]))
                facts["answer"] = [told["kinds"], [bytes(one).decode() for one in told["segments"]]]
            facts["closed"] = client.status
        words = Security().get_connection_args("client")
        comm = await connect(scheduler.address, timeout=60, **words)
        await comm.close()

asyncio.run(main())
print(json.dumps(facts))
"""


def test_dask_does_what_cluster_pools_rely_on(tmp_path: Path) -> None:
    """`Client.rpc`, `Worker.handlers`, `Worker.data`, a function's ``dask_worker``, and the log."""
    pytest.importorskip("distributed", reason="pip install 'safepool[dask]'")
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "program.py"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert {name: fact for name, fact in facts.items() if fact is not True} == {
        "status": "running",
        "unknown": None,
        "answer": [["bytes", "bytearray"], ["ab", "c"]],
        "closed": "closed",
    }
    assert len(facts) == 11
