"""How much memory may still be taken."""

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where the system does not say.

    Of the CPU: what Linux calls available, and not more than a container's limit (cgroup version
    2) leaves.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [size for size in (_available(), _group_rest()) if size is not None]
    return min(found, default=None)


def _available() -> int | None:
    return _sizes(_MEMINFO, 1024).get("MemAvailable:")


def _group_rest() -> int | None:
    """What is left of a container's limit; files in memory can be given back."""
    try:
        limit = (_GROUP / "memory.max").read_text().strip()
        used = int((_GROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return None
    files = _sizes(_GROUP / "memory.stat", 1).get("inactive_file", 0)
    return max(0, int(limit) - used + files) if limit.isdecimal() else None


def _sizes(path: Path, unit: int) -> dict[str, int]:
    """The numbers of a file with a name and a number on each line."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) * unit for row in rows if len(row) > 1 and row[1].isdecimal()}
