"""The start file of ``safepool run --patch``: Python imports it before the program.

The folder of the file is on PYTHONPATH, so it also starts the Python processes that the program
starts. The file imports nothing of safepool. Its hooks act when the program imports
``concurrent.futures.process``, ``multiprocessing.pool`` (or ``multiprocess``, the fork of that
package) or ``joblib.parallel``. It makes ``os.cpu_count()`` return ``PYTHON_CPU_COUNT`` where
Python does not. Then it takes its folder off ``sys.path`` and runs the ``sitecustomize`` that
Python would have found otherwise.

Any Python may find the file, also one that is older or lacks safepool: then it prints that, and
runs the program unchanged. Hence its syntax is that of every Python 3.

Not covered: ``python -I``, ``-E`` and ``-S``, which do not look here.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# mypy: disable-error-code="attr-defined, assignment"

import os
import sys
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec

_HERE = os.path.dirname(os.path.abspath(__file__))


def _patch_futures(module):
    # Looked up on first use: importing safepool's pool imports this very module, for the class
    # that its own is derived from.
    replaced = module._safepool_replaces = module.__dict__.pop("ProcessPoolExecutor")

    def look_up(name):
        if name != "ProcessPoolExecutor":
            raise AttributeError("module " + repr(module.__name__) + " has no " + repr(name))
        from safepool.pool.executor import ProcessPool  # noqa: PLC0415 -- on first use

        return ProcessPool

    module.__getattr__ = look_up
    # The package keeps an attribute after its first access. Without it asks this module again,
    # before Python 3.15; there it holds a lazy import until then, which asks as well.
    package = sys.modules["concurrent.futures"]
    if vars(package).get("ProcessPoolExecutor") is replaced:
        del package.ProcessPoolExecutor
        if not hasattr(package, "__getattr__"):
            package.__getattr__ = look_up


def _patch_pool(module):
    # The module's own code, such as that of ThreadPool, still finds the class in its namespace. An
    # importer of the module gets a module without the class, and looks up the replacement.
    shown = type(module)(module.__name__)
    vars(shown).update(vars(module))
    shown._safepool_replaces = vars(shown).pop("Pool")

    def look_up(name):
        if name != "Pool":
            raise AttributeError("module " + repr(module.__name__) + " has no " + repr(name))
        from safepool.patched import Pool  # noqa: PLC0415 -- on first use

        return Pool

    shown.__getattr__ = look_up
    sys.modules[module.__name__] = shown
    package = sys.modules[module.__package__]
    if hasattr(package, "pool"):  # a .pth file has imported it
        package.pool = shown


def _patch_context(module):
    package = sys.modules[module.__package__]

    # Only for the default context: a program that has chosen a start method gets it.
    def Pool(self, processes=None, initializer=None, initargs=(), maxtasksperchild=None):  # noqa: ARG001
        """Return a process pool object."""
        pool = import_module(package.__name__ + ".pool")
        return pool.Pool(processes, initializer, initargs, maxtasksperchild)

    module.DefaultContext.Pool = Pool
    names = ["Pool"]
    if package.__name__ == "multiprocess":
        # Exception of safepool's results.
        from multiprocessing.context import TimeoutError as raised  # noqa: N813, PLC0415 -- on first use

        module.TimeoutError = module.BaseContext.TimeoutError = raised
        names.append("TimeoutError")
    for name in names:
        if name in vars(package):  # a .pth file has imported it
            setattr(package, name, getattr(module._default_context, name))


def _patch_joblib(module):
    if not hasattr(module, "DEFAULT_BACKEND"):
        return  # another one of that name

    def make(**options):
        from safepool.joblib_backend import SafepoolBackend  # noqa: PLC0415 -- on first use

        return SafepoolBackend(**options)

    module.BACKENDS["safepool"] = make
    module.DEFAULT_BACKEND = "safepool"


_PATCHES = {
    "concurrent.futures.process": _patch_futures,
    "multiprocessing.context": _patch_context,
    "multiprocessing.pool": _patch_pool,
    "multiprocess.context": _patch_context,
    "multiprocess.pool": _patch_pool,
    "joblib.parallel": _patch_joblib,
}


class _Finder:
    """Finds modules as the other finders do, and patches them after loading."""

    @staticmethod
    def find_spec(name, path=None, target=None):  # noqa: ARG004 -- the import system's interface
        if name not in _PATCHES:
            return None
        # Those behind this one: safepool's own, before it, asks it for the same modules.
        for finder in sys.meta_path[sys.meta_path.index(_Finder) + 1 :]:
            if hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path)
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = _Loader(spec.loader)
                    return spec
        return None


class _Loader:
    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        # The loader stays hidden: attributes of a module's loader are there as before.
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _PATCHES[module.__name__](module)


def _run_the_next():
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != _HERE]
    spec = PathFinder.find_spec("sitecustomize")
    if spec is None or spec.loader is None:
        return
    module = module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


def _pretend_cpus():
    # As Python 3.13 does by itself: multiprocessing.Pool() asks, and many a program.
    told = os.environ.get("PYTHON_CPU_COUNT", "")
    if sys.version_info < (3, 13) and told.isdigit() and int(told):
        count = int(told)

        def cpu_count():
            return count

        # By which it is pickled.
        cpu_count.__module__, cpu_count.__qualname__ = "os", "cpu_count"
        os.cpu_count = cpu_count


def _start():
    if find_spec("safepool") is None:
        sys.stderr.write(
            "safepool run: --patch has no effect: safepool is not installed for "
            + sys.executable
            + "\n"
        )
    else:
        _pretend_cpus()
        sys.meta_path.insert(0, _Finder)
        for name, patch in _PATCHES.items():
            if name in sys.modules:  # a .pth file has imported it
                patch(sys.modules[name])
    _run_the_next()


# Under another name something only looks at this file.
if __name__ == "sitecustomize":
    _start()
