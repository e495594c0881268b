"""The doctor: its report from data, word for word, and what it finds in real libraries."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import support_natives as natives
import support_schemas

import safepool
from safepool import linux
from safepool.cli import doctor, doctor_child, main
from safepool.cli.doctor import Change, DoctorError, Guest, Library, Report
from safepool.threads import NativePool

SCREENS = Path(__file__).parent / "doctor_screens"

SITE = "/opt/env/lib/python3.12/site-packages"


def openblas(
    library: str, threads: int, *, variable: str = "OPENBLAS_NUM_THREADS", value: str | None = None
) -> NativePool:
    return NativePool(
        runtime="openblas",
        library=library,
        threads=threads,
        variable=variable,
        value=value,
        fixed="the threads it has started",
        hole="",
        source="OpenBLAS README.md",
    )


OPENMP = NativePool(
    runtime="openmp",
    library="/usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0",
    threads=4,
    variable="OMP_NUM_THREADS",
    value="4,2",
    fixed="the number that threads begin with which a task starts",
    hole="an explicit num_threads(4), n_jobs=4 or the like is obeyed: pass 1, or set "
    "OMP_THREAD_LIMIT where no OpenBLAS is built on OpenMP",
    source="OpenMP 5.2",
)


def unknown(runtime: str, threads: int | None, library: str = "") -> NativePool:
    return NativePool(
        runtime=runtime,
        library=library,
        threads=threads,
        variable=None,
        value=None,
        fixed="",
        hole="no variable: ask its authors",
        source="this test",
    )


# One row per file in doctor_screens/.
REPORTS: dict[str, Report] = {
    "a-large-machine": Report(
        python="3.12.1",
        cpus=2.5,
        libraries=(
            Library(
                name="numpy",
                version="2.4.6",
                os_threads_before=1,
                os_threads=48,
                pools=(openblas(f"{SITE}/numpy.libs/libscipy_openblas64_-860d95b1.so", 48),),
            ),
            # The same runtime once more: what is to be known of it is said once.
            Library(
                name="scipy.linalg",
                version="1.17.1",
                os_threads_before=48,
                os_threads=95,
                pools=(openblas(f"{SITE}/scipy.libs/libscipy_openblas-6cdc3b4a.so", 48),),
            ),
        ),
    ),
    "variables-are-set": Report(
        python="3.11.7",
        cpus=4.0,
        libraries=(
            Library(
                name="sklearn.ensemble",
                version="1.9.1",
                os_threads_before=1,
                os_threads=5,
                pools=(
                    openblas(
                        "/usr/lib/libopenblas.so.0", 4, variable="OMP_NUM_THREADS", value="4"
                    ),
                    OPENMP,
                ),
            ),
        ),
    ),
    "an-import-changes-what-was-there": Report(
        python="3.11.7",
        cpus=48.0,
        libraries=(
            Library(
                name="blosc2",
                os_threads_before=64,
                os_threads=90,
                changed=(
                    Change(runtime="numexpr", library="x", threads_before=16, threads=42),
                    Change(runtime="polars", library="x", threads_before=None, threads=1),
                    Change(runtime="opencv", library="x", threads_before=2, threads=0),
                ),
            ),
            Library(
                name="xgboost",
                version="3.2.0",
                os_threads_before=90,
                os_threads=90,
                guests=(
                    Guest(
                        runtime="xgboost",
                        through="openmp",
                        fixed="",
                        hole="nthread of train() does not hold for DMatrix: pass it to both, or "
                        "to neither",
                    ),
                ),
            ),
        ),
    ),
    "sizes-are-not-told": Report(
        python="3.13.0",
        cpus=1.0,
        libraries=(
            Library(
                name="everything",
                version="1",
                os_threads_before=1,
                os_threads=1,
                pools=(
                    unknown("tensorflow-interop", None, f"{SITE}/tensorflow/__init__.py"),
                    unknown("tokio", 2),
                    unknown("opencv", 0, "C:\\Lib\\site-packages\\cv2\\__init__.py"),
                    unknown("itk", 1),
                ),
            ),
        ),
    ),
    "nothing-native": Report(
        python="3.13.0",
        cpus=1.0,
        libraries=(Library(name="json", version="2.0.9", os_threads_before=1, os_threads=1),),
    ),
    "threads-are-not-counted": Report(
        python="3.13.0",
        cpus=8.0,
        libraries=(
            Library(name="numpy", version="2.4.6", pools=(openblas("/opt/x/openblas.dll", 8),)),
        ),
    ),
    "much-cannot-be-imported": Report(
        python="3.11.7",
        cpus=2.0,
        libraries=(
            Library(
                name="scikit-learn",
                os_threads_before=1,
                os_threads=1,
                error="ModuleNotFoundError: No module named 'scikit-learn' (the package "
                "scikit-learn is imported as sklearn)",
            ),
            Library(
                name="br\u00fcchig",
                error="the process that imported it was killed by SIGSEGV (a crash in native "
                "code)\n"
                f'  File "{SITE}/a_folder/and_another_one/native/__init__.py", line 1 in <module>',
            ),
            # What it has brought before it gave up is there all the same.
            Library(
                name="half",
                os_threads_before=1,
                os_threads=2,
                error="ImportError: \u00e4\n\nsecond paragraph",
                pools=(openblas(f"{SITE}/half.libs/libopenblas.so", 2),),
            ),
        ),
    ),
}


@pytest.mark.parametrize("name", REPORTS)
def test_the_report_reads_as_its_file(name: str) -> None:
    expected = (SCREENS / f"{name}.txt").read_text()

    text = REPORTS[name].as_text().replace(safepool.__version__, "VERSION")

    assert f"{text}\n" == expected


def test_every_file_has_a_report() -> None:
    """A screen without a row is a test that never ran."""
    assert {path.name for path in SCREENS.iterdir()} == {f"{name}.txt" for name in REPORTS}


@pytest.mark.parametrize("name", REPORTS)
def test_the_report_is_ascii_of_80_columns_but_for_paths_of_a_stack(name: str) -> None:
    text = REPORTS[name].as_text()

    assert text.isascii()
    assert [line for line in text.split("\n") if len(line) > 80 and 'File "' not in line] == []
    assert [line for line in text.split("\n") if line != line.rstrip()] == []


@pytest.mark.parametrize("name", REPORTS)
def test_json_holds_every_field(name: str) -> None:
    report = REPORTS[name]

    told = json.loads(report.as_json())

    support_schemas.check("doctor", told)
    assert (told.pop("schema"), told.pop("version")) == (1, safepool.__version__)
    # Through JSON, so that tuples are lists on both sides.
    assert told == json.loads(json.dumps(asdict(report)))


def told(
    capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, dict[str, dict[str, object]], str]:
    """Run the command and return its exit code, its libraries by name, and its complaints."""
    code = main(["doctor", "--json", *arguments])
    out, err = capsys.readouterr()
    return code, {library["name"]: library for library in json.loads(out)["libraries"]}, err


def libraries(folder: Path, monkeypatch: pytest.MonkeyPatch, **sources: str) -> None:
    """Write modules that the process that imports will find."""
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_numpy_and_scipy_bring_an_openblas_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OPENBLAS_DEFAULT_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")

    code, found, err = told(capsys, "numpy", "scipy.linalg")

    assert (code, err) == (0, "")
    assert list(found) == ["numpy", "scipy.linalg"]
    for library in found.values():
        (pool,) = [pool for pool in library["pools"] if pool["runtime"] == "openblas"]
        assert (pool["variable"], pool["value"]) == ("OMP_NUM_THREADS", "2")
        assert Path(pool["library"]).exists()
        assert library["version"]
    assert found["numpy"]["pools"] != found["scipy.linalg"]["pools"]
    if sys.platform == "linux":
        assert found["numpy"]["os_threads_before"] == 1
        assert found["numpy"]["os_threads"] == found["scipy.linalg"]["os_threads_before"]


def test_on_a_machine_of_48_cpus_numpy_starts_48_threads(tmp_path: Path) -> None:
    if natives.missing("numpy") or natives.shim(tmp_path.parent) is None:
        pytest.skip("needs NumPy, and a compiler to build the shim with")
    code = "from safepool.cli import main; main(['doctor', '--json', 'numpy'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=natives.environment(natives.shim(tmp_path.parent)),
    )

    (library,) = json.loads(done.stdout)["libraries"]

    assert (library["os_threads_before"], library["os_threads"]) == (1, 48)
    assert [pool["threads"] for pool in library["pools"]] == [48]


def test_the_text_names_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "numpy"]) == 0

    out, err = capsys.readouterr()
    assert err == ""
    assert "numpy.libs/" in out or "openblas" in out
    assert "OPENBLAS_NUM_THREADS" in out


def test_nothing_is_imported_here(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries(tmp_path, monkeypatch, mine="import os\nprint('noise', os.getpid())\n")

    code, found, err = told(capsys, "mine")

    assert (code, err, found["mine"]["error"]) == (0, "", "")
    assert "mine" not in sys.modules


def test_what_cannot_be_imported_is_said_and_the_rest_goes_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries(
        tmp_path,
        monkeypatch,
        raises="raise ValueError('no\\nluck')\n",
        exits="import sys\nsys.exit('bye')\n",
        interrupts="raise KeyboardInterrupt\n",
        silent="class E(Exception):\n    def __str__(self): raise self\nraise E\n",
        good="__version__ = 7\n",
    )
    names = ["raises", "exits", "interrupts", "silent", "nosuch", "", ".relative", "good"]

    code, found, err = told(capsys, *names)

    assert code == 1
    assert list(found) == names
    assert found["raises"]["error"] == "ValueError: no\nluck"
    assert found["exits"]["error"] == "SystemExit: bye"
    assert found["interrupts"]["error"] == "KeyboardInterrupt: "
    assert found["silent"]["error"] == "E: (its text is not available)"
    assert found["nosuch"]["error"] == "ModuleNotFoundError: No module named 'nosuch'"
    assert found[""]["error"] != ""
    assert found[".relative"]["error"] != ""
    assert (found["good"]["error"], found["good"]["version"]) == ("", "")
    assert err.count("\n") == len(names) - 1
    assert "safepool doctor: error: raises: ValueError: no\n" in err


def test_a_package_is_told_by_the_name_to_import(capsys: pytest.CaptureFixture[str]) -> None:
    code, found, _ = told(capsys, "pytest-timeout")

    assert code == 1
    assert str(found["pytest-timeout"]["error"]).endswith(
        "(the package pytest-timeout is imported as pytest_timeout)"
    )


# One row per way an import can end the process: its source, and what the report must say.
ENDINGS = {
    "a crash": (
        "import ctypes\nctypes.string_at(0)\n",
        ["was killed by SIGSEGV (a crash in native code)", 'bad.py", line 2 in <module>'],
    ),
    "an exit": ("import os\nos._exit(0)\n", ["ended with exit code 0"]),
    "last words": (
        "import os, sys\nprint('I give up', file=sys.stderr, flush=True)\nos._exit(9)\n",
        ["ended with exit code 9", "  I give up"],
    ),
    "a hang": (
        "import time\ntime.sleep(600)\n",
        ["was killed after 2 seconds (--timeout)", 'bad.py", line 2 in <module>'],
    ),
}


@pytest.mark.skipif(sys.platform == "win32", reason="signals end otherwise there")
@pytest.mark.parametrize("ending", ENDINGS)
def test_an_import_that_ends_the_process_is_reported_and_the_others_are_imported_again(
    ending: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, said = ENDINGS[ending]
    libraries(tmp_path, monkeypatch, first="", bad=source, last="")

    limit_s = "2" if ending == "a hang" else "60"
    code, found, err = told(capsys, "--timeout", limit_s, "first", "bad", "last")

    assert code == 1
    assert [library["error"] == "" for library in found.values()] == [True, False, True]
    for words in said:
        assert words in str(found["bad"]["error"])
    assert err.startswith("safepool doctor: error: bad: the process that imported it ")
    assert err.count("\n") == 1


def test_without_room_for_a_watchdog_libraries_are_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_limit_s: float) -> None:
        raise RuntimeError("unable to start watchdog thread")

    monkeypatch.setattr("faulthandler.dump_traceback_later", refuse)

    assert doctor_child._import("json", 1.0)["error"] == ""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_a_fork_that_comes_back_from_the_import_ends(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a session of its own, where nobody would end it. The harness would find it, too."""
    source = "import os\nif os.fork() == 0:\n    os.setsid()\nelse:\n    os.wait()\n"
    libraries(tmp_path, monkeypatch, forking=source, last="")

    code, found, _ = told(capsys, "--timeout", "60", "forking", "last")

    assert (code, list(found)) == (0, ["forking", "last"])


