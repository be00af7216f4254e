"""Folder, base and trial together: one Inspection per adapter."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lora_sweep.adapters import keys, reader
from lora_sweep.adapters import targets as adapter_targets
from lora_sweep.adapters.reader import Saved
from lora_sweep.adapters.targets import Missing
from lora_sweep.errors import ConfigError, Fault, UserError
from lora_sweep.inspection.measure import (
    ExtraMeasurement,
    ModuleMeasurement,
    Verdict,
    judge,
    measure,
    measure_extra,
    named,
    zero_start,
)

RATIO_TOLERANCE = 0.1
"""In powers of two, as rule `ratio_lost` has it."""


@dataclass(frozen=True)
class LoraPlus:
    """Whether B was stepped with the learning rate that LoRA+ (2402.12354) was asked for."""

    conforms: bool | None
    """None where it cannot be determined."""
    sentence: str
    requested: float | None = None
    """lr_B / lr_A of the configuration."""
    least: float | None = None
    """Least lr_B / lr_A of the steps as recorded."""
    most: float | None = None
    steps: int = 0
    """Steps with both rates above 0."""


@dataclass(frozen=True)
class Inspection:
    """One adapter, measured and judged."""

    folder: str
    verdict: Verdict
    sentence: str
    base: str | None
    """`base_model_name_or_path` of its configuration."""
    compared_with: str | None
    """The base that it was compared with."""
    use_rslora: bool
    use_dora: bool
    parameters: int
    """Of the LoRA factors."""
    bytes: int
    """Of the weights file."""
    modules: tuple[ModuleMeasurement, ...]
    extras: tuple[ExtraMeasurement, ...]
    loraplus: LoraPlus
    missing: tuple[Missing, ...]
    """What the configuration promises and PEFT does not find in the file."""
    passed_over: tuple[str, ...]
    """Tensors of the file that PEFT does not load."""
    notes: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """In JSON's types; numbers that are not finite are None already."""
        return asdict(self)


def inspect(folder: Path, base: str | None = None, allow_pickle: bool = False) -> tuple[list[Inspection], list[str]]:
    """(the adapters in the folder, one line for each that cannot be read).

    Raises UserError where no adapter is found, or the base cannot be read.

    Args:
        base: folder, hub id, .gguf file or `embedded:tiny` to compare them with; its weights are loaded on the CPU.
    """
    saved, errors = [], []
    for each in reader.find(folder):
        try:
            saved.append(reader.read(each, allow_pickle))
        except UserError as error:
            errors.append(str(error))
    loaded = _base(base) if base is not None and saved else None
    inspections = []
    for one in saved:
        try:
            inspections.append(_inspected(one, base, loaded))
        except UserError as error:
            errors.append(str(error))
    return inspections, errors


def _base(path: str) -> Any:
    from lora_sweep.base import weights

    try:
        return weights.weights(path)
    except ConfigError as error:
        own = [replace(fault, field="--base") if fault.field == "model.path" else fault for fault in error.faults]
        raise ConfigError(own) from error


def _inspected(saved: Saved, base: str | None, loaded: Any) -> Inspection:
    config, notes = saved.config, list(saved.notes)
    init = config.init_lora_weights
    starts = {name: zero_start(init, each.is_embedding) for name, each in saved.factors.items()}
    if saved.factors and None in starts.values():
        notes.append(
            f"init_lora_weights={init!r} does not start a factor at zero, so nothing tells a fresh adapter from a "
            "trained one, and BA may hold what its start took out of the base's weights"
        )
    if config.use_dora and loaded is None:
        notes.append("DoRA: how far the magnitudes moved can only be compared with the base's (--base)")
    modules = tuple(
        measure(name, each, starts[name], _weight(saved, name, loaded)) for name, each in saved.factors.items()
    )
    missing, homeless = (
        (adapter_targets.missing(saved), ()) if loaded is None else adapter_targets.missing_on(saved, loaded)
    )
    if loaded is None and (thin := adapter_targets.thin_blocks(saved)) is not None:
        notes.append(thin)
    if homeless:
        modules = tuple(each for each in modules if not any(f".{each.name}.lora_" in name for name in homeless))
    # A tied weight has two names.
    parameters = {} if loaded is None else dict(loaded.named_parameters(remove_duplicate=False))
    extras = tuple(
        measure_extra(name, tensor, config.modules_to_save or [], parameters.get(name))
        for name, tensor in saved.extras.items()
    )
    verdict, sentence = judge(modules, extras, _clauses(saved, missing, homeless))
    return Inspection(
        folder=str(saved.folder),
        verdict=verdict,
        sentence=sentence,
        base=config.base_model_name_or_path,
        compared_with=base,
        use_rslora=bool(config.use_rslora),
        use_dora=bool(config.use_dora),
        parameters=sum(each.parameters for each in modules),
        bytes=saved.bytes,
        modules=modules,
        extras=extras,
        loraplus=loraplus(saved.folder),
        missing=tuple(missing),
        passed_over=(
            *(key.name for key in saved.misnamed),
            *(name for each in saved.unasked for name in each.names),
            *homeless,
        ),
        notes=tuple(notes),
    )


