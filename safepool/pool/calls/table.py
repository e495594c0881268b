"""Knowledge about the script's names at one time. ``closures`` finds it out."""

from __future__ import annotations

import ast
import functools
import itertools
import sys
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from safepool.pool.calls.known import BY_CONTENT
from safepool.transport.held import absolute, sources_of
from safepool.transport.marks import main_space
from safepool.workers.plan import asks_for_name

if TYPE_CHECKING:
    from safepool.pool.calls.deliveries import Delivery, Needs
    from safepool.pool.calls.known import Known
    from safepool.transport.additions import Addition
    from safepool.transport.main_names import MainNames


class Added(NamedTuple):
    """Objects that the script has put into modules. A worker makes each once, by its number."""

    what: tuple[Addition, ...]
    numbers: dict[tuple[Any, ...], int]
    names: frozenset[str]
    delivery: Delivery


@dataclass(slots=True, eq=False, repr=False)
class Closure:
    """All that some names lead to, and the number of the table in which all this was last."""

    known: list[Known]
    absent: frozenset[str]
    beside: tuple[Delivery, ...]
    deliveries: Needs
    seen_in: int = 0


def imports_of_script() -> list[str]:
    """Return the imports of the script as it is now: a worker repeats them for what they do.

    Read from its source, where there is one (a file, ``-c``, the cells of a notebook), or from
    what its namespace holds. Those inside of functions, and under ``if __name__ == "__main__":``,
    are not covered.
    """
    sources = list(sources_of(main_space()))
    modules: list[str] = []
    for source in sources:
        try:
            statements = _imports(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue  # a cell with the notebook's own commands
        for statement in statements:
            modules += _modules_of(statement)
    if not sources:
        modules = [
            value.__name__
            for value in list(main_space().values())
            if type(value) is types.ModuleType and value.__name__ in sys.modules
        ]
    return [name for name in dict.fromkeys(modules) if name not in ("__main__", "__future__")]


def _modules_of(statement: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names if alias.name in sys.modules]
    module = absolute(statement.module or "", statement.level, main_space())
    if module not in sys.modules:
        return []
    below = (f"{module}.{alias.name}" for alias in statement.names)
    return [module, *(n for n in below if issubclass(type(sys.modules.get(n)), types.ModuleType))]


@functools.lru_cache(maxsize=1024)  # each pool looks at the same script
def _imports(source: str) -> list[ast.Import | ast.ImportFrom]:
    found: list[ast.Import | ast.ImportFrom] = []
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(node)
        elif not isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.expr)
        ) and not (isinstance(node, ast.If) and asks_for_name(node.test)):
            todo += reversed([*ast.iter_child_nodes(node)])
    return found


_numbers = itertools.count(1)


class Table:
    """Knowledge about the names.

    A thread changes its own draft only; a published table is immutable.

    Args:
        main: Names that workers have because they run the script; ``None`` if no worker runs it.

    Attributes:
        made: The entries of ``known`` that are new since the previous table.
        first: Versions in which names were pickled first.
        there: Versions of names that a worker has by itself after running the script.
        slow: Values that took too long to pickle, kept for a later request.
        beside: Deliveries that accompany any names: the imports, and objects without a name.
        added: The last delivery; ``None`` without one.
        look_at: Number of the script's names at the last look.
        heir: The table that was published after this one, by the key 0.
    """

    def __init__(self, main: MainNames | None = None) -> None:
        self.main = main
        self.number: int = next(_numbers)
        self._learned = 0 if main is None else main.learned
        self.known: dict[str, Known] = {}
        self.made: list[Known] = []
        self.first: dict[str, int] = {}
        self.there: dict[str, int] = {}
        self.slow: dict[str, object] = {}
        self.imports: list[str] | None = None
        self.beside: tuple[Delivery, ...] = ()
        self.added: Added | None = None
        self.look_at: int = -1
        self.heir: dict[int, Table] = {}

    def draft(self) -> Table:
        """Return a copy; an empty one if workers have other objects of the script by now."""
        new = Table(self.main)
        new.slow = self.slow
        if new._learned == self._learned:
            new.known, new.first, new.there = {**self.known}, {**self.first}, {**self.there}
            new._take_beside(self)
        return new

    def _take_beside(self, other: Table) -> None:
        self.imports, self.beside = other.imports, other.beside
        self.added, self.look_at = other.added, other.look_at

    def on(self, after: Table, base: Table) -> tuple[Table, bool]:
        """Return a draft with this one's new entries on top of another table."""
        new = after.draft()
        if new._learned != self._learned:
            return new, False
        known = [
            one
            for one in self.made
            if all(after.known.get(name) is base.known.get(name) for name in one.names)
        ]
        for one in known:
            new.keep(one)
        whole = len(known) == len(self.made)
        if self.beside is not base.beside:
            whole = whole and after.beside is base.beside
            if after.beside is base.beside:
                new._take_beside(self)
        return new, whole

    def keep(self, known: Known) -> None:
        """Make names known."""
        version = known.delivery.version
        self.made.append(known)
        for name in known.names:
            self.known[name] = known
            self.first.setdefault(name, version)
            if not known.delivery.segments:
                self.there[name] = version

    def is_fresh(self, closure: Closure, *, here: bool = False) -> bool:
        """Tell whether that is what names lead to now; ``False`` if in doubt."""
        space, main = main_space(), self.main
        if len(space) != self.look_at or not closure.absent.isdisjoint(space):
            return False
        if main is not None and main.learned != self._learned and main:
            return False
        if closure.seen_in != self.number and not self._holds(closure):
            return False
        closure.seen_in = self.number
        for known in closure.known:
            by_identity = known.plain is not BY_CONTENT
            if not (known.is_still(space) if by_identity else self.is_unchanged(known, here=here)):
                return False
        return True

    def _holds(self, closure: Closure) -> bool:
        present = self.known
        return closure.beside is self.beside and all(
            present.get(known.names[0]) is known for known in closure.known
        )

    def is_unchanged(self, known: Known, *, here: bool = False) -> bool:
        """Return whether names have the values that were pickled; ``False`` if in doubt."""
        if known.plain is not BY_CONTENT:
            return known.is_still(main_space())
        refs = known.refs
        return (not refs or known.stamp == self.stamp(refs)) and known.is_unchanged(here=here)

    def stamp(self, refs: frozenset[str]) -> tuple[int, ...]:
        """Return the versions of the objects that these names hold."""
        return tuple(self.born(name) for name in sorted(refs))

    def born(self, name: str) -> int:
        """Return the version with which the object that a name holds was delivered first."""
        known = self.known.get(name)
        return 0 if known is None else known.delivery.born[known.names.index(name)]
