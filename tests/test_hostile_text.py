"""Names that others choose reach no screen, log line, bar or table of a notebook as they are."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import support_core

import safepool
from safepool import machine
from safepool.budget import Budget, fit
from safepool.cli import cluster_screen, doctor, limits_screen, main, report, run, top
from safepool.cli.demo_report import Half
from safepool.cli.demo_report import Report as DemoReport
from safepool.cli.text import json_of
from safepool.cluster import NodeInfo, NodeLostError
from safepool.limits import Limit, Limits, MemoryLimit, PidsLimit, SharedMemory, Throttling
from safepool.limits._types import Skipped
from safepool.pool.core.ending import Ending, Lost, Stage
from safepool.pool.watch import WorkerInfo, worker_table
from safepool.progress import label_of
from safepool.shown import html_table
from safepool.threads import NativePool
from safepool.workers.contained import ContainedLogger

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# What clears a terminal, sets its title or asks it to answer; other ends of a line; what is
# written from the right to the left; half a character. A name is no more than a part of a line:
# FORGED must not begin one.
HOSTILE = "a\x1b[2J\x1b]0;t\x07\x9b6n\r\u2028\x85\u202e\udcff\x00%s{}<b>\nFORGED"


def limits() -> Limits:
    limit = Limit(name="cpu.max", cpus=2.0, source=HOSTILE, raw=HOSTILE)
    return Limits(
        affinity=limit,
        quotas=(replace(limit, cpus=None), limit),
        memory=(
            MemoryLimit(
                name="memory.max",
                bytes=100,
                source=HOSTILE,
                raw=HOSTILE,
                used_bytes=99,
                reclaimable_bytes=0,
            ),
        ),
        pids=(PidsLimit(name="pids.max", tasks=9, source=HOSTILE, raw=HOSTILE, used_tasks=1),),
        shared_memory=SharedMemory(source=HOSTILE, bytes=7, free_bytes=7),
        skipped=(Skipped(source=HOSTILE, reason=HOSTILE, was_set=True),),
    )


def screen() -> limits_screen.Screen:
    return limits_screen.Screen(
        limits=limits(),
        budget=fit(limits()),
        throttling=Throttling(periods=1, throttled_periods=1, throttled_us=1, source=HOSTILE),
        standard_workers=64,
        variables={"OMP_NUM_THREADS": HOSTILE},
        process=limits_screen.OtherProcess(
            pid=7,
            threads=1,
            libraries=(limits_screen.NativeLibrary(runtime="openmp", library=HOSTILE),),
        ),
    )


def doctors_report() -> doctor.Report:
    pool = NativePool(
        runtime="openmp",
        library=f"/{HOSTILE}/libgomp.so",
        threads=64,
        variable="OMP_NUM_THREADS",
        value=HOSTILE,
        fixed="",
        hole="",
        source="",
    )
    return doctor.Report(
        python="3.11",
        cpus=2.0,
        libraries=(
            doctor.Library(name=HOSTILE, error=HOSTILE.replace("\n", "")),
            doctor.Library(name=HOSTILE, version=HOSTILE, os_threads=1, pools=(pool,)),
        ),
    )


def demo_report() -> DemoReport:
    half = Half(pool="standard", workers=1, threads=1, error=HOSTILE)
    return DemoReport(
        tasks=1,
        points=16,
        cpus_asked=1.0,
        bound_s=1.0,
        versions={},
        machine_cpus=2,
        limit=limits().affinity,
        no_group=HOSTILE,
        standard=half,
        safepool=half,
    )


def plan() -> run.Plan:
    budget = Budget(workers=2, threads_per_worker=1, cpus=2.0, because=limits().affinity)
    return run.plan({"OMP_NUM_THREADS": HOSTILE, "PYTHONPATH": HOSTILE}, budget, patch=True)


def trace(folder: Path) -> Path:
    """Return a trace whose every text is hostile."""
    at = {"ph": "i", "ts": 1, "tid": 1, "cat": "worker"}
    events = [
        {"name": "safepool", "ph": "M", "ts": 0, "args": {}},
        {**at, "name": "start", "args": {}},
        {
            **at,
            "name": HOSTILE,
            "ph": "X",
            "cat": "task",
            "dur": 9,
            "args": {"outcome": HOSTILE, "outcomes": {HOSTILE: 1}},
        },
        {**at, "name": "break", "cat": "pool", "args": {"why": HOSTILE}},
    ]
    file = folder / "trace.json"
    file.write_text("[\n" + ",\n".join(map(json.dumps, events)))
    return file


# What is printed for people, and what for programs.
SCREENS: dict[str, Callable[[Path], list[str]]] = {
    "limits": lambda _: [screen().as_text(), screen().as_json()],
    "doctor": lambda _: [doctors_report().as_text(), doctors_report().as_json()],
    "run --explain": lambda _: [plan().as_text()],
    "demo": lambda _: [
        *demo_report().opening_lines(),
        *demo_report().closing_lines(),
        demo_report().as_json(),
    ],
    "top": lambda _: [
        top.as_text(7, [top.Row(7, HOSTILE, 1.0, 1, 1)]),
        json_of({"workers": [top.Row(7, HOSTILE, 1.0, 1, 1)]}),
    ],
    "--cluster": lambda _: [
        cluster_screen._as_text(*nodes()),
        cluster_screen._as_json(*nodes()),
    ],
    "report": lambda folder: [
        report.read(str(trace(folder))).as_text(),
        report.read(str(trace(folder))).as_json(),
    ],
}


def nodes() -> tuple[dict[str, NodeInfo], dict[str, limits_screen.Screen], dict[str, str]]:
    node = NodeInfo(place=HOSTILE, name=HOSTILE, workers=1, calls=0)
    return {HOSTILE: node}, {HOSTILE: screen()}, {HOSTILE: HOSTILE}


def assert_harmless(text: str) -> None:
    for line in text.split("\n"):
        assert line.isprintable()
        assert not line.strip().startswith("FORGED")


@pytest.mark.parametrize("name", SCREENS)
def test_a_screen_shows_names_escaped(name: str, tmp_path: Path) -> None:
    """Of whatever is on it; it is there, to be looked up."""
    text = "\n".join(SCREENS[name](tmp_path))

    assert_harmless(text)
    assert "FORGED" in text


# Arguments of the command that it complains about, with the exit code.
COMPLAINTS = {
    "a file that is no trace": (["report", HOSTILE.replace("\x00", "")], 2),
    "an unknown command": ([HOSTILE], 2),
    "an unknown option": (["limits", f"--{HOSTILE}"], 2),
    "a wrong number": (["--pid", HOSTILE], 2),
    "a wrong choice": (["env", "--shell", HOSTILE], 2),
    "a picture's ending": (["demo", "--plot", HOSTILE], 2),
}


@pytest.mark.parametrize("case", COMPLAINTS)
def test_a_complaint_of_the_command_is_one_harmless_line(
    case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, code = COMPLAINTS[case]

    assert main(arguments) == code

    told = capsys.readouterr().err
    assert_harmless(told)
    assert told.count("\n") == 1
    assert "FORGED" in told


def ending(**changes: object) -> Ending:
    return support_core.ending(**{"stage": Stage.READING, "reading": HOSTILE, **changes})


class _Work:
    name = HOSTILE


OOM = safepool.OutOfMemory(
    kills_before=0, kills=1, source=HOSTILE, limit_bytes=1, used_bytes=1, group=f"{HOSTILE}x"
)
LOST = Lost(work=_Work(), place=0, begun=True, again=None)  # type: ignore[arg-type]
# Every text of ours in which a name or a path is.
TEXTS: dict[str, Callable[[], object]] = {
    "UnreadableLimitError": lambda: safepool.UnreadableLimitError(HOSTILE, HOSTILE, "a number"),
    "WorkerDiedError": lambda: safepool.WorkerDiedError(7, -9, HOSTILE, oom=OOM),
    "OutOfMemory": lambda: OOM,
    "OutOfMemory, no limit": lambda: replace(OOM, limit_bytes=None),
    "MemoryLimitError": lambda: safepool.MemoryLimitError(1, 1, 1, HOSTILE),
    "TaskTimeoutError": lambda: safepool.TaskTimeoutError(7, 1.0, HOSTILE),
    "TraceFileError": lambda: safepool.TraceFileError(2, "No such file", HOSTILE),
    "NodeLostError": lambda: NodeLostError(HOSTILE, HOSTILE, 7, HOSTILE),
    "a worker's death": lambda: ending().line[1],
    "a call's death": lambda: ending().line_of(LOST, ending().error_of(LOST))[1],
    "a call that is run again": lambda: ending().line_of(LOST, None)[1],
    "the label of a bar": lambda: label_of(HOSTILE),
    "a table": lambda: html_table(HOSTILE, [HOSTILE], [[HOSTILE]]),
    "the table of limits": lambda: limits()._repr_html_(),
    "the table of workers": lambda: worker_table(
        HOSTILE,
        [
            WorkerInfo(
                pid=7,
                index=0,
                state="busy",
                task=HOSTILE,
                running_s=1.0,
                tasks_done=0,
                waiting=0,
                resident_bytes=None,
                native_threads=None,
            )
        ],
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_names_what_others_have_named_escaped(name: str) -> None:
    text = str(TEXTS[name]())

    assert text.isprintable()
    assert "FORGED" in text
    if "<table>" in text:
        assert "<b>" not in text


def test_a_line_of_the_log_stays_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever an argument is: a name, an exception, a path."""
    log = ContainedLogger()
    with caplog.at_level(logging.DEBUG, logger="safepool"):
        log.warning("the import of %s raised %s (%d, %.1f)", HOSTILE, ValueError(HOSTILE), 3, 0.5)
        log.debug("100 %")

    first, second = caplog.records
    assert first.getMessage().isprintable()
    assert first.getMessage().endswith("FORGED (3, 0.5)")
    assert second.getMessage() == "100 %"


@pytest.mark.parametrize("shown", ["warn", "log", "warn as an error"])
def test_a_warning_stays_one_line(shown: str, caplog: pytest.LogCaptureFixture) -> None:
    text = f"{shown}: {HOSTILE}"
    with (
        caplog.at_level(logging.DEBUG, logger="safepool"),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("error" if "error" in shown else "always")
        (machine.log_once if shown == "log" else machine.tell_once)(text)
    machine._told.discard(text)

    (told,) = [*caplog.messages, *(str(one.message) for one in caught)]
    assert told.isprintable()
    assert told.startswith(shown)


@pytest.mark.skipif(sys.platform == "win32", reason="no such names of files")
def test_a_doctor_of_a_hostile_library_prints_harmless_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What its import prints, raises and names, in a process of its own."""
    (tmp_path / "hostile.py").write_text(
        f"import sys\nprint({HOSTILE!a})\n__version__ = {HOSTILE!a}\n"
    )
    (tmp_path / "raises.py").write_text(f"raise ValueError({HOSTILE!a})\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:surrogatepass")

    assert main(["doctor", "hostile", "raises"]) == 1

    out, err = capfd.readouterr()
    for line in f"{out}{err}".split("\n"):
        assert line.isprintable()
    assert "FORGED" in out
