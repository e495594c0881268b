"""What a pool does with code of the program that raises, and with systems that refuse."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import threading
import types
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import support_core

from safepool import ProcessPool
from safepool.pool import executor
from safepool.pool.calls import closures, functions, mains, mapping, table, values
from safepool.pool.shell import exits, hiring, records, refusals, settings, staff
from safepool.pool.shell.listener import Listener
from safepool.transport import channel
from safepool.transport.frames import CorruptFrameError, Kind, encode
from safepool.workers import inheritance, logs

if TYPE_CHECKING:
    from collections.abc import Callable

LOCK = threading.Lock()


def refuse(*_: object, **__: object) -> Any:
    raise OSError(1, "a filter refuses it")


# --- functions and names -----------------------------------------------------------------


def test_how_many_arguments_a_function_takes_may_be_unknown() -> None:
    assert mapping._takes(lambda x: x, 1) is True
    assert mapping._takes(lambda x: x, 2) is False
    assert mapping._takes(type, 1) is None


def test_imports_of_a_notebook_are_found_beside_its_own_commands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(table, "sources_of", lambda _: ["%matplotlib inline", "import os"])
    assert table.imports_of_script() == ["os"]
    texts = ["from no_such import x", "from os import path"]
    monkeypatch.setattr(table, "sources_of", lambda _: texts)
    assert table.imports_of_script()[0] == "os"


def later() -> Callable[[], object]:
    def inner() -> object:
        return value

    found = mains.Look(inner)
    value = 3
    assert not found.same_as(mains.Look(inner))
    return inner


def test_a_variable_that_is_set_later_is_a_change() -> None:
    assert later()() == 3


def test_a_read_only_view_of_an_array_is_as_its_base() -> None:
    array = np.arange(3.0)
    assert not mains._is_frozen_array(array)
    view = array[1:]
    view.flags.writeable = False
    assert not mains._is_frozen_array(view)
    array.flags.writeable = False
    assert mains._is_frozen_array(array[1:])


def test_a_function_is_pickled_again_only_if_it_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And not for ever, and not if there are too many."""

    def function() -> object:
        return function.value  # type: ignore[attr-defined]

    function.value = 1  # type: ignore[attr-defined]
    here = functions.Functions()
    sent = here._unnamed(function, None)
    kept = here._of_main[function]
    assert sent is not None
    assert here._unnamed(function, kept) is sent
    assert here.known(function) is sent
    function.value = 2  # type: ignore[attr-defined]
    assert here.known(function) is None
    monkeypatch.setattr(functions, "_MOST_CHANGES", kept.changes)
    assert here._unnamed(function, kept) is None

    monkeypatch.setattr(functions, "_MOST", 0)
    assert here._named(function, "function") is None
    assert here._unnamed(later, None) is None
    monkeypatch.setattr(functions.payloads, "by_value_modules", lambda: True)
    assert here.known(function) is None


class One(NamedTuple):
    value: object
    place: str = "place"


def test_what_the_script_has_put_into_modules_may_not_be_pickled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one: Any = One(LOCK)
    pickled, names, shared = values.pickle_additions({1: one})
    assert (names, [*shared]) == (frozenset(), [])
    assert b"lock" not in pickled

    monkeypatch.setattr(closures, "additions_to", lambda _: [one])
    monkeypatch.setattr(closures, "within", refuse)
    table: Any = SimpleNamespace(added=None)
    closures._look_for_additions(table, [])
    assert table.added is None


def test_main_among_the_modules_to_preload_means_to_run_it() -> None:
    assert executor._names(["__main__", "os"], "auto") == (["os"], "run")


