"""What the clients of a service wait, when many of them come at once and some give up.

    python benchmarks/service.py [--rounds 5] [--requests 100]

The service of `benchmarks/asyncio_service.py` with two workers, over HTTP on the loopback: with
`await pool.run()`, and with `run_in_executor()` of the standard pool. Both are open at the same
time and take turns in every round, from a moment in which no worker has anything to do. All
requests of a round come at once; those that are counted compute for 1 ms. In the second table one
of ten computes for 1 s and is given up after 50 ms: the standard pool goes on with it.

The ratios of the medians to ours come first: above 1 is slower than ours. Nothing here fails for
being slow.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from http import HTTPStatus
from typing import Any

import tasks
from asyncio_service import Service
from figures import OURS, show

from safepool import ProcessPool

WORKERS = 2
SHORT_US, LONG_US, GIVEN_UP_S = 1_000, 1_000_000, 0.05


class Computing(Service):
    """As the example, and each request says how long it computes."""

    def __init__(self, pool: Any) -> None:
        super().__init__(pool)
        self.pool = pool

    def call(self, microseconds: int) -> Any:
        """Return what is to be awaited."""
        return self.pool.run(tasks.spin, microseconds)

    async def handle(self, target: str) -> tuple[HTTPStatus, object]:
        """Compute for a while."""
        microseconds = int(target[1:])
        try:
            async with asyncio.timeout(GIVEN_UP_S if microseconds == LONG_US else None):
                return HTTPStatus.OK, await self.call(microseconds)
        except TimeoutError:
            return HTTPStatus.GATEWAY_TIMEOUT, None


class OfTheStandardPool(Computing):
    """The same with the standard pool."""

    def call(self, microseconds: int) -> Any:
        """Return what is to be awaited."""
        return asyncio.get_running_loop().run_in_executor(self.pool, tasks.spin, microseconds)


async def ask(port: int, microseconds: int) -> float:
    """Return how long the answer has taken, in milliseconds."""
    begun = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET /{microseconds} HTTP/1.1\r\n\r\n".encode())
    await reader.read()
    took = time.perf_counter() - begun
    writer.close()
    await writer.wait_closed()
    return took * 1e3


async def until_idle(services: dict[str, Any]) -> None:
    """Return when each worker has nothing left to do."""
    for service in services.values():
        await asyncio.gather(*[service.call(SHORT_US) for _ in range(4 * WORKERS)])


async def compare(title: str, services: dict[str, Any], works: list[int], rounds: int) -> None:
    """Let services take turns, and print what the short requests have waited."""
    servers = {name: await service.start() for name, service in services.items()}
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in services}
    for _ in range(rounds):
        for name, server in servers.items():
            await until_idle(services)
            port = server.sockets[0].getsockname()[1]
            waits = await asyncio.gather(*[ask(port, work) for work in works])
            short = [wait for wait, work in zip(waits, works, strict=True) if work == SHORT_US]
            cuts = statistics.quantiles(short, n=100)
            rows[name].append((cuts[49], cuts[98]))
    for server in servers.values():
        server.close()
        await server.wait_closed()
    show(title, ("p50 ms", "p99 ms"), rows)


async def measure(rounds: int, requests: int, standard: ProcessPoolExecutor) -> None:
    """Measure and print."""
    async with ProcessPool(WORKERS) as ours:
        services = {
            OURS: Computing(ours),
            "stdlib fork, run_in_executor()": OfTheStandardPool(standard),
        }
        short = [SHORT_US] * requests
        await compare(f"{requests} requests at once", services, short, rounds)
        some = [LONG_US if number % 10 == 5 else SHORT_US for number in range(requests)]
        await compare(f"{requests} requests at once, one of ten given up", services, some, rounds)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=100)
    wanted = parser.parse_args()
    # Forked while this process has one thread.
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(WORKERS, mp_context=fork) as standard:
        list(standard.map(tasks.nothing, range(100)))
        asyncio.run(measure(wanted.rounds, wanted.requests, standard))


if __name__ == "__main__":
    main()
