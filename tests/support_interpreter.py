"""What code can find out about the interpreter it runs in, item by item.

Values are text and lists of text, so that two interpreters can be compared.
"""

from __future__ import annotations

import atexit
import builtins
import copyreg
import faulthandler
import gc
import locale
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
import warnings
from typing import Any


def state() -> dict[str, Any]:
    """Return everything of this interpreter that the user's imports and calls may rely on."""
    found: dict[str, Any] = {}
    for part in (_interpreter, _imports, _hooks, _settings, _logging, _warnings, _process):
        found |= part()
    return found


def _name(value: object) -> str:
    where = getattr(value, "__module__", None) or type(value).__module__
    return f"{where}.{getattr(value, '__qualname__', None) or type(value).__qualname__}"


def _interpreter() -> dict[str, Any]:
    return {
        "sys.flags": repr(sys.flags),
        "sys._xoptions": repr(sorted(sys._xoptions.items())),
        "sys.warnoptions": list(sys.warnoptions),
        "sys.argv": list(sys.argv),
        "sys.path": list(sys.path),
        "sys.prefix": [sys.prefix, sys.base_prefix, sys.executable],
        "sys.dont_write_bytecode": sys.dont_write_bytecode,
        "sys attributes": sorted(set(vars(sys)) - {"last_exc", "ps1", "ps2"}),
        "builtins": sorted(f"{name} {_name(value)}" for name, value in vars(builtins).items()),
        "threads": [thread.name for thread in threading.enumerate()],
        "the main thread": threading.current_thread() is threading.main_thread(),
        "the encodings": [sys.getfilesystemencoding(), sys.getdefaultencoding()],
    }


def _imports() -> dict[str, Any]:
    standard = sys.stdlib_module_names
    tops = {name.partition(".")[0] for name in sys.modules}
    return {
        "sys.meta_path": [*dict.fromkeys(_name(finder) for finder in sys.meta_path)],
        "sys.path_hooks": [_name(hook) for hook in sys.path_hooks],
        "modules of others": sorted(
            top
            for top in tops - standard
            # What the installation itself imports, by its .pth files.
            if not top.startswith(("__", "_virtualenv", "sitecustomize", "support_", "_"))
        ),
        "copyreg": sorted(_name(kind) for kind in copyreg.dispatch_table),
        "copyreg functions": sorted(_name(one) for one in copyreg.dispatch_table.values()),
        "mimetypes": getattr(sys.modules.get("mimetypes"), "inited", False),
        "asyncio": "asyncio" in sys.modules,
        "numbers": "numpy" in sys.modules,
    }


def _hooks() -> dict[str, Any]:
    known: Any = threading
    return {
        "sys.excepthook": sys.excepthook is sys.__excepthook__,
        "sys.unraisablehook": sys.unraisablehook is sys.__unraisablehook__,
        "sys.displayhook": sys.displayhook is sys.__displayhook__,
        "sys.breakpointhook": sys.breakpointhook is sys.__breakpointhook__,
        "threading.excepthook": threading.excepthook is known.__excepthook__,
        "threading's trace and profile": [repr(known._trace_hook), repr(known._profile_hook)],
        "trace and profile": [repr(sys.gettrace()), repr(sys.getprofile())],
        "asynchronous generators": repr(sys.get_asyncgen_hooks()),
        "faulthandler": faulthandler.is_enabled(),
        "exit functions": getattr(atexit, "_ncallbacks")(),  # noqa: B009 -- not in the stubs
        "gc.callbacks": [_name(one) for one in gc.callbacks],
    }


