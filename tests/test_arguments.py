"""Wrong arguments: the error names the parameter, what was found, and what to pass instead."""

from __future__ import annotations

import concurrent.futures
import inspect
import multiprocessing
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import safepool
from safepool.arguments import RULES, check

if TYPE_CHECKING:
    from collections.abc import Callable

NOTHING = object()

# One row per function and parameter: a value of a wrong type, and one of the right type that is
# out of range (``NOTHING`` where there is none). A parameter that takes anything has neither.
WRONG: dict[str, dict[str, tuple[Any, Any]]] = {
    "ProcessPool": {
        "max_workers": ("4", 0),
        "mp_context": (3, "frok"),
        "initializer": ("setup", NOTHING),
        "initargs": ("abc", NOTHING),
        "max_tasks_per_child": (1.5, 0),
        "threads_per_worker": (None, "many"),
        "rounding": (0, "up"),
        "reserve": ("half", -0.5),
        "memory_per_worker": ([2], "2 gigs"),
        "pin_workers": ("yes", NOTHING),
        "env": ({"OMP_NUM_THREADS": 2}, {"A=B": "1"}),
        "gpus": (1.5, ["all"]),
        "timeout": ("5s", 0),
        "retries": (None, -1),
        "max_memory_per_worker": (b"2GiB", 0),
        "memory_limit": ([1], "much"),
        "on_worker_death": (None, "raise"),
        "preload": (["numpy", 3], "numpy"),
        "main": (True, "spawn"),
        "trace": (True, NOTHING),
        "end_subprocesses": (1, NOTHING),
    },
    "ClusterPool": {
        "client_or_executor": ("tcp://scheduler:8786", NOTHING),
        "nodes": (True, 0),
        "no_nodes_timeout": ("5s", -1),
        "workers_per_node": ("4", 0),
        "initializer": ("setup", NOTHING),
        "initargs": ("abc", NOTHING),
        "max_tasks_per_child": (1.5, 0),
        "threads_per_worker": (None, "many"),
        "rounding": (0, "up"),
        "reserve": ("half", -0.5),
        "memory_per_worker": ([2], "2 gigs"),
        "pin_workers": ("yes", NOTHING),
        "env": ({"OMP_NUM_THREADS": 2}, {"A=B": "1"}),
        "gpus": (1.5, ["all"]),
        "timeout": ("5s", 0),
        "retries": (None, -1),
        "max_memory_per_worker": (b"2GiB", 0),
        "memory_limit": ([1], "much"),
        "preload": (["numpy", 3], "numpy"),
        "trace": (True, NOTHING),
        "end_subprocesses": (1, NOTHING),
    },
    "parallel_backend": {
        "n_jobs": ("all", 0),
        "threads_per_worker": ("auto", 0),
        "rounding": (None, "round"),
        "timeout": (True, float("inf")),
        "retries": (None, -1),
        "memory_per_worker": ((), "two"),
        "memory_limit": (b"1", -1),
        "preload": (3, "numpy"),
        "initializer": (3, NOTHING),
        "initargs": (3, NOTHING),
        "progress": (3, NOTHING),
        "mmap_mode": (3, "rw"),
        "max_nbytes": ([], "much"),
        "prefer": (3, "threads"),
        "idle_worker_timeout": ("10", -1),
        "end_subprocesses": (None, NOTHING),
        "cluster": (NOTHING, NOTHING),  # as ClusterPool's first argument
    },
    "Pool": {
        "processes": ("4", 0),
        "initializer": (3, NOTHING),
        "initargs": ("abc", NOTHING),
        "maxtasksperchild": (NOTHING, 0),
        "context": (3, "frok"),
        "options": (NOTHING, NOTHING),
    },
    "ThreadPool": {
        "max_workers": (2.5, 0),
        "thread_name_prefix": (3, NOTHING),
        "initializer": (3, NOTHING),
        "initargs": ("abc", NOTHING),
        "threads_per_worker": ("auto", 0),
    },
    "worker": {
        "function": (30, NOTHING),
        "threads": ("2", 0),
        "timeout": ("30", -1),
        "retries": (0.5, -1),
    },
    "share": {"obj": (NOTHING, NOTHING), "writable": (1, NOTHING)},
    "limit_threads": {"n": (1.5, 0)},
    "ProcessPool.resize": {"max_workers": (None, 0)},
    "ClusterPool.dump_tracebacks": {"timeout": ("5", float("nan"))},
    "ProcessPool.map": {
        "fn": (NOTHING, NOTHING),
        "iterables": (NOTHING, NOTHING),
        "timeout": ("5", float("nan")),
        "chunksize": ("2", 0),
        "buffersize": (2.5, 0),
        "progress": (1, NOTHING),
        "ordered": ("no", NOTHING),
        "return_exceptions": (ValueError, NOTHING),
    },
}
WRONG["ProcessPool.amap"] = WRONG["ProcessPool.map"]

