"""Which base the adapters of a study name: one that lies in the study moves with it, and they follow."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_sweep.base.source import EMBEDDED
from lora_sweep.errors import ConfigError
from lora_sweep.sweep import compose, saved
from lora_sweep.system import files
from lora_sweep.system.disk import disk_errors
from lora_sweep.tracking import seal

KEPT = re.compile(r"base(?:-[0-9a-f]{8})?")
"""Names of the folders in which a study keeps a base that no name reaches (base.kept)."""


def repair(folder: Path) -> int:
    """Lets every adapter of the study (or of the single trial) in `folder` name the base that lies there now.

    Returns how many named one elsewhere: the study was moved or copied. Adapters on a hub model or a checkpoint of
    the user's are left alone. Raises StudyError or StorageUnavailable where one cannot be written.
    """
    home, count = folder.resolve(), 0
    for adapter in _adapters(folder):
        plain = _read(adapter / "adapter_config.json")
        named = Path(str(plain.get("base_model_name_or_path"))) if plain else Path()
        here = home / named.name
        if named.is_absolute() and KEPT.fullmatch(named.name) and named != here and here.is_dir() and _is_kept(adapter):
            text = json.dumps({**plain, "base_model_name_or_path": str(here)}, indent=2, sort_keys=True)
            with disk_errors(adapter):
                files.write_whole(adapter / "adapter_config.json", text.encode())
            count += 1
    return count


def moved(folder: Path, count: int) -> str:
    """What `repair` did, one sentence."""
    return f"{folder} was moved or copied: {count} of its adapters named a base elsewhere, and name the one in it now"


def _adapters(folder: Path) -> Iterator[Path]:
    trials = sorted((folder / "trials").iterdir()) if (folder / "trials").is_dir() else []
    for trial in (folder, *trials, folder / "production"):
        adapter = trial / seal.ADAPTER
        if adapter.is_dir() and not adapter.is_symlink() and not trial.is_symlink():
            yield adapter


def _read(file: Path) -> dict[str, Any]:
    """Empty where it cannot be read: `results` names the damage."""
    try:
        plain = files.read_json(file, seal.MAX_CONFIG_BYTES, follow=False)
    except (OSError, files.Unsafe):
        return {}
    return plain if isinstance(plain, dict) else {}


def _is_kept(adapter: Path) -> bool:
    """Whether the adapter's trial trained on a base that its study keeps, by its configuration."""
    around = adapter.parent
    try:
        launched = saved.load_launched(around, "production.yaml" if around.name == "production" else "config.yaml")
    except ConfigError:
        return False
    path = str(compose.leaf(launched or {}, "model.path"))
    return path.startswith(EMBEDDED) or path.endswith(".gguf")
