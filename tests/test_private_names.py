"""Names of other packages that are not public and that safepool uses: each is there.

A release that drops one changes what a pool does, or breaks it. This file fails first, and says
which module of ours is to be looked at.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from joblib._parallel_backends import AutoBatchingMixin, ParallelBackendBase

import safepool
from safepool.joblib_backend import SafepoolBackend

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(safepool.__file__).parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="some exist on Linux alone")

THREAD_HANDLE = (
    "_os_thread_handle"
    if sys.version_info >= (3, 14)
    else "_handle"
    if sys.version_info >= (3, 13)
    else "_bootstrap"
)

# One row per object: where it is found, and the names that are read, set or called on it. What its
# instances have alone is looked for in the code of a class.
NAMES: dict[str, list[str]] = {
    "_blake2": ["blake2b"],
    "_codecs": ["encode"],
    "_locale": ["setlocale"],
    "_signal": ["pthread_sigmask", "signal"],
    "_thread": ["start_joinable_thread" if sys.version_info >= (3, 13) else "start_new_thread"],
    "abc": ["_get_dump"],
    "abc:ABC": ["_abc_impl"],
    "asyncio.events": ["_get_running_loop"],
    "atexit": ["_run_exitfuncs"],
    "concurrent.futures._base": [
        "LOGGER",
        "CANCELLED_AND_NOTIFIED",
        "FINISHED",
        "PENDING",
        "RUNNING",
    ],
    "concurrent.futures:Future()": [
        "_condition",
        "_done_callbacks",
        "_result",
        "_state",
        "_waiters",
    ],
    "concurrent.futures:ProcessPoolExecutor": [
        "_broken",
        "_max_workers",
        "_mp_context",
        "_processes",
    ],
    "concurrent.futures.process": ["_RemoteTraceback"],
    "copyreg": ["_extension_registry", "_reconstructor"],
    "ctypes": [
        "_CFuncPtr",
        "_FUNCFLAG_CDECL",
        "_FUNCFLAG_USE_ERRNO",
        "_Pointer",
        "_SimpleCData",
    ],
    "ctypes:CDLL(None)": ["_FuncPtr", "_handle"],
    "ctypes:CDLL(None).free": ["_objects"],
    "os:environ": ["_data"],
    "enum:Flag": ["_member_map_", "_member_names_", "_value2member_map_"],
    "enum:Flag('Kind', 'ONE').ONE": ["_sort_order_"],
    "functools:singledispatch(abs)": ["_clear_cache"],
    "importlib.util": ["_LazyModule"],
    "importlib._bootstrap": ["_module_locks"],
    "importlib._bootstrap:_load_unlocked": ["_initializing"],
    "logging": ["_levelToName", "_warnings_showwarning"],
    "logging:root": ["_cache"],
    "multiprocessing.context": ["_concrete_contexts", "_default_context"],
    "multiprocessing.context:ForkProcess": ["_Popen"],
    "multiprocessing.context:ForkServerProcess": ["_Popen"],
    "multiprocessing.context:SpawnContext": ["_name"],
    "multiprocessing.context:get_spawning_popen": [],
    "multiprocessing.forkserver:ForkServer()": [
        "_forkserver_alive_fd",
        "_forkserver_pid",
        "_preload_modules",
        "connect_to_new_process",
    ],
    "multiprocessing.forkserver:_forkserver": ["_preload_modules"],
    "multiprocessing.forkserver:read_signed": [],
    "multiprocessing.pool:MapResult": ["_chunksize", "_number_left", "_pool"],
    "multiprocessing.pool:Pool": ["_pool", "_processes", "_state"],
    "multiprocessing.popen_fork:Popen": ["_launch"],
    "multiprocessing.popen_forkserver:Popen": ["_launch"],
    "multiprocessing.process": [
        "_ParentProcess",
        "_children",
        "_current_process",
        "_parent_process",
        "_process_counter",
    ],
    "multiprocessing.process:BaseProcess": ["_bootstrap"],
    "multiprocessing.process:current_process()": ["_config", "_identity", "_parent_pid", "_popen"],
    "multiprocessing.reduction": [
        "_reduce_method",
        "_reduce_method_descriptor",
        "_reduce_partial",
        "_reduce_socket",
    ],
    "multiprocessing.reduction:ForkingPickler": ["_extra_reducers"],
    "multiprocessing.resource_tracker:_resource_tracker": ["_fd", "_lock"],
    "multiprocessing.sharedctypes:rebuild_ctype": ["_wrapper"],
    "multiprocessing.spawn:_main": ["_inheriting"],
    "multiprocessing.spawn:get_preparation_data('')['sys_path']": [],
    "multiprocessing.util": ["_finalizer_registry", "_run_finalizers"],
    "os": ["_exit"],
    "shutil": ["_ARCHIVE_FORMATS", "_UNPACK_FORMATS"],
    "subprocess": ["_args_from_interpreter_flags"],
    "sys": ["_getframe", "_xoptions"],
    "threading": ["_limbo", "_register_atexit", "_shutdown"],
    "threading:Thread": [
        "_bootstrap",
        THREAD_HANDLE,
        *(["_context"] if sys.version_info >= (3, 14) else []),
    ],
    "threading:Condition()": ["_is_owned"],
    "threading:Event()": ["_cond"],
    "threading:RLock()": ["_at_fork_reinit"],
    "weakref:finalize": ["_registry"],
    "cloudpickle:Pickler": ["_dynamic_function_reduce", "_function_getnewargs"],
    "cloudpickle.cloudpickle:_function_getstate": ["_cloudpickle_submodules"],
    "cloudpickle.cloudpickle": [
        "_BUILTIN_TYPE_NAMES",
        "_class_reduce",
        "_extract_class_dict",
        "_get_bases",
        "_get_or_create_tracker_id",
        "_lookup_class_or_track",
        "_should_pickle_by_reference",
        "_DYNAMIC_CLASS_TRACKER_BY_ID",
        "_class_setstate",
        "_dynamic_class_reduce",
        "_extract_code_globals",
        "_find_imported_submodules",
        "_function_setstate",
        "_get_cell_contents",
        "_make_function",
        "_make_skeleton_class",
        "_make_skeleton_enum",
    ],
    "joblib._parallel_backends": [
        "AutoBatchingMixin",
        "FallbackToBackend",
        "ParallelBackendBase",
        "SequentialBackend",
    ],
    "joblib:Parallel": [
        "_backend",
        "_call_id",
        "_exception",
        "_lock",
        "_managed_backend",
        "_original_iterator",
        "_raise_error_fast",
        "_ready_batches",
        "_register_new_job",
        "_running",
        "_wait_retrieval",
        "_aborting",
    ],
    "joblib.parallel:BatchCompletionCallBack": ["_register_outcome"],
    "loky.backend.context": ["_count_physical_cores"],
    "loky.backend.reduction": ["_dispatch_table"],
}

# One row per function of joblib that is called: number of positional arguments, and keywords.
CALLS: dict[str, tuple[int, list[str]]] = {
    "joblib.Parallel._raise_error_fast": (1, []),
    "joblib.Parallel._register_new_job": (2, []),
    "joblib.Parallel._wait_retrieval": (1, []),
    "joblib.disk.memstr_to_bytes": (1, []),
    "joblib.parallel.BatchCompletionCallBack": (3, []),
    "joblib.parallel.BatchCompletionCallBack._register_outcome": (2, []),
    "joblib._parallel_backends.AutoBatchingMixin.compute_batch_size": (1, []),
    "joblib._parallel_backends.AutoBatchingMixin.reset_batch_stats": (1, []),
    "joblib._parallel_backends.FallbackToBackend": (1, []),
    "joblib._parallel_backends.SequentialBackend": (0, ["nesting_level"]),
}

# Names that are no other package's, or that the code does without where they are missing.
ELSEWHERE = {
    "_extobj_contextvar",  # NumPy 2: its errors are read at each look without it
    "_get_filters",  # warnings, from Python 3.14 on
    *("_colorize", "_suggestions"),  # modules of newer Pythons
    *("_handle", "_os_thread_handle"),  # THREAD_HANDLE
    *(
        "_argtypes_",
        "_fields_",
        "_flags_",
        "_length_",
        "_restype_",
        "_type_",
    ),  # documented: ctypes
    "_ctypes",  # a module that some classes say they are of
    *("_boundary_", "_generate_next_value_", "_member_type_", "_name_", "_value_"),  # of enums
    *("_hashable_values_", "_unhashable_values_", "_unhashable_values_map_"),  # of some versions'
    "_is_initialized",  # numba
    *("_fields", "_make", "_replace"),  # a named tuple's
    "_mmap",  # NumPy: what an array of another class has not either
    "_psplatform",  # psutil
    "_pytest",  # the module, that runs a program
    # Our own, on modules of others or in the dictionary of an object.
    *("_kept_by_safepool", "_latch", "_safepool_replaces", "_turn", "_verdict"),
}


@pytest.mark.parametrize("place", NAMES)
def test_the_names_of_other_packages_are_there(place: str) -> None:
    module, _, expression = place.partition(":")
    found: Any = importlib.import_module(module)
    if expression:
        found = eval(f"module.{expression}", {"module": found})
    missing = [name for name in NAMES[place] if not _has(found, name)]

    assert missing == [], {name: _users().get(name) for name in missing}


@pytest.mark.parametrize("name", CALLS)
def test_a_function_of_joblib_takes_what_it_is_given(name: str) -> None:
    count, words = CALLS[name]
    signature = inspect.signature(pkgutil.resolve_name(name))

    signature.bind(*range(count), **dict.fromkeys(words))
    # A function of any keywords would drop one that it does not know.
    assert set(words) <= set(signature.parameters)


def test_the_backend_takes_what_joblib_gives_to_its_own() -> None:
    own = vars(SafepoolBackend)
    overridden = {
        name: function
        for base in (AutoBatchingMixin, ParallelBackendBase)
        for name, function in vars(base).items()
        if name in own and inspect.isfunction(function) and name != "__init__"
    }

    assert overridden.keys() >= {"configure", "submit", "compute_batch_size", "start_call"}
    for name, function in overridden.items():
        given = [
            one.name
            for one in inspect.signature(function).parameters.values()
            if one.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        optional = [
            one.name
            for one in inspect.signature(function).parameters.values()
            if one.default is not inspect.Parameter.empty
        ]
        signature = inspect.signature(own[name])
        signature.bind(*(one for one in given if one not in optional), **dict.fromkeys(optional))


def test_every_private_name_that_is_used_is_in_the_table() -> None:
    """A use of another package's private name comes with its row."""
    known = _known() | _own()

    assert {name: users for name, users in _users().items() if name not in known} == {}


