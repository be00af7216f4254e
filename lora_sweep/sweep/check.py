"""Every fault of a sweep's axes, values, sampler and pruner at once."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lora_sweep import config as schema
from lora_sweep.errors import ConfigError, Fault
from lora_sweep.study.asha import Asha
from lora_sweep.sweep import compose, optuna_classes
from lora_sweep.sweep.axis import inside, written
from lora_sweep.sweep.sweep import Sweep

MAX_CELLS = 50_000
"""Of a grid, and combinations of the values that a sampler draws from: more is a slip, and each is checked."""


def check(sweep: Sweep) -> tuple[list[dict[str, Any]], list[Fault]]:
    """(the faultless groups at the first values and with each axis varied by itself, every fault found on the way).

    Checks axes, values, samplers and pruners; files and devices are for the rooms that read them.
    """
    count = math.prod(len(axis.values) for axis in sweep.axes if axis.kind != "interval")
    if count > MAX_CELLS:
        rule = f"must have at most {MAX_CELLS:,} combinations of the values of its axes"
        return [], [Fault("space", rule, f"{count:,}", "an interval takes any number: interval(1e-5, 1e-3)")]
    faults: list[Fault] = []
    tried: dict[str, list[Any]] = {}
    with compose.groups():
        for axis in sweep.axes:
            tried[axis.key] = list(axis.values or (*axis.ends, inside(axis)))
            for value in axis.values if axis.is_group else ():
                unknown = compose.option_faults(axis.key, value)
                if unknown:
                    faults += unknown
                    tried[axis.key].remove(value)
    first = {key: values[0] for key, values in tried.items() if values}
    try:
        varied = [first, *(first | {key: value} for key, values in tried.items() for value in values[1:])]
        variants = []
        for params in varied:
            good, more = compose.sections(sweep.merged(params))
            variants.append(good)
            faults += [*map(partial(_of_interval, sweep), more), *schema.cross_faults(good)]
    except ConfigError as error:
        return [], [*faults, *error.faults]
    faults += _trust_faults(sweep, variants)
    for groups in variants:
        # What is refused is read by nobody.
        if "model" in groups and groups["model"].trust_remote_code and not _is_trusted(sweep):
            del groups["model"]
    sampler, pruner = variants[0].get("sampler"), variants[0].get("pruner")
    if sampler is not None:
        if sampler.name == "grid" and not faults:
            faults += _combination_faults(sweep)
        if sampler.name == "grid":
            for axis in sweep.axes:
                if axis.kind == "interval":
                    rule = "a grid cannot run over an interval"
                    faults.append(Fault(axis.key, rule, str(axis), "choice(...), or sampler=tpe"))
        if sampler.instance is not None:
            faults += optuna_classes.target_faults("sampler.instance", sampler.instance, "samplers")
    if pruner is not None and pruner.instance is not None:
        faults += optuna_classes.target_faults("pruner.instance", pruner.instance, "pruners")
    train = variants[0].get("train")
    if pruner is not None and pruner.name == "asha" and pruner.eta and pruner.min_steps and train is not None:
        try:
            Asha(pruner.eta, pruner.min_steps, train.max_steps, train.eval_every)
        except ConfigError as error:
            faults += error.faults
    return variants, list({str(fault): fault for fault in faults}.values())


def _trust_faults(sweep: Sweep, variants: Sequence[Mapping[str, Any]]) -> list[Fault]:
    """Code that lies beside a checkpoint runs when its user says so, never because a file does."""
    key = "model.trust_remote_code"
    trusting = any("model" in groups and groups["model"].trust_remote_code for groups in variants)
    if not trusting or _is_trusted(sweep):
        return []
    return [Fault(key, "is heard on the command line only", True, f"{key}=true after the sweep file")]


def _is_trusted(sweep: Sweep) -> bool:
    return any(line.startswith("++model.trust_remote_code=") for line in sweep.overrides)


def _combination_faults(sweep: Sweep) -> list[Fault]:
    """What only two axes together get wrong; none of an interval, which is a fault by itself."""
    if any(axis.kind == "interval" for axis in sweep.axes):
        return []
    for cell in sweep.cells():
        try:
            sweep.config(cell)
        except ConfigError as error:
            params = ", ".join(f"{key}={written(value)}" for key, value in cell.params.items())
            return [
                Fault(fault.field, f"{fault.rule} (at {params})", fault.got, fault.remedy) for fault in error.faults
            ]
    return []


def _of_interval(sweep: Sweep, fault: Fault) -> Fault:
    """A whole number missed by an interval of floats: says how to ask for one of integers."""
    axis = next((axis for axis in sweep.axes if axis.key == fault.field and axis.kind == "interval"), None)
    if axis is None or "integer" not in fault.rule:
        return fault
    return Fault(fault.field, "takes whole numbers", str(axis), f"int(interval({axis.low:g}, {axis.high:g}))")
