"""What a person sees, on a terminal and in a log."""

import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lora_sweep.cli import live
from lora_sweep.records import BaselineLosses, Cell, Evaluation, HealthSnapshot, UpdateSums
from lora_sweep.report import plan_table, tables

BASE = BaselineLosses(4.0, 4.0, np.array([4.0, 4.0]))

READING = HealthSnapshot((), 20, (), (), {}, UpdateSums())
NO_SIZES = np.empty(0)


def evaluation(cell: int, step: int, loss: float) -> Evaluation:
    return Evaluation(
        cell, step, 100, loss, loss, loss, np.array([loss, loss]), 1.0, 1.0, (), READING, NO_SIZES, (), 1.0, 10.0
    )


def watch(console: Console) -> None:
    """Three cells in two slots: two finish, one diverges."""
    cells = [Cell(number, {"method.rank": 4 + number, "optimizer.base_lr": 1e-3}) for number in range(3)]
    with live.Show(console, 3, 0, 2) as show:
        for slot in (0, 1):
            show.admitted(cells[slot], slot, 0)
        for _ in range(2):
            show.stepped()
        for cell in cells[:2]:
            show.evaluated(cell, evaluation(cell.number, 2, 1.5), BASE)
            show.ended(cell, "COMPLETE", 1.5, ("zero_trapped",) if cell.number else ())
        show.admitted(cells[2], 0, 0)
        show.stepped()
        show.evaluated(cells[2], evaluation(2, 2, 3.25), BASE)
        show.ended(cells[2], "FAIL", None, ("diverged",))


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_preparation_is_shown_where_it_takes_long(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(live.time, "monotonic", lambda: now)
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, width=100)
    with live.Preparing(console) as show:
        show("mine.jsonl", 0.1)
        assert out.getvalue() == ""
        for now in (21.0, 22.0, 43.0):
            show("mine.jsonl", now / 100)
    printed = out.getvalue()
    if is_terminal:
        assert "preparing mine.jsonl" in printed
        assert "43%" in printed
    else:
        assert printed.splitlines() == ["preparing mine.jsonl: 21%", "preparing mine.jsonl: 43%"]


def test_a_log_gets_one_plain_line_a_cell() -> None:
    out = io.StringIO()
    watch(Console(file=out, width=60))
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("[1/3] cell 0000 COMPLETE eval loss 1.5000 (base 4.0000)  rank=4 base_lr=0.001  ETA")
    assert "zero_trapped" in lines[1]
    assert lines[2].startswith("[3/3] cell 0002 FAIL eval loss -")
    assert lines[2].endswith("diverged  ETA 0 s")
    assert "\x1b" not in out.getvalue()


def test_a_cell_may_end_after_its_slot_has_the_next_one() -> None:
    out = io.StringIO()
    first, second = Cell(0, {"method.rank": 4}), Cell(1, {"method.rank": 8})
    with live.Show(Console(file=out, width=60), 2, 0, 2) as show:
        show.admitted(first, 0, 0)
        show.stepped()
        show.stepped()
        show.evaluated(first, evaluation(0, 2, 1.5), BASE)
        show.admitted(second, 0, 0)
        show.stepped()
        show.ended(first, "COMPLETE", 1.5, ())
        show.stepped()
        show.evaluated(second, evaluation(1, 2, 1.25), BASE)
        show.ended(second, "COMPLETE", 1.25, ())
    assert [line.partition("  ")[0] for line in out.getvalue().splitlines()] == [
        "[1/2] cell 0000 COMPLETE eval loss 1.5000 (base 4.0000)",
        "[2/2] cell 0001 COMPLETE eval loss 1.2500 (base 4.0000)",
    ]
    assert out.getvalue().endswith("ETA 0 s\n")


def test_a_terminal_shows_the_slots_the_losses_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = []
    draw = live.Show._draw

    def kept(show: live.Show) -> Any:
        group = draw(show)
        frame = Console(file=io.StringIO(), width=100)
        frame.print(group)
        frames.append(frame.file.getvalue())  # type: ignore[attr-defined]
        return group

    monkeypatch.setattr(live.Show, "_draw", kept)
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True)
    cell = Cell(7, {"method.rank": 4})
    with live.Show(console, 2, 1, 10) as show:
        show.admitted(cell, 3, 0)
        show.stepped()
        show.evaluated(cell, evaluation(7, 5, 2.0), BASE)
        show._live.refresh()  # type: ignore[union-attr]
    last = frames[-1]
    for word in ("1/2", "ETA", "0007", "5/10", "2.0000", "50%", "rank=4"):
        assert word in last, last


