"""`lora-sweep inspect`: adapters that plain PEFT made, measured as PEFT and linear algebra have it, and judged."""

import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, Lfm2Config, Lfm2ForCausalLM, LlamaConfig, LlamaForCausalLM

from lora_sweep.adapters import keys, reader
from lora_sweep.cli import main as cli
from lora_sweep.errors import ConfigError, UserError
from lora_sweep.inspection import Inspection, inspect
from lora_sweep.system.bounds import bounded

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
WEIGHTS = "adapter_model.safetensors"


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, tie_word_embeddings=tied, **sizes))


def trained(model: Any, steps: int = 4) -> Any:
    """PEFT's model after a few steps of AdamW on random tokens."""
    torch.manual_seed(1)
    tokens = torch.randint(0, 64, (4, 12))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    return model


Make = Callable[..., tuple[Path, Any]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(steps, r=..., ...): (the folder that PEFT saved, PEFT's model in memory)."""

    def adapter_folder(steps: int = 4, on: Any = None, name: str = "adapter", **settings: Any) -> tuple[Path, Any]:
        config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ATTENTION} | settings))
        model = trained(get_peft_model(on or llama(), config), steps)
        model.save_pretrained(str(tmp_path / name))
        return tmp_path / name, model

    return adapter_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return str(folder)


def one(folder: Path, base: str | None = None) -> Inspection:
    missing, errors = inspect(folder, base)
    assert errors == []
    (report,) = missing
    return report


def layers(model: Any) -> Iterator[tuple[str, Any]]:
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            yield name, layer


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def agrees_with_peft(adapter_folder: Inspection, model: Any) -> None:
    """s, rank, s|BA| and stable rank against PEFT's own scaling and its explicit delta."""
    by_name = {each.name: each for each in adapter_folder.modules}
    assert by_name.keys() == {name for name, _ in layers(model)}
    for name, layer in layers(model):
        mine, delta = by_name[name], layer.get_delta_weight("default").detach().double()
        singular = torch.linalg.svdvals(delta)
        assert mine.scaling == pytest.approx(layer.scaling["default"], rel=1e-12)
        assert mine.rank == layer.r["default"]
        assert mine.delta_norm == pytest.approx(float(delta.norm()), rel=1e-5, abs=1e-12 if mine.dead is None else 1e-6)
        if mine.dead is None:
            expected = float(singular.square().sum() / singular[0] ** 2)
            assert mine.stable_rank == pytest.approx(expected, rel=1e-5)
        A, B = (
            (layer.lora_embedding_A["default"], layer.lora_embedding_B["default"])
            if len(layer.lora_embedding_A)
            else (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        )
        assert mine.norm_A == pytest.approx(float(A.detach().norm()), rel=1e-5)
        assert mine.rms_B == pytest.approx(float(B.detach().square().mean().sqrt()), rel=1e-5)
        assert mine.absmax_B == float(B.detach().abs().max())
        assert mine.exact_zero_A == float((A == 0).double().mean())
        assert mine.parameters >= A.numel() + B.numel()


# -- the twelve ------------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_is_untrained_and_may_as_well_be_lost_on_save(make: Make) -> None:
    report = one(make(steps=0)[0])
    assert report.verdict == "untrained"
    assert "fresh" in report.sentence and "lost on save" in report.sentence
    assert all(each.exact_zero_B == 1 and each.dead == "B = 0" and each.delta_norm == 0 for each in report.modules)
    assert all(each.stable_rank is None and each.zero_start == "B" for each in report.modules)


def test_a_trained_adapter_is_healthy_and_measured_as_peft_has_it(make: Make) -> None:
    folder, model = make()
    report = one(folder)
    assert report.verdict == "healthy"
    agrees_with_peft(report, model)
    assert report.parameters == sum(each.numel() for each in model.parameters() if each.requires_grad)


def test_a_dead_layer_is_named(make: Make) -> None:
    folder, _ = make()
    name = "model.layers.1.self_attn.v_proj"
    change(folder, lambda tensors: tensors[f"base_model.model.{name}.lora_B.weight"].zero_())
    report = one(folder)
    assert report.verdict == "partially_dead"
    assert [each.name for each in report.modules if each.dead] == [name]
    assert f"1 of 8 modules change nothing: {name} (B = 0)" in report.sentence


def test_a_zeroed_file_is_untrained_and_said_to_be_beyond_training(make: Make) -> None:
    folder, _ = make()
    change(folder, lambda tensors: [each.zero_() for each in tensors.values()])
    report = one(folder)
    assert report.verdict == "untrained"
    assert "A = B = 0, which no training leaves" in report.sentence


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_breaks_the_adapter(make: Make, value: float) -> None:
    folder, _ = make()
    name = "model.layers.0.self_attn.k_proj"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"base_model.model.{name}.lora_A.weight"][0, :3] = value

    change(folder, spoil)
    report = one(folder)
    assert report.verdict == "broken"
    assert name in report.sentence
    (spoilt,) = [each for each in report.modules if each.nonfinite]
    assert (spoilt.name, spoilt.nonfinite, spoilt.delta_norm, spoilt.norm_A) == (name, 3, None, None)


@pytest.mark.parametrize("size", [1e200, 1e100])
def test_factors_whose_product_is_beyond_fp64_break_the_adapter(make: Make, run: Any, size: float, base: str) -> None:
    folder, _ = make()
    name = "base_model.model.model.layers.0.self_attn.k_proj"
    huge = {f"{name}.lora_A.weight": (4, 32), f"{name}.lora_B.weight": (16, 4)}
    change(
        folder,
        lambda tensors: tensors.update(
            {key: torch.full(shape, size, dtype=torch.float64) for key, shape in huge.items()}
        ),
    )
    code, out, err = run("inspect", str(folder), "--json", "--base", base)
    (adapter,) = json.loads(out)["adapters"]
    assert (code, err, adapter["verdict"]) == (0, "", "broken")
    assert "so large that BA is not finite in model.layers.0.self_attn.k_proj" in adapter["sentence"]


