"""Floor 7: native threads that libraries bring into a process, and the variables that bound them.

A fresh process without caps (``doctor_child``) imports the libraries one after the other; this
process imports none of them. If a library crashes that process or hangs, the command reports it
and examines the others in a new process.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import safepool
from safepool.cli.colour import Paint, paint_for, plain
from safepool.cli.text import as_ascii, counted, json_of, wrapped
from safepool.errors import SafepoolError, describe_exit
from safepool.machine import cpu_limit
from safepool.threads import NativePool

_MODULE = "safepool.cli.doctor_child"
# Run with -P: a random.py in the current folder must not be imported. The package's folder comes
# last, for a copy that is not installed.
_BOOTSTRAP = """\
import sys
folder, module = sys.argv[1:3]
del sys.argv[1:3]
if folder not in sys.path:
    sys.path.append(folder)
import runpy
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
_FOLDER = str(Path(safepool.__file__).parents[1])
# Between the child's print of its stacks, at the time limit, and its end.
_LAST_WORDS_S = 0.5
# For the start of the interpreter, whose group the kernel may freeze.
_START_S = 60.0
_LOOK_S = 0.02
# Lines of output of a process that ended too early.
_MOST_LINES = 8
_OURS = (
    "importlib",
    "<frozen runpy>",
    "doctor_child.py",
    f'"<string>", line {_BOOTSTRAP.count(chr(10))} in <module>',
)
# The longest name of a runtime.
_COLUMN = 18


