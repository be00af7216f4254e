"""Paths that a computation takes on some processors only: which this machine has, which the tests took.

`TEST_PROCESSOR=avx2 pytest` runs the tests as a processor without AVX512 and bf16 instructions would, as far as the
libraries can be told so. Imported before torch, which reads what is set here.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest

WANTED = os.environ.get("TEST_PROCESSOR", "native")
MASKS = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
"""What torch's own kernels, oneDNN and MKL read."""
IS_MASKED = WANTED == "avx2"

if WANTED not in ("native", "avx2"):
    raise pytest.UsageError(f"TEST_PROCESSOR: must be native or avx2, got {WANTED!r}")
if IS_MASKED:
    os.environ.update(MASKS)


class Path(NamedTuple):
    """A path of one library, named as in tests/README.md."""

    name: str
    is_there: Callable[[], bool]
    """On this processor, masked or not."""


def _has_bf16() -> bool:
    from lora_sweep.base import cpu_bf16

    return cpu_bf16._has_bf16()


def _has_avx512() -> bool:
    import torch

    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def _has_4bit_kernel() -> bool:
    if IS_MASKED:
        return False
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


def _has_two_cores() -> bool:
    return (os.cpu_count() or 1) > 1


FOUR_BITS = Path("bitsandbytes' 4-bit evaluation kernel", _has_4bit_kernel)
EIGHT_BITS = Path("bitsandbytes' 8-bit product", _has_avx512)
BF16_PRODUCTS = Path("bf16 products", _has_bf16)
BF16_ATTENTION = Path("bf16 attention", _has_bf16)
VECTORS = Path("AVX512 in torch, oneDNN and MKL", _has_avx512)
THREADS = Path("two threads", _has_two_cores)
PATHS = (FOUR_BITS, EIGHT_BITS, BF16_PRODUCTS, BF16_ATTENTION, VECTORS, THREADS)


def off(path: Path) -> pytest.MarkDecorator:
    """Marks a test that holds with the path off, on any machine."""
    return pytest.mark.processor(path.name, "off")


def on(path: Path) -> pytest.MarkDecorator:
    """Marks a test that takes the path; skipped where the processor has none."""
    return pytest.mark.processor(path.name, "on")


def as_found(path: Path) -> pytest.MarkDecorator:
    """Marks a test that takes the path where the processor has it and does without elsewhere: nothing can switch it."""
    return pytest.mark.processor(path.name, "as found")


def either(path: Path, *more: Path) -> list[Any]:
    """False and True as values of a parameter: one test with the paths off, and on where they are there."""
    paths = (path, *more)
    return [
        pytest.param(is_on, id=name, marks=[mark(each) for each in paths])
        for is_on, name, mark in ((False, "off", off), (True, "on", on))
    ]


def mask_bitsandbytes() -> None:
    """It reads nothing from the environment."""
    import bitsandbytes

    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False


def note_paths(item: pytest.Item) -> None:
    """Has an item's report say which paths it took; skips what this processor has no path for."""
    there = {path.name: path.is_there for path in PATHS}
    lacking = []
    for mark in item.iter_markers("processor"):
        name, state = mark.args
        if state == "as found":
            state = "on" if there[name]() else "off"
        elif state == "on" and not there[name]():
            lacking.append(name)
        item.user_properties.append(("processor", (name, state)))
    if lacking:
        pytest.skip(f"this processor has no {', no '.join(lacking)}{' (masked)' if IS_MASKED else ''}")


def summary(outcomes: Iterable[tuple[str, Any]]) -> list[str]:
    """Lines for the end of a run, of (passed, failed or skipped; properties of the report)."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for outcome, properties in outcomes:
        counts.update((*taken, outcome) for key, taken in map(tuple, properties) if key == "processor")
    lines = [_machine()]
    for path in PATHS:
        parts = []
        for state in ("off", "on"):
            capabilities = [(outcome, counts[path.name, state, outcome]) for outcome in ("passed", "failed", "skipped")]
            said = ", ".join(f"{count} {outcome}" for outcome, count in capabilities if count)
            parts.append(f"{state}: {said or 'none run'}")
        lines.append(f"  {path.name}: {'; '.join(parts)}")
    return lines if counts else []


def _machine() -> str:
    import torch

    capabilities = torch.cpu.get_capabilities()
    supported = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "sve_bf16") if capabilities.get(name)]
    masked = "; masked to AVX2" if IS_MASKED else ""
    return f"processor: {capabilities.get('cpu_name', capabilities['architecture'])} ({', '.join(supported)}){masked}"
