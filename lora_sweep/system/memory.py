"""Memory of a device: what is free, and the most that was held during a stretch of work."""

import contextlib
import math
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CONTAINER = Path("/sys/fs/cgroup")
_LIMITS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""(limit, use, what of, the part of it that is cached files and given back on demand), the newer kernels first."""


def free_bytes(device: torch.device) -> float:
    """Of the device; infinity where the system does not report it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    with contextlib.suppress(OSError, ValueError, IndexError):
        limits = [1024.0 * int(_line(Path("/proc/meminfo"), "MemAvailable"))]
        for limit, used, parts, cached in _LIMITS:
            with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
                held = int((_CONTAINER / used).read_text()) - int(_line(_CONTAINER / parts, cached))
                limits.append(float(int((_CONTAINER / limit).read_text()) - held))
        return max(0.0, min(limits))
    return math.inf


def device_kind(device: torch.device) -> str:
    """What has the same name has as much memory: a number of slots that is too many on one is so on the other."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory} bytes"
    total = math.inf
    with contextlib.suppress(OSError, ValueError, IndexError):
        total = 1024 * int(_line(Path("/proc/meminfo"), "MemTotal"))
        for limit, *_ in _LIMITS:
            with contextlib.suppress(OSError, ValueError):
                total = min(total, int((_CONTAINER / limit).read_text()))
    return f"{device.type}, {total} bytes"


class Peak:
    """The most memory held since it was made; None where the system does not report it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: float | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = float(torch.cuda.memory_allocated(device))
        else:
            with contextlib.suppress(OSError, ValueError, IndexError):
                _CLEAR.write_text("5")  # sets VmHWM back to VmRSS
                self._before = 1024.0 * int(_line(_STATUS, "VmRSS"))

    @property
    def held_bytes(self) -> float | None:
        """What was held when it was made: allocated by tensors on CUDA, resident in the process on a CPU."""
        return self._before

    @property
    def most_bytes(self) -> float | None:
        """The most held since then, the same way."""
        if self._before is None:
            return None
        if self._device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._device))
        return 1024.0 * int(_line(_STATUS, "VmHWM"))

    @property
    def bytes(self) -> float | None:
        """`most_bytes` beyond `held_bytes`."""
        most = self.most_bytes
        return None if most is None or self._before is None else max(0.0, most - self._before)


def _line(file: Path, key: str) -> str:
    return next(line.split()[1] for line in file.read_text().splitlines() if line.split()[0].rstrip(":") == key)
