"""``capped()``: everything that is loaded, what is imported inside, and back again."""

from __future__ import annotations

import os
import sys
import textwrap
import threading
import types
from typing import TYPE_CHECKING

import pytest
import support_natives as natives
from threadpoolctl import threadpool_info, threadpool_limits

from safepool.threads import NativeRuntime, blocks, register, unregister
from safepool.threads.cap import capped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """Another's library with a pool of 48 threads, loaded and registered."""
    module = types.ModuleType("blocks_library")
    module.threads = 48  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    register(
        NativeRuntime(
            name="blocks-library", used_by="a test", modules=(module.__name__,), source="a test"
        ),
        read=lambda m: m.threads,
        write=lambda m, n: setattr(m, "threads", n),
    )
    yield module
    unregister("blocks-library")


def test_a_registered_pool_is_capped_and_put_back(library: types.ModuleType) -> None:
    with capped(1):
        assert library.threads == 1
    assert library.threads == 48


def test_a_block_in_a_block_has_its_own_number(library: types.ModuleType) -> None:
    """And the outer one has its again, in the environment too."""
    with capped(1):
        with capped(3):
            assert (library.threads, os.environ["OMP_NUM_THREADS"]) == (3, "3")
        assert (library.threads, os.environ["OMP_NUM_THREADS"]) == (1, "1")
    assert library.threads == 48


def test_blocks_in_threads_restore_with_the_last(library: types.ModuleType) -> None:
    """The one that began first may end first; what it found is restored all the same."""
    before = dict(os.environ)
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with capped(2):
            inside.set()
            assert leave.wait(20)

    thread = threading.Thread(target=hold)
    with capped(1):
        thread.start()
        assert inside.wait(20)
    assert library.threads == 2
    leave.set()
    thread.join()

    assert library.threads == 48
    assert dict(os.environ) == before


def test_blocks_end_where_the_stack_ends() -> None:
    """A block for each level of a recursion that does not end: each is over afterwards."""
    pytest.importorskip("numpy.linalg")

    def descend() -> None:
        with capped(1):
            further()

    def further() -> None:
        descend()  # a level begins its block with less of the stack than it needs to end it

    def deeper(levels: int) -> None:
        deeper(levels - 1) if levels else descend()

    def numbers() -> list[int]:
        return [pool["num_threads"] for pool in threadpool_info()]

    environment = dict(os.environ)
    with threadpool_limits(3):
        before = numbers()
        for levels in range(4):  # so that each frame is the last for one
            with pytest.raises(RecursionError):
                deeper(levels)
            assert numbers() == before
    assert dict(os.environ) == environment


