"""Run tests against mutants of modules: the code with one small fault each, as mutmut makes them.

    python .ci/mutants.py RESULTS MODULE.py... -- TESTS AND OPTIONS OF PYTEST...

The tests are collected once. For each mutant a fork of this process gives its function the mutated
code and runs them, those first that have found most for their time, until one fails. So a mutant
that is killed takes a fifth of a second. RESULTS gets a line of JSON for each; those that it has
are not run again. Needs mutmut, and setup.cfg with its ``source_paths``.
"""

import difflib
import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol
from libcst import FunctionDef
from mutmut.mutation.file_mutation import create_mutations, deep_replace

# Of a mutant that explores for ever: as a multiple of what the tests take of a processor; memory.
MOST = 3
LIMIT_BYTES = 3 << 30


def mutants(files):
    """Yield for each mutant its name, its file, and the text without and with the fault."""
    for file in files:
        module, found, _, _ = create_mutations(file, Path(file).read_text("utf-8"))
        counts = {}
        for mutation in found:
            function = mutation.contained_by_top_level_function
            if not isinstance(function, FunctionDef):
                continue
            name = function.name.value
            counts[name] = counts.get(name, 0) + 1
            mutated = deep_replace(module, mutation.original_node, mutation.mutated_node)
            yield f"{file}:{name}:{counts[name]}", file, module.code, mutated.code


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
        # By the place of a test: seconds that it took, and mutants that it has killed.
        self._costs, self._kills = {}, {}

    def pytest_runtestloop(self, session):
        """Run what has no result yet."""
        lines = self._results.read_text().splitlines() if self._results.exists() else []
        done = {json.loads(line)["name"] for line in lines}
        for name, file, text, mutated in mutants(self._files):
            if name in done:
                continue
            if not self._costs and self._run(session.items, file, text)[0]:
                raise SystemExit("a test fails without a mutant")
            code, killer = self._run(session.items, file, mutated)
            diff = [
                *difflib.unified_diff(text.splitlines(), mutated.splitlines(), lineterm="", n=0)
            ]
            killer = killer if killer is None else session.items[killer].nodeid
            told = {"name": name, "code": code, "by": killer, "diff": diff}
            with self._results.open("a") as results:
                results.write(json.dumps(told) + "\n")
        return True

    def _run(self, items, file, text):
        """Return the exit code, 0 if the mutant survives, and the place of the test that fails."""
        order = sorted(
            range(len(items)),
            key=lambda one: self._costs.get(one, 0.01) / (self._kills.get(one, 0) + 0.3),
        )
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                if self._costs:
                    limit_s = 2 + int(MOST * sum(self._costs.values()))
                    resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s + 5))
                resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
                apply(file, text)
                for one in order:
                    start = time.process_time()
                    failed = any(test.failed for test in runtestprotocol(items[one], log=False))
                    took = time.process_time() - start
                    os.write(writing, b"%d %f %d\n" % (one, took, failed))
                    if failed:
                        os._exit(1)
                os._exit(0)
            except BaseException:  # noqa: BLE001 -- of a mutant: it is told by the code
                os._exit(2)
        os.close(writing)
        killer = None
        with open(reading) as pipe:
            for line in pipe:
                one, took, failed = line.split()
                self._costs.setdefault(int(one), float(took))
                if failed == "1":
                    killer = int(one)
                    self._kills[killer] = self._kills.get(killer, 0) + 1
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), killer


if __name__ == "__main__":
    cut = sys.argv.index("--")
    plugin = Mutants(Path(sys.argv[1]), sys.argv[2:cut])
    options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "timeout=0"]
    sys.exit(pytest.main([*options, *sys.argv[cut + 1 :]], plugins=[plugin]))
