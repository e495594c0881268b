"""What the program has set holds in its workers: table by table, by each way to start them."""

from __future__ import annotations

import decimal
import importlib.util
import json
import logging
import pickle
import socket
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
import support_natives as natives

from safepool import register_setting
from safepool.pool.shell.settings import Settings
from safepool.workers.settings import settings
from safepool.workers.settings_table import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

METHODS = ["safepool", "loky", "spawn", "fork"]


@dataclass(frozen=True)
class Case:
    """One row of the table, as a program uses it.

    Attributes:
        first: The statement that changes the setting.
        again: One that changes it to something else.
        own: One by which a worker changes it for itself.
        look: An expression of JSON's types that says what it is.
        needs: What must be installed.
    """

    first: str
    again: str
    own: str
    look: str
    needs: str = ""


def case(statement: str, first: str, again: str, own: str, look: str, needs: str = "") -> Case:
    return Case(*(statement.replace("VALUE", one) for one in (first, again, own)), look, needs)


# One row for each of the table's.
CASES: dict[str, Case] = {
    "warnings.filters": case(
        "import warnings; warnings.simplefilter('VALUE')",
        *("ignore", "error", "always"),
        "next(f[0] for f in __import__('warnings').filters if f[1:] == (None, Warning, None, 0))",
    ),
    "logging.captureWarnings()": case(
        "import logging; logging.captureWarnings(VALUE)",
        *("True", "False", "True"),
        "__import__('logging')._warnings_showwarning is not None",
    ),
    "levels of loggers": case(
        "import logging; logging.getLogger('an.application').setLevel(VALUE)",
        *("10", "40", "50"),
        "__import__('logging').getLogger('an.application').level",
    ),
    "logging.addLevelName()": case(
        "import logging; logging.addLevelName(15, 'VALUE')",
        *("TRACE", "FINE", "OWN"),
        "__import__('logging').getLevelName(15)",
    ),
    "decimal.getcontext()": case(
        "import decimal; decimal.getcontext().prec = VALUE",
        *("50", "9", "5"),
        "str(__import__('decimal').Decimal(1) / 3)",
    ),
    "decimal.DefaultContext": case(
        "import decimal; decimal.DefaultContext.Emax = VALUE",
        *("77", "88", "99"),
        "__import__('decimal').Context().Emax",
    ),
    "sys.set_int_max_str_digits()": case(
        "import sys; sys.set_int_max_str_digits(VALUE)",
        *("0", "5000", "6000"),
        "__import__('sys').get_int_max_str_digits()",
    ),
    "sys.setrecursionlimit()": case(
        "import sys; sys.setrecursionlimit(VALUE)",
        *("5000", "6000", "7000"),
        "__import__('sys').getrecursionlimit()",
    ),
    "sys.setswitchinterval()": case(
        "import sys; sys.setswitchinterval(VALUE)",
        *("0.25", "0.125", "0.5"),
        "round(__import__('sys').getswitchinterval(), 6)",
    ),
    "gc.set_threshold()": case(
        "import gc; gc.set_threshold(VALUE, 11)",
        *("1234", "2345", "3456"),
        "list(__import__('gc').get_threshold())[:2]",
    ),
    "csv.field_size_limit()": case(
        "import csv; csv.field_size_limit(VALUE)",
        *("10**9", "10**8", "10**7"),
        "__import__('csv').field_size_limit()",
    ),
    "socket.setdefaulttimeout()": case(
        "import socket; socket.setdefaulttimeout(VALUE)",
        *("3.5", "None", "1.5"),
        "__import__('socket').getdefaulttimeout()",
    ),
    "locale.setlocale()": case(
        "import locale; locale.setlocale(locale.LC_CTYPE, 'VALUE')",
        *("C", "C.UTF-8", "POSIX"),
        "__import__('_locale').setlocale(__import__('_locale').LC_CTYPE)",
    ),
    "authkey of multiprocessing": case(
        "import multiprocessing; multiprocessing.current_process().authkey = b'VALUE'",
        *("one", "two", "own"),
        "bytes(__import__('multiprocessing').current_process().authkey).decode()",
    ),
    "authkey of multiprocess": case(
        "import multiprocess; multiprocess.current_process().authkey = b'VALUE'",
        *("one", "two", "own"),
        "bytes(__import__('multiprocess').current_process().authkey).decode()",
        needs="multiprocess",
    ),
    "numpy.seterr()": case(
        "import numpy; numpy.seterr(divide='VALUE')",
        *("raise", "ignore", "print"),
        "__import__('numpy').geterr()['divide']",
        needs="numpy",
    ),
    "numpy.seterrcall()": case(
        "import numpy; numpy.seterrcall(VALUE)",
        *("on_error", "print", "len"),
        "__import__('numpy').geterrcall().__name__",
        needs="numpy",
    ),
    "numpy.set_printoptions()": case(
        "import numpy; numpy.set_printoptions(precision=VALUE)",
        *("3", "4", "5"),
        "repr(__import__('numpy').array([1 / 3]))",
        needs="numpy",
    ),
    "sklearn.set_config()": case(
        "import sklearn; sklearn.set_config(working_memory=VALUE)",
        *("123", "234", "345"),
        "__import__('sklearn').get_config()['working_memory']",
        needs="sklearn",
    ),
    "matplotlib.rcParams": case(
        "import matplotlib; matplotlib.rcParams['lines.linewidth'] = VALUE",
        *("7", "matplotlib.rcParamsDefault['lines.linewidth']", "9"),
        "__import__('matplotlib').rcParams['lines.linewidth']",
        needs="matplotlib",
    ),
    "pandas.options": case(
        "import pandas; pandas.set_option('display.max_rows', VALUE)",
        *("7", "8", "9"),
        "__import__('pandas').get_option('display.max_rows')",
        needs="pandas",
    ),
    "torch's default type and determinism": case(
        "import torch; torch.set_default_dtype('VALUE')",
        *("float64", "float16", "bfloat16"),
        "[__import__('torch').get_default_dtype(), __import__('torch').written]",
    ),
    "jax.config": case(
        "import jax; jax.config.update('jax_enable_x64', VALUE)",
        *("True", "False", "True"),
        "__import__('jax').config.jax_enable_x64",
    ),
}