def test_an_interrupt_while_a_block_ends_leaves_nothing_capped(
    library: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pool(types.ModuleType):
        def __setattr__(self, name: str, value: object) -> None:
            if interrupts:
                raise interrupts.pop()
            super().__setattr__(name, value)

    interrupts: list[KeyboardInterrupt] = []
    library.__class__ = Pool
    with pytest.raises(KeyboardInterrupt), capped(1):
        interrupts.append(KeyboardInterrupt())
    assert library.threads == 48
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with capped(1):
        assert os.environ["OMP_NUM_THREADS"] == "1"
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_an_interrupt_while_a_block_begins_leaves_no_variable(
    library: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dict(os.environ)
    change = blocks.change_environment

    def interrupted(changes: Mapping[str, str | None]) -> None:
        patch.undo()
        change(dict([*changes.items()][::2]))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "change_environment", interrupted)
        with pytest.raises(KeyboardInterrupt), capped(1):
            pass
    assert (library.threads, dict(os.environ)) == (48, before)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_environment_is_restored_to_the_letter(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was set to another number, what was not set, and what is removed inside."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MKL_DOMAIN_NUM_THREADS", "MKL_DOMAIN_ALL=7")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    before = dict(os.environ)

    with capped(threads):
        assert os.environ["OMP_NUM_THREADS"] == str(threads)
        assert "MKL_DOMAIN_NUM_THREADS" not in os.environ
        with capped(1):
            assert os.environ["TOKENIZERS_PARALLELISM"] == "false"

    assert dict(os.environ) == before


def test_a_library_that_refuses_costs_nothing(library: types.ModuleType) -> None:
    """Its pool may have been used already; the block and the other pools are unharmed."""
    register(
        NativeRuntime(
            name="refusing", used_by="a test", modules=(library.__name__,), source="a test"
        ),
        read=lambda _: 48,
        write=_refuse,
    )
    try:
        with capped(1):
            assert library.threads == 1
    finally:
        unregister("refusing")


def _refuse(_module: object, _threads: int) -> None:
    raise RuntimeError("the pool has been used")


# One row per shape of a module on disk: its files, and what is imported.
SHAPES: dict[str, tuple[dict[str, str], str]] = {
    "module": ({"hooked.py": "threads = 48\n"}, "hooked"),
    "package": ({"hooked/__init__.py": "threads = 48\n"}, "hooked"),
    "submodule": ({"hooked/__init__.py": "", "hooked/deep.py": "threads = 48\n"}, "hooked.deep"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_imported_inside_is_capped_at_once(shape: str, tmp_path: Path) -> None:
    """By the next line; afterwards it has its own number, and its loader is as it was."""
    files, name = SHAPES[shape]
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    code = textwrap.dedent(f"""
        import importlib.util, json, sys
        from safepool.threads import NativeRuntime, register
        from safepool.threads.cap import capped
        register(
            NativeRuntime(name="hooked", used_by="a test", modules=({name!r},), source="a test"),
            read=lambda m: m.threads, write=lambda m, n: setattr(m, "threads", n),
        )
        finders = list(sys.meta_path)
        with capped(2):
            module = importlib.import_module({name!r})
            inside = module.threads
        print(json.dumps([
            inside, module.threads, finders == sys.meta_path, vars(module.__loader__).keys()
            == vars(importlib.util.find_spec(module.__name__).loader).keys(),
        ]))
    """)

    assert natives.run(code, folder=tmp_path, cpus=None) == [2, 48, True, True]


def test_an_import_that_fails_is_the_callers(tmp_path: Path) -> None:
    """And the next attempt is met like the first."""
    (tmp_path / "failing.py").write_text(
        "import os\nthreads = 48\nif not os.environ.pop('WORKS', None): raise ZeroDivisionError\n"
    )
    code = textwrap.dedent("""
        import json, os
        from safepool.threads import NativeRuntime, register
        from safepool.threads.cap import capped
        register(
            NativeRuntime(name="failing", used_by="a test", modules=("failing",), source="test"),
            read=lambda m: m.threads, write=lambda m, n: setattr(m, "threads", n),
        )
        with capped(1):
            try:
                import failing
            except ZeroDivisionError:
                os.environ["WORKS"] = "1"
            import failing
            inside = failing.threads
        print(json.dumps([inside, failing.threads]))
    """)

    assert natives.run(code, folder=tmp_path, cpus=None) == [1, 48]


def test_a_lazy_module_is_not_loaded_for_a_cap(tmp_path: Path) -> None:
    (tmp_path / "lazy.py").write_text("threads = 48\nimport sys; sys.modules['lazy_ran'] = sys\n")
    code = textwrap.dedent("""
        import importlib.util, json, sys
        from safepool.threads import NativeRuntime, inspect, register
        from safepool.threads.cap import cap_worker
        register(
            NativeRuntime(name="lazy", used_by="a test", modules=("lazy",), source="a test"),
            read=lambda m: m.threads, write=lambda m, n: setattr(m, "threads", n),
        )
        spec = importlib.util.find_spec("lazy")
        spec.loader = importlib.util.LazyLoader(spec.loader)
        module = importlib.util.module_from_spec(spec)
        sys.modules["lazy"] = module
        spec.loader.exec_module(module)
        cap_worker(1)
        inspect()
        before = "lazy_ran" in sys.modules
        print(json.dumps([before, module.threads]))
    """)

    assert natives.run(code, folder=tmp_path, cpus=None) == [False, 48]


# One row per mistake: what is registered, and the words of the error.
MISTAKES: dict[str, tuple[Callable[[], None], str]] = {
    "a row of the table": (
        lambda: register(NativeRuntime(name="openblas", used_by="-", source="-")),
        "already has a row 'openblas'",
    ),
    "a variable of the table": (
        lambda: register(
            NativeRuntime(name="x", used_by="-", removed=("OMP_NUM_THREADS",), source="-")
        ),
        "OMP_NUM_THREADS is already a variable of 'openmp'",
    ),
    "a call without a module": (
        lambda: register(NativeRuntime(name="x", used_by="-", source="-"), write=lambda *_: None),
        "runtime.modules is empty",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_row_that_contradicts_the_table_is_refused(mistake: str) -> None:
    act, words = MISTAKES[mistake]
    with pytest.raises(ValueError, match=words):
        act()


# What a program with scikit-learn's libraries, OpenMP among them, says on a machine that
# seems to have many CPUs.
LOOK = """
import json, threading
import safepool

def look():
    return {pool.runtime: pool.threads for pool in safepool.threads.inspect()
            if pool.runtime in ("openblas", "openmp")}

def in_a_thread(call):
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]
"""
ALL = {"openblas": natives.MANY, "openmp": natives.MANY}
ONE = {"openblas": 1, "openmp": 1}


def test_openmp_is_capped_in_the_thread_that_runs_the_body(tmp_path: Path) -> None:
    """Its number is one of each thread: of the one that runs, and of no other."""
    pytest.importorskip("sklearn")
    code = LOOK + textwrap.dedent("""
        import sklearn.cluster

        @safepool.worker
        def body(also_elsewhere=None):
            return look(), also_elsewhere and in_a_thread(also_elsewhere)

        def both():
            return body(), look()

        (inside, other), after = body(look), look()
        (in_thread, _), after_in_thread = in_a_thread(both)
        print(json.dumps([inside, other, after, in_thread, after_in_thread, look()]))
    """)

    found = natives.run(code, folder=tmp_path)

    assert found == [ONE, {"openblas": 1, "openmp": natives.MANY}, ALL, ONE, ALL, ALL]


def test_what_the_body_imports_is_capped_and_as_large_as_elsewhere_afterwards(
    tmp_path: Path,
) -> None:
    """At whatever depth, and again with the next call."""
    pytest.importorskip("sklearn")
    code = LOOK + textwrap.dedent("""
        @safepool.worker
        def body():
            import sklearn.cluster
            return look()

        @safepool.worker
        def outer():
            return body(), look()

        print(json.dumps([outer(), look(), body(), look()]))
    """)

    assert natives.run(code, folder=tmp_path) == [[ONE, ONE], ALL, ONE, ALL]


def test_what_is_imported_inside_follows_the_users_variable_afterwards(tmp_path: Path) -> None:
    """It says what the library would have had without the block."""
    code = LOOK + textwrap.dedent("""
        import os
        os.environ["OPENBLAS_NUM_THREADS"] = "5"

        @safepool.worker
        def body():
            import numpy
            return look()

        print(json.dumps([body(), look()]))
    """)

    assert natives.run(code, folder=tmp_path) == [{"openblas": 1}, {"openblas": 5}]


def test_in_a_worker_it_caps_the_threads_that_a_task_starts(tmp_path: Path) -> None:
    """A forked worker's libraries have read the program's variables, not its own."""
    pytest.importorskip("sklearn")
    code = LOOK + textwrap.dedent("""
        import sklearn.cluster

        decorated = safepool.worker()(look)

        def task():
            return look(), in_a_thread(look), in_a_thread(decorated), decorated(), look()

        with safepool.ProcessPool(1, mp_context="fork") as pool:
            print(json.dumps([pool.submit(task).result(60), look()]))
    """)

    inside, outside = natives.run(code, folder=tmp_path)

    # The second is why: nothing else reaches a thread of the task's own in such a worker.
    assert inside == [ONE, {"openblas": 1, "openmp": natives.MANY}, ONE, ONE, ONE]
    assert outside == ALL
