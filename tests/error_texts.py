"""The table of all texts that the package raises, warns of, logs, or puts beside an error.

    python tests/error_texts.py     # writes tests/error_texts.md anew

The texts are read from the source, so that none can be forgotten, and stand side by side, so that
a person can compare them. A braced word is a value. ``tests/test_error_texts_table.py`` fails if
the file is stale, or if a row does not say what its reader shall do: a sentence of the text itself
says so (:data:`REMEDY`), or the row of its class in :data:`BY_KIND`, or of its text in
:data:`BY_TEXT`.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "tests" / "error_texts.md"

LEVELS = ("debug", "info", "warning", "error", "exception", "critical")

# A sentence, or what follows a colon, that begins so tells the reader what to do.
REMEDY = re.compile(
    r"(?:[.:;] |, or )(?P<remedy>(?:allow|call|choose|close|correct|do not|end|fewer|give|hand|"
    r"install|keep|leave|let|make|mount|move|name|pass|raise|remove|report|run|see|send|set|start|"
    r"supply|take|to have|use|wait|write)\b.*)",
    re.IGNORECASE,
)

# By the class of an error, or the kind of a text: what its reader shall do.
BY_KIND = {
    "ArgumentTypeError": "Correct the option; the text names what it takes",
    "AttributeError": "Correct the name",
    "CancelledError": "Nothing: the program itself ended the pool",
    "CannotForkError": "A reason in a warning: each worker is a fresh interpreter, nothing to do",
    "CannotRunError": "A reason in a warning, which says what to move or to pass",
    "ChannelClosedError": "Internal: the pool replaces the worker and fails its call",
    "ConnectionError": "Internal: the worker ends",
    "CorruptFrameError": "Internal: the pool kills the worker and fails its call. Report it",
    "EngineGoneError": "Start the engine again, then make a new ClusterPool",
    "ImportError": "Internal: the worker reports it as the reason why the script cannot be run",
    "InterruptedError": "Internal: the pool is being shut down",
    "InvalidStateError": "Set results only on futures that you made",
    "LookupError": "Pass the object as an argument of a call",
    "MissingExtraError": "Run the command",
    "NameError": "Define the name before the call is submitted",
    "NoGroupError": "A reason in the demo's output: it goes on under the limits there are",
    "OSError": "Close descriptors or threads, or raise their limit (ulimit -n, -u)",
    "PlotError": "Choose another file",
    "PretendError": "Leave --pretend-host-cpus out",
    "ProcessLookupError": "Correct the process id",
    "ReportError": "Pass the file of a trace= that was closed",
    "RunError": "Correct the command after --",
    "ScreenError": "Leave --pid and --watch out",
    "PlaceLostError": "Internal: the calls that the node had are lost as with a lost node",
    "SessionLostError": "Internal: the calls that the node had are lost as with a lost node",
    "TopError": "Nothing: other systems do not tell about processes",
    "TraceFileError": "Choose another file",
    "TypeError, ValueError of an argument": "Pass what the text says after 'must be'",
    "UnreadableLimitError": "Pass max_workers=",
    "log critical": "Report it with the traceback",
    "log debug": "Nothing: for information",
    "log exception": "Report it with the traceback, unless the program's own code raised it",
    "log info": "Nothing: for information",
    "note": "Correct what the note names",
    "reason of NoInterpreterError": "Give multiprocessing.set_executable() an interpreter",
    "reason of a skipped limit": "Correct the variable or file, or unset it",
    "str of DoctorError": "Ask for fewer libraries; the output says how the import ended",
    "str of NodeLostError": "Pass retries= to run such calls again on another node",
    "str of PlotError": "Choose another file",
    "str of PretendError": "The reason says it",
    "str of RemoteTaskError": "Define the exception's class at the top level of a module",
    "str of WorkerDiedError": "See the signal, exit code and stack; pass retries= to run it again",
    "usage": "Correct the command line; --help lists it",
}

_PROTOCOL = "Internal: the pool kills the worker that sent it and fails its call. Report it"
_STANDARD = "The standard library's own text, which programs compare: "

# By a part of the text, where it is not ours to word, or its values say what to do.
BY_TEXT = {
    "Chunksize must be 1+": f"{_STANDARD}pass a positive chunksize",
    "must be": "Pass what the text says after 'must be'",
    "{hint}": "Correct the name as the hint says",
    "() takes no {name}=": "Leave it out",
    "{remedy}": "Do what the remedy of the runtime's row says",
    "pool objects cannot be passed": f"{_STANDARD}make the pool where it is used",
    "A process in the process pool was terminated abruptly": f"{_STANDARD}make a new pool",
    "after interpreter shutdown": f"{_STANDARD}submit before the program ends",
    "after shutdown": f"{_STANDARD}submit before the pool is shut down",
    "generator raised StopIteration": f"{_STANDARD}correct the iterator of the items",
    "task raised": f"{_STANDARD}correct the function",
    "Pool is still running": f"{_STANDARD}call close() or terminate() first",
    "Pool not running": f"{_STANDARD}call it before close() and terminate()",
    "not ready": f"{_STANDARD}wait for the result first",
    "cannot pickle 'itertools.count'": f"{_STANDARD}send something else",
    "n_jobs == 0": "joblib's own text: pass another number",
    "cannot start a worker": "Remove the cause that the text names, then make a new pool",
    "the initializer cannot be pickled": "Pass an initializer= and initargs= that can be pickled",
    "the initializer raised": "Correct the initializer; the cause of the error is its exception",
    "died before they ran a task": "See how the last one ended; run the initializer by hand",
    "another thread waits for the next result": "Take results of one map() in one thread",
    "the script cannot be run in this worker": "Correct the script's top level as the text says",
    "cannot be run there again": "Internal: the functions travel by value instead",
    "no called function uses the name": "Pass the object as an argument",
    "no CPUs to choose": "Internal: threads are fewer than CPUs. Report it",
    "resize(): ": "Nothing: for information",
    "is not preloaded": "Nothing: workers import it themselves. Leave it out of preload=",
    "could not be preloaded": "Nothing: workers import it themselves. Correct preload=",
    "nothing is preloaded": "Import the module that starts threads in the initializer",
    "protocol error": "Report it with the text",
    "cannot be ended": "See whether a disk or a network mount has stopped",
    "cannot start another worker": "Free the resource that the text names",
    "is not enforced": "Nothing: the worker goes on without the limit",
    "the node ends its calls": "Nothing: its program has ended, or the network has",
    "is not used": "Correct the node as the reason says",
    "it has not answered for": "See whether the node is overloaded, or its network slow",
    "cannot read the workers of node": "Nothing: the others are listed",
    "second hard link": "Choose another folder for the file",
    "in its path belongs to user": "Choose another folder for the file",
    "symbolic links": "A reason of a skipped limit: correct the links on the way to the file",
    "workers on Windows have no board": "Internal: the pool asks for no board there. Report it",
    "the program cancelled the call": "Nothing: the program itself cancelled the call",
    "has ended meanwhile": "Pass the id of a running process",
    "the trace %s is incomplete": "Free space on the disk of the trace, or choose another file",
    "no fork server can be used": "Nothing, or remove the cause that the text names",
    "binds no worker to CPUs": "Leave pin_workers= out",
    "is ignored: {reason}": "Correct the variable, or unset it",
}

# By the module, where all errors are one kind.
BY_MODULE = {
    "safepool/pool/core/": _PROTOCOL,
    "safepool/workers/board.py": _PROTOCOL,
    "safepool/workers/runner.py": "Internal: the worker ends. Report it",
    "safepool/transport/held.py": "Internal: the object is sent in another way",
    "safepool/cli/report.py": "Internal: told as a ReportError",
    "benchmarks/host/groups.py": "End those processes, then run the command that the error shows",
}


@dataclass(frozen=True, slots=True, order=True)
class Row:
    """One text.

    Attributes:
        kind: Class of the error, or ``log warning``, ``warning``, ``note``, ``reason``.
        text: The text, with each value as a braced word.
        module: The module whose source has it.
    """

    kind: str
    text: str
    module: str

    @property
    def remedy(self) -> str:
        """What the reader shall do, empty if nobody says so."""
        if own := REMEDY.search(self.text):
            return own["remedy"]
        told = [BY_TEXT[part] for part in BY_TEXT if part in self.text]
        told += [BY_KIND[self.kind]] if self.kind in BY_KIND else []
        told += [BY_MODULE[place] for place in BY_MODULE if self.module.startswith(place)]
        return next(iter(told), "")


@functools.cache
def rows() -> list[Row]:
    """List each text once, in the order of the table."""
    folders = (ROOT / "safepool", ROOT / "benchmarks" / "host")
    paths = sorted(path for folder in folders for path in folder.rglob("*.py"))
    found = {row for path in paths for row in _rows_of(path)}
    return sorted(found | set(_arguments()))


def constants(name: str) -> list[str]:
    """Return all text of a module of the package: what is put together of it is in no row."""
    tree = ast.parse((ROOT / "safepool" / name).read_text(encoding="utf-8"))
    return [str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)]


def table() -> str:
    """Return the table, as the file has it."""
    lines = ["# Every text of an error, a warning, a note and the log", ""]
    lines += ["Written by `python tests/error_texts.py`. A braced word is a value.", ""]
    kind = ""
    for row in rows():
        if row.kind != kind:
            kind = row.kind
            lines += [f"## {kind}", ""]
        lines += [f"* {row.text!r}  ", f"  {row.module}: **{row.remedy or '?'}**"]
    return "\n".join(lines).replace("\n## ", "\n\n## ") + "\n"


def _arguments() -> Iterator[Row]:
    """Yield what a wrong argument is told, which is a table already."""
    from safepool import arguments

    for name, rule in arguments.RULES.items():
        text = f"{name} must be {rule.kind}, not {{value}}. {rule.remedy}"
        yield Row("TypeError, ValueError of an argument", text, "safepool/arguments.py")


def _rows_of(path: Path) -> Iterator[Row]:
    source = _Source(ast.parse(path.read_text(encoding="utf-8")))
    module = path.relative_to(ROOT).as_posix()
    for kind, text in source.texts():
        if re.search(r"[a-z]{2}", re.sub(r"\{[^}]*\}", "", text)):
            yield Row(kind, " ".join(text.split()), module)


class _Source:
    """The texts of one module."""

    def __init__(self, tree: ast.Module) -> None:
        self._tree = tree
        self._scopes: list[dict[str, list[ast.expr]]] = [_assigned(tree)]

    def texts(self) -> Iterator[tuple[str, str]]:
        yield from self._below(self._tree, "")

    def _below(self, node: ast.AST, inside: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self._scopes.append(_assigned(child))
                if child.name == "__str__" and inside:
                    for each in ast.walk(child):
                        if isinstance(each, ast.Return) and each.value is not None:
                            yield from (
                                (f"str of {inside}", text) for text in self._of(each.value)
                            )
                yield from self._below(child, inside)
                self._scopes.pop()
                continue
            if isinstance(child, ast.Call):
                for kind, argument in _asked(child):
                    yield from ((kind, text) for text in self._of(argument))
            yield from self._below(
                child, child.name if isinstance(child, ast.ClassDef) else inside
            )

    def _of(self, node: ast.expr, depth: int = 0) -> list[str]:  # noqa: C901, PLR0911 -- a table
        """Return what an expression may say."""
        if isinstance(node, ast.Constant):
            return [str(node.value)]
        if isinstance(node, ast.JoinedStr):
            parts = [
                self._of(each.value, depth)
                if isinstance(each, ast.FormattedValue)
                else [str(each.value)]
                for each in node.values
                if isinstance(each, (ast.FormattedValue, ast.Constant))
            ]
            return _joined(parts)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return _joined([self._of(node.left, depth), self._of(node.right, depth)])
        if isinstance(node, ast.IfExp):
            return [*self._of(node.body, depth), *self._of(node.orelse, depth)]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "printable":
            return self._of(node.args[0], depth)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("_.format"):
            return [f"{{{_short(node)}}}"]
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "format"
        ):
            return self._of(node.func.value, depth)
        if isinstance(node, ast.Name) and depth < 3:
            for scope in reversed(self._scopes):
                known = [each for each in scope.get(node.id, []) if _is_text(each)]
                if known:
                    return [text for each in known for text in self._of(each, depth + 1)]
        return [f"{{{_short(node)}}}"]


def _joined(parts: list[list[str]]) -> list[str]:
    """Return each combination, as long as there are few of them."""
    if len([part for part in parts if len(part) > 1]) > 2:
        parts = [part if len(part) == 1 else ["{...}"] for part in parts]
    return ["".join(one) for one in product(*parts)]


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str)
    if isinstance(node, ast.IfExp):
        return _is_text(node.body) and _is_text(node.orelse)
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Add) and (_is_text(node.left) or _is_text(node.right))
    return isinstance(node, ast.JoinedStr)


def _assigned(scope: ast.AST) -> dict[str, list[ast.expr]]:
    """Return the expressions that names get directly in a module or a function."""
    found: dict[str, list[ast.expr]] = {}
    waiting = list(ast.iter_child_nodes(scope))
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
        waiting += ast.iter_child_nodes(node)
    return found


def _short(node: ast.expr) -> str:
    """Return a word for a value: the last name in the expression of it."""
    if isinstance(node, ast.Call) and node.args and not isinstance(node.args[0], ast.GeneratorExp):
        return _short(node.args[0])
    names = re.findall(r"[A-Za-z_]\w*", ast.unparse(node))
    if isinstance(node, (ast.Name, ast.Attribute)):
        return str(names[-1]).lstrip("_")
    return "..."


# By the last name of a call: the kind of its text, and which argument says it.
_SINKS = {
    "tell_once": ("warning", 0),
    "warn": ("warning", 0),
    "_log_once": ("log warning", 0),
    "log_once": ("log info", 0),
    "log": ("log", 1),
    "add_note": ("note", 0),
    "GiveUp": ("PoolBrokenError", 0),
    "no_interpreter": ("reason of NoInterpreterError", 0),
}


_CLASSES = ("Error", "Exception", "Skipped")


def _asked(call: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    """Yield kind and text of what a call raises, warns of or logs."""
    last = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if isinstance(call.func, ast.IfExp) and "Error" in (name := ast.unparse(call.func)):
        yield from ((name, each) for each in call.args)
    if last not in _SINKS and last not in LEVELS and not last.endswith(_CLASSES):
        return
    name = ast.unparse(call.func)
    if last.endswith(_CLASSES[:2]):
        yield from ((last, each) for each in call.args if not isinstance(each, ast.Starred))
    elif last == "Skipped":
        reasons = [each.value for each in call.keywords if each.arg == "reason"]
        yield from (("reason of a skipped limit", reason) for reason in reasons)
    elif last in LEVELS and "log" in name.lower():
        yield f"log {last}", call.args[0]
    elif name.endswith(("parser.error", "asked.error")):
        yield "usage", call.args[0]
    elif last in _SINKS and len(call.args) > _SINKS[last][1] and "math" not in name:
        kind, place = _SINKS[last]
        yield kind, call.args[place]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    TABLE.write_text(table(), encoding="utf-8")
    missing = [row for row in rows() if not row.remedy]
    print(f"{TABLE.relative_to(ROOT)}: {len(rows())} texts, {len(missing)} without a remedy")
