"""``safepool run``: what it sets and what it leaves alone, and that it becomes the program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from support_processes import still_alive

import safepool
from safepool.budget import Budget
from safepool.cli import main, run
from safepool.cli.run import Plan, plan
from safepool.limits import Limit

REPOSITORY = Path(safepool.__file__).parent.parent
SCREENS = Path(__file__).parent / "run_screens"

QUOTA = Limit(
    name="cpu.max", cpus=4.5, source="/sys/fs/cgroup/p\u00f6d/cpu.max", raw="450000 100000"
)
TWO_BY_TWO = Budget(workers=2, threads_per_worker=2, cpus=4.5, because=QUOTA)
FOUR_BY_ONE = Budget(workers=4, threads_per_worker=1, cpus=4.5, because=QUOTA)

USERS = {
    "OMP_NUM_THREADS": "3",
    "GOTO_NUM_THREADS": "8",
    "LOKY_MAX_CPU_COUNT": "7",
    "NUMBA_NUM_THREADS": "it's much",
    "HOME": "/root",
}

# One row per file in run_screens/.
PLANS: dict[str, Plan] = {
    "nothing-was-set": plan({"HOME": "/root"}, FOUR_BY_ONE),
    "much-was-set": plan(USERS, TWO_BY_TWO, exact=True),
    "by-force-and-patched": plan(USERS, TWO_BY_TWO, force=True, patch=True),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_explanation_reads_as_its_file(name: str) -> None:
    text = PLANS[name].as_text().replace(str(REPOSITORY), "REPOSITORY")

    assert f"{text}\n" == (SCREENS / f"{name}.txt").read_text()
    assert text.isascii()
    assert [line for line in text.split("\n") if len(line) > 80 and "PYTHONPATH" not in line] == []


def test_every_file_has_a_plan() -> None:
    assert {path.name for path in SCREENS.iterdir()} == {f"{name}.txt" for name in PLANS}


def test_what_the_user_has_set_stays_and_rules_what_falls_back_to_it() -> None:
    found = plan(USERS, TWO_BY_TWO).applied_to(USERS)

    assert {name: found[name] for name in USERS} == USERS
    # Each would beat OMP_NUM_THREADS=3, or GOTO_NUM_THREADS=8, in the library that reads both.
    assert {"OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS"}.isdisjoint(found)
    assert found["POLARS_MAX_THREADS"] == "2"


def test_an_empty_variable_is_not_set() -> None:
    environ = {"OMP_NUM_THREADS": "", "LOKY_MAX_CPU_COUNT": ""}

    assert plan(environ, TWO_BY_TWO).kept == {}


def test_by_force_nothing_is_left_that_beats_the_cap() -> None:
    found = plan(USERS, TWO_BY_TWO, force=True).applied_to(USERS)

    assert found["OMP_NUM_THREADS"] == found["OPENBLAS_NUM_THREADS"] == "2"
    assert found["LOKY_MAX_CPU_COUNT"] == "2"
    assert "GOTO_NUM_THREADS" not in found


def test_the_users_python_path_stays_behind_the_start_file() -> None:
    changes = plan({"PYTHONPATH": f"a{os.pathsep}b"}, TWO_BY_TWO, patch=True).changes

    first, *rest = str(changes["PYTHONPATH"]).split(os.pathsep)
    assert (Path(first) / "sitecustomize.py").is_file()
    assert rest == ["a", "b"]


# One row per command line of Python: the option that keeps the start file out, if any.
ISOLATING = {
    "python -I x.py": "-I",
    "/usr/bin/python3.12 -uIW error x.py": "-uIW",
    "pypy3 -E -m x": "-E",
    "python -X dev -S": "-S",
    "python -Xdev -WI x.py": None,
    "python -W -I x.py": None,
    "python -X -I x.py": None,
    "python x.py -I": None,
    "python -c -I": None,
    "python -m x -I": None,
    "python --check-hash-based-pycs always x.py -I": None,
    "python - -I": None,
    "python": None,
    "grep -I x": None,
}


@pytest.mark.parametrize("line", ISOLATING)
def test_a_python_that_looks_for_no_start_file_is_refused(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(run, "_become", lambda command, _: started.append(command) or 0)

    code = main(["run", "--patch", "--", *line.split()])

    err = capsys.readouterr().err
    if ISOLATING[line] is None:
        assert (code, err, started) == (0, "", [line.split()])
    else:
        assert (code, started) == (2, [])
        assert f"--patch cannot reach python {ISOLATING[line]}:" in err
        assert err.count("\n") == 1


# One row per way to write a command: the arguments, and the command that is started.
COMMANDS = {
    "after two dashes": (["--", "make", "-j"], ["make", "-j"]),
    "with dashes of its own": (["--", "git", "log", "--", "x"], ["git", "log", "--", "x"]),
    "without two dashes": (["make", "-j", "--workers", "3"], ["make", "-j", "--workers", "3"]),
    "without, with dashes of its own": (["git", "--", "x"], ["git", "--", "x"]),
    "an option first": (["--threads", "2", "--", "--odd"], ["--odd"]),
}


@pytest.mark.parametrize("way", COMMANDS)
def test_the_command_is_taken_word_for_word(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, expected = COMMANDS[way]
    started: list[list[str]] = []
    monkeypatch.setattr(run, "_become", lambda command, _: started.append(command) or 0)

    assert main(["run", *arguments]) == 0
    assert started == [expected]


def test_an_option_before_run_is_not_taken_for_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(run, "_become", lambda command, _: started.append(command) or 0)

    assert main(["--pid", "1", "run", "--", "make"]) == 0
    assert main(["--", "run", "--", "make"]) in {0, 2}  # releases of argparse differ

    assert started[0] == ["make"]
    assert "Traceback" not in capsys.readouterr().err


# One row per command that cannot be started: its arguments, the exit code, what is said.
UNSTARTABLE = {
    "none": ([], 2, "a command is missing"),
    "only dashes": (["--"], 2, "a command is missing"),
    "not there": (["--", "no-such-command"], 127, "no-such-command: command not found"),
    "a folder": (["--", "/"], 126, "/: cannot be run"),
    "an empty word": (["--", ""], 127, "the command is empty."),
    "no workers": (["--workers", "0", "--", "true"], 2, "at least 1, found '0'"),
    "odd threads": (["--threads", "many", "--", "true"], 2, "found 'many'"),
    "a misspelled option": (["--wrokers", "3"], 2, "--wrokers (see safepool run --help)"),
    "a negative reserve": (["--reserve", "-1", "--", "true"], 2, "expected"),
}


@pytest.mark.parametrize("case", UNSTARTABLE)
def test_what_cannot_be_started_is_one_line(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    arguments, code, said = UNSTARTABLE[case]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGPIPE, signal.SIGXFSZ)}
    try:
        assert main(["run", *arguments]) == code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    out, err = capfd.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


# One row per script: its text, and what is said of it with --patch; None if it is started.
SCRIPTS = {
    "#!/usr/bin/python3\n": None,
    "#!/usr/bin/env python3\n": None,
    "#! /usr/bin/python3 -Es\n": "-Es",
    "#!/usr/bin/env -S python3 -uI\n": "-uI",
    "#!/bin/sh -E\n": None,
    "echo\n": None,
    "": None,
}


@pytest.mark.skipif(sys.platform == "win32", reason="there is no #! there")
@pytest.mark.parametrize("text", SCRIPTS)
def test_a_script_whose_python_looks_for_no_start_file_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first line of a script is a command line, too: Debian's and pip's own have options."""
    monkeypatch.setattr(run, "_become", lambda *_: 0)
    option = SCRIPTS[text]

    code = main(["run", "--patch", "--", written(tmp_path, text)])

    err = capsys.readouterr().err
    assert code == (0 if option is None else 2)
    assert err == "" if option is None else f"--patch cannot reach python {option}:" in err


