"""Floor 0: one table with the valid values of each parameter, and the errors for all other values.

A parameter has the same meaning in every function, so each name has one row. :func:`checked`
decorates a public function. The decorator compares the arguments with the rows once, before the
body runs, and the body relies on that. A parameter's default is never compared.

Not covered:
    * Missing and surplus positional arguments: Python's own errors name them.
    * Errors that depend on the machine, such as a missing module: the code that needs the module
      raises them.
"""

from __future__ import annotations

import functools
import math
import operator
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

_F = TypeVar("_F", bound="Callable[..., Any]")

# WaitForMultipleObjects takes 63 handles, and the standard pool allows this many. Elsewhere
# the number is the caller's business.
MOST_WORKERS = 61 if sys.platform == "win32" else sys.maxsize


class Rule(NamedTuple):
    """Rule for the values of a parameter; its default is always accepted.

    Attributes:
        kind: Accepted type in words, such as "an integer of at least 1".
        is_kind: Whether a value has the right type. A wrong type is a ``TypeError``.
        lacks: Function that returns the property that a value of the right type lacks, in words;
            ``""`` if the value is valid. A value that lacks one is a ``ValueError``.
        remedy: A sentence that says what to pass instead.
        choices: Accepted words. The error suggests a similar one.
        optional: ``True`` if ``None`` is accepted although it is not the default.
    """

    kind: str
    is_kind: Callable[[Any], bool]
    remedy: str
    lacks: Callable[[Any], str] = lambda _: ""
    choices: tuple[str, ...] = ()
    optional: bool = False


def check(name: str, value: object, rule: Rule | None = None, *, optional: bool = False) -> None:
    """Compare one argument with what its parameter takes.

    Args:
        name: Name of the parameter.
        value: The argument.
        rule: The row; ``None`` is that of the name.
        optional: Whether ``None`` is accepted, independent of the row.

    Raises:
        TypeError: The value has the wrong type.
        ValueError: The value is out of range.

    Example:
        >>> check("retries", "2")
        Traceback (most recent call last):
            ...
        TypeError: retries must be an integer of at least 0, not '2' (str). Did you mean retries=2?
    """
    rule = RULES[name] if rule is None else rule
    optional = optional or rule.optional
    if value is None and optional:
        return
    is_kind = rule.is_kind(value)
    words = rule.lacks(value) if is_kind else rule.kind
    if not words:
        return
    found = _shown(value) if is_kind else f"{_shown(value)} ({type(value).__name__})"
    if optional and "None" not in words:
        words += ", or None"
    text = f"{name} must be {words}, not {found}"
    fits = (one for one in _meant(value, rule) if rule.is_kind(one) and not rule.lacks(one))
    near = next(fits, None)
    hint = rule.remedy if near is None else f"Did you mean {name}={near!r}?"
    raise (ValueError if is_kind else TypeError)(f"{text}. {hint}")


def checked(
    called: str, refused: Mapping[str, str] | None = None, /, **rules: Rule
) -> Callable[[_F], _F]:
    """Make a decorator that compares the arguments of each call with what parameters take.

    Args:
        called: Name of the function in errors.
        refused: Parameters that a function of the same kind has and this one does not, and why.
        **rules: Rows of parameters that differ from the table's row of this name.
    """

    def decorate(function: _F) -> _F:
        inner: Any = getattr(function, "__wrapped__", function)
        code, keyword_defaults = inner.__code__, inner.__kwdefaults__ or {}
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        by_position = names[: code.co_argcount]
        defaults = dict(
            zip(reversed(by_position), reversed(inner.__defaults__ or ()), strict=False)
        )
        defaults |= keyword_defaults
        rows = {name: rules.get(name) or RULES.get(name) for name in names}

        @functools.wraps(function)
        def check_first(*args: Any, **kwargs: Any) -> Any:
            for name, value in (*zip(by_position, args, strict=False), *kwargs.items()):
                if refused and name in refused:
                    raise TypeError(f"{called}() takes no {name}=: {refused[name]}")
                if name not in rows:
                    hint = what_was_meant(name, names[code.co_posonlyargcount :])
                    raise TypeError(
                        f"{called}() got an unexpected keyword argument {name!r}{hint}"
                    )
                row = rows[name]
                if row is not None and value is not defaults.get(name, row):
                    check(name, value, row, optional=defaults.get(name, row) is None)
            return function(*args, **kwargs)

        return check_first  # type: ignore[return-value]

    return decorate


