"""Floor 7: the command ``safepool``, also ``python -m safepool``. Arguments in, exit code out.

The module parses the arguments, calls one module, and turns every error into one line on standard
error. The module of a command is imported only for that command:

    limits_screen   ``safepool``, ``safepool limits``: the limits of this process, with sources;
                    ``verdict`` finds problems, ``watch`` prints a line a second
    cluster_screen  ``safepool --cluster ADDRESS``: the same for each node
    doctor          ``safepool doctor NAME...``: the native threads of each library, which
                    ``doctor_child`` imports
    run             ``safepool run -- COMMAND``: start any program with its limits set
    env             ``safepool env``: the same variables, for a shell
    demo            ``safepool demo``: the standard pool and safepool's on the same work, each in
                    a ``demo_half``; ``demo_report`` prints
    report          ``safepool report FILE``: summary of a file of ``ProcessPool(trace=FILE)``
    top             ``safepool top PID``: present calls of the workers of a running process
    text, colour    for all of them

A JSON Schema in ``safepool/cli/schemas`` describes each key of the ``--json`` output of each
command. Keys are added, and none is renamed or removed within the number ``schema``.

Without ``--pid`` the command evaluates the pools that an unmodified program would start. In a
container with a quota that usually is a problem. A health check evaluates the running program, as
that program's own user: ``safepool --pid 1 > /dev/null``.

Output is ASCII in 80 columns. Colours are for terminals only: ``NO_COLOR=1`` and ``TERM=dumb``
turn them off, ``FORCE_COLOR=1`` turns them on elsewhere.

Exit codes:
    0    fine, also when the reader of the output has left (``safepool | head -1``)
    1    a problem was found: with the limits here, or the demo's comparison failed, or the
         doctor could not import a library
    2    wrong usage, a file that is no trace, a process without workers, or a package that the
         command needs is missing
    126  ``run``: the command cannot be run; 127: it was not found; otherwise the command's own
    130  Ctrl-C; 128 + the number of another signal, after the demo has cleaned up
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import inspect
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import safepool
from safepool.cli.text import WIDTH, CommandError
from safepool.errors import MissingExtraError, SafepoolError
from safepool.shown import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["main"]

_FINE, _FAILED, _USAGE, _INTERRUPTED = 0, 1, 2, 130

# Errors of a full disk, a quota or a device.
_NO_ROOM = frozenset(
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO") if hasattr(errno, name)
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments of the command; ``None`` is ``sys.argv[1:]``.

    Returns:
        The exit code; the module lists them.
    """
    try:
        code = _run(argv)
        # The stream is flushed here: at the interpreter's end nothing catches a broken pipe.
        # ``None``: the stream was closed before the start.
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        _drop_the_rest()
        return _FINE
    except SafepoolError as error:
        _say(str(error))
        if isinstance(error, CommandError):
            return error.code
        return _USAGE if isinstance(error, MissingExtraError) else _FAILED
    except OSError as error:
        if error.errno in _NO_ROOM:
            _drop_the_rest()
            _say(f"cannot write the output: {error.strerror}")
        else:
            where = "" if error.filename is None else f": {error.filename}"
            _say(f"the system refuses: {error.strerror or error}{where}")
        return _FAILED
    return code


def _say(problem: str) -> None:
    # print() would take standard output in the place of a standard error that was closed.
    if sys.stderr is not None:
        print(f"safepool: error: {printable(problem)}", file=sys.stderr)


