"""What the Hugging Face hub answers: why it gave nothing, and which commit lies in its cache."""

import re
from pathlib import Path
from typing import Literal

from huggingface_hub import constants, is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from lora_sweep.errors import Fault

Refusal = Literal["gated", "missing", "revision", "away"]
"""Why the hub gave nothing: no access, no such repository, no such commit, no hub and nothing in its cache."""

_REFUSALS: dict[type[Exception], Refusal] = {
    # A gated repository is a missing one to the client too: the order counts.
    GatedRepoError: "gated",
    RepositoryNotFoundError: "missing",
    RevisionNotFoundError: "revision",
    LocalEntryNotFoundError: "away",
}


def refusal(error: BaseException) -> Refusal | None:
    """What the hub's client said at the bottom of an error; None where it is another's."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return next((why for kind, why in _REFUSALS.items() if any(isinstance(each, kind) for each in chain)), None)


def hub_fault(why: Refusal, group: Literal["model", "data"], path: str, revision: str | None) -> Fault:
    """The one line for a base (group `model`) or a data set that the hub did not give."""
    key = f"{group}.path"
    if why == "gated":
        return Fault(key, "is gated on the hub: accept its terms there, then log in", path, "hf auth login")
    if why == "missing":
        kind = "model" if group == "model" else "data set"
        remedy = "look for a slip; if it is private: hf auth login"
        return Fault(key, f"no such {kind} on the hub, or none that you may see", path, remedy)
    if why == "revision":
        return Fault(f"{group}.revision", f"no such commit or tag of {path}", revision)
    away = "is not in the hub's cache" + (f" at {revision}" if revision else "")
    if not is_offline_mode():
        return Fault(key, f"{away}, and the hub cannot be reached", path)
    # `datasets` reads offline what it has prepared itself, not what was downloaded.
    first = f"hf download {path}" + (f" --revision {revision}" if revision else "")
    first = f"bring the files there first: {first}" if group == "model" else "run this once without it"
    return Fault(key, f"{away}, and HF_HUB_OFFLINE is set", path, f"unset it, or {first}")


def cached_commit(data_set: str, revision: str) -> str | None:
    """The commit that a branch or tag of a hub data set was when last seen from here; a whole commit is itself."""
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    name = repo_folder_name(repo_id=data_set, repo_type="dataset")
    ref = Path(constants.HF_HUB_CACHE) / name / "refs" / revision
    return ref.read_text().strip() if ref.is_file() else None
