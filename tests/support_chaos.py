"""Chaos: a program that uses pools in rounds, while everything around them is harmed.

``python tests/support_chaos.py --seed 7 --seconds 60`` runs rounds of that seed until the time is
over, and ``--round 12`` that one alone. What a round does is drawn from its seed and its number:
the options of its pool, what each of its threads calls, what is harmed meanwhile, and how the
pool ends. The moments are the machine's. Afterwards every call is accounted for:

* it has the right value, or an error that something in this round accounts for;
* workers have written down that it began, at most once and once more for each retry; never when
  it was cancelled in time;
* nothing is left: no process, descriptor, thread, name or memory file (``leaks.py``).

With root, rounds run in a control group, whose limits are changed. Linux only.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import errno
import faulthandler
import gc
import json
import logging
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import leaks
from support_cgroups import ControlGroup, control_group, without_control_groups
from support_inside import ready_pids
from support_tasks import append_line

from safepool import ProcessPool
from safepool.pool.core.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Future

GROUP_BYTES = 400 << 20
# On a machine with much to do, a worker may need so long before it is of use.
MOST_HARM_S = 5.0
# Few enough to be used up quickly.
DESCRIPTORS = 400
# A round takes a second or two; on a machine with too much to do, a minute. This is a hang.
ROUND_LIMIT_S = 300.0

_VALUE, _RAISED, _DIED = "value", "ValueError", "WorkerDiedError"
_OVERTIME, _UNPICKLABLE = "TaskTimeoutError", "TypeError"

# One row per thing that a call does after it has signed the log, and how it ends then.
KINDS: dict[str, str] = {
    "quick": _VALUE,
    "slow": _VALUE,
    "large argument": _VALUE,
    "large result": _VALUE,
    "forking": _VALUE,
    "raising": _RAISED,
    "unpicklable": _UNPICKLABLE,
    "killed": _DIED,
    "exiting": _DIED,
    "eating": _DIED,
    "overtime": _OVERTIME,
    # Ended by cancelling, or when all is over: nobody waits for it before.
    "endless": _VALUE,
}
# How often each is drawn.
WEIGHTS = (12, 6, 3, 3, 2, 3, 1, 1, 1, 1, 1, 0)

# One row per harm, and the errors of any call that it accounts for.
HARMS: dict[str, frozenset[str]] = {
    # So many of them in a row before one was of use break the pool.
    "kill workers": frozenset({_DIED, "PoolBrokenError"}),
    "kill the server": frozenset({_DIED}),
    "stop workers": frozenset(),
    "stop the server": frozenset(),
    "resize": frozenset(),
    "quota": frozenset(),
    "memory": frozenset({_DIED, "MemoryError"}),
    "descriptors": frozenset({"no room"}),
    "processes": frozenset({"no room", _DIED}),
    "fork": frozenset(),
    "signals": frozenset(),
    "nothing": frozenset(),
}
IN_A_GROUP = frozenset({"quota", "memory", "processes"})

# One row per way in which the pool ends, and the errors of any call that it accounts for.
ENDINGS: dict[str, frozenset[str]] = {
    "shutdown": frozenset(),
    "dropped": frozenset(),
    "cancelling": frozenset({"CancelledError"}),
    "by a callback": frozenset({"CancelledError"}),
    "terminated": frozenset({"CancelledError", _DIED}),
    "killed": frozenset({"CancelledError", _DIED}),
    "interrupted": frozenset({"CancelledError", _DIED}),
}


class Block(bytearray):
    """Bytes whose memory is handed out beside the pickle, as that of an array."""

    def __reduce_ex__(self, _protocol: object) -> Any:
        return type(self), (pickle.PickleBuffer(self),)


def work(log: str, number: int, kind: str, argument: Any = None) -> Any:  # noqa: C901, PLR0912 -- a table
    """Sign the log and do what the kind says; the value is the number, and what came with it."""
    append_line(log, number)
    match kind:
        case "slow":
            time.sleep(number % 7 * 0.005)
        case "large argument":
            return number, len(argument), argument[0], argument[-1]
        case "large result":
            return number, Block([number % 256]) * (1_000_000 if number % 2 else 100_000)
        case "forking":
            pid = os.fork()
            if not pid:
                os._exit(0)
            os.waitpid(pid, 0)
        case "raising":
            raise ValueError(number)
        case "unpicklable":
            return threading.Lock()
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exiting":
            os._exit(3)
        case "eating":
            held = []
            while True:
                held.append(b"x" * (4 << 20))
        case "endless":
            while not os.path.exists(f"{log}-over"):
                time.sleep(0.01)
    return number


def overtime(log: str, number: int, _kind: str, _argument: Any = None) -> Any:
    """Sign the log, and take longer than the policy below allows."""
    append_line(log, number)
    while True:
        time.sleep(60)


Policy(timeout_s=0.2).attach(overtime)


def value_of(number: int, kind: str, argument: Any) -> Any:
    """Return what such a call returns."""
    if kind == "large argument":
        return number, len(argument), argument[0], argument[-1]
    if kind == "large result":
        return number, Block([number % 256]) * (1_000_000 if number % 2 else 100_000)
    return number


@dataclass(slots=True)
class Call:
    """One call, and what became of it.

    Attributes:
        number: What it signs the log with.
        kind: One of `KINDS`.
        argument: What it takes beside.
        future: Its future, if it has one.
        asked: Whether somebody has tried to cancel it.
        never: It was cancelled before it began.
        outcome: How it ended, one word; empty if nobody has waited for that.
        told: What it returned or raised.
    """

    number: int
    kind: str
    argument: Any = None
    future: Future[Any] | None = None
    asked: bool = False
    never: bool = False
    outcome: str = ""
    told: object = None

    def settle(self, told: object) -> None:
        self.told = told
        self.outcome = _word_for(told) if isinstance(told, BaseException) else _VALUE


def _word_for(error: BaseException) -> str:
    room = {errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM}
    if isinstance(error, OSError) and error.errno in room:
        return "no room"
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return "no room"
    if isinstance(error, MemoryError):
        return "MemoryError"
    if isinstance(error, pickle.PicklingError):
        return _UNPICKLABLE
    return type(error).__name__


def _text_of(error: object) -> str:
    assert isinstance(error, BaseException)
    return "".join(traceback.format_exception(error))


def _is_refusal(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and "after shutdown" in str(error)


@dataclass(slots=True)
class Round:
    """One pool, from its making to its end."""

    seed: str
    number: int
    folder: Path
    group: ControlGroup | None
    rng: random.Random = field(init=False)
    calls: list[Call] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    ended: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    options: dict[str, Any] = field(init=False)
    harms: list[str] = field(init=False)
    ending: str = field(init=False)
    actors: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.seed}/{self.number}")
        draw = self.rng.choice
        self.options = {
            "max_workers": draw([1, 2, 3, None]),
            "retries": draw([0, 0, 1, 2]),
            "max_tasks_per_child": draw([None, None, None, 1, 7]),
            "memory_limit": draw([None, None, None, "150MiB"]),
            "end_subprocesses": draw([False, False, False, True]),
            "trace": draw([None, None, None, str(self.folder / f"trace-{self.number}.json")]),
        }
        possible = [name for name in HARMS if self.group or name not in IN_A_GROUP]
        self.harms = self.rng.sample(possible, draw([1, 1, 2, 3]))
        self.ending = self.rng.choices([*ENDINGS], (6, 1, 2, 2, 1, 1, 2))[0]
        self.actors = [draw(["submits", "maps", "cancels"]) for _ in range(draw([1, 2, 2, 3]))]

    @property
    def log(self) -> str:
        return str(self.folder / f"log-{self.number}")

    @property
    def retries(self) -> int:
        retries = self.options["retries"]
        assert isinstance(retries, int)
        return retries

    def __str__(self) -> str:
        said = ", ".join(f"{k}={v!r}" for k, v in self.options.items() if v)
        again = replay(self.seed, self.number)
        return f"{again}: {self.actors}, harmed by {self.harms}, ends {self.ending}; {said}"

    def run(self) -> list[str]:
        """Run it; return what was wrong."""
        # A name of the folder that is there before and after.
        Path(self.log).touch()
        before = leaks.take_snapshot()
        self._use()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.log}-over")
        self._account()
        self.calls.clear()
        gc.collect()
        if module := sys.modules.get("safepool.workers.forkserver"):
            # Where many were killed in a row, each worker is started afresh from then on.
            module.stop_all()
        trace = self.options["trace"]
        before = dataclasses.replace(before, names=before.names | {Path(trace or self.log)})
        self.faults += [f"left behind: {leak.what}" for leak in leaks.left_since(before)]
        if trace:
            json.loads(Path(trace).read_text("utf-8"))
        return self.faults

    def fault(self, text: str) -> None:
        with self._lock:
            self.faults.append(text)

    # --- what it does ---------------------------------------------------------------------

    def _use(self) -> None:
        pool: ProcessPool | None = ProcessPool(**self.options)
        assert pool is not None
        gate, over, interrupt = threading.Event(), threading.Event(), threading.Event()
        threads = [
            threading.Thread(
                target=self._guarded, args=(gate, getattr(self, f"_{actor}"), pool, rng)
            )
            for actor in self.actors
            for rng in [random.Random(self.rng.random())]
        ]
        harmers = [
            threading.Thread(target=self._guarded, args=(gate, _HARM[harm], self, pool, over, rng))
            for harm in self.harms
            for rng in [random.Random(self.rng.random())]
            if harm in _HARM
        ]
        pause_s = self.rng.uniform(0, 0.1)
        if self.ending == "interrupted":
            harmers.append(
                threading.Thread(target=self._guarded, args=(gate, _interrupt, interrupt, pause_s))
            )
        with _timer_signals() if "signals" in self.harms else contextlib.nullcontext():
            for thread in threads + harmers:
                thread.start()
            gate.set()  # a harm may let no thread start
            try:
                self._end(pool, threads, interrupt)
                pool = None
                self._say_over()
                for call in self.calls:
                    self._await(call)
            finally:
                over.set()
                interrupt.set()
                self._say_over()
                for thread in threads + harmers:
                    thread.join()
            # Callbacks may have made more while they ended.
            for call in self.calls:
                self._await(call)
            # The pool is theirs alone now.
            threads.clear()
            harmers.clear()

    def _say_over(self) -> None:
        """Let endless calls end."""
        _persist(Path(f"{self.log}-over").touch)

    def _guarded(self, gate: threading.Event, run: Callable[..., None], *arguments: Any) -> None:
        gate.wait()
        try:
            run(*arguments)
        except BaseException as error:
            self.fault("".join(traceback.format_exception(error)))

    def _end(
        self, pool: ProcessPool, threads: list[threading.Thread], interrupt: threading.Event
    ) -> None:
        if self.ending in ("shutdown", "dropped", "by a callback"):
            for thread in threads:
                thread.join()
        else:
            time.sleep(self.rng.uniform(0, 0.5))
        self._say_over()
        self.ended = self.ending != "dropped"
        match self.ending:
            case "dropped":
                return
            case "by a callback":
                self._end_by_a_callback(pool)
            case "terminated":
                pool.terminate_workers()
            case "killed":
                pool.kill_workers()
            case "interrupted":
                with contextlib.suppress(KeyboardInterrupt), pool:
                    interrupt.set()
                    # Not once: a signal just before a sleep begins does not end that.
                    while True:
                        time.sleep(0.05)
                return
        pool.shutdown(cancel_futures=self.ending == "cancelling")

    def _end_by_a_callback(self, pool: ProcessPool) -> None:
        done = threading.Event()

        def shut_down(_future: object) -> None:
            pool.shutdown(wait=False, cancel_futures=True)
            done.set()

        call = self._submit(pool, self.rng, "quick")
        if call and call.future:
            call.future.add_done_callback(shut_down)
            done.wait(ROUND_LIMIT_S)

    def _await(self, call: Call) -> None:
        if call.future is None or call.outcome:
            return
        try:
            call.settle(call.future.result(ROUND_LIMIT_S))
        except BaseException as error:
            call.settle(error)

    def _new(self, rng: random.Random, kind: str = "") -> Call:
        kinds = [*KINDS]
        kind = kind or rng.choices(kinds, WEIGHTS)[0]
        if kind == "eating" and not (self.group or self.options["memory_limit"]):
            kind = "quick"
        argument = None
        if kind == "large argument":
            argument = Block(rng.choice([100_000, 1_000_000, 4_000_000]))
            argument[0], argument[-1] = rng.randrange(256), rng.randrange(256)
        with self._lock:
            call = Call(len(self.calls), kind, argument)
            self.calls.append(call)
        return call

    def _submit(self, pool: ProcessPool, rng: random.Random, kind: str = "") -> Call | None:
        call = self._new(rng, kind)
        function = overtime if call.kind == "overtime" else work
        try:
            call.future = pool.submit(function, self.log, call.number, call.kind, call.argument)
        except Exception as error:
            if _is_refusal(error) and self.ended:
                call.never, call.outcome = True, "refused"
            else:
                call.settle(error)
        return call

    def _submits(self, pool: ProcessPool, rng: random.Random) -> None:
        for _ in range(rng.randrange(5, 40)):
            call = self._submit(pool, rng)
            if call is None or call.future is None:
                return
            if rng.random() < 0.1:
                call.future.add_done_callback(lambda _: self._submit(pool, rng, "quick") and None)
            if rng.random() < 0.3:
                self._await(call)

    def _cancels(self, pool: ProcessPool, rng: random.Random) -> None:
        calls = []
        for _ in range(rng.randrange(5, 30)):
            call = self._submit(pool, rng, rng.choice(["", "", "endless"]))
            if call is None or call.future is None:
                return
            calls.append(call)
            if rng.random() < 0.6:
                one, kill = rng.choice(calls), rng.random() < 0.5
                assert one.future is not None
                one.asked = True
                began = one.future.running() or one.future.done()
                if pool.cancel(one.future, kill=kill) and not kill and not began:
                    one.never = not self.retries
            time.sleep(rng.random() * 0.01)
        for call in calls:
            if call.kind == "endless":
                assert call.future is not None
                call.asked = True
                pool.cancel(call.future, kill=True)

    def _maps(self, pool: ProcessPool, rng: random.Random) -> None:
        each = self.options["max_tasks_per_child"] == 1  # has a worker of its own
        for _ in range(rng.randrange(1, 4)):
            ordered, errors = rng.random() < 0.6, rng.random() < 0.6
            kinds = ["quick", "slow", "large argument", "large result", "raising", "killed"]
            calls = [
                self._new(rng, rng.choices(kinds, (30, 10, 2, 2, errors, errors))[0])
                for _ in range(rng.choice([3, 20 if each else 40, 20 if each else 300]))
            ]
            options: dict[str, Any] = {"ordered": ordered, "return_exceptions": errors}
            if rng.random() < 0.5:
                options["buffersize"] = rng.choice([1, 10])
            try:
                results = pool.map(
                    work,
                    [self.log] * len(calls),
                    [call.number for call in calls],
                    [call.kind for call in calls],
                    [call.argument for call in calls],
                    chunksize=rng.choice([1, 1, 5]),
                    **options,
                )
                self._take(results, calls, ordered=ordered, stop=rng.choice([0, 0, 0, 20]))
            except Exception as error:
                if _is_refusal(error) and self.ended:
                    return
                # Whichever call's it is.
                if _word_for(error) not in self._of_any() | {KINDS[one.kind] for one in calls}:
                    self.fault(f"a map ended by {_text_of(error)}")
                return

    def _take(
        self, results: Iterator[Any], calls: list[Call], *, ordered: bool, stop: int
    ) -> None:
        by_number = {call.number: call for call in calls}
        taken = 0
        for told in results:
            taken += 1
            if isinstance(told, BaseException):
                if ordered and not (_is_refusal(told) and self.ended):
                    calls[taken - 1].settle(told)
                elif _is_refusal(told) and self.ended:
                    pass
                elif _word_for(told) not in self._of_any() | {_RAISED, _DIED}:
                    self.fault(f"a map yielded {told!r}")
            else:
                number = told[0] if isinstance(told, tuple) else told
                if ordered and calls[taken - 1].number != number:
                    self.fault(f"a map yielded {number} for {calls[taken - 1].number}")
                if by_number[number].outcome:
                    self.fault(f"a map yielded {number} twice")
                by_number[number].settle(told)
            if taken == stop:
                results.close()  # type: ignore[attr-defined]
                return
        if taken != len(calls):
            self.fault(f"a map of {len(calls)} yielded {taken}")

    # --- what must hold afterwards --------------------------------------------------------

    def _of_any(self) -> frozenset[str]:
        """Return the errors of any call that something in this round accounts for."""
        found = ENDINGS[self.ending]
        for harm in self.harms:
            found |= HARMS[harm]
        if "no room" in found:
            found |= {"PoolBrokenError"}
        if self.group and any(call.kind == "eating" for call in self.calls):
            # The group's limit holds for all of them; the kernel takes the largest.
            found |= {_DIED, "MemoryError"}
        return found

    def _accounted(self, call: Call) -> frozenset[str]:
        found = self._of_any() | {KINDS[call.kind]}
        if call.asked:
            found |= {"CancelledError"}
        return found

    def _account(self) -> None:
        begun = collections.Counter(map(int, Path(self.log).read_text().split()))
        for call in self.calls:
            name = f"call {call.number} ({call.kind})"
            if call.future is not None and not call.outcome:
                self.fault(f"{name} has no outcome")
            if isinstance(call.told, RuntimeError) and _is_refusal(call.told) and self.ended:
                # It came while the pool's thread ended.
                call.never, call.outcome = True, "refused"
            if call.outcome not in {"", "refused"} | self._accounted(call):
                self.fault(f"{name} ended with {_text_of(call.told)}")
            if call.outcome == _VALUE and call.told != value_of(
                call.number, call.kind, call.argument
            ):
                self.fault(f"{name} returned {call.told!r:.200}")
            if call.outcome == _VALUE and not begun[call.number]:
                self.fault(f"{name} has a value and never began")
            if begun[call.number] > 1 + self.retries:
                self.fault(f"{name} began {begun[call.number]} times")
            if call.never and begun[call.number]:
                self.fault(f"{name} began, after it was cancelled or refused")
            unsent = getattr(call.told, "begun", True) is False
            if unsent and begun[call.number] and not self.retries:
                self.fault(f"{name} began, and its error says that it did not: {call.told}")


# Takes so much memory until its input ends. The kernel may choose this, or a worker.
_TAKER = """
import sys
open("/proc/self/oom_score_adj", "w").write(sys.argv[2])
held = []
for _ in range(int(sys.argv[1]) >> 20):
    held.append(b"x" * (1 << 20))
