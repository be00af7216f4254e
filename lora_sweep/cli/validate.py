"""What a person asks for: a sweep, or every fault of it at once, before anything starts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_sweep import data, pack
from lora_sweep.base import base_config, skeleton
from lora_sweep.base.load import tokenizer as load_tokenizer
from lora_sweep.cli.live import Preparing
from lora_sweep.data import provenance
from lora_sweep.errors import ConfigError, Fault
from lora_sweep.runner import launch, worker
from lora_sweep.sweep import check, compose, sweep_file
from lora_sweep.sweep.sweep import Sweep
from lora_sweep.system.console import Console, say
from lora_sweep.system.terminal import complain


def validate_sweep(
    path: str | None,
    overrides: list[str] | None,
    defaults: Mapping[str, Any] | None = None,
    unread: Sequence[str] = (),
    resumes: bool = False,
) -> Sweep:
    """The sweep that a file and the command line ask for, or every fault of it at once.

    Without a file, `defaults` come in its place. Of groups in `unread` nobody checks whether what they name is there.
    Raises ConfigError, and StudyError where the data has changed.

    Args:
        resumes: a study that lies in its folder already goes on, so it must be on the same data.
    """
    if path is not None and "=" in path:
        raise ConfigError(
            [Fault("SWEEP", "must be a sweep file", path, "e.g. sweeps/quickstart.yaml, overrides after it")]
        )
    sweep, faults = sweep_file.read(path, overrides or [])
    sweep = replace(sweep, content={**sweep.content, **(defaults or {})})
    variants, more = check.check(sweep)
    faults += more
    if path is None:
        rule = "train runs one trial" if defaults is None else "bench makes its own trials around one value"
        faults += [Fault(axis.key, rule, str(axis), "use launch") for axis in sweep.axes]
    elif not sweep.axes and not faults:
        faults.append(Fault("space", "is empty", None, "give it an axis: method.rank: choice(4, 16)"))
    variants = [{name: group for name, group in each.items() if name not in unread} for each in variants]
    faults += _module_faults(variants)
    if not faults and not unread:
        faults += _prepared(variants, launch.study_folder(sweep.base().study) if resumes else None)
    if faults:
        raise ConfigError(list({str(fault): fault for fault in faults}.values()))
    for old, new in compose.old_keys(compose.plain(sweep.composed())).items():
        complain(f"warning: {old} is now {new}; the old name is still read")
    return sweep


def _prepared(variants: list[dict[str, Any]], folder: Path | None) -> list[Fault]:
    """Has the user's data tokenized, once for all launches, and reports what became of its rows.

    Raises StudyError where the study in `folder` began with other data, also where it has nothing left to train.
    """
    console = Console(stderr=True)
    pairs: list[tuple[Any, Any]] = []
    faults: list[Fault] = []
    for groups in variants:
        pair = groups["model"], groups["data"]
        if pair in pairs:
            continue
        pairs.append(pair)
        if pair[0].trust_remote_code:
            say(console, f"model.trust_remote_code is on: code that lies beside {pair[0].path} runs with your rights")
        if pair[1].name in data.USER_DATA:
            tokenizer = load_tokenizer(pair[0])
            try:
                with Preparing(console) as show:
                    loaded = data.load(pair[1], tokenizer, show)
            except ConfigError as error:
                faults += error.faults
                continue
            if folder is not None:
                provenance.refuse_changed(folder, loaded.report.sources)
            base = base_config.read_config(pair[0])
            faults += base_config.input_faults(pair[0].path, base, loaded.length, loaded.largest_id)
            beyond = base_config.beyond_training(base, loaded.length)
            for line in [*loaded.report.warnings(), *([beyond] if beyond else [])]:
                say(console, line)
    return faults


def _module_faults(variants: list[dict[str, Any]]) -> list[Fault]:
    """What reads files and devices finds, each model, target and data set checked once."""
    models, sets = [], []
    for groups in variants:
        targets = groups["method"].target_modules if "method" in groups else "all-linear"
        if "model" in groups and (groups["model"], targets) not in models:
            models.append((groups["model"], targets))
        if "data" in groups and groups["data"] not in sets:
            sets.append(groups["data"])
    faults = [fault for each in models for fault in skeleton.check(*each)]
    faults += [fault for each in sets for fault in data.check(each)]
    launcher = next((groups["launcher"] for groups in variants if "launcher" in groups), None)
    for optimizer in {groups["optimizer"] for groups in variants if "optimizer" in groups}:
        faults += pack.check(optimizer, worker.device(launcher)) if launcher is not None else []
    for groups in variants[:1]:
        faults += launch.check(groups["study"]) if "study" in groups else []
        faults += worker.check(groups["launcher"]) if "launcher" in groups else []
    return faults
