"""Optuna's own samplers and pruners, by the name of their class: nothing else is ever built from a configuration."""

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import optuna
from hydra.utils import instantiate
from optuna.exceptions import ExperimentalWarning

from lora_sweep.errors import ConfigError, Fault
from lora_sweep.sweep import compose


def target_faults(field: str, node: Mapping[str, Any], kind: Literal["samplers", "pruners"]) -> list[Fault]:
    """Whether every `_target_` in the node is one of Optuna's own sampler or pruner classes, and takes its arguments.

    A prefix test would not do: `optuna.samplers._base.np.load` starts with the right words and reads pickles.
    """
    faults = []
    targets = {"_target_": node.get("_target_")} | dict(compose.leaves(node))
    for key, value in targets.items():
        *above, name = key.split(".")
        if name == "_target_" and not any(part.startswith("_") for part in above):
            kinds = [kind] if key == "_target_" else list(_KINDS)
            if not any(_is_optuna_class(value, each) for each in kinds):
                remedy = f"e.g. optuna.{kind}.{_KINDS[kind][1]}"
                faults.append(
                    Fault(f"{field}.{key}", f"must be a class of optuna.{' or optuna.'.join(kinds)}", value, remedy)
                )
        elif any(part.startswith("_") for part in (*above, name)):
            faults.append(Fault(f"{field}.{key}", "only _target_ and plain arguments are read"))
    if faults:
        return faults
    try:
        _instantiated(node)
    except Exception as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        faults.append(Fault(field, f"{node['_target_']} refuses these arguments: {reason}"))
    return faults


def _instantiated(node: Mapping[str, Any]) -> Any:
    with warnings.catch_warnings():
        # Who names a class by its path knows what it is.
        warnings.simplefilter("ignore", ExperimentalWarning)
        return instantiate(dict(node))


_KINDS: dict[str, tuple[Any, str, type]] = {
    "samplers": (optuna.samplers, "TPESampler", optuna.samplers.BaseSampler),
    "pruners": (optuna.pruners, "MedianPruner", optuna.pruners.BasePruner),
}


def _is_optuna_class(target: Any, kind: str) -> bool:
    module, _, base = _KINDS[kind]
    package, _, name = str(target).rpartition(".")
    if package != module.__name__ or name not in module.__all__:
        return False
    cls = getattr(module, name)
    return isinstance(cls, type) and issubclass(cls, base)


def instance(node: Mapping[str, Any], kind: Literal["samplers", "pruners"]) -> Any:
    """Optuna's own object for a sampler's or pruner's `instance`. Raises ConfigError."""
    faults = target_faults(f"{kind[:-1]}.instance", node, kind)
    if faults:
        raise ConfigError(faults)
    return _instantiated(node)
