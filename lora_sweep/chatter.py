"""What libraries say of themselves on stderr, and how little of it a person is shown.

It comes in four ways: by `logging` where nobody has set up a handler, by `warnings`, by tqdm's bars, and through
handlers that a library installs for itself. Errors are shown whoever logs them.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def silenced() -> Iterator[None]:
    """Keeps it off stderr while a verb runs; this package's own warnings and anybody's errors are written.

    Imports nothing heavy: what it sets in the environment is read when the libraries are imported. `-W` and
    PYTHONWARNINGS bring warnings back, TQDM_DISABLE and HF_HUB_VERBOSITY in the environment stay as they are.
    """
    # transformers' reader of GGUF files draws a bar of its own, whatever transformers' setting is.
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Read when the hub's client is imported; it logs each of its retries.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # Either value keeps tokenizers from warning once something forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Where the processor has AVX512-BF16, bitsandbytes asks this package for a kernel from the hub as soon as it is
    # imported. Nothing here computes with that kernel, and nothing should be fetched unasked.
    hides_kernels = "kernels" not in sys.modules
    if hides_kernels:
        sys.modules["kernels"] = None  # type: ignore[assignment]
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
        if hides_kernels:
            sys.modules.pop("kernels", None)


def quieten_imported() -> None:
    """Takes the bars and the own handlers of transformers and datasets away; imports both."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _is_shown(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or record.name.partition(".")[0] == "lora_sweep"


def _drop(*_: Any, **__: Any) -> None:
    """In place of warnings.showwarning: filters that raise still do."""
