"""Floor 7: the limits of this process, their sources, and the consequences: text, or JSON.

The module reads through ``safepool.limits``, decides through ``safepool.budget``, and shows every
value with its source and raw text, without a rule of its own.

The exit code is 1 if a problem was found. A health check needs ``--pid 1``: without that, the
command evaluates the pools that an unmodified program would start here.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import safepool
from safepool.budget import Budget, fit
from safepool.cli.colour import Paint, paint_for, plain
from safepool.cli.text import WIDTH, CommandError, as_ascii, counted, json_of, wrapped
from safepool.cli.verdict import Finding, judge
from safepool.limits import (
    Limit,
    Limits,
    MemoryLimit,
    OpenFilesLimit,
    PidsLimit,
    SharedMemory,
    Throttling,
    read_limits,
    read_throttling,
)
from safepool.shown import size
from safepool.threads.environment import first_number
from safepool.threads.registry import names_of, runtimes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from safepool.cli.watch import View

    _NamedLimit: TypeAlias = Limit | MemoryLimit | PidsLimit | OpenFilesLimit

_NAME_WIDTH = 26
# The variables of runtimes that nearly every program has, in order of precedence.
_NATIVE_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
# Three periods of the usual quota, or fifteen if one of the three was throttled: for a health
# check, a single burst must not be a problem.
_SAMPLE_S = 0.3
_LONGER = 5

# The same as in concurrent/futures/process.py: os.cpu_count() until 3.12; since 3.13 the number
# that the affinity mask and PYTHON_CPU_COUNT allow.
_standard_count = getattr(os, "process_cpu_count", os.cpu_count)


class ScreenError(CommandError):
    """The limits of the process or of the cluster cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeLibrary:
    """A native runtime that another process has loaded."""

    runtime: str
    library: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherProcess:
    """Facts about the process of ``--pid``."""

    pid: int
    threads: int
    libraries: tuple[NativeLibrary, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """Content of the screen; ``schemas/limits.json`` describes the fields.

    Attributes:
        standard_reads_variable: ``True`` if ``PYTHON_CPU_COUNT`` bounds ``standard_workers``.
    """

    limits: Limits
    budget: Budget
    throttling: Throttling | None
    standard_workers: int
    sample: Throttling | None = None
    joblib_workers: int | None = None
    native_threads: int = 1
    variables: Mapping[str, str] = field(default_factory=dict)
    process: OtherProcess | None = None
    standard_reads_variable: bool = hasattr(os, "process_cpu_count")

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Problems and advice, the most pressing first."""
        # A process that has loaded no native library has no such threads.
        computes = self.process is None or bool(self.process.libraries)
        return judge(
            self.limits,
            self.budget,
            sample=self.sample,
            standard_workers=None if self.process else self.standard_workers,
            native_threads=self.native_threads if computes else 1,
            standard_reads_variable=self.standard_reads_variable,
            joblib_workers=None if self.process else self.joblib_workers,
        )

    @property
    def has_problem(self) -> bool:
        """Whether the exit code reports a problem."""
        return any(finding.problem for finding in self.findings)

    def as_text(self, paint: Paint = plain, *, who: str = "") -> str:
        """Return the screen for people: ASCII, one arrow, at the limit that decides."""
        sections = self._sections()
        pointed = self._decisive_row(sections)
        if not who:
            who = "this process" if self.process is None else f"process {self.process.pid}"
        lines = [f"safepool {safepool.__version__}: what {who} may use", ""]
        for title, rows in sections.items():
            lines.append(title)
            for row in rows:
                first, *rest = row.lines(arrow=row is pointed)
                lines += [paint(first, "strong") if row is pointed else first, *rest]
            if not rows:
                lines.append("   no limit, or unknown")
        if self.limits.skipped:
            lines.append("Skipped")
            for skipped in self.limits.skipped:
                lines += [f"   {as_ascii(skipped.source)}", *wrapped(as_ascii(skipped.reason), 6)]
        lines += ["Frozen by the kernel so far (throttled)", *self._throttling_lines()]
        lines += self._process_lines()
        lines += [
            "Variables of native thread pools (NumPy, PyTorch, ...)",
            *self._variable_lines(),
        ]
        lines += ["Budget", *self._budget_lines(pointed)]
        lines += ["Started by default", *self._started_lines()]
        lines += ["Verdict", *self._verdict_lines(paint)]
        return "\n".join(lines)

    def as_json(self) -> str:
        """Return the screen for programs."""
        return json_of(self.as_object())

    def as_object(self) -> dict[str, object]:
        """Return the keys and values of the screen's JSON."""
        budget = asdict(self.budget)
        because = budget.pop("because")
        return {
            "version": safepool.__version__,
            "limits": self.limits,
            "because": because,
            "budget": budget,
            "throttling": self.throttling,
            "sample": self.sample,
            "standard_workers": self.standard_workers,
            "joblib_workers": self.joblib_workers,
            "native_threads": self.native_threads,
            "variables": self.variables,
            "process": self.process,
            "findings": self.findings,
        }

    def _sections(self) -> dict[str, list[_Row]]:
        limits = self.limits
        cpus = (limits.affinity, *limits.quotas, *limits.bounds)
        exact = () if limits.exact_workers is None else (limits.exact_workers,)
        files = () if limits.open_files is None else (limits.open_files,)
        shared = () if limits.shared_memory is None else (limits.shared_memory,)
        return {
            "CPUs": [*(_cpu_row(limit, "CPU") for limit in cpus)]
            + [_cpu_row(limit, "worker") for limit in exact],
            "Memory": [_memory_row(limit) for limit in limits.memory],
            "Processes and threads": [
                _count_row(limit, limit.tasks, limit.used_tasks) for limit in limits.pids
            ],
            "Open files": [_count_row(limit, limit.files, limit.used_files) for limit in files],
            "Shared memory": [_shared_memory_row(limit) for limit in shared],
        }

    def _decisive_row(self, sections: Mapping[str, list[_Row]]) -> _Row:
        # Two groups may say the same; the first of equals is the one that decides.
        rows = (row for rows in sections.values() for row in rows)
        return next(row for row in rows if row.limit == self.budget.because)

    def _throttling_lines(self) -> list[str]:
        throttling = self.throttling
        if throttling is None:
            return ["   no quota, or the kernel does not count it"]
        periods = f"{throttling.throttled_periods} of {throttling.periods} periods"
        lines = [f"   {periods}, {throttling.throttled_us / 1e6:.2f} s in all"]
        if self.sample is not None:
            sample = self.sample
            lines.append(f"   {sample.throttled_periods} of {sample.periods} periods just now")
        return [*lines, f"   {as_ascii(throttling.source)}"]

    def _process_lines(self) -> Iterator[str]:
        if self.process is None:
            return
        yield "Native threads"
        yield f"   {counted(self.process.threads, 'thread')} in the process"
        for loaded in self.process.libraries:
            yield f"   {loaded.runtime:<{_NAME_WIDTH}} {as_ascii(loaded.library)}"

    def _variable_lines(self) -> list[str]:
        lines = [f"   {name}={as_ascii(value)}" for name, value in self.variables.items()]
        return lines or ["   none is set"]

    def _budget_lines(self, because: _Row) -> list[str]:
        budget = self.budget
        return wrapped(
            f"{counted(budget.workers, 'worker')} x "
            f"{counted(budget.threads_per_worker, 'thread')}, because of {because.name}",
            3,
        )

    def _started_lines(self) -> Iterator[str]:
        budget = self.budget
        rows = [("safepool.ProcessPool()", budget.workers, budget.threads_per_worker)]
        if self.process is None:
            rows.append(("ProcessPoolExecutor()", self.standard_workers, self.native_threads))
        if self.joblib_workers is not None:
            # joblib, "Avoiding over-subscription of CPU resources": its workers share the
            # CPUs, unless a variable is set.
            told = any(name in self.variables for name in _NATIVE_VARIABLES)
            threads = self.native_threads if told else 1
            rows.append(("joblib, n_jobs=-1", self.joblib_workers, threads))
        for name, workers, threads in rows:
            many = counted(workers * threads, "thread")
            yield (
                f"   {name:<{_NAME_WIDTH}} {counted(workers, 'worker')} x "
                f"{counted(threads, 'thread')} = {many} on {counted(budget.cpus, 'CPU')}"
            )

    def _verdict_lines(self, paint: Paint) -> Iterator[str]:
        if not self.findings:
            yield paint("   Nothing to do.", "good")
        for finding in self.findings:
            for line in wrapped(as_ascii(f"{finding.text}. Remedy: {finding.remedy}."), 3):
                yield paint(line, "problem" if finding.problem else "advice")


def read_screen(*, view: View | None = None, sample_s: float = 0.0) -> Screen:
    """Read the limits of this process, or of another one with its threads and libraries.

    Args:
        view: The other process.
        sample_s: Seconds over which throttling is sampled, if there is a quota; 0: no sample.
    """
    # First, so that the reason for hidden libraries is among the skipped sources.
    libraries = () if view is None else _native_libraries(view.libraries())
    limits = read_limits() if view is None else view.read_limits()
    environ = os.environ if view is None else view.environ()
    read = read_throttling if view is None else view.read_throttling
    throttling, sample = _sampled(read, sample_s)
    return Screen(
        limits=limits,
        budget=fit(limits),
        throttling=throttling,
        sample=sample,
        standard_workers=_standard_workers(),
        joblib_workers=_joblib_count() if view is None else None,
        native_threads=_native_threads(limits, environ),
        variables=_variables(environ),
        process=None
        if view is None
        else OtherProcess(pid=view.pid, threads=view.threads(), libraries=libraries),
    )


def run(*, as_json: bool, pid: int | None = None, watched: bool = False) -> int:
    """Print the limits of this process or of another one.

    Returns:
        The exit code: 1 if a problem was found.

    Raises:
        ScreenError: The process does not exist, or this system does not show it.
    """
    view = _view(pid or os.getpid()) if pid is not None or watched else None
    screen = read_screen(view=None if pid is None else view, sample_s=_SAMPLE_S)
    if view is not None and watched:
        from safepool.cli.watch import watch  # noqa: PLC0415 -- only for this option

        watch(view, screen.budget.cpus, as_json=as_json)
        return 0
    if screen.process is not None and not screen.process.threads:
        raise ScreenError(f"process {pid} has ended meanwhile")
    paint = paint_for(sys.stdout, os.environ)
    print(screen.as_json() if as_json else screen.as_text(paint))
    return 1 if screen.has_problem else 0


def _view(pid: int) -> View:
    if sys.platform == "linux":
        from safepool.limits.process import ProcessView  # noqa: PLC0415 -- Linux only

        try:
            return ProcessView(pid)
        except ProcessLookupError as error:
            raise ScreenError(str(error)) from error
    else:  # not Linux
        raise ScreenError("--pid and --watch read /proc, which only Linux has")


def _sampled(
    read: Callable[[], Throttling | None], sample_s: float
) -> tuple[Throttling | None, Throttling | None]:
    """Return the counters, and their growth in ``sample_s``, or in a longer time if in doubt."""
    before = read()
    if before is None or sample_s <= 0:
        return before, None
    for more_s in (sample_s, (_LONGER - 1) * sample_s):
        time.sleep(more_s)
        now = read()
        if now is None or now.source != before.source:
            break
        sample = now - before
        if not sample.throttled_periods or more_s > sample_s:
            return now, sample
    return before, None


def _standard_workers() -> int:
    try:
        return _standard_count() or 1
    except OSError:  # a filter refuses the affinity, and the standard pool fails
        return os.cpu_count() or 1


def _joblib_count() -> int | None:
    # joblib's copy of loky has the function. Its folder is imported under another name, because
    # joblib itself would import NumPy and start the threads that this command reports.
    found = importlib.util.find_spec("joblib")
    if found is None or not found.submodule_search_locations:
        return None
    folder = os.path.join(found.submodule_search_locations[0], "externals", "loky", "backend")
    package = importlib.machinery.ModuleSpec("safepool_joblib", None, is_package=True)
    package.submodule_search_locations = [folder]
    # The copy registers its contexts with multiprocessing, whose children would look for it.
    contexts: dict[str, Any] = importlib.import_module(
        "multiprocessing.context"
    )._concrete_contexts
    before = contexts.copy()
    sys.modules[package.name] = importlib.util.module_from_spec(package)
    try:
        count = importlib.import_module(f"{package.name}.context").cpu_count()
    except (ImportError, OSError, ValueError):
        return None  # LOKY_MAX_CPU_COUNT is no number, or a filter refuses the affinity
    finally:
        for name in contexts.keys() - before.keys():
            del contexts[name]
        contexts.update(before)
        for name in [name for name in sys.modules if name.partition(".")[0] == package.name]:
            del sys.modules[name]
    return count if isinstance(count, int) else None


def _variables(environ: Mapping[str, str]) -> dict[str, str]:
    names = {name for row in runtimes() for name in names_of(row)}
    return {name: environ[name] for name in sorted(names) if environ.get(name)}


def _native_threads(limits: Limits, environ: Mapping[str, str]) -> int:
    """Return the threads that OpenBLAS or OpenMP starts: a variable's number, or one per CPU.

    They see the affinity mask and no quota.
    """
    return first_number(_NATIVE_VARIABLES, environ) or max(1, int(limits.affinity.cpus or 1))


def _native_libraries(files: Sequence[str]) -> tuple[NativeLibrary, ...]:
    return tuple(
        NativeLibrary(runtime=row.name, library=file)
        for row in runtimes()
        for file in files
        if row.libraries and os.path.basename(file).lower().startswith(row.libraries)
    )


# eq=False: two groups may have equal limits, and each has a separate row.
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Row:
    """One limit on the screen: its value, source and text."""

    limit: object
    name: str
    value: str
    source: str
    raw: str | None

    def lines(self, *, arrow: bool) -> Iterator[str]:
        yield f"{'->' if arrow else '  '} {self.name:<{_NAME_WIDTH}} {self.value}"
        # The whole source and the whole text, of any length: a reader may look them up.
        parts = [as_ascii(self.source)]
        if self.raw is not None:
            parts.append(f"says {self.raw!a}")
        indent = " " * (_NAME_WIDTH + 4)
        if len(indent) + len(" ".join(parts)) <= WIDTH:
            parts = [" ".join(parts)]
        for part in parts:
            # A long path stays in one piece, even if it leaves its column.
            yield f"{indent if len(indent) + len(part) <= WIDTH else '      '}{part}"


def _row(limit: _NamedLimit, value: str, *notes: str) -> _Row:
    return _Row(
        limit=limit,
        name=limit.name,
        value=_noted(value, notes),
        source=limit.source,
        raw=limit.raw,
    )


def _cpu_row(limit: Limit, noun: str) -> _Row:
    return _row(limit, "no limit" if limit.cpus is None else counted(limit.cpus, noun))


def _memory_row(limit: MemoryLimit) -> _Row:
    notes = []
    if limit.used_bytes is not None:
        notes.append(f"{size(limit.used_bytes)} used")
    if limit.reclaimable_bytes is not None:
        notes.append(f"{size(limit.reclaimable_bytes)} reclaimable")
    return _row(limit, "no limit" if limit.bytes is None else size(limit.bytes), *notes)


def _count_row(limit: _NamedLimit, most: int | None, used: int | None) -> _Row:
    notes = [] if used is None else [f"{used} used"]
    return _row(limit, "no limit" if most is None else str(most), *notes)


def _shared_memory_row(limit: SharedMemory) -> _Row:
    value = _noted(size(limit.bytes), [f"{size(limit.free_bytes)} free"])
    return _Row(limit=limit, name="size", value=value, source=limit.source, raw=None)


def _noted(value: str, notes: Sequence[str]) -> str:
    return f"{value} ({', '.join(notes)})" if notes else value
