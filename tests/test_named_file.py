"""A file that the program names is written through no link that another user placed."""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest

import safepool
from safepool.named_file import open_named

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere links are followed")

# Nobody of this machine, as far as one can know.
ANOTHER = 54321


def own_link(folder: Path) -> Path:
    (folder / "link").symlink_to("file")
    return folder / "link"


def own_link_to_nothing(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "new")
    return folder / "link"


def own_link_to_a_folder(folder: Path) -> Path:
    (folder / "inner").mkdir()
    (folder / "link").symlink_to("inner/../inner//")
    return folder / "link" / "new"


def own_links_in_a_row(folder: Path) -> Path:
    (folder / "inner").symlink_to(folder)
    (folder / "link").symlink_to("inner/file")
    return folder / "inner" / "link"


def device(_: Path) -> str:
    return "/dev/null"


def link_of_the_kernel(_: Path) -> str:
    return f"/proc/{os.getpid()}/root/dev/null"


def own_file_in_a_shared_folder(folder: Path) -> Path:
    folder.chmod(0o1777)
    return folder / "file"


def anothers_file_in_his_folder(folder: Path) -> Path:
    os.chown(folder / "file", ANOTHER, -1)
    return folder / "file"


def anothers_link(folder: Path) -> Path:
    os.chown(own_link(folder), ANOTHER, -1, follow_symlinks=False)
    return folder / "link"


def anothers_link_to_nothing(folder: Path) -> Path:
    os.chown(own_link_to_nothing(folder), ANOTHER, -1, follow_symlinks=False)
    return folder / "link"


def anothers_link_in_the_middle(folder: Path) -> Path:
    file = own_link_to_a_folder(folder)
    os.chown(folder / "link", ANOTHER, -1, follow_symlinks=False)
    return file


def anothers_link_behind_an_own_one(folder: Path) -> Path:
    file = own_links_in_a_row(folder)
    os.chown(folder / "link", ANOTHER, -1, follow_symlinks=False)
    return file


def anothers_file_in_a_shared_folder(folder: Path) -> Path:
    folder.chmod(0o1777)
    return anothers_file_in_his_folder(folder)


def anothers_pipe_in_a_shared_folder(folder: Path) -> Path:
    folder.chmod(0o1777)
    os.mkfifo(folder / "pipe", 0o666)
    os.chown(folder / "pipe", ANOTHER, -1)
    return folder / "pipe"


def second_name_in_a_shared_folder(folder: Path) -> Path:
    folder.chmod(0o1777)
    (folder / "second").hardlink_to(folder / "file")
    return folder / "second"


def ring(folder: Path) -> Path:
    (folder / "link").symlink_to("link")
    return folder / "link"


def folder_itself(folder: Path) -> Path:
    return folder


def folder_that_is_a_file(folder: Path) -> Path:
    return folder / "file" / "new"


ROOT = "only root gives a file to somebody else"

# Each is given a folder with the file "file", and returns the path to open.
ALLOWED: dict[str, Callable[[Path], Any]] = {
    row.__name__: row
    for row in (
        own_link,
        own_link_to_nothing,
        own_link_to_a_folder,
        own_links_in_a_row,
        device,
        link_of_the_kernel,
        own_file_in_a_shared_folder,
        anothers_file_in_his_folder,
    )
}
REFUSED: dict[str, tuple[Callable[[Path], Any], int]] = {
    row.__name__: (row, number)
    for row, number in (
        (anothers_link, errno.EPERM),
        (anothers_link_to_nothing, errno.EPERM),
        (anothers_link_in_the_middle, errno.EPERM),
        (anothers_link_behind_an_own_one, errno.EPERM),
        (anothers_file_in_a_shared_folder, errno.EPERM),
        (anothers_pipe_in_a_shared_folder, errno.EPERM),
        (second_name_in_a_shared_folder, errno.EPERM),
        (ring, errno.ELOOP),
        (folder_itself, errno.EISDIR),
        (folder_that_is_a_file, errno.ENOTDIR),
    )
}


def made(row: Callable[[Path], Any], folder: Path) -> str:
    if row.__name__.startswith("anothers") and os.geteuid() != 0:
        pytest.skip(ROOT)
    (folder / "file").write_text("precious")
    path: str = os.fspath(row(folder))
    return path


@pytest.mark.parametrize("row", ALLOWED)
def test_ones_own_links_and_files_are_written(row: str, tmp_path: Path) -> None:
    """What is opened is what the system itself would open."""
    path = made(ALLOWED[row], tmp_path)

    descriptor = open_named(path, os.O_WRONLY | os.O_CLOEXEC)

    found, expected = os.fstat(descriptor), os.stat(path)
    os.close(descriptor)
    assert (found.st_dev, found.st_ino) == (expected.st_dev, expected.st_ino)


@pytest.mark.parametrize("row", REFUSED)
def test_another_users_links_and_files_are_not(row: str, tmp_path: Path) -> None:
    """Nothing is emptied, nothing is made, and no descriptor is left."""
    make, number = REFUSED[row]
    path = made(make, tmp_path)
    if "pipe" in row:  # else nobody reads, which is refused anyway
        os.chown(path, 0, -1)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        os.chown(path, ANOTHER, -1)
    names = sorted(tmp_path.rglob("*"))
    before = len(os.listdir("/proc/self/fd"))

    with pytest.raises(OSError) as caught:  # noqa: PT011 -- its number is compared
        open_named(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    assert len(os.listdir("/proc/self/fd")) == before
    if "pipe" in row:
        os.close(reader)
    assert caught.value.errno == number
    assert (tmp_path / "file").read_text() == "precious"
    assert sorted(tmp_path.rglob("*")) == names


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason=ROOT)
def test_a_trace_is_not_written_through_another_users_link(tmp_path: Path) -> None:
    """The error of the constructor says whose link it is."""
    path = made(anothers_link, tmp_path)

    with pytest.raises(safepool.TraceFileError, match=f"a link .* user {ANOTHER}"):
        safepool.ProcessPool(1, trace=path)

    assert (tmp_path / "file").read_text() == "precious"
