"""A worker's interpreter is a fresh one, but for what this table says."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import support_natives as natives

from safepool.threads.environment import worker_environment

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the probe asks Linux")

PROGRAM = """
import json, sys
import support_interpreter
if __name__ == "__main__":
    if sys.argv[1] == "itself":
        print(json.dumps(support_interpreter.state()))
    else:
        import safepool
        with safepool.ProcessPool(1, mp_context=sys.argv[1]) as pool:
            print(json.dumps(pool.submit(support_interpreter.state).result(60)))
"""

# Of every worker: why it is not as in an interpreter that is started to run the script, what is
# not there of it, and what is instead or besides.
DIFFERENCES: dict[str, tuple[str, list[str], list[str]]] = {
    "sys.argv": ("the test's own argument", ["itself"], ["METHOD"]),
    "sys.meta_path": (
        "they tell when a library with threads was imported, or one whose settings wait for it",
        [],
        ["safepool.threads.imports.AfterImport"],
    ),
    "modules of others": ("the worker's own program", [], ["safepool"]),
    "faulthandler": ("a crash in native code is told with its stack", ["False"], ["True"]),
    "exit functions": ("multiprocessing's own, which ends what a task started", ["1"], ["2"]),
    "loggers": (
        "the standard library's own: its module of exceptions is imported",
        [],
        ["concurrent PlaceHolder", "concurrent.futures Logger"],
    ),
    "logging's functions": (
        "records go to the program; logging.warning() does not configure a worker by itself",
        [],
        ["logging.basicConfig", "safepool.workers.logs._forwarding.<locals>.call_handlers"],
    ),
    "signals": (
        "Ctrl-C reaches the whole terminal, and it is the pool that decides",
        ["SIGINT _signal.default_int_handler"],
        ["SIGINT safepool.workers.main._do_nothing"],
    ),
    "environment": (
        "the caps",
        [],
        sorted(
            f"{name}={value}" for name, value in worker_environment(1).items() if value is not None
        ),
    ),
    "os.cpu_count": ("the worker's share", ["MACHINE"], ["1"]),
}

STREAM = (["utf-8 surrogateescape TextIOWrapper"], ["utf-8 strict TextIOWrapper"])

# What the start method itself changes, as the standard pool's workers have it too.
OF_THE_METHOD: dict[str, dict[str, tuple[str, list[str], list[str]]]] = {
    "safepool": {
        "manager": (
            "getLogger(__name__) of a script that was run is the logger that the program has so",
            [],
            ["getLogger"],
        ),
    },
    "spawn": {
        "start method": ("multiprocessing tells its children", ["None"], ["'spawn'"]),
        "streams": ("its standard input is closed", *STREAM),
    },
    "loky": {
        "start method": ("loky tells its children", ["None"], ["'loky'"]),
        "streams": ("its standard input is closed", *STREAM),
        "modules of others": (
            "loky unpickles with cloudpickle, and uses psutil where it is installed",
            [],
            ["cloudpickle", "loky", *["psutil"] * (find_spec("psutil") is not None), "safepool"],
        ),
    },
}


def as_list(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


def states(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    script = folder / "script.py"
    script.write_text(PROGRAM, encoding="utf-8")
    environment = natives.environment() | {"LC_ALL": "C.UTF-8"}
    environment.pop("PYTHONFAULTHANDLER", None)
    found = []
    for argument in arguments:
        done = subprocess.run(
            [sys.executable, str(script), argument],
            capture_output=True,
            check=True,
            timeout=100,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        found.append(json.loads(done.stdout))
    return found


@pytest.mark.parametrize("method", OF_THE_METHOD)
def test_a_worker_differs_from_a_fresh_interpreter_only_as_listed(
    method: str, tmp_path: Path
) -> None:
    """Imports of the user's make loggers, hooks and handlers, and must find them as ever."""
    fresh, worker = states(tmp_path, "itself", method)
    assert fresh.keys() == worker.keys()

    found = {}
    for item, value in fresh.items():
        here, there = as_list(value), as_list(worker[item])
        minus, plus = [*here], [*there]
        for one in here:
            if one in plus:
                plus.remove(one)
                minus.remove(one)
        if here != there:
            found[item] = (minus, plus)

    names = {"METHOD": method, "MACHINE": str(fresh["os.cpu_count"])}
    assert found == {
        item: ([names.get(one, one) for one in minus], [names.get(one, one) for one in plus])
        for item, (_, minus, plus) in (DIFFERENCES | OF_THE_METHOD[method]).items()
    }