def test_dora_is_measured_as_peft_merges_it(make: Make, base: str) -> None:
    folder, model = make(use_dora=True)
    report = one(folder, base)
    assert report.verdict == "healthy" and report.use_dora
    before = {name: layer.get_base_layer().weight.detach().double() for name, layer in layers(model)}
    magnitudes = {name: layer.lora_magnitude_vector["default"].weight.detach() for name, layer in layers(model)}
    merged = model.merge_and_unload()
    for each in report.modules:
        W, now = before[each.name], merged.get_submodule(each.name).weight.detach().double()
        assert each.delta_rel == pytest.approx(float((now - W).norm() / W.norm()), rel=1e-4)
        deviation = (magnitudes[each.name].double() / W.norm(dim=1) - 1).abs().max()
        assert each.magnitude_deviation == pytest.approx(float(deviation), rel=1e-4)
    assert any("DoRA" in note for note in one(folder).notes)


def test_rslora_divides_by_the_root_of_the_rank(make: Make) -> None:
    folder, model = make(use_rslora=True)
    report = one(folder)
    assert report.verdict == "healthy" and report.use_rslora
    assert {each.scaling for each in report.modules} == {4.0}
    agrees_with_peft(report, model)


def test_an_embedding_starts_with_A_at_zero(make: Make, base: str) -> None:
    folder, model = make(steps=0, target_modules=["embed_tokens"], name="fresh")
    report = one(folder)
    assert report.verdict == "untrained"
    (module,) = report.modules
    assert (module.zero_start, module.dead, module.exact_zero_A, module.exact_zero_B) == ("A", "A = 0", 1.0, 0.0)
    folder, model = make(target_modules=["embed_tokens", "q_proj"])
    report = one(folder, base)
    assert report.verdict == "healthy"
    agrees_with_peft(report, model)
    for name, layer in layers(model):
        (mine,) = [each for each in report.modules if each.name == name]
        W = layer.get_base_layer().weight.detach()
        assert mine.delta_rel == pytest.approx(
            float(layer.get_delta_weight("default").detach().norm() / W.norm()), rel=1e-5
        )


def test_dora_on_an_embedding_is_measured_as_peft_merges_it(make: Make, base: str) -> None:
    folder, model = make(target_modules=["embed_tokens"], use_dora=True)
    (each,) = one(folder, base).modules
    W = dict(layers(model))[each.name].get_base_layer().weight.detach().clone()
    now = model.merge_and_unload().get_submodule(each.name).weight.detach()
    assert each.delta_rel == pytest.approx(float((now - W).norm() / W.norm()), rel=1e-4)


def test_patterns_of_rank_and_alpha_are_matched_as_peft_does(make: Make) -> None:
    folder, model = make(
        rank_pattern={
            "q_proj": 2,
            "layers.1.self_attn.v_proj": 7,
            r"model.layers.\d.self_attn.k_proj": 3,
            "v_proj": 5,
        },
        alpha_pattern={"^model.layers.0.self_attn.o_proj": 100, "o_proj": 3, "v_proj": 1.5},
    )
    report = one(folder)
    assert report.verdict == "healthy"
    assert {each.rank for each in report.modules} == {2, 3, 4, 5, 7}
    assert len({each.scaling for each in report.modules}) > 4
    agrees_with_peft(report, model)


def test_patterns_that_overlap_are_read_as_peft_loads_them_and_told(make: Make, base: str) -> None:
    """PEFT takes the first that matches and saves them sorted, so it may load another s than it trained with."""
    folder, model = make(alpha_pattern={"o_proj": 3, "model.layers.0.self_attn.o_proj": 100})
    report = one(folder)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(folder))
    agrees_with_peft(report, loaded)
    assert {layer.scaling["default"] for _, layer in layers(model)} == {0.75, 2.0}
    assert {each.scaling for each in report.modules} == {0.75, 2.0, 25.0}
    assert any("both match model.layers.0.self_attn.o_proj" in note for note in report.notes)


def test_a_file_without_lora_weights_is_empty(make: Make) -> None:
    folder, _ = make()
    save_file({}, folder / WEIGHTS)
    report = one(folder)
    assert (report.verdict, report.modules, report.parameters) == ("empty", (), 0)


@pytest.mark.parametrize("kept", [0.5, 0.001])
def test_a_truncated_file_is_one_clear_error(make: Make, kept: float) -> None:
    folder, _ = make()
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: int(len(whole) * kept)])
    report, (error,) = inspect(folder)
    assert report == []
    assert error.startswith(f"{folder / WEIGHTS}: cannot be read (truncated or damaged?): ")
    assert "\n" not in error


def test_what_is_no_adapter_is_one_clear_error(tmp_path: Path, base: str) -> None:
    with pytest.raises(UserError, match=r"holds no adapter_config.json, nor does a sub-folder, so it is no PEFT"):
        inspect(Path(base))
    with pytest.raises(UserError, match=r"must be a folder that PEFT saved$"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(UserError, match="must be a folder that PEFT saved, got a file"):
        inspect(Path(base) / "config.json")


# -- more of what lies about -----------------------------------------------------------------------------------------


def test_the_update_is_held_against_the_base(make: Make, base: str) -> None:
    folder, model = make()
    report = one(folder, base)
    for name, layer in layers(model):
        (mine,) = [each for each in report.modules if each.name == name]
        W = layer.get_base_layer().weight.detach()
        expected = float(layer.get_delta_weight("default").detach().norm() / W.norm())
        assert mine.delta_rel == pytest.approx(expected, rel=1e-5)
    assert all(each.delta_rel is None for each in one(folder).modules)


def test_conv1d_of_gpt2_is_held_against_its_weight_transposed(make: Make, tmp_path: Path) -> None:
    def gpt2() -> Any:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4))

    gpt2().save_pretrained(tmp_path / "gpt2")
    for dora in (False, True):
        settings = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": dora}
        folder, model = make(on=gpt2(), name=f"dora-{dora}", **settings)
        report = one(folder, str(tmp_path / "gpt2"))
        assert report.verdict == "healthy"
        if not dora:
            agrees_with_peft(report, model)
        before = {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers(model)}
        merged = model.merge_and_unload()
        for each in report.modules:
            W, now = before[each.name], merged.get_submodule(each.name).weight.detach()
            assert (each.d_in, each.d_out) == tuple(W.shape)
            assert each.delta_rel == pytest.approx(float((now - W).norm() / W.norm()), rel=1e-4)