def what_was_meant(word: str, names: Iterable[str]) -> str:
    """Return the end of a sentence about a keyword that is not among the names.

    Example:
        >>> what_was_meant("n_jobs", ["max_workers", "timeout"])
        ': did you mean max_workers=?'
        >>> what_was_meant("colour", ["max_workers", "timeout"])
        '. There are max_workers, timeout'
    """
    import difflib  # noqa: PLC0415 -- needed only for an error

    names = [name for name in names if name != "self"]
    lines = [line.split() for line in _SAME.splitlines()]
    same = [name for line in lines if word in line for name in names if name in line]
    near = [*same, *difflib.get_close_matches(word, names, n=1, cutoff=0.7)]
    return f": did you mean {near[0]}=?" if near else f". There are {', '.join(sorted(names))}"


# Each line has the names of one parameter in several libraries: multiprocessing.Pool, joblib,
# loky, dask, mpire, pebble, torch's DataLoader, datasets. For an unknown keyword, the error
# suggests the known name of its line.
_SAME = """
max_workers processes n_jobs workers num_workers n_workers nworkers num_processes n_processes \
max_processes num_proc nproc nprocs n_procs jobs cpus n_cpus num_cpus ncpus cores n_cores size \
workers_per_node
max_tasks_per_child maxtasksperchild max_tasks worker_lifespan
mp_context context start_method method ctx mp_start_method
initializer init worker_init worker_init_fn init_fn
initargs init_args initializer_args args
threads_per_worker threads n n_threads num_threads nthreads limits inner_max_num_threads
memory_per_worker memory mem
max_memory_per_worker max_memory
memory_limit mem_limit limit_memory ram_limit limit_mem max_mem max_rss
env environ environment env_vars
gpus gpu num_gpus n_gpus gpu_ids devices cuda cuda_devices visible_devices
timeout task_timeout timeout_s time_limit max_time
retries max_retries retry retry_count n_retries num_retries attempts max_attempts
pin_workers pin cpu_ids affinity
preload imports modules
progress progress_bar verbose tqdm
chunksize chunk_size batch_size
client_or_executor client executor engine
buffersize buffer_size prefetch
writable writeable mutable
end_subprocesses kill_subprocesses kill_children
idle_worker_timeout idle_timeout
"""


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 -- user code; the error is about the argument
        text = object.__repr__(value)
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:76]}...{text[-1]}"


def _meant(value: object, rule: Rule) -> Iterator[object]:
    """Yield guesses of the caller's intention behind a wrong value."""
    if isinstance(value, str):
        import difflib  # noqa: PLC0415 -- needed only for an error

        yield from difflib.get_close_matches(value.lower(), rule.choices, n=1)
    if isinstance(value, (str, float)):
        for kind in (int, float):
            try:
                number = kind(value)
            except (ValueError, OverflowError):
                continue
            if isinstance(value, str) or number == value:
                yield number
    if isinstance(value, int) and value in (0, 1):
        yield bool(value)
    if isinstance(value, (str, bytes, int, float)):
        yield (value,)


def _is_index(value: object) -> bool:
    try:
        operator.index(value)  # type: ignore[arg-type]  # that is the question
    except TypeError:
        return False
    return True


def _is_integer(value: object) -> bool:
    return _is_index(value) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if isinstance(value, (int, float)):
        return not isinstance(value, bool)
    import numbers  # noqa: PLC0415 -- for NumPy's scalars, which are rare

    return isinstance(value, numbers.Real)


def _is_size(value: object) -> bool:
    return isinstance(value, str) or _is_number(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _is_arguments(value: object) -> bool:
    """Tell whether a value can be unpacked, as by the standard pool; no text, no keywords."""
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, bytearray, Mapping))


def _is_names(value: object) -> bool:
    return isinstance(value, str) or (
        _is_sequence(value) and all(isinstance(name, str) for name in value)  # type: ignore[attr-defined]
    )


def _is_environment(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(text, str) for name, text in value.items()
    )


