"""Words of other tools (PEFT, transformers, W&B, axolotl) for our keys, and lines that are nearly in the grammar."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_sweep.errors import Fault

ALIASES = {
    "learning_rate": "optimizer.base_lr", "lr": "optimizer.base_lr", "lora_r": "method.rank",
    "lora_rank": "method.rank",
    "lora_alpha": "method.alpha", "lora_dropout": "method.dropout", "use_rslora": "method.use_rslora",
    "lora_target_modules": "method.target_modules", "target_modules": "method.target_modules",
    "loraplus_lr_ratio": "optimizer.ratio", "method.r": "method.rank", "method.lora_r": "method.rank",
    "method.lora_alpha": "method.alpha", "method.lora_dropout": "method.dropout", "optimizer.lr": "optimizer.base_lr",
    "optimizer.learning_rate": "optimizer.base_lr", "optimizer.loraplus_lr_ratio": "optimizer.ratio",
    "train.learning_rate": "optimizer.base_lr",
}  # fmt: skip
"""A key as PEFT, transformers or axolotl has it -> ours; it means nothing else here."""

HINTS = {"r": "method.rank"}
"""Words too short to be taken for a key, proposed as one."""

ELSEWHERE = {
    "base_model": "model.path", "model_name_or_path": "model.path", "learning_rate": "optimizer.base_lr",
    "lora_r": "method.rank", "lora_rank": "method.rank", "lora_alpha": "method.alpha", "lora_dropout": "method.dropout",
    "micro_batch_size": "train.batch_size", "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps", "max_steps": "train.max_steps",
    "sequence_len": "data.max_length", "cutoff_len": "data.max_length", "val_set_size": "data.eval_share",
    "wandb_project": "tracker.project", "loraplus_lr_ratio": "optimizer.ratio", "seed": "train.seed",
    "weight_decay": "optimizer.weight_decay", "warmup_steps": "train.warmup_steps",
}  # fmt: skip
"""A key of an axolotl, LLaMA-Factory or Trainer configuration -> ours."""

_MARKS = {"base_model", "model_name_or_path", "adapter", "datasets", "finetuning_type", "load_in_8bit", "load_in_4bit"}
"""Keys by which such a configuration is known."""

_AXIS_WORDS = {"min", "max", "values", "value", "distribution", "q", "mu", "sigma", "probabilities", "parameters"}


def alias(line: str) -> str:
    """The override with our word for its key, and in quotes where a reference between fields needs them.

    >>> alias("lora_r=choice(4, 8)")
    'method.rank=choice(4, 8)'
    >>> alias("method.alpha=${times:2,${method.rank}}")
    'method.alpha="${times:2,${method.rank}}"'
    """
    key, equals, value = line.partition("=")
    bare = key.lstrip("+")
    key = key[: len(key) - len(bare)] + ALIASES.get(bare, bare)
    if value.lstrip().startswith("${") and '"' not in value and "'" not in value:
        value = f'"{value.strip()}"'
    return f"{key}{equals}{value}"


def renamed(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """A sweep file's content under our words, at the top and in its groups; and what is named twice by that."""
    plain: dict[str, Any] = {}
    faults: list[Fault] = []
    placed: dict[str, str] = {}
    for name, value in content.items():
        if name in ALIASES:
            pairs = [(ALIASES[name], name, value)]
        elif isinstance(value, Mapping):
            plain[name] = dict(plain.get(name) or {})
            inner = {f"{name}.{key}": each for key, each in value.items()}
            pairs = [(ALIASES.get(full, full), full, each) for full, each in inner.items()]
        else:
            plain.setdefault(name, value)
            continue
        for full, written, each in pairs:
            group, _, key = full.partition(".")
            if full in placed:
                faults.append(Fault(written, f"means {full}, which {placed[full]} gives too; leave one of them out"))
                continue
            placed[full] = written
            into = plain.setdefault(group, {})
            if isinstance(into, dict):
                into[key] = each
    return plain, faults


def foreign(content: Mapping[str, Any]) -> list[Fault]:
    """One fault where the file is another tool's configuration, with what it would be here."""
    parameters = content.get("parameters")
    if isinstance(parameters, Mapping):
        lines = [f"{ALIASES.get(str(key), str(key))}: {axis_of(each)}" for key, each in parameters.items()]
        rule = "are a W&B sweep's; here axes stand under `space`, one a line"
        return [Fault("parameters", rule, None, "; ".join(lines))]
    if _MARKS & content.keys():
        words = [
            f"{ELSEWHERE[key]}={_short(value)}"
            for key, value in content.items()
            if key in ELSEWHERE and isinstance(value, str | int | float)
        ]
        rule = "is a key of another tool's configuration, and this no sweep file"
        mark = next(key for key in content if key in _MARKS)
        hub = "model=hub " if {"base_model", "model_name_or_path"} & content.keys() else ""
        return [Fault(mark, rule, None, f"lora-sweep launch sweeps/quickstart.yaml {hub}{' '.join(words)}")]
    return []


def axis_of(value: Any) -> str:
    """W&B's words for an axis in ours: {min, max} is an interval, {values} a choice, {value} the value."""
    if not isinstance(value, Mapping):
        return _short(value)
    if isinstance(value.get("values"), list):
        return f"choice({', '.join(map(_short, value['values']))})"
    if "value" in value:
        return _short(value["value"])
    interval = f"interval({_short(value.get('min'))}, {_short(value.get('max'))})"
    return f"tag(log, {interval})" if "log" in str(value.get("distribution", "")) else interval


def is_axis_of_wandb(value: Any) -> bool:
    """Whether it is {min, max}, {values} or {value}, with what W&B allows beside them."""
    if not isinstance(value, Mapping) or not set(value) <= _AXIS_WORDS:
        return False
    return {"min", "max"} <= value.keys() or not {"values", "value"}.isdisjoint(value)


def near_key(key: str, keys: Iterable[str]) -> str:
    """The key that a bare word may mean; empty where none."""
    return HINTS.get(key) or next((full for full in keys if full.endswith(f".{key}")), "")


def _short(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = str(value)
    return text if re.fullmatch(r"[\w./+-]+", text) else f'"{text}"'