def _drop_the_rest() -> None:
    """Let the interpreter's last flush succeed: the reader is gone."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    ours, command = _split(sys.argv[1:] if argv is None else argv)
    try:
        options, unknown = parser.parse_known_args(ours)
        name, asked = options.module, options.parser
        if unknown:
            # The error refers to the help of that command, which lists the known options.
            asked.error(f"unrecognized arguments: {' '.join(unknown)}")
        # argparse must not see a first "--" that belongs to the command.
        if command:
            options.command = [*options.command, *command[bool(not options.command) :]]
        if name == "doctor" and options.libraries and (options.pid or options.watched):
            asked.error("--pid and --watch cannot be combined with a library")
        if options.address and (name != "limits_screen" or options.pid or options.watched):
            asked.error("--cluster cannot be combined with --pid, --watch or another command")
        if name == "run" and not options.command:
            asked.error("a command is missing, as in: safepool run -- python train.py")
    except SystemExit as stop:
        # argparse leaves this way after --help, --version and wrong arguments.
        return stop.code if isinstance(stop.code, int) else _USAGE
    if options.address:
        name = "cluster_screen"
    elif name == "doctor" and not options.libraries:
        name = "limits_screen"
    given = vars(options)
    if name in ("run", "env"):
        given["plan"] = _call(importlib.import_module("safepool.cli.run").plan_here, given)
    code: int = _call(importlib.import_module(f"safepool.cli.{name}").run, given)
    return code


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Cut the arguments of ``run`` before the first ``--``; releases of argparse differ there.

    Example:
        >>> _split(["run", "--force", "--", "make", "--", "all"])
        (['run', '--force'], ['--', 'make', '--', 'all'])
        >>> _split(["doctor", "--", "numpy"])
        (['doctor', '--', 'numpy'], [])
    """
    # The first word that is no option and no number, which would belong to --pid.
    run = next((place for place, word in enumerate(argv) if word.isalpha()), len(argv))
    if "--" not in argv[run:] or argv[run] != "run":
        return list(argv), []
    at = list(argv).index("--", run)
    return list(argv[:at]), list(argv[at:])


def _call(function: Callable[..., Any], words: dict[str, Any]) -> Any:
    """Call a function with the options that it names."""
    return function(**{name: words[name] for name in inspect.signature(function).parameters})


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help as wide as every screen here, however wide the terminal is."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{**options, "width": WIDTH - 2})


class _Parser(argparse.ArgumentParser):
    """Parser with errors of one line, and the same form of help for every command."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "formatter_class": _Help})

    def error(self, message: str) -> NoReturn:
        if unknown := _UNKNOWN_COMMAND.match(message):
            message = _likely(unknown[1], re.findall(r"[a-z]+", unknown[2]))
        self.exit(_USAGE, f"{self.prog}: error: {printable(message)} (see {self.prog} --help)\n")


# argparse's text: in 3.11 with quoted names, later without quotes, from 3.15 on with a guess.
_UNKNOWN_COMMAND = re.compile(
    r"argument command: invalid choice: '(.*?)'(?:, maybe you meant .*)? \(choose from (.*)\)"
)


def _likely(name: str, commands: list[str]) -> str:
    """Return the error text for an unknown command, with the likely one.

    Example:
        >>> _likely("docter", ["limits", "doctor", "run"])
        "there is no command 'docter'. Did you mean: safepool doctor"
        >>> _likely("fly", ["limits", "doctor", "run"])
        "there is no command 'fly', only limits, doctor, run"
    """
    close = difflib.get_close_matches(name, commands, n=1)
    if close:
        meant = f". Did you mean: safepool {close[0]}"
    elif shutil.which(name):
        meant = f". To start a program: safepool run -- {name} ..."
    else:
        meant = f", only {', '.join(commands)}"
    return f"there is no command '{name}'{meant}"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="safepool",
        description="Process pools that fit the machine they run on. Without a command: the\n"
        "limits of this process, their sources, and problems that follow from them.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"safepool {safepool.__version__}")
    parser.add_argument(
        "--json", action="store_true", dest="as_json", help="print JSON, for programs"
    )
    _add_limits_options(parser)
    _add_cluster_option(parser)
    parser.set_defaults(module="limits_screen", parser=parser)
    commands = parser.add_subparsers(title="commands", metavar="command")

    def add(
        name: str, text: str, description: str, examples: str, usage: str | None = None
    ) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(
            name, help=text, description=description, epilog=examples, usage=usage
        )
        made.set_defaults(module=name, parser=made)
        return made

    text = "limits of this process, their sources, and the workers that fit (the default)"
    limits = add("limits", text, _LIMITS, _LIMITS_EXAMPLES)
    limits.set_defaults(module="limits_screen")

    text = "native thread pools of your libraries, and the variables that bound them"
    doctor = add("doctor", text, _DOCTOR, _DOCTOR_EXAMPLES)
    _add_doctor_options(doctor)

    text = "start an unmodified program with its limits set"
    usage = "safepool run [options] -- COMMAND [ARGUMENT ...]"
    run = add("run", text, _RUN, _RUN_EXAMPLES, usage)
    run.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    _add_run_options(run)
    run.add_argument(
        "--explain", action="store_true", help="print the variables to standard error"
    )

    env = add("env", "print what 'safepool run' sets, for eval", _ENV, _ENV_EXAMPLES)
    env.set_defaults(form="sh")
    _add_run_options(env)
    forms = env.add_mutually_exclusive_group()
    for option, known, text in (
        ("--shell", ["sh", "fish"], "print statements for this shell"),
        ("--format", ["dotenv", "json"], "print lines of a .env file, or JSON"),
    ):
        forms.add_argument(
            option, dest="form", choices=known, default=argparse.SUPPRESS, help=text
        )

    text = "the same SciPy and NumPy work in ProcessPoolExecutor() and in safepool's pool"
    demo = add("demo", text, _DEMO, _DEMO_EXAMPLES)
    _add_demo_options(demo)

    text = "how a pool's workers spent their time"
    report = add("report", text, _REPORT, _REPORT_EXAMPLES)
    report.add_argument("path", metavar="FILE", help="trace file of the pool")

    text = "the present task of each worker of a running process"
    top = add("top", text, _TOP, _TOP_EXAMPLES)
    text = "process id of the program that made the pool"
    top.add_argument("pid", type=_whole_number(at_least=1), metavar="PID", help=text)
    for command in (limits, doctor, demo, report, top):
        # Suppressed: a default here would undo a --json that stands before the command.
        command.add_argument(
            "--json",
            action="store_true",
            dest="as_json",
            default=argparse.SUPPRESS,
            help="print JSON",
        )
    _add_limits_options(limits, default=argparse.SUPPRESS)
    _add_limits_options(doctor, "without a library: ", default=argparse.SUPPRESS)
    _add_cluster_option(limits, default=argparse.SUPPRESS)
    return parser


_EXAMPLES = """\
examples:
  safepool                           limits and problems of this machine
  safepool --pid 4711 --watch        a running process, a line a second
  safepool --cluster tcp://h:8786    each node of a Dask cluster
  safepool --json | jq .findings     for programs
  safepool doctor numpy              native threads of a library
  safepool run -- python train.py    start a program with its limits set

