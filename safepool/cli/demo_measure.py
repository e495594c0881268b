"""Floor 7: run one half of the demo in a child process and measure it from outside.

It starts the child, reads its messages (``demo_half`` lists them), counts the workers'
threads while they work, reads what the kernel throttled, and ends the child when its time
is up. It compares nothing and prints nothing.

The measuring process stays outside the demo's control group: whatever that is put through,
the clock and the counting here go on.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeAlias

import safepool
from safepool.cli.demo_processes import count_threads, end_tree, undisturbed
from safepool.errors import describe_exit
from safepool.limits import read_throttling

if TYPE_CHECKING:
    from collections.abc import Mapping

    from safepool.cli.demo_group import QuotaGroup
    from safepool.limits import Throttling

__all__ = ["POOLS", "Half", "measure"]

_Lines: TypeAlias = "queue.SimpleQueue[str | None]"

POOLS = {
    "standard": "ProcessPoolExecutor()",
    "safepool": "safepool.ProcessPool()",
}
"""The two halves of the demo, in their order: name for the child, and for people."""

# 20 ms: some dozens of readings even of a fast batch, and under 1 % of a CPU for the counting.
_SAMPLE_S = 0.02

# SciPy's import alone takes seconds at half a CPU; a start that takes longer has failed.
_START_WITHIN_S = 120.0

# How long a child may take to shut its pool down; that is not part of what is measured.
_LEAVE_WITHIN_S = 10.0

# Runs first in the child. It joins the group before anything else, so that imports and
# workers are inside too. If memory runs out, the kernel is to take one of the demo's processes
# and nobody else's (proc_pid_oom_score_adj(5)). The interpreter it came from is the caller's own.
# The package's folder goes last: it must not shadow anything, and is only needed where the
# caller's path was changed by hand.
_BOOTSTRAP = """\
import sys
members_file, folder = sys.argv[1:3]
del sys.argv[1:3]
if members_file:
    with open(members_file, "w") as file:
        file.write("0")
try:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
except OSError:
    pass
if folder not in sys.path:
    sys.path.append(folder)
import runpy
runpy.run_module("safepool.cli.demo_half", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Half:
    """Measurements of one pool on the batch.

    Attributes:
        pool: The call that made the pool, word for word.
        start_method: The default start method of ``multiprocessing`` here.
        workers: Most worker processes alive at once; ``None`` if none was seen.
        threads: Most native threads in all workers together, counted from outside; ``None``
            where the system does not list them.
        seconds: From making the pool to the last result; the bound, if it was cut off;
            ``None`` if it ended with an error.
        tasks_done: Results that had arrived by then.
        cut_off: Whether the half was ended because its time was up.
        error: The last line of a child that ended early.
        throttling: Number of times that the kernel froze the group between the end of the child's
            imports and the last result; ``None`` if there is no quota or the kernel does not
            tell.
    """

    pool: str
    start_method: str | None
    workers: int | None
    threads: int | None
    seconds: float | None
    tasks_done: int
    cut_off: bool
    error: str | None
    throttling: Throttling | None


def measure(
    name: str,
    *,
    tasks: int,
    points: int,
    bound_s: float,
    results_file: Path,
    group: QuotaGroup | None,
    variables: Mapping[str, str] | None = None,
) -> Half:
    """Run one half and wait for its end.

    Args:
        name: A key of ``POOLS``.
        tasks: Number of tasks.
        points: Size of each.
        bound_s: Seconds after which the half is cut off, counted from the end of its imports.
        results_file: A ``.npy`` file for the child to make; ``demo_half`` says what is in it.
        group: The control group to run it in; ``None`` for this process's own.
        variables: Added to its environment.

    Returns:
        The measurement. No process of the half is left.
    """
    arguments = [name, str(tasks), str(points), str(results_file)]
    watch = _Watch(bound_s=bound_s, group=group)
    with results_file.with_suffix(".stderr").open("w+", errors="replace") as stderr:
        _run(arguments, watch=watch, group=group, stderr=stderr, variables=variables or {})
        stderr.seek(0)
        said = stderr.read().strip().splitlines()
    error = None
    if not watch.cut_off and watch.seconds is None:
        error = said[-1] if said else watch.ending
    return Half(
        pool=POOLS[name],
        start_method=watch.start_method,
        workers=watch.workers,
        threads=watch.threads,
        seconds=bound_s if watch.cut_off else watch.seconds,
        tasks_done=watch.tasks_done,
        cut_off=watch.cut_off,
        error=error,
        throttling=watch.throttling,
    )


def _run(
    arguments: list[str],
    *,
    watch: _Watch,
    group: QuotaGroup | None,
    stderr: IO[str],
    variables: Mapping[str, str],
) -> None:
    """Start a child, watch it to its end, and leave nothing of it behind."""
    folder = Path(safepool.__file__).parent.parent
    members_file = "" if group is None else str(group.members_file)
    # -P: a random.py that lies where the user happens to be must not be imported.
    command = [sys.executable, "-P", "-c", _BOOTSTRAP, members_file, str(folder), *arguments]
    child = reader = None
    try:
        # Else the environment is the caller's, word for word: no thread variable is touched.
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, **variables} if variables else None,
            # A process group of its own, that can be ended as one, and that the terminal's
            # Ctrl-C does not reach: whoever measures ends it.
            start_new_session=True,
        )
        # Read in a thread, so that waiting for a line can stop for a look at the workers.
        lines: _Lines = queue.SimpleQueue()
        reader = threading.Thread(target=_read_lines, args=(child.stdout, lines), daemon=True)
        try:
            reader.start()
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, f"no further thread: {error}") from error
        watch.follow(child, lines)
        if not watch.cut_off:
            _let_go(child)
            watch.ending = watch.ending or describe_exit(child.returncode)
    finally:
        with undisturbed():
            if child is not None:
                end_tree(child)
                _close(child.stdin)
            if reader is not None and reader.ident is not None:
                # It closes the pipe that it reads from; nobody else can while it does.
                reader.join(_LEAVE_WITHIN_S)
            elif child is not None:
                _close(child.stdout)
            if group is not None:
                group.empty()


