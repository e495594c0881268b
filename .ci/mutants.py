"""Run tests against mutants of modules: the code with one small fault each, as mutmut makes them.

    python .ci/mutants.py RESULTS MODULE.py... -- TESTS AND OPTIONS OF PYTEST...

The tests are collected once. For each mutant a fork of this process gives its function the mutated
code and runs the tests that call the function, those first that have found most for their time,
until one fails. So a mutant that is killed takes a fifth of a second. There are two rounds: the
short tests, which take a quarter of the time of all, and then, for what survives them, all tests.

RESULTS gets a line of JSON for each test, with its time and the functions that it calls, and for
each mutant of a round, by the code of its function; a table of them is printed at the end. What it
has is not run again, but for survivors when the number of tests is another. Several runs at a time
share one RESULTS. Needs mutmut, and setup.cfg with its ``source_paths``.
"""

import ast
import difflib
import importlib
import itertools
import json
import os
import random
import resource
import sys
import textwrap
import time
import zlib
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol
from libcst import FunctionDef, Name
from mutmut.mutation import file_mutation
from mutmut.mutation.file_mutation import create_mutations, deep_replace

# Of a mutant that explores for ever: as a multiple of what the tests take of a processor; memory.
MOST = 3
LIMIT_BYTES = 3 << 30
# The short tests take this part of the time of all tests.
SHORT = 0.25


class Visitor(file_mutation.MutationVisitor):
    """Mutates properties as well: only mutmut's own way to run mutants cannot have them."""

    def _skip_node_and_children(self, node):
        if isinstance(node, FunctionDef) and len(node.decorators) == 1:
            decorator = node.decorators[0].decorator
            if isinstance(decorator, Name) and decorator.value == "property":
                return False
        return super()._skip_node_and_children(node)


file_mutation.MutationVisitor = Visitor


def checksum(text):
    """Return a checksum of a function without its comments and its documentation."""
    (function,) = ast.parse(textwrap.dedent(text)).body
    if ast.get_docstring(function) is not None:
        del function.body[0]
    return zlib.crc32(ast.dump(function).encode())


def mutants(files):
    """Yield for each mutant its name, file and function, the module, and what is to be mutated."""
    for file in files:
        module, found, _, _ = create_mutations(file, Path(file).read_text("utf-8"))
        counts, texts = {}, {}
        for mutation in found:
            function = mutation.contained_by_top_level_function
            if not isinstance(function, FunctionDef):
                continue
            name = function.name.value
            if function not in texts:
                texts[function] = checksum(module.code_for_node(function))
            counts[name] = counts.get(name, 0) + 1
            full_name = f"{file}:{name}:{texts[function]:08x}:{counts[name]}"
            yield full_name, file, name, module, mutation


def functions(names, module, prefix=""):
    """Yield the functions among the names of a module or class, with where they are."""
    for name, thing in [*names.items()]:
        if isinstance(thing, type) and thing.__module__ == module:
            yield from functions(vars(thing), module, f"{prefix}{name}.")
        function = getattr(thing, "fget", None) or getattr(thing, "__func__", thing)
        if hasattr(function, "__code__") and function.__module__ == module:
            yield prefix + name, function


def apply(file, text):
    """Give the functions of the imported module what those of the text have."""
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    names = {"__name__": module.__name__}
    exec(compile(text, file, "exec", dont_inherit=True), names)
    mutated = dict(functions(names, module.__name__))
    for name, function in functions(vars(module), module.__name__):
        other = mutated.get(name)
        if other is None:
            continue
        # What is the same stays: it may have a closure.
        for part in ("__code__", "__defaults__", "__kwdefaults__"):
            if getattr(function, part) != getattr(other, part):
                setattr(function, part, getattr(other, part))


