"""The start method of a pool, where loky is not installed."""

from __future__ import annotations

import sys

import pytest

from safepool.errors import MissingExtraError
from safepool.workers import methods


def test_loky_that_is_not_installed_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("loky", "loky.backend"):
        monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(MissingExtraError, match=r"pip install 'safepool\[loky\]'"):
        methods.find_context("loky")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere loky comes with safepool")
def test_where_no_server_can_fork_and_loky_is_missing_workers_are_spawned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("loky", "loky.backend"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "frozen", True, raising=False)

    assert methods.find_context(None).get_start_method() == "spawn"