sys.stdin.read()
"""

# --- the harms -------------------------------------------------------------------------------


def _moments(over: threading.Event, rng: random.Random, most_s: float) -> Iterable[None]:
    """Yield now and then until the round is over, but not for ever: it is to make headway."""
    for _ in range(round(MOST_HARM_S / most_s)):
        if over.wait(rng.uniform(0.0, most_s)):
            return
        yield


def _ready(pool: ProcessPool) -> list[int]:
    # Only those that have begun to work: three in a row that have not break the pool.
    return ready_pids(pool)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _servers() -> list[int]:
    module = sys.modules.get("safepool.workers.forkserver")
    return [] if module is None else [*module.running(), *module.keepers()]


def _kill_workers(
    _round: Round, pool: ProcessPool, over: threading.Event, rng: random.Random
) -> None:
    for _ in _moments(over, rng, 0.1):
        if ready := _ready(pool):
            number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
            _signal(rng.choice(ready), number)


def _kill_the_server(
    _round: Round, _pool: ProcessPool, over: threading.Event, rng: random.Random
) -> None:
    for _ in _moments(over, rng, 1.0):
        if servers := _servers():
            _signal(rng.choice(servers), signal.SIGKILL)


def _stop_workers(
    _round: Round, pool: ProcessPool, over: threading.Event, rng: random.Random
) -> None:
    for _ in _moments(over, rng, 0.1):
        if ready := _ready(pool):
            _pause(rng.choice(ready), over, rng)


def _stop_the_server(
    _round: Round, _pool: ProcessPool, over: threading.Event, rng: random.Random
) -> None:
    for _ in _moments(over, rng, 0.3):
        if servers := _servers():
            _pause(rng.choice(servers), over, rng)


def _pause(pid: int, over: threading.Event, rng: random.Random) -> None:
    _signal(pid, signal.SIGSTOP)
    over.wait(rng.uniform(0.0, 0.1))
    _signal(pid, signal.SIGCONT)


def _interrupt(asked: threading.Event, pause_s: float) -> None:
    asked.wait()
    time.sleep(pause_s)
    os.kill(os.getpid(), signal.SIGINT)


def _resize(_round: Round, pool: ProcessPool, over: threading.Event, rng: random.Random) -> None:
    for _ in _moments(over, rng, 0.1):
        pool.resize(rng.randrange(1, 5))


def _persist(deed: Callable[[], object]) -> None:
    """Do it; while descriptors are used up, try again."""
    while True:
        try:
            deed()
        except OSError:
            time.sleep(0.01)
        else:
            return


def _quota(a_round: Round, _pool: ProcessPool, over: threading.Event, rng: random.Random) -> None:
    group = a_round.group
    assert group is not None
    for _ in _moments(over, rng, 0.5):
        cpus = rng.choice([0.5, 1.0, 1.5, 2.0])
        _persist(lambda: group.set_cpus(cpus))  # noqa: B023 -- called before the next
    _persist(lambda: group.set_cpus(None))


def _memory(a_round: Round, _pool: ProcessPool, over: threading.Event, rng: random.Random) -> None:
    """Let a program beside the pool take most of the memory, and give it back."""
    assert a_round.group is not None
    for _ in _moments(over, rng, 0.5):
        size_bytes = rng.randrange(GROUP_BYTES // 2, GROUP_BYTES)
        command = [sys.executable, "-c", _TAKER, str(size_bytes), rng.choice(["300", "1000"])]
        try:
            taker = subprocess.Popen(command, stdin=subprocess.PIPE)
        except OSError:
            continue
        over.wait(rng.uniform(0.0, 0.5))
        taker.communicate()


def _processes(
    a_round: Round, _pool: ProcessPool, over: threading.Event, rng: random.Random
) -> None:
    group = a_round.group
    assert group is not None
    for _ in _moments(over, rng, 0.4):
        more = rng.randrange(2)
        _persist(lambda: group.set_tasks(group.tasks() + more))  # noqa: B023 -- as above
        over.wait(rng.uniform(0.0, 0.2))
        _persist(lambda: group.set_tasks(None))


def _descriptors(
    _round: Round, _pool: ProcessPool, over: threading.Event, rng: random.Random
) -> None:
    for _ in _moments(over, rng, 0.3):
        held: list[int] = []
        try:
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
            for _ in range(rng.randrange(6)):
                os.close(held.pop())
            over.wait(rng.uniform(0.0, 0.1))
        finally:
            for descriptor in held:
                os.close(descriptor)


def _fork(_round: Round, _pool: ProcessPool, over: threading.Event, rng: random.Random) -> None:
    for _ in _moments(over, rng, 0.2):
        pause_s = rng.choice([0.0, 0.05, 0.3])
        try:
            pid = os.fork()
        except OSError:
            continue
        if pid == 0:
            time.sleep(pause_s)
            os._exit(0)
        os.waitpid(pid, 0)


_HARM: dict[str, Callable[[Round, ProcessPool, threading.Event, random.Random], None]] = {
    "kill workers": _kill_workers,
    "kill the server": _kill_the_server,
    "stop workers": _stop_workers,
    "stop the server": _stop_the_server,
    "resize": _resize,
    "quota": _quota,
    "memory": _memory,
    "descriptors": _descriptors,
    "processes": _processes,
    "fork": _fork,
}


@contextlib.contextmanager
def _timer_signals() -> Iterator[None]:
    """Interrupt system calls of this process all the time."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- the program -----------------------------------------------------------------------------