class Mutants:
    """The plugin that runs mutants instead of tests."""

    def __init__(self, results, files):
        self._results = results
        self._files = files
        self._paths = {str(Path(file).resolve()) for file in files}
        # By the place of a test: seconds that it took, mutants that it has killed, and the names
        # of the functions that it calls.
        self._costs, self._kills, self._calls = {}, {}, {}

    def pytest_runtestloop(self, session):
        """Run what has no result yet."""
        items, found = session.items, [*mutants(self._files)]
        random.shuffle(found)
        self._measure(items)
        by_cost = sorted(self._costs, key=self._costs.get)
        total, short = sum(self._costs.values()), []
        for test in by_cost:
            total_s = sum(self._costs[one] for one in (*short, test))
            if total_s <= SHORT * total:
                short.append(test)
        for tests in (short, by_cost):
            for name, file, function, module, mutation in found:
                code, of = self._read("name").get(name, {"code": 0, "of": 0}).values()
                if code or of == len(tests):
                    continue
                node = deep_replace(module, mutation.original_node, mutation.mutated_node)
                apt = [test for test in tests if function in self._calls[test]]
                code, killer = self._run(items, apt, file, node.code)
                lines = module.code.splitlines(), node.code.splitlines()
                self._tell(
                    name=name,
                    code=code,
                    of=len(tests),
                    by=None if killer is None else items[killer].nodeid,
                    diff=[*difflib.unified_diff(*lines, lineterm="", n=0)],
                )
        self._show({name for name, *_ in found})
        return True

    def _measure(self, items):
        """Run the tests that have not been run without a mutant."""
        known = self._read("test")
        new = [place for place, item in enumerate(items) if item.nodeid not in known]
        if new and self._run(items, new)[0]:
            raise SystemExit("a test fails without a mutant")
        for place, item in enumerate(items):
            if item.nodeid in known:
                self._costs[place], self._calls[place] = known[item.nodeid].values()
            else:
                cost, calls = self._costs[place], self._calls[place]
                self._tell(test=item.nodeid, cost=cost, calls=calls)

    def _tell(self, **line):
        with self._results.open("a") as results:
            results.write(json.dumps(line) + "\n")

    def _read(self, kind):
        """Return the first two values of the last line of each test, or mutant, by its name."""
        lines = self._results.read_text().splitlines() if self._results.exists() else []
        told = [json.loads(line) for line in lines]
        return {
            one.pop(kind): dict(itertools.islice(one.items(), 2)) for one in told if kind in one
        }

    def _show(self, names):
        """Print for each module the mutants, the killed, and the survivors."""
        found = self._read("name")
        for file in self._files:
            codes = [found[name]["code"] for name in names if name.startswith(f"{file}:")]
            print(f"| `{file}` | {len(codes)} | {sum(map(bool, codes))} | {codes.count(0)} |")

    def _run(self, items, tests, file=None, text=None):
        """Return the exit code, 0 if the mutant survives, and the place of the test that fails."""
        order = sorted(
            tests, key=lambda one: self._costs.get(one, 0.01) / (self._kills.get(one, 0) + 0.3)
        )
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                if text is not None:
                    limit_s = 2 + int(MOST * sum(self._costs[one] for one in tests))
                    resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s + 5))
                    apply(file, text)
                resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
                for one in order:
                    called = set()
                    if text is None:
                        sys.settrace(lambda frame, *_, called=called: called.add(frame.f_code))
                    start = time.process_time()
                    failed = any(test.failed for test in runtestprotocol(items[one], log=False))
                    took = time.process_time() - start
                    sys.settrace(None)
                    names = {code.co_name for code in called if code.co_filename in self._paths}
                    told = json.dumps([one, took, failed, sorted(names)])
                    os.write(writing, f"{told}\n".encode())
                    if failed:
                        os._exit(1)
                os._exit(0)
            except BaseException:  # noqa: BLE001 -- of a mutant: it is told by the code
                os._exit(2)
        os.close(writing)
        killer = None
        with open(reading) as pipe:
            for line in pipe:
                one, took, failed, names = json.loads(line)
                self._costs.setdefault(one, took)
                self._calls.setdefault(one, names)
                if failed:
                    killer = one
                    self._kills[killer] = self._kills.get(killer, 0) + 1
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), killer


if __name__ == "__main__":
    cut = sys.argv.index("--")
    plugin = Mutants(Path(sys.argv[1]), sys.argv[2:cut])
    options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "timeout=0"]
    sys.exit(pytest.main([*options, *sys.argv[cut + 1 :]], plugins=[plugin]))
