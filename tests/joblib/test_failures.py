"""What a parallel call costs when something dies: this call, with the reason, and nothing else."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import joblib
import pytest
import support_tasks as tasks
from joblib import Parallel, delayed
from support_cgroups import control_group
from support_processes import still_alive

import safepool
from safepool import joblib_backend, joblib_pools

if TYPE_CHECKING:
    from collections.abc import Iterator

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux leaves behind")

# One row per way a worker can end in a task: what runs there, and a word of the error.
DEATHS = {
    "SIGKILL": (tasks.be_killed, "SIGKILL"),
    "os._exit": (tasks.end_without_cleanup, "exit code"),
    "SIGSEGV": (tasks.segfault, "SIGSEGV"),
}


@pytest.mark.parametrize("return_as", ["list", "generator", "generator_unordered"])
@pytest.mark.parametrize("death", DEATHS)
def test_a_death_costs_this_call_and_not_the_next(death: str, return_as: str) -> None:
    """Whichever way the results are taken."""
    function, word = DEATHS[death]
    calls = [delayed(function)() if n == 5 else delayed(abs)(n) for n in range(20)]
    with safepool.parallel_backend(n_jobs=2):
        with pytest.raises(safepool.WorkerDiedError, match=word):
            list(Parallel(return_as=return_as)(calls))
        assert Parallel()(delayed(abs)(-n) for n in range(20)) == list(range(20))


def _be_killed_the_first_time(flag: str) -> str:
    path = Path(flag)
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def test_a_retry_brings_the_result(tmp_path: Path) -> None:
    with safepool.parallel_backend(n_jobs=2, retries=1):
        assert Parallel()(
            delayed(_be_killed_the_first_time)(str(tmp_path / str(n))) for n in range(2)
        ) == ["done", "done"]


def test_a_task_that_takes_too_long_is_ended() -> None:
    """The block's timeout is of one task; the others have their results."""
    # Not less: the others' time counts too, and a busy machine lets them wait.
    with safepool.parallel_backend(n_jobs=2, timeout=1):
        begun = time.monotonic()
        with pytest.raises(safepool.TaskTimeoutError):
            Parallel()(delayed(time.sleep)(60 if n == 2 else 0) for n in range(4))
        assert time.monotonic() - begun < 30
        assert Parallel()(delayed(abs)(-n) for n in range(4)) == [0, 1, 2, 3]


def test_a_death_under_one_thread_leaves_the_call_of_another_alone() -> None:
    """Two threads of a program that share the workers of a name."""
    import threading

    found: list[Any] = []

    def call() -> None:
        with Parallel(n_jobs=2, backend="safepool", batch_size=1) as parallel:
            found.append(parallel(delayed(tasks.sleep_and_return)(0.1, n) for n in range(10)))

    thread = threading.Thread(target=call)
    thread.start()
    try:
        with pytest.raises(safepool.WorkerDiedError):
            Parallel(n_jobs=2, backend="safepool")(delayed(tasks.be_killed)() for _ in range(2))
    finally:
        thread.join(60)
        joblib_pools.SHARED.close(end=True)
    assert found == [[*range(10)]]


@linux
def test_the_out_of_memory_killer_is_named() -> None:
    """The default backend says that a segmentation fault or memory may be the cause."""
    code = (
        "import safepool\n"
        "from joblib import Parallel, delayed\n"
        "def eat():\n"
        "    held = []\n"
        "    while True:\n"
        "        held.append(bytes(range(256)) * 4096 * 4)\n"
        "with safepool.parallel_backend(n_jobs=2):\n"
        "    try:\n"
        "        Parallel()([delayed(eat)(), delayed(abs)(-1)])\n"
        "    except safepool.WorkerDiedError as error:\n"
        "        print('out-of-memory killer' in str(error), error.oom is not None)\n"
        "    print(Parallel()(delayed(abs)(-n) for n in range(3)))\n"
    )
    with control_group(memory_bytes=300 << 20) as group:
        assert group.run(code, timeout_s=90) == "True True\n[0, 1, 2]"


# One row per way to end a program in the middle of a call: the signal, and its exit code.
ENDINGS = {
    "Ctrl-C": (signal.SIGINT, -signal.SIGINT),
    "SIGKILL": (signal.SIGKILL, -signal.SIGKILL),
}
# One row per way to say where the call runs.
PLACES = {
    "block": "safepool.parallel_backend(n_jobs=2)",
    "name": "joblib.parallel_config(backend='safepool', n_jobs=2)",
}