def test_modules_saved_whole_are_told_apart_from_lora(make: Make, base: str) -> None:
    folder, model = make(modules_to_save=["lm_head"], bias="none")
    (extra,) = one(folder, base).extras
    now = model.base_model.model.lm_head.modules_to_save["default"].weight.detach()
    W = llama().lm_head.weight.detach()
    assert (extra.name, extra.kind, extra.shape) == ("lm_head.weight", "modules_to_save", (64, 32))
    assert extra.norm == pytest.approx(float(now.norm()), rel=1e-5)
    assert extra.delta_rel == pytest.approx(float((now - W).norm() / W.norm()), rel=1e-4)
    change(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if "lora_" in key])
    report = one(folder)
    assert report.verdict == "empty" and "1 tensors saved beside it" in report.sentence
    change(folder, lambda tensors: tensors["base_model.model.lm_head.weight"].fill_(math.nan))
    assert one(folder).verdict == "broken"


def test_a_tied_weight_saved_whole_is_held_against_the_base_by_either_name(make: Make, tmp_path: Path) -> None:
    llama(tied=True).save_pretrained(tmp_path / "tied")
    for name in ("lm_head", "embed_tokens"):
        folder, _ = make(steps=0, on=llama(tied=True), name=name, modules_to_save=[name])
        (extra,) = one(folder, str(tmp_path / "tied")).extras
        assert (extra.name.split(".")[-2], extra.delta_rel) == (name, 0)


Rename = Callable[[str], str]
PREFIX = "base_model.model."


def rename(folder: Path, name: Rename) -> list[str]:
    """The file under other names; those before."""
    tensors = load_file(folder / WEIGHTS)
    save_file({name(key): each for key, each in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    return list(tensors)


def named(adapter: str, magnitude: str = ".weight") -> Rename:
    """As model.state_dict() has it of an adapter of this name."""

    def name(key: str) -> str:
        for ending in ("lora_A.weight", "lora_B.weight", "lora_B.bias"):
            if key.endswith(ending):
                factor, _, rest = ending.partition(".")
                return f"{key.removesuffix(ending)}{factor}.{adapter}.{rest}"
        if "lora_" not in key:
            return key
        return f"{key}.{adapter}" + (magnitude if key.endswith("lora_magnitude_vector") else "")

    return name


def outputs(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(12)[None]).logits.detach()


def loaded_by_peft(folder: Path, adapter: str = "default") -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")
        return PeftModel.from_pretrained(llama(), str(folder), adapter_name=adapter)


UNLOADED: dict[str, Rename] = {
    "bare": lambda key: key.removeprefix(PREFIX),
    "bare, with the adapter's name": lambda key: named("default")(key.removeprefix(PREFIX)),
    "twice the prefix": lambda key: PREFIX + key,
    "DDP": lambda key: "module." + key,
    "DDP inside": lambda key: f"{PREFIX}module.{key.removeprefix(PREFIX)}",
    "torch.compile": lambda key: "_orig_mod." + key,
    "torch.compile inside": lambda key: f"{PREFIX}_orig_mod.{key.removeprefix(PREFIX)}",
    "FSDP": lambda key: "_fsdp_wrapped_module." + key,
    "FSDP inside": lambda key: re.sub(r"layers[.](\d)", r"layers.\1._fsdp_wrapped_module", key),
    "checkpointing": lambda key: re.sub(r"layers[.](\d)", r"layers.\1._checkpoint_wrapped_module", key),
    "another adapter's name": named("other"),
    "parameters": lambda key: key.removesuffix(".weight"),
}
"""Names as other programs write them, none of which PEFT loads."""


@pytest.mark.parametrize("variant", UNLOADED)
def test_names_that_peft_does_not_load_leave_the_base_and_the_remedy_helps(make: Make, variant: str) -> None:
    folder, model = make()
    weights = {name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for name, layer in layers(model)}
    assert reader.lost(folder, weights) == ()
    right = rename(folder, UNLOADED[variant])
    assert torch.equal(outputs(loaded_by_peft(folder)), outputs(llama())), "PEFT loads nothing"
    report = one(folder)
    assert (report.verdict, report.modules, len(report.passed_over)) == ("empty", (), 16)
    assert "PEFT passes over 16 of the file's tensors for their names" in report.sentence
    assert "save again with save_pretrained" in report.sentence
    assert reader.lost(folder, weights) == tuple(weights)
    wrong = list(load_file(folder / WEIGHTS))
    assert {keys.parse(key).saved_as for key in wrong} == set(right)
    rename(folder, lambda key: keys.parse(key).saved_as)
    assert torch.equal(outputs(loaded_by_peft(folder)), outputs(model))
    assert one(folder).verdict == "healthy"


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"target_modules": ["embed_tokens", "v_proj"]}], ids=str)
def test_the_adapters_name_in_the_names_is_read_as_peft_reads_it(make: Make, settings: Any, base: str) -> None:
    folder, model = make(**settings)
    before = one(folder, base)
    rename(folder, named("default"))
    assert torch.equal(outputs(loaded_by_peft(folder)), outputs(model))
    assert torch.equal(outputs(loaded_by_peft(folder, "other")), outputs(llama()))
    report = one(folder, base)
    assert (report.verdict, report.modules, report.passed_over) == ("healthy", before.modules, ())
    (note,) = [note for note in report.notes if "carry the adapter's name" in note]
    assert "as adapter 'default' alone" in note and "older versions load none" in note


