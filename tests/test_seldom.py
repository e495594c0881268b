"""What a system, a library or a program seldom does: each function answers all the same."""

from __future__ import annotations

import os
import pickle
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import safepool
from safepool import arguments, errors, machine, multiprocessing_pool, named_file, procfs, progress
from safepool.cli import limits_screen, run
from safepool.limits.affinity import read_captured_affinity
from safepool.limits.files import Machine
from safepool.threads import blocks, counts, imports, placement, pools
from safepool.threads.registry import register, unregister
from safepool.threads.table import NativeRuntime
from safepool.untyped import Untyped

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from pathlib import Path


def refuse(*_: object, **__: object) -> Any:
    raise OSError(1, "a filter refuses it")


# One row per answer without further preparation: what is asked, and what it is.
ANSWERS: dict[str, tuple[Callable[[], object], object]] = {
    "GPUs as a number": (lambda: arguments._lacks_as_gpus(2), ""),
    "no GPU": (lambda: bool(arguments._lacks_as_gpus(0)), True),
    "a size without a number": (lambda: bool(arguments._lacks_as_size_for_joblib("xM")), True),
    "a signal without a name": (lambda: errors._signal_name(50), "signal 50"),
    "a script that is not there": (lambda: run._shebang("/no/such/script"), []),
    "a path with a NUL": (lambda: Machine().read("/a\0b"), None),
    "a directory that is none": (lambda: Machine().subdirectories("/no/such"), []),
    "attribute of a class without types": (
        lambda: hasattr(Untyped(1, a=2), "no_such"),
        False,
    ),
    "the table of runtimes": (lambda: safepool.threads.table.__name__, "safepool.threads.table"),
}


@pytest.mark.parametrize("question", ANSWERS)
def test_it_is_answered(question: str) -> None:
    ask, expected = ANSWERS[question]
    assert ask() == expected


def test_a_worker_function_is_shown_as_one() -> None:
    assert repr(safepool.worker(len)) == f"<safepool.worker {len!r}>"


def test_a_chunk_of_no_calls_is_refused() -> None:
    with multiprocessing_pool.Pool(1) as pool, pytest.raises(ValueError, match="Chunksize"):
        pool.map(abs, [1], chunksize=-1)


def test_handlers_are_called_here_where_nothing_else_is_asked_for() -> None:
    done: list[int] = []
    machine.call_handlers(lambda: done.append(1))
    assert done == [1]


def test_workers_that_something_invisible_holds_back_are_told_of_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    monkeypatch.setattr(machine, "tell_once", lambda text, **_: told.append(text))
    monkeypatch.setattr(machine, "is_held_back", lambda _: True)
    watch: Any = SimpleNamespace(
        _held_back=0,
        _waiting=SimpleNamespace(sample=lambda _: SimpleNamespace(ran_s=1.0, waited_s=3.0)),
    )
    because = SimpleNamespace(name="affinity", source="sched_getaffinity")
    budget: Any = SimpleNamespace(workers=2, threads_per_worker=1, cpus=2.0, because=because)
    for _ in range(machine._SAMPLES_HELD_BACK + 1):
        machine.BudgetWatch.look_for_hidden_limit(watch, [1], budget)
    assert len(told) == 1
    assert "75%" in told[0]


def test_a_captured_mask_that_cannot_be_read_is_noted(tmp_path: Path) -> None:
    status = tmp_path / "proc" / "self" / "status"
    status.parent.mkdir(parents=True)
    status.write_text("Cpus_allowed_list:\tnone\n")
    captured = Machine(tmp_path)
    assert read_captured_affinity(captured).cpus is None
    assert len(captured.skipped) == 1


def test_joblib_that_is_not_installed_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_screen.importlib.util, "find_spec", lambda _: None)
    assert limits_screen._joblib_count() is None


# --- tqdm --------------------------------------------------------------------------------


class tqdm_notebook:  # noqa: N801 -- has the name of tqdm's own
    """Stands for the bar of a notebook, with the attributes that are used."""

    container = None
    n = 2
    total: int | None = None
    start_t = last_print_t = 1.0

    def __init__(self) -> None:
        self.done: list[object] = []

    def disp(self, **how: object) -> None:
        self.done.append(how)

    def reset(self, total: int | None) -> None:
        self.start_t = self.last_print_t = 2.0
        self.done.append(total)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def test_a_bar_of_a_notebook_is_begun_anew_and_painted() -> None:
    assert progress._output(tqdm_notebook) == {}
    bar = tqdm_notebook()
    shown: Any = object.__new__(progress.Progress)
    shown._bar, shown.total, shown.done, shown.failed = bar, 5, 2, 1
    shown._shown_failed = 1
    shown._show()
    assert bar.done == [5]
    assert (bar.start_t, bar.total) == (1.0, 5)
    shown._end()
    assert {"bar_style": "danger", "check_delay": False} in bar.done


