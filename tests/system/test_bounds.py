"""Work that ends."""

import re
import resource
import signal
import threading
import time

import pytest

from lora_sweep.system.bounds import BoundExceeded, bounded


def swallowing() -> None:
    while True:
        try:
            while True:
                pass
        except Exception:
            pass


@pytest.mark.parametrize(
    "work",
    [
        swallowing,
        lambda: re.match(r"(a+)+$", "a" * 40 + "b"),
        lambda: [None for _ in iter(int, 1) if False],
    ],
    ids=["a loop that swallows errors", "a regular expression", "an endless iterator"],
)
def test_work_that_never_ends_is_ended_in_time(work: object) -> None:
    assert callable(work)
    began = time.monotonic()
    with pytest.raises(BoundExceeded, match=r"^takes longer than 0\.2 s$"), bounded(0.2, 2**30):
        work()
    assert time.monotonic() - began < 2


def test_work_that_needs_too_much_memory_is_ended() -> None:
    began = time.monotonic()
    with pytest.raises(BoundExceeded, match=r"^needs more than 64 MiB$"), bounded(10, 2**26):
        "a" * 10**10
    assert time.monotonic() - began < 1


def test_limits_timer_and_handler_are_as_before() -> None:
    def handler(*_: object) -> None: ...

    before = signal.signal(signal.SIGALRM, handler)
    outer = signal.setitimer(signal.ITIMER_REAL, 50)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        with bounded(5, 2**28):
            assert resource.getrlimit(resource.RLIMIT_AS) != limits
        assert resource.getrlimit(resource.RLIMIT_AS) == limits
        assert signal.getsignal(signal.SIGALRM) is handler
        assert 45 < signal.getitimer(signal.ITIMER_REAL)[0] <= 50
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *outer)


def test_in_another_thread_the_work_is_done_as_it_is() -> None:
    sizes = []

    def work() -> None:
        with bounded(1e-9, 1):
            time.sleep(0.01)
            sizes.append("done")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert sizes == ["done"]


def test_an_error_of_the_work_itself_stays() -> None:
    with pytest.raises(KeyError), bounded(1, 2**28):
        raise KeyError("x")
