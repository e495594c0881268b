"""Table of the process-wide settings that workers take over, without code.

A forked pool inherits these settings. Any other pool has a setting only if the statement is at the
top level of a script that workers run. Otherwise the setting is lost silently: warnings come back,
numbers have fewer digits, arrays another type.

Excluded on purpose:
    * The state of random generators: each worker draws different numbers. Give each task its seed.
    * ``faulthandler``: a worker's handler writes the stack of a crash where the pool reads it.
    * ``gc.disable()``: ``timeit`` and other libraries use it for a moment.
    * ``tracemalloc``, tracers and profilers: they measure a process, and slow it down.
    * Native threads, and the number of CPUs: the cap's (``safepool.threads``).
    * ``threading.stack_size()``: reading it resets it.
    * Registrations (``csv.register_dialect``, ``codecs.register``): put them at the top level of a
      guarded script or into a module, and workers have them. For a script without the guard see
      also ``transport.additions``.
    * Environment, directory, umask, limits, priority, path and ``sys.argv``: a worker is born with
      them (``birth``).
    * A logger's level that is assigned (``logger.level = 10``) instead of set.
"""

from __future__ import annotations

import functools
import logging
import operator
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from safepool.threads.imports import is_importing

Glance: TypeAlias = Callable[[Any], Callable[[], object] | None]


class Setting(NamedTuple):
    """A setting of the process.

    Attributes:
        module: Full name of the module that holds the setting. If it is not imported, the program
            has no value to read; a worker sets the value after the import, or at once if the
            module is built into the interpreter.
        read: Function of the module that returns a copy of the present value, which ``==``
            compares and which can be pickled.
        write: Function of the module and a value of ``read`` that sets the value.
        of_thread: Whether each thread has a separate value: that of the thread which made the pool
            counts.
        glance: Function of the module that returns a function without arguments, or ``None`` if
            there is none. What that function returns is no longer equal as soon as the setting has
            changed, and ``None`` if that is unknown. It runs no Python code if possible: before
            each lone call it is called, with nothing of it in the processor's caches.
        seldom: Whether the setting seldom changes, or takes long to read: it is then read less
            often.
    """

    name: str
    module: str
    read: Callable[[Any], object]
    write: Callable[[Any, Any], object]
    source: str
    of_thread: bool = False
    glance: Glance | None = None
    seldom: bool = False


# The standard library's.


def _by_functions(
    module: str,
    get: str,
    put: str,
    *,
    of_thread: bool = False,
    glance: Glance | None = None,
    seldom: bool = False,
    source: str = "",
) -> Setting:
    """Return the row of a setting that one function of a module returns, and another one sets.

    A dictionary is passed as keyword arguments, a tuple as positional ones.
    """

    def write(found: Any, value: Any) -> None:
        function = getattr(found, put)
        if isinstance(value, dict):
            function(**value)
        else:
            function(*value if isinstance(value, tuple) else (value,))

    return Setting(
        name=f"{module}.{put}()",
        module=module,
        read=operator.methodcaller(get),
        write=write,
        of_thread=of_thread,
        glance=glance,
        seldom=seldom,
        source=source or f"{_LIBRARIES.get(module, 'Python')}, {module}.{put}",
    )


_LIBRARIES = {"numpy": "NumPy", "sklearn": "scikit-learn"}


def filters_of(warnings: Any) -> list[Any]:
    """Return the list of warning filters that counts here."""
    if sys.version_info >= (3, 14):  # those of the context, where there are such
        find = getattr(warnings, "_get_filters", None)
        if find is not None:
            return find()  # type: ignore[no-any-return]
    return warnings.filters  # type: ignore[no-any-return]


def _glance_at_filters(warnings: Any) -> Callable[[], object]:
    if hasattr(warnings, "_get_filters"):
        return functools.partial(filters_of, warnings)
    return functools.partial(operator.attrgetter("filters"), warnings)


def _write_filters(warnings: Any, value: list[Any]) -> None:
    # The call also informs the C code.
    warnings.resetwarnings()
    ours = filters_of(warnings)
    ours[:] = value
    for name in ("filterwarnings", "simplefilter"):
        function = getattr(warnings, name)
        setattr(
            warnings, name, _in_order(warnings, getattr(function, "__wrapped__", function), ours)
        )


