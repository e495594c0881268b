"""``safepool --cluster`` without a cluster: what it says, and when it gives up."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import pytest
import support_schemas

from safepool.cli import cluster_screen, main
from safepool.cli.limits_screen import read_screen
from safepool.cluster import NodeInfo

if TYPE_CHECKING:
    from collections.abc import Callable


def test_without_dask_the_install_command_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert main(["--cluster", "tcp://scheduler:8786"]) == 2
    assert "pip install 'safepool[dask]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "others",
    [["--pid", "1"], ["--watch"], ["doctor", "numpy"], ["env"], ["run", "--", "true"]],
    ids=" ".join,
)
def test_it_goes_alone(others: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cluster", "tcp://scheduler:8786", *others]) == 2
    assert "--cluster cannot be combined with" in capsys.readouterr().err


# One row per address: where nobody answers, and what is none.
ADDRESSES = {
    "tcp://127.0.0.1:1": "cannot connect to a Dask scheduler at tcp://127.0.0.1:1: ",
    "scheduler": "at scheduler: missing port",
    "http://127.0.0.1:1": "unknown address scheme 'http'",
}


@pytest.mark.slow  # where Dask is installed
@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_where_no_scheduler_is(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("distributed", reason="pip install 'safepool[dask]'")
    monkeypatch.setattr(cluster_screen, "_CONNECT_S", 0.2)
    assert main(["--cluster", address]) == 2
    assert ADDRESSES[address] in capsys.readouterr().err


class Nodes:
    """A cluster pool whose nodes answer with what a test gives."""

    def __init__(self, answers: dict[str, object]) -> None:
        self._answers = answers
        self._scheduler = self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self) -> None:
        pass

    def wait_for_answers(self, _: float) -> None:
        pass

    def nodes(self) -> tuple[NodeInfo, ...]:
        return tuple(NodeInfo(f"tcp://{name}", name, 2, 0) for name in self._answers)

    def ask(self, _: Callable[..., Any], *, timeout_s: float) -> dict[str, object]:
        assert timeout_s > 0
        return self._answers

    def unused_places(self) -> dict[str, str]:
        return {"tcp://c": "it has Python 3.2"}


def told_by(monkeypatch: pytest.MonkeyPatch, answers: dict[str, object], *words: str) -> int:
    monkeypatch.setattr(cluster_screen, "connect", lambda *_, **__: nullcontext())
    monkeypatch.setattr(cluster_screen, "ClusterPool", lambda _: Nodes(answers))
    return main(["--cluster", "tcp://scheduler:8786", *words])


def test_each_node_is_shown_and_who_is_not_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = replace(read_screen(), standard_workers=1, native_threads=1, joblib_workers=1)
    loud = replace(quiet, standard_workers=10_000)
    answers = {"a": quiet, "b": loud, "d": OSError("no answer")}
    assert told_by(monkeypatch, answers) == int(loud.has_problem)
    text = capsys.readouterr().out
    assert "what node a may use" in text
    assert "what node b may use" in text
    assert "ClusterPool: 4 workers on 2 nodes" in text
    assert "tcp://c is not used: it has Python 3.2" in text
    assert "tcp://d is not used: no answer" in text

    told_by(monkeypatch, answers, "--json")
    whole = json.loads(capsys.readouterr().out)
    support_schemas.check("cluster", whole)
    assert [(node["name"], node["place"], node["workers"]) for node in whole["nodes"]] == [
        ("a", "tcp://a", 2),
        ("b", "tcp://b", 2),
    ]
    assert whole["nodes"][0]["budget"]["workers"] == quiet.budget.workers
    assert whole["unused"] == {"tcp://c": "it has Python 3.2", "tcp://d": "no answer"}


def test_no_node_is_an_error_that_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told_by(monkeypatch, {}) == 2
    assert "has no worker that can be used (tcp://c: it has Python 3.2" in capsys.readouterr().err
