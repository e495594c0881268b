"""A machine that seems to have 48 CPUs, also in a group that allows few threads."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
import support_cgroups
import support_natives as natives

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    natives.missing("numpy") is not None or sys.platform != "linux",
    reason="needs Linux and NumPy",
)

ASK = """
import ctypes, json, os
libc = ctypes.CDLL(None)
mask = ctypes.create_string_buffer(1024)
written = libc.syscall(204, 0, 1024, mask) if os.uname().machine == "x86_64" else 8
print(json.dumps([
    os.cpu_count(), len(os.sched_getaffinity(0)), os.sysconf("SC_NPROCESSORS_CONF"),
    libc.get_nprocs(), libc.get_nprocs_conf(), written,
]))
"""


@pytest.fixture
def preload(tmp_path: Path) -> str:
    built = natives.shim(tmp_path.parent)
    if built is None:
        pytest.skip("no compiler to build the shim with")
    return built


@pytest.mark.usefixtures("preload")
def test_every_question_has_the_same_answer(tmp_path: Path) -> None:
    """What a library believes must not depend on how it asks."""
    assert natives.run(ASK, folder=tmp_path) == [48, 48, 48, 48, 48, 8]


@pytest.mark.usefixtures("preload")
def test_numpy_starts_48_threads_and_one_in_a_worker(tmp_path: Path) -> None:
    code = """
import json, os, safepool, support_natives as n
with safepool.ProcessPool(1) as pool:
    pool.submit(n.use, "numpy").result(60)
    inside = n.threads_of(*pool._processes)
n.use("numpy")
print(json.dumps([inside, len(os.listdir("/proc/self/task"))]))
"""
    assert natives.run(code, folder=tmp_path) == [1, 48]


ASK_BOUND = """
import json, os
os.sched_setaffinity(0, {1, 47, 99})
fork = os.fork()
print(json.dumps(sorted(os.sched_getaffinity(0)))) if not fork else os.waitpid(fork, 0)
try:
    os.sched_setaffinity(0, {48})
except OSError as error:
    print(json.dumps([sorted(os.sched_getaffinity(0)), os.cpu_count(), error.strerror]))
"""


@pytest.mark.usefixtures("preload")
def test_a_mask_that_is_set_is_remembered(tmp_path: Path) -> None:
    """Of the CPUs that there are, and by a forked child too, as the kernel does."""
    assert natives.run(ASK_BOUND, folder=tmp_path) == [[1, 47], 48, "Invalid argument"]


FEW = 30

UNCAPPED = """
import numpy as np
a = np.ones((600, 600))
print((a @ a)[0, 0])
"""

CAPPED = """
import json, safepool, support_natives as n
with safepool.ProcessPool(2) as pool:
    print(json.dumps(list(pool.map(n.use, ["numpy", "scipy"] * 4, timeout=60))))
"""


def test_few_threads_allowed_stop_numpy_but_not_a_worker(preload: str) -> None:
    """OpenBLAS that cannot start its threads interrupts its own process, or hangs."""
    environ = natives.environment(preload)
    with support_cgroups.control_group(tasks=FEW, environ=environ) as group:
        program = group.popen([sys.executable, "-c", UNCAPPED])
        try:
            program.communicate(timeout=20)
            ended_well = program.returncode == 0
        except natives.subprocess.TimeoutExpired:
            ended_well = False
        finally:
            program.kill()
            program.wait()
    assert not ended_well

    with support_cgroups.control_group(tasks=FEW, environ=environ) as group:
        # The helper modules of the tests are on the path of the programs that they start.
        found = group.run(f"import sys; sys.path[:0] = {natives.PATHS!r}\n{CAPPED}")
    assert json.loads(found) == ["numpy", "scipy"] * 4