def _unless(is_it: Callable[[Any], bool], words: str) -> Callable[[Any], str]:
    return lambda value: "" if is_it(value) else words


def _integer(least: int, remedy: str, **others: Any) -> Rule:
    words = f"an integer of at least {least}"
    lacks = _unless(lambda value: value >= least, f"at least {least}")
    return Rule(kind=words, is_kind=_is_integer, lacks=lacks, remedy=remedy)._replace(**others)


def _integer_or_auto(remedy: str) -> Rule:
    words = 'an integer of at least 1, or "auto"'
    return Rule(
        kind=words,
        is_kind=lambda value: isinstance(value, str) or _is_integer(value),
        lacks=_unless(
            lambda value: value == "auto" if isinstance(value, str) else value >= 1, words
        ),
        remedy=remedy,
        choices=("auto",),
    )


def _number(words: str, is_it: Callable[[Any], bool], remedy: str) -> Rule:
    return Rule(kind=words, is_kind=_is_number, lacks=_unless(is_it, words), remedy=remedy)


def _either(choices: Sequence[str]) -> str:
    *most, last = (f'"{choice}"' for choice in choices)
    return f"{', '.join(most)} or {last}" if most else last


def _one_of(*choices: str, remedy: str, optional: bool = False) -> Rule:
    words = _either(choices)
    lacks = _unless(lambda value: value in choices, words)
    return Rule(
        kind=words,
        is_kind=_is_text,
        lacks=lacks,
        remedy=remedy,
        choices=choices,
        optional=optional,
    )


def _flag(remedy: str) -> Rule:
    return Rule(kind="True or False", is_kind=lambda value: isinstance(value, bool), remedy=remedy)


def _lacks_as_number_of_workers(value: int) -> str:
    # The standard pool's own texts.
    if value < 1:
        return "greater than 0"
    return "" if value <= MOST_WORKERS else f"<= {MOST_WORKERS}"


_UNITS = {"": 1, "B": 1} | {
    unit: factor**power
    for power, prefix in enumerate("kMGTP", start=1)
    for unit, factor in (
        (f"{prefix}B", 1000),
        (f"{prefix}iB", 1024),
        (prefix, 1000),
        (f"{prefix}i", 1024),
    )
}
_BYTES = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_bytes(size: float | str) -> int:
    """Return a size in bytes.

    Args:
        size: A number of bytes, or a number with a unit: ``kB``, ``MB``, ``GB`` are powers of
            1000, ``KiB``, ``MiB``, ``GiB`` of 1024, as are Kubernetes's ``Ki``, ``Mi``, ``Gi``.

    Raises:
        ValueError: The size is no number and no such text, or is not above 0.

    Source:
        IEC 80000-13; Kubernetes, "Resource units".

    Example:
        >>> parse_bytes("2GiB"), parse_bytes("1.5 GB"), parse_bytes(4096)
        (2147483648, 1500000000, 4096)
    """
    if not isinstance(size, str):
        found = int(size) if math.isfinite(size) else 0
    else:
        match = _BYTES.fullmatch(size)
        unit = match[2] if match else ""
        # Only the k of kilo is written small, and K has no other meaning.
        unit = f"k{unit[1:]}" if unit.startswith("K") else unit
        if match is None or unit not in _UNITS:
            raise ValueError(f"a size must be {_SIZE}, not {size!r}")
        found = int(float(match[1]) * _UNITS[unit])
    if found < 1:
        raise ValueError(f"a size must be above 0, not {size!r}")
    return found


_SIZE = 'a number of bytes above 0, or text such as "2GiB"'


def _lacks_as_size(value: Any) -> str:
    try:
        parse_bytes(value)
    except ValueError:
        return _SIZE
    return ""


def _lacks_as_context(value: Any) -> str:
    if not isinstance(value, str) or value in ("safepool", "loky"):
        return ""
    import multiprocessing  # noqa: PLC0415 -- a pool's start, not our import

    try:
        multiprocessing.get_context(value)
    except ValueError:
        return _either(("safepool", "loky", *multiprocessing.get_all_start_methods()))
    return ""


def _lacks_as_environment(value: Any) -> str:
    for name, text in () if callable(value) else value.items():
        if not name or "=" in name or "\0" in name + text:
            return 'a mapping of variables (a name is not empty and has no "="; no text has a NUL)'
    return ""