def test_a_magnitude_named_as_no_peft_has_it_is_missing(make: Make, base: str) -> None:
    folder, model = make(use_dora=True)
    rename(folder, named("default", magnitude=""))
    loaded = loaded_by_peft(folder)
    for _, layer in layers(loaded):
        W = layer.get_base_layer().weight
        assert torch.allclose(layer.lora_magnitude_vector["default"].weight, W.norm(dim=1)), "as of the base"
    for report in (one(folder), one(folder, base)):
        assert report.verdict == "incomplete" and len(report.passed_over) == 8
        assert "no lora_magnitude_vector, though use_dora is true: " in report.sentence
    rename(folder, lambda key: keys.parse(key).saved_as)
    assert one(folder, base).verdict == "healthy"
    assert torch.equal(outputs(loaded_by_peft(folder)), outputs(model))


def test_half_a_lora_under_a_wrong_name_is_told_with_the_right_one(make: Make) -> None:
    folder, _ = make()
    rename(folder, lambda key: named("other")(key) if "lora_B" in key else key)
    _, (error,) = inspect(folder)
    assert "has half a LoRA: PEFT passes over 8 of the file's tensors" in error and "k_proj.lora_B.weight'" in error


def test_names_of_another_class_of_the_base_are_told_with_the_base(make: Make, base: str) -> None:
    """LlamaModel has `layers.0`, LlamaForCausalLM `model.layers.0`: the names alone are right."""
    folder, _ = make()
    rename(folder, lambda key: key.replace(f"{PREFIX}model.", PREFIX))
    assert torch.equal(outputs(loaded_by_peft(folder)), outputs(llama())), "PEFT loads nothing"
    report, (error,) = inspect(folder, base)
    assert report == [] and error.startswith("--base: has no weight layers.0.self_attn.k_proj, which")


@pytest.mark.parametrize("ending", [".modules_to_save.default.", ".modules_to_save."])
def test_modules_saved_under_the_names_of_the_model_are_refused_by_peft_and_told(
    make: Make, ending: str, base: str
) -> None:
    folder, model = make(modules_to_save=["lm_head"])
    rename(folder, lambda key: key.replace("lm_head.", f"lm_head{ending}"))
    with pytest.raises(KeyError, match=r"lm_head\.weight"):
        loaded_by_peft(folder)
    for report in (one(folder), one(folder, base)):
        assert report.verdict == "incomplete" and report.passed_over == (f"{PREFIX}lm_head{ending}weight",)
        assert "PEFT refuses to load it (KeyError)" in report.sentence
    rename(folder, lambda key: keys.parse(key).saved_as)
    assert torch.equal(outputs(loaded_by_peft(folder)), outputs(model))
    assert one(folder, base).verdict == "healthy"