def replay(seed: str, number: int) -> str:
    """Return the command that runs one round again."""
    return f"python tests/support_chaos.py --seed {seed} --round {number}"


def chaos(
    seed: str, seconds: float, only: int | None = None, *, output: int | None = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    """Run rounds in a process of their own, in a control group where one can be made."""
    with contextlib.ExitStack() as stack:
        command = [sys.executable, __file__, "--seed", seed, "--seconds", str(seconds)]
        if only is not None:
            command += ["--round", str(only)]
        described = ""
        if without_control_groups() is None:
            group = stack.enter_context(control_group(memory_bytes=GROUP_BYTES, tasks=4_000))
            folders = {name: str(path) for name, path in group.directories.items()}
            described = json.dumps([group.version, folders])
            command = group.command(command)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="safepool-chaos-"))
        path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
        own = {"SAFEPOOL_CHAOS_GROUP": described, "TMPDIR": folder, "PYTHONPATH": path}
        return subprocess.run(
            [*command, "--inside"],
            env={**os.environ, **own},
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            check=False,
        )


def _rounds(seed: str, seconds: float, only: int | None) -> int:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, hard))
    # A shell's job in the background inherits that it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads, Python 3.12
    os.environ[leaks.MARK_VARIABLE] = f"{os.environ.get(leaks.MARK_VARIABLE, '')} {leaks.MARK}"
    described = os.environ.get("SAFEPOOL_CHAOS_GROUP")
    group = None
    if described:
        version, folders = json.loads(described)
        directories = {name: Path(folder) for name, folder in folders.items()}
        group = ControlGroup(version=version, directories=directories)
    folder = Path(tempfile.gettempdir())
    logging.basicConfig(level=logging.INFO)
    with ProcessPool(1) as pool:  # what is made once stays
        pool.submit(abs, -1).result()
    done: collections.Counter[str] = collections.Counter()
    deadline = time.monotonic() + seconds
    number = 0 if only is None else only
    while True:
        a_round = Round(seed, number, folder, group)
        print(a_round, flush=True)
        faulthandler.dump_traceback_later(ROUND_LIMIT_S, exit=True)
        faults = a_round.run()
        faulthandler.cancel_dump_traceback_later()
        if faults:
            print(*faults, sep="\n", flush=True)
            return 1
        done.update([*a_round.harms, a_round.ending, *a_round.actors])
        number += 1
        if only is not None or time.monotonic() > deadline:
            break
    if group:
        done["killed by the kernel"] = group.oom_kills()
    print(f"seed {seed}: nothing wrong. {dict(done)}", flush=True)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the program; the exit code is 1 if something was wrong."""
    parser = argparse.ArgumentParser(description="Uses pools while everything is harmed.")
    parser.add_argument("--seed", default=str(time.time_ns()))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--round", type=int)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    said = parser.parse_args(arguments)
    if said.inside:
        return _rounds(said.seed, said.seconds, said.round)
    return chaos(said.seed, said.seconds, said.round, output=None).returncode


if __name__ == "__main__":
    # Workers find its functions by the module's name.
    from support_chaos import main as _main

    sys.exit(_main())
