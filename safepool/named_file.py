"""Opening of files that the program names, through no link that another user placed.

In a folder that other users may write to, such as ``/tmp``, another user may place a link at a
name that a program will write. The program would then empty a file of its own user. The kernel
forbids most such cases where ``fs.protected_symlinks`` and the related settings are on. This
module protects the program wherever they are off, and in any folder.

    what is found on the way            what is done
    a link of this user, or of root     followed; the same rules apply to its target
    a link below /proc                  followed: the kernel made it (``/dev/stdout``)
    a link of another user              refused
    in a sticky folder for everybody: a file of another user, or with a second name
                                        refused: others could read it, or it is another file

Not covered:
    * Other systems than Linux: the module follows every link there.
    * Folders of other users that are no links: a program that names such a folder trusts its
      owner.

Source: Linux, Documentation/admin-guide/sysctl/fs.rst, "protected_symlinks",
"protected_regular", "protected_hardlinks".
"""

from __future__ import annotations

import errno
import os
import stat
import sys

# Linux, MAXSYMLINKS.
_MOST_LINKS = 40


if sys.platform != "linux":

    def open_named(path: str, flags: int) -> int:
        """Open a file, and create it if there is none."""
        return os.open(path, flags | os.O_CREAT, 0o666)

else:

    def open_named(path: str, flags: int) -> int:
        """Open a file, and create it if there is none.

        Args:
            path: From the root.
            flags: The same as for ``os.open``.

        Returns:
            The descriptor.

        Raises:
            OSError: The same as ``os.open``; ``EPERM`` if another user could have chosen the file.
        """
        left = path.split("/")[::-1]
        links = 0
        here = _folder("/")
        try:
            while True:
                part = left.pop() or "."
                try:
                    if not any(left):
                        # A path that ends with a slash is a folder's, which cannot be written.
                        return _file(here, "/".join([part, *left]), flags)
                    inner = _folder(part, here)
                except OSError as error:
                    if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                        raise
                    target = _target(here, part)
                    if target is None:
                        raise
                    links += 1
                    if links > _MOST_LINKS:
                        raise
                    if target == "":
                        if not any(left):
                            return os.open(part, flags, dir_fd=here)
                        inner = os.open(part, os.O_PATH | os.O_CLOEXEC, dir_fd=here)
                    else:
                        left += target.split("/")[::-1]
                        inner = _folder("/" if target.startswith("/") else ".", here)
                os.close(here)
                here = inner
        finally:
            os.close(here)

    def _folder(name: str, below: int | None = None) -> int:
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags, dir_fd=below)

    def _target(folder: int, name: str) -> str | None:
        """Return a link's target, ``""`` for a link of the kernel; ``None`` for no link."""
        link = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            about = os.fstat(link)
            if not stat.S_ISLNK(about.st_mode):
                return None
            if about.st_dev == _proc():
                return ""
            _require_trusted(about, "a link")
            return os.readlink("", dir_fd=link)
        finally:
            os.close(link)

    def _proc() -> int | None:
        try:
            return os.lstat("/proc/self").st_dev
        except OSError:  # it is not mounted
            return None

    def _file(folder: int, name: str, flags: int) -> int:
        while True:
            try:
                new = flags | os.O_CREAT | os.O_EXCL
                return os.open(name, new, 0o666, dir_fd=folder)
            except FileExistsError:
                pass
            try:
                found = os.open(name, flags | os.O_NOFOLLOW, dir_fd=folder)
            except FileNotFoundError:
                continue  # removed in between
            try:
                _require_own(found, folder)
            except BaseException:
                os.close(found)
                raise
            return found

    def _require_own(file: int, folder: int) -> None:
        everybodys = stat.S_ISVTX | stat.S_IWOTH
        if os.fstat(folder).st_mode & everybodys != everybodys:
            return
        about = os.fstat(file)
        _require_trusted(about, "a file")
        if stat.S_ISREG(about.st_mode) and about.st_nlink > 1:
            reason = "the file has a second hard link, and its folder is writable by all users"
            raise OSError(errno.EPERM, reason)

    def _require_trusted(about: os.stat_result, what: str) -> None:
        if about.st_uid not in (0, os.geteuid()):
            raise OSError(errno.EPERM, f"{what} in its path belongs to user {about.st_uid}")
