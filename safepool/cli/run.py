"""Floor 7: start an unmodified program with the limits in its environment.

The command computes a budget and writes it into every variable that bounds a native thread pool, a
pool of processes, or a tool in another language. Then it executes the program in its own place:
process id, signals and exit status are the program's, also as the first process of a container.
Variables that the user has set keep their value. A variable for a family of runtimes
(``OMP_NUM_THREADS``) also bounds runtimes that fall back to it.

``PROGRAM_VARIABLES`` and ``safepool.threads.table`` list the variables with their sources.
``--explain`` prints the variables, ``--force`` also replaces the user's, ``safepool env`` prints
them for a shell, as dotenv or as JSON.

As the first process of a container the program behaves as without safepool: a signal without a
handler does not end it, and its orphans become zombies, unless the container has an init (``docker
run --init``).

``ProcessPoolExecutor()`` reads no variable before Python 3.13, and ``multiprocessing.Pool()`` none
at all: only ``--patch`` bounds these. The option replaces the standard pools, and
``multiprocess.Pool``, by ``safepool.ProcessPool`` and ``safepool.Pool``, whatever the way of
import, and makes safepool joblib's backend. A start method that the program has chosen
(``get_context("spawn").Pool()``) stays. If an object can be shared only by a fork, such as a lock
or a ``Value`` of ``multiprocessing`` in a global or among ``initargs``, workers are forks; a
warning names the object. Another warning names the globals of modules that called functions use
and that the program has set (``config.LEVEL = 5``): forks would have that value, and workers have
the value of the import. ``--patch`` reaches Python programs whose Python has safepool, and the
Pythons that they start, but not ``python -I``, ``-E`` and ``-S``.

Exit codes of the command itself: 126 the program cannot be run, 127 it was not found, as env(1).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from safepool.budget import Budget, Request, fit
from safepool.cli.text import CommandError, as_ascii, counted, wrapped
from safepool.limits import Limit, read_limits
from safepool.threads.environment import worker_environment
from safepool.threads.registry import runtimes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from safepool.threads.table import NativeRuntime


class ProgramVariable(NamedTuple):
    """A variable that bounds a program, besides those of native thread pools.

    Attributes:
        source: Documentation of the variable.
        counts: ``"workers"``: processes beside each other. ``"cpus"``: threads of a program that
            is one process and has all CPUs to itself, workers x threads.
        only_if: Option that sets the variable; empty if it is always set.
        form: Text of the variable, with ``{}`` for the number.
    """

    name: str
    source: str
    counts: Literal["workers", "cpus"] = "workers"
    only_if: str = ""
    form: str = "{}"


# Not listed: oneTBB reads no variable; Java and .NET read the quota themselves; ninja and Julia
# take command-line options. RAYON_NUM_THREADS is a row of the table of native thread pools.
PROGRAM_VARIABLES = (
    ProgramVariable("LOKY_MAX_CPU_COUNT", "loky, README, loky.cpu_count; joblib's n_jobs=-1"),
    ProgramVariable("PYTHON_CPU_COUNT", "Python 3.13, command line and environment"),
    ProgramVariable(
        "PYTEST_XDIST_AUTO_NUM_WORKERS", "pytest-xdist, Running tests across multiple CPUs"
    ),
    ProgramVariable("SAFEPOOL_MAX_WORKERS", "safepool", only_if="--workers"),
    ProgramVariable(
        "MAX_JOBS", "PyTorch, torch.utils.cpp_extension.BuildExtension; CONTRIBUTING.md"
    ),
    ProgramVariable("CMAKE_BUILD_PARALLEL_LEVEL", "CMake, envvar/CMAKE_BUILD_PARALLEL_LEVEL"),
    ProgramVariable("CARGO_BUILD_JOBS", "The Cargo Book, Configuration, build.jobs"),
    ProgramVariable(
        "MAKEFLAGS",
        "GNU make, Communicating Options to a Sub-make",
        only_if="--makeflags",
        form="-j{}",
    ),
    ProgramVariable("GOMAXPROCS", "Go, src/runtime/debug.go, GOMAXPROCS", counts="cpus"),
    ProgramVariable("LLAMA_ARG_THREADS", "llama.cpp, llama-server(1), --threads", counts="cpus"),
)

# Length of the line that Linux reads; linux/binfmts.h, BINPRM_BUF_SIZE.
_SHEBANG_BYTES = 256

_START = Path(__file__).with_name("start")
_PYTHON = re.compile(r"(python|pypy)[0-9.]*(\.exe)?", re.IGNORECASE)
# Options of Python with a value in the next argument; what follows -c and -m is the program's.
_TAKES_VALUE = frozenset("WX")


class RunError(CommandError):
    """The program could not be started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Changes in the environment of the program, and their reason.

    Attributes:
        changes: The value of each variable; ``None`` removes it.
        kept: Variables of the user that keep their value.
        patched: The program's pools are replaced as well.
    """

    budget: Budget
    changes: Mapping[str, str | None]
    kept: Mapping[str, str]
    patched: bool

    def applied_to(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Return the environment to start the program with."""
        changed = {**environ, **self.changes}
        return {name: value for name, value in changed.items() if value is not None}

    def as_text(self) -> str:
        """Return the variables that were set and kept: ASCII, one variable per line."""
        budget = self.budget
        because = budget.because
        lines = wrapped(
            f"safepool run: {counted(budget.workers, 'worker')} x "
            f"{counted(budget.threads_per_worker, 'thread')} on {counted(budget.cpus, 'CPU')}, "
            f"because of {because.name} ({as_ascii(because.source)})",
            2,
        )
        for name, value in self.changes.items():
            lines.append(f"  unset {name}" if value is None else f"  {name}={shlex.quote(value)}")
        lines += [f"  kept  {name}={shlex.quote(value)}" for name, value in self.kept.items()]
        if self.patched:
            lines.append(
                "  ProcessPoolExecutor, multiprocessing.Pool and joblib's default are safepool's"
            )
        return "\n".join(map(as_ascii, lines))


