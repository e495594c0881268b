"""A web service whose requests compute in a pool, and none of them for longer than it may.

    python benchmarks/asyncio_service.py --port 8000
    curl 'http://127.0.0.1:8000/primes?below=1000000'
    curl 'http://127.0.0.1:8000/primes?below=1000000000&seconds=0.5'

A request whose time is over is answered 504, and one whose client has hung up by nobody; in both
cases the work itself is ended, and no worker goes on for nobody. The same three lines do it in
FastAPI, Starlette, aiohttp and Quart: `asyncio.timeout()` around `await pool.run(...)`, in a
handler that the framework cancels when the client is gone.

HTTP is as small here as it can be: one request for each connection, no body.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, urlsplit

from safepool import ProcessPool, WorkerDiedError

MOST_SECONDS = 10.0


def count_primes(below: int) -> int:
    """Count them in the slowest way there is."""
    return sum(all(n % d for d in range(2, int(n**0.5) + 1)) for n in range(2, below))


async def primes(pool: ProcessPool, below: int, seconds: float) -> dict[str, Any]:
    """Handle a request: what a framework would call."""
    async with asyncio.timeout(min(seconds, MOST_SECONDS)):
        return {"below": below, "primes": await pool.run(count_primes, below)}


class Service:
    """Answers requests.

    Args:
        pool: Where they compute.
    """

    def __init__(self, pool: ProcessPool) -> None:
        self._pool = pool

    async def start(self, port: int = 0) -> asyncio.Server:
        """Listen on the loopback; 0 is any port that is free."""
        return await asyncio.start_server(self.answer, "127.0.0.1", port, backlog=1000)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection's only request."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            work = asyncio.ensure_future(self.handle(head.split()[1].decode()))
            gone = asyncio.ensure_future(reader.read())
            try:
                await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    writer.write(_response(*work.result()))
                    await writer.drain()
            finally:
                work.cancel()
                gone.cancel()
        writer.close()

    async def handle(self, target: str) -> tuple[HTTPStatus, object]:
        """Return what to answer."""
        url = urlsplit(target)
        words = {name: values[-1] for name, values in parse_qs(url.query).items()}
        if url.path != "/primes":
            return HTTPStatus.NOT_FOUND, {"error": f"there is no {url.path}"}
        try:
            below, seconds = int(words["below"]), float(words.get("seconds", MOST_SECONDS))
            return HTTPStatus.OK, await primes(self._pool, below, seconds)
        except TimeoutError:
            return HTTPStatus.GATEWAY_TIMEOUT, {"error": "it would take too long"}
        except WorkerDiedError as error:
            return HTTPStatus.INTERNAL_SERVER_ERROR, {"error": str(error)}
        except (KeyError, ValueError) as error:
            return HTTPStatus.BAD_REQUEST, {"error": repr(error)}


def _response(status: HTTPStatus, content: object) -> bytes:
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 {status} {status.phrase}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


async def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8000)
    port = parser.parse_args().port
    async with ProcessPool() as pool:
        server = await Service(pool).start(port)
        print(f"http://127.0.0.1:{port}/primes?below=1000000")
        await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