def _clauses(saved: Saved, missing: Sequence[Missing], homeless: Sequence[str]) -> list[str]:
    """What a person would miss after loading, the cause first."""
    clauses = [keys.passed_over(saved.misnamed)] if saved.misnamed else []
    for unasked in saved.unasked:
        clauses.append(
            f"PEFT passes over {len(unasked.names)} of the file's tensors, as {unasked.why}: {named(unasked.names)}; "
            "correct adapter_config.json"
        )
    if homeless:
        clauses.append(f"PEFT has no place for {len(homeless)} tensors in this base: {named(homeless)}")
    # Of a file that PEFT loads no LoRA from, what is missing is everything.
    is_news = bool(saved.factors) or not clauses
    return clauses + [f"{each.part}: {named(each.names)}; {each.effect}" for each in missing if is_news or each.refused]


def _weight(saved: Saved, name: str, loaded: Any) -> Any:
    """The base's weight for one module. Raises ConfigError where the adapter is of another base."""
    if loaded is None:
        return None
    from lora_sweep.base import weights

    weight, factors = weights.weight_of(loaded, name), saved.factors[name]
    if weight is None:
        raise ConfigError([Fault("--base", f"has no weight {name}, which {saved.folder} adapts")])
    wanted = (factors.B.shape[0], factors.A.shape[1])
    if tuple(weight.shape) != wanted:
        rule = f"{name} must be {wanted[0]} x {wanted[1]} as {saved.folder} adapts it"
        raise ConfigError([Fault("--base", rule, " x ".join(str(size) for size in weight.shape))])
    return weight


UNTOLD = (
    "cannot be known from weights alone: Adam's steps are as large as the learning rates, but the file holds neither "
    "their number nor their schedule nor where A started"
)


def loraplus(folder: Path) -> LoraPlus:
    """From the record of the trial that an adapter of this program lies in; nothing is guessed where there is none."""
    trial = _trial_of(folder)
    if trial is None:
        return LoraPlus(None, UNTOLD)
    from lora_sweep.sweep import compose, saved
    from lora_sweep.tracking import read_rows

    # Other programs write files of these names too.
    rows = [row for row in read_rows(trial) if isinstance(row, Mapping)]
    pairs = [(row.get("optimizer/lr_A") or 0.0, row.get("optimizer/lr_B") or 0.0) for row in rows]
    ratios = [lr_B / lr_A for lr_A, lr_B in pairs if lr_A > 0 and lr_B > 0]
    try:
        requested = compose.leaf(saved.load_launched(trial), "optimizer.ratio")
    except ConfigError:
        requested = None
    if not ratios or not isinstance(requested, int | float):
        return LoraPlus(None, f"cannot be determined: {trial} holds no step with a learning rate, or no configuration")
    return _held(ratios, float(requested))


def _held(ratios: Sequence[float], requested: float) -> LoraPlus:
    least, most = min(ratios), max(ratios)
    conforms = max(abs(math.log2(each / requested)) for each in (least, most)) <= RATIO_TOLERANCE
    stepped = f"{least:.4g}" if math.isclose(least, most, rel_tol=1e-6) else f"{least:.4g} to {most:.4g}"
    sentence = (
        f"lr_B / lr_A was {stepped} over the {len(ratios)} steps that the trial recorded; {requested:g} was asked for"
    )
    return LoraPlus(conforms, sentence, requested, least, most, len(ratios))


def _trial_of(folder: Path) -> Path | None:
    """The trial folder that an adapter/ lies in."""
    around = folder.resolve().parent
    return around if (around / "metrics.jsonl").is_file() and (around / "config.yaml").is_file() else None