class _Watch:
    """Facts about a running half.

    Attributes:
        ending: Why there is no result, for a child that says nothing about it.
        cut_off, start_method, workers, threads, seconds, tasks_done, throttling: The same as in
            ``Half``.
    """

    def __init__(self, *, bound_s: float, group: QuotaGroup | None) -> None:
        self.cut_off = False
        self.ending = ""
        self.start_method: str | None = None
        self.workers: int | None = None
        self.threads: int | None = None
        self.seconds: float | None = None
        self.tasks_done = 0
        self._bound_s = bound_s
        self.throttling: Throttling | None = None
        self._group = group
        self._throttled_before: Throttling | None = None
        self._begun = 0.0
        self._started: float | None = None
        self._pids: list[int] = []

    def follow(self, child: subprocess.Popen[str], lines: _Lines) -> None:
        """Take messages and count threads until the half has finished or its time is up."""
        sampled = self._begun = time.monotonic()
        while self._goes_on(child, lines):
            if time.monotonic() - sampled > _SAMPLE_S:
                self._count()
                sampled = time.monotonic()
        self._count()
        if (before := self._throttled_before) and (after := self._read_throttling()):
            self.throttling = after - before

    def _goes_on(self, child: subprocess.Popen[str], lines: _Lines) -> bool:
        """Take one message, or none for a moment, and tell whether there is more to wait for."""
        try:
            line = lines.get(timeout=_SAMPLE_S)
        except queue.Empty:
            line = "" if child.poll() is None else None
        if line is None:
            return False
        self._take(line)
        return self.seconds is None and not self._is_late()

    def _is_late(self) -> bool:
        now = time.monotonic()
        if self._started is not None:
            self.cut_off = now - self._started > self._bound_s
            return self.cut_off
        if now - self._begun > _START_WITHIN_S:
            self.ending = f"its imports took more than {_START_WITHIN_S:.0f} s"
        return bool(self.ending)

    def _take(self, line: str) -> None:
        # Native libraries print what they like; only lines of the protocol count.
        if not line.startswith('{"event": '):
            return
        match json.loads(line):
            case {"event": "started", "start_method": start_method}:
                self._started = time.monotonic()
                self.start_method = start_method
                self._throttled_before = self._read_throttling()
            case {"event": "workers", "pids": pids}:
                self._pids = pids
                self._count()
            case {"event": "done"}:
                self.tasks_done += 1
            case {"event": "finished", "seconds": seconds}:
                self.seconds = seconds

    def _read_throttling(self) -> Throttling | None:
        return read_throttling() if self._group is None else self._group.throttling()

    def _count(self) -> None:
        counted = count_threads(self._pids)
        alive = len(self._pids) if counted is None else len(counted)
        self.workers = max(self.workers or 0, alive) or None
        if counted:
            self.threads = max(self.threads or 0, sum(counted.values()))


def _read_lines(stdout: IO[str], lines: _Lines) -> None:
    with stdout:
        for line in stdout:
            lines.put(line)
    lines.put(None)


def _let_go(child: subprocess.Popen[str]) -> None:
    _close(child.stdin)
    with suppress(subprocess.TimeoutExpired):
        child.wait(_LEAVE_WITHIN_S)


def _close(stream: IO[str] | None) -> None:
    with suppress(OSError):
        if stream is not None:
            stream.close()
