"""What libraries say of themselves on stderr, and how little of it a person is shown.

It comes in four ways: by `logging` where nobody has set up a handler, by `warnings`, by tqdm's bars, and through
handlers that a library installs for itself. Errors are shown whoever logs them.
"""

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from lora_sweep.system.terminal import printable

_ENVIRONMENT = {
    # transformers' reader of GGUF files draws a bar of its own, whatever transformers' setting is.
    "TQDM_DISABLE": "1",
    # The hub's client logs each of its retries.
    "HF_HUB_VERBOSITY": "error",
    # Either value keeps tokenizers from warning once something forks.
    "TOKENIZERS_PARALLELISM": "true",
}
"""Read when the libraries are imported."""


@contextmanager
def silenced() -> Iterator[None]:
    """Keeps it off stderr while a verb runs; this package's own warnings and anybody's errors are written.

    Imports nothing heavy. `-W` and PYTHONWARNINGS bring warnings back, and what the environment has already of
    TQDM_DISABLE, HF_HUB_VERBOSITY and TOKENIZERS_PARALLELISM stays as it is.
    """
    added = _ENVIRONMENT.keys() - os.environ.keys()
    os.environ.update({name: _ENVIRONMENT[name] for name in added})
    # Writes what no handler takes.
    last_resort = logging.lastResort
    if last_resort is not None:
        last_resort.addFilter(_is_shown)
    show = warnings.showwarning
    if not sys.warnoptions:
        warnings.showwarning = _drop
    try:
        yield
    finally:
        warnings.showwarning = show
        if last_resort is not None:
            last_resort.removeFilter(_is_shown)
        for name in added:
            os.environ.pop(name, None)


def import_quietly() -> None:
    """Imports transformers and datasets without their bars and own handlers, and bitsandbytes, if it is installed,
    without the hub.

    Where the processor has AVX512-BF16, bitsandbytes asks the package `kernels` for a kernel from the hub as soon as it
    is imported (PEFT imports it for any adapter). Nothing here computes with that kernel, and nothing should be fetched
    unasked.
    """
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()

    if importlib.util.find_spec("bitsandbytes") is not None:
        with _hidden("kernels"), suppress(ImportError):  # PEFT reports one that is broken
            import bitsandbytes  # noqa: F401


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """As if it were not installed; nothing changes where it is imported already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


def _is_shown(record: logging.LogRecord) -> bool:
    if record.levelno < logging.ERROR and record.name.partition(".")[0] != "lora_sweep":
        return False
    # What it names may come from outside.
    record.msg, record.args = printable(record.getMessage()), ()
    return True


def _drop(*_: Any, **__: Any) -> None:
    """In place of warnings.showwarning: filters that raise still do."""
