"""Rights and place of this process, which a process that it started before keeps.

Sources: proc_pid_status(5), cgroups(7), namespaces(7), credentials(7).

Not covered:
    * Rights of one thread alone (``capset`` by a system call): those of the first thread count.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_RIGHTS = ("Uid:", "Gid:", "Groups:", "Cap", "NoNewPrivs:", "Seccomp:")
# What cannot be read without a descriptor is what it was: it has not changed for that.
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)
# Between two readings of all of it: a file of /proc, some 50 us. The effective user and group are
# asked for each time, which takes less than one.
_LOOK_S = 1.0


def rights() -> tuple[str, ...]:
    """Return what this process may do; elsewhere than on Linux its effective user and group."""
    found = []
    with _as_far_as_shown(), open("/proc/self/status", encoding="utf-8", errors="replace") as file:
        found += [line for line in file if line.startswith(_RIGHTS)]
    return (*found, repr(_users()))


def place() -> tuple[str, ...]:
    """Return where this process is: control groups, name spaces, root directory."""
    found = []
    with _as_far_as_shown():
        with open("/proc/self/cgroup", encoding="utf-8", errors="replace") as file:
            found.append(file.read())
        names = sorted(os.listdir("/proc/self/ns"))
        found += [os.readlink(f"/proc/self/ns/{name}") for name in names]
        found.append(os.readlink("/proc/self/root"))
    return tuple(found)


@contextmanager
def _as_far_as_shown() -> Iterator[None]:
    """Read as much as there is: on another system, or where it is hidden, nothing more."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_DESCRIPTOR:
            raise


def can_start(*files: str) -> bool:
    """Tell whether this user may read files that a new interpreter needs, and run the first."""
    needed = [(files[0], os.X_OK), *((file, os.R_OK) for file in files)]
    effective = os.access in os.supports_effective_ids
    return all(os.access(file, how, effective_ids=effective) for file, how in needed)


class RightsWatch:
    """Tells when this process has other rights than before."""

    def __init__(self) -> None:
        self._users, self._rights = _users(), _rights_now()
        self._look_at = time.monotonic() + _LOOK_S

    def is_same_user(self) -> bool:
        """Tell whether user and group are those of the last look. From any thread."""
        return _user() == self._users[0] and _group() == self._users[1]

    def have_changed(self) -> bool:
        """Return whether they have changed since this was last asked; user and group at once."""
        users, now = _users(), time.monotonic()
        other_user = users != self._users
        if not other_user and now < self._look_at:
            return False
        self._look_at = now + _LOOK_S
        before, found = self._rights, _rights_now()
        self._users, self._rights = users, found or before
        return other_user or bool(before and found and before != found)


def _rights_now() -> tuple[str, ...]:
    """Return :func:`rights`; nothing without a descriptor to look with."""
    try:
        return rights()
    except OSError:
        return ()


if sys.platform == "linux":

    def users() -> tuple[Any, ...]:
        """Return the users and groups of this process, for :func:`take`."""
        return os.getgroups(), os.getresgid(), os.getresuid()

    def take(wanted: tuple[Any, ...]) -> None:
        """Become these users and groups, from :func:`users` of another process."""
        groups, group, user = wanted
        os.setgroups(groups)
        os.setresgid(*group)
        os.setresuid(*user)


if sys.platform == "win32":
    _user = _group = int  # there are none
else:
    _user, _group = os.geteuid, os.getegid


def _users() -> tuple[int, int]:
    return _user(), _group()
