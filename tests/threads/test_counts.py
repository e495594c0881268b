"""Whoever asks for a number of CPUs in a worker is told its share, as the table says."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from typing import TYPE_CHECKING

import pytest
import support_natives as natives

from safepool.threads.counts import QUESTIONS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the machine is imitated on Linux")

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
@pytest.mark.parametrize("threads", [1, 3])
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