def test_a_private_name_of_a_base_class_is_in_the_table() -> None:
    """Ours by its definition, and another package's too: what it overrides, reads or sets."""
    found = pkgutil.walk_packages(safepool.__path__, "safepool.")
    names = {one.name for one in found if not one.name.endswith(("_windows", "__main__"))}
    kinds = {
        kind
        for name in names
        for kind in vars(importlib.import_module(name)).values()
        if isinstance(kind, type) and kind.__module__ in names
    }
    shared = {
        name: kind
        for kind in kinds
        for base in kind.__mro__[1:-1]
        # What those give to a class belongs to its kind.
        if base.__module__ not in (*names, "enum", "typing")
        for name in _names_in(base) & _names_in(kind)
        if _is_private(name)
    }

    assert len(kinds) > 100
    assert {name: kind for name, kind in shared.items() if name not in _known()} == {}


def _known() -> set[str]:
    parts = {part for place in NAMES for part in place.replace(":", ".").split(".")}
    return {name for names in NAMES.values() for name in names} | ELSEWHERE | parts


def _has(thing: Any, name: str) -> bool:
    return hasattr(thing, name) or name in _names_in(thing)


def _names_in(thing: Any) -> set[str]:
    """Return the names of a class, and those in the code of its functions, or of a function."""
    names = {*vars(thing)} if isinstance(thing, type) else set()
    for function in vars(thing).values() if isinstance(thing, type) else [thing]:
        # The way to a property's or a class method's function, too.
        for part in (function, *(getattr(function, name, None) for name in ("fget", "__func__"))):
            code = getattr(part, "__code__", None)
            if code is not None:
                names.update(code.co_names)
                for constant in code.co_consts:
                    names.update(constant if isinstance(constant, tuple) else [constant])
    return names