def plan(
    environ: Mapping[str, str],
    budget: Budget,
    *,
    exact: bool = False,
    force: bool = False,
    patch: bool = False,
    makeflags: bool = False,
) -> Plan:
    """Decide which variables to set for a program. The function reads and sets nothing.

    Args:
        environ: Environment of the program.
        budget: Workers and threads.
        exact: Whether the user has set the number of workers.
        force: Whether to replace variables that the user has set.
        patch: Whether to replace the standard pools by safepool's.
        makeflags: Whether to set ``MAKEFLAGS``, too.

    Returns:
        The plan.

    Example:
        >>> from safepool.budget import Budget
        >>> from safepool.limits import Limit
        >>> why = Limit(name="cpu.max", cpus=4.0, source="cpu.max", raw="400000 100000")
        >>> two_by_two = Budget(workers=2, threads_per_worker=2, cpus=4.0, because=why)
        >>> found = plan({"MKL_NUM_THREADS": "3"}, two_by_two)
        >>> found.changes["OMP_NUM_THREADS"], found.changes["LOKY_MAX_CPU_COUNT"]
        ('2', '2')
        >>> found.kept, "MKL_NUM_THREADS" in found.changes
        ({'MKL_NUM_THREADS': '3'}, False)
    """
    wanted = worker_environment(budget.threads_per_worker)
    cpus = budget.workers * budget.threads_per_worker
    given = {"--workers": exact, "--makeflags": makeflags, "": True}
    for row in PROGRAM_VARIABLES:
        if given[row.only_if]:
            wanted[row.name] = row.form.format(cpus if row.counts == "cpus" else budget.workers)
    kept: dict[str, str] = {}
    if not force:
        for name in (*wanted, *(name for pool in runtimes() for name in pool.opt_in)):
            if environ.get(name):
                kept[name] = environ[name]
        for pool in runtimes():
            # The pool's own variable would overrule the user's variable.
            if any(name in kept for name in _rulers(pool)):
                for variable in pool.variables:
                    wanted.pop(variable.name, None)
    changes = {
        name: value
        for name, value in sorted(wanted.items())
        if name not in kept and (value is not None or name in environ)
    }
    if patch:
        rest = environ.get("PYTHONPATH")
        paths = [path for path in rest.split(os.pathsep) if path != str(_START)] if rest else []
        changes["PYTHONPATH"] = os.pathsep.join([str(_START), *paths])
    return Plan(budget=budget, changes=changes, kept=dict(sorted(kept.items())), patched=patch)


def plan_here(
    *,
    workers: int | None,
    threads: int | Literal["auto"],
    reserve: float,
    force: bool,
    patch: bool,
    makeflags: bool,
) -> Plan:
    """Decide what to set for a program that is started by this process."""
    # The machine must decide, not the variables that are about to be replaced.
    limits = read_limits(environ=_without_ours(os.environ) if force else None)
    request = Request(max_workers=workers, threads_per_worker=threads, reserve=reserve)
    budget = fit(limits, request)
    if workers is not None and isinstance(budget.because, Limit):
        # The number came from the command line, not from Python.
        because = replace(budget.because, name="--workers", source="the command line")
        budget = replace(budget, because=because)
    exact = workers is not None
    return plan(os.environ, budget, exact=exact, force=force, patch=patch, makeflags=makeflags)


