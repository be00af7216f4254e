"""Whether an error says that memory ran out, and not what it seems to say."""

import errno

_SAID = (
    "can't allocate memory", "not enough memory", "Cannot allocate memory", "cannot allocate memory", "out of memory",
    "bad_alloc", "failed to map segment",
)  # fmt: skip


def is_exhausted(error: BaseException) -> bool:
    """Whether the device, the host's allocator or the system had no more memory to give, anywhere in its causes."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return any(_is_exhausted(each) for each in chain)


def _is_exhausted(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "ArrowMemoryError"):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    # A thread's stack is memory too.
    is_thread = isinstance(error, RuntimeError) and "can't start new thread" in str(error)
    return is_thread or any(said in str(error) for said in _SAID)
