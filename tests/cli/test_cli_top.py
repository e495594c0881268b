"""``safepool top``: what workers do, read from outside the pool."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, NoReturn

import pytest
import support_schemas
import support_tasks as tasks
from support_processes import wait_until

from safepool import ProcessPool
from safepool.cli import main, top
from safepool.cli.top import Row, TopError, as_text, read

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

HERE = os.getpid()
_NOBODY = 65534


@pytest.fixture
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(1) as made:
        yield made


def shown() -> list[tuple[int, str | None]]:
    return [(row.pid, row.task) for row in read(os.getpid())]


def test_each_way_to_run_a_task_is_seen(pool: ProcessPool, tmp_path: Path) -> None:
    """Idle, alone, in a batch, as a partial, idle again."""
    worker = pool.submit(tasks.pid).result()
    wait_until(lambda: shown() == [(worker, None)])
    calls = {
        "submit": lambda go: pool.submit(tasks.wait_for, go),
        "map": lambda go: pool.map(tasks.wait_for, [go] * 3, chunksize=3),
        "partial": lambda go: pool.submit(functools.partial(tasks.wait_for, go)),
    }
    for name, call in calls.items():
        go = tmp_path / name
        found = call(str(go))
        wait_until(lambda: shown() == [(worker, "support_tasks.wait_for")])
        (row,) = read(HERE)
        assert row.running_s is not None
        assert 0 <= row.running_s < 600
        assert row.native_threads >= 1
        assert (row.resident_bytes or 0) > 1 << 20
        go.touch()
        list(found) if name == "map" else found.result()
        wait_until(lambda: shown() == [(worker, None)])


def test_an_initializer_that_hangs_is_seen(tmp_path: Path) -> None:
    go = tmp_path / "go"
    with ProcessPool(1, initializer=tasks.wait_for, initargs=(str(go),)) as pool:
        future = pool.submit(tasks.pid)
        wait_until(lambda: [task for _, task in shown()] == ["support_tasks.wait_for"])
        go.touch()
        future.result()


def test_what_is_printed_once_and_for_programs(
    pool: ProcessPool, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = pool.submit(tasks.pid).result()
    wait_until(lambda: shown() == [(worker, None)])

    assert main(["top", str(HERE)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"process {HERE}: 1 worker\n")
    assert out.count("\n") == 4
    assert "\x1b" not in out

    assert main(["top", "--json", str(HERE)]) == 0
    told = json.loads(capsys.readouterr().out)
    support_schemas.check("top", told)
    assert list(told) == ["schema", "pid", "workers"]
    (row,) = told["workers"]
    assert (row["pid"], row["task"], row["running_s"]) == (worker, None, None)


def test_on_a_terminal_it_is_drawn_until_the_user_has_seen_enough(
    pool: ProcessPool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.submit(tasks.pid).result()
    rounds = iter([None, None])

    def sleep(_seconds: float) -> None:
        if next(rounds, 0) == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(top.time, "sleep", sleep)

    assert main(["top", str(HERE)]) == 130
    assert capsys.readouterr().out.count("\x1b[H\x1b[Jprocess ") == 3


@pytest.mark.unit
def test_a_row_fits_the_screen_and_writes_nothing_to_the_terminal() -> None:
    rows = [
        Row(1, "a" * 100 + ".\x1b[2J\u2192" + "end", 1.25, 5 << 20, 3),
        Row(4194304, None, None, None, 1000),
        Row(7, "m.f", 1e7, 900 << 30, 12),
    ]
    lines = as_text(9, rows).split("\n")

    assert [line for line in lines if len(line) > 80 or not (line + " ").isprintable()] == []
    assert lines[3].endswith("end")
    assert lines[4].endswith("  (idle)")


@pytest.fixture
def stranger() -> Iterator[int]:
    """A process without a pool."""
    command = [sys.executable, "-I", "-S", "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        yield process.pid


def test_a_process_without_a_pool_is_an_error_with_the_remedy(
    stranger: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", str(stranger)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "Pass the process that has made the pool" in err


def test_no_process_and_a_worker_itself_are_errors(pool: ProcessPool) -> None:
    assert read(pool.submit(tasks.pid).result()) == []
    with subprocess.Popen(["true"]) as process:
        process.wait()
    with pytest.raises(TopError, match=r"^there is no process \d+\. Pass"):
        read(process.pid)


def test_a_process_of_another_user_is_refused(
    stranger: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top, "_owner", lambda process: 12345 if process == "self" else 0)

    with pytest.raises(TopError, match=r"belongs to user .* sudo -u '#"):
        read(stranger)


def _read_as_nobody(pid: int) -> str:
    os.seteuid(_NOBODY)
    try:
        return f"{top.boards_of(pid)}"
    except OSError as error:
        return type(error).__name__
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="takes root to be another user")
def test_the_kernel_shows_the_boards_to_no_other_user(pool: ProcessPool) -> None:
    """Even one that does not ask who it is."""
    assert pool.submit(_read_as_nobody, HERE).result() == "PermissionError"


def test_it_ends_when_the_process_has(
    pool: ProcessPool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.submit(tasks.pid).result()

    def leave(_pid: int) -> NoReturn:
        raise TopError("there is no process 9")

    def sleep(_seconds: float) -> None:
        monkeypatch.setattr(top, "read", leave)

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(top.time, "sleep", sleep)

    assert main(["top", str(HERE)]) == 0
    assert capsys.readouterr().out.endswith("there is no process 9\n")
