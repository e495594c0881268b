r"""Facts of Linux about processes under ``/proc``: files in, numbers and names out.

    status            fields by their names; the signals among them
    stat              name, state, parent, start
    task              threads and their names; children
    statm, maps       memory, files that are mapped

Only this module knows these formats; the formats of limits are in ``limits``. Elsewhere than on
Linux there is nothing to read, and so nothing known.

Sources: proc_pid_status(5), proc_pid_stat(5), proc_pid_task(5), proc_tid_children(5),
proc_pid_statm(5), proc_pid_maps(5).

Not covered:
    * A number that belongs to another process by now: the caller knows that its process runs.
"""

from __future__ import annotations

import mmap
import os
from typing import Any, NamedTuple


def read(path: str, errors: str = "replace") -> str | None:
    """Return the text of a file; ``None`` if it does not exist or is hidden."""
    try:
        with open(path, encoding="utf-8", errors=errors) as file:
            return file.read()
    except OSError:
        return None


def parse_fields(text: str) -> dict[str, str]:
    r"""Return the fields of a ``status`` by their names.

    Example:
        >>> parse_fields("Name:\tcat\nVmSize:\t   8192 kB\n")
        {'Name': 'cat', 'VmSize': '8192 kB'}
    """
    found = (line.partition(":") for line in text.split("\n"))
    return {name: value.strip() for name, colon, value in found if colon}


def fields(process: int | str = "self") -> dict[str, str]:
    """Return the fields of a process's ``status``, or of a thread's; none if it cannot be read."""
    return parse_fields(read(f"/proc/{process}/status") or "")


class Status(NamedTuple):
    """Facts about a process that the pool asks for.

    Attributes:
        state: One letter: ``R`` runs, ``S`` and ``D`` wait, ``T`` and ``t`` are stopped,
            ``Z`` has ended.
        threads: Number of threads that the system counts, native ones included.
        caught: Bit mask of signals that have a handler; bit 0 is signal 1.
        pending: Bit mask of signals that were sent and not delivered.
    """

    state: str
    threads: int
    caught: int
    pending: int

    def catches(self, number: int) -> bool:
        """Tell whether the signal would call a handler."""
        return _has(self.caught, number)

    def awaits(self, number: int) -> bool:
        """Tell whether the signal is still to be delivered."""
        return _has(self.pending, number)


def _has(mask: int, number: int) -> bool:
    return bool(mask >> (number - 1) & 1)


def parse_status(text: str) -> Status | None:
    r"""Parse a ``status``; ``None`` if a field is missing or not a number.

    Example:
        >>> parse_status("State:\tS (sleeping)\nThreads:\t3\nSigPnd:\t0\nShdPnd:\t2\nSigCgt:\t1\n")
        Status(state='S', threads=3, caught=1, pending=2)
    """
    found = parse_fields(text)
    try:
        return Status(
            state=found["State"].split()[0],
            threads=int(found["Threads"]),
            caught=int(found["SigCgt"], 16),
            pending=int(found["SigPnd"], 16) | int(found["ShdPnd"], 16),
        )
    except (KeyError, ValueError, IndexError):
        return None


def read_status(pid: int) -> Status | None:
    """Return the system's facts about a process; ``None`` if unknown."""
    return parse_status(read(f"/proc/{pid}/status") or "")


def obstacle(pid: int) -> str:
    """Say why a process may still be there that was sent ``SIGKILL``."""
    found = fields(pid)
    users = found.get("Uid", "").split()
    geteuid: Any = getattr(os, "geteuid", None)  # Windows has none
    mine = "" if geteuid is None else str(geteuid())
    if users and mine not in {"0", *users[:3:2]}:
        return f"it belongs to user {users[0]}, whose processes user {mine} may not signal"
    state = found.get("State", "an unknown state")
    return f"SIGKILL has no effect yet, it is in a system call ({state})"


def threads_that_block(pid: int, number: int) -> frozenset[int]:
    """Return the ids of a process's threads that a signal cannot reach now.

    A thread blocks a signal as long as it is in its handler.
    """
    masks = {one: fields(f"{pid}/task/{one}").get("SigBlk", "0") for one in threads(pid)}
    return frozenset(one for one, mask in masks.items() if _has(int(mask, 16), number))