@linux
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("ending", ENDINGS)
def test_an_ended_program_leaves_nothing(ending: str, place: str, tmp_path: Path) -> None:
    """No process, and no file where joblib's own backend keeps its arrays."""
    code = (
        "import os, signal, time, joblib, safepool, numpy\n"
        # A shell's background job ignores SIGINT, and so does what it starts.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def work(array):\n"
        "    open(f'pid-{os.getpid()}', 'x').close()\n"
        "    time.sleep(60)\n"
        f"with {PLACES[place]}:\n"
        "    joblib.Parallel(batch_size=1)(\n"
        "        joblib.delayed(work)(numpy.ones(300_000)) for _ in range(9))\n"
    )
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    signum, exitcode = ENDINGS[ending]
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(temporary)},
    ) as program:
        try:
            deadline = time.monotonic() + 60
            while len(pids := [int(path.name[4:]) for path in tmp_path.glob("pid-*")]) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            begun = time.monotonic()
            program.send_signal(signum)
            _, said = program.communicate(timeout=30)
            took_s = time.monotonic() - begun
        finally:
            program.kill()

    assert program.returncode == exitcode
    # A tenth of a second, and not the minute of a task; here for a machine that has much else
    # to do.
    assert took_s < 20
    if ending == "Ctrl-C":
        # The program's own traceback, and none of a worker's.
        assert said.count("Traceback (most recent call last)") == 1
        assert said.rstrip().endswith("KeyboardInterrupt")
    assert still_alive(pids, after_s=5) == []
    assert list(temporary.iterdir()) == []
    assert [path for path in Path("/dev/shm").iterdir() if f"_{program.pid}_" in path.name] == []


def _fail_at_seven(n: int) -> None:
    if n == 7:
        raise KeyError(n)
    time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.usefixtures("pools_by_name")
