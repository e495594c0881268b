"""Source of the program's ``__main__`` in workers: decided once for each pool, in the program.

    run      the fork server runs the script once, as ``__mp_main__``, as the standard library's
             ``spawn`` and ``forkserver`` do; every worker is a fork of that. Functions and classes
             travel by name (``transport.main_names``).
    value    nothing is run; functions and classes travel by value.

A script is run if it declares that it can be imported, by ``if __name__ == "__main__":`` at its
top level. A script without such a guard would repeat its work, or request the next pool.

Source: Python, Lib/multiprocessing/spawn.py, ``get_preparation_data``.

Not covered:
    * A guard that does not contain ``__name__``, such as a comparison by a function of the script:
      pass ``main="run"``.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib.util
import io
import os
import sys
import types
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, Literal, NamedTuple

from safepool.transport.marks import alias_main, main_space, use_space

MAINS = ("auto", "run", "value")
"""What the argument ``main=`` of a pool may be."""

# Programs that bring their own ``__main__`` and run the user's code in modules: to run it again
# gives workers nothing.
_RUNNERS = frozenset({"ipykernel_launcher", "ipython", "ipython3", "jupyter", "py.test", "pytest"})


class ScriptLostError(OSError):
    """The script was run for a pool, and later workers do not have its results."""


class ScriptFailedError(RuntimeError):
    """The script's own code fails when it is run again. The cause is its exception, if any."""


class MainPlan(NamedTuple):
    """Way of ``__main__`` into the workers of one pool, and the reason.

    Attributes:
        mode: ``"run"`` or ``"value"``.
        name: The module that is run, as for ``python -m``; ``""`` if it is a file.
        path: The file that is run; ``""`` if it is a module.
        argv: ``sys.argv`` during the run. Plans with different ones are different.
        because: The reason, for a person.
        lines: The lines of the source that a guard keeps from being run, from first to last.
    """

    mode: Literal["run", "value"]
    because: str
    name: str = ""
    path: str = ""
    argv: tuple[str, ...] = ()
    lines: tuple[tuple[int, int], ...] = ()

    @property
    def key(self) -> tuple[str, ...]:
        """Key that tells servers apart: a server that ran a script serves only this script."""
        return () if self.mode == "value" else (self.name, self.path, *self.argv)

    def without(self, because: str) -> MainPlan:
        """Return the plan that sends everything by value instead."""
        return MainPlan(mode="value", because=because)

    def asked_at_top_level(self, frame: FrameType | None) -> int:
        """Return the line of the script's top level, outside of a guard, that is being run, or 0.

        Run in the server, that line would ask for a pool again. The frame is that of the caller.
        """
        names = main_space()
        while frame is not None:
            if frame.f_code.co_name == "<module>" and frame.f_globals is names:
                line = frame.f_lineno
                return 0 if any(first <= line <= last for first, last in self.lines) else line
            frame = frame.f_back
        return 0


def plan_main(wanted: str) -> MainPlan:
    """Choose the source of ``__main__`` for workers that are forked from a fork server.

    Example:
        >>> plan_main("value").because
        'main="value"'
    """
    if wanted not in MAINS:
        raise ValueError(f'main must be "auto", "run" or "value", not {wanted!r}')
    find_space()
    if wanted == "value":
        return MainPlan(mode="value", because='main="value"')
    name, path, why_not = _find_script()
    if why_not and wanted == "run":
        raise ValueError(
            f'main="run" runs the program\'s script in the fork server, but {why_not}. '
            'Leave main= out, or pass main="value"'
        )
    if why_not:
        return MainPlan(mode="value", because=why_not)
    what = name or path
    source = _source_of(name, path)
    lines = () if source is None else guarded_lines(source)
    if wanted == "run":
        because = 'main="run"'
    elif lines:
        because = f"{what} has a guard in line {lines[0][0]}"
    else:
        return MainPlan(mode="value", because=f'{what} has no if __name__ == "__main__":')
    alias_main()  # results say that their classes are of __mp_main__
    return MainPlan(
        mode="run",
        name=name,
        path=path,
        argv=tuple(map(str, sys.argv)),
        because=because,
        lines=lines,
    )