class Stat(NamedTuple):
    """The head of a ``stat``.

    Attributes:
        name: The command, 15 bytes at most.
        state: The same as in :class:`Status`.
        parent: The process id of the parent.
        started: When, in ticks since the system started.
    """

    name: str
    state: str
    parent: int
    started: int


def parse_stat(text: str) -> Stat | None:
    """Parse a ``stat``; ``None`` if it is not whole.

    Example:
        >>> parse_stat("7 (a ) b) S 1" + " 0" * 17 + " 99 0")
        Stat(name='a ) b', state='S', parent=1, started=99)
    """
    # The command in parentheses may hold anything, parentheses and blanks too.
    head, _, rest = text.rpartition(")")
    values = rest.split()
    try:
        return Stat(head.partition("(")[2], values[0], int(values[1]), int(values[19]))
    except (IndexError, ValueError):
        return None


def read_stat(process: int | str) -> Stat | None:
    """Return the system's facts about a process or a thread; ``None`` if it has ended."""
    return parse_stat(read(f"/proc/{process}/stat") or "")


def processes() -> list[int]:
    """Return the numbers of all processes that can be seen from here."""
    return _numbers("/proc")


def threads(process: int | str = "self") -> list[int]:
    """Return the numbers of a process's threads; none if it has ended."""
    return _numbers(f"/proc/{process}/task")


def _numbers(folder: str) -> list[int]:
    try:
        return [int(name) for name in os.listdir(folder) if name.isdecimal()]
    except OSError:
        return []


def states(pid: int) -> set[str]:
    """Return the states of a process's threads; none if it has ended."""
    found = (read_stat(f"{pid}/task/{one}") for one in threads(pid))
    return {one.state for one in found if one is not None}


def named_threads() -> list[tuple[int, str]]:
    """Return number and name of every thread that the system counts in this process."""
    found = ((one, read(f"/proc/self/task/{one}/comm")) for one in threads())
    return [(one, name.strip()) for one, name in found if name is not None]


def children(thread: str) -> list[int]:
    """Return the processes that a thread of this one has started (``"thread-self"``).

    None where the kernel keeps no such file (``CONFIG_PROC_CHILDREN``).
    """
    return [int(pid) for pid in (read(f"/proc/{thread}/children") or "").split()]


def resident_bytes(pid: int) -> int | None:
    """Return the resident memory of a process; ``None`` if unknown."""
    try:
        return int((read(f"/proc/{pid}/statm") or "").split()[1]) * mmap.PAGESIZE
    except (ValueError, IndexError):
        return None


class MemoryFile:
    """Open ``statm`` file of a process: a read takes a tenth of the time of opening.

    Args:
        process: Process id, or ``"self"``.

    Raises:
        OSError: The file does not exist or is hidden.
    """

    def __init__(self, process: int | str) -> None:
        self._file = open(f"/proc/{process}/statm", "rb", buffering=0)  # noqa: SIM115 -- kept

    def private_bytes(self) -> int | None:
        """Return the resident memory without shared memory and mapped files.

        ``None`` if the process has ended.
        """
        try:
            self._file.seek(0)
            _, resident, shared, *_ = self._file.read(256).split()
        except (OSError, ValueError):
            return None
        return (int(resident) - int(shared)) * mmap.PAGESIZE

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._file.fileno()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def parse_maps(text: str, *, code: bool = False) -> list[str]:
    r"""Return the files of a ``maps``, each once, in its order; with ``code`` those of code alone.

    Example:
        >>> parse_maps("00-10 r-xp 00 08:02 17 /lib/a b.so\n10-20 rw-p 00 00:00 0 [heap]\n")
        ['/lib/a b.so']
        >>> parse_maps("00-10 r--p 00 08:02 17 /lib/a b.so\n", code=True)
        []
    """
    lines = (line.split(maxsplit=5) for line in text.split("\n") if line.count(" /"))
    found = (line[5] for line in lines if len(line) == 6 and ("x" in line[1] or not code))
    return list(dict.fromkeys(path for path in found if path.startswith("/")))


def mapped_files() -> list[str]:
    """Return the files that are mapped into this process."""
    return parse_maps(read("/proc/self/maps", "surrogateescape") or "")