@pytest.mark.skipif(sys.platform == "win32", reason="there are no process groups to end")
def test_a_process_that_an_import_leaves_behind_is_ended(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness would find it; and it must not be waited for."""
    source = "import subprocess\nsubprocess.Popen(['sleep', '600'])\n"
    libraries(tmp_path, monkeypatch, parent=source)
    begun = time.monotonic()

    code, _, _ = told(capsys, "parent")

    assert code == 0
    assert time.monotonic() - begun < 300


@pytest.mark.parametrize("name", ["numpy", "no_such_library"])
def test_no_file_of_the_current_folder_is_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Be the library installed or not, and beside files with names of the standard library's."""
    for file in (name, "random", "inspect", "json", "csv"):
        (tmp_path / f"{file}.py").write_text("open('run', 'w')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    code, _, err = told(capsys, name)
    command = [sys.executable, "-m", "safepool", "doctor", name]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)

    installed = importlib.util.find_spec(name) is not None
    assert (code, ended.returncode) == ((0, 0) if installed else (1, 1))
    for text in (err, ended.stderr):
        assert (f"(./{name}.py is not run; PYTHONPATH=. makes" in text) is not installed
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only /proc tells the number of threads")
def test_what_looks_after_an_import_is_not_counted(capsys: pytest.CaptureFixture[str]) -> None:
    _, found, _ = told(capsys, *sorted(sys.builtin_module_names))

    assert [name for name, row in found.items() if row["os_threads"] != 1] == []


def test_any_time_is_time_enough() -> None:
    (library,) = doctor.examine(["json"], limit_s=1e300)

    assert library.error == ""


def test_a_library_does_not_write_to_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    libraries(
        tmp_path, monkeypatch, odd="raise ValueError('\\x1b[2J')", version="__version__='1\\n2'"
    )

    assert main(["doctor", "odd", "version"]) == 1

    out, err = capsys.readouterr()
    assert "\\x1b[2J" in out
    assert "\\x0a" in out
    assert err == "safepool doctor: error: odd: ValueError: \\x1b[2J\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has files in memory")
