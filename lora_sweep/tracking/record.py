"""A trial on disk: its rows, its evaluations and its result; what was interrupted is cut back and goes on."""

import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Literal
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.typing import NDArray

from lora_sweep.records import BaselineLosses, Cell, Evaluation, Finding
from lora_sweep.system import files
from lora_sweep.system.disk import disk_errors
from lora_sweep.system.files import Unsafe
from lora_sweep.tracking import heat_map, seal
from lora_sweep.tracking.wandb_run import Histograms, Row, Run, Tracker, plain

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations"
RESULT = "result.json"
HEAT_MAP = "heat_map.png"
CONFIG = "config.yaml"

SEALED = (CONFIG, METRICS, EVALUATIONS, HEAT_MAP, seal.ADAPTER)
"""Files and folders whose seal is kept in result.json."""

MAX_RESULT_BYTES = 2**26
"""Of a result.json: one of a trial with 10,000 evaluations has a hundredth of it."""
MAX_ROW_BYTES = 2**22
"""Of a line of metrics.jsonl: one with 1,000 groups of modules has a quarter of it."""
MAX_EVALUATION_BYTES = 2**30
"""Of an evaluations/*.npz as its arrays lie in memory; a million examples have a hundredth of it."""

NONE: Mapping[str, Any] = MappingProxyType({})


class Record:
    """The record of one trial, from `open` to `finish` or `abandon`. Not for several threads."""

    def __init__(self, folder: Path, cell: Cell, last: int, wandb_id: str | None, run: Run | None) -> None:
        self.folder = folder
        self.wandb_id = wandb_id
        self._cell = cell.number
        self._last = last
        self._run = run
        self._table: dict[str, float] | None = None
        """Module -> s |BA|_F / |W|_F at the last evaluation."""
        self._metrics: BinaryIO = files.append_to(folder / METRICS)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        cell: Cell,
        config: Mapping[str, Any],
        base: BaselineLosses,
        tracker: Tracker,
        resume_step: int | None = None,
    ) -> "Record":
        """The record of `cell` in

        `config` is the resolved configuration, nested. What an earlier attempt wrote after `resume_step` is cut off
        (without a

        Raises StorageUnavailable where the folder can't be written.

        Args:
            folder: empty, or given `resume_step` with the rows up to that step.
            resume_step: all of it), so that the trial goes on as if it had never been interrupted. In W&B it stays the
                same run: an offline one is written anew from the rows kept, since a file torn by a kill can't be
                uploaded; an online one gets the rows that its server lacks.
        """
        with disk_errors(folder):
            rows = _cut(folder, -1 if resume_step is None else resume_step)
            _write_evaluation(_npz(folder, "base"), base.eval_losses, {})
            record = cls(folder, cell, rows[-1]["step"] if rows else -1, tracker.wandb_id(cell.number), None)
        record._run = tracker.start(cell, config, base)
        if record._run is not None:
            replay(folder, record._run)
        return record

    def log(self, evaluation: Evaluation) -> None:
        """Adds the evaluation and the steps before it; steps that are recorded already are not recorded again.

        Raises StorageUnavailable where they can't be written; what was recorded before stays safe.
        """
        histograms = {m.group: m.histogram.counts for m in evaluation.measurements}
        self._table = dict(zip(evaluation.snapshot.modules, evaluation.delta_rel.tolist(), strict=True))
        rows = [row for row in _rows(evaluation) if row["step"] > self._last]
        if not rows:
            return
        with disk_errors(self.folder):
            # The arrays first: a row with an evaluation promises its file.
            last = {f"module/{metric}": values[-1] for metric, values in evaluation.snapshot.values.items()}
            last |= {"module/name": np.array(evaluation.snapshot.modules), "module/delta_rel": evaluation.delta_rel}
            _write_evaluation(_npz(self.folder, evaluation.step), evaluation.eval_losses, histograms, last)
            self._metrics.write(b"".join(_json(row) + b"\n" for row in rows))
            files.flush(self._metrics)
        self._last = rows[-1]["step"]
        if self._run is not None:
            for row in rows:
                self._run.log(row, histograms if row["step"] == evaluation.step else {})

    def finish(
        self,
        state: Literal["COMPLETE", "PRUNED", "FAIL"],
        result: Mapping[str, Any],
        findings: Sequence[Finding] = (),
        verdict: Sequence[Finding] = (),
        reason: str | None = None,
    ) -> None:
        """Ends the trial: `result` (plain values, nested or not) goes into result.json and into the run's summary.

        result.json holds `cell`, `state`, `reason`, `flags`, `findings` (the trial's own), `wandb_id`, `files` (the
        seal of the others) and the keys of `result`. `verdict`, which compares with what the study knows today, goes
        into the W&B run alone. `reason` is of a FAIL. Raises StorageUnavailable where it can't be written.
        """
        whole = {"cell": self._cell, **result, "state": state, "reason": reason, **_plain_findings(findings)}
        whole["wandb_id"] = self.wandb_id
        picture = heat_map.draw(self._table, self._causes(result)) if self._table is not None else None
        if self._run is not None:
            cause = next((finding.cause for finding in verdict if finding.cause is not None), None)
            self._run.finish(whole | _plain_findings([*verdict, *findings]) | {"cause": cause}, picture)
        with disk_errors(self.folder):
            self._metrics.close()
            if picture is not None:
                files.write_whole(self.folder / HEAT_MAP, picture)
            whole["files"] = seal.sealed(self.folder, SEALED)
            files.write_whole(self.folder / RESULT, _json(whole, indent=2) + b"\n")

    @staticmethod
    def _causes(result: Mapping[str, Any]) -> dict[str, str]:
        """Module -> the rule that traps it."""
        causes = (result.get("diagnosis") or {}).get("causes", ())
        return {module: cause["name"] for cause in causes for module in cause["modules"]}

    def abandon(self) -> None:
        """Closes files and run without a result: the trial was interrupted and can be resumed."""
        with suppress(OSError):  # the disk that cost us the last rows may refuse them again
            self._metrics.close()
        if self._run is not None:
            self._run.end(failed=True)