Exit codes: 0 fine, 1 a problem was found, 2 wrong usage or a package is
missing, 130 Ctrl-C; safepool run: the program's own, 126, 127. For a
container's health check: safepool --pid 1 > /dev/null
Colours only on a terminal, and not with NO_COLOR=1."""

_LIMITS = """\
Print the limits of this process with their sources, and an arrow (->) at the
limit that decides how many workers fit; the number of times that the kernel has
throttled the group (frozen it, because it had used up its CPU time); the number
of workers that Python's pools would start here; and a verdict with a remedy."""

_LIMITS_EXAMPLES = """\
examples:
  safepool limits                    the same as: safepool
  safepool limits --pid 4711         of a running process
  safepool limits --watch            a line a second, until Ctrl-C
  safepool limits --json | jq .budget.workers

Exit codes: 0 no problem, 1 a problem was found, 2 the process does not exist,
130 Ctrl-C."""


_REPORT = """\
Print how the workers of safepool.ProcessPool(trace=FILE) spent their time:
busy, idle while calls waited, and without calls; the time for pickling, the
time for which the kernel froze the group, deaths, retries and the slowest
calls; and a conclusion. A file that a crash has cut off is read as well."""

_REPORT_EXAMPLES = """\
examples:
  safepool report run.json           for people
  safepool report --json run.json | jq .conclusion

Exit codes: 0 the file was read, 2 the file does not exist or is no trace,
130 Ctrl-C. To see the trace itself, open it at https://ui.perfetto.dev"""


_TOP = """\
Print the workers of every safepool pool of a process: task, seconds, memory and
threads of each. On a terminal the table is drawn again each second until
Ctrl-C, otherwise it is printed once. The command reads /proc and sends nothing
to the process. Linux, for processes of your own user."""

