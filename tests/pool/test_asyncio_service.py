"""The example of a service: many requests at once, and none leaves a worker busy."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from safepool import ProcessPool

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLE = Path(__file__).parents[2] / "benchmarks" / "asyncio_service.py"

pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="benchmarks are not here")

# Nobody waits for that many.
ENDLESS = 10**9


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("asyncio_service", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "asyncio_service", module)
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "MOST_SECONDS", 60.0)
    return module


async def ask(port: int, query: str, *, hang_up: bool = False) -> tuple[int, Any]:
    """Return the status and the content of what is answered; 0 if it is not waited for."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET {query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        await writer.drain()
        if hang_up:
            return 0, None
        head = await reader.readuntil(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(await reader.read())
    finally:
        writer.close()
        await writer.wait_closed()


def test_200_requests_at_once_leave_no_worker_busy(example: Any) -> None:
    """Some take too long, some clients hang up, the others are answered."""

    async def main() -> None:
        async with ProcessPool(2) as pool:
            server = await example.Service(pool).start()
            port = server.sockets[0].getsockname()[1]
            requests = []
            for number in range(50):
                requests += [
                    ask(port, f"/primes?below={number}"),
                    ask(port, f"/primes?below={ENDLESS}&seconds=0.1"),
                    ask(port, f"/primes?below={number + 100}"),
                    ask(port, f"/primes?below={ENDLESS}", hang_up=True),
                ]
            answers = await asyncio.gather(*requests)
            for number in range(50):
                few, late, many, gone = answers[4 * number : 4 * number + 4]
                for (status, found), below in ((few, number), (many, number + 100)):
                    assert status == 200
                    assert found == {"below": below, "primes": example.count_primes(below)}
                assert late[0] == 504
                assert gone[0] == 0
            while any(worker.task for worker in pool.workers()):
                await asyncio.sleep(0.002)
            url = f"http://127.0.0.1:{port}/primes?below=10"
            answer = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read())
            assert json.loads(answer) == {"below": 10, "primes": 4}
            assert (await ask(port, "/primes?below=x"))[0] == 400
            assert (await ask(port, "/other"))[0] == 404
            server.close()
            await server.wait_closed()

    asyncio.run(main())
