"""The demo's words: each sentence belongs to what was measured, and claims no more."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import support_schemas

from safepool.cli.demo import compare
from safepool.cli.demo_report import Comparison, Half, Report
from safepool.limits import Limit, Throttling

FOLDER = Path(__file__).parent / "demo_screens"

STANDARD = Half(
    pool="ProcessPoolExecutor()",
    start_method="fork",
    workers=2,
    threads=6,
    seconds=9.0,
    tasks_done=192,
    throttling=Throttling(
        periods=90, throttled_periods=88, throttled_us=4_200_000, source="cpu.stat"
    ),
)
SAFEPOOL = replace(STANDARD, pool="safepool.ProcessPool()", workers=1, threads=1, seconds=0.6)
CUT_OFF = replace(STANDARD, seconds=20.0, tasks_done=37, cut_off=True)
FAILED = replace(STANDARD, seconds=None, tasks_done=0, error="RuntimeError: can't start")
EQUAL = Comparison(compared=192, equal=True, largest_difference=4e-16)

# One row per outcome: the two halves, what was compared, the CPUs, and then the exit that it
# means (failed or not), whether there was nothing to win, and what the sentence must say.
OUTCOMES: dict[str, tuple[Half, Half, Comparison, float, bool, bool, list[str]]] = {
    "oversubscribed": (
        STANDARD,
        SAFEPOOL,
        EQUAL,
        1.0,
        False,
        False,
        ["On 1 CPU", "6 threads in 2 workers", "15.0 times as long", "1 thread in 1 worker"],
    ),
    "cut off": (
        CUT_OFF,
        SAFEPOOL,
        replace(EQUAL, compared=37),
        1.0,
        False,
        False,
        ["37 of 192 tasks in 20 s", "all of them in 0.60 s"],
    ),
    "cut off before the first result": (
        replace(CUT_OFF, tasks_done=0, workers=None, threads=None),
        SAFEPOOL,
        replace(EQUAL, compared=0, largest_difference=None),
        0.5,
        False,
        False,
        ["On 0.5 CPUs", "0 of 192 tasks in 20 s"],
    ),
    "nothing tells of processes": (
        replace(STANDARD, workers=None, threads=None, seconds=0.7),
        replace(SAFEPOOL, workers=None, threads=None, seconds=0.65),
        EQUAL,
        8.0,
        False,
        True,
        ["No gain here", "when the same workers of the standard pool"],
    ),
    "threads fit": (
        replace(STANDARD, workers=2, threads=4, seconds=0.7),
        replace(SAFEPOOL, seconds=0.5),
        EQUAL,
        8.0,
        False,
        True,
        ["No gain here", "4 threads fit 8 CPUs", "--cpus 1", "2 workers"],
    ),
    "as fast": (
        replace(STANDARD, seconds=0.65),
        SAFEPOOL,
        EQUAL,
        4.0,
        False,
        True,
        ["No gain here", "0.65 s", "0.60 s", "--cpus 1"],
    ),
    "as fast on one CPU already": (
        replace(STANDARD, seconds=0.1),
        SAFEPOOL,
        EQUAL,
        1.0,
        False,
        True,
        ["No gain here", "0.10 s"],
    ),
    "threads not counted": (
        replace(STANDARD, threads=None),
        replace(SAFEPOOL, threads=None),
        EQUAL,
        4.0,
        False,
        False,
        ["ProcessPoolExecutor() with 2 workers", "15.0 times"],
    ),
    "different results": (
        STANDARD,
        SAFEPOOL,
        Comparison(compared=192, equal=False, largest_difference=0.25),
        1.0,
        True,
        False,
        ["failed", "differ by up to 0.2"],
    ),
    "both cut off": (
        CUT_OFF,
        replace(CUT_OFF, pool=SAFEPOOL.pool),
        replace(EQUAL, compared=5),
        1.0,
        True,
        False,
        ["No comparison", "--bound", "--tasks"],
    ),
    "the standard pool failed": (
        FAILED,
        SAFEPOOL,
        replace(EQUAL, compared=0, largest_difference=None),
        1.0,
        False,
        False,
        ["ProcessPoolExecutor() failed", "can't start", "1 thread in 1 worker did"],
    ),
    "safepool's pool failed": (
        STANDARD,
        replace(FAILED, pool=SAFEPOOL.pool),
        replace(EQUAL, compared=0, largest_difference=None),
        1.0,
        True,
        False,
        ["failed", "safepool.ProcessPool()", "can't start"],
    ),
}


def report_of(outcome: str) -> Report:
    standard, safepool, comparison, cpus, *_ = OUTCOMES[outcome]
    return Report(
        tasks=192,
        points=150,
        bound_s=20.0,
        versions={"Python": "3.11.7", "numpy": "2.4.6", "scipy": "1.17.1"},
        machine_cpus=8,
        limit=Limit(name="cpu.max", cpus=cpus, source="/sys/fs/cgroup/cpu.max", raw="..."),
        standard=standard,
        safepool=safepool,
        comparison=comparison,
    )


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_the_sentence_says_what_was_measured(outcome: str) -> None:
    report = report_of(outcome)
    *_, failed, nothing_to_win, said = OUTCOMES[outcome]

    assert report.failed == failed
    assert report.nothing_to_win == nothing_to_win
    assert [words for words in said if words not in report.verdict()] == []


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_only_a_win_is_called_one(outcome: str) -> None:
    """Words of victory in no other outcome; and no hint to what is running already."""
    report = report_of(outcome)
    *_, failed, nothing_to_win, _ = OUTCOMES[outcome]

    if failed or nothing_to_win:
        assert "times as long" not in report.verdict()
    if report.cpus <= 1:
        assert "--cpus 1" not in report.verdict()


def text_of(report: Report) -> str:
    """Return what the demo prints, in its order."""
    rows = [report.row(report.standard), report.row(report.safepool)]
    return "\n".join([*report.opening_lines(), *rows, *report.closing_lines()]) + "\n"


def pretended() -> Report:
    return replace(
        report_of("cut off"),
        cpus_asked=1.0,
        pretend_host_cpus=48,
        standard=replace(CUT_OFF, workers=48, threads=2406, tasks_done=0),
        comparison=Comparison(),
    )


# One row per file in demo_screens/.
SCREENS: dict[str, Report] = {
    "a-pretended-host": pretended(),
    "cut-off": report_of("cut off"),
    "failed": report_of("the standard pool failed"),
    "nothing-to-win": report_of("threads fit"),
    "oversubscribed": report_of("oversubscribed"),
    "threads-not-counted": report_of("threads not counted"),
}


@pytest.mark.parametrize("name", SCREENS)
def test_the_screen_reads_as_its_file(name: str) -> None:
    assert text_of(SCREENS[name]) == (FOLDER / f"{name}.txt").read_text()


def test_every_file_has_a_report() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.txt" for name in SCREENS}


def test_a_pretended_host_is_said_to_be_one() -> None:
    """In the text, in the sentence and in JSON; the machine's own CPUs stay told."""
    report = pretended()

    assert "see 48 CPUs; this machine has 8" in text_of(report)
    assert "On 1 CPU of a pretended 48," in report.verdict()
    told = json.loads(report.as_json())
    assert (told["pretend_host_cpus"], told["machine_cpus"]) == (48, 8)


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_the_text_is_ascii_of_80_columns(outcome: str) -> None:
    lines = text_of(report_of(outcome)).splitlines()

    assert [line for line in lines if len(line) > 80 or not line.isascii()] == []


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_json_holds_what_the_report_holds(outcome: str) -> None:
    report = report_of(outcome)

    told = json.loads(report.as_json())

    support_schemas.check("demo", told)
    assert set(told["standard"]) == set(told["safepool"]) == {f.name for f in fields(Half)}
    assert told["comparison"] == {
        "compared": report.comparison.compared,
        "equal": report.comparison.equal,
        "largest_difference": report.comparison.largest_difference,
        "rtol": 1e-9,
        "atol": 1e-9,
    }
    assert told["ratio"] == report.ratio
    assert told["failed"] == report.failed
    assert told["verdict"] == report.verdict()