def run(plan: Plan, command: Sequence[str], *, explain: bool) -> int:
    """Become the program.

    Returns:
        The program's exit code, where a process cannot become another one (Windows).

    Raises:
        RunError: The program cannot be started.
    """
    if plan.patched and (option := _isolating_option(command)):
        raise RunError(
            f"--patch cannot reach python {option}: it reads no PYTHONPATH or runs no start "
            f"file. Leave {option} out, or leave --patch out and use safepool in the program",
            2,
        )
    # None: it was closed before the start. print() would then take standard output.
    if explain and sys.stderr is not None:
        with contextlib.suppress(OSError):  # nobody reads it: the program is started all the same
            print(plan.as_text(), file=sys.stderr, flush=True)
    return _become(command, plan.applied_to(os.environ))


def _become(command: Sequence[str], environ: Mapping[str, str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):  # as above: it is still in the buffer
                stream.flush()
    name = as_ascii(command[0])
    if not name:
        raise RunError(
            "the command is empty. Write it after --, as in: safepool run -- python train.py", 127
        )
    try:
        return _exec(command, environ)
    except FileNotFoundError as error:
        if found := shutil.which(command[0]):
            its = as_ascii(" ".join(["its interpreter", *_shebang(found)[:1]]))
            raise RunError(f"{name}: cannot be run: {its} does not exist", 126) from error
        raise RunError(f"{name}: command not found", 127) from error
    except OSError as error:
        raise RunError(f"{name}: cannot be run: {error.strerror}", 126) from error


if sys.platform == "win32":

    def _exec(command: Sequence[str], environ: Mapping[str, str]) -> int:
        # On Windows, exec starts another process and ends this one at once.
        return subprocess.call(command, env=environ)

else:

    def _exec(command: Sequence[str], environ: Mapping[str, str]) -> int:
        # Python ignores these signals. The program would inherit that: `yes | head` would not end.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        try:
            os.execvpe(command[0], list(command), environ)
        except OSError as error:
            found = shutil.which(command[0])
            if error.errno != errno.ENOEXEC or found is None:
                raise
            # A text without "#!": the shell's, as for execvp(3), and so for env(1) and nice(1).
            os.execve("/bin/sh", ["/bin/sh", found, *command[1:]], environ)


def _rulers(row: NativeRuntime) -> tuple[str, ...]:
    own = tuple(variable.name for variable in row.variables)
    return (*own, *row.removed, *row.falls_back_to)


def _without_ours(environ: Mapping[str, str]) -> dict[str, str]:
    ours = {row.name for row in PROGRAM_VARIABLES}
    return {name: value for name, value in environ.items() if name not in ours}


def _isolating_option(command: Sequence[str]) -> str | None:
    """Return the option with which Python would not find the start file, as it was written.

    Example:
        >>> _isolating_option(["/usr/bin/python3.12", "-uI", "train.py"])
        '-uI'
        >>> _isolating_option(["python", "-X", "dev", "train.py", "-I"]) is None
        True
    """
    found = shutil.which(command[0])
    if found is not None and not _PYTHON.fullmatch(Path(command[0]).name):
        # execve(2): what follows the interpreter is one argument, which env(1) -S splits.
        command = _shebang(found)
        if command and Path(command[0]).name == "env":
            command = [word for word in command[1:] if word not in {"-S", "--split-string"}]
    if not command or not _PYTHON.fullmatch(Path(command[0]).name):
        return None
    return next((option for option in _python_options(command[1:]) if _isolates(option)), None)


def _shebang(file: str) -> list[str]:
    """Return the words behind ``#!`` in a script, none if it has no such line."""
    try:
        with open(file, "rb") as script:
            first = script.readline(_SHEBANG_BYTES)
    except OSError:
        return []
    # No other blank separates, as the kernel reads it: "/bin/sh\\r" is another name.
    words = re.split("[ \t]+", os.fsdecode(first[2:]).rstrip("\n").strip(" \t"))
    return [word for word in words if word] if first.startswith(b"#!") else []


def _python_options(arguments: Sequence[str]) -> Iterator[str]:
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-") or argument in {"-", "--"}:
            return
        yield argument
        if argument.startswith("--"):
            if argument == "--check-hash-based-pycs":
                next(rest, None)
            continue
        for place, letter in enumerate(argument[1:], start=2):
            if letter in "cm":
                return
            if letter in _TAKES_VALUE:
                if place == len(argument):
                    next(rest, None)
                break


def _isolates(option: str) -> bool:
    if option.startswith("--"):
        return False
    for letter in option[1:]:
        if letter in "cmWX":
            return False
        if letter in "IES":
            return True
    return False
