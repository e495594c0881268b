"""Arrays that are mapped from a file: the file's name is sent, and the receiver maps the file.

Hence several workers write into one ``numpy.memmap``, as joblib documents it, and no byte of the
file is copied. The same holds for views of a memmap, whatever their type, strides and order.

Source: NumPy, numpy/_core/memmap.py; what joblib does in joblib/_memmapping_reducer.py.

Not covered:
    * Private changes in mode ``"c"``: the file does not have them.
    * A file without a name, or a file that is gone or too short by now: its array is copied like
      any other.
    * Subclasses of ``numpy.memmap``: they reduce themselves.
"""

from __future__ import annotations

import copyreg
import mmap
import os
import sys
from collections.abc import Callable
from typing import Any

from safepool.transport.lazy import loaded
from safepool.transport.names import met
from safepool.transport.references import reference_to


class Reducers(dict[type, "Callable[[Any], Any]"]):
    """A pickler's table: NumPy's arrays, and the reducers registered with copyreg."""

    def __init__(self, *, arrays: bool = True) -> None:
        numpy: Any = sys.modules["numpy"] if arrays else None
        super().__init__({numpy.memmap: _reduce, numpy.ndarray: _reduce} if arrays else {})

    def __missing__(self, kind: type) -> Callable[[Any], Any]:
        return copyreg.dispatch_table[kind]


class Prints(Reducers):
    """Reducers for a pickle that is compared and never loaded.

    Subclasses of arrays hand over their memory as well, instead of a copy. Arrays with gaps become
    a copy as large as their items.
    """

    def __init__(self, *, arrays: bool = True) -> None:
        super().__init__(arrays=arrays)
        if arrays:
            self[_ndarray()] = _print_of_array

    def __missing__(self, kind: type) -> Callable[[Any], Any]:
        script = met()
        if script is None or not _is_kind_of_array(kind):
            return super().__missing__(kind)
        script.replaced = True
        return _print_of

    def __contains__(self, kind: object) -> bool:
        return super().__contains__(kind) or _is_kind_of_array(kind)


def _is_kind_of_array(kind: object) -> bool:
    numpy = loaded("numpy", "ndarray")
    return numpy is not None and isinstance(kind, type) and issubclass(kind, numpy.ndarray)


def _print_of_array(array: Any) -> Any:
    if array.flags.forc or array.dtype.hasobject:
        return _reduce(array)
    script = met()
    if script is not None:
        script.replaced = True
    return _never_loaded, (array.copy(), array.strides)


def _print_of(array: Any) -> tuple[Any, ...]:
    return _never_loaded, (type(array), array.view(_ndarray()), getattr(array, "__dict__", None))


def _never_loaded(*parts: object) -> None:
    raise AssertionError(parts)


def read_only_reducers(more_than_bytes: float = -1) -> dict[type, Callable[[Any], Any]]:
    """Return the reducers for a value whose arrays above this size in bytes are read-only.

    Shared arrays and arrays mapped from a file keep their own mode.
    """
    numpy = loaded("numpy", "ndarray")
    if numpy is None:
        return {}

    def reduce(array: Any) -> Any:
        reduced = _reduce(array)
        itself = not reduced[0].__module__.startswith("safepool.")
        return (_read_only, reduced) if itself and array.nbytes > more_than_bytes else reduced

    return {numpy.ndarray: reduce}


def _read_only(make: Callable[..., Any], arguments: tuple[Any, ...], state: Any = None) -> Any:
    array = make(*arguments)
    if state is not None:
        array.__setstate__(state)
    array.flags.writeable = False
    return array


def _reduce(array: Any) -> Any:
    shared = reference_to(array)
    if shared is not None:
        return shared
    base = array if type(array) is not _ndarray() else array.base
    while base is not None:
        if isinstance(base, _memmap()):
            reduced = _reduce_mapped(array, base)
            if reduced is not None:
                return reduced
            break
        base = getattr(base, "base", None)
    if type(array) is _memmap():
        array = array.view(_ndarray())  # as a plain one: there is no file that it could name
    return array.__reduce_ex__(5)


def _ndarray() -> Any:
    return sys.modules["numpy"].ndarray


def _memmap() -> Any:
    return sys.modules["numpy"].memmap


def _reduce_mapped(array: Any, mapped: Any) -> Any:
    """Return how to map the array again; ``None`` if it cannot be."""
    while isinstance(mapped.base, _memmap()):
        mapped = mapped.base
    if not isinstance(mapped.base, mmap.mmap) or array.dtype.hasobject or not array.size:
        return None
    name = mapped.filename
    begin = array.__array_interface__["data"][0]
    low, high = begin, begin + array.itemsize
    for length, stride in zip(array.shape, array.strides, strict=True):
        if stride < 0:
            low += (length - 1) * stride
        else:
            high += (length - 1) * stride
    offset = mapped.offset + low - mapped.__array_interface__["data"][0]
    if name is None or offset < 0 or not _holds(name, offset + high - low):
        return None
    mode = "r+" if mapped.mode == "w+" else mapped.mode  # which would empty it again
    return reopen, (
        os.fspath(name),
        mode,
        (offset, high - low, begin - low),
        array.dtype,
        array.shape,
        array.strides,
        array.flags.writeable,
        type(array) is _memmap(),
    )


def _holds(name: Any, size: int) -> bool:
    try:
        return os.stat(name).st_size >= size
    except OSError:
        return False


def reopen(
    name: str,
    mode: Any,
    place: tuple[int, int, int],
    dtype: Any,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    writeable: bool,
    as_memmap: bool,
) -> Any:
    """Map an array from its file.

    Its place in the file is the first byte, the number of bytes, and the number of bytes before
    the first item. With ``as_memmap`` it is a ``numpy.memmap`` itself, and not only a view of one.
    """
    np: Any = sys.modules["numpy"]  # the dtype has brought it
    offset, length, first = place
    raw: Any = np.memmap(name, dtype=np.uint8, mode=mode, offset=offset, shape=(length,))
    array: Any = np.ndarray(shape, dtype, buffer=raw, offset=first, strides=strides)
    if as_memmap:
        array = array.view(np.memmap)
        array._mmap = raw._mmap
        array.filename, array.offset, array.mode = raw.filename, offset + first, raw.mode
    if not writeable:
        array.flags.writeable = False
    return array
