"""Floor 7: ``safepool demo``: one batch of SciPy and NumPy work in both pools, compared.

First ``concurrent.futures.ProcessPoolExecutor()`` as people write it, then
``safepool.ProcessPool()``: the same tasks, each half in a fresh child process (``demo_half``),
under this process's own limits. The command computes none of the printed numbers, and does not
change the environment of the halves. ``demo_report`` has the table, the sentence below it, and
JSON. A quota, a pretended larger host and the picture are shared with the benchmarks
(``benchmarks/host``; the wheel has the folder as ``safepool/cli/host``).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

import safepool
from safepool import procfs
from safepool.cli.colour import paint_for
from safepool.cli.demo_report import POOLS, Comparison, Half, Report
from safepool.cli.text import CommandError
from safepool.errors import MissingExtraError, describe_exit
from safepool.limits import Limit, Throttling, read_limits, read_throttling
from safepool.workers.tree import Descendant, descendants, signal_all

_NEEDED = ("numpy", "scipy")
_PREFIX = "safepool-demo-"
# Python's fork server makes a socket in its own folder inside of the demo's, and a socket's path
# has at most 107 bytes (unix(7)). With a longer path the server uses /tmp, and leaves its folder
# there when it is killed.
_LONGEST = 107 - len(f"/{_PREFIX}12345678/pymp-12345678/sock-123456789012")

# 20 ms: some dozens of readings even of a fast batch, and under 1 % of a CPU for the counting.
_SAMPLE_S = 0.02
# SciPy's import alone takes seconds at half a CPU; a start that takes longer has failed.
_START_WITHIN_S = 120.0
# Time for a child to shut its pool down, which is not part of the measurement.
_LEAVE_WITHIN_S = 10.0
# A killed process that its quota has frozen ends when it may run again, after some periods of
# 0.1 s. If it takes longer, the kernel itself holds it.
_GONE_WITHIN_S = 5.0
_ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]

# Runs first in the child. The child joins the group before all else, so that imports and workers
# are inside too. Out of memory, the kernel must take one of the demo's processes and no other
# (proc_pid_oom_score_adj(5)). The child's interpreter is the caller's. The package's folder comes
# last: it must not shadow anything, and is only needed where the caller's path was changed by
# hand.
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
class Setting:
    """Surroundings of both halves. By default they are this process's own.

    Attributes:
        no_group: Reason why the requested quota could not be set; ``None`` otherwise.
        variables: Variables that are added to the environment of a half.
        members_file: File of a control group that a half joins by writing ``0`` to it.
        throttling: Reads how often the kernel has frozen a half's group.
        empty: Ends every process that is left in the group.
    """

    limit: Limit = field(default_factory=lambda: read_limits().binding)
    no_group: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    members_file: Path | None = None
    throttling: Callable[[], Throttling | None] = read_throttling
    empty: Callable[[], None] = lambda: None


def run(
    *,
    tasks: int,
    points: int,
    bound_s: float,
    cpus: float | None = None,
    pretend_host_cpus: int | None = None,
    plot: Path | None = None,
    as_json: bool = False,
) -> int:
    """Run both halves with the options of the command, print the measurements, and clean up.

    Returns:
        Exit code: 0, or 1 if the comparison failed.

    Raises:
        MissingExtraError: NumPy or SciPy is not installed, or matplotlib for a picture.
        SafepoolError: A larger machine cannot be pretended, the picture cannot be written, or
            the control group could not be removed.
    """
    for package in _NEEDED:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "pip install 'safepool[demo]'")
    asked = {"cpus": cpus, "pretend_host_cpus": pretend_host_cpus}
    changed = any(value is not None for value in asked.values())
    if plot is not None:
        host().check_plot(plot)
    # Signals that are ignored (nohup) or handled by the calling program stay as they are.
    ours = [number for number in _ENDINGS if signal.getsignal(number) is signal.SIG_DFL]
    with (
        # kill and a closed terminal unwind like Ctrl-C, so that the group is removed.
        _signals(_leave, ours),
        tempfile.TemporaryDirectory(prefix=_PREFIX, dir=_short_folder()) as made,
        host().setting(**asked, points=points, folder=Path(made))
        if changed
        else nullcontext(Setting()) as setting,
    ):
        report = Report(
            tasks=tasks,
            points=points,
            cpus_asked=cpus,
            bound_s=bound_s,
            versions={
                "Python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in _NEEDED},
            },
            pretend_host_cpus=pretend_host_cpus,
            machine_cpus=os.cpu_count() or 1,
            limit=setting.limit,
            no_group=setting.no_group,
        )
        _fill(report, setting, Path(made), quiet=as_json)
    if as_json:
        print(report.as_json(), flush=True)
    if plot is not None:
        host().draw(report, plot)
    return 1 if report.failed else 0


def host() -> Any:
    """Return the package of the quota, the pretended host and the picture.

    Raises:
        CommandError: This copy of safepool was installed without it.
    """
    name = "safepool.cli.host"
    if name not in sys.modules:
        parents = Path(__file__).parents
        places = (parents[0] / "host", parents[2] / "benchmarks" / "host")
        code = next((one for place in places if (one := place / "__init__.py").is_file()), None)
        spec = code and importlib.util.spec_from_file_location(name, code)
        if not spec or spec.loader is None:
            raise CommandError(
                f"--cpus, --pretend-host-cpus and --plot need {places[0]}, which is missing. "
                "Install safepool again, with pip"
            )
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _fill(report: Report, setting: Setting, folder: Path, *, quiet: bool) -> None:
    """Run one half after the other; each row is printed as soon as it is known."""
    paint = paint_for(sys.stdout, os.environ)

    def show(*lines: str) -> None:
        if not quiet:
            print(*lines, sep="\n", flush=True)

    show(*report.opening_lines())
    files = [folder / f"{name}.npy" for name in POOLS]
    report.standard = measure("standard", report, setting, files[0])
    show(report.row(report.standard))
    report.safepool = measure("safepool", report, setting, files[1])
    report.comparison = compare(*files)
    show(report.row(report.safepool, paint), *report.closing_lines(paint))


def _short_folder() -> str | None:
    """Return where the demo's own folder is made; ``None`` is where the user wants it."""
    too_long = len(os.fsencode(tempfile.gettempdir())) > _LONGEST
    return "/tmp" if too_long and os.access("/tmp", os.W_OK) else None


