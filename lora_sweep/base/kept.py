"""A base that no name reaches, kept as safetensors where adapters find it."""

import hashlib
import json
import logging
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lora_sweep.base.base_config import checked_config
from lora_sweep.base.source import Source
from lora_sweep.base.weights import read_frozen, read_tokenizer
from lora_sweep.config import ModelConfig
from lora_sweep.errors import UserError
from lora_sweep.system import files
from lora_sweep.system.disk import disk_errors

_log = logging.getLogger(__name__)

ORIGIN = "origin.json"
"""Which base a kept folder was made from, and the sha256 of each of its files."""


def kept(model: ModelConfig, at: Source, root: Path) -> Source:
    """The base as safetensors under root/base; a further one of the same study lies in a folder beside it.

    Written when first asked for, and anew where its files are not what was written; a folder appears whole or not at
    all. Raises StudyError or StorageUnavailable where it cannot be written.
    """
    origin = {"path": model.path, "dtype": model.dtype}
    mark = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:8]
    with disk_errors(root):
        for folder in (root / "base", root / f"base-{mark}"):
            stored = _origin(folder)
            if stored.items() >= origin.items() and _is_as_written(folder, stored):
                return Source(str(folder.resolve()))
            if not folder.exists():
                _write(model, at, folder, origin)
                return Source(str(folder.resolve()))
            if not stored or stored.items() >= origin.items():
                damaged = folder.with_name(f"damaged-{folder.name}-{secrets.token_hex(4)}")
                folder.rename(damaged)
                _log.warning("%s: is not the base that was written; moved to %s and written anew", folder, damaged.name)
                _write(model, at, folder, origin)
                return Source(str(folder.resolve()))
    raise UserError(f"{folder}: holds no base that this study kept; move it away")


def _origin(folder: Path) -> dict[str, Any]:
    """Empty where there is none to be read."""
    try:
        origin = files.read_json(folder / ORIGIN, follow=False)
    except (OSError, files.Unsafe):
        return {}
    return origin if isinstance(origin, dict) else {}


def _is_as_written(folder: Path, origin: Mapping[str, Any]) -> bool:
    """Whether the files are those that were written; older versions noted no digests."""
    try:
        return all(_digest(folder / name) == each for name, each in origin.get("files", {}).items())
    except (OSError, files.Unsafe, AttributeError):
        return False


def _digest(file: Path) -> str:
    with files.open_file(file, follow=False) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _write(model: ModelConfig, at: Source, folder: Path, origin: dict[str, Any]) -> None:
    config, tokens = checked_config(model, at), read_tokenizer(model, at)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = files.staging(folder)
    staging.mkdir()
    try:
        try:
            read_frozen(model, at, config).save_pretrained(staging)
            tokens.save_pretrained(staging)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        digests = {file.name: _digest(file) for file in sorted(staging.iterdir()) if file.is_file()}
        (staging / ORIGIN).write_text(json.dumps({**origin, "files": digests}, indent=2))
        files.share(staging)
        try:
            staging.rename(folder)
        except OSError:
            # Another worker may have been faster.
            if not (folder / ORIGIN).is_file():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