_TOP_EXAMPLES = """\
examples:
  safepool top 4711
  safepool top --json 4711 | jq '.workers[] | select(.running_s > 60)'

Exit codes: 0 the table was printed, or the process has ended, 2 the process
does not exist, has no workers, or is another user's, 130 Ctrl-C."""


def _add_limits_options(parser: argparse.ArgumentParser, when: str = "", **default: Any) -> None:
    parser.add_argument(
        "--pid",
        type=_whole_number(at_least=1),
        metavar="N",
        help=f"{when}evaluate another running process (Linux)",
        **default,
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        dest="watched",
        help=f"{when}print a line a second: CPU time used, and throttling (Linux)",
        **default,
    )


def _add_cluster_option(parser: argparse.ArgumentParser, **default: Any) -> None:
    parser.add_argument(
        "--cluster",
        dest="address",
        metavar="ADDRESS",
        help="print the limits of each node of a Dask scheduler, such as tcp://10.0.0.1:8786 "
        "(needs safepool[dask]; waits 10 s for the scheduler, and 10 s for the nodes)",
        **default,
    )


_DOCTOR = """\
Import libraries one after the other in a fresh process without caps. Print for
each library: its native thread pools, their files, their default number of
threads here, the environment variable that bounds them and its value, and the
number of threads of the process afterwards. Without a library: the same as
'safepool limits'."""

_DOCTOR_EXAMPLES = """\
examples:
  safepool doctor numpy scipy.linalg        names as in Python's import
  OMP_NUM_THREADS=4 safepool doctor torch   with a variable that you set
  safepool doctor --json numpy | jq '.libraries[].os_threads'

Exit codes: 0 fine, 1 a library could not be imported (the others are reported),
2 wrong usage."""


def _add_doctor_options(doctor: argparse.ArgumentParser) -> None:
    doctor.add_argument(
        "libraries", nargs="*", metavar="LIBRARY", help="module to import, such as numpy"
    )
    doctor.add_argument(
        "--timeout",
        dest="limit_s",
        type=_number(at_least=0.1),
        default=60.0,
        metavar="SECONDS",
        help="end an import that takes longer (%(default)g)",
    )


_RUN = """\
Set variables so that workers x threads fit the present limit, and start a
program. The variables bound its native threads (OMP_NUM_THREADS,
OPENBLAS_NUM_THREADS, MKL_NUM_THREADS, ...), its process pools
(LOKY_MAX_CPU_COUNT, PYTHON_CPU_COUNT, ...) and tools in other languages
(GOMAXPROCS, CARGO_BUILD_JOBS, MAX_JOBS, ...). Variables that you have set keep
their value. The default is as many workers as CPUs, with one thread each; with
--workers 1, a program of one process gets all threads. Exit status and signals
are the program's, also as the first process of a container."""

_RUN_EXAMPLES = """\
examples:
  safepool run -- python train.py
  safepool run --workers 1 -- python one_process.py   all threads to one process
  safepool run --workers 2 --threads auto -- pytest -n auto
  safepool run --patch -- python uses_executor.py     safepool's pools inside
  safepool run --explain -- true                      only print the variables

--patch needs safepool in the program's Python. It also affects the Python
processes that the program starts. It has no effect on python -I, -E and -S.

Exit codes: the program's own; 126 the program cannot be run, 127 it was not
found, 2 wrong usage."""


_ENV = """\
Print the variables that 'safepool run' sets with the same options, as
statements for a shell: eval "$(safepool env)". Variables that you have set are
not printed, and keep their value."""

_ENV_EXAMPLES = """\
examples:
  safepool env                       for eval in sh, bash and zsh
  safepool env --shell fish | source
  safepool env --format dotenv       for docker run --env-file
  safepool env --format json | jq .OMP_NUM_THREADS

Exit codes: 0 fine, 2 wrong usage, 130 Ctrl-C."""


