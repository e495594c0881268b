"""Names of other packages that are not public and that safepool uses: each is there.

A release that drops one changes what a pool does, or breaks it. This file fails first, and says
which module of ours is to be looked at.
"""

from __future__ import annotations

import ast
import functools
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

import safepool

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
    "abc": ["_get_dump"],
    "atexit": ["_run_exitfuncs"],
    "concurrent.futures._base": [
        "LOGGER",
        "CANCELLED_AND_NOTIFIED",
        "FINISHED",
        "PENDING",
        "RUNNING",
    ],
    "concurrent.futures.process": ["_RemoteTraceback"],
    "copyreg": ["_extension_registry"],
    "ctypes": [
        "_CFuncPtr",
        "_FUNCFLAG_CDECL",
        "_FUNCFLAG_USE_ERRNO",
        "_Pointer",
        "_SimpleCData",
    ],
    "ctypes:CDLL(None)": ["_FuncPtr", "_handle"],
    "ctypes:CDLL(None).free": ["_objects"],
    "importlib._bootstrap": ["_module_locks"],
    "importlib._bootstrap:_load_unlocked": ["_initializing"],
    "logging": ["_levelToName", "_warnings_showwarning"],
    "logging:root": ["_cache"],
    "multiprocessing.context:get_spawning_popen": [],
    "multiprocessing.forkserver:ForkServer()": [
        "_forkserver_alive_fd",
        "_forkserver_pid",
        "_preload_modules",
        "connect_to_new_process",
    ],
    "multiprocessing.forkserver:_forkserver": ["_preload_modules"],
    "multiprocessing.forkserver:read_signed": [],
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
    "multiprocessing.reduction:ForkingPickler": ["_extra_reducers"],
    "multiprocessing.resource_tracker:_resource_tracker": ["_fd", "_lock"],
    "multiprocessing.spawn:_main": ["_inheriting"],
    "multiprocessing.spawn:get_preparation_data('')['sys_path']": [],
    "multiprocessing.util": ["_finalizer_registry", "_run_finalizers"],
    "os": ["_exit"],
    "subprocess": ["_args_from_interpreter_flags"],
    "sys": ["_getframe", "_xoptions"],
    "threading": ["_limbo", "_register_atexit", "_shutdown"],
    "threading:Thread": ["_bootstrap", THREAD_HANDLE],
    "threading:Condition()": ["_is_owned"],
    "threading:Event()": ["_cond"],
    "threading:RLock()": ["_at_fork_reinit"],
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

# Names that are no other package's, or that the code does without where they are missing.
ELSEWHERE = {
    "_extobj_contextvar",  # NumPy 2: its errors are read at each look without it
    "_get_filters",  # warnings, from Python 3.14 on
    *("_argtypes_", "_flags_", "_length_", "_restype_", "_type_"),  # documented: of ctypes
    *("_boundary_", "_member_type_", "_name_", "_value_"),  # of enums
    "_is_initialized",  # numba
    "_make",  # a named tuple's
    "_mmap",  # NumPy: what an array of another class has not either
    "_psplatform",  # psutil
    "_replace",
    "_safepool_replaces",  # our own, on modules of others
}


@pytest.mark.parametrize("place", NAMES)
def test_the_names_of_other_packages_are_there(place: str) -> None:
    module, _, expression = place.partition(":")
    found: Any = importlib.import_module(module)
    if expression:
        found = eval(f"module.{expression}", {"module": found})
    missing = [name for name in NAMES[place] if not _has(found, name)]

    assert missing == [], {name: _users().get(name) for name in missing}


def test_every_private_name_that_is_used_is_in_the_table() -> None:
    """A use of another package's private name comes with its row."""
    known = {name for names in NAMES.values() for name in names} | ELSEWHERE
    known |= _own()
    known |= {part for place in NAMES for part in place.replace(":", ".").split(".")}

    assert {name: users for name, users in _users().items() if name not in known} == {}


def _has(thing: Any, name: str) -> bool:
    functions = vars(thing).values() if isinstance(thing, type) else [thing]
    codes = (getattr(function, "__code__", None) for function in functions)
    return hasattr(thing, name) or any(name in code.co_names for code in codes if code)


@functools.cache
def _users() -> dict[str, set[str]]:
    """Return each private name that is taken from an object, and the modules that do it."""
    used: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Attribute(value=ast.Name(id="self" | "cls")):
                    continue
                case ast.Attribute(attr=name):
                    pass
                case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=name), *_]):
                    pass
                case _:
                    continue
            if isinstance(name, str) and name.startswith("_") and not name.startswith("__"):
                used.setdefault(name, set()).add(path.name)
    return used


def _own() -> set[str]:
    """Return the private names that this package itself gives to something."""
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    found.add(name)
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    found.add(name)
                case ast.AnnAssign(target=ast.Name(id=name)) | ast.Name(id=name, ctx=ast.Store()):
                    found.add(name)
    return found