# For CUDA and HIP: a number, or the beginning of the id of a device or of a part of a device.
DEVICE = re.compile(r"[0-9]+|(GPU|MIG)-\S+", re.ASCII)


def _lacks_as_gpus(value: Any) -> str:
    if isinstance(value, str):
        fits = value == "auto"
    elif _is_integer(value):
        fits = value >= 1
    else:
        devices = [device for one in value for device in str(one).split(",")]
        fits = bool(devices) and all(map(DEVICE.fullmatch, devices))
    return "" if fits else _GPUS


def _lacks_as_size_for_joblib(value: Any) -> str:
    # joblib, memstr_to_bytes().
    number, unit = (value[:-1], value[-1:]) if isinstance(value, str) else (value, "K")
    try:
        fits = value == "auto" or (unit in ("K", "M", "G") and float(number) >= 0)
    except ValueError:
        fits = False
    return "" if fits else _MAX_NBYTES


def _size(remedy: str) -> Rule:
    units = "Units of a size are kB, MB, GB (powers of 1000) and KiB, MiB, GiB (powers of 1024)"
    return Rule(kind=_SIZE, is_kind=_is_size, lacks=_lacks_as_size, remedy=f"{units}. {remedy}")


_THREADS = "The number is the size of each native thread pool in a worker"
_GPUS = '"auto", a number of devices of at least 1, or a list of numbers and ids of devices'
_MAX_NBYTES = 'a number of bytes from 0 up, text such as "1M", "auto" or None'

ENVIRONMENT = Rule(
    kind="a mapping of text to text",
    is_kind=_is_environment,
    lacks=_lacks_as_environment,
    remedy='Write numbers as text: {"OMP_NUM_THREADS": "2"}',
)
"""Rule of a mapping in ``env``, and of the result of a function in ``env``."""

