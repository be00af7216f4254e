"""Work on what came from outside that ends: within so many seconds, and so much memory more.

A regular expression, a template, a YAML file or a list of overrides may be small and cost hours or gigabytes. The clock
is a timer's signal, which Python and its regular expressions heed (products of huge whole numbers do not). Memory is
the limit of address space while the work lasts, so that one large allocation fails instead of filling the machine.
"""

import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

PATTERN_SECONDS, PATTERN_BYTES = 5.0, 2**28
"""Most that a regular expression from outside may take for the modules of a base; 1,000 names take a millisecond."""

AGAIN_SECONDS = 0.5
"""A library may have swallowed the first interruption."""


class BoundExceeded(ValueError):
    """The work was ended; the message is one clause that begins with a verb: `takes longer than 10 s`."""


class _Expired(BaseException):
    """So that no library takes it for an error of its own."""


@contextmanager
def bounded(seconds: float, most_bytes: int) -> Iterator[None]:
    """Raises BoundExceeded where the work inside takes longer, or needs so many bytes more than the process has.

    Bounds hold in the main thread alone, where signals arrive; elsewhere the work is done as it is. An outer bound that
    is tighter stays in force.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    began, limits = time.monotonic(), resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, _expire)
    outer, repeat = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
    is_limited = _limit(most_bytes, limits)
    try:
        yield
    except _Expired:
        raise BoundExceeded(f"takes longer than {seconds:g} s") from None
    except MemoryError as error:
        if not is_limited:
            raise
        raise BoundExceeded(f"needs more than {most_bytes >> 20:,} MiB") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)
        if outer:
            left = outer - (time.monotonic() - began)
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3), repeat)


def _expire(_: int, __: FrameType | None) -> None:
    raise _Expired


def _limit(most_bytes: int, limits: tuple[int, int]) -> bool:
    """Lowers the limit of address space to what is in use and so many bytes; False where it is as low already."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    if pages is None:
        return False
    wanted = pages * resource.getpagesize() + most_bytes
    soft, hard = limits
    if any(limit != resource.RLIM_INFINITY and limit <= wanted for limit in (soft, hard)):
        return False
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    return True