def test_a_cut_off_half_is_shown_as_such() -> None:
    report = report_of("cut off")

    assert "ProcessPoolExecutor(): cut off after 20 s, 37 of 192 tasks" in report.closing_lines()
    assert report.row(report.standard).split() == [
        *("ProcessPoolExecutor()", "2", "6", "20.00", "37/192", "4.20", "s")
    ]
    assert report.row(report.safepool).endswith("> 33.3 x")
    assert json.loads(report.as_json())["ratio_is_lower_bound"] is True


def test_columns_stand_under_their_heads() -> None:
    report = report_of("oversubscribed")
    head = report.opening_lines()[-1]
    row = report.row(report.safepool)

    for name, cell in (("workers", "1"), ("seconds", "0.60"), ("tasks", "192/192")):
        end = head.index(name) + len(name)
        assert row[:end].endswith(cell)
    assert row.endswith("15.0 x")
    assert len(row) == len(head)


def test_uncounted_threads_are_said_to_be() -> None:
    """A dash in the table, and a line that says why; never a guess."""
    report = report_of("threads not counted")

    assert report.row(report.standard).split()[2] == "-"
    assert any("not counted" in line for line in report.closing_lines())
    assert report.oversubscribed is None


def test_what_keeps_the_quota_away_is_one_line() -> None:
    report = replace(
        report_of("oversubscribed"), cpus_asked=0.5, no_group="only Linux has control groups"
    )

    assert "--cpus 0.5 has no effect: only Linux has control groups" in report.opening_lines()


