"""How much memory there is for this process."""

import os
from pathlib import Path

import torch

# Where Linux says what a container may take, and what it takes.
_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that this process can still take without the system swapping, or ending it.

    Args:
        device: whose memory; where a device does not tell, it is taken to have enough.
    """
    device = torch.device(device)
    if device.type != "cpu":
        return _free_on(device)
    free = _available()
    for limit, used in _LIMITS:
        stated, taken = _number(limit), _number(used)
        if stated is not None and taken is not None:
            free = min(free, max(0, stated - taken))
    return free


def process_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that this process holds in memory now; 0 where the system does not say."""
    device = torch.device(device)
    if device.type == "cpu":
        return _field("/proc/self/status", "VmRSS") or 0
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _free_on(device: torch.device) -> int:
    """What the device has free, and what torch has taken of it but does not use."""
    if device.type != "cuda":
        return 1 << 62
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def _available() -> int:
    stated = _field("/proc/meminfo", "MemAvailable")
    if stated is not None:
        return stated
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 1 << 62


def _field(file: str, name: str) -> int | None:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(f"{name}:")), None)
    return None if found is None else int(found.split()[1]) * 1024


def _number(file: str) -> int | None:
    try:
        return int(Path(file).read_text())
    except (OSError, ValueError):  # "max" is no limit
        return None
