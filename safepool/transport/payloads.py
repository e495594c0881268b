"""Objects to segments and back: pickle protocol 5 with its buffers out of band (PEP 574).

The standard pickler pickles objects that every worker can import, by reference. Other objects
(functions and classes of ``__main__``, lambdas, closures, notebook cells) travel by value, through
cloudpickle with the reducers that were registered with loky.
"""

from __future__ import annotations

import copyreg
import functools
import pickle
import sys
from collections import ChainMap
from typing import TYPE_CHECKING, Any

from safepool.errors import let_handlers_pass
from safepool.transport import held, weak
from safepool.transport.descriptors import (
    CONNECTION,
    Incoming,
    Outgoing,
    Registered,
    are_beyond,
    registered,
)
from safepool.transport.exceptions import StandardTable
from safepool.transport.frames import Buffer, Missing, Segment
from safepool.transport.growing import Sink, load
from safepool.transport.marks import main_space
from safepool.transport.memmaps import Prints, Reducers
from safepool.transport.names import Met, met
from safepool.transport.reductions import Reductions, begin, end, has_failed, reduce_once

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from io import BytesIO


# A smaller buffer is cheaper as a copy in the pickle than as a segment.
_OUT_OF_BAND_BYTES = 32 * 1024

# In the pickle of an ``object()``, which programs compare by identity.
_SENTINEL = b"\x8c\x06object\x94\x93\x94)\x81"


def dumps(
    value: object,
    *,
    into_main: bool = False,
    by_value: bool = False,
    reducers: Mapping[type, Callable[[Any], Any]] | None = None,
    reductions: Reductions | None = None,
) -> list[bytes | memoryview]:
    """Return the segments of ``value``: its pickle, then its large buffers, not copied.

    The buffers are views of the value's own memory, which must not change before they are sent. A
    value with an open descriptor is refused: only :func:`dumps_to_send` takes it.

    Args:
        value: Anything that pickle or cloudpickle can pickle.
        into_main: ``True`` gives functions of ``__main__`` the receiver's ``__main__`` as their
            globals, also functions that arrive later. ``False`` gives functions that travel
            together common, separate globals.
        by_value: Whether the value is known to hold something of ``__main__``: it is then pickled
            once, without a first try by reference.
        reducers: Reducers of certain types, for this value only.
        reductions: Results of methods for pickling that ran for this value before.

    Example:
        >>> loads(dumps({"a": lambda: 3}))["a"]()
        3
    """
    way = Outgoing(allowed=False)
    before = begin(reductions)
    try:
        return _dumps_by(way, value, into_main=into_main, by_value=by_value, reducers=reducers)
    finally:
        end(before)


def dumps_to_send(
    value: object,
    *,
    into_main: bool = False,
    by_value: bool = False,
    reductions: Reductions | None = None,
) -> list[Segment]:
    """Return the segments of ``value`` as :func:`dumps`, and behind them its open descriptors."""
    way = Outgoing(allowed=sys.platform == "linux")
    before = begin(reductions)
    try:
        segments = _dumps_by(way, value, into_main=into_main, by_value=by_value, reducers=None)
    finally:
        end(before)
    return [*segments, *way.segments()]


def _dumps_by(
    way: Outgoing,
    value: object,
    *,
    into_main: bool,
    by_value: bool,
    reducers: Mapping[type, Callable[[Any], Any]] | None,
) -> list[bytes | memoryview]:
    by_value = by_value or by_value_modules()
    if not (by_value or are_beyond()):
        dump = functools.partial(_standard_dumps, reducers=reducers)
        segments = _tried(value, dump, into_main=into_main)
        if segments and not (CONNECTION in segments[0] or _SENTINEL in segments[0]):
            return segments
    known = registered()
    with way:
        if known.beyond and not by_value:
            dump = functools.partial(_standard_dumps, reducers=reducers, known=known)
            segments = _tried(value, dump, into_main=into_main)
            if segments:
                return segments
        dump = functools.partial(_by_value_dumps, into_main=into_main, reducers=reducers)
        return segments_of(value, dump)


def _tried(
    value: object,
    dump: Callable[[object, Callable[[pickle.PickleBuffer], bool]], bytes],
    *,
    into_main: bool,
) -> list[bytes | memoryview] | None:
    """Return the segments by the standard pickler; ``None`` if they may not be right."""
    try:
        segments = segments_of(value, dump)
    except (MemoryError, RecursionError):
        raise
    except Exception as error:
        # Of the pickler or of C code: cloudpickle may know better, or says it.
        if has_failed():
            raise
        let_handlers_pass(error)
        return None
    # A name in ``__main__`` is another thing in the worker, or nothing. In a child of
    # ``multiprocessing`` it is known by another one.
    wrong = b"__main__" in segments[0] or (into_main and b"__mp_main__" in segments[0])
    return None if wrong else segments


def loads(segments: Sequence[Buffer]) -> Any:
    """Return the object that :func:`dumps` made the segments of.

    Arrays are built on the buffers themselves, so they are writable where the buffer is. A segment
    that could not be received raises its error.
    """
    buffers = segments[1:]
    if buffers or type(segments[0]) is Missing:
        for segment in segments:
            if isinstance(segment, Missing):
                raise segment.error
        # A buffer is never empty.
        descriptors = [part for part in buffers if not len(part)]
        if descriptors:
            with Incoming(descriptors):
                return load(segments[0], buffers[: -len(descriptors)])
    return load(segments[0], buffers)


