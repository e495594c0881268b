"""``map(progress=)``: the numbers on the bar, where it is drawn, and that it goes."""

from __future__ import annotations

import gc
import logging
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import support_tasks as support

import safepool
from safepool import MissingExtraError, ProcessPool, WorkerDiedError
from safepool.progress import Progress, beside_bars

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytest.importorskip("tqdm")

REPOSITORY = Path(safepool.__file__).parent.parent


def endless() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


def last_of(err: str) -> str:
    """Return the bar as it was left on the screen."""
    return [part for part in re.split(r"[\r\n]", err) if part.strip()][-1]


# One row per kind of items: what is given to ``map``, and how the bar ends.
ITEMS: dict[str, tuple[Callable[[], object], str]] = {
    "a list": (lambda: [1, 2, 3], "| 3/3 ["),
    "a generator": (lambda: (n for n in range(5)), "| 5/5 ["),
    "a long generator": (lambda: (n for n in range(20_000)), "| 20000/20000 ["),
    "nothing": (list, "0call ["),
    "an empty generator": (lambda: iter(()), "0call ["),
}


@pytest.mark.parametrize("kind", ITEMS)
def test_the_bar_ends_with_all_calls(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    items, expected = ITEMS[kind]
    with ProcessPool(1) as pool:
        results = list(pool.map(abs, items(), progress=True))  # type: ignore[call-overload]

    out, err = capsys.readouterr()
    assert out == ""
    assert len(results) == len(list(items()))  # type: ignore[call-overload]
    assert expected in last_of(err)


def test_the_shortest_of_several_iterables_counts(capsys: pytest.CaptureFixture[str]) -> None:
    with ProcessPool(1) as pool:
        assert list(pool.map(pow, [2, 3, 4], [1, 2], progress="powers")) == [2, 9]

    last = last_of(capsys.readouterr().err)
    assert last.startswith("powers: 100%")
    assert " 2/2 " in last


def test_chunks_are_counted_by_their_calls(capsys: pytest.CaptureFixture[str]) -> None:
    with ProcessPool(2) as pool:
        list(pool.map(abs, range(100), chunksize=7, progress=True))

    assert " 100/100 " in last_of(capsys.readouterr().err)


def test_a_call_that_fails_has_ended_and_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with ProcessPool(1) as pool:
        results = pool.map(int, ["1", "x", "3"], progress=True)
        assert next(results) == 1
        with pytest.raises(ValueError, match="'x'"):
            next(results)

    last = last_of(capsys.readouterr().err)
    assert " 3/3 " in last or " 2/3 " in last
    assert "failed=1" in last


def die_once(path: str) -> str:
    """Kill the worker unless the file is there."""
    import os
    import signal

    if not os.path.exists(path):
        Path(path).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return path


def test_a_call_that_is_run_again_counts_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    paths = [str(tmp_path / str(number)) for number in range(3)]
    with ProcessPool(1, retries=1) as pool:
        assert list(pool.map(die_once, paths, progress=True)) == paths

    last = last_of(capsys.readouterr().err)
    assert " 3/3 " in last
    assert "failed" not in last


def be_killed(_: int) -> None:
    support.be_killed()


def test_a_death_counts_as_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    with ProcessPool(1) as pool, pytest.raises(WorkerDiedError):
        list(pool.map(be_killed, [1], progress=True))

    assert "failed=1" in last_of(capsys.readouterr().err)


def test_the_bar_goes_when_the_results_are_dropped() -> None:
    """The harness would find its thread."""
    with ProcessPool(1) as pool:
        results = pool.map(abs, endless(), progress=True)
        assert next(results) == 0
        del results
        unseen = pool.map(time.sleep, [0.3] * 3, progress=True)
        del unseen
        gc.collect()


def test_without_tqdm_nothing_is_queued_and_the_remedy_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    items = iter([1])
    with ProcessPool(1) as pool, pytest.raises(MissingExtraError) as caught:
        pool.map(abs, items, progress=True)

    assert str(caught.value) == (
        "tqdm is not installed. Install it with: pip install 'safepool[progress]'"
    )
    assert list(items) == [1]


def test_tqdm_is_imported_only_for_a_bar() -> None:
    code = (
        "import sys, safepool\n"
        "with safepool.ProcessPool(1) as pool: list(pool.map(abs, [1]))\n"
        "print('tqdm' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=60,
        check=True,
    )

    assert (done.stdout, done.stderr) == ("False\n", "")


def log_it(number: int) -> int:
    logging.getLogger("test.progress").error("line %d", number)
    time.sleep(0.05)
    return number


def test_a_workers_log_stands_in_lines_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("test.progress")
    logger.addHandler(handler)
    try:
        with ProcessPool(1) as pool:
            list(pool.map(log_it, range(8), progress=True))
    finally:
        logger.removeHandler(handler)

    lines = re.split(r"[\r\n]", capsys.readouterr().err)
    for number in range(8):
        assert f"line {number}" in lines


def test_the_program_ends_with_the_last_numbers() -> None:
    """Also if nobody asks for the end of the results, as ``zip`` does not of its second."""
    program = """
import safepool

with safepool.ProcessPool(1) as pool:
    results = pool.map(abs, range(3), progress=True)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )

    assert " 3/3 " in last_of(done.stderr)
    assert done.stderr.endswith("\n")


def test_what_the_pool_logs_stands_in_lines_of_its_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Of a worker that has died, while the bar is on the screen."""
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("safepool")
    logger.addHandler(handler)
    paths = [str(tmp_path / str(number)) for number in range(2)]
    try:
        with ProcessPool(1, retries=1) as pool:
            assert list(pool.map(die_once, paths, progress=True)) == paths
    finally:
        logger.removeHandler(handler)

    lines = re.split(r"[\r\n]", capsys.readouterr().err)
    told = [line for line in lines if "which is run again" in line]
    assert len(told) == 2
    for line in told:
        assert line.startswith("worker ")


def test_a_bar_of_ones_own_counts_until_it_is_closed(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("fits", 4) as progress:
        progress.done += 3
        progress.failed += 1
        with beside_bars():
            print("beside", file=sys.stderr)
    progress.close()

    err = capsys.readouterr().err
    assert "beside" in re.split(r"[\r\n]", err)
    assert last_of(err).startswith("fits:  75%")
    assert "3/4" in last_of(err)
    assert "failed=1" in last_of(err)


def test_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar begins before its length is known, keeps its time, and is red after a failure."""
    pytest.importorskip("ipywidgets", reason="pip install 'safepool[foreign]'")
    from tqdm.notebook import tqdm

    made = []

    class Kept(tqdm):  # type: ignore[misc, type-arg]
        def __init__(self, **options: object) -> None:
            super().__init__(display=False, **options)
            made.append(self)

    monkeypatch.setattr("safepool.progress.require_tqdm", lambda: Kept)
    with Progress("fits") as progress:
        time.sleep(0.3)
        progress.total, progress.done = 4, 4
    with Progress("fits") as progress:
        progress.failed = progress.done = 1

    good, bad = (bar.container.children for bar in made)
    assert (good[1].value, good[1].max, good[1].bar_style) == (4, 4, "success")
    assert made[0].format_dict["elapsed"] >= 0.3
    assert bad[1].bar_style == "danger"


# One row per standard error that cannot be written to: how the shell makes it.
UNWRITABLE = {"full": "2>/dev/full", "closed": "2>&-", "a pipe that nobody reads": "2>&1 | true"}


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
@pytest.mark.parametrize("what", UNWRITABLE)
def test_a_bar_that_cannot_be_drawn_holds_up_nothing(what: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import safepool\n"
        "from joblib import Parallel, delayed\n"
        "with safepool.ProcessPool(1) as pool:\n"
        "    for _ in range(3):\n"
        "        results = list(pool.map(abs, [-1] * 30, progress=True))\n"
        "with safepool.parallel_backend(progress=True):\n"
        "    results += Parallel(n_jobs=1)(delayed(abs)(n) for n in range(3))\n"
        f"open({str(tmp_path / 'done')!r}, 'w').write(str(len(results)))\n"
    )
    # Buffered: what cannot be written stays there, and is tried again with every flush.
    line = f"env -u PYTHONUNBUFFERED {sys.executable} {script} {UNWRITABLE[what]}"

    subprocess.run(["sh", "-c", line], timeout=60, check=False)

    assert (tmp_path / "done").read_text() == "33"


@pytest.mark.parametrize("odd", [1, 0, b"bytes", ["label"]])
def test_what_is_no_label_is_refused(odd: object) -> None:
    with ProcessPool(1) as pool, pytest.raises(TypeError, match="True, False or a label"):
        pool.map(abs, [1], progress=odd)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="True, False or a label"):
        safepool.parallel_backend(progress=odd).__enter__()  # type: ignore[arg-type]
    with ProcessPool(1) as pool:  # and no lock of tqdm's is left taken
        assert list(pool.map(abs, [-1], progress="")) == [1]


def test_a_label_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with ProcessPool(1) as pool:
        list(pool.map(abs, [-1], progress="two\nlines"))

    assert "two lines: 100%" in last_of(capsys.readouterr().err)
