"""The same health checks and findings inside third-party training: transformers' Trainer, TRL, or a loop that calls it.

from lora_sweep import HealthCallback
trainer = Trainer(..., callbacks=[HealthCallback(ratio=16)])
"""

import base64
import functools
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from lora_sweep import health
from lora_sweep.adapters import keys, reader
from lora_sweep.base import quant
from lora_sweep.errors import UserError
from lora_sweep.health import AdaptedModule, HealthHistory, Logged, Side, Stepped, TrainerSettings, WeightSamples
from lora_sweep.records import Diagnosis, Finding
from lora_sweep.sweep import compose
from lora_sweep.system.disk import write_whole
from lora_sweep.tracking.wandb_run import plain

HEALTH = "health.json"
_ADAM = {f"{library}.optim.{name}" for library in ("torch", "bitsandbytes") for name in ("adam", "adamw")}
"""Modules of the optimizers whose step is AdamW's: m / (sqrt(v) + eps), bias corrected."""

_log = logging.getLogger(__name__)


def _observing(called: Callable[..., Any]) -> Callable[..., Any]:
    """What watches a training must not end it: a mistake in here is logged with its traceback, once, and it stops."""

    @functools.wraps(called)
    def guarded(self: "HealthCallback", *given: Any, **event: Any) -> Any:
        if not self._has_failed:
            try:
                return called(self, *given, **event)
            except Exception:
                self._has_failed = True
                _log.exception("HealthCallback: a mistake of its own in %s; it checks no more", called.__name__)
        return None

    return guarded


@dataclass(frozen=True)
class _Lora:
    """One adapted linear of a PEFT model; its tensors are asked for anew at each check, as they may be replaced."""

    path: str
    """In the base."""
    layer: Any
    """peft's LoraLayer."""
    adapter: str
    config: Any
    """peft's LoraConfig, as far as the model has it."""
    base_norm: float

    @property
    def name(self) -> str:
        """Of the module, and of the adapter where there are several."""
        return self.path if len(self.layer.lora_A) == 1 else f"{self.path} ({self.adapter})"

    @property
    def A(self) -> Tensor:
        """(r, d_in)."""
        weight: Tensor = self.layer.lora_A[self.adapter].weight
        return weight

    @property
    def B(self) -> Tensor:
        """(d_out, r)."""
        weight: Tensor = self.layer.lora_B[self.adapter].weight
        return weight

    @property
    def scaling(self) -> float:
        return float(self.layer.scaling[self.adapter])


