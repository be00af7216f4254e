"""Work in a thread of its own: in order, and never waited for in vain."""

import time

import pytest

from lora_sweep.system import background
from lora_sweep.system.background import Background


def test_work_is_done_in_order_and_what_it_raises_reaches_who_waits() -> None:
    done: list[int] = []

    def work(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        done.append(number)
        return number

    with Background("test") as thread:
        futures = [thread.submit(work, number) for number in range(5)]
        assert thread.result(futures[4]) == 4
        assert done == [0, 1, 2, 4]
        with pytest.raises(ValueError, match="three"):
            thread.result(futures[3])


def test_work_may_take_longer_than_a_look_at_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "WAIT_SECONDS", 0.01)

    def slow() -> str:
        time.sleep(0.2)
        raise TimeoutError("of the work itself")

    with Background("test") as thread, pytest.raises(TimeoutError, match="of the work itself"):
        thread.result(thread.submit(slow))


def test_a_thread_that_got_no_memory_for_its_own_bookkeeping_is_no_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(background, "WAIT_SECONDS", 0.05)

    class NoMemory:
        def run(self) -> None:
            raise MemoryError

    thread = Background("test")
    assert thread.result(thread.submit(int)) == 0
    thread._executor._work_queue.put(NoMemory())  # type: ignore[arg-type]
    for each in thread._executor._threads:
        each.join(5)
    lost = thread.submit(int)
    with pytest.raises(MemoryError):
        thread.result(lost)
    thread.close()
