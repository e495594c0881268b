"""``parallel_backend(progress=)``: a bar for each ``Parallel`` call, and nothing else of it."""

from __future__ import annotations

import gc
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import support_tasks as tasks
from joblib import Parallel, delayed, parallel_config
from support_cgroups import control_group

import safepool
from safepool import MissingExtraError, WorkerDiedError, joblib_pools

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytest.importorskip("tqdm")

Shown = pytest.CaptureFixture[str]


def bars(err: str) -> list[str]:
    """Return each bar as it was left on the screen."""
    lines = [line for line in err.split("\n") if line.strip("\r ")]
    return [[part for part in line.split("\r") if part.strip()][-1] for line in lines]


def calls(count: int) -> Iterator[Any]:
    return (delayed(abs)(-n) for n in range(count))


# One row per kind of call: what is asked of ``Parallel``, the calls, and how the bar ends.
CALLS: dict[str, tuple[dict[str, Any], Callable[[], Any], str]] = {
    "a list": ({}, lambda: list(calls(30)), "| 30/30 ["),
    "unknown length": ({}, lambda: calls(300), "| 300/300 ["),
    "batches": ({"batch_size": 7}, lambda: calls(50), "| 50/50 ["),
    "all at once": ({"pre_dispatch": "all"}, lambda: calls(50), "| 50/50 ["),
    "sequential": ({"n_jobs": 1}, lambda: calls(50), "| 50/50 ["),
    "sequential, a list": ({"n_jobs": 1}, lambda: list(calls(5)), "| 5/5 ["),
    "sequential, batches": ({"n_jobs": 1, "batch_size": 3}, lambda: calls(50), "| 50/50 ["),
    "nothing": ({}, list, "0call ["),
    "an empty generator": ({}, lambda: iter(()), "0call ["),
    "sequential, nothing": ({"n_jobs": 1}, lambda: iter(()), "0call ["),
}


@pytest.mark.parametrize("return_as", ["list", "generator", "generator_unordered"])
@pytest.mark.parametrize("kind", CALLS)
def test_the_bar_ends_with_all_calls(kind: str, return_as: str, capsys: Shown) -> None:
    options, given, expected = CALLS[kind]
    with safepool.parallel_backend(2, progress=True):
        results = list(Parallel(return_as=return_as, **options)(given()))

    out, err = capsys.readouterr()
    assert out == ""
    assert sorted(results) == list(range(len(list(given()))))
    (bar,) = bars(err)
    assert expected in bar


def test_the_total_is_known_before_the_last_call_has_ended(capsys: Shown) -> None:
    """As soon as the iterator is."""
    with safepool.parallel_backend(2, progress="naps"):
        Parallel(pre_dispatch="all", batch_size=1)(delayed(time.sleep)(0.2) for _ in range(6))
        Parallel(pre_dispatch=8, batch_size=1)(delayed(time.sleep)(0.2) for _ in range(6))

    shown = capsys.readouterr().err.split("\n")
    for line in shown[:2]:
        assert re.search(r"\rnaps: .*\| [2-5]/6 \[", line)


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_each_call_has_a_bar_that_is_gone_when_it_returns(n_jobs: int, capsys: Shown) -> None:
    with parallel_config(backend="safepool", n_jobs=n_jobs, progress="one"):
        Parallel()(calls(3))
        with Parallel() as parallel:
            for count in (4, 5):
                parallel(calls(count))
                print("after", file=sys.stderr)
            parallel(calls(6))
    joblib_pools.SHARED.close(end=True)

    one, two, after, three, again, four = bars(capsys.readouterr().err)
    assert (after, again) == ("after", "after")
    for count, bar in zip((3, 4, 5, 6), (one, two, three, four), strict=True):
        assert bar.startswith("one: 100%")
        assert f" {count}/{count} " in bar


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_call_that_fails_is_told(n_jobs: int, capsys: Shown) -> None:
    with (
        safepool.parallel_backend(2, progress=True),
        pytest.raises(ValueError, match="'x'"),
    ):
        Parallel(n_jobs=n_jobs, batch_size=1)(delayed(int)(text) for text in ["1", "2", "x"])

    (bar,) = bars(capsys.readouterr().err)
    assert "failed=1" in bar
    # In workers it may fail before the others have ended.
    assert re.search(r"\b3call|\b[123]/3" if n_jobs == 1 else r"\b[123](call|/3)", bar)