_OF_PYTHON = ("default", None, DeprecationWarning, "__main__", 0)


def with_script(filters: list[Any]) -> list[Any]:
    """Return filters, those for the module ``__main__`` also for ``__mp_main__`` of a worker.

    A module is given as an expression, or as text that it must equal. Python's own filter for it
    is left as it is in a fresh interpreter.
    """
    found = []
    for one in filters:
        found.append(one)
        if one == _OF_PYTHON:
            continue
        module = one[3]
        of_main = module == "__main__" if type(module) is str else _is_of_main(module)
        if of_main and (ours := (*one[:3], "__mp_main__", one[4])) not in filters:
            found.append(ours)
    return found


def _is_of_main(module: Any) -> bool:
    return module is not None and module.match("__main__") and not module.match("__mp_main__")


def _in_order(warnings: Any, add: Callable[..., None], ours: list[Any]) -> Callable[..., None]:
    """Keep the filters of a library that is imported here below the program's."""

    @functools.wraps(add)
    def add_filter(*arguments: Any, **keywords: Any) -> None:
        before = [*ours]
        add(*arguments, **keywords)
        # The program has imported it too, and has set its filters later. In a block of
        # catch_warnings() there is another list.
        only_moved = len(before) == len(ours) and filters_of(warnings) is ours
        if only_moved and is_importing(sys._getframe(1)):
            ours[:] = before

    return add_filter


def _context(context: Any) -> tuple[Any, ...]:
    prec, rounding, e_min, e_max, capitals, clamp, _, traps = context.__reduce__()[1]
    return (prec, rounding, e_min, e_max, capitals, clamp), [*traps]


def _write_context(decimal: Any, value: Any) -> None:
    decimal.setcontext(decimal.Context(*value[0], [], value[1]))


def _write_default_context(decimal: Any, value: Any) -> None:
    default, new = decimal.DefaultContext, decimal.Context(*value[0], [], value[1])
    for name in ("prec", "rounding", "Emin", "Emax", "capitals", "clamp", "traps"):
        setattr(default, name, getattr(new, name))


def _write_level_names(logging: Any, value: dict[int, str]) -> None:
    for level, name in value.items():
        if logging.getLevelName(level) != name:
            logging.addLevelName(level, name)


def _levels_of_the_program() -> tuple[int, dict[str, int]]:
    """Return the value of ``logging.disable()``, and the levels that are set, by logger."""
    root = logging.root
    remembered: Any = getattr(root, "_cache", None)
    if remembered is not None:
        remembered.setdefault("safepool", object())  # for the glance; first this, then the look
    loggers = list(root.manager.loggerDict.items())
    levels = {
        name: logger.level
        for name, logger in loggers
        if isinstance(logger, logging.Logger) and logger.level
    }
    if "__main__" in levels:  # the script's own, by the name that it has under ``spawn``
        levels["__mp_main__"] = levels["__main__"]
    return root.manager.disable, {"": root.level, **levels}


def _glance_at_levels(_logging: Any) -> Callable[[], object] | None:
    """Look for an object that is lost as soon as a level has been set, or a logger made.

    Each of these clears what every logger remembers of its level; Python 3.7 and later.
    """
    remembered: Any = getattr(logging.root, "_cache", None)
    return None if remembered is None else functools.partial(remembered.get, "safepool")