# One row per function: keywords that it does not have, and those that are meant.
NEAR: dict[str, dict[str, str]] = {
    "ProcessPool": {
        "processes": "max_workers",
        "workers": "max_workers",
        "n_jobs": "max_workers",
        "max_worker": "max_workers",
        "maxtasksperchild": "max_tasks_per_child",
        "context": "mp_context",
        "threads": "threads_per_worker",
        "init_args": "initargs",
        "initialiser": "initializer",
        "max_retries": "retries",
        "time_out": "timeout",
        "mem_limit": "memory_limit",
        "num_gpus": "gpus",
    },
    "ClusterPool": {
        "max_workers": "workers_per_node",
        "n_workers": "workers_per_node",
        "client": "client_or_executor",
        "no_nodes_time_out": "no_nodes_timeout",
        "threads": "threads_per_worker",
    },
    "ClusterPool.dump_tracebacks": {"time_out": "timeout"},
    "parallel_backend": {"max_workers": "n_jobs", "inner_max_num_threads": "threads_per_worker"},
    "Pool": {"max_workers": "processes", "n_jobs": "processes", "mp_context": "context"},
    "ThreadPool": {"workers": "max_workers", "threads": "threads_per_worker"},
    "worker": {"threads_per_worker": "threads", "retry": "retries"},
    "share": {"writeable": "writable"},
    "limit_threads": {"threads": "n", "limits": "n"},
    "ProcessPool.resize": {"workers": "max_workers"},
    "ProcessPool.map": {"chunk_size": "chunksize", "buffer_size": "buffersize"},
    "ProcessPool.amap": {"chunk_size": "chunksize", "prefetch": "buffersize"},
}

ROWS = [(name, parameter) for name, rows in WRONG.items() for parameter in rows]
KEYWORDS = [(name, word) for name, rows in NEAR.items() for word in rows]


def use(name: str, **arguments: Any) -> None:
    """Call a function with arguments by name, and with what it needs beside them."""
    if name == "worker" and "function" in arguments:
        safepool.worker(arguments["function"])
    elif name == "share":
        safepool.share([1], **arguments)
    elif name == "ProcessPool.resize":
        with safepool.ProcessPool(1) as pool:
            pool.resize(**arguments)
    elif name.startswith("ClusterPool"):
        engine = arguments.pop("client_or_executor", None)
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            pool = safepool.ClusterPool(engine or executor, **arguments)
            pool.shutdown()
    elif name == "ProcessPool.map":
        with safepool.ProcessPool(1) as pool:
            pool.map(abs, [], **arguments)
    elif name == "ProcessPool.amap":
        with safepool.ProcessPool(1) as pool:
            pool.amap(abs, [], **arguments)
    else:
        function: Callable[..., object] = getattr(safepool, name)
        function(**arguments)


@pytest.mark.parametrize(("name", "parameter"), ROWS)
def test_an_error_names_the_parameter_the_value_and_the_remedy(name: str, parameter: str) -> None:
    wrong = zip((TypeError, ValueError), WRONG[name][parameter], strict=True)
    for error, value in wrong:
        if value is NOTHING:
            continue
        with pytest.raises(error) as caught:
            use(name, **{parameter: value})
        text = str(caught.value)
        told = rf"{parameter} must be .+, not {re.escape(repr(value))}( \(\w+\))?\. \S.+"
        assert re.fullmatch(told, text, re.DOTALL), text


def test_every_parameter_has_a_row() -> None:
    """A parameter without a row is accepted whatever it is given."""
    for name, rows in WRONG.items():
        function: Any = safepool
        for part in name.split("."):
            function = getattr(function, part)
        names = [*inspect.signature(function).parameters]
        assert set(names) - {"self"} == set(rows), name
    assert set(WRONG) == set(NEAR)


@pytest.mark.parametrize(("name", "word"), KEYWORDS)
def test_a_keyword_that_is_nearly_right_is_told_the_right_one(name: str, word: str) -> None:
    meant = NEAR[name][word]
    words = rf"unexpected keyword argument '{word}': did you mean {meant}=\?$"
    with pytest.raises(TypeError, match=words):
        use(name, **{word: 2})


# What a pool over nodes has in the place of an argument, or why it has none.
REFUSED = {
    "max_workers": r"'max_workers': did you mean workers_per_node=\?$",
    "mp_context": "takes no mp_context=: each node starts its workers in the way",
    "on_worker_death": "takes no on_worker_death=: the pool of a node is that of other cluster",
    "main": "takes no main=: no node has the script",
}
OF_NODES = {"client_or_executor", "nodes", "no_nodes_timeout", "workers_per_node"}


def test_a_cluster_pool_has_each_argument_of_a_pool_or_says_why_not() -> None:
    of_pool = inspect.signature(safepool.ProcessPool).parameters
    of_cluster = inspect.signature(safepool.ClusterPool).parameters
    assert set(of_pool) - set(of_cluster) == set(REFUSED)
    assert set(of_cluster) - set(of_pool) == OF_NODES
    both = set(of_pool) & set(of_cluster)
    others = {name for name in both if of_pool[name].default != of_cluster[name].default}
    assert others == {"preload"}  # what the engine's process has imported is none of the calls'
    for name, words in REFUSED.items():
        with pytest.raises(TypeError, match=words):
            safepool.ClusterPool(None, **{name: 2})