def test_a_system_that_is_read_only_is_no_obstacle(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)

    assert told(capsys, "json")[0] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has files in memory")
def test_no_place_for_a_file_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not that the last resort was refused as well."""

    def refuse(*_: object) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    def refuse_memory(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(linux, "memfd_create", refuse_memory)

    assert main(["doctor", "json"]) == 1
    assert "No usable temporary directory" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no pread there")
def test_reading_what_was_told_does_not_move_who_writes() -> None:
    with doctor._file() as file:
        os.write(file.fileno(), b"first, second")

        assert doctor._read_from(file, 7) == b"second"
        assert doctor._read_from(file, 0) == b"first, second"
        os.lseek(file.fileno(), 5, os.SEEK_SET)
        doctor._read_from(file, 7)
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 5


def test_a_library_is_imported_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(told(capsys, "json", "json")[1]) == ["json"]


def test_a_process_that_cannot_begin_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_MODULE", "safepool.cli.no_such_module")

    assert main(["doctor", "json"]) == 1

    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(
        "safepool: error: the process that imports the libraries ended with exit code"
    )
    assert "no_such_module" in err
    assert err.count("\n") == 1
    with pytest.raises(DoctorError) as caught:
        doctor.examine(["json"], limit_s=1)
    assert caught.value.ending == "ended with exit code 1"


@pytest.mark.parametrize("arguments", [["doctor"], ["doctor", "--timeout", "5"]])
def test_without_a_library_the_limits_are_shown(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) in {0, 1}  # 1 where this machine has a problem
    assert "what this process may use" in capsys.readouterr().out


def test_the_kernel_counts_the_threads() -> None:
    counted = doctor_child._os_threads()

    assert (counted is not None and counted >= 1) == (sys.platform == "linux")
