"""Whether an error says that memory ran out, and not what it seems to say."""

import errno
import resource

_SAID = (
    "can't allocate memory", "not enough memory", "Cannot allocate memory", "cannot allocate memory", "out of memory",
    "bad_alloc", "failed to map segment",
)  # fmt: skip


_NEAR_BYTES = 16 * 2**20
"""Room under the limit of address space below which the interpreter's own allocations fail: they ask for 1 MiB."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, the host's allocator or the system had no more memory to give, anywhere in its causes."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return any(_is_out_of_memory(each) for each in chain)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "ArrowMemoryError"):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    # A thread's stack is memory too.
    is_thread = isinstance(error, RuntimeError) and "can't start new thread" in str(error)
    return is_thread or any(said in str(error) for said in _SAID)


def is_at_limit() -> bool:
    """Whether this process has come up against its limit of address space.

    Where the interpreter itself gets no memory it raises what it happens to raise: a SystemError without a cause, a
    SyntaxError in a correct file. So nothing that ends such a process can be taken for a bug.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return False
    try:
        with open("/proc/self/status") as file:  # noqa: PTH123 (pathlib is one import more, and there is no memory)
            peak_kib = next((int(line.split()[1]) for line in file if line.startswith("VmPeak:")), 0)
    except MemoryError:
        return True
    except OSError:
        return False
    return 1024 * peak_kib > limit - _NEAR_BYTES