def test_a_dump_of_the_whole_model_is_read_as_peft_reads_it(make: Make, base: str) -> None:
    folder, model = make()
    dump = {key: each.clone() for key, each in model.state_dict().items()}
    save_file(dump, folder / WEIGHTS, metadata={"format": "pt"})
    assert torch.equal(outputs(loaded_by_peft(folder)), outputs(model))
    for report in (one(folder), one(folder, base)):
        assert (report.verdict, report.missing, report.passed_over) == ("healthy", (), ())
    folder, model = make(name="whole", modules_to_save=["lm_head"])
    dump = {key: each.clone() for key, each in model.state_dict().items()}
    save_file(dump, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(KeyError, match=r"lm_head\.weight"):
        loaded_by_peft(folder)
    for report in (one(folder), one(folder, base)):
        assert report.verdict == "incomplete" and "PEFT refuses to load it (KeyError)" in report.sentence


# -- what the configuration promises ---------------------------------------------------------------------------------


def configure(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def drop(folder: Path, expression: str) -> None:
    change(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if re.search(expression, key)])


def untouched(folder: Path) -> set[str]:
    """Modules that PEFT adapts on loading, but leaves with B = 0."""
    return {name for name, layer in layers(loaded_by_peft(folder)) if not bool(layer.lora_B["default"].weight.any())}


TARGETS: dict[str, Any] = {
    "a list": ["q_proj", "v_proj"],
    "an expression": r".*self_attn\.(q|v)_proj",
    "all-linear": "all-linear",
}


@pytest.mark.parametrize("targets", TARGETS)
def test_a_module_without_factors_makes_it_incomplete_with_and_without_the_base(
    make: Make, targets: str, base: str
) -> None:
    folder, _ = make(target_modules=TARGETS[targets])
    assert one(folder).verdict == one(folder, base).verdict == "healthy"
    drop(folder, r"layers\.1\.self_attn\.v_proj")
    name = "model.layers.1.self_attn.v_proj"
    for report in (one(folder), one(folder, base)):
        assert report.verdict == "incomplete"
        assert (
            untouched(folder) == {each for missing in report.missing for each in missing.names} - {"v_proj"} == {name}
        )
        assert name in report.sentence
    configure(folder, target_modules="all-linear" if targets == "all-linear" else TARGETS[targets])
    assert one(folder, base).verdict == "incomplete"


def test_a_name_of_target_modules_without_any_factors_is_incomplete_unless_the_base_lacks_it(
    make: Make, base: str
) -> None:
    folder, model = make(target_modules=["q_proj", "v_proj"])
    drop(folder, "v_proj")
    assert untouched(folder) == {f"model.layers.{layer}.self_attn.v_proj" for layer in (0, 1)}
    report = one(folder)
    assert report.verdict == "incomplete"
    assert "no LoRA for what target_modules names: v_proj; PEFT leaves them" in report.sentence
    assert "unless the base has no such module, which --base checks" in report.sentence
    assert {each for missing in one(folder, base).missing for each in missing.names} == untouched(folder)
    folder, model = make(name="generic", target_modules=["q_proj", "query_key_value"])
    assert torch.equal(outputs(loaded_by_peft(folder)), outputs(model))
    assert one(folder).verdict == "incomplete", "without the base nobody can tell"
    assert one(folder, base).verdict == "healthy"
    configure(folder, target_modules=["q_proj", "o_proj"], exclude_modules=["o_proj"])
    assert one(folder).verdict == one(folder, base).verdict == "healthy"


def test_layers_that_are_promised_by_number_or_pattern_are_missed(make: Make, base: str) -> None:
    folder, _ = make(target_modules=["q_proj"], layers_to_transform=[1])
    assert one(folder).verdict == one(folder, base).verdict == "healthy"
    configure(folder, layers_to_transform=[0, 1])
    for report in (one(folder), one(folder, base)):
        assert report.verdict == "incomplete" and "model.layers.0.self_attn.q_proj" in report.sentence
    pattern = {"model.layers.0.self_attn.q_proj": 2}
    folder, _ = make(name="pattern", target_modules=["q_proj"], rank_pattern=pattern)
    drop(folder, r"layers\.0")
    for report in (one(folder), one(folder, base)):
        assert report.verdict == "incomplete" and "model.layers.0.self_attn.q_proj" in report.sentence


def test_a_block_in_fewer_layers_is_a_note_as_hybrid_models_have_it(make: Make, base: str) -> None:
    folder, _ = make(target_modules=["q_proj", "v_proj", "down_proj"])
    drop(folder, r"layers\.1\.self_attn")
    report = one(folder)
    assert report.verdict == "healthy"
    assert any(
        "self_attn has LoRA in 1 of the 2 layers that the file names, not in 1: " in note for note in report.notes
    )
    assert one(folder, base).verdict == "incomplete"


def test_what_modules_to_save_promises_and_the_file_lacks_is_told_as_peft_takes_it(make: Make, base: str) -> None:
    folder, model = make(modules_to_save=["lm_head"])
    whole = outputs(model)
    configure(folder, modules_to_save=["lm_head", "score"])
    assert torch.equal(outputs(loaded_by_peft(folder)), whole), "the base has no score"
    assert one(folder, base).verdict == "healthy"
    drop(folder, "lm_head")
    with pytest.raises(KeyError, match=r"lm_head\.weight"):
        loaded_by_peft(folder)
    for report in (one(folder), one(folder, base)):
        assert report.verdict == "incomplete" and "lm_head" in report.sentence and "refuses" in report.sentence
    folder, _ = make(name="tokens", trainable_token_indices=[1, 2])
    assert one(folder, base).verdict == "healthy"
    drop(folder, "token_adapter")
    for report in (one(folder), one(folder, base)):
        assert report.verdict == "incomplete" and "refuses" in report.sentence


def test_dora_without_some_magnitudes_is_incomplete(make: Make, base: str) -> None:
    folder, _ = make(use_dora=True)
    drop(folder, r"layers\.0\.self_attn\.k_proj\.lora_magnitude")
    for report in (one(folder), one(folder, base)):
        assert report.verdict == "incomplete"
        assert [missing.names for missing in report.missing] == [("model.layers.0.self_attn.k_proj",)]


@pytest.mark.parametrize(
    ("settings", "edit", "reason", "count"),
    [
        ({}, {"target_modules": ["q_proj", "k_proj"]}, "target_modules", 8),
        ({"use_dora": True}, {"use_dora": False}, "use_dora is false", 8),
        ({}, {"layers_to_transform": [0]}, "layers_to_transform", 8),
        ({}, {"exclude_modules": ["v_proj", "o_proj"]}, "exclude_modules", 8),
    ],
)
def test_tensors_that_the_configuration_has_no_place_for_are_told(
    make: Make, settings: Any, edit: Any, reason: str, count: int, base: str
) -> None:
    folder, _ = make(**settings)
    configure(folder, **edit)
    loaded = loaded_by_peft(folder)
    for report in (one(folder), one(folder, base)):
        assert report.verdict == "incomplete" and reason in report.sentence and len(report.passed_over) == count
        agrees_with_peft(report, loaded)


def test_targets_that_match_nothing_are_told_as_peft_refuses_them(make: Make, base: str) -> None:
    folder, _ = make()
    configure(folder, target_modules=["query_key_value"])
    with pytest.raises(ValueError, match="not found in the base model"):
        loaded_by_peft(folder)
    assert one(folder).verdict == "empty"
    report = one(folder, base)
    assert report.verdict == "empty" and "PEFT refuses to load it: Target modules" in report.sentence


def test_json_names_all_that_is_missing_or_passed_over(make: Make, run: Any, base: str) -> None:
    folder, _ = make()
    drop(folder, "v_proj")
    rename(folder, lambda key: key.replace("lora_A.weight", "lora_A.other.weight") if "o_proj" in key else key)
    rename(folder, lambda key: key.replace("lora_B.weight", "lora_B.other.weight") if "o_proj" in key else key)
    code, out, err = run("inspect", str(folder), "--json", "--base", base)
    (adapter,) = json.loads(out)["adapters"]
    assert (code, err, adapter["verdict"], len(adapter["passed_over"])) == (0, "", "incomplete", 4)
    (missing,) = adapter["missing"]
    assert set(missing["names"]) == untouched(folder)
    assert missing.keys() == {"names", "part", "effect", "refused"}


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
        {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
        {"target_modules": r"model\.layers\.0\..*_proj", "exclude_modules": r".*\.mlp\..*"},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_what_peft_saved_whole_is_never_incomplete(make: Make, settings: Any, tied: bool, tmp_path: Path) -> None:
    if settings.get("ensure_weight_tying") and not tied:
        pytest.skip("PEFT warns that nothing is tied")
    llama(tied).save_pretrained(tmp_path / "base")
    folder, _ = make(on=llama(tied), **settings)
    for report in (one(folder), one(folder, str(tmp_path / "base"))):
        assert (report.verdict, report.missing, report.passed_over) == ("healthy", (), ())


def test_a_hybrid_model_is_not_incomplete(make: Make, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    hybrid = Lfm2ForCausalLM(Lfm2Config(vocab_size=64, num_hidden_layers=4, full_attn_idxs=[1, 3], **sizes))
    hybrid.save_pretrained(tmp_path / "hybrid")
    folder, _ = make(on=hybrid, target_modules=["q_proj", "v_proj", "w1"])
    for report in (one(folder), one(folder, str(tmp_path / "hybrid"))):
        assert (report.verdict, report.missing, len(report.modules)) == ("healthy", (), 8)


# -- too small to matter ---------------------------------------------------------------------------------------------


def shrink(folder: Path, factor: float, expression: str = "") -> None:
    change(
        folder,
        lambda tensors: [each.mul_(factor) for key, each in tensors.items() if re.search(f"{expression}.*lora_B", key)],
    )


def test_an_update_too_small_to_matter_is_negligible(make: Make, base: str) -> None:
    folder, _ = make()
    largest = max(each.delta_rel or 0 for each in one(folder, base).modules)
    shrink(folder, 4e-7 / largest)
    report = one(folder, base)
    assert report.verdict == "negligible" and all(each.negligible for each in report.modules)
    assert "8 of 8 modules change their weight by less than 0.0001 of it" in report.sentence
    assert "at most by 4.0e-07" in report.sentence
    half = llama().bfloat16()
    merged = PeftModel.from_pretrained(half, str(folder)).merge_and_unload()
    before = llama().bfloat16().state_dict()
    kept = [(each != before[name]).float().mean() for name, each in merged.state_dict().items() if "self_attn" in name]
    assert max(kept) < 0.01, "a merge into bf16 loses it"
    assert one(folder).verdict == "healthy", "without the base nobody can tell"


def test_some_modules_too_small_to_matter_are_counted_with_the_dead(make: Make, base: str) -> None:
    folder, _ = make()
    shrink(folder, 1e-6, "[qk]_proj")
    report = one(folder, base)
    assert report.verdict == "partially_dead"
    assert "4 of 8 modules change their weight by less than 0.0001 of it" in report.sentence
    shrink(folder, 0, "q_proj")
    report = one(folder, base)
    assert report.verdict == "partially_dead"
    assert (
        "2 of 8 modules change nothing" in report.sentence and "2 of 8 modules change their weight" in report.sentence
    )
    shrink(folder, 1e-6)
    assert one(folder, base).verdict == "negligible"


def test_a_few_modules_too_small_to_matter_are_listed_and_decide_nothing(make: Make, base: str) -> None:
    folder, _ = make()
    shrink(folder, 1e-6, "0.*q_proj")
    report = one(folder, base)
    assert report.verdict == "healthy"
    assert sum(each.negligible for each in report.modules) == 1


@pytest.mark.parametrize("config", ["optimizer: adamw_torch", "- a", "optimizer: {ratio: many}"])
def test_files_of_another_program_beside_an_adapter_tell_nothing_of_loraplus(make: Make, config: str) -> None:
    folder, _ = make()
    (folder.parent / "config.yaml").write_text(config)
    (folder.parent / "metrics.jsonl").write_text('[1]\n{"loss": 2.0}\n')
    assert one(folder).loraplus.conforms is None


# -- more of what lies about, again ----------------------------------------------------------------------------------


def test_a_trained_bias_keeps_a_module_alive(make: Make) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=4))
    with pytest.warns(match="have invalid shape"):  # PEFT holds its own bias for a torn matrix
        folder, _ = make(on=model, target_modules=["c_attn"], fan_in_fan_out=True, lora_bias=True)
    change(folder, lambda tensors: [each.zero_() for key, each in tensors.items() if "lora_B.weight" in key])
    assert one(folder).verdict == "healthy"
    change(folder, lambda tensors: [each.zero_() for key, each in tensors.items() if "lora_B" in key])
    assert one(folder).verdict == "untrained"


def test_magnitudes_that_moved_keep_a_dora_module_alive(make: Make, base: str) -> None:
    folder, _ = make(steps=0, use_dora=True)
    assert one(folder, base).verdict == one(folder).verdict == "untrained"
    change(folder, lambda tensors: [each.mul_(1.1) for key, each in tensors.items() if "magnitude" in key])
    report = one(folder, base)
    assert report.verdict == "healthy"
    assert all(each.delta_rel == pytest.approx(0.1, rel=1e-4) for each in report.modules)


def test_an_adapter_whose_A_was_lost_is_dead_and_not_untrained(make: Make) -> None:
    folder, _ = make()
    change(folder, lambda tensors: [each.zero_() for key, each in tensors.items() if "lora_A" in key])
    report = one(folder)
    assert report.verdict == "dead" and "A = 0" in report.sentence


@pytest.mark.parametrize("init", ["gaussian", "pissa", "olora", False, "orthogonal", "mica"])
def test_the_factor_that_starts_at_zero_is_the_one_of_the_initialization(make: Make, init: Any) -> None:
    folder, model = make(steps=0, init_lora_weights=init)
    report = one(folder)
    starts = {each.zero_start for each in report.modules}
    zeros = {part for part in "AB" if all(getattr(each, f"exact_zero_{part}") == 1 for each in report.modules)}
    assert zeros == starts & {"A", "B"}
    assert report.verdict == ("healthy" if starts == {None} else "untrained")
    assert any("does not start a factor at zero" in note for note in report.notes) == (starts == {None})
    agrees_with_peft(report, model)


def test_several_adapters_are_shown_each_and_a_broken_one_hides_none(make: Make, tmp_path: Path) -> None:
    _, model = make()
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path / "both"))
    report, errors = inspect(tmp_path / "both")
    assert errors == []
    assert [Path(each.folder).name for each in report] == ["both", "second"]
    assert [each.verdict for each in report] == ["healthy", "untrained"]
    (tmp_path / "both" / "second" / WEIGHTS).write_bytes(b"no")
    report, errors = inspect(tmp_path / "both")
    assert [each.verdict for each in report] == ["healthy"] and len(errors) == 1