def _is_private(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"_[A-Za-z0-9]\w*", name) is not None


@functools.cache
def _users() -> dict[str, set[str]]:
    """Return each private name in the package's code and its strings, and where it is.

    A name that is merely read from a global or a variable is the package's own, or imported.
    """
    used: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for name in _names_taken(ast.parse(path.read_text(encoding="utf-8"))):
            if _is_private(name):
                used.setdefault(name, set()).add(path.name)
    return used


def _names_taken(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name):
                yield name
            case ast.ImportFrom(module=str(module), names=names):
                if module.partition(".")[0] != "safepool":
                    yield from (*module.split("."), *(one.name for one in names))
            case ast.Import(names=names):
                yield from (part for one in names for part in one.name.split("."))
            case ast.Constant(value=str(text)) if text.isidentifier():
                yield text
            case ast.Constant(value=str(text)) if "import " in text:
                try:
                    yield from _names_taken(ast.parse(text))  # for another process
                except SyntaxError:
                    pass


def _own() -> set[str]:
    """Return the private names that this package itself gives to something."""
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    found.add(name)
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    found.add(name)
                case ast.ClassDef(name=name):
                    found.add(name)
                case ast.Call(
                    func=ast.Attribute(
                        value=ast.Call(func=ast.Name(id="vars")), attr="setdefault"
                    ),
                    args=[ast.Constant(value=str(name)), *_],
                ):
                    found.add(name)
                case ast.AnnAssign(target=ast.Name(id=name)) | ast.Name(id=name, ctx=ast.Store()):
                    found.add(name)
    return found
