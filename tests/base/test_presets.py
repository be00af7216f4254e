"""Every base in conf/model composes, is what its header says, and trains in a pack: all without a network."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import config_of
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lora_sweep.adapters.peft_template import PeftTemplate
from lora_sweep.base import base_config, quant, skeleton
from lora_sweep.base.load import load as load_base
from lora_sweep.config import ModelConfig
from lora_sweep.data import Data, TokenSet
from lora_sweep.pack import Pack, Settings
from lora_sweep.sweep.compose import shipped
from lora_sweep.tiny.pretrain import WEIGHTS

CPU = torch.device("cpu")
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Public:
    """What the released config.json says."""

    config_class: str
    model_class: str
    config: dict[str, Any]


def llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def dimensions(vocabulary: int, width: int, inner: int, layers: int, heads: int, key_values: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_values,
    }


SMOLLM2 = Public(
    "LlamaConfig",
    "LlamaForCausalLM",
    {"model_type": "llama", "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "max_position_embeddings": 8192}
    | dimensions(49152, 576, 1536, 30, 9, 3),
)
QWEN = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "use_sliding_window": False, "max_position_embeddings": 32768} | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}
}
LLAMA31 = Public(
    "LlamaConfig",
    "LlamaForCausalLM",
    {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_parameters": llama3_rope(8.0), "tie_word_embeddings": False}
    | {"max_position_embeddings": 131072}
    | dimensions(128256, 4096, 14336, 32, 32, 8),
)
MISTRAL = Public(
    "MistralConfig",
    "MistralForCausalLM",
    {"model_type": "mistral", "rms_norm_eps": 1e-5, "sliding_window": None, "tie_word_embeddings": False}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "max_position_embeddings": 32768}
    | dimensions(32768, 4096, 14336, 32, 32, 8),
)

PUBLIC: dict[str, Public | None] = {
    "hub": None,
    "local": None,
    "tiny": Public("LlamaConfig", "LlamaForCausalLM", json.loads((WEIGHTS / "config.json").read_text())),
    "smollm2": SMOLLM2,
    "smollm2_gguf": SMOLLM2,
    "qwen25_05b": Public(
        "Qwen2Config",
        "Qwen2ForCausalLM",
        QWEN | {"tie_word_embeddings": True} | dimensions(151936, 896, 4864, 24, 14, 2),
    ),
    "qwen25_15b": Public(
        "Qwen2Config",
        "Qwen2ForCausalLM",
        QWEN | {"tie_word_embeddings": True} | dimensions(151936, 1536, 8960, 28, 12, 2),
    ),
    "qwen25_7b_nf4": Public(
        "Qwen2Config",
        "Qwen2ForCausalLM",
        QWEN | {"tie_word_embeddings": False} | dimensions(152064, 3584, 18944, 28, 28, 4),
    ),
    "llama32_1b": Public(
        "LlamaConfig",
        "LlamaForCausalLM",
        {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_parameters": llama3_rope(32.0), "head_dim": 64}
        | {"tie_word_embeddings": True, "max_position_embeddings": 131072}
        | dimensions(128256, 2048, 8192, 16, 32, 8),
    ),
    "llama31_8b": LLAMA31,
    "llama31_8b_nf4": LLAMA31,
    "mistral_7b": MISTRAL,
    "mistral_7b_nf4": MISTRAL,
    "gemma3_1b": Public(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"model_type": "gemma3_text", "head_dim": 256, "sliding_window": 512, "query_pre_attn_scalar": 256}
        | {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
        | dimensions(262144, 1152, 6912, 26, 4, 1),
    ),
    "gemma2_9b_nf4": Public(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {"model_type": "gemma2", "head_dim": 256, "sliding_window": 4096, "query_pre_attn_scalar": 256}
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "max_position_embeddings": 8192}
        | dimensions(256000, 3584, 14336, 42, 16, 8),
    ),
}
"""Option of the group model -> dimensions of the released checkpoint; None where the user brings it."""

NAMED = sorted(name for name, public in PUBLIC.items() if public is not None)


def public(name: str) -> Public:
    facts = PUBLIC[name]
    assert facts is not None
    return facts


def preset(name: str) -> ModelConfig:
    model: ModelConfig = config_of(f"model={name}").model
    return model


def whole(name: str) -> Any:
    """The skeleton in full size."""
    config = AutoConfig.for_model(**public(name).config)
    config._attn_implementation, config.dtype = preset(name).attn_implementation, torch.bfloat16
    return skeleton.skeleton(config)


def test_every_file_of_the_group_is_in_the_table() -> None:
    assert {file.stem for file in (shipped("conf") / "model").glob("*.yaml")} == PUBLIC.keys()


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_preset_composes_under_its_own_name_with_safe_settings(name: str) -> None:
    overrides = ["model.path=some/where"] if PUBLIC[name] is None else []
    model = config_of(f"model={name}", *overrides).model
    assert model.name == name
    assert model.trust_remote_code is False
    assert model.revision is None
    assert (model.quantization == "nf4") == name.endswith("_nf4")
    assert model.dtype == ("fp32" if name == "tiny" else "bf16")


@pytest.mark.parametrize("name", NAMED)
def test_the_header_says_the_size_and_memory_that_follow_from_the_public_dimensions(name: str) -> None:
    text = " ".join((shipped("conf") / f"model/{name}.yaml").read_text().split("\nname:")[0].replace("#", " ").split())
    facts = re.search(r"([\d,.]+) M parameters, ([\d.]+) (GiB|MiB) in (\w+)\.", text)
    assert facts, text
    millions, size, unit, word = facts.groups()
    model = preset(name)
    assert word == (model.quantization or model.dtype)
    shape = whole(name)
    assert type(shape).__name__ == public(name).model_class
    assert type(shape.config).__name__ == public(name).config_class
    parameters = AutoModelForCausalLM.from_config(shape.config).num_parameters() if name == "tiny" else count(shape)
    assert float(millions.replace(",", "")) * 1e6 == pytest.approx(parameters, rel=0.02)
    linear = sum(module.weight.numel() for module in linears(shape).values()) if model.quantization else 0
    # NF4: 4 bits a weight, a scale of 8 bits for 64 of them, one of 32 bits for 256 scales.
    width = {"fp32": 4, "bf16": 2, "nf4": 2}[word]
    memory = linear * (1 / 2 + 1 / 64 + 4 / (64 * 256)) + (parameters - linear) * width
    assert float(size) * {"GiB": GIB, "MiB": MIB}[unit] == pytest.approx(memory, rel=0.02)
    if model.path and "/" in model.path and not model.path.startswith("package:"):
        assert "gated" in text or "terms" in text
        assert "model.revision" in text


def count(shape: Any) -> int:
    tied = shape.config.tie_word_embeddings
    each = {name: parameter.numel() for name, parameter in shape.named_parameters(remove_duplicate=False)}
    return sum(numel for name, numel in each.items() if not (tied and name == "lm_head.weight"))


def linears(shape: Any) -> dict[str, Any]:
    return {
        name: module for name, module in shape.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    }


ARCHITECTURES = [name for name in NAMED if name not in ("smollm2_gguf", "llama31_8b_nf4", "mistral_7b_nf4")]
"""Each public shape once: a 4-bit preset has that of its full-precision one."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_target_modules_resolve_on_the_full_dimensions(name: str) -> None:
    shape = whole(name)
    layers = public(name).config["num_hidden_layers"]
    blueprint = PeftTemplate(shape, name)
    first_two = r".*layers\.[01]\.mlp\.(up|down)_proj"
    for targets, number in (("all-linear", 7 * layers), (["q_proj", "v_proj"], 2 * layers), (first_two, 4)):
        assert skeleton.target_faults(shape, targets) == []
        shapes = blueprint.shapes(targets)
        assert len(shapes) == number
        assert targets != "all-linear" or shapes.keys() == linears(shape).keys()
        for module, (d_in, d_out) in shapes.items():
            assert shape.get_submodule(module).weight.shape == (d_out, d_in)
    assert len(skeleton.target_faults(shape, ["query_key_value"])) == 1