# --- joblib ------------------------------------------------------------------------------


def test_a_backend_without_workers_says_so_in_the_future() -> None:
    pytest.importorskip("joblib")
    from safepool.joblib_backend import SafepoolBackend

    backend = SafepoolBackend(nesting_level=0)
    told: list[Future[Any]] = []
    future = backend.submit(lambda: None, told.append)
    assert told == [future]
    with pytest.raises(RuntimeError, match="was shut down"):
        backend.retrieve_result_callback(future)
    assert pickle.loads(pickle.dumps(backend)).nesting_level == 0


def test_what_cannot_be_pickled_has_no_digest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("joblib")
    from safepool import joblib_pools

    assert joblib_pools._digest(threading.Lock()) == b""
    monkeypatch.setattr(os, "getcwd", refuse)
    assert joblib_pools.born_with(None, ())[1] == ""


# --- native threads ----------------------------------------------------------------------


class Slotted:
    """A loader that allows no attribute."""

    __slots__ = ()

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing."""


class Finder:
    def __init__(self, loader: object) -> None:
        self.loader = loader

    def find_spec(self, *_: object) -> Any:
        return SimpleNamespace(loader=self.loader)


class Several:
    """A loader that serves several modules."""

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing."""


def test_loaders_and_finders_of_any_kind_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    finder = imports.AfterImport(lambda name, _: told.append(name))
    finder._names = frozenset({"wanted"})
    several = Several()
    monkeypatch.setattr(sys, "meta_path", [finder, object()])
    assert finder.find_spec("wanted", None) is None
    for loader in (Slotted(), Slotted, object(), several):
        monkeypatch.setattr(sys, "meta_path", [finder, object(), Finder(loader)])
        assert finder.find_spec("wanted", None) is not None
    several.exec_module(ModuleType("other"))
    assert told == []
    several.exec_module(ModuleType("wanted"))
    assert told == ["wanted"]


def test_numexpr_is_told_how_many_cores_there_are() -> None:
    numexpr: Any = SimpleNamespace(utils=SimpleNamespace())
    counts._set_numexpr(numexpr, 3)
    assert numexpr.detect_number_of_cores() == numexpr.utils.detect_number_of_cores() == 3
    assert numexpr.ncores == 3
    loky = SimpleNamespace()
    counts._set_loky(loky, 3)
    assert not hasattr(loky, "_count_physical_cores")


def test_a_library_that_does_not_say_its_threads_is_listed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = NativeRuntime(
        name="seldom", used_by="tests", modules=("seldom_module",), source="a test"
    )
    monkeypatch.setitem(sys.modules, "seldom_module", ModuleType("seldom_module"))
    told: list[int] = []
    monkeypatch.setattr("safepool.threads.registry._told", [lambda: told.append(1)], raising=True)
    register(made, read=refuse, write=lambda *_: None)
    try:
        (found,) = pools._pools_of(made, [], [])
    finally:
        unregister("seldom")
    assert (found.runtime, found.threads) == ("seldom", None)
    assert told
    assert pools._pool(None, runtime="new", library="lib", threads=2).hole.startswith("no row")


if sys.platform == "linux":
    from safepool import linux
    from safepool.threads import native

    def test_where_the_mask_is_refused_nothing_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", refuse)
        assert placement.own_cpus() == set()
        assert blocks._Blocks()._otherwise(None, None) == (os.cpu_count() or 1)
        assert placement.Placement(1).choose([]) == ()

    def test_a_process_of_another_user_is_said_to_be_his(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 54321)
        assert "belongs to user" in procfs.obstacle(os.getpid())

    def test_a_system_without_proc_has_no_device_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(named_file.os, "lstat", refuse)
        assert named_file._proc() is None

    def test_a_short_read_counts_for_all_buffers(tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"abcdef")
        with path.open("rb") as file:
            first, second = bytearray(3), bytearray(3)
            assert linux._preadv(file.fileno(), [*map(memoryview, (first, second))], 1) == 3
        assert (bytes(first), bytes(second)) == (b"bcd", bytes(3))

    def test_a_library_that_cannot_be_held_is_found_by_the_modules() -> None:
        found = native.LoadedLibraries()
        found._pin(1, "/no/such/library.so")
        assert type(found._instead) is native._ImportedModules