# Names of the standard pool that a cluster pool does not have: its workers are elsewhere.
OF_THIS_MACHINE = {"_broken", "_max_workers", "_processes"}


def test_each_difference_of_a_cluster_pool_is_documented() -> None:
    _, _, after = str(safepool.ClusterPool.__doc__).partition("Differences from ``ProcessPool``::")
    told = set(
        re.findall(
            r"\w+",
            "".join(
                line.strip().partition("  ")[0].partition("(")[0] + " "
                for line in after.split("\n\n")[1].splitlines()
            ),
        )
    )
    # Those of the executor itself, and its inner ones that no pool of ours uses.
    standard = set(dir(concurrent.futures.Executor)) | {"_inherits"}
    own = {name for name in vars(safepool.ProcessPool) if name not in standard}
    assert own - set(dir(safepool.ClusterPool)) == OF_THIS_MACHINE
    of_cluster = set(dir(safepool.ClusterPool)) - set(dir(safepool.ProcessPool))
    assert of_cluster == {"nodes"}
    assert OF_THIS_MACHINE | of_cluster | set(REFUSED) | {"preload", "resize", "size"} <= told
    # Same arguments, and an answer of another form.
    assert {"workers", "dump_tracebacks"} <= told


def test_a_cluster_pool_has_each_method_of_a_pool() -> None:
    def public(kind: type) -> dict[str, Any]:
        return {name: getattr(kind, name) for name in dir(kind) if not name.startswith("_")}

    of_pool, of_cluster = public(safepool.ProcessPool), public(safepool.ClusterPool)
    assert set(of_cluster) - set(of_pool) == {"nodes"}
    assert set(of_pool) <= set(of_cluster)
    for name, method in of_pool.items():
        if callable(method):
            theirs = inspect.signature(of_cluster[name]).parameters
            assert theirs == inspect.signature(method).parameters, name
    with (
        concurrent.futures.ThreadPoolExecutor(1) as executor,
        safepool.ClusterPool(executor) as pool,
        pytest.raises(NotImplementedError, match=r"no resize\(2\): the pool of a node"),
    ):
        pool.resize(2)


def test_any_other_keyword_is_told_which_there_are() -> None:
    with pytest.raises(TypeError, match=r"argument 'colour'\. There are end_subprocesses, env, "):
        use("ProcessPool", colour="red")


# One row per value that is nearly right: the parameter, and what is proposed.
MEANT: list[tuple[str, Any, str]] = [
    ("max_workers", "4", "max_workers=4"),
    ("max_workers", 4.0, "max_workers=4"),
    ("timeout", "1.5", "timeout=1.5"),
    ("rounding", "Floor", "rounding='floor'"),
    ("mp_context", "forkservr", "mp_context='forkserver'"),
    ("initargs", "abc", "initargs=('abc',)"),
    ("initargs", 3, "initargs=(3,)"),
    ("preload", "numpy", "preload=('numpy',)"),
    ("pin_workers", 1, "pin_workers=True"),
]


@pytest.mark.parametrize(("parameter", "value", "meant"), MEANT)
def test_what_was_meant_is_proposed(parameter: str, value: object, meant: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"Did you mean {re.escape(meant)}\?$"):
        check(parameter, value)


# One row per value that is right, whatever it looks like.
RIGHT: list[tuple[str, Any]] = [
    ("max_workers", True),  # 1, as for the standard pool
    ("mp_context", multiprocessing),
    ("mp_context", "spawn"),
    ("initargs", ["a", "list"]),
    ("initargs", {"a", "set"}),
    ("initargs", iter([1])),
    ("initargs", None),
    ("memory_per_worker", " 1.5 GB"),
    ("memory_per_worker", 2.5e9),
    ("preload", ("numpy", "scipy")),
    ("preload", []),
    ("trace", Path("run.json")),
    ("max_nbytes", "1.5M"),
    ("progress", "a label"),
    ("n_jobs", None),
]


@pytest.mark.parametrize(("parameter", "value"), RIGHT)
def test_right_values_pass(parameter: str, value: object) -> None:
    check(parameter, value)


def test_numbers_of_numpy_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    check("max_workers", numpy.int64(4))
    check("retries", numpy.uint8(4))
    check("timeout", numpy.float32(0.5))
    check("memory_per_worker", numpy.int64(1 << 30))
    check("initargs", numpy.array([1, 2]))


class Unshown:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("value", [Unshown(), ["x" * 5000]])
@pytest.mark.parametrize("parameter", RULES)
def test_a_value_cannot_spoil_the_error(parameter: str, value: Any) -> None:
    """Neither one without a text, nor one with too much of it."""
    if parameter in ("initargs", "preload") and isinstance(value, list):
        return
    with pytest.raises((TypeError, ValueError), match=f"{parameter} must be ") as caught:
        check(parameter, value)
    assert len(str(caught.value)) < 400


def test_the_signature_and_the_words_of_help_stay() -> None:
    assert inspect.signature(safepool.limit_threads).parameters["n"].default == "auto"
    assert "max_workers" in inspect.signature(safepool.ProcessPool).parameters
    assert (safepool.share.__doc__ or "").startswith("Place an object once")
