"""The harness: every test ends in time, and leaves nothing behind.

* A test that exceeds its time limit ends the run. Before that, the stack of every thread
  is printed, every process of the session is asked for its own, and all are killed: a run
  that hangs in CI tells nothing, and an orphan that holds the output pipe hangs the CI too.
* After each test, whatever process, thread, descriptor, memory file or name is new fails it
  (``leaks.py``).
* Processes may share a run (``pytest -n 3`` of pytest-xdist). Each is then a session of its own
  for the two above, and a test that is marked ``alone`` waits until the others pause.

Test files are imported with ``--import-mode=importlib``: two folders may have a
``test_errors.py`` each, and no folder needs an ``__init__.py``. The price is that a test
file is not importable by its plain name in a worker. A function that a worker must find by
name lives in a helper module directly in ``tests/`` (it is on ``pythonpath``).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from multiprocessing import util
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import imports_ahead
import leaks
import outcomes
import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

TESTS = Path(__file__).parent

# How long an asked process may take to print its stacks before it is killed. Few need more
# than a moment; on a machine with too much to do it is seconds until each had its turn.
LAST_WORDS_S = 5.0

# faulthandler's watchdog needs no interpreter lock: it ends a run that the timer thread
# cannot, because C code holds the lock. Late enough for the timer to finish its work.
WATCHDOG_MARGIN_S = 20.0

# After the last test: exit handlers and threads that somebody waits for at exit.
EXIT_LIMIT_S = 60.0

# What a user's shell or a CI says of colours and of the width of the screen.
SCREEN_VARIABLES = ("NO_COLOR", "FORCE_COLOR", "PY_COLORS", "COLUMNS", "LINES")

# A module of the package that is one platform's implementation asserts it on import.
PLATFORM_OF_MODULE = {"_linux": "linux", "_windows": "win32"}


class TimeoutSettings(Protocol):
    """What pytest-timeout has made of the configuration, the option and the marker."""

    timeout: float
    method: str
    disable_debugger_detection: bool


class Harness:
    """The hooks that a whole run needs, with what they keep from start to end."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        # pytest does not capture yet: this one leads to where the user looks.
        self._stderr = os.dup(2)
        self._timers: dict[pytest.Item, threading.Timer] = {}
        # pytest-xdist's word for one of the processes that share the run.
        self._shares = leaks.run_is_shared = hasattr(config, "workerinput")
        self._leads = bool(getattr(config.option, "numprocesses", None))
        self._units_only = config.option.markexpr == "unit"
        # In the temporary folder of the process that leads the run.
        self._turns = Turns(Path(tempfile.gettempdir(), "turns")) if self._shares else None
        self._tempdir = tempfile.mkdtemp(prefix="safepool-")
        # At exit, not after the last test: multiprocessing's exit handler still looks there.
        # After multiprocessing's own folder in it, which goes at -100.
        util.Finalize(
            None, shutil.rmtree, (self._tempdir,), {"ignore_errors": True}, exitpriority=-101
        )
        self._patch = pytest.MonkeyPatch()
        self._set_environment()

    def _set_environment(self) -> None:
        marks = os.environ.get(leaks.MARK_VARIABLE, "").split()
        if self._shares:
            # What another process of the run starts is not ours: another mark than the run's,
            # and another process group.
            del marks[0]
            os.setpgid(0, 0)
        self._patch.setenv(leaks.MARK_VARIABLE, " ".join([leaks.MARK, *marks]))
        for name in SCREEN_VARIABLES:
            self._patch.delenv(name, raising=False)
        # A thousand programs would compile the whole package, each for itself.
        self._patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        # A Python process that hangs prints its stacks when it is sent SIGABRT.
        self._patch.setenv("PYTHONFAULTHANDLER", "1")
        # A temporary folder of its own: a name that is new there is this session's doing,
        # whoever else works on the machine. pytest's folders outlive the run: not in there.
        if "PYTEST_DEBUG_TEMPROOT" not in os.environ:
            self._patch.setenv("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
        self._patch.setenv("TMPDIR", self._tempdir)
        self._patch.setattr(tempfile, "tempdir", self._tempdir)

    def pytest_unconfigure(self) -> None:
        """Undo the changes, and see to it that the exit ends too."""
        self._patch.undo()
        faulthandler.dump_traceback_later(EXIT_LIMIT_S, exit=True, file=self._stderr)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Wait for the turn, before the test's time begins to count."""
        if self._turns is None:
            return (yield)
        with self._turns.take(alone=item.get_closest_marker("alone") is not None):
            return (yield)

    def pytest_sessionstart(self) -> None:
        """Look at the names in shared memory, if others run the tests."""
        self._names = leaks.shared_names() if self._leads else frozenset()

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Look again: which of the processes has left a name is not to be told from the name."""
        left = leaks.names_since(self._names) if self._leads else []
        if left:
            self._print("\nthe run left behind:" + "".join(f"\n  {leak.what}" for leak in left))
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(tryfirst=True)
    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Look for doctests in the package, not in test helpers or on another platform."""
        if collection_path.suffix != ".py":
            return None
        # To import all the others would take longer than to run these.
        if self._units_only and "pytest.mark.unit" not in collection_path.read_text("utf-8"):
            return True
        if collection_path.is_relative_to(TESTS):
            return None if collection_path.name.startswith("test_") else True
        platform = PLATFORM_OF_MODULE.get(collection_path.stem, sys.platform)
        return None if platform == sys.platform else True

    @pytest.hookimpl(optionalhook=True)
    def pytest_timeout_set_timer(
        self, item: pytest.Item, settings: TimeoutSettings
    ) -> bool | None:
        """Take pytest-timeout's place for its method "thread", which leaves children alive."""
        if settings.method != "thread":
            return None
        faulthandler.dump_traceback_later(
            settings.timeout + WATCHDOG_MARGIN_S, exit=True, file=self._stderr
        )
        timer = threading.Timer(settings.timeout, self._expire, (item, settings))
        timer.name = leaks.TIMER + item.nodeid
        timer.daemon = True
        self._timers[item] = timer
        timer.start()
        return True

    @pytest.hookimpl(optionalhook=True)
    def pytest_timeout_cancel_timer(self, item: pytest.Item) -> bool | None:
        """End the timer when the test has ended."""
        timer = self._timers.pop(item, None)
        if timer is None:
            return None
        faulthandler.cancel_dump_traceback_later()
        timer.cancel()
        timer.join()
        return True

    def _expire(self, item: pytest.Item, settings: TimeoutSettings) -> None:
        from pytest_timeout import is_debugging

        if not settings.disable_debugger_detection and is_debugging():
            return
        try:
            self._print(
                f"\n+++ {item.nodeid} exceeded its time limit of {settings.timeout} s +++\n"
                + leaks.stacks(apart_from=threading.get_ident())
                + "~~~ processes of the session, ended now; what they say comes next\n"
                + "".join(f"{leaks.describe(process)}\n" for process in leaks.family())
            )
            _end_family()
            self._print(f"~~~ captured output\n{self._captured()}\n+++ the run ends here +++\n")
        except BaseException:
            self._print(traceback.format_exc())
            raise
        finally:
            # Every thread may be stuck, and exit handlers may wait for them: leave at once.
            shutil.rmtree(self._tempdir, ignore_errors=True)
            os._exit(1)

    def _print(self, text: str) -> None:
        with open(self._stderr, "w", errors="backslashreplace", closefd=False) as stderr:
            stderr.write(text)

    def _captured(self) -> str:
        manager = self._config.pluginmanager.getplugin("capturemanager")
        if manager is None or self._config.getoption("capture") == "no":
            return ""
        manager.suspend(in_=True)
        return "".join(manager.read_global_capture())


class Turns:
    """Lets the processes of one run test at the same time, apart from tests that must be alone.

    Record locks: they end with their process, and no child inherits them. The first is held by
    whoever waits for the second: one that wants to be alone is not overtaken for ever.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+b")

    @contextlib.contextmanager
    def take(self, *, alone: bool) -> Generator[None, None, None]:
        """Hold the turn, together with others or alone."""
        import fcntl

        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, 0)
        fcntl.lockf(self._file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH, 1, 1)
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, 0)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, 1)


def pytest_configure(config: pytest.Config) -> None:
    """Make hooks and fixtures hold for the package's doctests too, outside this folder."""
    if getattr(config.option, "numprocesses", None):
        # A process that ends has printed why, see above: the run ends too.
        config.option.maxworkerrestart = 0
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's job in the background. Programs that are to see Ctrl-C would inherit it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.pluginmanager.register(Harness(config), "time-limit")
    config.pluginmanager.register(leaks, "leaks")
    config.pluginmanager.register(imports_ahead, "imports-ahead")
    # Of the process that leads the run alone, which hears of every test.
    folder = os.environ.pop(outcomes.FOLDER_VARIABLE, "")
    if folder:
        config.pluginmanager.register(outcomes.Outcomes(folder), "outcomes")
    if config.pluginmanager.hasplugin("hypothesispytest"):
        _let_hypothesis_take_its_time()


def _let_hypothesis_take_its_time() -> None:
    """An example may take longer than 200 ms: what a busy machine does is no finding."""
    from hypothesis import HealthCheck, settings

    slow = [HealthCheck.too_slow]
    settings.register_profile("busy", settings(), deadline=None, suppress_health_check=slow)
    settings.load_profile("busy")


def _end_family() -> None:
    """Ask every process of the session for its stacks, then kill them all."""
    for process in _alive():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, signal.SIGABRT)
    deadline = time.monotonic() + LAST_WORDS_S
    while time.monotonic() < deadline and _alive():
        time.sleep(0.02)
    # More than once: a process may start others while it is looked for.
    for _ in range(20):
        rest = _alive()
        if not rest:
            return
        leaks.kill(rest)
        time.sleep(0.01)


def _alive() -> list[leaks.Process]:
    # Not what removes the names of shared memory that the others leave, and then ends by itself:
    # loky's and multiprocessing's.
    return [
        process
        for process in leaks.family()
        if process.state != "Z" and "resource_tracker import main" not in process.command
    ]