class Touch:
    """A pickle that leaves a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_unless_asked_for_and_runs_nothing_even_then(make: Make, tmp_path: Path) -> None:
    folder, model = make()
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    report, (error,) = inspect(folder)
    assert report == []
    assert error == (
        f"{folder}: refused, its weights are a pickle, which can run code (if you trust it: --allow-pickle)"
    )
    (allowed,), _ = inspect(folder, allow_pickle=True)
    agrees_with_peft(allowed, model)
    alarm = tmp_path / "alarm"
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": Touch(alarm)}))
    report, (error,) = inspect(folder, allow_pickle=True)
    assert report == [] and "cannot be read by torch.load(weights_only=True)" in error and "\n" not in error
    assert not alarm.exists()
    pickle.loads((folder / "adapter_model.bin").read_bytes())
    assert alarm.exists()


def test_the_safetensors_are_read_where_both_lie(make: Make) -> None:
    folder, _ = make()
    (folder / "adapter_model.bin").write_bytes(b"junk")
    (report,), errors = inspect(folder, allow_pickle=True)
    assert (report.verdict, errors) == ("healthy", [])


def test_another_kind_of_adapter_is_one_clear_error(tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    get_peft_model(llama(), config).save_pretrained(str(tmp_path))
    _, (error,) = inspect(tmp_path)
    assert error == f"{tmp_path / 'adapter_config.json'}: peft_type must be LORA, got 'IA3'; no other kind is read"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda config: "{", "cannot be read as JSON"),
        (lambda config: [], "names no peft_type"),
        (lambda config: config | {"r": 8}, "rank must be 8 as adapter_config.json says, got A (4, 32), B (16, 4)"),
        (lambda config: config | {"lora_alpha": "many"}, "lora_alpha must be a finite number, got 'many'"),
        (lambda config: config | {"lora_alpha": math.nan}, "lora_alpha must be a finite number, got 'nan'"),
        (lambda config: config | {"lora_alpha": math.inf}, "lora_alpha must be a finite number, got 'inf'"),
        (lambda config: config | {"lora_alpha": 10**400}, "lora_alpha must be a finite number, got '1000"),
        (lambda config: config | {"rank_pattern": {"(": 3}}, "PEFT cannot read it"),
        (lambda config: config | {"alpha_pattern": [1]}, "PEFT cannot read it"),
        (lambda config: config | {"task_type": "WHAT"}, "PEFT cannot read it"),
        (lambda config: config | {"use_qalora": True}, "use_qalora is set"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_one_clear_error(make: Make, edit: Any, said: str) -> None:
    folder, _ = make(steps=0)
    file = folder / "adapter_config.json"
    changed = edit(json.loads(file.read_text()))
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    report, (error,) = inspect(folder)
    assert report == [] and said in error and "\n" not in error


def test_a_field_of_a_newer_peft_is_a_note(make: Make) -> None:
    folder, _ = make()
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"from_the_future": 1}))
    report = one(folder)
    assert report.verdict == "healthy"
    assert any("from_the_future" in note for note in report.notes)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda tensors, key: tensors.pop(key), "has no lora_B"),
        (lambda tensors, key: tensors.update({key: torch.zeros(0)}), "lora_B must be a matrix, got the shape (0,)"),
        (lambda tensors, key: tensors.update({key: torch.ones(32, 5)}), "rank must be 4"),
    ],
)
def test_factors_that_do_not_belong_together_are_one_clear_error(make: Make, edit: Any, said: str) -> None:
    folder, _ = make(steps=0)
    change(folder, lambda tensors: edit(tensors, "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"))
    _, (error,) = inspect(folder)
    assert said in error and "model.layers.0.self_attn.q_proj" in error


def test_a_git_lfs_pointer_is_told_as_one(make: Make) -> None:
    folder, _ = make(steps=0)
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    _, (error,) = inspect(folder)
    assert "is a pointer of git-lfs" in error


def test_another_base_is_told(make: Make, tmp_path: Path, base: str) -> None:
    folder, _ = make(steps=0)
    with pytest.raises(ConfigError, match=r"^--base: no such checkpoint folder, got '/nowhere'"):
        inspect(folder, "/nowhere")
    _, (error,) = inspect(folder, "embedded:tiny")
    assert error.startswith("--base: model.layers.0.self_attn.k_proj must be 16 x 32 as ")
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path / "other"))
    change(
        tmp_path / "other",
        lambda tensors: tensors.update(
            {f"{key.replace('layers.1', 'layers.9')}": tensors.pop(key) for key in list(tensors) if "layers.1" in key}
        ),
    )
    _, (error,) = inspect(tmp_path / "other", base)
    assert "--base: has no weight model.layers.9.self_attn.q_proj, which" in error


# -- LoRA+ -----------------------------------------------------------------------------------------------------------


def beside(folder: Path, ratio: float, rows: list[tuple[float, float]]) -> None:
    """A trial's record around the adapter."""
    lines = [
        {"step": step, "optimizer/lr_A": lr_A, "optimizer/lr_B": lr_B} for step, (lr_A, lr_B) in enumerate(rows, 1)
    ]
    (folder.parent / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder.parent / "config.yaml").write_text(f"optimizer:\n  ratio: {ratio}\n")


