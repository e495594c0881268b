"""Imports of the script: a worker repeats them for what an import does.

Read from its source, where there is one (a file, ``-c``, the cells of a notebook), or from
what its namespace holds.

Not covered:
    * Imports inside of functions, and under ``if __name__ == "__main__":``.
"""

from __future__ import annotations

import ast
import functools
import sys
import types

from safepool.transport.held import absolute, sources_of
from safepool.transport.marks import main_space
from safepool.workers.plan import asks_for_name


class Imports:
    """The imports of the script as it is now."""

    def __init__(self) -> None:
        self.modules: list[str] = []
        sources = list(sources_of(main_space()))
        for source in sources:
            try:
                statements = _imports(source)
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue  # a cell with the notebook's own commands
            for statement in statements:
                self._take(statement)
        if not sources:
            self.modules = [
                value.__name__
                for value in list(main_space().values())
                if type(value) is types.ModuleType and value.__name__ in sys.modules
            ]
        own = {"__main__", "__future__"}
        self.modules = [name for name in dict.fromkeys(self.modules) if name not in own]

    def _take(self, statement: ast.Import | ast.ImportFrom) -> None:
        if isinstance(statement, ast.Import):
            self.modules += [alias.name for alias in statement.names if alias.name in sys.modules]
            return
        module = absolute(statement.module or "", statement.level, main_space())
        if module not in sys.modules:
            return
        self.modules.append(module)
        for alias in statement.names:
            below = f"{module}.{alias.name}"
            if issubclass(type(sys.modules.get(below)), types.ModuleType):
                self.modules.append(below)


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
