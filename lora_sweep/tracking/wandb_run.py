"""One W&B run a trial, offline or online, several live in one process; it cannot stop the training."""

import io
import logging
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lora_sweep.records import UNDECIDED, BaselineLosses, Cell, cell_name
from lora_sweep.tracking.service import Service, end_service

Row = dict[str, Any]
"""One line of metrics.jsonl: `step` (optimizer steps done) and metric -> float, or None where it was not finite."""
Histograms = Mapping[str, NDArray[np.int64]]
"""Module group -> (bins,) counts of lora_B elements."""

_SUMMARIES = {"eval/loss": "min", "probe/loss": "min", "train/loss": "min,last", "lora_B_histogram/*": "none"}
"""Metric -> what W&B's tables and parallel coordinates show of its series; of all others (eval/gap, lora_B/<group>/rms)
they show the last value under the metric's own name, which is W&B's default."""
_BEST = tuple(name for name, summary in _SUMMARIES.items() if "min" in summary)
_NO_SUMMARY = ("cell", "params", "findings", "wandb_id", "curve", "diagnosis", "files")
"""Keys of result.json that the run has as configuration, id and evidence."""
_ALERTED = ("zero_trapped", "partially_trapped")
_TAG_LENGTH = 64
_NAME_LENGTH = 128
OFFLINE_PATIENCE = 4.0
"""How many times as long."""
SLACK_SECONDS = 1.0
"""W&B's own bounds come first: they log what it waited for."""
_RETRIES = 6

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Tracker:
    """What the W&B runs of a study share; starts the run of each trial."""

    study: str
    """Group of the runs."""
    study_id: str
    """Prefix of the runs' ids, `<study_id>-<cell>`: unique for good, at most 58 characters of [A-Za-z0-9_-]."""
    folder: Path
    """W&B's folder `wandb/` is made inside it."""
    bin_edges: NDArray[np.float64]
    """(bins + 1,) edges of every histogram, rising; the outermost may be infinite."""
    mode: Literal["offline", "online", "none"] = "offline"
    """`offline` never touches the network; `none` never imports wandb."""
    project: str = "lora-sweep"
    entity: str | None = None
    """None: the account's own."""
    tags: Sequence[str] = ()
    job_type: str = "trial"
    patience_seconds: float = 5.0
    """Longest wait for W&B's server or its service, at any call; after the first that took longer none is made."""

    _service: Service = field(default_factory=Service, init=False, repr=False)
    _finishing: list[threading.Thread] = field(default_factory=list, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _away_until: float = field(default=-math.inf, init=False, repr=False)

    def wandb_id(self, cell: int) -> str | None:
        return None if self.mode == "none" else f"{self.study_id}-{cell_name(cell)}"

    def start(self, cell: Cell, config: Mapping[str, Any], base: BaselineLosses) -> "Run | None":
        """The cell's run: new or, under the same id, resumed. None with mode `none`, and while the server is away."""
        if self.mode == "none" or self.is_away:
            return None
        run = Run(self)
        run.start(cell, config, base)
        return run

    def alerts_now(self) -> bool:
        """True once in the life of the study."""
        try:
            (self.folder / "wandb" / "alerted").open("x").close()
        except FileExistsError:
            return False
        return True

    def close(self) -> None:
        """Waits until the runs that are being finished are uploaded, at most `patience_seconds`."""
        until = time.monotonic() + self.patience_seconds
        while self._finishing:
            thread = self._finishing.pop()
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                self.failed("uploading the end of a run", TimeoutError(f"not done in {self.patience_seconds:g} s"))
                end_service()

    def call(self, work: Callable[[], None]) -> None:
        """Makes a call into W&B. Raises what it raises, and TimeoutError where it does not answer in time."""
        if self.is_away:
            raise TimeoutError("it did not answer before")
        # Offline its service alone is waited for, which other work on the machine makes slow and never silent.
        patience = self.patience_seconds * (OFFLINE_PATIENCE if self.mode == "offline" else 1.0)
        self._service.call(work, patience + SLACK_SECONDS)

    @property
    def is_away(self) -> bool:
        """Whether a call has failed before: W&B is left alone from there on."""
        return time.monotonic() < self._away_until

    def failed(self, doing: str, error: Exception) -> None:
        """One line for an outage, however many runs it hits; W&B is not waited for a second time."""
        with self._lock:
            first = not self.is_away
            self._away_until = math.inf
        said = (str(error).strip().splitlines() or [""])[0]
        _log.log(
            logging.WARNING if first else logging.DEBUG,
            "W&B: %s failed (%s: %s); training goes on, the record on disk is complete",
            doing,
            type(error).__name__,
            said,
        )


class Run:
    """One W&B run that cannot hurt: the first call that fails is logged once, and the run is left alone after it."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._wandb: Any = None
        self._run: Any = None
        self._next = 0
        """The first step that W&B does not have."""
        self._best: dict[str, float] = {}
        edges = np.asarray(tracker.bin_edges, np.float64).copy()
        # Infinite outer bins get the width of their neighbours: W&B draws and stores finite edges only.
        if np.isinf(edges[0]):
            edges[0] = 2 * edges[1] - edges[2]
        if np.isinf(edges[-1]):
            edges[-1] = 2 * edges[-2] - edges[-3]
        self._edges = edges

    def start(self, cell: Cell, config: Mapping[str, Any], base: BaselineLosses) -> None:
        try:
            self._wandb = _import_wandb()  # takes seconds, and waits for nobody
            self._tracker.call(lambda: self._start(cell, config, base))
        except Exception as error:
            self._tracker.failed("starting a run", error)
            self.end(failed=True)

    def log(self, row: Row, histograms: Histograms) -> None:
        self._try("logging", lambda: self._log(row, histograms))

    def finish(self, result: Mapping[str, Any], heat_map: bytes | None = None) -> None:
        """Ends the run with the content of result.json: numbers into the summary, flags and cause into tags as well.

        Args:
            heat_map: a PNG, into the summary. The first trapped adapter of a study raises its one alert.
        """
        self._try("writing the summary", lambda: self._conclude(result, heat_map))
        self.end(failed=result["state"] == "FAIL")

    def end(self, *, failed: bool) -> None:
        """Ends the run as it is; online in the background, see `Tracker.close`."""
        if self._run is None:
            return
        run, self._run = self._run, None

        def end() -> None:
            try:
                if self._tracker.mode == "offline":
                    self._tracker.call(lambda: run.finish(exit_code=1 if failed else 0))
                else:
                    run.finish(exit_code=1 if failed else 0)
            except Exception as error:
                self._tracker.failed("uploading the end of a run", error)

        if self._tracker.is_away:
            return
        if self._tracker.mode == "offline":
            end()
        else:  # an upload may take long, and the device has other trials to train meanwhile
            thread = threading.Thread(target=end, name=f"finish {run.id}", daemon=True)
            thread.start()
            self._tracker._finishing.append(thread)

    def _try(self, doing: str, call: Callable[[], None]) -> None:
        if self._run is None:
            return
        try:
            self._tracker.call(call)
        except Exception as error:
            self._tracker.failed(doing, error)
            self.end(failed=True)

    def _start(self, cell: Cell, config: Mapping[str, Any], base: BaselineLosses) -> None:
        tracker = self._tracker
        tracker.folder.mkdir(parents=True, exist_ok=True)  # W&B would take a temporary folder instead
        wandb = self._wandb
        wandb.setup(_settings(wandb))
        run_id = tracker.wandb_id(cell.number)
        assert run_id is not None
        if tracker.mode == "offline":
            _remove_offline_runs(tracker.folder / "wandb", run_id)
        elif not wandb.login(prompt=False, verify=False):
            raise PermissionError("no API key; run `wandb login` or set tracker.mode=offline")
        labels = _labels(cell.params)
        self._run = wandb.init(
            project=tracker.project,
            entity=tracker.entity,
            id=run_id,
            name=" ".join([cell.name, *(f"{key}={_short(value)}" for key, value in labels.items())])[:_NAME_LENGTH],
            group=tracker.study,
            job_type=tracker.job_type,
            tags=list(dict.fromkeys(tag[:_TAG_LENGTH] for tag in tracker.tags)),
            config=plain({**config, "cell": cell.number, "swept": labels}),
            dir=str(tracker.folder),
            mode=tracker.mode,
            resume="allow" if tracker.mode == "online" else None,
            reinit="create_new",
            allow_val_change=True,
            settings=_settings(
                wandb,
                init_timeout=tracker.patience_seconds,
                finish_timeout=tracker.patience_seconds,
                finish_timeout_raises=True,
                # Else an alert that finds no server holds the end of the process up for minutes.
                x_graphql_retry_max=_RETRIES,
                x_graphql_retry_wait_max_seconds=max(1.0, tracker.patience_seconds / _RETRIES),
            ),
        )
        for name, summary in _SUMMARIES.items():
            self._run.define_metric(name, summary=summary)
        self._run.summary.update(plain({"base_loss": base.eval_loss, "base_probe_loss": base.probe_loss}))
        self._next = self._run.starting_step

    def _log(self, row: Row, histograms: Histograms) -> None:
        for name in _BEST:
            if row.get(name) is not None:
                self._best[name] = min(row[name], self._best.get(name, math.inf))
        step = row["step"]
        if step < self._next:
            return
        values = {key: value for key, value in row.items() if key != "step" and value is not None}
        for group, counts in histograms.items():
            values[f"lora_B_histogram/{group}"] = self._wandb.Histogram(np_histogram=(counts, self._edges))
        # Committed at once: a row that waits for the next step would be lost with the process.
        self._run.log(values, step=step, commit=True)
        self._next = step + 1

    def _conclude(self, result: Mapping[str, Any], heat_map: bytes | None) -> None:
        summary = {key: value for key, value in result.items() if key not in _NO_SUMMARY}
        summary["evidence"] = {finding["flag"]: finding["evidence"] for finding in result["findings"]}
        self._run.summary.update(dict(_flat(plain(summary))))
        if self._run.resumed:  # W&B forgets the minima of before
            for name, best in self._best.items():
                self._run.summary[name] = {**dict(self._run.summary.get(name) or {}), "min": best}
        if heat_map is not None:
            self._run.summary["heat_map"] = self._wandb.Image(_picture(heat_map))
        trapped = next((each for each in result["findings"] if each["flag"] in _ALERTED), None)
        if trapped is not None and self._tracker.alerts_now():
            title = f"{self._tracker.study}: {trapped['flag']} ({trapped['cause']})"
            self._run.alert(title=title, text=f"cell {result['cell']}: {trapped['sentence']}")
        words = [*(flag for flag in result["flags"] if flag != UNDECIDED), *filter(None, [result["cause"]])]
        flags = [flag[:_TAG_LENGTH] for flag in words]
        if flags:
            self._run.tags = tuple(dict.fromkeys((*(self._run.tags or ()), *flags)))


def _picture(png: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(png))


def _import_wandb() -> Any:
    """wandb, imported when the first run needs it and set to keep its chatter to itself."""
    # Crash reports would be the one way in which an offline run could reach the network.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb


def _settings(wandb: Any, **more: Any) -> Any:
    wanted = {
        "console": "off",
        "silent": True,
        "quiet": True,
        "disable_code": True,
        "save_code": False,
        "disable_git": True,
        "disable_job_creation": True,
        "use_dot_wandb": False,
        "x_disable_meta": True,
        "x_disable_stats": True,
        "x_disable_machine_info": True,
        "x_save_requirements": False,
        **more,
    }
    # The x_ settings are W&B's own and may go in any release; without one there is only more noise.
    return wandb.Settings(**{name: value for name, value in wanted.items() if name in wandb.Settings.model_fields})


def _remove_offline_runs(folder: Path, run_id: str) -> None:
    pattern = re.compile(rf"offline-run-\d{{8}}_\d{{6}}-{re.escape(run_id)}(-\d+)?")
    for path in folder.iterdir() if folder.is_dir() else ():
        if pattern.fullmatch(path.name):
            shutil.rmtree(path)


def _labels(params: Mapping[str, Any]) -> dict[str, Any]:
    """Swept keys by their last word where that is unambiguous; no dots, which W&B takes for nesting."""
    last = [key.rsplit(".", 1)[-1] for key in params]
    return {
        short if last.count(short) == 1 else key.replace(".", "_"): value
        for (key, value), short in zip(params.items(), last, strict=True)
    }


def _short(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case float():
            return f"{value:.4g}"
        case _:
            return str(value)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", item


def plain(value: Any) -> Any:
    """The same in JSON's types; a number that is not finite becomes None."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case np.generic() | np.ndarray():
            return plain(value.tolist())
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [plain(item) for item in value]
        case _:
            return str(value)
