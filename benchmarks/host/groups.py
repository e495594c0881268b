"""A control group with a real CPU quota, for as long as a demo runs. Linux only.

It makes one group below this process's own, never moves this process, and takes the group
away again however the demo ends. The only file of another group that it ever writes is
``cgroup.subtree_control`` of version 2's root, and it puts that back.

Sources: Linux, Documentation/admin-guide/cgroup-v2.rst ("Organizing Processes and Threads",
"Controlling Controllers") and Documentation/scheduler/sched-bwc.rst.

Not covered:
    * A demo that is killed by SIGKILL: nothing is left that could remove the group.
    * Version 1 with ``cpu`` and ``cpuset`` mounted as one: a new group there has no CPUs.
"""

from __future__ import annotations

import os
import platform
import signal
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safepool.cli.demo import undisturbed
from safepool.errors import SafepoolError, UnreadableLimitError
from safepool.limits.cgroup import find_levels
from safepool.limits.files import Machine
from safepool.limits.place import read_place
from safepool.limits.quota import parse_cfs_quota, parse_cpu_max, parse_cpu_stat

if TYPE_CHECKING:
    from collections.abc import Iterator

    from safepool.limits import Limit, Throttling

__all__ = ["GroupLeftError", "NoGroupError", "QuotaGroup", "Site", "find_site", "quota_group"]

_PERIOD_US = 100_000
# Windows has none, nor control groups.
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)

# Killed processes leave a group within milliseconds once its quota is lifted.
_EMPTY_WITHIN_S = 10.0

# What a group of version 2 may set for everything below it. A new group next to one with
# such a ceiling would give the demo more than this process may use.
_CEILINGS = ("cpu.max", "cpuset.cpus", "memory.max", "memory.high", "pids.max")


class NoGroupError(SafepoolError):
    """No control group can be made here.

    Attributes:
        reason: Why, as the rest of the sentence "no group, because ...".
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class GroupLeftError(SafepoolError):
    """The demo's control group could not be removed.

    Attributes:
        directory: The group.
        reason: The obstacle, in words.
    """

    def __init__(self, directory: str, reason: str) -> None:
        super().__init__(directory, reason)
        self.directory = directory
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"the demo's control group is still there: {self.reason}. "
            f"Remove it with: rmdir {self.directory}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaGroup:
    """One control group with a quota of its own.

    Attributes:
        directory: The group.
        limit: Its quota.
    """

    directory: Path
    limit: Limit

    @property
    def members_file(self) -> Path:
        """The file that lists the group's processes; who writes ``0`` to it joins."""
        return self.directory / _MEMBERS

    def throttling(self) -> Throttling | None:
        """Read how often the kernel has frozen this group; ``None`` if it does not tell."""
        source = self.directory / "cpu.stat"
        try:
            return parse_cpu_stat(source.read_text(), source=str(source))
        except (OSError, UnreadableLimitError):
            return None

    def empty(self) -> None:
        """Kill whatever is still in the group and wait until it has gone.

        Raises:
            GroupLeftError: Something would not go.
        """
        _empty(self.directory)