def measure(name: str, asked: Report, setting: Setting, results_file: Path) -> Half:
    """Run one half in a child process, and wait for its end.

    Returns:
        The measurement. No process of the half is left.
    """
    half = Half(pool=POOLS[name])
    arguments = [str(setting.members_file or ""), str(Path(safepool.__file__).parents[1])]
    arguments += [name, str(asked.tasks), str(asked.points), str(results_file)]
    told, said = (results_file.with_suffix(f".{ending}") for ending in ("told", "said"))
    child = None
    try:
        with told.open("w") as stdout, said.open("w") as stderr:
            child = subprocess.Popen(
                # -P: a random.py that lies where the user happens to be must not be imported.
                [sys.executable, "-P", "-c", _BOOTSTRAP, *arguments],
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=stderr,
                # Otherwise the environment is the caller's, word for word.
                env={**os.environ, **setting.variables} if setting.variables else None,
                # A separate process group can be ended as a whole, and the terminal's Ctrl-C does
                # not reach it: the measuring process ends it.
                start_new_session=True,
            )
        with told.open(errors="replace") as lines:
            ending = _follow(child, lines, half, asked.bound_s, setting)
        _close_stdin(child)
        if not (ending or half.cut_off):
            with suppress(subprocess.TimeoutExpired):
                child.wait(_LEAVE_WITHIN_S)
    finally:
        with undisturbed():
            if child is not None:
                _end_all(child)
                _close_stdin(child)
            setting.empty()
    assert child is not None
    if half.seconds is None:
        texts = said.read_text(errors="replace").strip().splitlines()
        half.error = texts[-1] if texts else ending or describe_exit(child.returncode)
    return half


def _close_stdin(child: subprocess.Popen[bytes]) -> None:
    if child.stdin is not None:
        with suppress(OSError):
            child.stdin.close()