def reduced(name: str) -> dict[str, Any]:
    """The architecture with everything that shapes it, small: two layers, a vocabulary of the embedded tokenizer."""
    config = dict(public(name).config)
    heads = {"num_attention_heads": 4, "num_key_value_heads": max(1, 4 * config["num_key_value_heads"] // 32)}
    config |= {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    config |= heads | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "dtype": "bfloat16"}
    if config.get("sliding_window"):
        # Shorter than the rows below, and the last layer sees all.
        config |= {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    return config


def put_into_cache(cache: Path, hub_id: str, config: dict[str, Any]) -> Path:
    """A checkpoint of random weights where the hub's client keeps a downloaded one."""
    torch.manual_seed(0)
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    commit = "0" * 40
    folder = repository / "snapshots" / commit
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16).save_pretrained(folder)
    for file in WEIGHTS.glob("tokenizer*"):
        shutil.copy(file, folder)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    return folder


def random_data(rows: int = 6, length: int = 24) -> Data:
    ids = torch.randint(3, 1024, (rows, length), generator=torch.Generator().manual_seed(0))
    part = TokenSet.of([(row, [True] * length) for row in ids.tolist()])
    return Data(part, part, part)


@pytest.mark.parametrize("name", [name for name in NAMED if name not in ("tiny", "smollm2_gguf")])
def test_a_preset_is_checked_loaded_and_trained_from_the_hubs_cache_without_a_network(
    name: str, trial: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = preset(name)
    assert "HF_HUB_OFFLINE is set" in str(skeleton.check(model, "all-linear")[0])
    put_into_cache(tmp_path, str(model.path), reduced(name))
    assert skeleton.check(model, "all-linear") == []
    base = load_base(model, CPU)
    assert type(base.model).__name__ == public(name).model_class
    assert base.name_or_path == model.path
    assert base.dtype == torch.bfloat16
    one = trial(0, rank=4, slots=2, max_steps=2, eval_every=2, batch_size=2, eval_batch_size=3, base_lr=1e-3)
    other = trial(1, rank=2, slots=2, max_steps=2, eval_every=2, batch_size=2, eval_batch_size=3, base_lr=1e-3)
    pack = Pack(base, random_data(), Settings.of(one), 4)
    pack.admit(one)
    pack.admit(other)
    for evaluation in pack.advance():
        assert not evaluation.diverged
        assert evaluation.grad_norm_B_over_s > 0
        assert all(measured.delta_rel > 0 for measured in evaluation.measurements)
    pack.close()


def test_a_quantized_preset_holds_what_its_header_reckons_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = preset("llama31_8b_nf4")
    wide = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 128}
    put_into_cache(tmp_path, str(model.path), reduced("llama31_8b_nf4") | wide)
    base = load_base(model, CPU)
    linear = sum(quant.dequantized(module).numel() for module in linears(base.model).values())
    reckoned = linear * (1 / 2 + 1 / 64 + 4 / (64 * 256)) + (base.parameters - linear) * 2
    # The tables of the two codes (1,088 bytes) and buffers are not reckoned with.
    assert base.bytes == pytest.approx(reckoned, rel=0.01)


@pytest.mark.real
def test_the_gguf_preset_is_the_model_that_its_header_says() -> None:
    assert skeleton.check(preset("smollm2_gguf"), "all-linear") == []
    config = base_config.read_config(preset("smollm2_gguf"))
    expected = {key: value for key, value in SMOLLM2.config.items() if key.startswith(("num_", "hidden", "inter"))}
    assert {key: getattr(config, key) for key in expected} == expected
    assert config.vocab_size == SMOLLM2.config["vocab_size"]