def _settings() -> dict[str, Any]:
    decimal: Any = sys.modules.get("decimal")
    csv: Any = sys.modules.get("csv")
    random: Any = sys.modules.get("random")
    return {
        "gc": [gc.isenabled(), gc.get_threshold(), gc.get_debug()],
        "recursion limit": sys.getrecursionlimit(),
        "digits of an int": sys.get_int_max_str_digits(),
        "switch interval": sys.getswitchinterval(),
        "dlopen flags": sys.getdlopenflags(),
        "coroutine origins": sys.get_coroutine_origin_tracking_depth(),
        "locale": locale.setlocale(locale.LC_ALL),
        "time zone": list(time.tzname),
        "socket's timeout": socket.getdefaulttimeout(),
        "decimal": repr(decimal.getcontext()) if decimal else "",
        "csv": csv.field_size_limit() if csv else 0,
        "random is seeded": random is None or random.getstate() != random.Random(0).getstate(),
        "tempfile": repr(getattr(sys.modules.get("tempfile"), "tempdir", None)),
        "start method": repr(
            getattr(sys.modules.get("multiprocessing.context"), "_default_context", None)
            and sys.modules["multiprocessing"].get_start_method(allow_none=True)
        ),
    }


def _logging() -> dict[str, Any]:
    manager: Any = logging.root.manager
    own = logging.getLogger("an application's")
    del manager.loggerDict["an application's"]
    return {
        "loggers": sorted(
            f"{name} {type(logger).__name__}" for name, logger in manager.loggerDict.items()
        ),
        "a logger": [own.level, own.propagate, own.disabled, len(own.filters), len(own.handlers)],
        "handlers": len(logging._handlers),  # type: ignore[attr-defined]
        "root logger": [logging.root.level, [_name(one) for one in logging.root.handlers]],
        "logging's classes": [
            _name(logging.getLoggerClass()),
            repr(manager.loggerClass),
            _name(logging.getLogRecordFactory()),
            repr(manager.logRecordFactory),
            type(manager.loggerDict).__name__,
            _name(logging.lastResort),
        ],
        "logging's functions": [
            _name(one)
            for one in (
                *(value for name, value in vars(logging).items() if callable(value)),
                *(value for name, value in vars(logging.Logger).items() if callable(value)),
                *(value for name, value in vars(logging.Manager).items() if callable(value)),
            )
            if hasattr(one, "__wrapped__") or "<locals>" in _name(one)
        ],
        "manager": sorted(vars(manager)),
        "logging.disable": manager.disable,
        "logging.raiseExceptions": logging.raiseExceptions,
        "names of levels": repr(sorted(logging.getLevelNamesMapping().items())),
        "logging.captureWarnings": repr(logging._warnings_showwarning),  # type: ignore[attr-defined]
    }


def _warnings() -> dict[str, Any]:
    known: Any = warnings
    return {
        "warnings.filters": [repr(one) for one in warnings.filters],
        "warnings.showwarning": [_name(warnings.showwarning), _name(warnings.formatwarning)],
        "warnings.onceregistry": repr(known.onceregistry),
        "warnings.defaultaction": known.defaultaction,
        "warnings of this module": repr(globals().get("__warningregistry__")),
    }


def _process() -> dict[str, Any]:
    umask = os.umask(0)
    os.umask(umask)
    limits = {
        name: resource.getrlimit(number)
        for name, number in vars(resource).items()
        if name.startswith("RLIMIT_")
    }
    return {
        "signals": [
            f"{number.name} {_handler(number)}"
            for number in sorted(signal.valid_signals())
            if isinstance(number, signal.Signals)
        ],
        "blocked signals": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))),
        "wakeup descriptor": _wakeup(),
        "interval timer": signal.getitimer(signal.ITIMER_REAL),
        "umask": umask,
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "affinity": sorted(os.sched_getaffinity(0)),
        "limits": repr(sorted(limits.items())),
        "directory": os.getcwd(),
        "environment": sorted(f"{name}={value}" for name, value in os.environ.items()),
        "user": [os.getresuid(), os.getresgid(), os.getgroups()],
        "session and group": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()],
        "streams": [
            f"{stream.encoding} {stream.errors} {type(stream).__name__}"
            for stream in (sys.stdin, sys.stdout, sys.stderr)
        ],
        "os.cpu_count": os.cpu_count(),
    }


def _handler(number: signal.Signals) -> str:
    handler = signal.getsignal(number)
    return handler.name if isinstance(handler, signal.Handlers) else _name(handler)


def _wakeup() -> int:
    before = signal.set_wakeup_fd(-1)
    if before >= 0:
        signal.set_wakeup_fd(before)
    return before
