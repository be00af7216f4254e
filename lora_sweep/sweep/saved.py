"""Configurations as a study or a trial keeps them: read again, and compared with what is asked now."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_sweep.config import Config, HealthConfig
from lora_sweep.errors import ConfigError, Fault
from lora_sweep.sweep import compose

RELAUNCH_MAY_CHANGE = (
    "tracker", "launcher", "pick", "study.root", "study.keep_adapters", "study.fold", "study.verify_fold",
    "train.slots",
)  # fmt: skip
"""What a relaunch may change: it says how a study runs, not what its numbers mean."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a relaunch would change in a study's meaning, a line each."""
    old, new = (dict(compose.leaves(compose.current(tree))) for tree in (before, now))
    lines = []
    for key in [*old, *(key for key in new if key not in old)]:
        means = not any(key == free or key.startswith(f"{free}.") for free in RELAUNCH_MAY_CHANGE)
        if means and old.get(key) != new.get(key):
            lines.append(f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}")
    return lines


def load_launched(folder: Path, name: str = "config.yaml") -> dict[str, Any] | None:
    """A study's or a trial's configuration, or None where there is none. Raises ConfigError when it cannot be read."""
    file = folder / name
    if not os.path.lexists(file):
        return None
    plain = compose.read_yaml(file)
    if not isinstance(plain, dict) or not all(isinstance(key, str) for key in plain):
        raise ConfigError([Fault(str(file), "must hold a mapping of groups, as `launch` wrote it")])
    return plain


def of_launched(plain: Mapping[str, Any]) -> Config:
    """The configuration in a trial's config.yaml; knobs younger than it are at their defaults. Raises ConfigError."""
    whole = OmegaConf.merge(compose.compose([]), OmegaConf.create(dict(plain)))
    assert isinstance(whole, DictConfig)
    return compose.build(whole)


def health_rules(launched: Mapping[str, Any]) -> HealthConfig:
    """By which a study's trials are judged: those that it was launched with, younger ones at their defaults.

    Raises ConfigError.
    """
    health: HealthConfig = compose.section("health", launched.get("health", {}))
    return health