class DoctorError(SafepoolError):
    """The process that imports the libraries ended before it imported any."""

    def __init__(self, ending: str, output: str) -> None:
        super().__init__(ending, output)
        self.ending = ending
        self.output = output

    def __str__(self) -> str:
        said = f": {self.output}" if self.output else ""
        return f"the process that imports the libraries {self.ending} before the first{said}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A pool whose size was changed by the import of another library."""

    runtime: str
    library: str
    threads_before: int | None
    threads: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """A library that computes in the threads of another runtime."""

    runtime: str
    through: str
    fixed: str
    hole: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """Effects of one import; ``schemas/doctor.json`` describes the fields."""

    name: str
    error: str = ""
    version: str = ""
    os_threads_before: int | None = None
    os_threads: int | None = None
    pools: tuple[NativePool, ...] = ()
    changed: tuple[Change, ...] = ()
    guests: tuple[Guest, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Content of the screen. Built from data, so that any machine's can be."""

    python: str
    cpus: float
    libraries: tuple[Library, ...]

    @property
    def failed(self) -> list[Library]:
        """Libraries that could not be imported."""
        return [library for library in self.libraries if library.error]

    def as_text(self, paint: Paint = plain) -> str:
        """Return the report for people: ASCII, 80 columns but for long paths."""
        lines = [
            f"safepool {safepool.__version__}: native threads after each import, nothing capped",
            f"Python {self.python}, {counted(self.cpus, 'CPU')} for this process",
        ]
        for library in self.libraries:
            lines += ["", *self._library_lines(library, paint)]
        lines += self._section("Fixed after loading: set the variable before the start", "fixed")
        lines += self._section("Not bounded by safepool", "hole")
        if any(library.pools for library in self.libraries):
            lines += ["", *_ENDING]
        return "\n".join(lines)

    def as_json(self) -> str:
        """Return the report for programs."""
        return json_of({"version": safepool.__version__, **asdict(self)})

    def _library_lines(self, library: Library, paint: Paint) -> Iterator[str]:
        name = as_ascii(f"{library.name} {library.version}".rstrip())
        if library.error:
            yield paint(f"{name}: cannot be imported", "problem")
        elif library.os_threads is None:
            yield name
        else:
            grown = library.os_threads != library.os_threads_before
            before = f"{library.os_threads_before} -> " if grown else ""
            yield f"{name}: {before}{counted(library.os_threads, 'OS thread')}"
        for line in map(as_ascii, library.error.split("\n")):
            # A line of a stack is looked up by its path: in one piece.
            yield from [f"   {line}"] if line.startswith(" ") else wrapped(line, 3)
        for pool in library.pools:
            yield f"   {pool.runtime:<{_COLUMN}} {self._size(pool.threads, paint)}"
            if pool.library:
                yield f"      {as_ascii(_shortened(pool.library))}"
            yield f"      {as_ascii(_ruled(pool))}"
        for change in library.changed:
            before = "?" if change.threads_before is None else f"{change.threads_before}"
            now = self._size(change.threads, paint)
            yield f"   {change.runtime:<{_COLUMN}} changed: {before} -> {now}"
        for guest in library.guests:
            yield f"   {guest.runtime:<{_COLUMN}} computes in the threads of {guest.through}"
        if not (library.error or library.pools or library.changed or library.guests):
            yield "   no native pool"

    def _size(self, threads: int | None, paint: Paint) -> str:
        if threads is None:
            return "unknown number of threads"
        if threads == 0:
            return "no threads of its own"
        if threads <= max(1, self.cpus):
            return counted(threads, "thread")
        return paint(f"{counted(threads, 'thread')} for {counted(self.cpus, 'CPU')}", "advice")

    def _section(self, title: str, field: str) -> Iterator[str]:
        """Yield the facts about each runtime, once."""
        told: dict[str, str] = {}
        for library in self.libraries:
            items: tuple[NativePool | Guest, ...] = (*library.pools, *library.guests)
            for item in items:
                if text := getattr(item, field):
                    told[item.runtime] = text
        if told:
            yield ""
            yield title
        for runtime, text in told.items():
            yield from wrapped(as_ascii(text), _COLUMN + 4, label=f"   {runtime} ")


_ENDING = wrapped(
    "In a worker of safepool.ProcessPool() each of these pools has threads_per_worker threads, "
    "one by default, except for the parts that are not bounded.",
    0,
)


def run(libraries: Sequence[str], *, limit_s: float, as_json: bool) -> int:
    """Print what each library brings; return the exit code."""
    names = list(dict.fromkeys(libraries))
    report = Report(
        python=platform.python_version(),
        cpus=cpu_limit(),
        libraries=tuple(examine(names, limit_s=limit_s)),
    )
    paint = paint_for(sys.stdout, os.environ)
    print(report.as_json() if as_json else report.as_text(paint))
    # None: it was closed before the start. print() would then take standard output.
    for library in report.failed if sys.stderr is not None else ():
        first_line = library.error.split("\n")[0]
        said = as_ascii(f"{library.name}: {first_line}")
        print(f"safepool doctor: error: {said}", file=sys.stderr)
    return 1 if report.failed else 0


def examine(names: Sequence[str], *, limit_s: float) -> list[Library]:
    """Import libraries in a fresh process; if a library ends it, import the others in a new one.

    Returns:
        The effects of each import, in the same order. After a crash the others are imported again,
        without the crashed library: each library's share depends on the libraries before it.

    Raises:
        DoctorError: The process ended before it imported anything.
    """
    ended: dict[str, Library] = {}
    while True:
        left = [name for name in names if name not in ended]
        child = _Child(left, limit_s)
        if child.importing is None:
            found = {library.name: library for library in child.libraries} | ended
            return [found[name] for name in names]
        ended[child.importing] = Library(
            name=child.importing,
            error=f"the process that imported it {child.ending}\n{child.stack}".rstrip(),
        )


class _Child:
    """One run of the importing process.

    Attributes:
        libraries: The libraries that the process has imported.
        importing: The module whose import ended the process; ``None`` if the run is complete.
        ending: The way the process ended, as the second half of a sentence.
        stack: Last stack of the process in the format of :mod:`faulthandler`, without the
            importing; or else the last text that it wrote.
    """

    def __init__(self, names: Sequence[str], limit_s: float) -> None:
        self.libraries: list[Library] = []
        self.importing: str | None = None
        self.ending = ""
        self._complete = False
        # Files, not pipes: a process that an import has left behind may hold a pipe open.
        with _file() as told, _file() as noise:
            start = [sys.executable, "-P", "-c", _BOOTSTRAP, _FOLDER, _MODULE]
            command = [*start, f"{limit_s:g}", *names]
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=told,
                stderr=noise,
                start_new_session=True,
            )
            try:
                self._follow(process, told, limit_s)
            finally:
                _end(process)
            if not self.ending:
                self.ending = describe_exit(process.returncode)
            noise.seek(0)
            lines = noise.read().decode("utf-8", "replace").splitlines()
        self.stack = "\n".join(_of_the_library(lines))
        if not self._complete and self.importing is None:
            raise DoctorError(self.ending, " / ".join(lines[-_MOST_LINES:]))

    def _follow(self, process: subprocess.Popen[bytes], told: IO[bytes], limit_s: float) -> None:
        read = 0
        deadline = time.monotonic() + _START_S
        while True:
            # Asked first: what an ended process has written is all there.
            over = process.poll() is not None
            *lines, _ = _read_from(told, read).split(b"\n")
            for line in lines:
                read += len(line) + 1
                self._take(json.loads(line))
                deadline = time.monotonic() + limit_s + _LAST_WORDS_S
            if over or self._complete:
                return
            if time.monotonic() > deadline:
                self.ending = (
                    f"was killed after {counted(limit_s, 'second')} (--timeout)"
                    if self.importing
                    else "did not begin"
                )
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK_S)

    def _take(self, fact: dict[str, Any]) -> None:
        match fact:
            case {"begin": name}:
                self.importing = name
            case {"end": True}:
                self._complete = True
            case _:
                self.importing = None
                pools = tuple(NativePool(**pool) for pool in fact.pop("pools"))
                changed = tuple(Change(**change) for change in fact.pop("changed"))
                guests = tuple(Guest(**guest) for guest in fact.pop("guests"))
                self.libraries.append(Library(pools=pools, changed=changed, guests=guests, **fact))