class _Levels:
    """Sets the levels of the program's loggers, in a worker. No logger is made for its level.

    A library with its own class of loggers makes its logger at its import, and fails or gets
    another class if the name is taken. Hence a level waits here until its logger exists.

    A level that a library sets at its import is replaced by the program's, which has imported it
    too, and has set the level later. One that an initializer or a task sets holds until the
    program changes its level.
    """

    def __init__(self) -> None:
        self._told: dict[str, int] = {}
        # Levels of loggers that do not exist yet.
        self._waiting: dict[str, int] = {}
        self._came_later: set[str] = set()
        self._watches = False

    def apply(self, disabled: int, levels: Mapping[str, int]) -> None:
        """Set the levels that have changed since the last time; ``""`` is the root logger's."""
        unset = dict.fromkeys(self._told.keys() - levels.keys(), logging.NOTSET)
        changed = {n: level for n, level in levels.items() if self._told.get(n) != level}
        self._told = dict(levels)
        there = logging.root.manager.loggerDict
        for name, level in (unset | changed).items():
            logger = logging.root if not name else there.get(name)
            if isinstance(logger, logging.Logger):  # and no place holder
                logger.setLevel(level)
            elif level:
                self._waiting[name] = level
            else:
                self._waiting.pop(name, None)
        logging.disable(disabled)  # it also forgets what loggers have remembered of levels
        if self._waiting and not self._watches:
            self._watches = True
            self._watch(logging.root.manager)

    def _watch(self, manager: logging.Manager) -> None:
        make: Any = manager.getLogger
        set_level = logging.Logger.setLevel
        effective_level = logging.Logger.getEffectiveLevel

        def get_logger(name: str) -> logging.Logger:
            logger: logging.Logger = make(name)
            if name in self._waiting:
                self._came_later.add(name)
                set_level(logger, self._waiting.pop(name))
            return logger

        def set_level_unless_imported(self_: logging.Logger, level: int | str) -> None:
            if self_.name in self._came_later and is_importing(sys._getframe(1)):
                return
            set_level(self_, level)

        def get_effective_level(self_: logging.Logger) -> int:
            name = "" if self_.level else self_.name
            while name and self._waiting:
                if name in self._waiting:
                    return self._waiting[name]
                if getattr(manager.loggerDict.get(name), "level", logging.NOTSET):
                    break
                name = name.rpartition(".")[0]
            return effective_level(self_)

        # For this manager only: another one keeps its method.
        manager.getLogger = get_logger  # type: ignore[method-assign]
        kind: Any = logging.Logger
        kind.setLevel = set_level_unless_imported
        # A logger without a level has the level of the next logger above it, which may not exist
        # yet.
        kind.getEffectiveLevel = get_effective_level


_levels = _Levels()


def _write_authkey(process: Any, value: bytes) -> None:
    process.current_process().authkey = value


# Errors of libraries.


def _glance_at_errors(_numpy: Any) -> Callable[[], object] | None:
    # NumPy 2: an object in a context variable, which is replaced by each change.
    umath = sys.modules.get("numpy._core.umath")
    variable = getattr(umath, "_extobj_contextvar", None)
    return None if variable is None else functools.partial(variable.get, variable)


def _glance_at_printing(_numpy: Any) -> Callable[[], object] | None:
    options = getattr(sys.modules.get("numpy._core.printoptions"), "format_options", None)
    return None if options is None else functools.partial(options.get, options)


def _read_matplotlib(matplotlib: Any) -> dict[str, object]:
    default = matplotlib.rcParamsDefault
    # dict's own: to ask for the backend chooses one.
    return {
        name: value
        for name, value in dict.items(matplotlib.rcParams)
        if value != dict.get(default, name) and not (name == "backend" and type(value) is not str)
    }


def _write_matplotlib(matplotlib: Any, value: dict[str, object]) -> None:
    now, default = _read_matplotlib(matplotlib), matplotlib.rcParamsDefault
    for name in now.keys() - value.keys():
        matplotlib.rcParams[name] = dict.get(default, name)
    matplotlib.rcParams.update(
        {name: one for name, one in value.items() if name not in now or now[name] != one}
    )


def _read_pandas(pandas: Any) -> dict[str, object]:
    found: dict[str, object] = {}
    _collect(pandas.options.d, "", found)
    return found


def _collect(options: dict[str, Any], prefix: str, found: dict[str, object]) -> None:
    for name, value in options.items():
        if isinstance(value, dict):
            _collect(value, f"{prefix}{name}.", found)
        else:
            found[prefix + name] = value


def _write_pandas(pandas: Any, value: dict[str, object]) -> None:
    now = _read_pandas(pandas)
    for name, one in value.items():
        if name in now and now[name] != one:
            pandas.set_option(name, one)


def _read_torch(torch: Any) -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    return (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(),
        cudnn.deterministic,
        cudnn.benchmark,
    )


def _write_torch(torch: Any, value: tuple[Any, ...]) -> None:
    dtype, deterministic, warn_only, precision, cudnn, benchmark = value
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.deterministic = cudnn
    torch.backends.cudnn.benchmark = benchmark


_JAX = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_debug_nans",
    "jax_numpy_rank_promotion",
)


def _read_jax(jax: Any) -> dict[str, object]:
    return {name: getattr(jax.config, name) for name in _JAX if hasattr(jax.config, name)}


