"""The process that a verb runs in: signals from its first moment to its last, and streams that may be full or closed.

Only the standard library is imported: a signal that arrives while torch is imported finds its handler.
"""

import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TextIO

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Each is a clean stop; one that is ignored when the process begins (nohup) stays so."""

STOPPED = 128
"""Exit code of a process that was stopped, less the number of the signal: 130 after Ctrl-C."""


_BEGUN_ANEW = "LORA_SWEEP_BEGUN_ANEW"
"""Environment variable: the process has done so once, and does not again."""


class Stop:
    """Whether a signal has asked for a clean stop; `number` says which, 0 before."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self) -> bool:
        return bool(self.number)

    @property
    def code(self) -> int:
        """The exit code of a process that stops for it."""
        return STOPPED + self.number

    def request(self, number: int, _: FrameType | None = None) -> None:
        """Handles a signal: the first asks, a second one no longer waits."""
        if self.number:
            raise SystemExit(STOPPED + number)
        self.number = number
        _say(b"\nstopping after this step; once more to stop at once\n")


@contextmanager
def stoppable() -> Iterator[Stop]:
    """While trials train a signal asks for a clean stop; before and after it ends the process."""
    stop = Stop()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop.request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(main: Callable[[], None], goes_on: tuple[str, ...]) -> NoReturn:
    """Runs `main`, which ends in SystemExit, as the whole of this process.

    A signal outside of `stoppable` ends it with 128 + number: nothing that must be finished is under way. Verbs in
    `goes_on` do not mind what becomes of their output; of any other a full stdout is exit code 1, a closed one 141.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    _in_utf8()
    _open_standard_files()
    out, error = (_Steady(stream) for stream in (sys.stdout, sys.stderr))
    sys.stdout, sys.stderr = out, error
    last = _Last()
    atexit.register(last)
    code: Any = 0
    try:
        _refuse_nowhere()
        main()
    except SystemExit as ended:
        code = ended.code or 0
    out.flush()
    if out.failure is not None and not code and not set(sys.argv[1:2]) & set(goes_on):
        if not isinstance(out.failure, BrokenPipeError):
            print(f"stdout: {out.failure.strerror or out.failure}", file=sys.stderr)
        code = 141 if isinstance(out.failure, BrokenPipeError) else 1
    last.code = code if isinstance(code, int) else 1
    sys.exit(code)


class _Last:
    """Registered first, so it is called last, after all threads: ends the process with its handlers still in place.

    When the interpreter takes itself apart, a signal would end the process as if nobody had foreseen it.
    """

    code = 1
    """Of a bug, whose traceback is written by now."""

    def __call__(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(self.code)


def _in_utf8() -> None:
    """Begins anew in Python's UTF-8 mode where the locale has no names of files beyond ASCII.

    Libraries in Rust take names in UTF-8 alone. What is printed stays in the locale's encoding.
    """
    if sys.getfilesystemencoding().lower() in ("utf-8", "utf8") or "PYTHONUTF8" in os.environ.get(_BEGUN_ANEW, ""):
        return
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    os.environ.setdefault("PYTHONIOENCODING", f"{encoding}:backslashreplace")
    os.environ.update({"PYTHONUTF8": "1", _BEGUN_ANEW: "PYTHONUTF8"})
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _refuse_nowhere() -> None:
    """Libraries ask for the working directory when they are imported."""
    try:
        os.getcwd()  # noqa: PTH109 (Path.cwd is the same, by an import)
    except FileNotFoundError:
        print("the working directory is gone; change to one that is there", file=sys.stderr)
        raise SystemExit(2) from None


def _end(number: int, _: FrameType | None) -> NoReturn:
    """At once: an exception could be lost in whatever is being imported, and threads would be waited for."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    _say(b"stopped\n")
    os._exit(STOPPED + number)


def _say(line: bytes) -> None:
    with suppress(OSError):  # nobody is there to read it
        os.write(2, line)


def _open_standard_files() -> None:
    """Those that are closed lead nowhere: else a study's file would get their number, and what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


class _Steady:
    """A text stream that goes on when nobody reads it or the disk is full; the first `failure` is kept."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None
        # Names and messages may hold what the terminal's encoding does not.
        with suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]

    def write(self, text: str) -> int:
        with self._kept():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._kept():
            self._stream.flush()

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = self.failure or error
            # What is still in its buffer must not fail once more when the interpreter ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
