"""bf16 on a processor without bf16 instructions: the same products, rounded once, and much faster."""

from collections.abc import Iterator

import pytest
import torch
from processor import BF16_ATTENTION, BF16_PRODUCTS, off, on
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from lora_sweep.base import cpu_bf16

SMALL = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
CPU = torch.device("cpu")


def model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, **SMALL)
    else:
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(**shape, **SMALL)
    model: nn.Module = AutoModelForCausalLM.from_config(config).bfloat16().requires_grad_(False).eval()
    return model


def assert_rounded_once(linear: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x with its gradient, output, the output's gradient), both products held to one rounding of those in fp64."""
    weight = cpu_bf16.weight(linear, torch.bfloat16)
    x = torch.randn(3, 5, weight.shape[1]).bfloat16().requires_grad_()
    y = linear(x)
    exact = x.double() @ weight.double().T
    if linear.bias is not None:
        exact = exact + linear.bias.double()
    assert y.dtype == torch.bfloat16
    # Half of bf16's last of 8 bits.
    assert torch.allclose(y.double(), exact, rtol=2.0**-8, atol=1e-6)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    assert x.grad is not None
    assert torch.allclose(x.grad.double(), gradient.double() @ weight.double(), rtol=2.0**-8, atol=1e-6)
    return x, y, gradient


@off(BF16_PRODUCTS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_linear_gives_the_rounded_product_and_passes_the_rounded_gradient_down(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_bf16, "_has_bf16", lambda: False)
    base = model(kind)
    cpu_bf16.patch_linears(base, CPU)
    linears = {name: module for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    assert len(linears) >= 5
    assert cpu_bf16.multiplied_dtype(base) == torch.float32
    for linear in linears.values():
        x, y, gradient = assert_rounded_once(linear)
        assert torch.equal(cpu_bf16.input_gradient(linear, cpu_bf16.widened(linear, gradient)), x.grad)
        assert torch.equal(cpu_bf16.product(linear, cpu_bf16.widened(linear, x)), y)


@on(BF16_PRODUCTS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_with_bf16_instructions_the_products_are_rounded_once_too(kind: str) -> None:
    """So a base gives the same numbers on either processor, but for the order of its sums."""
    base = model(kind)
    cpu_bf16.patch_linears(base, CPU)
    linears = [module for module in base.modules() if isinstance(module, nn.Linear | Conv1D)]
    assert cpu_bf16.multiplied_dtype(base) == torch.bfloat16
    for linear in linears:
        assert "forward" not in vars(linear)
        assert_rounded_once(linear)


@off(BF16_PRODUCTS)
@off(BF16_ATTENTION)
@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
@pytest.mark.parametrize(
    ("isa", "has_bf16"),
    [("AVX2", False), ("AVX2_VNNI_2", False), ("avx512_core", False), ("AVX512_CORE_AMX", True), ("DEFAULT", True)],
)
def test_instructions_that_onednn_is_told_to_leave_alone_are_as_good_as_absent(
    variable: str, isa: str, has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setenv(variable, isa)
    base = model("llama")
    cpu_bf16.patch_linears(base, CPU)
    assert (cpu_bf16.multiplied_dtype(base) == torch.bfloat16) == has_bf16


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_where_there_is_nothing_to_widen_all_stays_as_it_is(
    has_bf16: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_bf16, "_has_bf16", lambda: has_bf16)
    base = model("llama").to(dtype)
    cpu_bf16.patch_linears(base, CPU)
    linear = next(module for module in base.modules() if isinstance(module, nn.Linear))
    x = torch.randn(2, 3, 32, dtype=dtype)
    assert "forward" not in vars(linear)
    assert cpu_bf16.multiplied_dtype(base) == dtype
    assert torch.equal(linear(x), functional.linear(x, linear.weight))
    assert torch.equal(cpu_bf16.input_gradient(linear, x), x @ linear.weight)


def test_a_gpu_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_bf16, "_has_bf16", lambda: False)
    base = model("llama")
    cpu_bf16.patch_linears(base, torch.device("cuda"))
    assert not any("forward" in vars(module) for module in base.modules() if isinstance(module, nn.Linear))


def attended(base: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]]:
    """(output, the same in fp64, of each gradient the same two), without a mask and with each kind of one."""
    attend = ALL_ATTENTION_FUNCTIONS[base.config._attn_implementation]
    layer = base.model.layers[0].self_attn
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 24, 16).bfloat16().requires_grad_() for _ in range(3))
    causal = torch.ones(24, 24, dtype=torch.bool).tril()
    windowed = causal & ~causal.tril(-8)
    additive = torch.zeros(24, 24).masked_fill(~windowed, -1e4).bfloat16()
    for mask, visible in ((None, causal), (windowed, windowed), (additive, windowed)):
        given = None if mask is None else mask.expand(2, 1, 24, 24)
        y, _ = attend(layer, q, k, v, given, scaling=0.25)
        exact = functional.scaled_dot_product_attention(*(each.double() for each in (q, k, v)), visible, scale=0.25)
        gradient = torch.randn_like(y)
        gradients = torch.autograd.grad(y, (q, k, v), gradient)
        wanted = torch.autograd.grad(exact, (q, k, v), gradient.transpose(1, 2).double())
        assert y.dtype == torch.bfloat16
        pairs = [(mine.double(), theirs) for mine, theirs in zip(gradients, wanted, strict=True)]
        yield y.detach().transpose(1, 2).double(), exact.detach(), pairs


@off(BF16_ATTENTION)
def test_a_widened_base_attends_in_fp32_and_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_bf16, "_has_bf16", lambda: False)
    base = model("llama")
    cpu_bf16.patch_linears(base, CPU)
    for y, exact, gradients in attended(base):
        assert torch.allclose(y, exact, rtol=2.0**-8, atol=1e-6)
        for mine, wanted in gradients:
            assert torch.allclose(mine, wanted.double(), rtol=2.0**-7, atol=1e-5)


@on(BF16_ATTENTION)
def test_with_bf16_instructions_attention_is_torchs_own() -> None:
    """Its probabilities are rounded to bf16 as well."""
    base = model("llama")
    cpu_bf16.patch_linears(base, CPU)
    assert base.config._attn_implementation == "sdpa"
    for y, exact, gradients in attended(base):
        assert torch.allclose(y, exact, rtol=2.0**-8, atol=2.0**-8 * float(exact.abs().max()))
        for mine, wanted in gradients:
            assert torch.allclose(mine, wanted.double(), rtol=2.0**-7, atol=2.0**-7 * float(wanted.abs().max()))


def test_a_base_whose_attention_somebody_chose_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_bf16, "_has_bf16", lambda: False)
    base = model("llama")
    base.set_attn_implementation("eager")
    cpu_bf16.patch_linears(base, CPU)
    assert base.config._attn_implementation == "eager"
