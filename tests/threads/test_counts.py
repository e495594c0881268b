"""Whoever asks for a number of CPUs in a worker is told its share, as the table says."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from typing import TYPE_CHECKING, Literal, NamedTuple

import pytest
import support_natives as natives

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the machine is imitated on Linux")


class Question(NamedTuple):
    """A way to ask for a number of CPUs.

    Attributes:
        asked: The expression.
        told: Answer in a worker: the worker's share, which is the threads of each native pool; the
            affinity mask, which is the share if workers are pinned; or the machine.
        by: Cause of the answer, or the remedy if the answer is ``"machine"``.
        source: Documentation of the question.
    """

    asked: str
    told: Literal["share", "affinity", "machine"]
    by: str
    source: str


_OS = "os.cpu_count() is replaced in a worker, and in the fork server before it imports anything"

QUESTIONS: tuple[Question, ...] = (
    Question(asked="os.cpu_count()", told="share", by=_OS, source="Python, os.cpu_count"),
    Question(
        asked="os.process_cpu_count()",
        told="share",
        by=_OS,
        source="Python 3.13, os.process_cpu_count",
    ),
    Question(
        asked="multiprocessing.cpu_count()",
        told="share",
        by="asks os.cpu_count()",
        source="Python, multiprocessing.cpu_count",
    ),
    Question(
        asked="multiprocessing.Pool()._processes",
        told="share",
        by="asks os.cpu_count(), from 3.13 on os.process_cpu_count()",
        source="Python, multiprocessing.pool.Pool",
    ),
    Question(
        asked="concurrent.futures.ProcessPoolExecutor()._max_workers",
        told="share",
        by="asks os.cpu_count(), from 3.13 on os.process_cpu_count()",
        source="Python, concurrent.futures.ProcessPoolExecutor",
    ),
    Question(
        asked="concurrent.futures.ThreadPoolExecutor()._max_workers - 4",
        told="share",
        by="asks os.cpu_count(), from 3.13 on os.process_cpu_count(); adds 4",
        source="Python, concurrent.futures.ThreadPoolExecutor",
    ),
    Question(
        asked="joblib.cpu_count()",
        told="share",
        by="asks os.cpu_count() and LOKY_MAX_CPU_COUNT",
        source="joblib, joblib.cpu_count",
    ),
    Question(
        asked="joblib.cpu_count(only_physical_cores=True)",
        told="share",
        by="its copy of loky counts no cores",
        source="joblib, joblib.cpu_count; LightGBM's default asks so",
    ),
    Question(
        asked="loky.cpu_count()",
        told="share",
        by="asks os.cpu_count() and LOKY_MAX_CPU_COUNT",
        source="loky, README, loky.cpu_count",
    ),
    Question(
        asked="loky.cpu_count(only_physical_cores=True)",
        told="share",
        by="it counts no cores",
        source="loky, README, loky.cpu_count",
    ),
    Question(
        asked="psutil.cpu_count()",
        told="share",
        by="the function of its platform is replaced",
        source="psutil, psutil.cpu_count",
    ),
    Question(
        asked="psutil.cpu_count(logical=False)",
        told="share",
        by="the function of its platform is replaced",
        source="psutil, psutil.cpu_count",
    ),
    Question(
        asked="numexpr.detect_number_of_cores()",
        told="share",
        by="the function is replaced",
        source="NumExpr, numexpr.detect_number_of_cores",
    ),
    Question(
        asked="dask.system.CPU_COUNT",
        told="share",
        by="the number is set wherever Dask keeps it",
        source="Dask, dask.system.CPU_COUNT",
    ),
    Question(
        asked="numba.config.NUMBA_NUM_THREADS",
        told="share",
        by="NUMBA_NUM_THREADS, and the cap on Numba",
        source="Numba, Environment variables, NUMBA_NUM_THREADS",
    ),
    Question(
        asked="torch.get_num_threads()",
        told="share",
        by="OMP_NUM_THREADS, and the cap on PyTorch",
        source="PyTorch, torch.get_num_threads",
    ),
    Question(
        asked="polars.thread_pool_size()",
        told="share",
        by="POLARS_MAX_THREADS",
        source="Polars, polars.thread_pool_size",
    ),
    Question(
        asked="pyarrow.cpu_count()",
        told="share",
        by="OMP_NUM_THREADS, and the cap on Arrow",
        source="Arrow, pyarrow.cpu_count",
    ),
    Question(
        asked="len(os.sched_getaffinity(0))",
        told="affinity",
        by="left as it is: programs bind threads by it. pin_workers=True makes it the share",
        source="Python, os.sched_getaffinity; sched_getaffinity(2), nproc(1)",
    ),
    Question(
        asked="os.sysconf('SC_NPROCESSORS_ONLN')",
        told="machine",
        by="asks the C library, as native code does: a variable of its own (safepool.threads), "
        "or the library's argument for it",
        source="sysconf(3)",
    ),
    Question(
        asked="sum(line.startswith('processor') for line in open('/proc/cpuinfo'))",
        told="machine",
        by="a file of the kernel's, which no affinity changes: a variable of its own, or its "
        "argument",
        source="proc_cpuinfo(5)",
    ),
    Question(
        asked="len(set(line for line in subprocess.run(['lscpu', '-p=CPU'], capture_output=True, "
        "text=True).stdout.splitlines() if line[:1] != '#'))",
        told="machine",
        by="another program, which reads /sys: as for /proc/cpuinfo",
        source="lscpu(1)",
    ),
)

# joblib asks this program for the physical cores; a machine that seems to have 48 has 48 of them.
LSCPU = "#!/bin/sh\nfor core in $(seq 0 47); do echo $core; done\n"

PROGRAM = """
import importlib.util, json, os, sys, warnings
from concurrent.futures import ThreadPoolExecutor

