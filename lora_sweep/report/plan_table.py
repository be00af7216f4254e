"""What `plan` found, for a terminal: sizes, memory and time, and which cells are the same run."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from lora_sweep.records import cell_name
from lora_sweep.report.tables import count, duration, some

CLASSES_SHOWN = 12


def heading(planned: Mapping[str, Any]) -> list[str]:
    """What stands above the table."""
    runs = f", {count(planned['distinct_runs'], 'distinct run')}," if planned["is_grid"] else ""
    axes = ", ".join(planned["axes"]) or "nothing"
    lines = [f"{planned['study']}: {count(planned['cells'], 'cell')}{runs} over {axes}"]
    if planned["packs"] > 1:
        lines.append(f"{planned['packs']} kinds of pack: an axis changes the base, the data or the shape of a batch")
    return lines


def plan_table(planned: Mapping[str, Any]) -> Table:
    """One row a quantity; `planned` is what runner.estimate.plan returned."""
    table = Table(box=None, show_header=False)
    kind = planned["quantization"] or planned["dtype"]
    table.add_row("base", f"{planned['base_parameters']:,} parameters, {planned['base_mib']:,.1f} MiB in {kind}")
    for rank, parameters in planned["adapter_parameters"].items():
        table.add_row(f"adapter, rank {rank}", f"{parameters:,} parameters, {planned['adapter_mib'][rank]:,.1f} MiB")
    examples, rows = planned["train_examples"], planned["train_rows"]
    packed = "" if rows == examples else f", packed into {count(rows, 'row')}"
    held_out = planned["eval_examples_held_out"]
    of = f" of {held_out:,} held out (data.eval_size)" if held_out > planned["eval_examples"] else ""
    table.add_row("examples", f"{examples:,} to train on{packed}, {planned['eval_examples']:,}{of} to evaluate on")
    table.add_row("tokens", f"{planned['tokens']:,} to train on, {planned['train_tokens']:,} of them with a loss")
    lengths = planned["lengths"]
    table.add_row(
        "lengths",
        f"median {lengths['median']}, 95 % up to {lengths['p95']}, longest {lengths['max']}, "
        f"padded to {lengths['padded']}",
    )
    table.add_row("cut", f"{planned['examples_cut']:,} longer than data.max_length, {planned['share_cut']:.1%}")
    skipped, duplicates = planned["rows_skipped"], planned["duplicates_removed"]
    table.add_row("left out", f"{count(skipped, 'row')} skipped, {count(duplicates, 'duplicate')} removed")
    table.add_row("epoch", f"{planned['steps_per_epoch']:,.1f} steps; {planned['epochs']:.1f} epochs a trial")
    adapters = count(planned["slots"], "adapter")
    table.add_row("memory", f"about {planned['memory_mib']:,.0f} MiB with {adapters} at once, their states and a pass")
    table.add_row("slots", planned["slots_reason"])
    table.add_row("time", f"about {duration(planned['seconds'])} on {planned['device']}, if no cell is pruned")
    return table


def class_lines(planned: Mapping[str, Any]) -> list[str]:
    """The classes of estimate.plan, a line each, as far as they are few; and what keeps others apart."""
    lines = []
    for each in planned["classes"][:CLASSES_SHOWN]:
        first, *others = each["cells"]
        why = f" ({' and '.join(each['reasons'])}, up to {each['size']:.0e} of the loss)" if each["reasons"] else ""
        lines.append(f"cell {cell_name(first)} runs for {some(others, most=8)}: {each['grade']}{why}")
    if len(planned["classes"]) > CLASSES_SHOWN:
        more = count(len(planned["classes"]) - CLASSES_SHOWN, "more class", "more classes")
        lines.append(f"... and {more}; --json has them all")
    if near := planned["near"]:
        runs = count(near["distinct_runs"], "run")
        lines.append(
            f"study.fold=near would leave {runs}, equal up to {near['size']:.0e} of the loss "
            f"({', '.join(near['reasons'])})"
        )
    if scaled := planned["scaled_runs"]:
        rules = "optimizer.eps_rule=scaled optimizer.decay_rule=scaled optimizer.clip_rule=scaled"
        lines.append(f"{rules} would leave {count(scaled, 'run')}, equal by algebra")
    return lines


def warning_lines(warnings: Sequence[Mapping[str, str]]) -> list[str]:
    """Each warning of `pitfalls` as a line."""
    return [f"warning: {each['field']}: {each['sentence']}" for each in warnings]
