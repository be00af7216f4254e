"""What a finished trial's files were when it ended: size and digest of each, kept in its result.json.

So a file that was cut, lost or changed afterwards is named, and nothing else than what was trained is shipped.
"""

import hashlib
import json
import stat
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from lora_sweep.system import files

ADAPTER, ADAPTER_CONFIG = "adapter", "adapter/adapter_config.json"

MAX_CONFIG_BYTES = 2**22
"""Of an adapter_config.json: one with a rank for each of 10,000 modules has a quarter of it."""

BASE_NAME = ("base_model_name_or_path",)
"""Keys of an adapter's configuration that may change afterwards: a base that lies in the study moves with it."""

READ_BYTES = 2**20
"""Most of a file that is read to tell whether it has changed, where nothing is shipped."""

Seal = Mapping[str, Mapping[str, Any]]
"""Path inside the trial's folder -> `bytes` and `sha256`; of the adapter's configuration `sha256` alone."""


def sealed(folder: Path, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The seal of the files and folders of these names that are there. Raises OSError or files.Unsafe."""
    sizes = {}
    for name in names:
        path = folder / name
        for file in sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []:
            inside = file.relative_to(folder).as_posix()
            size = {} if inside == ADAPTER_CONFIG else {"bytes": file.stat().st_size}
            sizes[inside] = {**size, "sha256": digest(file, inside)}
    return sizes


def broken(folder: Path, seal: Seal) -> list[str]:
    """Names of the sealed files that are gone, links, or not what was sealed.

    Quick: of a file above READ_BYTES the size alone is compared, and one that has not changed is read once.
    """
    return [name for name, each in seal.items() if not _is_there(folder / name, name, each)]


def changed(folder: Path, seal: Seal) -> list[str]:
    """Names of the sealed files whose content is not what was sealed; each is read."""
    return [name for name, each in seal.items() if _digest_or_none(folder / name, name) != each["sha256"]]


def digest(file: Path, name: str) -> str:
    """sha256 of the file's bytes; of the adapter's configuration that of its fields but BASE_NAME.

    Raises OSError or files.Unsafe where it cannot be read.
    """
    if name == ADAPTER_CONFIG:
        plain = files.read_json(file, MAX_CONFIG_BYTES, follow=False)
        fields = (
            {key: value for key, value in plain.items() if key not in BASE_NAME} if isinstance(plain, dict) else plain
        )
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    with files.open_file(file, follow=False) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def is_seal(plain: object) -> bool:
    """Whether it has the form of a seal, all names of which stay inside the folder."""
    return isinstance(plain, dict) and all(
        isinstance(name, str)
        and not Path(name).is_absolute()
        and ".." not in Path(name).parts
        and isinstance(each, dict)
        and isinstance(each.get("sha256"), str)
        for name, each in plain.items()
    )


def _is_there(file: Path, name: str, each: Mapping[str, Any]) -> bool:
    try:
        status = file.lstat()
    except OSError:
        return False
    if not stat.S_ISREG(status.st_mode) or each.get("bytes") not in (None, status.st_size):
        return False
    if status.st_size > READ_BYTES:
        return True
    details = _digest_of(file, name, (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return bool(details == each["sha256"])


@lru_cache(maxsize=2**16)
def _digest_of(file: Path, name: str, _: tuple[int, ...]) -> str | None:
    """Read again when anything of its status has changed."""
    return _digest_or_none(file, name)


def _digest_or_none(file: Path, name: str) -> str | None:
    try:
        return digest(file, name)
    except (OSError, files.Unsafe):
        return None