def test_an_error_of_the_items_is_no_failed_call(capsys: Shown) -> None:
    def broken() -> Iterator[Any]:
        yield delayed(abs)(-1)
        raise LookupError("no more")

    for n_jobs in (1, 2):
        with safepool.parallel_backend(2, progress=True), pytest.raises(LookupError):
            Parallel(n_jobs=n_jobs)(broken())

    assert "failed" not in capsys.readouterr().err


def test_a_death_counts_as_a_failure(capsys: Shown) -> None:
    with safepool.parallel_backend(2, progress=True), pytest.raises(WorkerDiedError):
        Parallel()([delayed(tasks.be_killed)()])

    assert "failed=1" in bars(capsys.readouterr().err)[0]


def die_once(path: str) -> str:
    if not os.path.exists(path):
        Path(path).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return path


def test_a_call_that_is_run_again_counts_once(capsys: Shown, tmp_path: Path) -> None:
    paths = [str(tmp_path / str(number)) for number in range(3)]
    with safepool.parallel_backend(2, retries=1, progress=True):
        assert Parallel(batch_size=1)(delayed(die_once)(path) for path in paths) == paths

    (bar,) = bars(capsys.readouterr().err)
    assert " 3/3 " in bar
    assert "failed" not in bar


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_the_bar_goes_when_the_results_are_dropped(n_jobs: int, capsys: Shown) -> None:
    """The harness would find its thread."""
    with safepool.parallel_backend(2, progress=True):
        results = Parallel(n_jobs, return_as="generator")(delayed(abs)(n) for n in range(10**6))
        assert next(results) == 0
        told = pytest.warns(UserWarning, match="input task iterator")
        with told if n_jobs == 2 else nullcontext():
            del results
            gc.collect()
        assert not [t for t in threading.enumerate() if t.name == "safepool-progress"]

    (bar,) = bars(capsys.readouterr().err)
    assert "failed" not in bar


def nested(n: int) -> int:
    return sum(Parallel(n_jobs=2)(delayed(abs)(-m) for m in range(n)))


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_call_inside_of_another_has_none(n_jobs: int, capfd: Shown) -> None:
    """Neither in a worker nor in this process."""
    with safepool.parallel_backend(2, progress=True):
        assert Parallel(n_jobs=n_jobs)(delayed(nested)(n) for n in range(4)) == [0, 0, 1, 3]

    (bar,) = bars(capfd.readouterr().err)
    assert " 4/4 " in bar


def test_generators_that_are_taken_in_turns_have_one_each(capsys: Shown) -> None:
    """What one call has done, or that it ended, is nothing to another of the block."""
    with safepool.parallel_backend(2, progress=True):
        short = Parallel(return_as="generator", pre_dispatch=2, batch_size=1)(calls(5))
        long = Parallel(return_as="generator", pre_dispatch=2, batch_size=1)(
            delayed(tasks.sleep_and_return)(0.02, n) for n in range(30)
        )
        assert next(long) == 0
        assert list(short) == [0, 1, 2, 3, 4]
        assert list(long) == [*range(1, 30)]

    shown = capsys.readouterr().err
    assert " 5/5 " in shown
    assert " 30/30 " in shown


def test_an_error_in_one_generator_leaves_the_other_alone() -> None:
    """Its batches are not those that the error ends."""
    with safepool.parallel_backend(2):
        long = Parallel(return_as="generator", batch_size=1)(
            delayed(tasks.sleep_and_return)(0.05, n) for n in range(10)
        )
        with pytest.raises(ValueError, match="broken on purpose"):
            Parallel()([delayed(tasks.raise_value_error)()])
        assert list(long) == [*range(10)]


def test_calls_of_several_threads_have_one_each(capsys: Shown) -> None:
    def call() -> None:
        with safepool.parallel_backend(2, progress=True):
            Parallel()(delayed(time.sleep)(0.01) for _ in range(40))

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert len(re.findall(r"\| 40/40 \[[^\r]*\r?(?:\n|\x1b|$)", capsys.readouterr().err)) >= 3