def _find_script() -> tuple[str, str, str]:  # noqa: PLR0911 -- one for each reason
    """Return the module's name or the file's path, or the reason for having neither."""
    if hasattr(sys, "ps1") or "get_ipython" in vars(builtins):
        return "", "", "the program is a prompt or a notebook"
    space = main_space()
    spec: Any = space.get("__spec__")
    if spec is not None and getattr(spec, "loader", None) is not None:
        top = spec.name.partition(".")[0]
        if top in _RUNNERS or top in sys.stdlib_module_names:
            return "", "", f"__main__ is {spec.name}, which is not the program's own"
        return spec.name, "", ""
    path = space.get("__file__")
    if not isinstance(path, str):
        return "", "", "there is no script: the program was given by -c or standard input"
    from multiprocessing import process  # noqa: PLC0415 -- a pool's start, not our import

    folder: str | None = getattr(process, "ORIGINAL_DIR", None)
    if not os.path.isabs(path) and folder is not None:
        path = os.path.join(folder, path)
    path = os.path.normpath(path)
    if not os.path.isfile(path):
        return "", "", f"its script {path} is not a file"
    if os.path.splitext(os.path.basename(path))[0] in _RUNNERS:
        return "", "", f"__main__ is {path}, which is not the program's own"
    return "", path, ""


def find_space() -> None:
    """Find out whether the program's top level has other globals than ``__main__``.

    ``python -m cProfile`` before Python 3.12, for one. Then ``__main__`` does not have the
    script's objects under their names.
    """
    main = sys.modules["__main__"]
    if main.__name__ == "__mp_main__":
        # A child by spawn or forkserver, whose first frame is the standard library's. Such a child
        # has run the script by ``runpy``, and the module has a copy of the result.
        for value in [*vars(main).values()]:
            if isinstance(value, types.FunctionType) and value.__module__ == "__mp_main__":
                space = value.__globals__
                if space.get("__name__") == "__mp_main__":
                    use_space(space)
                    return
        return
    if getattr(main, "__loader__", None) is None:
        # No interpreter has started with this module. A worker or a notebook has put it there
        # while its launcher is still the first frame.
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "__main__":
            use_space(frame.f_globals)
            return
        frame = frame.f_back


@functools.lru_cache(maxsize=8)  # the file may be changed while the program runs
def _source_of(name: str, path: str) -> str | None:
    """Return the text of a script; ``None`` where there is none (a ``.pyc``, an extension)."""
    try:
        if name:
            spec: Any = main_space()["__spec__"]
            source: str | None = spec.loader.get_source(name)
            return source
        with io.open_code(path) as file:
            data = file.read()
        if data[:4] == importlib.util.MAGIC_NUMBER:
            return None
        return importlib.util.decode_source(data)
    except (AttributeError, ImportError, OSError, SyntaxError, UnicodeDecodeError):
        return None


@functools.lru_cache(maxsize=8)
def guarded_lines(source: str) -> tuple[tuple[int, int], ...]:
    r"""Return first and last line of each statement that asks whether a script is run or imported.

    Functions, classes and values that are computed from ``__name__`` do not count.

    Example:
        >>> guarded_lines('import os\nif "__main__" == __name__ and os.name:\n    print()')
        ((2, 3),)
        >>> guarded_lines('log = "me" if __name__ == "__main__" else __name__')
        ()
    """
    if "__name__" not in source and "MainProcess" not in source:
        return ()
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()
    return tuple((found.lineno, found.end_lineno or found.lineno) for found in _guards(body))


def _guards(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        match statement:
            case ast.If(test=test) if asks_for_name(test):
                yield statement
            case ast.Match(subject=subject) if _is_name(subject):
                yield statement
            case ast.Expr(value=ast.BoolOp(values=[first, *_])) if asks_for_name(first):
                yield statement
            case ast.Expr(value=ast.IfExp(test=test)) if asks_for_name(test):
                yield statement
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                pass
            case _:
                yield from _guards(_inner(statement))


def _inner(statement: ast.stmt) -> Iterator[ast.stmt]:
    """Yield the statements inside of a compound one, in ``except`` clauses too."""
    for part in ast.iter_child_nodes(statement):
        if isinstance(part, ast.stmt):
            yield part
        elif isinstance(part, (ast.ExceptHandler, ast.match_case)):
            yield from part.body


def asks_for_name(test: ast.expr) -> bool:
    """Tell whether an expression compares ``__name__`` with ``"__main__"``.

    Or the name of the process with ``"MainProcess"``, which is that of no child either.
    """
    for node in ast.walk(test):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(map(_is_name, sides)) and any(_is_text(side, "__main__") for side in sides):
                return True
            if any(_is_text(side, "MainProcess") for side in sides):
                return True
    return False


def _is_name(side: ast.expr) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "__name__" for node in ast.walk(side))


def _is_text(side: ast.expr, text: str) -> bool:
    return any(isinstance(node, ast.Constant) and node.value == text for node in ast.walk(side))
