"""Names of tensors in an adapter's file, as PEFT reads them: which it loads, and into what."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

PREFIX = "base_model.model."
"""How the name of what PEFT loads begins; all else in the file it passes over."""

ADAPTER = "default"
"""The adapter's name unless PeftModel.from_pretrained(adapter_name=...) gives another."""

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, FSDP and activation checkpointing write into the names of a wrapped model."""

Part = Literal["A", "B", "bias", "magnitude"]

ENDINGS: dict[str, tuple[Part, str]] = {
    "lora_A.weight": ("A", "lora_A.weight"),
    "lora_B.weight": ("B", "lora_B.weight"),
    "lora_B.bias": ("bias", "lora_B.bias"),
    "lora_embedding_A": ("A", "lora_embedding_A"),
    "lora_embedding_B": ("B", "lora_embedding_B"),
    "lora_magnitude_vector": ("magnitude", "lora_magnitude_vector"),
    "lora_magnitude_vector.weight": ("magnitude", "lora_magnitude_vector"),
    # As model.state_dict() has them. PEFT from 0.21 on loads them where the adapter has this name.
    f"lora_A.{ADAPTER}.weight": ("A", "lora_A.weight"),
    f"lora_B.{ADAPTER}.weight": ("B", "lora_B.weight"),
    f"lora_B.{ADAPTER}.bias": ("bias", "lora_B.bias"),
    f"lora_embedding_A.{ADAPTER}": ("A", "lora_embedding_A"),
    f"lora_embedding_B.{ADAPTER}": ("B", "lora_embedding_B"),
    f"lora_magnitude_vector.{ADAPTER}.weight": ("magnitude", "lora_magnitude_vector"),
}
"""How a name that PEFT loads ends -> (part of the module's LoRA, the ending that save_pretrained writes)."""

LORA = re.compile(r"(?P<module>.+)\.(?P<ending>lora_(?:embedding_[AB]|[AB]|magnitude_vector)(?:\.[^.]+){0,2})")
PARAMETERS = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
"""What save_pretrained writes without `.weight`."""


@dataclass(frozen=True)
class Key:
    """One tensor's name in the file, understood."""

    name: str
    target: str
    """Module in the base that the LoRA is of, or the parameter in the base where it is no LoRA."""
    part: Part | None
    """None where it is no LoRA, or where PEFT does not load it."""
    is_lora: bool
    loads: bool
    """Whether PEFT loads it, as adapter `default`, into a base that has the target."""
    saved_as: str
    """The name that save_pretrained gives it."""

    @property
    def is_embedding(self) -> bool:
        return "lora_embedding_" in self.saved_as

    @property
    def has_adapter_name(self) -> bool:
        return self.loads and self.is_lora and f".{ADAPTER}" in self.name.removeprefix(f"{PREFIX}{self.target}")


def parse(name: str) -> Key:
    plain, is_plain = _unwrapped(name)
    lora = LORA.fullmatch(plain)
    if lora is None:
        # save_pretrained leaves modules_to_save and the adapter's name out; with them PEFT finds nothing.
        target = re.sub(r"\.modules_to_save(?:\.[^.]+(?=\.[^.]+$))?\.", ".", plain)
        saved_as, loads = f"{PREFIX}{target}", is_plain and target == plain
        return Key(name, target.replace(".base_layer.", "."), None, False, loads, saved_as)
    module, ending = lora["module"], lora["ending"]
    part, saved = ENDINGS.get(ending, (None, _saved(ending)))
    loads = is_plain and part is not None
    return Key(name, module, part if loads else None, True, loads, f"{PREFIX}{module}.{saved}")


def _unwrapped(name: str) -> tuple[str, bool]:
    """(the name within the base, whether PEFT finds it there)."""
    rest = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    while True:
        start = next((start for start in (PREFIX, "base_model.", "module.") if rest.startswith(start)), None)
        if start is None:
            return rest, name == f"{PREFIX}{rest}"
        rest = rest.removeprefix(start)


def _saved(ending: str) -> str:
    """The ending that save_pretrained writes, for one that PEFT does not load."""
    factor, *rest = ending.split(".")
    if factor in PARAMETERS:
        return factor
    return f"{factor}.{'bias' if rest and rest[-1] == 'bias' else 'weight'}"


def passed_over(keys: Iterable[Key]) -> str:
    """A sentence on tensors that PEFT does not load for their names, and what to do."""
    each = list(keys)
    more = " and so on" if len(each) > 1 else ""
    return (
        f"PEFT passes over {len(each)} of the file's tensors for their names: {each[0].name!r} must be "
        f"{each[0].saved_as!r}{more}; rename them, or save again with save_pretrained of the unwrapped PeftModel"
    )
