"""The valid rows in this process: those of the table, and added ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

from safepool.threads.calls import CALLS, Call
from safepool.threads.imports import imported
from safepool.threads.table import RUNTIMES, NativeRuntime

_added: dict[str, tuple[NativeRuntime, Call | None]] = {}
_revision = 0
# Function that is called after each added row.
_told: list[Callable[[], object]] = []


def when_added(tell: Callable[[], object]) -> None:
    """Set the only function that is called after each added row."""
    _told[:] = [tell]


def revision() -> int:
    """Return the number of changes of the rows: results from them are valid until it grows."""
    return _revision


def runtimes() -> tuple[NativeRuntime, ...]:
    """Return every row: the table's first, then those added, in their order."""
    return (*RUNTIMES, *(row for row, _ in [*_added.values()]))


def call_of(row: NativeRuntime) -> Call | None:
    """Return the call that caps the pool of ``row`` at run time; ``None`` if none does."""
    if row.name in _added:
        return _added[row.name][1]
    return CALLS.get(row.name)


def modules_to_cap() -> frozenset[str]:
    """Return the modules that a call is made with: the first of their rows."""
    return frozenset(row.modules[0] for row in runtimes() if call_of(row) is not None)


def imported_runtimes() -> Iterator[tuple[NativeRuntime, Call, ModuleType]]:
    """Yield the rows with a call whose module is imported, and both."""
    for row in runtimes():
        call = call_of(row)
        module = None if call is None else imported(row.modules[0])
        if call is not None and module is not None:
            yield row, call, module


def brought_by(module: str) -> list[tuple[NativeRuntime, Call]]:
    """Return the rows whose call is made with the module of that name."""
    return [
        (row, call)
        for row in runtimes()
        if row.modules[:1] == (module,) and (call := call_of(row)) is not None
    ]


def register(
    runtime: NativeRuntime,
    *,
    read: Callable[[ModuleType], int | None] | None = None,
    write: Callable[[ModuleType, int], object] | None = None,
) -> None:
    """Add a native thread pool that this package does not know.

    Its variables hold in every pool made afterwards, its call in processes that register it. A
    library registers at its import, which happens in the workers that use it; a program registers
    in its initializer. A process that is a worker already is capped at once.

    Args:
        runtime: The row. A row of the same name that was registered before is replaced.
        read: Function of the first of ``runtime.modules`` that returns the present number of
            threads; needed to restore the number after :func:`safepool.worker`.
        write: Function of the same module and a number of threads that sets it. It may be called
            often.

    Raises:
        ValueError: The table has a row of this name or for one of its variables, or
            ``write`` was given and ``runtime.modules`` is empty.

    Example:
        >>> from safepool.threads import NativeRuntime, ThreadVariable
        >>> register(
        ...     NativeRuntime(
        ...         name="mylib",
        ...         used_by="mylib",
        ...         variables=(ThreadVariable(name="MYLIB_NUM_THREADS"),),
        ...         source="mylib's manual",
        ...     )
        ... )
        >>> from safepool.threads.environment import worker_environment
        >>> worker_environment(1)["MYLIB_NUM_THREADS"]
        '1'
        >>> unregister("mylib")
    """
    for row in runtimes():
        if row.name == runtime.name and row.name not in _added:
            raise ValueError(
                f"the table of native runtimes already has a row {row.name!r}: choose another name"
            )
        if row.name != runtime.name and (taken := names_of(row) & names_of(runtime)):
            raise ValueError(
                f"{min(taken)} is already a variable of {row.name!r}: leave it out of the new row"
            )
    if write is not None and not runtime.modules:
        raise ValueError(
            "write= is called with a module, but runtime.modules is empty: name one there"
        )
    call = None if write is None else Call(read=read, write=write, undone=read is not None)
    _added[runtime.name] = (runtime, call)
    _changed()
    for tell in _told:
        tell()


def unregister(name: str) -> None:
    """Remove the registration of ``name``, if there is one."""
    _added.pop(name, None)
    _changed()


def _changed() -> None:
    global _revision  # noqa: PLW0603 -- a fact about this process
    _revision += 1


def names_of(row: NativeRuntime) -> set[str]:
    """Return the variables that bound the pool of ``row``."""
    return {*(variable.name for variable in row.variables), *row.removed, *row.opt_in}