def _add_run_options(run: argparse.ArgumentParser) -> None:
    run.add_argument(
        "--workers",
        type=_whole_number(at_least=1),
        metavar="N",
        help="processes that the program starts (as many as fit)",
    )
    run.add_argument(
        "--threads",
        type=_threads,
        default="auto",
        metavar="auto|N",
        help="threads of each native pool in each process (%(default)s: the limit divided "
        "by the workers)",
    )
    run.add_argument(
        "--reserve",
        type=_number(at_least=0),
        default=0.0,
        metavar="X",
        help="CPUs to leave free, such as 0.5 (%(default)g)",
    )
    run.add_argument(
        "--force", action="store_true", help="also replace variables that you have set"
    )
    run.add_argument("--makeflags", action="store_true", help="also set MAKEFLAGS=-jN, for make")
    run.add_argument(
        "--patch",
        action="store_true",
        help="replace ProcessPoolExecutor, multiprocessing.Pool and joblib's default backend by "
        "safepool's",
    )


def _threads(text: str) -> int | Literal["auto"]:
    return "auto" if text == "auto" else _whole_number(at_least=1)(text)


_DEMO = """\
Run the same SciPy and NumPy work in ProcessPoolExecutor() and in safepool's
pool, under the present limit or under a quota made for it, and compare
their time, threads and results. A pool that takes too long is cut off."""

_DEMO_EXAMPLES = """\
examples:
  safepool demo                      under the present limits
  safepool demo --cpus 1             with one CPU, as in a small container
  safepool demo --cpus 1 --pretend-host-cpus 48   on a host of 48 CPUs
  safepool demo --plot demo.svg      and a picture of it

Exit codes: 0 fine, 1 safepool's pool failed, was cut off or had other results,
2 wrong usage or a package is missing, 130 Ctrl-C."""


def _add_demo_options(demo: argparse.ArgumentParser) -> None:
    # The defaults end within a minute on a laptop: alone on one CPU the batch takes about a
    # second, and a pool that exceeds the bound is cut off.
    demo.add_argument(
        "--tasks",
        # Their results, of 81 numbers each, are compared in memory.
        type=_whole_number(at_least=1, at_most=100_000),
        default=192,
        metavar="N",
        help="number of tasks (%(default)s)",
    )
    demo.add_argument(
        "--points",
        # A task's result keeps this many numbers of each operation.
        type=_whole_number(at_least=16),
        default=150,
        metavar="N",
        help="scattered points, and rows of the matrices, in each task (%(default)s)",
    )
    demo.add_argument(
        "--cpus",
        # The kernel takes no quota below 1 ms, of a period of 100 ms (sched-bwc.rst).
        type=_number(at_least=0.01),
        metavar="X",
        help="run under a quota of X CPUs, in a control group made for it and removed again "
        "(Linux, as root; no effect elsewhere)",
    )
    demo.add_argument(
        "--pretend-host-cpus",
        # The standard pool then has 128 x 128 threads (NumPy and SciPy each bring an OpenBLAS,
        # compiled for 64): half of the 32,768 thread ids of Linux by default (proc_sys_kernel(5)).
        type=_whole_number(at_least=1, at_most=128),
        metavar="N",
        help="report N CPUs to Python and native libraries, as in a container on a host of "
        "that size (Linux, with a C compiler; the limit stays real)",
    )
    demo.add_argument(
        "--bound",
        dest="bound_s",
        type=_number(at_least=0.01),
        default=20.0,
        metavar="SECONDS",
        help="end a pool's run after this time (%(default)g)",
    )
    demo.add_argument(
        "--plot",
        type=_picture,
        metavar="FILE",
        help="draw the result into a .svg or .png file (needs safepool[plot])",
    )


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in {".svg", ".png"}:
        raise argparse.ArgumentTypeError(
            f"expected a file that ends in .svg or .png, found {text!a}"
        )
    return path


def _whole_number(*, at_least: int, at_most: int | None = None) -> Callable[[str], int]:
    bounds = f"of at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"

    def parse(text: str) -> int:
        number = int(text) if text.isascii() and text.isdecimal() else -1
        if number < at_least or (at_most is not None and number > at_most):
            raise argparse.ArgumentTypeError(f"expected a whole number {bounds}, found {text!a}")
        return number

    return parse


def _number(*, at_least: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        # Written so that "nan" fails too.
        if not at_least <= number < math.inf:
            raise argparse.ArgumentTypeError(
                f"expected a number of at least {at_least:g}, found {text!a}"
            )
        return number

    return parse