def test_lora_plus_cannot_be_told_from_weights_alone(make: Make) -> None:
    report = one(make()[0]).loraplus
    assert report.conforms is None and report.sentence.startswith("cannot be known from weights alone: ")


def test_lora_plus_is_told_from_the_record_of_a_trial(make: Make) -> None:
    folder, _ = make()
    beside(folder, 16, [(1e-4, 16e-4), (2e-4, 32e-4), (0.0, 0.0)])
    report = one(folder).loraplus
    assert report.conforms is True
    assert (report.requested, report.least, report.most, report.steps) == (16, pytest.approx(16), pytest.approx(16), 2)
    beside(folder, 16, [(1e-4, 16e-4), (2e-4, 2e-4)])
    report = one(folder).loraplus
    assert report.conforms is False
    assert (report.least, report.most) == (pytest.approx(1), pytest.approx(16))


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def ran(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lora-sweep", *words])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0), *capsys.readouterr()

    return ran


def test_json_alone_is_on_stdout_and_holds_every_module(make: Make, run: Any, base: str) -> None:
    folder, _ = make()
    change(folder, lambda tensors: next(iter(tensors.values())).fill_(math.nan))
    code, out, err = run("inspect", str(folder), "--json", "--base", base)
    assert (code, err) == (0, "")
    (adapter,) = json.loads(out)["adapters"]
    assert adapter["verdict"] == "broken" and len(adapter["modules"]) == 8
    assert {"name", "rank", "scaling", "delta_norm", "stable_rank", "delta_rel", "dead"} <= adapter["modules"][0].keys()


def test_the_table_has_a_row_a_group_and_names_the_conspicuous(make: Make, run: Any) -> None:
    folder, _ = make()

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        prefix = "base_model.model.model.layers"
        tensors[f"{prefix}.0.self_attn.q_proj.lora_B.weight"].zero_()
        tensors[f"{prefix}.1.self_attn.k_proj.lora_B.weight"].mul_(1000)
        tensors[f"{prefix}.1.self_attn.v_proj.lora_B.weight"][:12] = 0

    change(folder, spoil)
    code, out, err = run("inspect", str(folder))
    assert (code, err) == (0, "")
    assert f"{folder}: partially_dead: 1 of 8 modules change nothing" in out
    assert [line.split()[:2] for line in out.splitlines() if line.split()[0] in ATTENTION] == [
        [name, "2"] for name in sorted(ATTENTION, key=["k_proj", "o_proj", "q_proj", "v_proj"].index)
    ]
    assert "dead: model.layers.0.self_attn.q_proj, B = 0" in out
    assert "zeros: model.layers.1.self_attn.v_proj, 75% of lora_B are exactly 0" in out
    assert "LoRA+: cannot be known from weights alone" in out


def test_errors_are_one_line_and_exit_2(make: Make, run: Any, tmp_path: Path) -> None:
    folder, _ = make(steps=0)
    (folder / WEIGHTS).unlink()
    code, out, err = run("inspect", str(folder), "--json")
    assert (code, out) == (2, "")
    assert err == f"{folder}: refused, {WEIGHTS} is missing\n"
    shutil.rmtree(folder)
    code, out, err = run("inspect", str(folder))
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_help_says_the_exit_code(run: Any) -> None:
    code, out, _ = run("inspect", "--help")
    assert code == 0
    assert "0 when it could be read, whatever the verdict" in " ".join(out.split())


def test_no_model_code_is_loaded_without_a_base(make: Make) -> None:
    folder, _ = make()
    code = (
        "import sys\nfrom pathlib import Path\nfrom lora_sweep.inspection import inspect\n"
        f"inspect(Path({str(folder)!r}))\n"
        "print({'lora_sweep.base.load', 'optuna', 'wandb', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_an_adapter_that_peft_loads_again_gives_the_same(make: Make, base: str, tmp_path: Path) -> None:
    folder, _ = make(use_rslora=True, rank_pattern={"q_proj": 2})
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(folder))
    agrees_with_peft(one(folder), loaded)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"])
def test_a_pattern_that_never_ends_is_named(make: Make, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setattr("lora_sweep.adapters.reader.PATTERN_SECONDS", 0.5)
    folder, _ = make()
    config = json.loads((folder / "adapter_config.json").read_text())
    pattern = r"((\w|\.)+)+!"
    config[key] = {pattern: 4} if key.endswith("_pattern") else pattern
    (folder / "adapter_config.json").write_text(json.dumps(config))
    _, (line,) = inspect(folder)
    assert f"{key} {pattern!r} takes longer than 0.5 s to match the names of the modules" in line


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["deep", "fifo", "device", "large", "patterns"])
def test_an_odd_file_of_an_adapter_is_one_line_at_once(make: Make, name: str, kind: str) -> None:
    folder, _ = make()
    file = folder / name
    config = json.loads((folder / "adapter_config.json").read_text())
    file.unlink()
    match kind:
        case "deep":
            file.write_text('{"a":' * 50_000)
        case "fifo":
            os.mkfifo(file)
        case "device":
            file.symlink_to("/dev/zero")
        case "large":
            file.write_text("{}")
            os.truncate(file, 2**40)
        case "patterns":
            file.write_text(json.dumps(config | {"rank_pattern": {f"m{i}": 4 for i in range(10**5)}}))
    with bounded(10, 2**31):
        try:
            _, lines = inspect(folder)
        except UserError as error:
            lines = str(error).splitlines()
    assert len(lines) == 1 and len(lines[0]) < 700