class Locked:
    """Cannot be pickled."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def method(self) -> None:
        """Do nothing."""


def test_the_owner_of_an_initializer_is_a_global_that_can_be_pickled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table: dict[str, int] = {}
    locked = Locked()
    monkeypatch.setattr(inheritance, "main_space", lambda: {"TABLE": table, "LOCKED": locked})
    assert inheritance._owner(table.update) == {"TABLE": table}
    assert inheritance._owner(locked.method) == {}
    assert inheritance._owner([].append) == {}


# --- the scheduler's helpers -------------------------------------------------------------


def test_a_record_for_nobody_is_dropped_and_one_of_the_script_has_its_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for level in (logging.NOTSET, logging.ERROR):
        made = {"name": "__mp_main__.part", "levelno": level, "msg": f"level {level}"}
        records._handle([logs.pack_record(logging.makeLogRecord(made))])
    (record,) = caplog.records
    assert (record.name, record.msg) == ("__main__.part", "level 40")


def test_times_without_a_request_are_refused() -> None:
    with pytest.raises(CorruptFrameError):
        Listener().timed(None, [])  # type: ignore[arg-type]


def test_what_cannot_be_explained_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(5, "input or output")
    with pytest.raises(OSError, match="input or output") as raised, refusals.explained():
        raise error
    assert raised.value is error
    assert refusals._files_met(SimpleNamespace(open_files=None)) == ""  # type: ignore[arg-type]
    monkeypatch.setattr(refusals, "_explain", refuse)
    assert refusals.explain(error) is error


def test_nothing_ends_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    assert exits.last_uncaught() is None


def test_settings_that_raise_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    assert not settings._is_equal(np.arange(3), np.arange(3))
    row = SimpleNamespace(name="of a library")
    one: Any = SimpleNamespace(of_thread=False, glance=refuse, module=None, row=row)
    with caplog.at_level(logging.DEBUG, "safepool"):
        settings.Settings._look_at(SimpleNamespace(), [one], True)  # type: ignore[arg-type]
    assert "the setting of a library cannot be read" in caplog.text

    telling: Any = SimpleNamespace(_found={}, _names=SimpleNamespace(needed=refuse))
    asked: Any = SimpleNamespace(name="other", names=())
    settings.Telling._ask(telling, [asked])
    assert telling._found["other"] == (asked, None)
    assert "the program's other cannot be sent" in caplog.text


def test_an_initializer_of_a_fork_context_names_the_remedy() -> None:
    def pack() -> None:
        raise RuntimeError("a SemLock created in a fork context")

    here: Any = SimpleNamespace(_not_packed=None, _packed=None, _pack=pack)
    hiring.Hiring.pack(here)
    assert 'get_context("spawn")' in str(here._not_packed)


def test_an_initializer_that_only_forks_can_have_makes_workers_forks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if sys.platform != "linux":
        pytest.skip("there are forks")
    told: list[str] = []
    monkeypatch.setattr(hiring, "tell_once", told.append)
    monkeypatch.setattr(
        hiring.inheritance, "pack", lambda _, *, forked: "packed" if forked else refuse()
    )
    here: Any = SimpleNamespace(
        _initialize=None, _method=SimpleNamespace(is_fork=False), _may_fork=True
    )
    here._pack = types.MethodType(hiring.Hiring._pack, here)
    assert here._pack() == "packed"
    assert "workers are forks" in told[0]
    here._may_fork, here._method = False, SimpleNamespace(is_fork=False)
    with pytest.raises(OSError, match="a filter"):
        here._pack()


class Closed:
    def __init__(self, *, fails: bool = False) -> None:
        self.pid, self.fails, self.closed = 1, fails, False

    def end(self, _number: int) -> None:
        if self.fails:
            refuse()

    def close(self) -> None:
        self.closed = True


def test_a_worker_that_resists_keeps_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left: list[set[int]] = [{1}, set()]
    monkeypatch.setattr(staff, "bury", lambda _: left.pop(0))
    here: Any = object.__new__(staff.Staff)
    first, second, lost = Closed(fails=True), Closed(), Closed()
    here._all, here._lost, here._orphans = (first, second), (lost,), {1}
    here._forget = lambda _: None
    here._selector, here._wake_sender, here._wake_receiver = Closed(), Closed(), Closed()
    here.close()
    assert (first.closed, second.closed, lost.closed) == (False, True, True)
    assert here._wake_receiver.closed
    assert "error while worker 1 was ended" in caplog.text


@pytest.mark.parametrize(("is_distrusted", "positions"), [(False, [1, 2]), (True, [1])])
def test_nothing_more_is_read_of_a_worker_that_is_distrusted(
    is_distrusted: bool, positions: list[int]
) -> None:
    """Its channel is closed for what the first of two frames said."""
    ours, theirs = socket.socketpair()
    theirs.sendall(b"".join(encode(Kind.SKIPPED, 1) + encode(Kind.SKIPPED, 2)))
    worker: Any = support_core.worker(channel=channel.Channel(ours))
    found = []
    for whose, frame in staff.Staff._read(object.__new__(staff.Staff), worker):
        assert whose is worker
        found.append(frame.task)
        if is_distrusted:
            worker.channel.close()
    assert found == positions
    worker.channel.close()
    theirs.close()


# --- coroutines --------------------------------------------------------------------------


def test_a_block_of_a_coroutine_is_left_in_any_way() -> None:
    killed: list[int] = []

    def fail(*_: object) -> None:
        raise ValueError("at the end")

    pool: Any = SimpleNamespace(kill_workers=lambda: killed.append(1), __exit__=fail)
    with pytest.raises(ValueError, match="at the end"):
        asyncio.run(ProcessPool.__aexit__(pool, None, None, None))
    assert not killed
    with pytest.raises(StopIteration):
        ProcessPool.__aexit__(pool, GeneratorExit, None, None).send(None)
    assert killed


def test_where_a_socket_can_only_wait_no_record_is_offered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(channel, "_DO_NOT_WAIT", 0)
    assert not channel.Channel(ours).offer(b"record")
    ours.close()
    theirs.close()


# --- workers that are forked -------------------------------------------------------------

if sys.platform == "linux":
    from safepool.pool.shell import turns
    from safepool.transport import _memfd
    from safepool.workers import asking, context, forkserver, launch

    def test_a_bell_that_was_rung_often_enough_or_not_is_no_error(
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        bell = os.eventfd(0, os.EFD_NONBLOCK)
        turns._silence(bell)
        os.eventfd_write(bell, 2**64 - 2)
        turns._ring(bell)
        os.close(bell)
        monkeypatch.setattr(turns, "_MOMENT_LOOKS", 1)
        monkeypatch.setattr(turns, "_MOMENT_S", 0.0)
        assert not turns._soon(lambda: False)

    def test_without_a_descriptor_there_is_no_spare_one(monkeypatch: pytest.MonkeyPatch) -> None:
        spare = _memfd._Spare()
        monkeypatch.setattr(os, "open", refuse)
        spare.count(1)
        assert spare._descriptor == -1
        spare.count(-1)

    def test_streams_and_options_of_an_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
        assert not launch.is_stream(1 << 20)
        monkeypatch.setattr(sys, "_xoptions", {"new_option": "1"})
        assert "new_option=1" in launch._interpreter_flags()

    def test_prints_of_a_server_that_is_gone_or_slow_are_unknown() -> None:
        with forkserver.server_for({"SAFEPOOL_TEST": "prints"}) as server:
            pass
        held: list[int] = []

        def ask(_names: list[str], tell: int) -> bool:
            held.append(os.dup(tell))
            return True

        assert server.prints(["x"], bool) == {}
        try:
            running: Any = SimpleNamespace(ask_prints=ask, preload_ahead=refuse)
            server.running = running
            assert server.prints(["x"], lambda: True) == {}
            running.ask_prints = refuse
            assert server.prints(["x"], bool) == {}
            server.preload_ahead(["os"])
            with server._alone(bool):
                server.preload_ahead(["os"])
        finally:
            server.running = None
            os.close(held[0])
            forkserver.stop_all()

    def test_without_descriptors_nothing_is_learnt_of_a_server(
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        here: Any = context.ServerContext()
        monkeypatch.setattr(here, "_plan_now", lambda _: None)
        assert here.prints(None, ["x"], bool) == {}
        monkeypatch.setattr(here, "_plan_now", lambda _: object())
        monkeypatch.setattr(here, "_server", refuse)
        assert here.prints(None, ["x"], bool) == {}
        here._learns = True
        here.finish(None)

    def test_a_worker_whose_variables_were_read_has_a_server_of_its_own(
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        started: list[Any] = []

        def start(told: Any, *_: object) -> str:
            started.append(told)
            if len(started) == 1:
                raise asking.HasReadError
            return "a worker"

        here: Any = context.ServerContext()
        monkeypatch.setattr(here, "_start", start)
        monkeypatch.setattr(context, "replace", lambda _, **changes: changes)
        told: Any = SimpleNamespace(variables={"A": "1"})
        assert here.start(told, None, None, bool) == "a worker"
        assert started[1] == {"environment": {"A": "1"}, "own": {}}