def segments_of(
    value: object, dump: Callable[[object, Callable[[pickle.PickleBuffer], bool]], bytes]
) -> list[bytes | memoryview]:
    """Return what ``dump`` makes of a value, and the buffers that are no part of that."""
    buffers: list[memoryview] = []

    def in_band(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()  # contiguous: the pickler refuses others
        if raw.nbytes < _OUT_OF_BAND_BYTES:
            return True
        buffers.append(raw)
        return False

    return [dump(value, in_band), *buffers]


def _standard_dumps(
    value: object,
    in_band: Callable[[pickle.PickleBuffer], bool],
    *,
    reducers: Mapping[type, Callable[[Any], Any]] | None,
    known: Registered | None = None,
) -> bytes:
    script = met()
    prints = script is not None and script.prints
    # A later registration makes another table.
    entries = len(copyreg.dispatch_table)
    kind: Any = _table_pickler(known, entries, arrays="numpy" in sys.modules, prints=prints)
    if reducers:
        kind = _with(kind, reducers)
    file = Sink()
    _finish(kind(file, protocol=5, buffer_callback=in_band), file, value, script)
    return file.getvalue()


def _with(kind: Any, reducers: Mapping[type, Callable[[Any], Any]]) -> Any:
    # The table is an attribute of the class, where the C pickler looks for it.
    once = {kind: functools.partial(reduce_once, reduce) for kind, reduce in reducers.items()}
    table: Any = ChainMap(once, kind.dispatch_table)
    return type("PicklerOnce", (kind,), {"dispatch_table": table})


@functools.lru_cache(maxsize=8)
def _table_pickler(known: Registered | None, _entries: int, *, arrays: bool, prints: bool) -> Any:
    special = (Prints if prints else Reducers)(arrays=arrays)
    special.update(weak.containers())
    if known is not None:
        special.update(known.reducers)
    # Of the class: to set it on each pickler costs a microsecond.
    return type("TablePickler", (pickle.Pickler,), {"dispatch_table": StandardTable(special)})


def _finish(pickler: Any, file: BytesIO, value: object, script: Met | None) -> None:
    if script is not None:
        script.begin(pickler, file)
    pickler.dump(value)
    if script is not None:
        script.end(pickler)


def _by_value_dumps(
    value: object,
    in_band: Callable[[pickle.PickleBuffer], bool],
    *,
    into_main: bool,
    reducers: Mapping[type, Callable[[Any], Any]] | None,
) -> bytes:
    file = Sink()
    dump_by_value(value, file, in_band, into_main=into_main, reducers=reducers)
    return file.getvalue()


def dump_by_value(
    value: object,
    file: BytesIO,
    in_band: Callable[[pickle.PickleBuffer], bool] | None = None,
    *,
    into_main: bool = True,
    reducers: Mapping[type, Callable[[Any], Any]] | None = None,
) -> None:
    """Write the pickle of an object that a receiver cannot import into a file."""
    script = met()
    kind = _by_value_pickler(
        registered(),
        # Another thread may be importing it.
        hasattr(sys.modules.get("loky.backend.reduction"), "_dispatch_table"),
        "numpy" in sys.modules,
        script is not None and script.prints,
    )
    if reducers:
        kind = _with(kind, reducers)
    pickler = kind(file, protocol=5, buffer_callback=in_band)
    pickler.to_worker = into_main
    if into_main:
        # cloudpickle asks here for what stands for a function's globals.
        ours = main_namespace()
        pickler.namespace = _Main(__package__=ours.get("__package__"))
        pickler.globals_ref[id(ours)] = pickler.namespace
    _finish(pickler, file, value, script)


held.write_copy = dump_by_value


def main_namespace(package: str | None = None) -> dict[str, Any]:
    """Return the globals of this process's ``__main__``; what arrives by value asks for them.

    The package is that of the sender's ``__main__`` (``python -m package``), for relative imports.
    """
    names = main_space()
    if package:
        names["__package__"] = package
    return names


class _Main(dict[str, Any]):
    """Stands for the globals of ``__main__``, and arrives as the receiver's."""

    def __reduce__(self) -> tuple[Any, ...]:
        package = self["__package__"]
        return main_namespace, (package,) if package else ()


@functools.lru_cache(maxsize=16)
def _by_value_pickler(
    known: Registered, loky_imported: bool, numpy_imported: bool, prints: bool
) -> Any:
    # Imported here: a worker or a program that sends only importable things never needs it.
    from safepool.transport.by_value import ByValuePickler, reducer_table  # noqa: PLC0415

    # The C pickler reads the table from the class. No reducer can be registered with loky before
    # its import.
    special = {**known.reducers, **Reducers(arrays=numpy_imported)}
    table = reducer_table(special, loky_imported=loky_imported)
    if prints:
        table.maps.insert(0, Prints(arrays=numpy_imported))
    return type("ByValuePickler", (ByValuePickler,), {"dispatch_table": table})


def by_value_modules() -> bool:
    """Tell whether the program asked cloudpickle to send some module by value."""
    return bool(held.modules_by_value())