# One row per pair of result files: rows of the standard half, rows of safepool's half (the
# first number of a row says whether the task was done), and what must be found.
RESULTS: dict[str, tuple[list[list[float]], list[list[float]], Comparison]] = {
    "same": ([[1, 2.0]], [[1, 2.0]], Comparison(compared=1, equal=True, largest_difference=0.0)),
    "one is not done": (
        [[1, 2.0], [0, 0.0]],
        [[1, 2.0], [1, 7.0]],
        Comparison(compared=1, equal=True, largest_difference=0.0),
    ),
    "wrong": (
        [[1, 2.0], [1, 3.0]],
        [[1, 2.0], [1, 3.5]],
        Comparison(compared=2, equal=False, largest_difference=0.5),
    ),
    "none in common": (
        [[1, 2.0], [0, 0.0]],
        [[0, 0.0], [1, 2.0]],
        Comparison(compared=0, equal=True, largest_difference=None),
    ),
}


@pytest.mark.parametrize("results", RESULTS)
def test_only_what_both_have_done_is_compared(results: str, tmp_path: Path) -> None:
    standard, safepool, expected = RESULTS[results]
    np.save(tmp_path / "standard.npy", np.array(standard, dtype=float))
    np.save(tmp_path / "safepool.npy", np.array(safepool, dtype=float))

    assert compare(tmp_path / "standard.npy", tmp_path / "safepool.npy") == expected


def test_a_last_bit_is_allowed_and_a_ninth_digit_is_not(tmp_path: Path) -> None:
    """BLAS with one and with several threads may sum in another order."""
    np.save(tmp_path / "standard.npy", np.array([[1.0, 2.0]]))
    for name, number in (("bit", np.nextafter(2.0, 3.0)), ("digit", 2.00000001)):
        np.save(tmp_path / f"{name}.npy", np.array([[1.0, number]]))

    assert compare(tmp_path / "standard.npy", tmp_path / "bit.npy").equal
    assert not compare(tmp_path / "standard.npy", tmp_path / "digit.npy").equal


def test_a_nan_is_never_equal(tmp_path: Path) -> None:
    for name in ("standard", "safepool"):
        np.save(tmp_path / f"{name}.npy", np.array([[1.0, np.nan]]))

    assert not compare(tmp_path / "standard.npy", tmp_path / "safepool.npy").equal


def test_a_half_that_made_no_file_has_nothing_to_compare(tmp_path: Path) -> None:
    assert compare(tmp_path / "a.npy", tmp_path / "b.npy") == Comparison(
        compared=0, equal=True, largest_difference=None
    )
