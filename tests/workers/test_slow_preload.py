"""An import that takes long, or for ever, holds up nobody who does not wait for it."""

from __future__ import annotations

import sys
import textwrap
import time
from typing import TYPE_CHECKING

import pytest
from support_processes import run_script, still_alive, terminal

if TYPE_CHECKING:
    from pathlib import Path

if sys.platform != "linux":
    pytest.skip("there is a fork server on Linux only", allow_module_level=True)

# Far beyond what any of these tests may take, and the server waits for an import.
LONG_S = 1000

# Before each program: the import that never ends, in the server only. It says that it has begun.
HEAD = f"""
import os, sys, threading, time
from pathlib import Path
Path("endless.py").write_text(
    "import sys, time\\n"
    "if 'safepool.workers.server' in sys.modules:\\n"
    "    open('begun', 'w').close()\\n"
    "    time.sleep({LONG_S})\\n"
)
sys.path.insert(0, os.getcwd())
import safepool
from safepool.workers import asking, forkserver
def wait_for_the_import():
    while not os.path.exists("begun"):
        time.sleep(0.01)
"""

# One row per program: what it does, and what it prints. None may take as long as an import may.
PROGRAMS: dict[str, tuple[str, str]] = {
    "a result is waited for in vain": (
        """
        pool = safepool.ProcessPool(1, preload=["endless"])
        future = pool.submit(abs, -1)
        wait_for_the_import()
        try:
            future.result(timeout=0.2)
        except TimeoutError:
            print("in vain", future.running(), future.cancel())
        pool.shutdown()
        """,
        "in vain False True",
    ),
    "shut down, the rest cancelled": (
        """
        pool = safepool.ProcessPool(1, preload=["endless"])
        future = pool.submit(abs, -1)
        wait_for_the_import()
        pool.shutdown(cancel_futures=True)
        print(future.cancelled())
        """,
        "True",
    ),
    "workers are terminated": (
        """
        pool = safepool.ProcessPool(1, preload=["endless"])
        future = pool.submit(abs, -1)
        wait_for_the_import()
        pool.terminate_workers()
        pool.shutdown()
        print(future.cancelled(), pool.workers())
        """,
        "True ()",
    ),
    "another pool waits for the same server, and is given up": (
        """
        first = safepool.ProcessPool(1, preload=["endless"])
        first.submit(abs, -1)
        wait_for_the_import()
        second = safepool.ProcessPool(1, preload=[])
        future = second.submit(abs, -1)
        while not forkserver._servers or max(s.users for s in forkserver._servers.values()) < 2:
            time.sleep(0.01)
        second.shutdown(cancel_futures=True)
        print(future.cancelled(), len(forkserver.running()))
        first.shutdown(cancel_futures=True)
        """,
        "True 1",
    ),
    "the import is given up after a while": (
        """
        import logging
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        receive, importing = asking.RunningServer._receive, [""]
        def give_up_soon(server, limit_s, given_up=None):
            # This import alone: the start of a server, and its other imports, have their time.
            limit_s = 1.0 if importing.pop() == "endless" else limit_s
            importing.append("")
            answer = receive(server, limit_s, given_up)
            importing[0] = answer[0][1]
            return answer
        asking.RunningServer._receive = give_up_soon
        with safepool.ProcessPool(1, preload=["endless", "colorsys"]) as pool:
            print(pool.submit(lambda: "colorsys" in sys.modules).result())
        """,
        "endless is not preloaded: the fork server's import takes too long\nTrue",
    ),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_import_that_never_ends(program: str, tmp_path: Path) -> None:
    text, expected = PROGRAMS[program]
    begin = time.monotonic()
    done = run_script(HEAD + textwrap.dedent(text), cwd=tmp_path)

    assert (done.stdout.strip(), done.stderr, done.returncode) == (expected, "", 0)
    assert time.monotonic() - begin < 45


def test_ctrl_c_ends_a_program_in_the_middle_of_an_import(tmp_path: Path) -> None:
    code = HEAD + textwrap.dedent(
        """
        pool = safepool.ProcessPool(1, preload=["endless"])
        future = pool.submit(abs, -1)
        wait_for_the_import()
        print("waiting", *forkserver.running(), flush=True)
        future.result()
        """
    )
    with terminal(code, cwd=tmp_path) as (script, screen):
        servers = [int(word) for word in screen.until("waiting")[-1].split()[1:]]
        assert servers
        screen.press(b"\x03")
        assert script.wait(30) != 0
        assert "KeyboardInterrupt" in "".join(screen.rest())
    assert still_alive(servers, after_s=5) == []