def written(folder: Path, text: str) -> str:
    script = folder / "script"
    script.write_text(text)
    script.chmod(0o755)
    return str(script)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no #! there")
def test_a_script_without_a_first_line_is_the_shells(tmp_path: Path) -> None:
    """As for every program that starts another one by execvp(3)."""
    ended = safepool_run("--", written(tmp_path, 'echo "$1-$OMP_NUM_THREADS"; exit 5'), "x y")

    assert (ended.returncode, ended.stdout, ended.stderr) == (5, "x y-1\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no #! there")
def test_a_script_whose_interpreter_is_missing_says_so(tmp_path: Path) -> None:
    ended = safepool_run("--", written(tmp_path, "#!/no/such/python -u\n"))
    of_windows = safepool_run("--", written(tmp_path, "#!/bin/sh\r\n"))

    assert ended.returncode == 126
    assert ended.stderr.endswith(
        "script: cannot be run: its interpreter /no/such/python does not exist\n"
    )
    assert of_windows.stderr.endswith(
        "cannot be run: its interpreter /bin/sh\\x0d does not exist\n"
    )


def safepool_run(
    *arguments: str, cwd: Path | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, with no thread variable set but ``environ``."""
    ours = set(plan({}, FOUR_BY_ONE).changes)
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    # Where the tests run from a folder that is not installed.
    inherited.setdefault("PYTHONPATH", str(REPOSITORY))
    return subprocess.run(
        [sys.executable, "-m", "safepool", "run", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd or REPOSITORY,
        env={**inherited, **environ},
        timeout=100,
        check=False,
    )


def test_the_program_sees_the_numbers_and_ends_as_it_likes() -> None:
    code = (
        "import os, sys, json\n"
        "print(json.dumps({n: os.environ.get(n) for n in sys.argv[1:]}))\n"
        "sys.exit(41)"
    )
    names = ["OMP_NUM_THREADS", "LOKY_MAX_CPU_COUNT", "MKL_NUM_THREADS", "SAFEPOOL_MAX_WORKERS"]

    ended = safepool_run(
        *("--workers", "3", "--threads", "2", "--", sys.executable, "-c", code, *names),
        MKL_NUM_THREADS="5",
    )

    assert (ended.returncode, ended.stderr) == (41, "")
    assert list(json.loads(ended.stdout).values()) == ["2", "3", "5", "3"]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no exec there")
def test_it_is_the_program_and_its_signals_are_the_programs() -> None:
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n"
    # A Python that starts up ignores SIGPIPE itself, so a shell looks.
    shell = "kill -PIPE $$; echo survived"

    ended = safepool_run("--", sys.executable, "-c", code)
    piped = safepool_run("--", "sh", "-c", shell)

    assert ended.returncode == -signal.SIGTERM
    assert (piped.returncode, piped.stdout) == (-signal.SIGPIPE, "")


def test_explain_leaves_standard_output_to_the_program() -> None:
    options = ["--workers", "1", "--threads", "1", "--explain"]
    ended = safepool_run(*options, "--", sys.executable, "-c", "print('mine')")

    assert (ended.returncode, ended.stdout) == (0, "mine\n")
    assert "OMP_NUM_THREADS=1" in ended.stderr
    assert "because of --workers" in ended.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="there is no exec there")
def test_an_explanation_that_nobody_reads_does_not_keep_the_program_from_its_start() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "safepool", "run", "--explain", "--", "sh", "-c", "exit 7"]
    # Buffered: what cannot be written stays there, and is tried again with every flush.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    try:
        ended = subprocess.run(
            command, cwd=REPOSITORY, env=environ, stderr=writing, timeout=100, check=False
        )
    finally:
        os.close(writing)

    assert ended.returncode == 7


PROGRAM = """
import json, os, subprocess, sys
import concurrent.futures
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor as other

def pid(_):
    return os.getpid()

if __name__ == "__main__":
    with ProcessPoolExecutor(1) as pool:
        assert list(pool.map(pid, [1])) != [os.getpid()]
    from joblib import Parallel, delayed
    parallel = Parallel(n_jobs=2)
    assert parallel(delayed(abs)(n) for n in (-1, -2)) == [1, 2]
    explicit = Parallel(n_jobs=2, backend="threading")
    told = [ProcessPoolExecutor.__module__, other.__module__, type(parallel._backend).__name__]
    told += [type(explicit._backend).__name__, isinstance(pool, ProcessPoolExecutor)]
    told += [[path for path in sys.path if path.endswith("start")], sys.argv[1:]]
    print(json.dumps(told))
"""
PATCHED = [
    *("safepool.pool.executor", "safepool.pool.executor", "SafepoolBackend"),
    *("ThreadingBackend", True, [], ["x"]),
]

# One row per way to start a program: what follows the interpreter.
WAYS = {
    "a script": ["program.py", "x"],
    "a script, no folder of it on the path": ["-P", "program.py", "x"],
    "without a site's start file of the user": ["-s", "-B", "program.py", "x"],
    "-m": ["-m", "program", "x"],
    "-c": ["-c", f"import sys; sys.argv[1:] = ['x']\n{PROGRAM}"],
    "in a process of a process": [
        "-c",
        "import subprocess, sys\nsys.exit(subprocess.call([sys.executable, 'program.py', 'x']))",
    ],
}


@pytest.mark.skipif(sys.platform == "win32", reason="the pools are Linux's first of all")
@pytest.mark.parametrize("way", WAYS)
def test_patch_replaces_the_pools_of_a_program(way: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")

    ended = safepool_run("--patch", "--", sys.executable, *WAYS[way], cwd=tmp_path)

    assert ended.stderr == ""
    assert json.loads(ended.stdout) == PATCHED


def test_patch_leaves_other_names_and_the_modules_loader_alone() -> None:
    code = (
        "import concurrent.futures.process as p, inspect, pickle\n"
        "assert 'class ProcessPoolExecutor' in inspect.getsource(p)\n"
        "assert p.__spec__.loader is p.__loader__\n"
        "assert type(p.__loader__).__name__ == 'SourceFileLoader'\n"
        "try: p.nothing\n"
        "except AttributeError as e: print(e)\n"
        "try: from concurrent.futures.process import nothing\n"
        "except ImportError: print('no')\n"
    )

    ended = safepool_run("--patch", "--", sys.executable, "-c", code)

    assert (ended.stderr, ended.returncode) == ("", 0)
    assert ended.stdout.endswith("no\n")
    assert "'concurrent.futures.process' has no 'nothing'" in ended.stdout


def test_patch_costs_nothing_until_a_pool_is_asked_for() -> None:
    code = "import sys; print([n for n in sys.modules if n.split('.')[0] in ('safepool', 'loky')])"

    ended = safepool_run("--patch", "--", sys.executable, "-c", code)

    # An editable installation may have imported its finder, which has another name.
    assert ended.stdout == "[]\n"


def test_safepool_itself_can_be_imported_first() -> None:
    """Its pool imports the module that is patched with that very pool."""
    code = (
        "from safepool import ProcessPool\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "print(ProcessPool is ProcessPoolExecutor)"
    )

    ended = safepool_run("--patch", "--", sys.executable, "-c", code)

    assert (ended.stdout, ended.stderr) == ("True\n", "")


def test_a_start_file_of_the_users_runs_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nprint('mine', __name__)\n")
    code = "import sitecustomize; print(sitecustomize.__file__)"

    ended = safepool_run(
        *("--patch", "--", sys.executable, "-c", code),
        PYTHONPATH=os.pathsep.join([str(tmp_path), str(REPOSITORY)]),
    )

    # Once in the command's own Python, once in the program's.
    mine = "mine sitecustomize"
    assert ended.stdout.splitlines() == [mine, mine, str(tmp_path / "sitecustomize.py")]


def test_patch_reaches_a_module_that_a_pth_file_has_imported(tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    folders = [*(tmp_path / "env").glob("lib/python*/site-packages")]
    if not folders:
        pytest.skip("virtual environments are laid out otherwise here")
    early = (
        "from concurrent.futures import ProcessPoolExecutor; import concurrent, joblib.parallel"
    )
    (folders[0] / "early.pth").write_text(f"import sys; sys.path[:0] = {sys.path!r}; {early}\n")
    code = (
        "import concurrent.futures, joblib, multiprocessing.pool\n"
        "executor = concurrent.futures.ProcessPoolExecutor\n"
        "print(executor.__module__, joblib.parallel.DEFAULT_BACKEND)\n"
        "with multiprocessing.Pool(1) as pool: print(type(pool) is multiprocessing.pool.Pool)\n"
        "print(type(pool).__module__)"
    )

    ended = safepool_run("--patch", "--", str(tmp_path / "env/bin/python"), "-c", code)

    expected = "safepool.pool.executor safepool\nTrue\nsafepool.patched\n"
    assert (ended.stdout, ended.stderr) == (expected, "")


def test_patch_leaves_another_module_of_joblibs_name_alone(tmp_path: Path) -> None:
    (tmp_path / "joblib").mkdir()
    (tmp_path / "joblib" / "__init__.py").touch()
    (tmp_path / "joblib" / "parallel.py").write_text("mine = True")
    code = "import joblib.parallel; print(joblib.parallel.mine)"

    ended = safepool_run("--patch", "--", sys.executable, "-c", code, cwd=tmp_path)

    assert (ended.stdout, ended.stderr) == ("True\n", "")


def test_a_python_without_safepool_is_told_and_runs_the_program(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    python = str(tmp_path / "bare" / "bin" / "python")
    if not Path(python).exists():
        pytest.skip("virtual environments are laid out otherwise here")
    code = "from concurrent.futures import ProcessPoolExecutor as p; print(p.__module__)"
    environ = {"PYTHONPATH": ""}

    ended = subprocess.run(
        [python, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, **environ, "PYTHONPATH": str(run._START)},
        timeout=60,
        check=True,
    )

    assert ended.stdout == "concurrent.futures.process\n"
    assert ended.stderr == (
        f"safepool run: --patch has no effect: safepool is not installed for {python}\n"
    )


def test_calls_of_joblib_share_workers_that_end_with_the_program() -> None:
    """As joblib's own. The harness sees no children of another process: they are looked for."""
    code = (
        "from joblib import Parallel, delayed\n"
        "import os\n"
        "def f(n): return os.getpid()\n"
        "pids = set()\n"
        "for _ in range(3): pids |= set(Parallel(n_jobs=2)(delayed(f)(n) for n in range(4)))\n"
        "assert os.getpid() not in pids\n"
        "print(*pids)"
    )

    ended = safepool_run("--patch", "--", sys.executable, "-c", code)

    assert ended.stderr == ""
    pids = [int(pid) for pid in ended.stdout.split()]
    assert 1 <= len(pids) <= 2
    assert still_alive(pids, after_s=5) == []