class HealthCallback(TrainerCallback, ExportableState):
    """Checks the LoRA of a PEFT model while it trains, and names what keeps it from learning.

    `ratio`: LoRA+'s lr of B over lr of A that was asked for; None: as the optimizer's groups have it before the first
    step, which a scheduler may have flattened by then. `action`: `stop` ends a training whose adapter cannot learn any
    more. `rules`: keys of conf/health/default.yaml. Findings are warned of by `logging`, and lie in `findings` and in
    health.json in the output folder. Raises ConfigError for a rule that is none, and nothing while it watches.
    """

    def __init__(self, ratio: float | None = None, action: str = "flag", **rules: Any) -> None:
        self.findings: tuple[Finding, ...] = ()
        self._given = {"ratio": ratio, "action": action, **rules}
        self._rules = compose.section("health", {"action": action, **rules})
        self._ratio = ratio
        self._modules: list[_Lora] = []
        self._history: HealthHistory | None = None
        self._trainer_settings = TrainerSettings(ratio)
        self._before: WeightSamples | None = None
        self._knows_way = True
        self._logged = Logged()
        self._lost: tuple[str, ...] = ()
        self._warned: set[str] = set()
        self._has_failed = False

    # -- transformers' events ----------------------------------------------------------------------------------------

    @_observing
    def on_train_begin(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        model, optimizer = event["model"], event["optimizer"]
        self._modules = list(_loras(model))
        past = self._past(state)
        if not self._modules:
            self._history = None
            _log.warning("HealthCallback: the model has no LoRA of PEFT's in any linear, nothing is checked")
            return
        self._forget(state)
        self._logged.warmup_steps = args.get_warmup_steps(state.max_steps)
        self._history = HealthHistory(
            tuple(each.name for each in self._modules), state.max_steps, self._rules.check_every
        )
        if past is not None:
            self._history.restore(past["chart"], _unpacked(past["looks"], past["chart"]["seen"], self._modules))
        self._knows_way = state.global_step == 0 or (past is not None and past["knows_way"])
        self._trainer_settings = TrainerSettings(
            ratio=self._requested_ratio(optimizer) if past is None or self._ratio is not None else past["ratio"],
            coupled_decay=max((_coupled(group) for group in self._groups(optimizer, "B")), default=0.0),
            is_low_precision=any(each.B.dtype.itemsize < 4 for each in self._modules),
            fp16_gradients=bool(args.fp16) or any(each.B.dtype == torch.float16 for each in self._modules),
        )

    @_observing
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        step = state.global_step + 1
        if self._history is not None and self._history.is_due(step, step == state.max_steps):
            self._before = health.sample_weights([(each.A, each.B.T) for each in self._modules])

    @_observing
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        if self._history is None:
            return
        optimizer = event["optimizer"]
        # Of several groups the one that moves the most speaks for its side.
        A, B = (max(self._groups(optimizer, side), key=_rate, default=None) for side in "AB")
        lr_A, lr_B = (_number(group or optimizer.param_groups[0], "lr") for group in (A, B))
        if lr_A is None or lr_B is None:
            # Steps are counted all the same.
            self._knows_way, lr_A, lr_B = False, 1.0, 1.0
            self._trainer_settings = replace(self._trainer_settings, ratio=None)
        self._history.stepped(lr_A, lr_B, 1.0 if B is None else _shrink(B))
        if self._before is None:
            return
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        modules = [AdaptedModule(*(_side(optimizer, groups, each, side) for side in "AB")) for each in self._modules]
        self._history.take(state.global_step + 1, health.measure(modules, self._before))
        self._before = None

    @_observing
    def on_step_end(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        history = self._history
        if history is None or not history.ends_window or state.global_step == state.max_steps:
            return
        # The rate may still be warming up: only what more steps cannot mend is reported now.
        broken = self._broken()
        self._warn((broken,) if broken else health.certain(self._rule_input(), self._rules))
        if self._rules.action == "stop" and health.cannot_learn(history.snapshot(), self._trainer_settings):
            control.should_training_stop = True

    @_observing
    def on_log(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        # Of an evaluation too.
        self._logged.take(event.get("logs") or {}, state.global_step)

    @_observing
    def on_save(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._modules and state.is_world_process_zero:
            names = dict.fromkeys(each.adapter for each in self._modules)
            self._lost = tuple(module for adapter in names for module in self._lost_in(folder, adapter))

    @_observing
    def on_train_end(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        if self._history is None:
            return
        self._warn(self._concluded())
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            record = {"findings": [asdict(each) for each in self.findings], "diagnosis": asdict(self.diagnosis())}
            write_whole(folder / HEALTH, json.dumps(plain(record), allow_nan=False, indent=2) + "\n")

    # -- what a checkpoint keeps -------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What trainer_state.json keeps of it, so that a training that is resumed is judged as a whole."""
        return {"args": self._given, "attributes": {"kept": self._kept()}}

    @_observing
    def _kept(self) -> dict[str, Any] | None:
        if self._history is None:
            return None
        history, rows = self._history.state()
        return {
            "modules": [each.name for each in self._modules],
            "ratio": self._trainer_settings.ratio,
            "knows_way": self._knows_way,
            "chart": history,
            "looks": _packed(rows),
        }

    def _past(self, state: Any) -> Mapping[str, Any] | None:
        """What the checkpoint that is resumed from keeps of it; None where it was not there, or saw another adapter."""
        nothing = {"args": self._given, "attributes": {"kept": None}}
        # transformers can save the state of a callback only where the checkpoint before had one.
        stored = state.stateful_callbacks.setdefault(type(self).__name__, nothing)
        kept = stored["attributes"]["kept"] if state.global_step and isinstance(stored, dict) else None
        return kept if kept and kept["modules"] == [each.name for each in self._modules] else None

    def _forget(self, state: Any) -> None:
        """A callback may see several trainings; a base that was evaluated before the first is still the base."""
        evaluations = self._logged.evaluations if self._history is None else []
        self._logged = Logged(evaluations=evaluations)
        for row in state.log_history:
            self._logged.take(row, row["step"])
        self._logged.knows_start = state.global_step == 0 or bool(self._logged.losses)
        self._before, self._lost, self._warned = None, (), set()

    # -- what it says ------------------------------------------------------------------------------------------------

    def diagnosis(self) -> Diagnosis:
        """What was seen until now. Raises ValueError before a training has begun."""
        gain, noise = self._logged.gain(self._rules)
        inputs = self._rule_input()
        trapping, causes = health.causes(inputs)
        if self._broken():
            gain, causes = None, trapping
        elif any(finding.flag == "diverged" for finding in self._logged.findings(self._rules)):
            # A training that diverged has no gain because of that.
            causes = trapping
        return Diagnosis(
            gain,
            noise,
            trapping,
            causes,
            error=self._logged.error(self._rules),
            delta_rel=inputs.median_delta_rel,
            fall=self._logged.fall(),
            window_is_over=inputs.window_is_over,
        )

    def _concluded(self) -> tuple[Finding, ...]:
        broken = self._broken()
        if broken:
            own: tuple[Finding, ...] = (broken,)
        else:
            own = (*self._logged.findings(self._rules), *health.own_findings(self._rule_input(), None, self._rules))
        return (*health.compared(self.diagnosis(), own, self._rules), *own)

    def _broken(self) -> Finding | None:
        snapshot = self._rule_input().snapshot
        sizes = snapshot.values["rms_A"] + snapshot.values["absmax_B"]
        finite = [bool(np.isfinite(each).all()) for each in sizes]
        return self._logged.not_finite([*zip(snapshot.steps, finite, strict=True)])

    def _warn(self, findings: tuple[Finding, ...]) -> None:
        self.findings = findings
        for finding in findings:
            if finding.flag not in self._warned:
                self._warned.add(finding.flag)
                _log.warning("%s: %s", finding.flag, finding.sentence)

    def _rule_input(self) -> health.RuleInput:
        if self._history is None:
            raise ValueError("no training of a LoRA has begun")
        snapshot = self._history.snapshot()
        weights = np.array([each.base_norm / each.scaling if each.scaling else np.inf for each in self._modules])
        last = snapshot.values["product"][-1] if len(snapshot.steps) else np.full(len(self._modules), np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            delta_rel = last / weights
        return health.RuleInput(
            snapshot, self._trainer_settings, delta_rel, self._rules.min_delta_rel, self._lost, self._knows_way
        )

    def _lost_in(self, root: Path, adapter: str) -> Iterator[str]:
        """Modules of this adapter whose file under `root` does not hold what memory does."""
        modules = {each.path: each for each in self._modules if each.adapter == adapter}
        *_, one = modules.values()
        # PEFT saves `default` in the folder itself, others in folders of their names; transformers the only one so.
        folder = root / adapter if (root / adapter / reader.CONFIG).is_file() else root
        is_its_own = folder != root or adapter == "default" or len(one.layer.lora_A) == 1
        if not is_its_own or not (folder / reader.CONFIG).is_file():
            return
        foreign = [field for field in reader.FOREIGN if getattr(one.config, field, None)]
        pickled = (folder / reader.PICKLE).is_file() and not (folder / reader.WEIGHTS).is_file()
        if foreign or pickled:
            inputs = f"{foreign[0]} is set" if foreign else "the weights are a pickle"
            _log.warning("HealthCallback: %s: %s, so what was saved is not compared with memory", folder, inputs)
            return
        try:
            lost = reader.lost(folder, {path: (each.A, each.B) for path, each in modules.items()})
        except UserError as error:
            _log.warning("HealthCallback: %s", error)
            lost = tuple(modules)
        yield from (modules[path].name for path in lost)

    # -- the optimizer -----------------------------------------------------------------------------------------------

    def _groups(self, optimizer: Any, side: str) -> Iterator[dict[str, Any]]:
        """The groups that hold any A, or any B."""
        held = {id(getattr(each, side)) for each in self._modules}
        return (group for group in optimizer.param_groups if any(id(p) in held for p in group["params"]))

    def _requested_ratio(self, optimizer: Any) -> float | None:
        if self._ratio is not None:
            return self._ratio
        A, B = (next(self._groups(optimizer, side), None) for side in "AB")
        rates = [_number(group, "initial_lr") or _number(group, "lr") for group in (A, B) if group is not None]
        return rates[1] / rates[0] if len(rates) == 2 and rates[0] and rates[1] else None


def _packed(rows: Tensor) -> str:
    """As one line of text; (checks, modules, metrics) float64."""
    return base64.b64encode(zlib.compress(rows.numpy().tobytes())).decode()


def _unpacked(packed: str, checks: Sequence[Any], modules: Sequence[Any]) -> Tensor:
    numbers = np.frombuffer(zlib.decompress(base64.b64decode(packed)), np.float64)
    return torch.from_numpy(numbers.reshape(len(checks), len(modules), -1).copy())


def _loras(model: Any) -> Iterator[_Lora]:
    """Every linear with an active LoRA."""
    whole = getattr(model, "module", model)
    configs = getattr(whole, "peft_config", {})
    for path, layer in whole.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A and isinstance(layer.lora_A[adapter], nn.Linear):
                weight = quant.dequantized(layer.get_base_layer())
                norm = float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64))
                yield _Lora(path.removeprefix(keys.PREFIX), layer, adapter, configs.get(adapter), norm)


def _side(optimizer: Any, groups: Mapping[int, dict[str, Any]], module: _Lora, which: str) -> Side:
    """B transposed, so that the rank comes first."""
    parameter = module.A if which == "A" else module.B
    group = groups.get(id(parameter), {})
    state = optimizer.state.get(parameter, {})
    tensors = [parameter, parameter.grad]
    moments = {health.MOMENTS[key]: value for key, value in state.items() if key in health.MOMENTS}
    # In 8 bits a moment means nothing without its scales; others than Adam step otherwise by moments of these names.
    is_adam = type(getattr(optimizer, "optimizer", optimizer)).__module__ in _ADAM and not group.get("amsgrad")
    is_usual = is_adam and len(moments) == 2 and all(moment.dtype.is_floating_point for moment in moments.values())
    tensors += [moments["m"], moments["v"]] if is_usual else [None, None]
    value, gradient, m, v = (each if each is None or which == "A" else each.T for each in tensors)
    betas = group.get("betas", (0.0, 0.0))
    stepped = Stepped(_shrink(group), _number(group, "eps") or 0.0, tuple(betas), int(state.get("step", 0)))
    assert value is not None
    return Side(value, gradient, m, v, stepped)


def _coupled(group: Mapping[str, Any]) -> float:
    """Weight decay that is added to the gradient, as Adam and SGD of torch have it; 0 where decay is decoupled."""
    decoupled = group.get("decoupled_weight_decay", "momentum" not in group)
    return 0.0 if decoupled else _number(group, "weight_decay") or 0.0


def _rate(group: Mapping[str, Any]) -> float:
    return _number(group, "lr") or 0.0


def _shrink(group: Mapping[str, Any]) -> float:
    lr, decay = _number(group, "lr"), _number(group, "weight_decay")
    return 1.0 if _coupled(group) or lr is None or decay is None else 1 - lr * decay


def _number(group: Mapping[str, Any], key: str) -> float | None:
    """None where the group has none: Adafactor has a pair for eps, and no rate where it makes its own."""
    value = group.get(key)
    return float(value) if isinstance(value, Real | Tensor) else None
