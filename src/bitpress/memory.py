"""How much memory there is for this process."""

import os
from pathlib import Path

# Where Linux says what a container may take, and what it takes.
_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_memory() -> int:
    """Bytes that this process can still take without the system swapping, or ending it."""
    free = _available()
    for limit, used in _LIMITS:
        stated, taken = _number(limit), _number(used)
        if stated is not None and taken is not None:
            free = min(free, max(0, stated - taken))
    return free


def process_memory() -> int:
    """Bytes that this process holds in memory now; 0 where the system does not say."""
    return _field("/proc/self/status", "VmRSS") or 0


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
