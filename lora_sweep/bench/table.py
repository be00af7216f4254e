"""The speed measurement as people read it."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table


def table(made: dict[str, Any]) -> Table:
    """One row a way; what speed.measure returned."""
    shown = Table(box=None, pad_edge=False)
    for title in ("way", "seconds", "ratio", "95 %", "tok/s", "MFU", "MiB", "loss differs"):
        shown.add_column(title, justify="left" if title == "way" else "right")
    chosen = made["chosen"] and made["chosen"]["slots"]
    for row in made["rows"]:
        shown.add_row(
            row["way"] if row["slots"] is None else f"packed {row['slots']}{'*' * (row['slots'] == chosen)}",
            f"{row['median_seconds']:.2f}",
            f"{row['ratio']:.2f}",
            "" if row["way"] == "sequential" else f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['mfu']:.1%}",
            "?" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}",
            "" if row["way"] == "sequential" else _difference(row["largest_difference"]),
        )
    return shown


def _difference(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"


def heading(made: dict[str, Any]) -> Iterator[str]:
    """What stands above the table."""
    steps = f"{made['steps']} steps of {made['rows_a_slot_step']} x {made['padded_length']} tokens"
    quantised = f", {made['quantization']}" if made["quantization"] else ""
    threads = f", {made['threads']} threads" if made["device_type"] == "cpu" else ""
    yield f"{made['model']} ({made['base_parameters']:,} parameters, {made['dtype']}{quantised})"
    work = f"{len(made['trials'])} trials of {steps}, {made['evaluations']} evaluations each"
    yield f"{work}; medians of {made['repetitions']} repetitions"
    yield (
        f"{made['device']}{threads}, torch {made['versions']['torch']}: "
        f"{made['peak_matmul_flops'] / 1e12:.3g} Tflop/s in a large matmul"
    )


def verdict(made: dict[str, Any]) -> Iterator[str]:
    """What stands below it."""
    yield "HF Trainer: a process a trial, Trainer and PEFT; sequential: one process, PEFT; packed K: K slots at once"
    yield "ratio: sequential's seconds over these; MiB: peak above the base; loss: evaluation, against sequential's"
    if made["chosen"]:
        yield f"* {made['chosen']['reason']}"
    for slots, factors in made["factors"].items():
        yield (
            f"HF Trainer over packed {slots}: {factors['total']:.1f} = start-up {factors['start_up']:.2f} x "
            f"Trainer's loop {factors['trainer']:.2f} x packing {factors['packing']:.2f}"
        )
    if made["losses_agree"]:
        yield f"evaluation losses agree within {made['tolerance']:g} (relative)"
    else:
        yield f"EVALUATION LOSSES DISAGREE by more than {made['tolerance']:g}: a speed-up with other losses is none"