def replay(folder: Path, run: Run) -> None:
    """Gives `run` the rows of a trial's files that it lacks: a resumed run and an upload afterwards are made alike."""
    for row in read_rows(folder):
        run.log(row, read_evaluation(folder, row["step"])[1] if "eval/loss" in row else {})


def read_rows(folder: Path) -> list[Row]:
    """The whole rows of a trial's metrics.jsonl, in order; [] where there is none.

    A torn last line is left out, and whatever follows a line that is no row.
    """
    return [row for row, _ in _scan(folder)]


def read_result(folder: Path) -> dict[str, Any] | None:
    """result.json of a finished trial; None while it is not finished.

    Raises Unsafe where the file cannot be read or does not hold what `Record.finish` writes.
    """
    try:
        content = files.read_json(folder / RESULT, MAX_RESULT_BYTES, follow=False)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unsafe(f"cannot be read ({error.strerror})") from error
    if not _is_result(content):
        raise Unsafe("is no record of a trial")
    result: dict[str, Any] = content
    return result


def _is_result(content: Any) -> bool:
    """Whether it has what `Record.finish` adds to a result; older versions wrote no seal."""
    match content:
        case {
            "cell": int(),
            "state": "COMPLETE" | "PRUNED" | "FAIL",
            "findings": list(),
            "flags": list(),
            "reason": str() | None,
        }:
            return "files" not in content or seal.is_seal(content["files"])
    return False


def is_whole(folder: Path, step: int) -> bool:
    """Whether the record of a trial holds each step up to `step`, and each evaluation's losses."""
    rows = [row for row in read_rows(folder) if row["step"] <= step]
    steps = [row["step"] for row in rows if row["step"] > 0]
    if steps != list(range(1, step + 1)):
        return False
    return all(read_losses(folder, row["step"]) is not None for row in rows if row.get("eval/loss") is not None)


def read_evaluation(folder: Path, step: int) -> tuple[NDArray[np.float64], dict[str, NDArray[np.int64]]]:
    """(examples,) losses in nats per token, and the histograms, of one evaluation.

    Raises FileNotFoundError where the trial has none at `step`.
    """
    return _read_npz(_npz(folder, step))


UNREADABLE = (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error, NotImplementedError, RuntimeError)
"""What zipfile and numpy raise on a file that they cannot read."""


def read_losses(folder: Path, step: int) -> NDArray[np.float64] | None:
    """(examples,) losses in nats per token of the evaluation at `step`; None where the trial has none to be read."""
    try:
        return _read_npz(_npz(folder, step))[0]
    except UNREADABLE:
        return None


def read_base_losses(folder: Path) -> NDArray[np.float64]:
    """(examples,) losses of the base alone on the evaluation set of this trial, nats per token."""
    return _read_npz(_npz(folder, "base"))[0]