@contextmanager
def quota_group(cpus: float, *, root: Path = Path("/")) -> Iterator[QuotaGroup]:
    """Make a control group with a quota, and remove it at the end of the ``with`` block.

    Args:
        cpus: The quota in CPUs, at least 0.01 (the kernel takes no less than 1 ms in 100).
        root: The folder that holds the machine's files; another one is for tests.

    Yields:
        The group, empty.

    Raises:
        NoGroupError: Not on Linux, not permitted, no ``cpu`` controller, read-only, or a
            quota that the groups above do not allow.
        GroupLeftError: At the end: the group would not go.
    """
    if platform.system() != "Linux":
        raise NoGroupError("only Linux has control groups")
    site = find_site(root)
    directory = site.parent / f"safepool-demo-{os.getpid()}"
    if directory.exists():
        raise NoGroupError(f"{directory} is there already")
    quota_us = max(1_000, round(cpus * _PERIOD_US))
    try:
        try:
            if site.hands_out_cpu:
                _write(site.parent / _CONTROLLERS_BELOW, "+cpu")
            directory.mkdir()
            limit = _set_quota(directory, site.version, quota_us)
        except OSError as error:
            raise NoGroupError(_why(error, directory)) from error
        yield QuotaGroup(directory=directory, limit=limit)
    finally:
        with undisturbed():
            _remove(directory, site)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a group can be made.

    Attributes:
        version: Version of the control groups, 1 or 2.
        parent: The group that it is made in.
        hands_out_cpu: The parent must be told to give its children the cpu controller.
    """

    version: int
    parent: Path
    hands_out_cpu: bool = False


_MEMBERS = "cgroup.procs"
_CONTROLLERS_BELOW = "cgroup.subtree_control"


def find_site(root: Path) -> Site:
    """Choose the group to make a new one in.

    Args:
        root: The folder that holds the machine's files.

    Raises:
        NoGroupError: None of this process's groups will do.
    """
    machine = Machine(root)
    place = read_place(machine)
    # Without its own name a process cannot tell which of the mounted groups it is in.
    levels = find_levels(machine, place, "cpu") if place.own else ()
    if not levels:
        raise NoGroupError("this process sees no control group of its own")
    groups = [root / level.directories[0].lstrip("/") for level in levels]
    if levels[0].version == 1:
        return Site(version=1, parent=groups[0])
    return _find_v2_site(groups)


def _find_v2_site(groups: list[Path]) -> Site:
    """Choose among a process's groups, innermost first: only some can hold a new one.

    Version 2 gives a group the controller only if its parent hands it out, and only the
    root may do that while it holds processes itself, as a login session's group does.
    """
    own = groups[0]
    has_cpu = "cpu" in _words(own / "cgroup.controllers")
    # cgroup-v2.rst, "cgroup.type": only the real root, not a namespace's, is without it.
    if has_cpu and not (own / "cgroup.type").exists():
        return Site(version=2, parent=own, hands_out_cpu="cpu" not in _handed_out(own))
    for group in groups:
        if "cpu" in _handed_out(group):
            return Site(version=2, parent=group)
        if any(_words(group / name)[:1] not in ([], ["max"]) for name in _CEILINGS):
            raise NoGroupError(f"{group} has limits of its own and holds processes")
    raise NoGroupError(
        f"no control group from {own} upwards passes the cpu controller to its children"
    )


def _handed_out(group: Path) -> list[str]:
    return _words(group / _CONTROLLERS_BELOW)


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def _set_quota(directory: Path, version: int, quota_us: int) -> Limit:
    if version == 1:
        quota = directory / "cpu.cfs_quota_us"
        _write(directory / "cpu.cfs_period_us", str(_PERIOD_US))
        _write(quota, str(quota_us))
        return parse_cfs_quota(str(quota_us), str(_PERIOD_US), source=str(quota))
    quota = directory / "cpu.max"
    _write(quota, f"{quota_us} {_PERIOD_US}")
    return parse_cpu_max(f"{quota_us} {_PERIOD_US}", source=str(quota))


def _write(file: Path, text: str) -> None:
    # An error in writing carries no name of the file, unlike one in opening it.
    try:
        file.write_text(text)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error


def _why(error: OSError, directory: Path) -> str:
    reason = f"{error.filename or directory}: {error.strerror}"
    if isinstance(error, PermissionError):
        return f"{reason} (it takes root)"
    # EINVAL, version 1: no quota in the tree may exceed that of a group above (sched-bwc.rst).
    return f"{reason} (the groups around it do not allow it)" if error.errno == 22 else reason


def _remove(directory: Path, site: Site) -> None:
    if directory.is_dir():
        # Frozen processes die only when they run again: the quota is lifted before the kill.
        lifted = ("cpu.cfs_quota_us", "-1") if site.version == 1 else ("cpu.max", "max")
        with suppress(OSError):
            _write(directory / lifted[0], lifted[1])
        _empty(directory)
        _remove_empty(directory)
    if site.hands_out_cpu:
        with suppress(OSError):
            _write(site.parent / _CONTROLLERS_BELOW, "-cpu")


def _empty(directory: Path) -> None:
    deadline = time.monotonic() + _EMPTY_WITHIN_S
    while pids := _words(directory / _MEMBERS):
        if time.monotonic() > deadline:
            raise GroupLeftError(str(directory), f"processes {' '.join(pids)} do not end")
        for pid in pids:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(int(pid), _KILL)
        time.sleep(0.01)


def _remove_empty(directory: Path) -> None:
    # Busy for a moment after the last process has left the list: it is still exiting.
    deadline = time.monotonic() + _EMPTY_WITHIN_S
    while True:
        try:
            directory.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise GroupLeftError(str(directory), str(error.strerror)) from error
            time.sleep(0.01)
        else:
            return
