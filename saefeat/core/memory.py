"""How much memory and disk this process uses, and how much more it may have."""

import ctypes
import gc
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "total_inactive_file",
    ),
)
"""Where Linux tells a container its limit, its use, and the name of what it could drop of that."""


def process_bytes() -> int:
    """Host memory that this process has now; where only the most it ever had is told, that."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def give_back_freed() -> None:
    """Return freed memory to the system, which glibc keeps where blocks are below 32 MB."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # not in musl
            trim(0)


def available_host_bytes() -> int:
    """Host memory that this process can still get, within the limit of its container."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") - process_bytes()
    (line,) = [one for one in meminfo.read_text().splitlines() if one.startswith("MemAvailable:")]
    return min([int(line.split()[1]) * 1024, *_left_in_container()])


def device_bytes(device: torch.device) -> int:
    """Memory of a CUDA device that this process has in tensors."""
    return torch.cuda.memory_allocated(device)


def available_device_bytes(device: torch.device) -> int:
    """Memory of a CUDA device that this process can still get."""
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused


def available_disk_bytes(folder: Path) -> int:
    """Free space where `folder` is, or will be made."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def _left_in_container() -> Iterator[int]:
    for limit, used, droppable in CGROUPS:
        if not Path(limit).is_file() or not Path(used).is_file():
            continue
        most = Path(limit).read_text().strip()
        if most != "max":
            statistics = Path(limit).with_name("memory.stat").read_text().split()
            files = dict(zip(statistics[::2], statistics[1::2], strict=True)).get(droppable, "0")
            yield max(0, int(most) - int(Path(used).read_text()) + int(files))
