"""The environment that a worker is born with: computed here, never set on the caller.

A library reads its variables once, when it is loaded; a later change is ignored. Hence the
variables must be in the environment at the start of the process.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, NamedTuple

from safepool.threads.registry import revision, runtimes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from safepool.threads.table import NativeRuntime


class Override(NamedTuple):
    """A thread variable that the user has set for workers, in place of the cap.

    Attributes:
        instead_of: The cap's value; ``None`` if it would have removed the variable or
            not have touched it.
        runtime: The row that it rules.
    """

    variable: str
    value: str
    instead_of: str | None
    runtime: str


def worker_environment(
    threads: int, *, overrides: Mapping[str, str] | None = None
) -> dict[str, str | None]:
    """Return the changes to make to a worker's environment before it starts.

    Args:
        threads: Threads for each native pool, at least 1.
        overrides: The user's variables for workers. They win. If one sets the number of a pool,
            the pool's other variables have that number too, and so has its cap at run time
            (:func:`runtime_threads`).

    Returns:
        The value of each variable; ``None`` removes it: it would beat the cap.

    Raises:
        ValueError: ``threads`` is below 1.

    Example:
        >>> environment = worker_environment(1)
        >>> environment["OPENBLAS_NUM_THREADS"], environment["MKL_DOMAIN_NUM_THREADS"]
        ('1', None)
        >>> chosen = worker_environment(1, overrides={"NUMEXPR_NUM_THREADS": "4"})
        >>> chosen["NUMEXPR_NUM_THREADS"], chosen["NUMEXPR_MAX_THREADS"]
        ('4', '4')
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    return _environment(threads, overrides) if overrides else {**block_environment(threads)}


def _environment(threads: int, asked: Mapping[str, str]) -> dict[str, str | None]:
    environment: dict[str, str | None] = {}
    for row in runtimes():
        environment.update(dict.fromkeys(row.removed))
        of_row = first_number(_own(row), asked) or threads
        for variable in row.variables:
            if variable.off is None:
                environment[variable.name] = str(of_row)
            elif of_row == 1:
                environment[variable.name] = variable.off
    environment.update(asked)
    return environment


def block_environment(threads: int) -> Mapping[str, str | None]:
    """Return :func:`worker_environment`, computed once for each number of threads."""
    return _block_environment(threads, revision())


@functools.lru_cache(maxsize=64)
def _block_environment(threads: int, _revision: int) -> Mapping[str, str | None]:
    return _environment(threads, {})


def lowered_environment(
    threads: int, environment: Mapping[str, str | None]
) -> dict[str, str | None]:
    """Return the changes that bring an environment down to a number of threads.

    A lower value stays, word for word. So do variables that count workers and not threads: a
    program with one native thread may still have a pool of many processes.

    Returns:
        The value of each variable; ``None`` removes a variable that would override the others.

    Example:
        >>> changes = lowered_environment(2, {"OMP_NUM_THREADS": "8", "MKL_NUM_THREADS": "1"})
        >>> changes["OMP_NUM_THREADS"], changes["MKL_NUM_THREADS"]
        ('2', '1')
        >>> "LOKY_MAX_CPU_COUNT" in changes
        False
    """
    changes: dict[str, str | None] = {}
    for row in runtimes():
        if row.counts_workers:
            continue
        changes.update(dict.fromkeys(row.removed))
        for variable in row.variables:
            now = first_number((variable.name, *row.falls_back_to), environment)
            if variable.off is not None:
                changes[variable.name] = (
                    variable.off if threads == 1 else environment.get(variable.name)
                )
            elif now is not None and now <= threads:
                changes[variable.name] = environment.get(variable.name)
            else:
                changes[variable.name] = str(threads)
    return changes


def ruled_threads(row: NativeRuntime, environment: Mapping[str, str | None]) -> int | None:
    """Return the number that an environment rules a runtime to; ``None`` if it does not."""
    return first_number((*_own(row), *row.falls_back_to), environment)


def change_environment(changes: Mapping[str, str | None]) -> None:
    """Make the changes of :func:`worker_environment` in this process."""
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def runtime_threads(threads: int, environment: Mapping[str, str | None]) -> dict[str, int]:
    """Return the number that each runtime is capped to in a worker of that environment.

    Returns:
        For each row of the table, by its name, the number that its ruling variable says,
        ``threads`` where none does.

    Example:
        >>> chosen = worker_environment(1, overrides={"OMP_NUM_THREADS": "2"})
        >>> capped = runtime_threads(1, chosen)
        >>> capped["openmp"], capped["xgboost"], capped["openblas"]
        (2, 2, 1)
    """
    return {row.name: ruled_threads(row, environment) or threads for row in runtimes()}


def overridden(threads: int, overrides: Mapping[str, str]) -> tuple[Override, ...]:
    """Return the user's variables that replace the cap, for a report.

    Returns:
        An entry for each thread variable whose value is not the cap's; other variables are not
        reported.

    Example:
        >>> [o.variable for o in overridden(1, {"OMP_NUM_THREADS": "2", "HOME": "/tmp"})]
        ['OMP_NUM_THREADS']
    """
    if not overrides:
        return ()
    ours = worker_environment(threads)
    return tuple(
        Override(variable=name, value=overrides[name], instead_of=ours.get(name), runtime=row.name)
        for row in runtimes()
        for name in (*_own(row), *row.removed)
        if name in overrides and overrides[name] != ours.get(name)
    )


def _own(row: NativeRuntime) -> tuple[str, ...]:
    return (*(variable.name for variable in row.variables if variable.off is None), *row.opt_in)


def first_number(names: Iterable[str], values: Mapping[str, str | None]) -> int | None:
    """Return the number of the first of some variables that has one."""
    for name in names:
        # OMP_NUM_THREADS may be a list, one number for each level of nesting.
        first = (values.get(name) or "").split(",")[0].strip()
        if first.isascii() and first.isdigit() and int(first) > 0:
            return int(first)
    return None