def _follow(
    child: subprocess.Popen[bytes], lines: IO[str], half: Half, bound_s: float, setting: Setting
) -> str:
    """Read messages and count threads until the half has finished, or its time is up.

    Returns:
        Reason for the missing result, if the child itself printed none.
    """
    pids: list[int] = []
    started, latest_s, before, rest = time.monotonic(), _START_WITHIN_S, None, ""
    while half.seconds is None:
        ended = child.poll() is not None
        rest += lines.read()
        *whole, rest = rest.split("\n")
        for message in map(_message, whole):
            if "start_method" in message:
                half.start_method = message["start_method"]
                started, latest_s, before = time.monotonic(), bound_s, setting.throttling()
            pids = message.get("pids", pids)
            half.tasks_done = message.get("done", half.tasks_done)
            half.seconds = message.get("seconds")
        _count(pids, half)
        if half.seconds is not None or ended:
            break
        if time.monotonic() - started > latest_s:
            if half.start_method is None:
                return f"its imports took more than {_START_WITHIN_S:.0f} s"
            half.cut_off, half.seconds = True, bound_s
        else:
            time.sleep(_SAMPLE_S)
    if before is not None and (after := setting.throttling()) is not None:
        half.throttling = after - before
    return ""


def _message(line: str) -> dict[str, Any]:
    # Native libraries may print anything; only lines of the protocol count.
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _count(pids: list[int], half: Half) -> None:
    """Count workers and their threads, which only Linux lists for other processes."""
    counts = [len(procfs.threads(pid)) for pid in pids]
    if platform.system() == "Linux":
        counts = [count for count in counts if count]
        half.threads = max(half.threads or 0, sum(counts)) or None
    half.workers = max(half.workers or 0, len(counts)) or None


def compare(standard: Path, safepool: Path) -> Comparison:
    """Compare the results of the tasks that both halves had done."""
    if not (standard.exists() and safepool.exists()):
        return Comparison()
    # Optional, so imported where it is used; and after the halves, which it cannot disturb.
    import numpy as np  # noqa: PLC0415

    ours, theirs = np.load(safepool), np.load(standard)
    done = (ours[:, 0] == 1.0) & (theirs[:, 0] == 1.0)
    if not done.any():
        return Comparison()
    ours, theirs = ours[done], theirs[done]
    return Comparison(
        compared=int(done.sum()),
        equal=bool(np.allclose(ours, theirs, rtol=Comparison().rtol, atol=Comparison().atol)),
        largest_difference=float(np.abs(ours - theirs).max()),
    )


if sys.platform == "win32":

    def _end_all(process: subprocess.Popen[bytes]) -> None:
        # Ends the children by their parent's id; there is no group to signal.
        command = ["taskkill", "/T", "/F", "/PID", str(process.pid)]
        subprocess.run(command, check=False, capture_output=True)
        process.wait()

else:

    def _end_all(process: subprocess.Popen[bytes]) -> None:
        """End a child process and everything that it has started, and wait for their end."""
        # Stopped first: a process that still runs could start another one behind the listing.
        # Popen signals only a child that it has not waited for, so never a reused id.
        process.send_signal(signal.SIGSTOP)
        below = descendants(process.pid) if process.returncode is None else set()
        signal_all(below, signal.SIGKILL)
        # Its session is its process group: this reaches orphans as well.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + _GONE_WITHIN_S
        while any(map(_runs, below)) and time.monotonic() < deadline:
            time.sleep(0.01)


def _runs(one: Descendant) -> bool:
    stat = procfs.read_stat(one.pid)
    # Zombies have ended; only their parent, or init, can take them off the list.
    return stat is not None and stat.started == one.started and stat.state not in "ZX"


def undisturbed() -> AbstractContextManager[None]:
    """Keep a second Ctrl-C, a SIGTERM or a closed terminal from cutting a clean-up short."""
    return _signals(signal.SIG_IGN, (signal.SIGINT, *_ENDINGS))


@contextmanager
def _signals(handler: Any, numbers: Iterable[int]) -> Iterator[None]:
    """Handle signals by a handler inside the block.

    Outside the main thread this does nothing: Python delivers signals only there.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, found in before.items():
            # None: installed by native code, which Python cannot put back.
            if found is not None:
                signal.signal(number, found)


def _leave(number: int, _frame: FrameType | None) -> None:
    # A shell reports a program that a signal has ended in this way; it unwinds as Ctrl-C does.
    raise SystemExit(128 + number)