# One row per way to ask for bars.
WAYS: dict[str, Callable[[], Any]] = {
    "block": lambda: safepool.parallel_backend(2, progress=True).__enter__(),
    "name": lambda: parallel_config(backend="safepool", n_jobs=2, progress=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_without_tqdm_the_remedy_is_named_at_the_block(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(MissingExtraError) as caught:
        WAYS[way]()

    assert str(caught.value) == (
        "tqdm is not installed. Install it with: pip install 'safepool[progress]'"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_where_one_worker_fits_there_is_a_bar() -> None:
    code = (
        "import sys, safepool\n"
        "from joblib import Parallel, delayed\n"
        "sys.stderr = sys.stdout\n"
        "with safepool.parallel_backend(progress=True):\n"
        "    Parallel()(delayed(abs)(n) for n in range(7))\n"
    )
    with control_group(cpus=1) as group:
        assert " 7/7 " in group.run(code)


# What a terminal shows of what was written to it, as far as tqdm and logging write.
def screen(written: str) -> list[str]:
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.|\n", written):
        if part == "\n":
            row, column = row + 1, 0
        elif part == "\r":
            column = 0
        elif part == "\x1b[A":
            row -= 1
        elif part[0] != "\x1b":
            rows[row] = rows[row].ljust(column)[:column] + part + rows[row][column + 1 :]
            column += 1
        rows += [""] * (row + 1 - len(rows))
    return [line.rstrip() for line in rows]


def in_a_terminal(code: str, interrupt_after: str = "") -> tuple[list[str], int]:
    """Return what a program leaves on its terminal, and its exit code."""
    main, other = pty.openpty()
    termios.tcsetwinsize(other, (24, 80))
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=other,
        stdout=other,
        stderr=other,
        start_new_session=True,
    ) as program:
        os.close(other)
        written = b""
        try:
            while True:
                try:
                    part = os.read(main, 65536)
                except OSError:  # the last one that had it open is gone
                    break
                if not part:
                    break
                written += part
                if interrupt_after and interrupt_after.encode() in written:
                    # As the terminal does: to everyone in the group of processes.
                    os.killpg(program.pid, signal.SIGINT)
                    interrupt_after = ""
            program.wait(60)
        finally:
            program.kill()
            os.close(main)
    return screen(written.decode().replace("\r\n", "\n")), program.returncode


LOGGING = (
    "import logging, os, signal, sys, time, safepool\n"
    "from joblib import Parallel, delayed\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "logging.basicConfig(format='%(message)s')\n"
    "def work(number):\n"
    "    logging.warning('line %d of a worker', number)\n"
    "    time.sleep(0.05)\n"
    "def nap(number):\n"
    "    logging.warning('napping')\n"
    "    time.sleep(60)\n"
)


def test_logs_of_workers_do_not_tear_it() -> None:
    code = LOGGING + (
        "with safepool.parallel_backend(2, progress='work'):\n"
        "    Parallel()(delayed(work)(n) for n in range(20))\n"
        "print('after')\n"
    )
    rows, exitcode = in_a_terminal(code)

    assert exitcode == 0
    assert sorted(row for row in rows if row.startswith("line")) == sorted(
        f"line {n} of a worker" for n in range(20)
    )
    # Nothing else than the bar, once, and what was printed after it.
    bar, after, end = [row for row in rows if not row.startswith("line")]
    assert bar.startswith("work: 100%")
    assert " 20/20 " in bar
    assert (after, end) == ("after", "")


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_ctrl_c_leaves_the_terminal_clean(n_jobs: int) -> None:
    code = LOGGING + (
        f"with safepool.parallel_backend(2, progress='work'):\n"
        f"    Parallel({n_jobs}, batch_size=1)(delayed(nap)(n) for n in range(20))\n"
    )
    rows, exitcode = in_a_terminal(code, interrupt_after="napping")

    assert exitcode == -signal.SIGINT
    assert rows[-2:] == ["KeyboardInterrupt", ""]
    begin = rows.index("Traceback (most recent call last):")
    assert not [row for row in rows[begin + 1 :] if "work:" in row or "Traceback" in row]
    assert [row for row in rows[:begin] if row.startswith("work:")]