if sys.platform == "win32":
    _file = tempfile.TemporaryFile

    def _read_from(file: IO[bytes], start: int) -> bytes:
        file.seek(start)
        return file.read()

else:

    def _file() -> IO[bytes]:
        """Return a file to write and read; in memory, if the system is read-only."""
        try:
            return tempfile.TemporaryFile()
        except OSError:
            if sys.platform == "linux":
                from safepool import linux  # noqa: PLC0415 -- for this platform alone

                with contextlib.suppress(OSError):  # a filter refuses it
                    return os.fdopen(linux.memfd_create("doctor", linux.MFD_CLOEXEC), "w+b")
            raise

    def _read_from(file: IO[bytes], start: int) -> bytes:
        # seek() is not used: the writing process shares the position in the file.
        return os.pread(file.fileno(), os.fstat(file.fileno()).st_size - start, start)


def _of_the_library(lines: Sequence[str]) -> list[str]:
    """Return the innermost lines of a stack that are not the import system's or ours.

    Without a stack, the last lines of the output.
    """
    starts = [n for n, line in enumerate(lines) if line.endswith("(most recent call first):")]
    if not starts:
        return [f"  {line}" for line in lines[-_MOST_LINES:]]
    # The thread that crashed is named so; the main thread is the last one otherwise.
    start = next((n for n in starts if lines[n].startswith("Current thread")), starts[-1])
    frames = itertools.takewhile(lambda line: line.startswith("  File "), lines[start + 1 :])
    return [line for line in frames if not any(name in line for name in _OURS)][:_MOST_LINES]


def _shortened(path: str) -> str:
    """Return a path from the folder on that packages are installed in.

    Example:
        >>> _shortened("/opt/env/lib/python3.12/site-packages/numpy.libs/libopenblas.so")
        'numpy.libs/libopenblas.so'
        >>> _shortened("/usr/lib/x86_64-linux-gnu/libgomp.so.1")
        '/usr/lib/x86_64-linux-gnu/libgomp.so.1'
    """
    for folder in ("site-packages", "dist-packages"):
        _, found, rest = path.replace("\\", "/").rpartition(f"/{folder}/")
        if found:
            return rest
    return path


def _ruled(pool: NativePool) -> str:
    if pool.variable is None:
        return "no variable bounds it"
    if pool.value is None:
        return f"{pool.variable} bounds it, and is not set"
    return f"{pool.variable}={pool.value} bounds it"


if sys.platform == "win32":

    def _end(process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()

else:

    def _end(process: subprocess.Popen[bytes]) -> None:
        """End the process, and all processes that an import has started in its group."""
        try:
            # Also after its end: its number stays the group's while a member is left, and belongs
            # to no other process for a moment after that.
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        process.wait()