# Stand-ins, by the names of the originals: PyTorch's wheel has gigabytes.
TORCH = """
from types import SimpleNamespace as _N
_state, written = {"dtype": "float32", "mode": (False, False), "precision": "highest"}, False
backends = _N(cudnn=_N(deterministic=False, benchmark=False))
def get_default_dtype(): return _state["dtype"]
def set_default_dtype(dtype): _state["dtype"] = dtype
def are_deterministic_algorithms_enabled(): return _state["mode"][0]
def is_deterministic_algorithms_warn_only_enabled(): return _state["mode"][1]
def use_deterministic_algorithms(mode, *, warn_only=False):
    global written
    _state["mode"], written = (mode, warn_only), False
def get_float32_matmul_precision(): return _state["precision"]
def set_float32_matmul_precision(precision): _state["precision"] = precision
"""
JAX = """
class _Config:
    jax_enable_x64 = jax_debug_nans = False
    jax_default_matmul_precision = None
    def update(self, name, value):
        assert hasattr(self, name)
        setattr(self, name, value)
config = _Config()
"""

PROGRAM = """
import json, sys, time
import safepool

def on_error(kind, flag):
    pass

def look(cases):
    # JSON tells tuples from lists no more than it must.
    return {name: eval(case["look"]) for name, case in cases.items()}

def do(statements):
    for statement in statements:
        exec(statement, globals())

if __name__ == "__main__":
    method, text = sys.argv[1:]
    cases = json.loads(text)
    found = []

    def both(pool):
        found.append([look(cases), pool.submit(look, cases).result(200)])

    do(case["first"] for case in cases.values())
    with safepool.ProcessPool(1, mp_context=method) as pool:
        both(pool)
        do(case["again"] for case in cases.values())
        (there,) = pool.map(look, [cases])
        found.append([look(cases), there])
        pool.submit(do, [case["own"] for case in cases.values()]).result(200)
        own = pool.submit(look, cases).result(200)
        do(case["first"] for case in cases.values())
        (there,) = pool.map(look, [cases])
        found.append([look(cases), there])
    with safepool.ProcessPool(1, mp_context=method, initializer=do, initargs=(
        [case["own"] for case in cases.values()],)
    ) as pool:
        print(json.dumps([found, own, pool.submit(look, cases).result(200)]))
"""


def installed() -> dict[str, Case]:
    return {
        name: one
        for name, one in CASES.items()
        if not one.needs or importlib.util.find_spec(one.needs)
    }


