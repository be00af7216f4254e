"""An inspection as a person sees it: one row per group of modules, and the conspicuous ones by name."""

import statistics
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from lora_sweep.inspection.inspect import Inspection
from lora_sweep.inspection.measure import ModuleMeasurement

NAMED = 8
"""Conspicuous modules shown by name."""
MANY_ZEROS = 0.5
"""Share of exact zeros in the zero-start factor that is worth a word (rule `underflow`)."""
FAR = 10.0
"""Times its group's median that an update is conspicuously large or small."""


def draw(console: Console, inspected: Inspection) -> None:
    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    say(f"{inspected.folder}: {inspected.verdict}: {inspected.sentence}")
    kind = (
        " ".join(word for word, on in (("rsLoRA", inspected.use_rslora), ("DoRA", inspected.use_dora)) if on) or "LoRA"
    )
    dtypes = ", ".join(sorted({each.dtype for each in inspected.modules}))
    size = f"{inspected.bytes / 2**20:,.2f} MiB"
    sizes = f"{len(inspected.modules)} modules, {inspected.parameters:,} parameters"
    say(f"{kind} on {inspected.base or 'an unnamed base'}: {sizes}")
    say(f"weights file {size}{f', {dtypes}' if dtypes else ''}")
    if inspected.modules:
        console.print(_groups(inspected))
    odd = list(_conspicuous(inspected.modules))
    for line in odd[:NAMED]:
        say(line)
    if len(odd) > NAMED:
        say(f"and {len(odd) - NAMED} more (--json)")
    for extra in inspected.extras:
        norm = "not finite" if extra.norm is None else f"norm {extra.norm:.3g}"
        moved = "" if extra.delta_rel is None else f", {extra.delta_rel:.2e} from the base's"
        shape = " x ".join(str(each) for each in extra.shape)
        say(f"{extra.kind}: {extra.name} {shape} {extra.dtype}, {norm}{moved}")
    say(f"LoRA+: {inspected.loraplus.sentence}")
    for note in inspected.notes:
        say(f"note: {note}")


def _groups(inspected: Inspection) -> Table:
    groups: dict[str, list[ModuleMeasurement]] = {}
    for each in inspected.modules:
        groups.setdefault(each.group, []).append(each)
    table = Table(
        box=None, pad_edge=False, title="least, median, largest where they differ; rms A: median", title_justify="left"
    )
    columns = ["n", "rank", "s", "s|BA|", "rms A", "rms B", "zeros", "stable rank"]
    columns += ["update / W"] if inspected.compared_with else []
    columns += ["magnitude"] if inspected.compared_with and inspected.use_dora else []
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for name, group in groups.items():
        cells = [
            str(len(group)),
            _range([each.rank for each in group], ".0f"),
            _range([each.scaling for each in group], ".4g"),
            _range([each.delta_norm for each in group]),
            _range(_middle([each.rms_A for each in group])),
            _range([each.rms_B for each in group]),
            _range([each.exact_zero for each in group], ".0%"),
            _range([each.stable_rank for each in group]),
        ]
        cells += [_range([each.delta_rel for each in group])] if inspected.compared_with else []
        if inspected.compared_with and inspected.use_dora:
            cells.append(_range([each.magnitude_deviation for each in group]))
        table.add_row(name, *cells)
    return table


def _middle(values: Sequence[float | None]) -> list[float]:
    finite = [value for value in values if value is not None]
    return [statistics.median(finite)] if finite else []


def _range(values: Sequence[float | None], form: str = ".2g") -> str:
    finite = [value for value in values if value is not None]
    if not finite:
        return "-"
    three = [f"{value:{form}}" for value in (min(finite), statistics.median(finite), max(finite))]
    return three[0] if len(set(three)) == 1 else " ".join(three)


def _conspicuous(modules: Sequence[ModuleMeasurement]) -> Iterator[str]:
    """Dead, not finite, mostly zero, or an update far from its group's median; the worst kinds first."""
    yield from (f"not finite: {each.name}, {each.nonfinite} elements" for each in modules if each.nonfinite)
    yield from (f"dead: {each.name}, {each.dead}" for each in modules if each.dead)
    yield from (f"negligible: {each.name}, {each.delta_rel:.1e} of W" for each in modules if each.negligible)
    alive = [each for each in modules if each.delta_norm and not each.dead]
    for each in alive:
        if each.exact_zero > MANY_ZEROS:
            factor = "lora_A" if each.zero_start == "A" else "lora_B"
            yield f"zeros: {each.name}, {each.exact_zero:.0%} of {factor} are exactly 0"
    for each in alive:
        median = statistics.median(other.delta_norm or 0.0 for other in alive if other.group == each.group)
        share = (each.delta_norm or 0.0) / median
        if not 1 / FAR <= share <= FAR:
            yield f"far off: {each.name}, its update is {share:.2g} times its group's median"
