r"""Floor 1, limits: the GPUs that a process may see: variables and device files in, `Gpus` out.

    HIP_VISIBLE_DEVICES, CUDA_VISIBLE_DEVICES    numbers or ids, of what the next line leaves
    ROCR_VISIBLE_DEVICES                         the same, below HIP
    /dev/nvidia0, /dev/nvidia1, ...              one for each device of NVIDIA's driver
    /proc/driver/nvidia/gpus/*                   the same
    /dev/kfd                                     there is AMD's driver

The module imports no library and asks no driver: asking CUDA makes a process unfit for a fork.

Sources: NVIDIA, CUDA C++ Programming Guide, "CUDA Environment Variables"; AMD, ROCm documentation,
"GPU isolation techniques".

Not covered:
    * The number of AMD's devices: in a container their files are those of the machine.
    * Parts of a device (MIG): only a variable or the caller names them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from safepool.arguments import DEVICE

_DEVICE_FILE = re.compile(r"nvidia[0-9]+", re.ASCII)


class Gpus(NamedTuple):
    """The devices that this process may use.

    Attributes:
        lists: For each variable that selects devices, its possible values: one entry for each
            device.
        source: The variable or folder that was read.
        is_said: ``True`` if a variable lists them; ``False`` if devices were counted, and some may
            be invisible.
    """

    lists: Mapping[str, tuple[str, ...]]
    source: str
    is_said: bool


def parse_visible(text: str) -> tuple[str, ...]:
    """Return the devices in a variable, up to the first invalid one, as CUDA does.

    Example:
        >>> parse_visible("2, GPU-8932f937,-1,3")
        ('2', 'GPU-8932f937')
    """
    found = []
    for entry in text.split(","):
        device = entry.strip()
        if not DEVICE.fullmatch(device):
            break
        found.append(device)
    return tuple(found)


def read_gpus(environ: Mapping[str, str], root: str = "/") -> Gpus:
    """Return the devices that a process of this environment may use.

    Returns:
        At least one variable; with no entry if no device was found.
    """
    names = [name for name in ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES") if name in environ]
    if not names and "ROCR_VISIBLE_DEVICES" in environ:
        names = ["ROCR_VISIBLE_DEVICES"]
    if names:
        source = ", ".join(f"{name}={environ[name]!r}" for name in names)
        lists = {name: parse_visible(environ[name]) for name in names}
        return Gpus(lists=lists, source=source, is_said=True)
    folder = os.path.join(root, "dev")
    found = [name for name in _list(folder) if _DEVICE_FILE.fullmatch(name)]
    if not found:
        folder = os.path.join(root, "proc/driver/nvidia/gpus")
        found = _list(folder)
        folder = folder if found else "/dev/nvidia* and /proc/driver/nvidia/gpus"
    # The files' own numbers are not used: in a container CUDA counts the visible devices from 0.
    numbers = tuple(map(str, range(len(found))))
    if not found and os.path.exists(os.path.join(root, "dev/kfd")):
        return Gpus(lists={"HIP_VISIBLE_DEVICES": ()}, source="/dev/kfd", is_said=False)
    return Gpus(lists={"CUDA_VISIBLE_DEVICES": numbers}, source=folder, is_said=False)


def _list(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