def test_every_row_of_the_table_has_a_case() -> None:
    assert [row.name for row in SETTINGS] == list(CASES)
    assert len({row.name for row in settings()}) == len(settings())
    assert all(row.source for row in SETTINGS)


def test_what_is_not_installed_is_told() -> None:
    absent = sorted(CASES.keys() - installed().keys())
    if absent:
        pytest.skip(f"not installed, so not checked: {', '.join(absent)}")


# Each imports all that is installed, four seconds of a processor. "loky" starts a worker afresh,
# as "spawn" does. On a machine that has much else to do, twenty times as long and more.
@pytest.mark.timeout(260)
@pytest.mark.parametrize(
    "method",
    [pytest.param(one, marks=[pytest.mark.slow] if one != "safepool" else []) for one in METHODS],
)
def test_a_worker_has_what_the_program_has_set(method: str, tmp_path: Path) -> None:
    """After the top level, before its first call and between two; its own stays its own."""
    (tmp_path / "torch.py").write_text(TORCH, encoding="utf-8")
    (tmp_path / "jax.py").write_text(JAX, encoding="utf-8")
    cases = {name: vars(one) for name, one in installed().items()}

    found, own, initialized = natives.run(
        PROGRAM,
        cpus=None,
        folder=tmp_path,
        arguments=(method, json.dumps(cases)),
        variables={"LC_ALL": "C.UTF-8"},
        timeout_s=240,
    )

    for program, worker in found:
        assert worker == program
    first, again = found[0][0], found[1][0]
    expected = {name: first[name] != again[name] for name in cases}
    assert expected == dict.fromkeys(cases, True)
    # The worker's own, until the program has changed again.
    assert own == initialized
    assert {name: own[name] != again[name] for name in cases} == dict.fromkeys(cases, True)


FILTERS = """
import json, re, sys, warnings
import library, safepool

class Mine(UserWarning):
    pass

def kinds(_):
    # In the order in which the program's list has them.
    found = []
    for warning in (Mine("x"), UserWarning("a number: 7"), UserWarning("other")):
        with warnings.catch_warnings(record=True) as seen:
            try:
                warnings.warn(warning, stacklevel=1)
                found.append("shown" if seen else "ignored")
            except UserWarning:
                found.append("error")
    return found

def of_the_library(_):
    before = "library" in sys.modules
    import library
    try:
        library.warn()
    except library.OwnWarning:
        return [before, "error"]
    return [before, "shown"]

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", "a number: [0-9]+")
    warnings.simplefilter("error", Mine)
    warnings.simplefilter("error", library.OwnWarning)
    with safepool.ProcessPool(1, mp_context=sys.argv[1]) as pool:
        print(json.dumps([kinds(0), pool.submit(kinds, 0).result(60),
            pool.submit(of_the_library, 0).result(60), pool.submit(kinds, 0).result(60)]))
"""

LIBRARY = """
import warnings
class OwnWarning(Warning): pass
warnings.filterwarnings("always", category=OwnWarning)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    warnings.warn("not for the user")
def warn(): warnings.warn("a warning of its own", OwnWarning)
"""


@pytest.mark.parametrize("method", METHODS)
def test_filters_with_patterns_and_classes_of_their_own(method: str, tmp_path: Path) -> None:
    """In the program's order; what a library that a worker imports adds does not go before it."""
    (tmp_path / "library.py").write_text(LIBRARY, encoding="utf-8")

    here, there, late, after = natives.run(
        FILTERS,
        cpus=None,
        folder=tmp_path,
        arguments=(method,),
        variables={"PYTHONWARNINGS": ""},
    )

    assert here == there == after == ["error", "error", "ignored"]
    # A worker that runs the script has imported it already.
    assert late[1] == "error"


OF_MAIN = """
import json, sys, warnings
import safepool

def end():
    try:
        warnings.warn("of the script", UserWarning)
    except UserWarning:
        return "error"
    return "passed"

WAYS = (
    {"module": "__main__"},
    {"module": ".*main"},
    {"module": "__main__$"},
    {"module": "another"},
    {"module": "__main__", "message": "another"},
)

warnings.filterwarnings("error", module="__main__")

if __name__ == "__main__":
    here, there = [end()], []
    with safepool.ProcessPool(1, mp_context=sys.argv[1]) as pool:
        there.append(pool.submit(end).result(60))
        for way in WAYS:
            warnings.resetwarnings()
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", **way)
            here.append(end())
            there.append(pool.submit(end).result(60))
        warnings.filters[:] = [("error", None, UserWarning, "__main__", 0)]
        there.append(pool.submit(end).result(60))
    print(json.dumps([here, there]))
"""