RULES: dict[str, Rule] = {
    "buffersize": _integer(
        1,
        "The number limits the tasks that are submitted ahead of the results",
        kind="an integer or None",  # here and below: the standard pool's words
        lacks=_unless(lambda value: value > 0, "None or > 0"),
    ),
    "chunksize": _integer(
        1,
        "It is the number of items in one task",
        lacks=_unless(lambda value: value >= 1, ">= 1."),
    ),
    "end_subprocesses": _flag(
        "With True, programs that tasks started end together with this program"
    ),
    "env": ENVIRONMENT._replace(
        kind="a mapping of text to text, or a function that returns one for a worker's index",
        is_kind=lambda value: callable(value) or _is_environment(value),
    ),
    "function": Rule(
        kind="a callable",
        is_kind=lambda value: callable(value) or isinstance(value, (classmethod, staticmethod)),
        remedy="Pass threads=, timeout= and retries= by name",
    ),
    "gpus": Rule(
        kind=_GPUS,
        is_kind=lambda value: (
            _is_text(value)
            or _is_integer(value)
            or (_is_sequence(value) and all(_is_text(one) or _is_integer(one) for one in value))
        ),
        lacks=_lacks_as_gpus,
        remedy='"auto" gives one of the visible devices to each worker, in turn',
        choices=("auto",),
    ),
    "idle_worker_timeout": _number(
        "a number of seconds from 0 up",
        lambda value: 0 <= value < math.inf,
        "Leave it out for 300 s",
    ),
    "initargs": Rule(
        kind="a tuple",
        is_kind=_is_arguments,
        remedy="A tuple of one argument is written (argument,)",
        optional=True,  # as the standard pool without an initializer
    ),
    "initializer": Rule(
        kind="a callable", is_kind=callable, remedy="Pass its arguments by initargs="
    ),
    "main": _one_of("auto", "run", "value", remedy='Leave it out for "auto"'),
    "max_memory_per_worker": _size("Pass None for no limit"),
    "max_nbytes": Rule(
        kind=_MAX_NBYTES,
        is_kind=_is_size,
        lacks=_lacks_as_size_for_joblib,
        remedy="Units of a size are K, M and G (powers of 1024). Pass None to place no array once",
        optional=True,
    ),
    "max_tasks_per_child": Rule(
        kind="an integer",
        is_kind=_is_index,
        lacks=_unless(lambda value: value >= 1, ">= 1"),
        remedy="Pass None for no limit",
    ),
    "maxtasksperchild": Rule(  # the words of multiprocessing.Pool, as for processes
        kind="a positive int or None",
        is_kind=lambda _: True,
        lacks=_unless(
            lambda value: isinstance(value, int) and value > 0, "a positive int or None"
        ),
        remedy="Pass None for no limit",
    ),
    "max_workers": Rule(
        kind="an integer of at least 1",
        is_kind=_is_index,  # True is 1 for the standard pool
        lacks=_lacks_as_number_of_workers,
        remedy="Leave it out for as many as the limits allow",
    ),
    "memory_limit": _size("Pass None for no limit"),
    "memory_per_worker": _size("Pass None to ignore memory"),
    "mmap_mode": _one_of(
        "auto",
        "r",
        "r+",
        "w+",
        "c",
        remedy='With "c", each task writes into its own copy',
        optional=True,
    ),
    "mp_context": Rule(
        kind="a context of multiprocessing, or the name of a start method",
        is_kind=lambda value: isinstance(value, str) or hasattr(value, "get_start_method"),
        lacks=_lacks_as_context,
        remedy="Leave it out for the best start method here. Pass a function by initializer=",
        choices=("safepool", "loky", "spawn", "fork", "forkserver"),
    ),
    "n": _integer_or_auto('"auto" is the number of CPUs that the limits grant'),
    "n_jobs": _integer(
        1,
        "n_jobs == 0 has no meaning: -1 is as many workers as the limits allow, 1 is sequential",
        kind="an integer other than 0",
        lacks=_unless(lambda value: value != 0, "other than 0"),
        optional=True,
    ),
    "on_worker_death": _one_of(
        "replace", "break", remedy='"break" ends the whole pool, as in the standard pool'
    ),
    "ordered": _flag("False yields each result when its call has ended"),
    "pin_workers": _flag("True binds each worker to CPUs of its own"),
    "prefer": _one_of(
        "processes", remedy="Leave it out to use threads for calls that prefer them"
    ),
    "preload": Rule(
        kind='"auto" or a list of module names',
        is_kind=_is_names,
        lacks=_unless(
            lambda value: not isinstance(value, str) or value == "auto",
            '"auto" or a list of module names',
        ),
        remedy="Pass [] to preload nothing",
        choices=("auto",),
    ),
    "processes": Rule(
        kind="an integer of at least 1",
        is_kind=_is_index,
        lacks=_unless(
            lambda value: value >= 1, "above 0 (Number of processes must be at least 1)"
        ),
        remedy="Leave it out for as many as the limits allow",
    ),
    "progress": Rule(
        kind="True, False or a label",
        is_kind=lambda value: isinstance(value, (bool, str)),
        remedy="True shows a bar",
        optional=True,
    ),
    "reserve": _number(
        "a number of CPUs from 0 up",
        lambda value: 0 <= value < math.inf,
        "The workers leave that many CPUs to this process, such as 0.5",
    ),
    "retries": _integer(0, "Pass 0 for no retries"),
    "return_exceptions": _flag("True yields a call's exception in the place of its result"),
    "rounding": _one_of(
        "floor", "nearest", "ceil", remedy='"floor" leaves a fraction of a CPU to this process'
    ),
    "thread_name_prefix": Rule(
        kind="text", is_kind=_is_text, remedy="The name of each thread begins with it"
    ),
    "threads": _integer(1, _THREADS),
    "threads_per_worker": _integer_or_auto(_THREADS),
    "timeout": _number(
        "a number of seconds above 0",
        lambda value: 0 < value < math.inf,
        "Pass None for no time limit",
    ),
    "trace": Rule(
        kind="the path of a file",
        is_kind=lambda value: isinstance(value, str) or hasattr(value, "__fspath__"),
        remedy='Write it as trace="run.json"',
    ),
    "writable": _flag("True lets each task write into a view of its own"),
}
"""The rule of each parameter, by its name."""

TIME_TO_WAIT = _number(
    "a number of seconds", lambda value: not math.isnan(value), "Pass None to wait without a limit"
)
"""Rule of the ``timeout`` of a wait. A number below 0 is 0, as in the standard library."""