def _rows(evaluation: Evaluation) -> list[Row]:
    rows: dict[int, Row] = {
        step.step: {
            "step": step.step,
            "train/loss": step.train_loss,
            "optimizer/lr_A": step.lr_A,
            "optimizer/lr_B": step.lr_B,
        }
        for step in evaluation.steps
    }
    row = rows.setdefault(evaluation.step, {"step": evaluation.step})
    row |= {
        "eval/loss": evaluation.eval_loss,
        "eval/gap": evaluation.gap,
        "probe/loss": evaluation.probe_loss,
        "grad_norm/A": evaluation.grad_norm_A,
        "grad_norm/B_over_s": evaluation.grad_norm_B_over_s,
        "perf/tokens": evaluation.tokens,
        "perf/tokens_per_second": evaluation.tokens_per_second,
        "perf/seconds": evaluation.seconds,
    }
    if evaluation.retention_loss is not None:
        row["eval/retention"] = evaluation.retention_loss
    for m in evaluation.measurements:
        row |= {
            f"lora_B/{m.group}/rms": m.rms_B,
            f"lora_B/{m.group}/absmax": m.absmax_B,
            f"lora_B/{m.group}/exact_zero": m.exact_zero_B,
            f"lora_B/{m.group}/delta_rel": m.delta_rel,
            f"lora_B/{m.group}/rho": m.rho,
            f"lora_B/{m.group}/moved": m.moved_B,
            f"lora_B/{m.group}/v_over_eps": m.v_over_eps_B,
            f"lora_B/{m.group}/stable_rank": m.stable_rank,
            f"lora_A/{m.group}/rms": m.rms_A,
            f"lora_A/{m.group}/moved": m.moved_A,
        }
    return [plain(rows[step]) for step in sorted(rows)]


def _json(value: Any, indent: int | None = None) -> bytes:
    return json.dumps(plain(value), allow_nan=False, ensure_ascii=False, indent=indent).encode()


def _npz(folder: Path, step: int | Literal["base"]) -> Path:
    return folder / EVALUATIONS / ("base.npz" if step == "base" else f"{step:06d}.npz")


def _plain_findings(findings: Sequence[Finding]) -> dict[str, Any]:
    return {
        "flags": [finding.flag for finding in findings],
        "findings": [asdict(finding) for finding in findings],
    }


def _write_evaluation(
    path: Path, losses: NDArray[np.float64], histograms: Histograms, modules: Mapping[str, Any] = NONE
) -> None:
    """`modules`: `module/name` and each `module/<metric>` of health.measure, (modules,)."""
    counts: dict[str, Any] = {f"lora_B/{group}": np.asarray(count, np.int64) for group, count in histograms.items()}
    content = io.BytesIO()
    np.savez(content, losses=np.asarray(losses, np.float64), **counts, **modules)
    files.write_whole(path, content.getvalue())


def _read_npz(path: Path) -> tuple[NDArray[np.float64], dict[str, NDArray[np.int64]]]:
    # numpy leaves a damaged file open that it has opened itself.
    with files.open_file(path, follow=False) as file, ZipFile(file) as members:
        if sum(each.file_size for each in members.infolist()) > MAX_EVALUATION_BYTES:
            raise Unsafe(f"holds more than {MAX_EVALUATION_BYTES:,} bytes")
        file.seek(0)
        arrays = np.load(file, allow_pickle=False)
        losses = arrays["losses"]
        groups = [name for name in arrays.files if name.startswith("lora_B/")]
        return losses, {name.removeprefix("lora_B/"): arrays[name] for name in groups}


def _scan(folder: Path) -> Iterator[tuple[Row, int]]:
    """Each whole row and the byte where it ends."""
    try:
        file = files.open_file(folder / METRICS, follow=False)
    except (OSError, Unsafe):
        return
    end = 0
    with file:
        while line := file.readline(MAX_ROW_BYTES):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                return
            if not line.endswith(b"\n") or not isinstance(row, dict) or not isinstance(row.get("step"), int):
                return
            end += len(line)
            yield row, end


def _cut(folder: Path, step: int) -> list[Row]:
    """Takes off a record what came after `step`, and gives the rows that stay."""
    files.remove(folder / RESULT)  # the marker goes first: from here on the trial is not finished
    if not (folder / EVALUATIONS).is_dir() or (folder / EVALUATIONS).is_symlink():
        files.remove(folder / EVALUATIONS)
        (folder / EVALUATIONS).mkdir(parents=True)
    rows, end = [], 0
    for row, after in _scan(folder):
        if row["step"] > step:
            break
        rows.append(row)
        end = after
    if not end:
        files.remove(folder / METRICS)
    with files.append_to(folder / METRICS) as file:
        file.truncate(end)
        files.flush(file)
    for left in (*folder.glob("*.tmp"), *folder.glob(".*.tmp")):
        files.remove(left)
    for path in (folder / EVALUATIONS).iterdir():
        if path.suffix == ".tmp" or (path.stem.isdecimal() and int(path.stem) > step):
            files.remove(path)
    return rows