@pytest.mark.parametrize("method", METHODS)
def test_filters_for_the_script_hold_in_workers(method: str, tmp_path: Path) -> None:
    """There its module has another name."""
    here, there = natives.run(OF_MAIN, cpus=None, folder=tmp_path, arguments=(method,))

    assert here == ["error", "error", "error", "error", "passed", "passed"]
    assert there == [*here, "error"]


CANNOT_BE_PICKLED = """
import json, logging, threading, warnings
import numpy, safepool
lock = threading.Lock()

def look(_):
    import numpy
    return [numpy.geterr()["over"], numpy.geterrcall() is None]

if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    numpy.seterrcall(lock.acquire)
    numpy.seterr(over="raise")
    with safepool.ProcessPool(1) as pool:
        print(json.dumps(pool.submit(look, 0).result(60)))
"""


@pytest.mark.skipif(importlib.util.find_spec("numpy") is None, reason="NumPy is not installed")
def test_a_value_that_cannot_be_pickled_costs_nothing_else(tmp_path: Path) -> None:
    found = natives.run(CANNOT_BE_PICKLED, cpus=None, folder=tmp_path)

    assert found == ["raise", True]


NOTHING_IMPORTED = """
import json, sys

def look(_):
    heavy = ("numpy", "sklearn", "matplotlib", "csv", "support_settings")
    return [name for name in heavy if name in sys.modules]

def late(_):
    import numpy
    return numpy.geterr()["divide"]

def main():
    # Workers import what the script imports at its top.
    import csv, decimal, matplotlib, numpy, sklearn, support_settings
    import safepool
    numpy.seterr(divide="raise")
    matplotlib.rcParams["lines.linewidth"] = 9
    safepool.register_setting(
        "a setting", module="support_settings", read=support_settings.read,
        write=support_settings.write,
    )
    support_settings.value = 7
    with safepool.ProcessPool(1, mp_context="loky") as pool:
        return [
            pool.submit(look, 0).result(60), pool.submit(late, 0).result(60),
            pool.submit(support_settings.look, 0).result(60),
        ]

if __name__ == "__main__":
    print(json.dumps(main()))
"""


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn")
def test_nothing_is_imported_for_a_setting(tmp_path: Path) -> None:
    """It is set when the task has imported the module."""
    assert natives.run(NOTHING_IMPORTED, cpus=None, folder=tmp_path) == [[], "raise", 7]


REGISTERED = """
import json, sys
import safepool, support_settings

def write(module, value):
    module.value = value
    module.written += 1

def look(_):
    import support_settings
    return [support_settings.value, support_settings.written]

def change(value):
    import support_settings
    support_settings.value = value

if __name__ == "__main__":
    safepool.register_setting(
        "mine", module="support_settings", read=lambda module: module.value, write=write
    )
    support_settings.value = [1, 2]
    found = []
    with safepool.ProcessPool(1, mp_context=sys.argv[1]) as pool:
        found += pool.map(look, [0])
        pool.submit(change, "own").result(60)
        found += pool.map(look, [0])
        support_settings.value = [3]
        found += pool.map(look, [0])
    safepool.unregister_setting("mine")
    support_settings.value = [4]
    with safepool.ProcessPool(1, mp_context=sys.argv[1]) as pool:
        found += pool.map(look, [0])
    print(json.dumps(found))
"""


@pytest.mark.parametrize("method", METHODS[:3])
def test_others_add_rows(method: str, tmp_path: Path) -> None:
    """With functions of the script, which is where a program writes them."""
    found = natives.run(REGISTERED, cpus=None, folder=tmp_path, arguments=(method,))

    assert found == [[[1, 2], 1], ["own", 1], [[3], 2], [None, 0]]


def test_a_row_of_the_table_cannot_be_replaced() -> None:
    with pytest.raises(ValueError, match=r"already has a row 'numpy\.seterr\(\)'"):
        register_setting("numpy.seterr()", module="numpy", read=id, write=print)


