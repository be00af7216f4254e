"""Quantized bases: what they hold, and that a packed slot on one equals PEFT on the same one."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from conftest import config_of
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from processor import BF16_ATTENTION, BF16_PRODUCTS, EIGHT_BITS, FOUR_BITS, VECTORS, as_found, either, off, on
from safetensors import safe_open
from safetensors.torch import load_file
from test_pack import IGNORED, MakeTrial, largest_difference, losses, mean_loss, packed, peft_losses
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lora_sweep.adapters.peft_template import PeftTemplate, peft_config
from lora_sweep.base import cpu_bf16, quant, skeleton
from lora_sweep.base.load import LoadedBase
from lora_sweep.base.load import load as load_base
from lora_sweep.data import Data
from lora_sweep.errors import ConfigError
from lora_sweep.pack import Pack, Settings, Trial
from lora_sweep.runner import estimate
from lora_sweep.sweep import sweep_file
from lora_sweep.tiny.pretrain import WEIGHTS

pytestmark = pytest.mark.filterwarnings(IGNORED)

CPU = torch.device("cpu")
DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}

Bases = Callable[[str, str], LoadedBase]


@pytest.fixture(scope="module")
def bases() -> Bases:
    """bases(kind, dtype): the embedded base, loaded once each, and once more where bf16 instructions are held off."""
    loaded: dict[tuple[str, str, bool], LoadedBase] = {}

    def of(kind: str, dtype: str) -> LoadedBase:
        key = kind, dtype, cpu_bf16._has_bf16()
        if key not in loaded:
            model = config_of(f"model.quantization={kind}", f"model.dtype={dtype}").model
            loaded[key] = load_base(model, CPU)
        return loaded[key]

    return of


@pytest.fixture(scope="module")
def few(style: Data) -> Data:
    """The style task with little to evaluate: de-quantizing costs as much for one row as for many."""
    return replace(style, evaluation=style.evaluation.take(np.arange(4)), probe=style.probe.take(np.arange(2)))


def theirs(kind: str, dtype: str, folder: Path = WEIGHTS, has_kernel: bool = False) -> Any:
    """The same base as a user of transformers and PEFT quantizes it.

    8-bit in training mode: there bitsandbytes takes the activations as they are on a CPU, elsewhere it rounds them.
    4-bit without the kernel of its own that bitsandbytes evaluates with where the processor has AVX512-BF16, unless
    `has_kernel`.
    """
    settings = BitsAndBytesConfig(load_in_8bit=True)
    if kind == "nf4":
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPE[dtype],
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE[dtype], quantization_config=settings)
    if not has_kernel:
        for each in model.modules():  # as lora_sweep/study/README.md has it
            each.support_avx512bf16_for_cpu = False
    return model.train(kind == "int8")


def three(trial: MakeTrial, steps: int, **shared: Any) -> list[Trial]:
    """Ranks, scalings and rates of their own."""
    shared |= {"max_steps": steps, "eval_every": steps, "batch_size": 2, "eval_batch_size": 4}
    return [
        trial(0, rank=8, alpha=16.0, base_lr=5e-4, **shared),
        trial(1, rank=4, alpha=8.0, ratio=4.0, base_lr=2e-4, **shared),
        trial(2, rank=16, alpha=16.0, use_rslora=True, base_lr=2e-4, **shared),
    ]


# -- training ------------------------------------------------------------------------------------------------------


def assert_packed_slots_equal_peft(
    bases: Bases, few: Data, trials: list[Trial], kind: str, dtype: str, tolerance: float
) -> None:
    for one, evaluation in zip(trials, packed(bases(kind, dtype), few, trials), strict=True):
        mine = losses(evaluation)
        assert all(measured.delta_rel > 0 for measured in evaluation.measurements)
        assert largest_difference(mine, peft_losses(theirs(kind, dtype), few, one)) < tolerance


@pytest.mark.parametrize(
    "kind", [pytest.param("nf4", marks=off(FOUR_BITS)), pytest.param("int8", marks=off(EIGHT_BITS))]
)
@pytest.mark.parametrize("steps", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_a_packed_slot_equals_peft_on_the_same_quantized_base(
    bases: Bases, few: Data, trial: MakeTrial, kind: str, steps: int
) -> None:
    """2e-7 after 30 steps."""
    assert_packed_slots_equal_peft(bases, few, three(trial, steps), kind, "fp32", 1e-6)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("bf16", either(BF16_PRODUCTS, BF16_ATTENTION), indirect=True)
def test_a_packed_slot_is_near_peft_on_the_same_quantized_base_in_bf16(
    bases: Bases, few: Data, trial: MakeTrial, kind: str, bf16: bool
) -> None:
    """PEFT rounds s B A x to bf16 before it adds, the pack adds in fp32."""
    assert_packed_slots_equal_peft(bases, few, three(trial, 2), kind, "bf16", 1e-2)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradient_checkpointing_changes_no_loss_on_a_quantized_base(
    bases: Bases, few: Data, trial: MakeTrial, kind: str
) -> None:
    plain, again = (
        packed(bases(kind, "fp32"), few, three(trial, 2, dropout=0.1, gradient_checkpointing=each))
        for each in (False, True)
    )
    for mine, other in zip(plain, again, strict=True):
        assert largest_difference(losses(mine), losses(other)) < 1e-6


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_rows_never_mix_in_a_quantized_linear(bases: Bases, kind: str) -> None:
    linear = bases(kind, "fp32").model.model.layers[1].mlp.up_proj
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))
    hot = x.clone()
    hot[1, :, 3] = 1000.0
    wild = x.clone()
    wild[1] = torch.nan
    for other in (hot, wild):
        assert torch.equal(linear(x)[0], linear(other)[0])
    through = x.requires_grad_()
    linear(through).sum().backward()
    assert torch.allclose(through.grad[0, 0], quant.dequantized(linear).sum(dim=0), rtol=1e-4, atol=1e-5)


def exported(base: LoadedBase, data: Data, one: Trial, folder: Path) -> float:
    """Trains the trial, writes its adapter, and returns the loss recorded for it, which is below the base's."""
    pack = Pack(base, data, Settings.of(one), 8)
    slot = pack.admit(one)
    evaluation, before = pack.advance()[0], pack.evaluate_base().eval_loss
    pack.export(slot)(folder)
    pack.close()
    assert evaluation.eval_loss < before * 0.99
    return evaluation.eval_loss


