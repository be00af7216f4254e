"""The speed measurement as people read it."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table


def table(measured: dict[str, Any]) -> Table:
    """One row a way; what speed.measure returned."""
    shown = Table(box=None, pad_edge=False)
    for title in ("way", "seconds", "ratio", "95 %", "tok/s", "MFU", "MiB", "loss differs"):
        shown.add_column(title, justify="left" if title == "way" else "right")
    chosen = measured["chosen"] and measured["chosen"]["slots"]
    for row in measured["rows"]:
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


def heading(measured: dict[str, Any]) -> Iterator[str]:
    """What stands above the table."""
    steps = f"{measured['steps']} steps of {measured['rows_a_slot_step']} x {measured['padded_length']} tokens"
    quantized = f", {measured['quantization']}" if measured["quantization"] else ""
    threads = f", {measured['threads']} threads" if measured["device_type"] == "cpu" else ""
    yield f"{measured['model']} ({measured['base_parameters']:,} parameters, {measured['dtype']}{quantized})"
    work = f"{len(measured['trials'])} trials of {steps}, {measured['evaluations']} evaluations each"
    yield f"{work}; medians of {measured['repetitions']} repetitions"
    yield (
        f"{measured['device']}{threads}, torch {measured['versions']['torch']}: "
        f"{measured['peak_matmul_flops'] / 1e12:.3g} Tflop/s in a large matmul"
    )


def verdict(measured: dict[str, Any]) -> Iterator[str]:
    """What stands below it."""
    yield "HF Trainer: a process a trial, Trainer and PEFT; sequential: one process, PEFT; packed K: K slots at once"
    yield "ratio: sequential's seconds over these; MiB: peak above the base; loss: evaluation, against sequential's"
    if measured["chosen"]:
        yield f"* {measured['chosen']['reason']}"
    for slots, factors in measured["factors"].items():
        yield (
            f"HF Trainer over packed {slots}: {factors['total']:.1f} = start-up {factors['start_up']:.2f} x "
            f"Trainer's loop {factors['trainer']:.2f} x packing {factors['packing']:.2f}"
        )
    if measured["losses_agree"]:
        yield f"evaluation losses agree within {measured['tolerance']:g} (relative)"
    else:
        yield f"EVALUATION LOSSES DISAGREE by more than {measured['tolerance']:g}: a speed-up with other losses is none"
