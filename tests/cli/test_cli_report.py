"""The report: of a whole trace, of one torn off anywhere, and of what is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import support_schemas
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import safepool
from safepool.cli import main
from safepool.cli.report import CONCLUSIONS, NOTHING, ReportError, read

FOLDER = Path(__file__).parent / "report_screens"


def line(kind: str, row: int, at_s: float, name: str, cat: str = "", **args: Any) -> str:
    """One event, as a pool writes it."""
    took = {"dur": args.pop("took_s") * 1e6} if "took_s" in args else {}
    event = {"ph": kind, "pid": 7, "tid": row, "ts": at_s * 1e6, "cat": cat, "name": name}
    return json.dumps(event | took | {"args": args}) + ",\n"


def start(row: int, at_s: float = 0.0) -> str:
    return line("i", row, at_s, "start", "worker", pid=100 + row)


def process(number: int, name: str) -> str:
    told = {"ph": "M", "pid": number, "tid": 0, "ts": 0, "name": "process_name"}
    return json.dumps(told | {"args": {"name": name}}) + ",\n"


def task(row: int, at_s: float, took_s: float, outcome: str = "returned", **args: Any) -> str:
    process = args.pop("pid", 7)
    args = {"took_s": took_s, "outcome": outcome} | args
    return line("X", row, at_s, "work.step", "task", **args).replace(
        '"pid": 7', f'"pid": {process}'
    )


def end(at_s: float) -> str:
    return line("i", 0, at_s, "end", "pool")


HEAD = "[\n" + line("i", 0, 0, "safepool", "pool", schema=1, began="2026-01-01T00:00:00.000+00:00")

# One row per file in report_screens/: the lines of a trace, without its head.
SCREENS: dict[str, list[str]] = {
    "no-call": [start(1), end(1)],
    "short-run": [start(1), task(1, 0.8, 0.2, waited_us=800_000), end(1)],
    "throttled": [start(1), task(1, 0, 9), line("C", 0, 9, "throttled", ms=4200.0), end(10)],
    "one-long-call-last": [
        start(1),
        start(2),
        *(task(row, at, 1) for row in (1, 2) for at in range(4)),
        task(1, 4, 6, waited_us=4_000_000),
        end(10),
    ],
    "short-calls": [
        start(1),
        *(
            task(1, at, 0.4, calls=1_000, busy_us=400_000.0, waited_us=600_000)
            for at in range(1, 10)
        ),
        end(10),
    ],
    "pickling": [
        start(1),
        task(1, 0, 5, pickled_us=2_000_000, loaded_us=1_500_000, packed_us=100_000),
        end(10),
    ],
    "busy": [
        start(1),
        start(2),
        *(task(row, at, 0.95, waited_us=40_000) for row in (1, 2) for at in range(10)),
        end(10),
    ],
    "slow-program": [start(1), *(task(1, at, 0.5) for at in range(10)), end(10)],
    "waiting": [start(1), *(task(1, at, 0.5, waited_us=500_000) for at in range(10)), end(10)],
    "nodes": [
        process(8, "node tcp://10.0.0.3:4567 (n3), process 70"),
        process(9, "node tcp://10.0.0.4:4567 (n4), process 70"),
        *(task(row, at, 0.5, pid=8 + row % 2) for row in (1, 2, 3) for at in range(4)),
        end(10),
    ],
    "slow-disk": [
        start(1),
        task(1, 0, 5),
        line("C", 0, 5, "dropped events", events=40),
        line("C", 0, 10, "dropped events", events=41),
        end(10),
    ],
    "torn": [
        start(1),
        start(2),
        task(1, 0, 2),
        task(2, 0, 1, "retried"),
        line("i", 2, 1, "death", "worker", pid=102, how="was killed by SIGKILL"),
        "\0\0\0\0\n",
        start(2, 1.5),
        task(2, 1.5, 2, attempt=2),
        line("X", 1, 2, "work.step", "task", took_s=1),  # without its outcome
        task(1, 3, 1, "raised", error="ValueError"),
        task(2, 3.5, 0.5, "died"),
        line("i", 2, 4, "death", "worker", pid=103, how="was killed by SIGKILL"),
        line("i", 0, 4, "break", "pool", why="worker 103 was killed by SIGKILL"),
        task(1, 4, 6)[:60],
    ],
}


@pytest.mark.parametrize("name", SCREENS)
def test_what_is_shown_of_each_trace(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    path.write_text(HEAD + "".join(SCREENS[name]))

    assert main(["report", str(path)]) == 0

    assert capsys.readouterr().out == (FOLDER / f"{name}.txt").read_text()


def test_every_screen_has_a_trace_and_every_conclusion_a_screen() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.txt" for name in SCREENS}
    shown = [" ".join(path.read_text().split()) for path in FOLDER.iterdir()]
    for said in (NOTHING, *CONCLUSIONS):
        assert any(text.endswith(said) for text in shown), said


def test_the_documented_keys_are_those_of_the_object(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(HEAD + "".join(SCREENS["torn"]))
    told = json.loads(read(str(path)).as_json())
    support_schemas.check("report", told)

    assert list(told) == list(support_schemas.schema("report.json")["properties"])
    assert (told["retries"], told["deaths"], told["damaged_lines"]) == (1, 2, 3)


@pytest.mark.parametrize(
    ("seconds", "is_judged"), [(0.2, False), (1, False), (1.9, False), (2, True), (30, True)]
)
def test_a_run_is_judged_from_two_seconds_on(
    seconds: float, is_judged: bool, tmp_path: Path
) -> None:
    """A short run is mostly start-up; the program is not slower for that."""
    path = tmp_path / "run.json"
    path.write_text(HEAD + start(1) + task(1, 0.1, 0.05) + end(seconds))

    said = read(str(path)).conclusion()

    assert ("submits them too slowly" in said) == is_judged
    assert ("is not judged" in said) == (not is_judged)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("trace") / "run.json"
    with safepool.ProcessPool(1, trace=path) as pool:
        list(pool.map(abs, range(1000)))
    return path


def test_a_trace_is_reported(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(trace)]) == 0
    text = capsys.readouterr().out
    assert "1000 calls, 1 worker\n" in text
    assert [line for line in text.splitlines() if len(line) > 80 or not line.isascii()] == []
    assert main(["report", "--json", str(trace)]) == 0
    assert json.loads(capsys.readouterr().out)["calls"] == 1000


@pytest.mark.parametrize(
    ("lines", "expected_s"),
    [
        pytest.param(SCREENS["one-long-call-last"], 6, id="submitted with the others"),
        pytest.param([task(1, 0, 4), task(2, 2, 4)], 2, id="began while another ran"),
        pytest.param([task(1, 0, 4), task(2, 5, 4)], 0, id="submitted when no other ran"),
        pytest.param([start(2), task(1, 1, 4)], 0, id="no other worker had a call"),
        pytest.param([task(1, 0, 4), task(1, 4, 4, waited_us=4e6)], 0, id="one worker"),
    ],
)
def test_a_tail_is_a_call_that_could_have_begun_before(
    lines: list[str], expected_s: float, tmp_path: Path
) -> None:
    path = tmp_path / "run.json"
    path.write_text(HEAD + "".join(lines))

    assert read(str(path)).tail_s() == pytest.approx(expected_s)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1))
def test_a_torn_trace_is_reported_or_refused(trace: Path, tmp_path: Path, share: float) -> None:
    data = trace.read_bytes()
    torn = tmp_path / "torn.json"
    torn.write_bytes(data[: int(len(data) * share)])
    try:
        read(str(torn)).as_text()
    except ReportError:
        assert share < 0.5


@pytest.mark.parametrize(
    "damaged",
    [
        "5",
        "{}",
        "[" * 20_000,
        task(1, 0, 1).replace("7", "NaN"),
        task(1, 0, 1).replace('"dur": 1000000.0', '"dur": 1e999'),
        task(1, 0, 1, calls="many"),
        task(1, 0, 1, calls=1e30, busy_us="1e999"),
        task(1, 0, 1, outcomes=[1]),
        task(1, 0, 1).replace('"ts": 0', '"ts": ' + "9" * 4000),
        line("i", 1, 1, "end", "worker").replace('"tid": 1', '"tid": null'),
        task(1, 0, -1),
        task(1, 0, 1, pickled_us=-1e9),
        task(1, 0, 1, busy_us=3e6),
        task(1, 1e12, 1),
        line("C", 0, 1, "throttled", ms=1.7e308),
    ],
    ids=range(15),
)
def test_a_damaged_line_is_counted_and_left_out(damaged: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(HEAD + start(1) + task(1, 0, 2) + end(3))
    whole = json.loads(read(str(path)).as_json())
    path.write_text(HEAD + start(1) + damaged.strip() + "\n" + task(1, 0, 2) + end(3))

    told = json.loads(read(str(path)).as_json(), parse_constant=pytest.fail)

    assert told == whole | {"damaged_lines": 1}


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param([task(1, 2, 4), task(1, 6, 4)], id="no start"),
        pytest.param([start(1, 2), task(1, 2, 4), start(1, 7), task(1, 7, 3)], id="no end"),
        pytest.param([start(1, 2), task(1, 2, 6), task(1, 2, 6), task(1, 9, 1)], id="call twice"),
        pytest.param(
            [start(1, 2), task(1, 2, 8), line("i", 1, 3, "end", "worker")], id="end early"
        ),
    ],
)
def test_a_worker_is_never_busier_than_it_lived(lines: list[str], tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(HEAD + "".join(lines))

    total = read(str(path)).total()

    assert 7 <= total.busy_s + total.starved_s <= total.lived_s <= 8


def test_names_in_a_trace_do_not_write_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    odd = "a\n\x1b[2J\ud800\u2192" + "b" * 100
    call = task(1, 0, 1, outcome=odd).replace("work.step", "a\\n\\u001b[2J" + "b" * 100)
    path.write_text(HEAD + start(1) + call)

    assert main(["report", str(path)]) == 0

    text = capsys.readouterr().out
    assert [x for x in text.splitlines() if len(x) > 80 or not (x + " ").isprintable()] == []
    assert "a\\x0a\\x1b[2J" in text


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a file without an end")
def test_a_file_without_an_end_is_refused() -> None:
    with pytest.raises(ReportError):
        read("/dev/zero")


@pytest.mark.parametrize("content", [None, "", "[1, 2]", '{"name": 3}', "text"])
def test_what_is_no_trace_is_one_line(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    assert main(["report", str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
