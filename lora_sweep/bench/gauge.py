"""What a device can do and what it holds."""

import ctypes
import gc
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lora_sweep.system.memory import Peak

MATMUL_SIDES = (512, 1024, 2048, 4096, 8192)
MATMUL_RUNS = 5
QUICK_SECONDS = 0.05


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Flop/s of the fastest product of two square matrices (as in a linear layer) in `dtype`, measured here.

    2 n^3 flop each; n goes through MATMUL_SIDES as long as a product is quick: a CPU without bf16 arithmetic takes its
    time. With torch's settings as they are; what neighbours on the machine take lowers it like any other measurement.
    """
    best = 0.0
    for side in MATMUL_SIDES:
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        fastest = float("inf")
        for _ in range(1 + MATMUL_RUNS):
            wait(device)
            began = time.perf_counter()
            functional.linear(a, b)
            wait(device)
            fastest = min(fastest, time.perf_counter() - began)
        best = max(best, 2 * side**3 / fastest)
        if fastest > QUICK_SECONDS:
            break
    return best


def multiplied_parameters(model: Any) -> int:
    """N: parameters of the base that every token is multiplied with.

    All of them (tied ones once, quantized ones as many as they stand for; a dense model is assumed) without the
    embeddings, which are looked up; the input embedding counts where it is tied to the output layer, which multiplies.
    """
    head = model.get_output_embeddings()
    tied = None if head is None else head.weight
    embeddings = {
        id(module.weight): module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.weight is not tied
    }
    return int(model.num_parameters()) - sum(embeddings.values())


def flop(multiplied: int, trained_tokens: int, evaluated_tokens: int) -> int:
    """4 N a token trained on (2 N forward, 2 N back to the activations: frozen weights need no gradient), 2 N a token
    evaluated; attention scores and the adapters' own products are left out."""
    return multiplied * (4 * trained_tokens + 2 * evaluated_tokens)


def fresh_peak(device: torch.device) -> Peak:
    """The peak of what comes now, after freed memory was given back."""
    gc.collect()
    wait(device)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if device.type == "cpu" and trim is not None:
        trim(0)
    return Peak(device)
