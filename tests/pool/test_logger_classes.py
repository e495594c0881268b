"""Libraries that make loggers of their own, imported in a worker after the program set levels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import support_natives as natives

if TYPE_CHECKING:
    from pathlib import Path

METHODS = ["safepool", "loky", "spawn", "fork"]

# astropy.logger, 7.0: _init_log(); sunpy, photutils and ccdproc do the same.
ASTROPY = """
import logging
class OwnLogger(logging.Logger):
    def _set_defaults(self):
        self.setLevel(logging.INFO)
        self.addHandler(logging.NullHandler())
before = logging.getLoggerClass()
logging.setLoggerClass(OwnLogger)
log = logging.getLogger("library")
log._set_defaults()
logging.setLoggerClass(before)
"""

# absl.logging, 2.1: _initialize().
ABSL = """
import logging
class OwnLogger(logging.getLoggerClass()):
    pass
before = logging.getLoggerClass()
logging.setLoggerClass(OwnLogger)
log = logging.getLogger("library")
logging.setLoggerClass(before)
"""

OF_THE_MANAGER = """
import logging
class OwnLogger(logging.Logger):
    pass
logging.Logger.manager.setLoggerClass(OwnLogger)
log = logging.getLogger("library")
logging.Logger.manager.loggerClass = None
"""

WITH_A_LEVEL = """
import logging
class OwnLogger(logging.Logger):
    def __init__(self, name, level=logging.ERROR):
        super().__init__(name, level)
        self.setLevel(logging.INFO)
logging.setLoggerClass(OwnLogger)
log = logging.getLogger("library")
logging.setLoggerClass(logging.Logger)
"""

CHILD_FIRST = """
import logging
child = logging.getLogger("library.part")
class OwnLogger(logging.Logger):
    pass
logging.setLoggerClass(OwnLogger)
log = logging.getLogger("library")
logging.setLoggerClass(logging.Logger)
assert child.parent is log
"""

LIBRARIES = {
    "astropy's way": ASTROPY,
    "absl's way": ABSL,
    "a class of the manager": OF_THE_MANAGER,
    "a class with a level": WITH_A_LEVEL,
    "a child is made first": CHILD_FIRST,
}

PROGRAM = """
import json, logging, sys, warnings
from importlib import import_module
import safepool

METHOD, *NAMES = sys.argv[1:]

def look(name):
    library = import_module(name)
    log = logging.getLogger(name)
    assert log is library.log
    return [type(log).__name__, log.level, logging.getLogger(f"{name}.x").getEffectiveLevel()]

def change(name):
    logging.getLogger(name).setLevel(logging.CRITICAL)

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    libraries = {name: import_module(name) for name in NAMES}
    found = {name: [] for name in NAMES}
    for level in (logging.DEBUG, logging.ERROR):
        for library in libraries.values():
            library.log.setLevel(level)
        with safepool.ProcessPool(1, mp_context=METHOD) as pool:
            for name in NAMES:
                found[name] += pool.map(look, [name])
                pool.submit(change, name).result(60)
                found[name] += pool.map(look, [name])
    print(json.dumps(found))
"""


@pytest.mark.parametrize("method", METHODS)
def test_libraries_make_their_own_loggers_in_a_worker(method: str, tmp_path: Path) -> None:
    """They have the library's class, and the level that the program has set or the task has."""
    names = {f"library_{number}": way for number, way in enumerate(LIBRARIES)}
    for name, way in names.items():
        text = LIBRARIES[way].replace('"library', f'"{name}')
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")

    found = natives.run(PROGRAM, cpus=None, folder=tmp_path, arguments=(method, *names))

    expected = [["OwnLogger", level, level] for level in (10, 50, 40, 50)]
    assert {names[name]: one for name, one in found.items()} == dict.fromkeys(LIBRARIES, expected)


NOBODY_MAKES = """
import json, logging, sys
import safepool

def look(name):
    log = logging.getLogger(name)
    return [log.getEffectiveLevel(), log.isEnabledFor(logging.INFO)]

def names(_):
    return sorted(name for name in logging.root.manager.loggerDict if name.startswith("an"))

if __name__ == "__main__":
    logging.getLogger("an.application").setLevel(logging.DEBUG)
    logging.getLogger("an.application.part.of").setLevel(logging.ERROR)
    asked = ["an.application.part", "an.application.part.of.it", "an"]
    with safepool.ProcessPool(1, mp_context=sys.argv[1]) as pool:
        print(json.dumps([*pool.map(look, asked), pool.submit(names, 0).result(60)]))
"""


@pytest.mark.parametrize("method", METHODS[:3])
def test_a_level_holds_below_a_logger_that_nobody_makes(method: str, tmp_path: Path) -> None:
    found = natives.run(NOBODY_MAKES, cpus=None, folder=tmp_path, arguments=(method,))
    *levels, made = found

    assert levels == [[10, True], [40, False], [30, False]]
    assert made == [
        "an",
        "an.application",  # place holders
        "an.application.part",
        "an.application.part.of",
        "an.application.part.of.it",
    ]