def ask(questions):
    import concurrent.futures, contextlib, importlib, multiprocessing, subprocess
    warnings.simplefilter("ignore")
    found = {}
    for asked in questions:
        names = {"os": os, "multiprocessing": multiprocessing, "subprocess": subprocess}
        top = asked.partition("(")[0].split(".")
        for end in range(1, len(top)):
            with contextlib.suppress(ImportError):
                importlib.import_module(".".join(top[:end]))
        names |= {name: module for name, module in sys.modules.items() if "." not in name}
        with contextlib.ExitStack() as stack:
            if "Pool()" in asked or "Executor()" in asked:
                made, _, asked_of_it = asked.partition("()")
                pool = eval(made + "()", names)
                stack.enter_context(pool)
                found[asked] = eval("pool" + asked_of_it, {"pool": pool})
            else:
                found[asked] = eval(asked, names)
    return found

if __name__ == "__main__":
    threads, before, *questions = sys.argv[1:]
    if before == "before":
        ask(questions)
    import safepool
    told = {}
    for method in ["safepool", "loky", "spawn", "fork"]:
        with safepool.ProcessPool(1, mp_context=method, threads_per_worker=int(threads)) as pool:
            told[method] = pool.submit(ask, questions).result(200)
    print(json.dumps(told))
"""


def top(asked: str) -> str:
    return re.split(r"[.(]", asked)[0]


def can_be_asked(asked: str) -> bool:
    if asked.startswith("os.process_cpu_count"):
        return sys.version_info >= (3, 13)
    name = top(asked)
    return name in {"len", "sum"} or importlib.util.find_spec(name) is not None


# Each imports all that is installed. On a machine that has much else to do, that takes minutes.
@pytest.mark.timeout(260)
@pytest.mark.parametrize("before", ["before", "in the task"])
@pytest.mark.parametrize("threads", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_every_question_is_answered_as_the_table_says(
    threads: int, before: str, tmp_path: Path
) -> None:
    """With libraries that the program has imported before, and that a task imports."""
    fake = tmp_path / "lscpu"
    fake.write_text(LSCPU, encoding="utf-8")
    fake.chmod(0o755)
    asked = [question.asked for question in QUESTIONS if can_be_asked(question.asked)]

    by_method = natives.run(
        PROGRAM,
        folder=tmp_path,
        arguments=(str(threads), before, *asked),
        variables={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        timeout_s=240,
    )

    assert len(by_method) == 4
    many = natives.MANY if natives.shim(tmp_path.parent) else os.cpu_count()
    for method, found in by_method.items():
        assert list(found) == asked
        told = {question.asked: question.told for question in QUESTIONS if question.asked in found}
        if (method, before) == ("fork", "before"):  # whose pool has been started in the program
            told["polars.thread_pool_size()"] = "machine"
        share = {one: threads if told[one] == "share" else found[one] for one in asked}
        assert (method, found) == (method, share)
        assert found["len(os.sched_getaffinity(0))"] == many
        assert found["os.sysconf('SC_NPROCESSORS_ONLN')"] == many


def test_questions_that_were_not_asked_are_told() -> None:
    absent = {question.asked for question in QUESTIONS if not can_be_asked(question.asked)}
    if absent:
        pytest.skip(f"not installed, so not checked: {', '.join(sorted(absent))}")


LIGHTGBM = """
import json, sys
import safepool, support_natives as n

def fit(_):
    import lightgbm, numpy as np
    x = np.random.default_rng(0).normal(size=(3000, 10))
    lightgbm.LGBMRegressor(n_estimators=3, verbose=-1).fit(x, x[:, 0])
    return 0

if __name__ == "__main__":
    with safepool.ProcessPool(1, mp_context=sys.argv[1]) as pool:
        pool.submit(fit, 0).result(80)
        print(json.dumps(n.threads_of(*pool._processes)))
"""


@pytest.mark.natives
@pytest.mark.parametrize("method", natives.METHODS)
def test_lightgbm_by_default_has_the_worker_s_threads(method: str, tmp_path: Path) -> None:
    """Its default asks joblib for physical cores, and hands OpenMP the number."""
    if absent := natives.missing("lightgbm"):
        pytest.skip(f"{absent} is not installed")
    fake = tmp_path / "lscpu"
    fake.write_text(LSCPU, encoding="utf-8")
    fake.chmod(0o755)

    found = natives.run(
        LIGHTGBM,
        folder=tmp_path,
        arguments=(method,),
        variables={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )

    assert found <= 1 + natives.LIBRARIES["lightgbm"].helpers


KEEPS = """
import json
import safepool

def look(_):
    import keeps
    return [keeps.NUMBER, keeps.cpu_count(), keeps.count()]

if __name__ == "__main__":
    with safepool.ProcessPool(1, preload=["keeps"]) as pool:
        print(json.dumps(pool.submit(look, 0).result(60)))
"""


def test_a_module_that_keeps_the_function_or_its_answer(tmp_path: Path) -> None:
    """Also one that the fork server has imported, before there was a worker."""
    text = "from os import cpu_count\nfrom multiprocessing import cpu_count as count\n"
    (tmp_path / "keeps.py").write_text(f"{text}NUMBER = cpu_count()\n", encoding="utf-8")

    found = natives.run(KEEPS, folder=tmp_path)

    assert found == [1, 1, 1]


def test_the_function_itself_can_be_a_task(tmp_path: Path) -> None:
    code = (
        "import json, os, safepool\n"
        "with safepool.ProcessPool(1, threads_per_worker=3) as pool:\n"
        "    print(json.dumps(pool.submit(os.cpu_count).result(60)))\n"
    )

    assert natives.run(code, folder=tmp_path) == 3