def test_the_ranking_keeps_its_values_whole_on_eighty_columns() -> None:
    keys = ("method.rank", "method.alpha", "method.use_rslora", "optimizer.ratio", "optimizer.base_lr")
    values = (16, 32, True, 16, 0.0005)
    row = {"number": 34, "params": dict(zip(keys, values, strict=True)), "eval_loss": 0.7416, "base_loss": 6.3234}
    row |= {"gap": 0.1336, "flags": [], "faults": [], "reason": None, "same_run_as": None}
    out = io.StringIO()
    tables.show_ranking(Console(file=out, width=80), [row], [row])
    line = next(line for line in out.getvalue().splitlines() if "0034" in line)
    assert line.split() == ["1", "0034", "16", "32", "true", "16", "0.0005", "0.7416", "11.7%", "+0.1336"]


def test_cells_that_were_not_run_stand_beside_the_one_that_was() -> None:
    rows: list[dict[str, Any]] = [
        {"number": number, "params": {"method.alpha": 2**number}, "eval_loss": 0.5, "base_loss": 1.0, "gap": 0.1}
        | {"flags": [], "reason": None, "same_run_as": runs}
        for number, runs in enumerate([None, 0, None, 0, 0, 0])
    ]
    out = io.StringIO()
    tables.show_ranking(Console(file=out, width=80), rows, rows)
    title, _, *lines = out.getvalue().splitlines()
    assert title.strip() == "best 2 of 6 cells in 2 runs"
    assert [line.split() for line in lines] == [
        ["1", "0000", "1", "0.5000", "50.0%", "+0.1000", "0001", "0003", "0004", "+1"],
        ["2", "0002", "4", "0.5000", "50.0%", "+0.1000"],
    ]


def test_flags_and_reasons_are_counted_with_their_cells() -> None:
    def row(number: int, *flags: str, cause: str | None = None, remedy: str = "", **more: Any) -> dict[str, Any]:
        printed = {"flags": [*flags], "cause": cause, "remedies": {flags[0]: remedy} if remedy else {}, "reason": None}
        return {"number": number, **printed, **more}

    rows = [row(number, "zero_trapped", cause="lr_too_small", remedy="raise it.") for number in range(10)]
    rows.append(row(11, reason="memory"))
    rows.append(row(12, "zero_trapped", "spiking", cause="no_signal", remedy="look."))
    rows += [row(13, "A_frozen", remedy="lower the ratio."), row(14, "A_frozen", remedy="raise the rate.")]
    rows.append(row(15, "undecided"))
    assert tables.flag_lines(rows) == [
        "A_frozen: 1 cell (0013): lower the ratio.",
        "A_frozen: 1 cell (0014): raise the rate.",
        f"memory: 1 cell (0011): {tables.MEMORY_REMEDY}",
        "spiking: 1 cell (0012)",
        "undecided: 1 cell (0015)",
        "zero_trapped (lr_too_small): 10 cells (0000, 0001, 0002, 0003, 0004, 0005, 0006, 0007, ...): raise it.",
        "zero_trapped (no_signal): 1 cell (0012): look.",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "?"), (float("nan"), "?"), (0.4, "0 s"), (59.6, "1:00 min"), (7260, "2:01 h")]
)
def test_durations_read_like_a_clock(seconds: float | None, text: str) -> None:
    assert tables.duration(seconds) == text


def test_the_scaled_rules_are_offered_only_where_they_leave_fewer_runs() -> None:
    near = {"distinct_runs": 5, "size": 1e-3, "reasons": ["eps"]}
    first, second = plan_table.class_lines({"classes": [], "near": near, "scaled_runs": 3})
    assert first == "study.fold=near would leave 5 runs, equal up to 1e-03 of the loss (eps)"
    assert second.startswith("optimizer.eps_rule=scaled") and second.endswith("would leave 3 runs, equal by algebra")
    assert plan_table.class_lines({"classes": [], "near": None, "scaled_runs": None}) == []


@pytest.mark.parametrize("width", [20, 40, 59, 80, 200])
def test_no_value_of_the_ranking_is_cut_on_any_terminal(width: int) -> None:
    rows = [
        {
            "number": number, "gap": 0.1,
            "params": {"method.rank": 2**number, "optimizer.base_lr": 1.25e-4, "method.use_rslora": True, "x.y": 16.0},
            "eval_loss": 1.0 + number, "base_loss": 5.0, "same_run_as": None, "cause": None,
            "flags": ["rate_too_high"], "faults": ["rate_too_high"],
        }
        for number in range(5)
    ]  # fmt: skip
    written = io.StringIO()
    tables.show_ranking(Console(file=written, width=width), rows, rows)
    words = written.getvalue().split()
    assert "…" not in written.getvalue()
    for row in rows:
        assert f"{row['number']:04d}" in words
        assert any(f"{row['eval_loss']:.4f}" in word for word in words)
        assert any(str(row["params"]["method.rank"]) in word for word in words)
    assert words.count("rate_too_high") == len(rows)
