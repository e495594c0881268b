"""What Linux tells of processes: each file's text, whole and broken, and this process's own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from safepool import procfs
from safepool.procfs import Stat, Status

STATUS = """\
Name:\tpython: it
State:\tT (stopped)
Threads:\t5
SigPnd:\t0000000000000001
ShdPnd:\t1000000000000000
SigCgt:\t1000000000000002
"""
# One row per text of a status: what it says, and nothing for what is not whole.
STATUSES: dict[str, tuple[str, Status | None]] = {
    "whole": (
        STATUS,
        Status(state="T", threads=5, caught=1 << 60 | 2, pending=1 << 60 | 1),
    ),
    "empty": ("", None),
    "cut off": (STATUS[:60], None),
    "not a number": (STATUS.replace("Threads:\t5", "Threads:\tx"), None),
    "no state": (STATUS.replace("T (stopped)", ""), None),
}


@pytest.mark.parametrize("case", STATUSES)
def test_a_status_is_read_or_not(case: str) -> None:
    text, expected = STATUSES[case]
    assert procfs.parse_status(text) == expected


def test_bits_of_a_status_are_signals() -> None:
    status = procfs.parse_status(STATUS)
    assert status is not None
    assert [n for n in range(1, 65) if status.catches(n)] == [2, 61]
    assert [n for n in range(1, 65) if status.awaits(n)] == [1, 61]


# One row per text of a status: its fields.
FIELDS: dict[str, tuple[str, dict[str, str]]] = {
    "nothing": ("", {}),
    "a value with colons": ("Name:\ta:b\n", {"Name": "a:b"}),
    "no value": ("Groups:\t\n", {"Groups": ""}),
    "a line that is none": ("Name:\ta\nrest", {"Name": "a"}),
    "a unit": ("VmSize:\t   8192 kB\n", {"VmSize": "8192 kB"}),
}


@pytest.mark.parametrize("case", FIELDS)
def test_fields_have_names_and_values(case: str) -> None:
    text, expected = FIELDS[case]
    assert procfs.parse_fields(text) == expected


_ZEROS = " 0" * 17
# One row per text of a stat: the command may hold anything.
STATS: dict[str, tuple[str, Stat | None]] = {
    "whole": (f"7 (cat) S 1{_ZEROS} 99 0", Stat("cat", "S", 1, 99)),
    "blanks and brackets": (f"7 (a) S (b ) Z 12{_ZEROS} 5 0", Stat("a) S (b ", "Z", 12, 5)),
    "no name": (f"7 () R 1{_ZEROS} 99 0", Stat("", "R", 1, 99)),
    "a line's end in the name": (f"7 (a\nb) R 1{_ZEROS} 9 0", Stat("a\nb", "R", 1, 9)),
    "empty": ("", None),
    "cut off": ("7 (cat) S 1 0 0", None),
    "not a number": (f"7 (cat) S x{_ZEROS} 99 0", None),
}


@pytest.mark.parametrize("case", STATS)
def test_a_stat_is_read_or_not(case: str) -> None:
    text, expected = STATS[case]
    assert procfs.parse_stat(text) == expected


# One row per text of maps: its files.
MAPS: dict[str, tuple[str, list[str]]] = {
    "nothing": ("", []),
    "no file": ("00-10 rw-p 00 00:00 0\n10-20 rw-p 00 00:00 0 [heap]\n", []),
    "each once": ("00-10 r-xp 00 08:02 17 /a\n10-20 rw-p 00 08:02 17 /a\n", ["/a"]),
    "a blank": ("00-10 r-xp 00 08:02 17   /a b\n", ["/a b"]),
    "one that is gone": ("00-10 r-xp 00 08:02 17 /a (deleted)\n", ["/a (deleted)"]),
    "no line of maps": ("00-10 /a\n", []),
    "no path": ("00-10 r-xp 00 08:02 17 anon_inode:x /y\n", []),
}


@pytest.mark.parametrize("case", MAPS)
def test_maps_name_files(case: str) -> None:
    text, expected = MAPS[case]
    assert procfs.parse_maps(text) == expected


NOBODY = 1 << 22  # more than any process has, proc_sys_kernel(5)


def test_nothing_is_known_of_nobody() -> None:
    """Nor of anybody elsewhere than on Linux."""
    pid = NOBODY if sys.platform == "linux" else os.getpid()
    assert (procfs.read_status(pid), procfs.read_stat(pid), procfs.resident_bytes(pid)) == (
        None,
    ) * 3
    assert (procfs.fields(pid), procfs.threads(pid), procfs.states(pid)) == ({}, [], set())
    assert procfs.threads_that_block(pid, 1) == frozenset()


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
def test_this_process_finds_itself() -> None:
    own = procfs.read_stat("self")
    assert own is not None
    assert own.parent == os.getppid()
    assert procfs.fields()["Pid"] == str(os.getpid())
    assert os.getpid() in procfs.processes()
    assert threading.get_native_id() in dict(procfs.named_threads())
    assert (procfs.resident_bytes(os.getpid()) or 0) > 1 << 20
    files = procfs.mapped_files()
    assert len(set(files)) == len(files)
    assert os.path.realpath(sys.executable) in files or any("libpython" in f for f in files)


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
def test_a_child_is_found_while_it_is_there() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        assert child.pid in procfs.children("thread-self") or not os.path.exists(
            "/proc/thread-self/children"
        )
        found = procfs.read_stat(child.pid)
        assert found is not None
        assert found.parent == os.getpid()
        assert procfs.states(child.pid) <= {"R", "S", "D"}
    assert procfs.read_stat(child.pid) is None