def short(trial: MakeTrial, **knobs: Any) -> Trial:
    shape = {"max_steps": 4, "eval_every": 4, "batch_size": 2, "eval_batch_size": 4, "slots": 2}
    return trial(0, rank=4, ratio=4.0, base_lr=1e-3, **shape, **knobs)


@pytest.mark.parametrize(
    "kind", [pytest.param("nf4", marks=off(FOUR_BITS)), pytest.param("int8", marks=off(EIGHT_BITS))]
)
def test_an_exported_adapter_gives_the_recorded_loss_on_the_same_quantized_base(
    bases: Bases, few: Data, trial: MakeTrial, kind: str, tmp_path: Path
) -> None:
    base = bases(kind, "fp32")
    recorded = exported(base, few, short(trial), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == base.name_or_path
    loaded = PeftModel.from_pretrained(theirs(kind, "fp32", Path(base.name_or_path)), str(tmp_path)).train(
        kind == "int8"
    )
    assert mean_loss(loaded, few.evaluation) == pytest.approx(recorded, rel=1e-5)


@pytest.fixture
def even(tmp_path: Path) -> Path:
    """A base of random weights whose sizes are multiples of 32, with the embedded one's tokenizer."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    folder = tmp_path / "even"
    LlamaForCausalLM(LlamaConfig(vocab_size=1024, initializer_range=0.2, **shape)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(WEIGHTS).save_pretrained(folder)
    return folder


@on(FOUR_BITS)
def test_the_4bit_kernel_of_bitsandbytes_gives_an_exported_adapter_another_loss(
    even: Path, few: Data, trial: MakeTrial, tmp_path: Path
) -> None:
    """It rounds activations and scales to bf16 in an fp32 base too; lora_sweep/study/README.md has size and switch."""
    base = load_base(
        config_of("model=local", f"model.path={even}", "model.dtype=fp32", "model.quantization=nf4").model, CPU
    )
    recorded = exported(base, few, short(trial), tmp_path)
    errors = []
    for has_kernel in (True, False):
        stock = theirs("nf4", "fp32", even, has_kernel)
        errors.append(abs(mean_loss(PeftModel.from_pretrained(stock, str(tmp_path)).eval(), few.evaluation) - recorded))
    assert errors[1] < 1e-5 * recorded
    assert 5e-5 * recorded < errors[0] < 1e-3 * recorded


@on(FOUR_BITS)
@pytest.mark.parametrize(
    ("d_in", "d_out", "message"),
    [(128, 48, "N must be divisible by block_n"), (96, 64, "is invalid for input of size"), (128, 64, None)],
)
def test_the_4bit_kernel_of_bitsandbytes_refuses_odd_sizes(d_in: int, d_out: int, message: str | None) -> None:
    """Output sizes that are no multiple of 32, input sizes that are none of 64; README.md's switch is a remedy."""
    layers = [bitsandbytes.nn.Linear4bit(d_in, d_out, bias=False, quant_type="nf4").to(CPU) for _ in range(2)]
    layers[1].support_avx512bf16_for_cpu = False
    x = torch.randn(2, d_in)
    with torch.no_grad():
        assert torch.isfinite(layers[1].eval()(x)).all()
        if message is None:
            assert torch.isfinite(layers[0].eval()(x)).all()
            return
        with pytest.raises((AssertionError, RuntimeError), match=message):
            layers[0].eval()(x)


@on(FOUR_BITS)
def test_the_4bit_kernel_of_bitsandbytes_refuses_the_embedded_base() -> None:
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        with pytest.raises(AssertionError, match="N must be divisible by block_n"):
            theirs("nf4", "fp32", has_kernel=True)(input_ids=ids)
        assert torch.isfinite(theirs("nf4", "fp32")(input_ids=ids).logits).all()


@off(EIGHT_BITS)
def test_no_8bit_linear_takes_the_product_of_bitsandbytes(
    bases: Bases, few: Data, trial: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It rounds the activations too, in a kernel that only some processors have."""
    one = short(trial)
    expected = packed(bases("int8", "fp32"), few, [one])[0]
    for name in ("int8_linear_matmul", "int8_mixed_scaled_mm", "int8_scaled_mm"):
        monkeypatch.setattr(f"bitsandbytes.functional.{name}", None, raising=False)
        monkeypatch.setattr(torch.ops.bitsandbytes, name, None)
    again = packed(bases("int8", "fp32"), few, [one])[0]
    assert torch.equal(losses(expected), losses(again))
    assert expected.eval_loss == again.eval_loss


@on(EIGHT_BITS)
def test_the_8bit_product_of_bitsandbytes_gives_an_exported_adapter_another_loss(
    bases: Bases, few: Data, trial: MakeTrial, tmp_path: Path
) -> None:
    base = bases("int8", "fp32")
    recorded = exported(base, few, short(trial), tmp_path)
    loaded = PeftModel.from_pretrained(theirs("int8", "fp32", Path(base.name_or_path)), str(tmp_path)).eval()
    difference = abs(mean_loss(loaded, few.evaluation) / recorded - 1)
    assert 5e-5 < difference < 2e-3


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_peft_draws_the_same_initial_A_on_the_skeleton_as_on_the_quantized_base(
    bases: Bases, kind: str, dtype: str
) -> None:
    base = bases(kind, dtype)
    settings = peft_config(4, 8, False, 0.0, "all-linear")
    mine = PeftTemplate(base.skeleton(), base.name_or_path).initial(settings, 7)
    torch.manual_seed(7)
    real = get_peft_model(theirs(kind, dtype), settings).base_model.model
    other = {
        name: layer.lora_A["default"].weight for name, layer in real.named_modules() if isinstance(layer, LoraLayer)
    }
    assert list(mine) == list(other)
    for name, A in other.items():
        assert mine[name].dtype == A.dtype == torch.float32
        assert torch.equal(mine[name], A)


# -- what it holds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_weight_norm_that_health_divides_by_is_of_the_dequantized_weight(
    bases: Bases, few: Data, trial: MakeTrial, kind: str, tmp_path: Path
) -> None:
    base = bases(kind, "fp32")
    one = trial(0, rank=4, max_steps=1, eval_every=1, batch_size=2, slots=1, target_modules=["o_proj"])
    names = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(4)]
    # What the layer does to the unit vectors is its weight.
    weights = [base.model.get_submodule(name)(torch.eye(128)[None])[0].T for name in names]
    pack = Pack(base, few, Settings.of(one), 4)
    slot = pack.admit(one)
    (measured,) = pack.advance()[0].measurements
    pack.export(slot)(tmp_path)
    pack.close()
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    changes = [
        adapter[f"base_model.model.{name}.lora_B.weight"] @ adapter[f"base_model.model.{name}.lora_A.weight"]
        for name in names
    ]
    changed, norm = (sum(float(each.double().norm() ** 2) for each in all_) ** 0.5 for all_ in (changes, weights))
    assert changed > 0
    assert measured.delta_rel == pytest.approx(one.scaling * changed / norm, rel=1e-4)


@as_found(VECTORS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_4bit_weight_is_its_code_times_the_scale_of_its_block(bases: Bases, dtype: str) -> None:
    """By hand, from what the layer stores (2305.14314): two numbers a byte, the scales in 8 bits around their mean."""
    linear = bases("nf4", dtype).model.model.layers[0].mlp.up_proj
    packed_codes, state = linear.weight.data.flatten(), linear.weight.quant_state
    codes = torch.stack([packed_codes >> 4, packed_codes & 15], dim=1).flatten().long()
    nested = state.state2
    scales = (
        nested.code[state.absmax.long()].view(-1)
        * nested.absmax.repeat_interleave(nested.blocksize)[: len(state.absmax)]
    )
    by_hand = state.code[codes] * (scales + state.offset).repeat_interleave(state.blocksize)
    weight = quant.dequantized(linear)
    assert weight.dtype == DTYPE[dtype]
    expected = by_hand.view(weight.shape).to(weight.dtype)
    assert torch.allclose(weight.float(), expected.float(), rtol=2.0**-8 if dtype == "bf16" else 1e-6, atol=1e-9)


def test_a_quantized_base_says_what_it_really_holds(bases: Bases) -> None:
    plain = {dtype: load_base(config_of(f"model.dtype={dtype}").model, CPU) for dtype in DTYPE}
    assert plain["fp32"].bytes == sum(
        each.numel() * each.element_size()
        for each in [*plain["fp32"].model.parameters(), *plain["fp32"].model.buffers()]
    )
    assert plain["bf16"].bytes == pytest.approx(plain["fp32"].bytes / 2, rel=0.001)
    assert bases("nf4", "bf16").bytes < bases("int8", "bf16").bytes < 0.6 * plain["bf16"].bytes
    counts = {bases(kind, "bf16").parameters for kind in ("nf4", "int8")} | {each.parameters for each in plain.values()}
    assert counts == {sum(each.numel() for each in plain["fp32"].model.parameters())}


def test_plan_reports_the_memory_of_the_quantized_base(bases: Bases) -> None:
    small = ["data.subjects=8", "data.eval_size=2", "data.probe_size=2", "train.slots=1", "launcher.device=cpu"]
    sweep, faults = sweep_file.read(None, ["model.quantization=nf4", "model.dtype=bf16", *small])
    assert not faults
    loaded = estimate.plan(sweep)
    base = bases("nf4", "bf16")
    assert (loaded["base_mib"], loaded["base_parameters"]) == (base.bytes / 2**20, base.parameters)
    assert (loaded["dtype"], loaded["quantization"]) == ("bf16", "nf4")


def test_the_unquantized_weights_are_kept_and_the_quantized_base_is_made_from_them(tmp_path: Path) -> None:
    model = config_of("model.quantization=nf4").model
    base = load_base(model, CPU, tmp_path)
    assert base.name_or_path == str(tmp_path / "base")
    assert "quantization_config" not in json.loads((tmp_path / "base/config.json").read_text())
    with safe_open(tmp_path / "base/model.safetensors", framework="pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F32"}  # noqa: SIM118
    again = load_base(replace(model, quantization=None), CPU, tmp_path)
    assert again.name_or_path == base.name_or_path, "both are made from one"
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=ids).logits, theirs("nf4", "fp32")(input_ids=ids).logits)


def test_a_checkpoint_that_is_quantized_on_disk_loads_as_it_is(bases: Bases, tmp_path: Path) -> None:
    theirs("nf4", "bf16").save_pretrained(tmp_path)
    bases("nf4", "bf16").tokenizer.save_pretrained(tmp_path)
    model = replace(config_of("model=local", f"model.path={tmp_path}").model, dtype="auto")
    assert skeleton.check(model, "all-linear") == []
    base = load_base(model, CPU)
    assert base.dtype == torch.bfloat16
    assert (base.bytes, base.parameters) == (bases("nf4", "bf16").bytes, bases("nf4", "bf16").parameters)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=ids).logits, bases("nf4", "bf16").model(input_ids=ids).logits)
    (fault,) = skeleton.check(replace(model, quantization="nf4"), "all-linear")
    assert str(fault).startswith("model.quantization: the checkpoint is quantized already, got 'nf4'")


# -- faults --------------------------------------------------------------------------------------------------------


def test_without_bitsandbytes_a_quantized_base_is_a_fault_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = config_of("model.quantization=int8").model
    (fault,) = skeleton.check(model, "all-linear")
    assert str(fault) == ("model.quantization: needs the extra `quant`, got 'int8' (pip install \"lora-sweep[quant]\")")
    with pytest.raises(ConfigError, match="needs the extra `quant`"):
        load_base(model, CPU)


def test_double_precision_and_other_methods_of_quantization_are_faults(tmp_path: Path) -> None:
    (fault,) = skeleton.check(config_of("model.quantization=nf4", "model.dtype=fp64").model, "all-linear")
    assert str(fault).startswith("model.quantization: computes in fp32 or bf16, not in fp64")
    config = json.loads((WEIGHTS / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    (fault,) = skeleton.check(config_of("model=local", f"model.path={tmp_path}").model, "all-linear")
    assert str(fault).startswith("model.path: is quantized by gptq; only bitsandbytes is supported")