def _write_jax(jax: Any, value: dict[str, object]) -> None:
    for name, one in value.items():
        jax.config.update(name, one)


SETTINGS: tuple[Setting, ...] = (
    Setting(
        name="warnings.filters",
        module="warnings",
        read=lambda warnings: [*filters_of(warnings)],
        write=_write_filters,
        glance=_glance_at_filters,
        source="Python, warnings, The Warnings Filter",
    ),
    Setting(
        name="logging.captureWarnings()",
        module="logging",
        read=lambda logging: logging._warnings_showwarning is not None,
        write=lambda logging, value: logging.captureWarnings(value),
        seldom=True,
        source="Python, logging.captureWarnings",
    ),
    Setting(
        name="levels of loggers",
        module="logging",
        read=lambda _: _levels_of_the_program(),
        write=lambda _, value: _levels.apply(*value),
        glance=_glance_at_levels,
        source="Python, logging.Logger.setLevel, logging.disable",
    ),
    Setting(
        name="logging.addLevelName()",
        module="logging",
        read=lambda logging: {**logging._levelToName},
        write=_write_level_names,
        seldom=True,
        source="Python, logging.addLevelName",
    ),
    Setting(
        name="decimal.getcontext()",
        module="decimal",
        read=lambda decimal: _context(decimal.getcontext()),
        write=_write_context,
        of_thread=True,
        glance=lambda decimal: lambda: decimal.getcontext().__reduce__(),
        source="Python, decimal, Context objects",
    ),
    Setting(
        name="decimal.DefaultContext",
        module="decimal",
        read=lambda decimal: _context(decimal.DefaultContext),
        write=_write_default_context,
        seldom=True,
        source="Python, decimal.DefaultContext",
    ),
    _by_functions(
        "sys",
        "get_int_max_str_digits",
        "set_int_max_str_digits",
        source="Python, Integer string conversion length limitation",
    ),
    _by_functions("sys", "getrecursionlimit", "setrecursionlimit", seldom=True),
    _by_functions("sys", "getswitchinterval", "setswitchinterval", seldom=True),
    _by_functions("gc", "get_threshold", "set_threshold", seldom=True),
    _by_functions("csv", "field_size_limit", "field_size_limit"),
    _by_functions("socket", "getdefaulttimeout", "setdefaulttimeout"),
    Setting(
        name="locale.setlocale()",
        module="_locale",  # what locale builds on, in the interpreter itself
        read=lambda locale: locale.setlocale(locale.LC_ALL),
        write=lambda locale, value: locale.setlocale(locale.LC_ALL, value),
        seldom=True,
        source="Python, locale.setlocale",
    ),
    *(
        Setting(
            name=f"authkey of {package}",
            module=f"{package}.process",
            read=lambda process: bytes(process.current_process().authkey),
            write=_write_authkey,
            seldom=True,
            source="Python, multiprocessing.Process.authkey",
        )
        # The second is a fork of the first, with separate processes and keys.
        for package in ("multiprocessing", "multiprocess")
    ),
    _by_functions("numpy", "geterr", "seterr", of_thread=True, glance=_glance_at_errors),
    _by_functions("numpy", "geterrcall", "seterrcall", of_thread=True, glance=_glance_at_errors),
    _by_functions(
        "numpy", "get_printoptions", "set_printoptions", of_thread=True, glance=_glance_at_printing
    ),
    _by_functions("sklearn", "get_config", "set_config", of_thread=True),
    Setting(
        name="matplotlib.rcParams",
        module="matplotlib",
        read=_read_matplotlib,
        write=_write_matplotlib,
        # dict's own, as above
        glance=lambda matplotlib: lambda: dict(dict.items(matplotlib.rcParams)),
        seldom=True,
        source="Matplotlib, matplotlib.rcParams",
    ),
    Setting(
        name="pandas.options",
        module="pandas",
        read=_read_pandas,
        write=_write_pandas,
        seldom=True,
        source="pandas, Options and settings",
    ),
    Setting(
        name="torch's default type and determinism",
        module="torch",
        read=_read_torch,
        write=_write_torch,
        source="PyTorch, torch.set_default_dtype; Reproducibility",
    ),
    Setting(
        name="jax.config",
        module="jax",
        read=_read_jax,
        write=_write_jax,
        source="JAX, Configuration options",
    ),
)
