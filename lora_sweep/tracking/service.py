"""W&B's service, talked to within bounds: whoever waits for it waits so many seconds, then it is ended."""

import atexit
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any


class Service:
    """One thread that makes all calls in their order; a call that hangs is left to it and the service's process ended.

    The thread never keeps the interpreter from its end.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def call(self, work: Callable[[], Any], seconds: float) -> Any:
        """What `work` returns or raises. Raises TimeoutError after so many seconds, and the service is ended."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="wandb", daemon=True)
                self._thread.start()
        done: Future[Any] = Future()
        self._calls.put((work, done))
        try:
            return done.result(seconds)
        except TimeoutError:
            if done.done():
                raise  # the call's own
            end_service()
            raise TimeoutError(f"no answer within {seconds:g} s") from None

    def _serve(self) -> None:
        while True:
            work, done = self._calls.get()
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)


def end_service() -> None:
    """Kills W&B's processes among the children of this one: whoever waits for an answer learns that there is none."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"wandb-core" in (folder / "cmdline").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)
    # Its client would log the lost connection in tracebacks, by asyncio's log and once more at the end.
    logging.getLogger("asyncio").disabled = True
    atexit.unregister(_hush)
    atexit.register(_hush)


def _hush() -> None:
    """Registered after W&B's own hook, so it is called before: nothing of this program is written any more."""
    sys.stderr.flush()
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