def test_a_call_that_fails_costs_no_call_of_another_thread() -> None:
    """They share workers: the signal for a batch of one must not meet a batch of the other."""
    wrong: list[object] = []

    def fail() -> None:
        for _ in range(30):
            with pytest.raises(KeyError):
                Parallel(2, backend="safepool")(delayed(_fail_at_seven)(n) for n in range(40))

    def succeed() -> None:
        try:
            for _ in range(30):
                calls = (delayed(len)(bytes(200_000)) for _ in range(40))
                assert Parallel(2, backend="safepool")(calls) == [200_000] * 40
        except safepool.WorkerDiedError as error:
            wrong.append(error)

    threads = [threading.Thread(target=run) for run in (fail, succeed, succeed, fail)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture
def pools_by_name() -> Iterator[None]:
    """End the pools that are kept from call to call."""
    yield
    joblib_pools.SHARED.close(end=True)


@pytest.mark.usefixtures("pools_by_name")
@pytest.mark.parametrize("way", ["by name", "in a block"])
def test_a_call_may_be_the_input_of_another(way: str) -> None:
    """Its input waits for results that the same pool's thread hands out."""
    block = safepool.parallel_backend(n_jobs=2)
    with joblib.parallel_config("safepool", n_jobs=2) if way == "by name" else block:
        first = Parallel(return_as="generator")(delayed(abs)(-n) for n in range(200))
        assert Parallel()(delayed(abs)(n) for n in first) == [*range(200)]


@pytest.mark.usefixtures("pools_by_name")
def test_an_input_that_waits_holds_up_no_call_of_another_thread() -> None:
    go_on = threading.Event()

    def slow() -> Iterator[Any]:
        yield from (delayed(abs)(n) for n in range(4))
        assert go_on.wait(60)
        yield delayed(abs)(4)

    with safepool.parallel_backend(n_jobs=2):
        found: list[object] = []
        thread = threading.Thread(
            target=lambda: found.extend(
                Parallel(2, backend="safepool", pre_dispatch=2, batch_size=1)(slow())
            )
        )
        thread.start()
        try:
            for _ in range(3):
                assert Parallel(2, backend="safepool")(delayed(abs)(n) for n in range(40)) == [
                    *range(40)
                ]
                time.sleep(0.1)  # the other's first calls end meanwhile
        finally:
            go_on.set()
            thread.join(60)
    assert found == [0, 1, 2, 3, 4]


def _sleep_a_little(n: int) -> int:
    time.sleep(0.02)
    return n


@pytest.mark.usefixtures("pools_by_name")
def test_a_call_that_is_interrupted_at_its_beginning_keeps_no_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Joblib does not end it: the next one, of another size, would need a pool more."""
    configure = joblib_backend.SafepoolBackend._configure

    def interrupted(*args: Any, **options: Any) -> int:
        configure(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(joblib_backend.SafepoolBackend, "_configure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Parallel(2, backend="safepool")([delayed(abs)(-1)] * 4)
    gc.collect()
    Parallel(3, backend="safepool")([delayed(abs)(-1)] * 4)
    assert len(joblib_pools.SHARED._leases) == 1


@pytest.mark.parametrize("return_as", ["list", "generator", "generator_unordered"])
def test_an_input_that_raises_before_anything_was_sent_is_heard(return_as: str) -> None:
    """Joblib's own backends return nothing, and no error."""

    def inputs() -> Iterator[Any]:
        yield from ()
        raise KeyError("input")

    with safepool.parallel_backend(n_jobs=2):
        with pytest.raises(KeyError, match="input"):
            list(Parallel(pre_dispatch="all", return_as=return_as)(inputs()))
        assert Parallel()(delayed(abs)(-n) for n in range(9)) == [*range(9)]


@pytest.mark.filterwarnings("ignore:.*tasks:UserWarning")  # of what was not read
def test_calls_that_a_failed_call_has_not_sent_are_not_the_nexts() -> None:
    """Joblib takes the input by so many batches as there are workers, and keeps those not sent."""
    with safepool.parallel_backend(n_jobs=2):
        listed, generated = Parallel(), Parallel(return_as="generator")
        for _ in range(5):
            with pytest.raises(safepool.WorkerDiedError):
                listed(delayed(tasks.be_killed_with if n == 3 else abs)(n) for n in range(10))
            assert listed(delayed(abs)(n) for n in range(10)) == [*range(10)]
            results = generated(delayed(_sleep_a_little)(n) for n in range(10))
            next(results)
            results.close()
            assert [*generated(delayed(abs)(n) for n in range(10))] == [*range(10)]


def test_batches_of_a_call_that_failed_do_not_fail_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed with their call, they end while the same object begins another."""
    reset = Parallel._reset_run_tracking

    def reset_slowly(self: Any) -> None:
        reset(self)
        time.sleep(0.1)  # joblib gives the new call its number after this

    def inputs(until: int) -> Iterator[Any]:
        yield from (delayed(_sleep_a_little)(n) for n in range(until))
        raise KeyError(until)

    monkeypatch.setattr(Parallel, "_reset_run_tracking", reset_slowly)
    with safepool.parallel_backend(n_jobs=2), Parallel(n_jobs=2, batch_size=1) as parallel:
        for until in (7, 9) * 3:
            with pytest.raises(KeyError, match=str(until)):
                parallel(inputs(until))


class _WithBadBar(Parallel):  # type: ignore[misc]  # joblib is untyped
    def print_progress(self) -> None:
        if self.n_completed_tasks:
            raise OSError("the bar")


@pytest.mark.parametrize("return_as", ["list", "generator", "generator_unordered"])
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_call_whose_input_ends_the_program_ends(error: type, return_as: str) -> None:
    """It is raised in a thread of ours. Joblib's own backend returns what was there before."""

    def inputs() -> Iterator[Any]:
        yield from (delayed(_sleep_a_little)(n) for n in range(9))
        raise error

    with safepool.parallel_backend(n_jobs=2):
        with pytest.raises(error):
            list(Parallel(return_as=return_as)(inputs()))
        with pytest.raises(OSError, match="the bar"):
            list(_WithBadBar(return_as=return_as)(delayed(_sleep_a_little)(n) for n in range(9)))
        assert Parallel()(delayed(abs)(-n) for n in range(9)) == [*range(9)]


def test_where_the_system_gives_no_further_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "safepool-joblib":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with safepool.parallel_backend(n_jobs=2):
        assert Parallel(n_jobs=2)(delayed(abs)(-n) for n in range(50)) == [*range(50)]
