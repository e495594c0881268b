"""Arrays of a file are mapped from it again: any view, any mode, any type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import support_arrays as arrays

from safepool import ProcessPool
from safepool.transport.payloads import dumps, loads

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SHAPE = (200, 50)


def make(tmp_path: Path) -> Any:
    # No fixture: pytest would hold the mapping until after the test has been looked through.
    array = np.memmap(tmp_path / "data", dtype="f8", mode="w+", shape=SHAPE)
    array[:] = np.arange(array.size).reshape(SHAPE)
    array.flush()
    return array


# One row per part of the file that an array can be of.
VIEWS: dict[str, Callable[[Any], Any]] = {
    "all of it": lambda m: m,
    "rows": lambda m: m[3:17],
    "a column": lambda m: m[:, 4],
    "backwards": lambda m: m[::-1, ::-2],
    "transposed": lambda m: m.T,
    "one row twice": lambda m: np.broadcast_to(m[5], (2, 50)),
    "a plain array": np.asarray,
    "a part of a plain array": lambda m: np.asarray(m)[5:, ::3],
    "other items": lambda m: m.view("i4")[7:],
    "a view of a view": lambda m: m[10:100].T[3:].reshape(-1, order="F")[5:50],
    "read-only": lambda m: _locked(m[2:9]),
    "one item": lambda m: m[7:8, 3:4],
    "mapped elsewhere": lambda m: np.memmap(m.filename, "i2", "r", offset=24, shape=(31,)),
    "copy on write": lambda m: np.memmap(m.filename, "f8", "c")[60:90],
}


def _locked(array: Any) -> Any:
    array.flags.writeable = False
    return array


def arrives(value: Any) -> Any:
    return loads([bytearray(segment) for segment in dumps(value)])


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_is_mapped_again(tmp_path: Path, view: str) -> None:
    """Same items, same type, same flags, and of the same file: no item is in the pickle."""
    mapped = make(tmp_path)
    sent = VIEWS[view](mapped)
    (pickled,) = dumps(sent)
    got = arrives(sent)

    assert len(pickled) < 500
    assert (type(got), got.dtype, got.shape) == (type(sent), sent.dtype, sent.shape)
    assert got.strides == sent.strides
    assert got.flags.writeable == sent.flags.writeable
    np.testing.assert_array_equal(got, sent)
    np.testing.assert_array_equal(arrives(got), sent)


@pytest.mark.parametrize("view", ["all of it", "a column", "backwards", "a plain array"])
def test_what_is_written_is_in_the_file(tmp_path: Path, view: str) -> None:
    mapped = make(tmp_path)
    arrives(VIEWS[view](mapped))[...] = -5

    assert (VIEWS[view](mapped) == -5).all()


def test_what_travels_with_code_is_mapped_again_as_well(tmp_path: Path) -> None:
    """A closure of a memmap is pickled by another pickler."""
    mapped = make(tmp_path)
    read = arrives(lambda: (mapped, np.asarray(mapped)[3:]))
    mapped[5] = 77

    assert (read()[0][5] == 77).all()
    assert (read()[1][2] == 77).all()


def test_private_pages_stay_private(tmp_path: Path) -> None:
    mapped = make(tmp_path)
    private = np.memmap(mapped.filename, dtype="f8", mode="c", shape=SHAPE)
    arrives(private)[:] = 9

    assert mapped[0, 1] == 1


def _unlinked(array: Any) -> Any:
    array.filename.unlink()
    return array[:7]


# One row per array that looks mapped and has no file to be mapped from.
COPIES: dict[str, Callable[[Any], Any]] = {
    "computed": lambda m: m + 1,
    "selected": lambda m: m[[3, 1]],
    "no items": lambda m: m[:0],
    "file gone": _unlinked,
}


@pytest.mark.parametrize("case", COPIES)
def test_an_array_without_a_file_is_copied(tmp_path: Path, case: str) -> None:
    mapped = make(tmp_path)
    sent = COPIES[case](mapped)
    expected = np.array(sent)

    got = arrives(sent)
    assert type(got) is np.ndarray
    np.testing.assert_array_equal(got, expected)


def test_workers_write_into_one_memmap(tmp_path: Path) -> None:
    """The pattern that joblib documents: the program makes the output, workers fill it."""
    mapped = make(tmp_path)
    with ProcessPool(2) as pool:
        list(pool.map(arrays.write_at, [mapped] * SHAPE[0], range(SHAPE[0]), timeout=60))
        returned = pool.submit(arrays.itself, mapped[5:]).result(timeout=60)

    np.testing.assert_array_equal(mapped[:, 0], np.arange(SHAPE[0]))
    returned[0] = -1
    assert mapped[5, 0] == -1
