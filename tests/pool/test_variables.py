"""Variables of each worker alone: ``env=`` as a function of its place, and ``gpus=``."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import support_tasks as tasks
from support_processes import wait_until

import safepool
from safepool import ProcessPool, machine
from safepool.limits import gpus as files
from safepool.limits.gpus import parse_visible, read_gpus
from safepool.pool.shell import variables
from safepool.pool.shell.variables import Variables, devices_of

if TYPE_CHECKING:
    from pathlib import Path

METHODS = [None, "loky", "spawn"] + ["forkserver", "fork"] * (sys.platform != "win32")
SECRET = f"secret-{os.getpid()}"
VISIBLE = ("HIP", "CUDA", "ROCR")


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VISIBLE:
        monkeypatch.delenv(f"{name}_VISIBLE_DEVICES", raising=False)


def own(path: str) -> tuple[int | None, str | None, str | None]:
    tasks.wait_for(path)
    return safepool.worker_index(), os.environ.get("PORT"), os.environ.get("CUDA_VISIBLE_DEVICES")


def ask_all(pool: Any, gate: Path) -> list[tuple[int | None, str | None, str | None]]:
    """Return what each worker of a pool has, in the order of their places."""
    gate.unlink(missing_ok=True)
    futures = [pool.submit(own, str(gate)) for _ in range(pool.size)]
    wait_until(lambda: sum(one.state == "busy" for one in pool.workers()) == pool.size)
    gate.touch()
    return sorted(future.result(timeout=60) for future in futures)


def command_lines() -> str:
    """Return the command lines of all processes that can be seen here."""
    found = []
    for pid in os.listdir("/proc") if sys.platform == "linux" else ():
        try:
            with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
                found.append(file.read())
        except OSError:
            pass
    return "\n".join(found)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:.*fork")
def test_each_worker_has_its_own(
    method: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody can read it in a command line."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,MIG-7")
    before = dict(os.environ)

    def env(index: int) -> dict[str, str]:
        return {"PORT": str(9000 + index), "TOKEN": SECRET}

    with ProcessPool(2, method, env=env, gpus="auto") as pool:
        assert ask_all(pool, tmp_path / "gate") == [(0, "9000", "3"), (1, "9001", "MIG-7")]
        assert sorted(worker.index for worker in pool.workers()) == [0, 1]
        assert SECRET not in command_lines()
    with ProcessPool(1, method, env={"PORT": SECRET}) as pool:
        assert pool.submit(os.getenv, "PORT").result(timeout=60) == SECRET
        assert SECRET not in command_lines()
    assert dict(os.environ) == before


def test_a_further_worker_and_one_in_the_place_of_another(tmp_path: Path) -> None:
    """The function is called in the program, in the thread that says how many there may be."""
    asked: list[tuple[int, str]] = []

    def env(index: int) -> dict[str, str]:
        asked.append((index, threading.current_thread().name))
        return {"PORT": str(index)}

    here = threading.current_thread().name
    with safepool.Pool(1, env=env, maxtasksperchild=1) as ours:
        assert [ours.apply(os.getenv, ["PORT"]) for _ in range(2)] == ["0", "0"]
    with ProcessPool(1, env=env) as pool:
        assert ask_all(pool, tmp_path / "gate")[0][1] == "0"
        pool.resize(2)
        assert [port for _, port, _ in ask_all(pool, tmp_path / "gate")] == ["0", "1"]
    assert asked == [(0, here), (0, here), (1, here)]


@pytest.mark.skipif(sys.platform != "linux", reason="there is no server of ours")
def test_a_library_that_has_read_the_variable_reads_it_again(tmp_path: Path) -> None:
    """It was imported ahead, when no worker had its own: then each has a server of its own."""
    (tmp_path / "reads_port.py").write_text("import os\nPORT = os.environ.get('PORT')\n")
    sys.path.insert(0, str(tmp_path))
    try:
        with ProcessPool(2, env=lambda i: {"PORT": str(i)}, preload=["reads_port"]) as pool:
            futures = [pool.submit(port_read, str(tmp_path / "gate")) for _ in range(2)]
            wait_until(lambda: sum(one.state == "busy" for one in pool.workers()) == 2)
            (tmp_path / "gate").touch()
            found = sorted(future.result(timeout=60) for future in futures)
    finally:
        sys.path.remove(str(tmp_path))
    assert found == [(0, "0"), (1, "1")]


def port_read(path: str) -> tuple[int | None, str | None]:
    import reads_port  # type: ignore[import-not-found]

    tasks.wait_for(path)
    return safepool.worker_index(), reads_port.PORT


def test_native_threads_follow_a_workers_own_variable() -> None:
    with ProcessPool(1, env=lambda _: {"OMP_NUM_THREADS": "2"}) as pool:
        assert pool.submit(os.getenv, "OMP_NUM_THREADS").result(timeout=60) == "2"
        pools = pool.submit(tasks.native_pools, "numpy").result(timeout=60)
    assert {count for name, count in pools if name == "openmp"} <= {2}


# One row per function that returns what no worker can have: what is raised.
WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "a number": (lambda i: {"A": i}, TypeError, r"env\(0\) must be a mapping .*\{'A': 0\} \(dict"),
    "nothing": (
        lambda _: None,
        TypeError,
        r"env\(0\) must be a mapping of text to text, not None",
    ),
    "another": (lambda i: 7 if i else {}, TypeError, r"env\(1\) must be .*not 7 \(int"),
    "no name": (lambda _: {"A=B": "1"}, ValueError, r"env\(0\) must be a mapping of variables"),
    "raises": (lambda _: {}["x"], KeyError, "x"),
    "takes none": (os.getcwd, TypeError, "takes no arguments"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_names_the_argument_and_the_worker(case: str) -> None:
    env, error, words = WRONG[case]
    with pytest.raises(error, match=words) as caught:
        ProcessPool(2, env=env)
    if not str(caught.value).startswith("env("):
        assert caught.value.__notes__ == [
            "raised by env(0), the function that returns a worker's variables"
        ]


def test_what_the_function_says_wins_over_a_device() -> None:
    found = Variables({"CUDA_VISIBLE_DEVICES": ("4", "5")}, lambda i: {"PORT": str(i)})
    assert found.of(3) == {"CUDA_VISIBLE_DEVICES": "5", "PORT": "3"}
    both = Variables({"CUDA_VISIBLE_DEVICES": ("4",)}, lambda _: {"CUDA_VISIBLE_DEVICES": ""})
    assert both.of(0) == {"CUDA_VISIBLE_DEVICES": ""}
    with ProcessPool(1, gpus=[4], env={"CUDA_VISIBLE_DEVICES": "9"}) as pool:
        assert pool.submit(os.getenv, "CUDA_VISIBLE_DEVICES").result(timeout=60) == "9"


# One row per machine: its variables and files, and what gpus="auto" spreads.
AUTO: dict[str, tuple[dict[str, str], tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "nothing": ({}, (), {}),
    "a variable": ({"CUDA_VISIBLE_DEVICES": "2,3"}, (), {"CUDA_VISIBLE_DEVICES": ("2", "3")}),
    "a variable and files": (
        {"CUDA_VISIBLE_DEVICES": "2"},
        ("dev/nvidia0", "dev/nvidia1"),
        {"CUDA_VISIBLE_DEVICES": ("2",)},
    ),
    "a variable that says none": ({"CUDA_VISIBLE_DEVICES": ""}, ("dev/nvidia0",), {}),
    "a variable that ends early": (
        {"CUDA_VISIBLE_DEVICES": " 1 ,-1,2"},
        (),
        {"CUDA_VISIBLE_DEVICES": ("1",)},
    ),
    "parts of devices": (
        {"CUDA_VISIBLE_DEVICES": "MIG-a1,MIG-GPU-b/1/0,GPU-c"},
        (),
        {"CUDA_VISIBLE_DEVICES": ("MIG-a1", "MIG-GPU-b/1/0", "GPU-c")},
    ),
    "AMD": ({"HIP_VISIBLE_DEVICES": "0,1"}, (), {"HIP_VISIBLE_DEVICES": ("0", "1")}),
    "AMD by ROCr": ({"ROCR_VISIBLE_DEVICES": "0,1"}, (), {"ROCR_VISIBLE_DEVICES": ("0", "1")}),
    "HIP counts what ROCr leaves": (
        {"ROCR_VISIBLE_DEVICES": "4,5", "HIP_VISIBLE_DEVICES": "0,1"},
        (),
        {"HIP_VISIBLE_DEVICES": ("0", "1")},
    ),
    "both": (
        {"CUDA_VISIBLE_DEVICES": "1,2", "HIP_VISIBLE_DEVICES": "1,2"},
        (),
        {"CUDA_VISIBLE_DEVICES": ("1", "2"), "HIP_VISIBLE_DEVICES": ("1", "2")},
    ),
    "files of a container": (
        {},
        ("dev/nvidia2", "dev/nvidia3", "dev/nvidiactl", "dev/nvidia-uvm", "dev/null"),
        {"CUDA_VISIBLE_DEVICES": ("0", "1")},
    ),
    "the driver's folder": (
        {},
        ("dev/null", "proc/driver/nvidia/gpus/0000:01:00.0"),
        {"CUDA_VISIBLE_DEVICES": ("0",)},
    ),
}


@pytest.fixture
def machine_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(environ: dict[str, str], paths: tuple[str, ...]) -> None:
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch()
        for name, text in environ.items():
            monkeypatch.setenv(name, text)
        monkeypatch.setattr(
            variables, "read_gpus", lambda environ: read_gpus(environ, str(tmp_path))
        )

    return make


@pytest.mark.parametrize("case", AUTO)
@pytest.mark.filterwarnings("ignore:gpus=")
def test_auto_is_what_the_program_may_use(case: str, machine_of: Any) -> None:
    environ, paths, expected = AUTO[case]
    machine_of(environ, paths)

    assert devices_of("auto") == expected


def test_where_there_is_none_auto_says_so(
    machine_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_of({}, ())
    monkeypatch.setattr(machine, "_told", set())
    with pytest.warns(RuntimeWarning, match='gpus="auto" finds no GPU in /dev/nvidia'):
        assert devices_of("auto") == {}


def test_a_number_and_a_list(machine_of: Any) -> None:
    machine_of({}, ())
    assert devices_of(2) == devices_of(["0", 1]) == {"CUDA_VISIBLE_DEVICES": ("0", "1")}
    assert len(devices_of(10**12)["CUDA_VISIBLE_DEVICES"]) == 4096  # and not as many as are said
    assert devices_of(["0,1", "MIG-a"]) == {"CUDA_VISIBLE_DEVICES": ("0,1", "MIG-a")}
    machine_of({}, ("dev/kfd",))
    assert devices_of([1]) == {"HIP_VISIBLE_DEVICES": ("1",)}
    machine_of({"ROCR_VISIBLE_DEVICES": "6,7,8"}, ())
    assert devices_of(2) == {"ROCR_VISIBLE_DEVICES": ("6", "7")}
    with pytest.raises(ValueError, match=r"^gpus must be at most 3, .*ROCR_VISIBLE_DEVICES='6,7"):
        devices_of(4)
    machine_of({"ROCR_VISIBLE_DEVICES": ""}, ())
    with pytest.raises(ValueError, match="gpus must be at most 0"):
        devices_of(1)


def test_what_is_no_device_ends_the_list() -> None:
    assert parse_visible("all") == parse_visible("NoDevFiles") == parse_visible("") == ()
    assert files.parse_visible("0,,1") == ("0",)