THREADS = """
import decimal, json, threading
import safepool

def digits(_):
    return len(str(decimal.Decimal(1) / 3))

def in_a_thread(pool, prec, found):
    decimal.getcontext().prec = prec
    found += pool.map(digits, [0])

if __name__ == "__main__":
    decimal.getcontext().prec = 40
    found = []
    with safepool.ProcessPool(1) as pool:
        found += pool.map(digits, [0])
        thread = threading.Thread(target=in_a_thread, args=(pool, 7, found))
        thread.start()
        thread.join()
        with decimal.localcontext() as context:
            context.prec = 12
            found += pool.map(digits, [0])
        found += pool.map(digits, [0])
    print(json.dumps([found, digits(0)]))
"""


def test_a_setting_of_each_thread_is_that_of_the_thread_that_made_the_pool(tmp_path: Path) -> None:
    """Workers have one context, and the program's threads one each.

    A free-threaded Python lets a thread begin with its maker's, the object itself.
    """
    found, own = natives.run(THREADS, cpus=None, folder=tmp_path)
    assert found == [42, 42, 14, own]


def test_a_submit_looks_when_the_one_before_has_ended(tmp_path: Path) -> None:
    code = """
import csv, json, safepool
def limit(_):
    return csv.field_size_limit()
if __name__ == "__main__":
    with safepool.ProcessPool(1) as pool:
        wrong = 0
        for number in range(1000, 1200):
            csv.field_size_limit(number)
            wrong += pool.submit(limit, 0).result(60) != number
    print(json.dumps(wrong))
"""
    assert natives.run(code, cpus=None, folder=tmp_path) == 0


class Ended:
    """A future that has ended."""

    def has_ended(self) -> bool:
        return True


def calls_of(found: Settings) -> int:
    """Return how many functions written in Python one look calls."""
    calls = []
    sys.setprofile(lambda _, event, __: calls.append(event))
    try:
        found.look_before(Ended())  # type: ignore[arg-type]
    finally:
        sys.setprofile(None)
    return calls.count("call")


def test_a_look_that_finds_nothing_new_is_made_by_functions_written_in_c() -> None:
    found = Settings()
    # Now and then it looks at everything, and in 3.14 Python itself finds the filters.
    assert min(calls_of(found) for _ in range(100)) <= 10


CHANGES: dict[str, Callable[[], object]] = {
    "filter": lambda: warnings.filterwarnings("ignore", "never"),
    "level": lambda: logging.getLogger("of.a.test").setLevel(31),
    "disabled": lambda: logging.disable(5),
    "precision": lambda: setattr(decimal.getcontext(), "prec", 5),
    "trap": lambda: decimal.getcontext().traps.__setitem__(decimal.Inexact, True),
    "context": lambda: decimal.setcontext(decimal.Context(6)),
    "timeout": lambda: socket.setdefaulttimeout(77),
    "errors": lambda: np.seterr(all="raise"),
    "printing": lambda: np.set_printoptions(precision=3),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_look_sees_the_change_since_the_one_before(what: str) -> None:
    """In each of two pools, whichever looks first, and in neither of them twice."""
    pools = [Settings(), Settings()]
    with (
        warnings.catch_warnings(),
        decimal.localcontext(),
        np.errstate(),
        np.printoptions(),
    ):
        try:
            for repeat in range(2):
                for found in pools * 3:
                    found.look_before(Ended())  # type: ignore[arg-type]
                states = [found.state for found in pools]
                if repeat == 0:
                    CHANGES[what]()
                for found in pools * 3:
                    found.look_before(Ended())  # type: ignore[arg-type]
                same = [found.state is state for found, state in zip(pools, states, strict=True)]
                assert same == [bool(repeat)] * 2
        finally:
            socket.setdefaulttimeout(None)
            logging.disable(0)
            logging.getLogger("of.a.test").setLevel(0)


def test_a_setting_of_before_is_seen_also_if_another_thread_has_seen_one_in_between() -> None:
    """The first thread has nothing new to see, and workers have the value of in between."""
    found = Settings()

    def look(timeout_s: float | None) -> object:
        socket.setdefaulttimeout(timeout_s)
        for _ in range(2):
            found.look_before(Ended())  # type: ignore[arg-type]
        (packed,) = [one for one in found.packed() if "timeout" in one.name]
        return pickle.loads(packed.values[0][0])

    try:
        first = look(71)
        with ThreadPoolExecutor(1) as other:
            between = other.submit(look, 72).result()
        assert (first, between, look(71)) == (71, 72, 71)
    finally:
        socket.setdefaulttimeout(None)
