"""Which content each data source had when a study began: a study never mixes two contents of one name."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from lora_sweep.data import Report
from lora_sweep.errors import StudyError
from lora_sweep.system import files
from lora_sweep.system.disk import write_whole


def refuse_changed(folder: Path, sources: Mapping[str, str]) -> None:
    """Raises StudyError where one of the sources (name -> sha256) has changed since the study in `folder` began."""
    for name, digest in sources.items():
        before = _before(_file(folder, name))
        if before is not None and before != digest:
            raise StudyError(
                f"{folder}: {name} has changed since the study began (sha256 {before[:12]} -> {digest[:12]}); "
                "choose another study.name, or bring the data back"
            )


def keep(folder: Path, report: Report) -> None:
    """Writes the digest of each source, and what became of the rows. Raises StudyError or StorageUnavailable."""
    for name, digest in report.sources.items():
        file = _file(folder, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({"source": name, "digest": digest, "report": report.plain()}, indent=2) + "\n")


def _file(folder: Path, name: str) -> Path:
    return folder / "data" / f"{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:12]}.json"


def _before(file: Path) -> str | None:
    """The digest on record; None where there is none."""
    try:
        plain = files.read_json(file, follow=False)
    except FileNotFoundError:
        return None
    except files.Unsafe as error:
        raise StudyError(
            f"{file}: {error}; restore it from a copy, or remove it to go on with the data as they are"
        ) from error
    digest = plain.get("digest") if isinstance(plain, dict) else None
    if not isinstance(digest, str):
        raise StudyError(
            f"{file}: holds no digest; restore it from a copy, or remove it to go on with the data as they are"
        )
    return digest
