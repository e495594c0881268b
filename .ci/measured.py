"""Measures which lines and branches every process of a virtual environment runs.

`.ci/run coverage` puts this file and a .pth file that imports it into the environment's packages.
coverage.py tells what a line or branch is, and reports. What runs is noted in memory that all the
processes share: so nothing is lost of one that is killed, forks, or becomes another program, and
no variable is needed, which tests clear and programs would see.

    python measured.py          write what was noted as coverage.py's data

Needs Python 3.14: there each branch is told once, and the tests take no longer.
Not covered: ``python -S``, and a process that may not read the folder.
"""

import mmap
import sys
from pathlib import Path
from types import SimpleNamespace

import coverage
from coverage.sysmon import SysMonitor

_ROOT = Path(sys.prefix).parent
_FILES = sorted(map(str, (_ROOT / "safepool").rglob("*.py")))
_TABLE = _ROOT / ".venv" / "coverage.table"
_SLOTS = 1 << 18
# Of a line's number, which is negative for a function that is left.
_BITS = 20
_ZERO = 1 << (_BITS - 1)


class _Arcs(set):
    """What was run of one file."""

    def __init__(self, number, slots):
        super().__init__()
        self._file = number
        self._slots = slots

    def add(self, arc):
        if arc in self:
            return
        super().add(arc)
        before, after = arc
        key = (self._file + 1 << _BITS | before + _ZERO) << _BITS | after + _ZERO
        place = key * 0x9E3779B97F4A7C15 >> 30
        # Looked at again when it is written: another process may have taken the slot.
        while (there := self._slots[place % _SLOTS]) != key:
            if there:
                place += 1
            else:
                self._slots[place % _SLOTS] = key


class _Data(dict):
    """What was run of each file. coverage.py gives each a set of its own, which is replaced."""

    def __init__(self, slots):
        super().__init__()
        self._slots = slots

    def __setitem__(self, name, _):
        super().__setitem__(name, _Arcs(_FILES.index(name), self._slots))


def _slots():
    with _TABLE.open("r+b") as file:
        # No descriptor stays: tests count them.
        return memoryview(mmap.mmap(file.fileno(), 8 * _SLOTS, trackfd=False)).cast("Q")


def _measure():
    ours = frozenset(_FILES)
    monitor = SysMonitor()
    monitor.data = _Data(_slots())
    monitor.trace_arcs = True
    monitor.should_trace = lambda name, _: SimpleNamespace(
        trace=name in ours, source_filename=name
    )
    monitor.should_trace_cache = {}
    monitor.lock_data = monitor.unlock_data = lambda: None
    monitor.start()


def _write():
    mask = (1 << _BITS) - 1
    arcs = {name: set() for name in _FILES}
    for key in filter(None, _slots()):
        before, after = (key >> _BITS & mask) - _ZERO, (key & mask) - _ZERO
        arcs[_FILES[(key >> 2 * _BITS) - 1]].add((before, after))
    data = coverage.CoverageData(str(_ROOT / ".venv" / "coverage.data"))
    data.erase()
    data.add_arcs(arcs)
    data.touch_files(_FILES)
    data.write()


if __name__ == "__main__":
    _write()
else:
    try:
        if not _TABLE.exists():
            _TABLE.write_bytes(bytes(8 * _SLOTS))
        _measure()
    except OSError:
        pass  # another user's process, or one that sees other files
