"""Faults in real runs of transformers' Trainer and of TRL are named, and healthy trainings left alone."""

import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import Adafactor, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lora_sweep import HealthCallback, health
from lora_sweep.adapters.reader import WEIGHTS
from lora_sweep.base.load import LoadedBase
from lora_sweep.bench.hf_trainer import IGNORE_INDEX, collate
from lora_sweep.data import encode
from lora_sweep.data.tasks import biographies as world
from lora_sweep.errors import ConfigError
from lora_sweep.evidence.faults import FAULTS, Outcome, Training, train

SHORT = Training(seed=0, steps=25)


class _Constant(LRScheduler):
    """Leaves each group the rate that it has, or has not."""

    def get_lr(self) -> list[Any]:
        return [group["lr"] for group in self.optimizer.param_groups]


def adapted(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def fitted(
    base: LoadedBase,
    folder: Path,
    watch: HealthCallback,
    adapt: Callable[[Any], Any] = adapted,
    optimizer: Callable[[list[Tensor]], Any] | None = None,
    resume: Path | None = None,
    others: Sequence[TrainerCallback] = (),
    **settings: Any,
) -> Trainer:
    """A training by transformers' Trainer with its own defaults but for `settings`; the base is left as it was."""
    expected = {
        "max_steps": 25, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 5,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "remove_unused_columns": False,
        "label_names": ["labels"], "use_cpu": True, "log_level": "error",
    }  # fmt: skip
    rows = []
    examples = world.style(seed=0).train
    for ids, loss_mask in encode([(each.prompt, each.completion) for each in examples], base.tokenizer):
        labels = [token if counts else IGNORE_INDEX for token, counts in zip(ids, loss_mask, strict=True)]
        rows.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = adapt(base.model)
        outcome = optimizer([each for each in model.parameters() if each.requires_grad]) if optimizer else None
        constant = outcome and _Constant(outcome)
        trainer = Trainer(
            model,
            TrainingArguments(output_dir=str(folder), **expected | settings),
            data_collator=collate,
            train_dataset=rows,
            eval_dataset=rows[:24],
            optimizers=(outcome, constant),
            callbacks=[watch, *others],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        restore(base, model)
    return trainer


def restore(base: LoadedBase, model: Any) -> None:
    """The base is shared by all tests: no adapter, and none of the wrappers that trainers put around `forward`."""
    model.unload()
    base.model.__dict__.pop("forward", None)
    base.model.eval()


def written(folder: Path) -> Any:
    """health.json, which must be JSON to everybody."""

    def refused(word: str) -> None:
        raise ValueError(word)

    return json.loads((folder / "health.json").read_text(), parse_constant=refused)


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """What the callback says in the log, while it says it."""
    flags: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            flags.append(record.getMessage())

    ear, logger = Ear(), logging.getLogger("lora_sweep")
    logger.addHandler(ear)
    yield flags
    logger.removeHandler(ear)


@pytest.mark.parametrize(
    "cause", ["ratio_lost", "not_stepped", "underflow", "not_in_graph", "dead_product", "lost_on_save"]
)
def test_a_fault_is_named_with_its_cause(base: LoadedBase, tmp_path: Path, cause: str) -> None:
    fault = next(each for each in FAULTS if each.cause == cause)
    assert cause in train(base, fault.inject(SHORT), tmp_path).named
    written = json.loads((tmp_path / "health.json").read_text())
    flags = [each for each in written["findings"] if cause in (each["flag"], each["cause"])]
    assert flags
    assert flags[0]["sentence"].endswith(".")


def test_a_healthy_training_is_left_alone(base: LoadedBase, tmp_path: Path) -> None:
    outcome = train(base, SHORT, tmp_path)
    assert outcome == Outcome(pytest.approx(outcome.gain), ())
    assert outcome.gain > 2


def test_the_base_is_left_as_it_was(base: LoadedBase, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    train(base, replace(SHORT, steps=5), tmp_path)
    after = base.model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not base.model.training


def test_a_rule_that_is_none_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"health\.min_gain_of_bas: unknown key \(did you mean min_gain_of_base\?\)"):
        HealthCallback(min_gain_of_bas=0.1)
    with pytest.raises(ConfigError, match=r"health\.action"):
        HealthCallback(action="shout")


class _Stale(TrainerCallback):
    """Replaces the parameters once the optimizer is built, as a reload in the middle does."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **told: Any) -> None:
        for name, module in told["model"].named_modules():
            if name.endswith(("lora_A.default", "lora_B.default")):
                module.weight = torch.nn.Parameter(module.weight.data.clone())


def sft(base: LoadedBase, folder: Path, callbacks: list[TrainerCallback], **settings: Any) -> Any:
    """TRL's trainer on prompts and completions, with its own optimizer."""
    from trl import SFTConfig, SFTTrainer

    examples = world.style(seed=0).train
    rows = [{"prompt": each.prompt, "completion": each.completion} for each in examples]
    config = SFTConfig(
        output_dir=str(folder), max_steps=24, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=4,
        report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, bf16=False, max_length=64,
        gradient_checkpointing=False, **settings,
    )  # fmt: skip
    trainer = SFTTrainer(
        base.model,
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=base.tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    finally:
        restore(base, trainer.model)
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_in_trl_a_healthy_training_is_left_alone_and_faults_are_named(
    base: LoadedBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    healthy, stale, requested = HealthCallback(), HealthCallback(action="stop"), HealthCallback(ratio=16)
    with caplog.at_level(logging.WARNING, logger="lora_sweep"):
        sft(base, tmp_path / "healthy", [healthy])
        assert healthy.findings == ()
        assert "lora_sweep" not in {record.name.partition(".")[0] for record in caplog.records}
        trainer = sft(base, tmp_path / "stale", [_Stale(), stale])
        assert [(each.flag, each.cause) for each in stale.findings][:1] == [("zero_trapped", "not_stepped")]
        assert trainer.state.global_step == 20, "stop: at the end of the window, not of the training"
        # TRL's optimizer has one rate for A and B: whoever wanted LoRA+ did not get it.
        sft(base, tmp_path / "ratio", [requested])
        assert [each.flag for each in requested.findings] == ["ratio_lost"]
    assert sum("not_stepped" in record.message for record in caplog.records) == 1, "said once"


# -- whatever the training does ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_an_optimizer_with_a_pair_for_eps_or_without_a_rate_is_watched_in_peace(
    base: LoadedBase, tmp_path: Path, heard: list[str]
) -> None:
    watch = HealthCallback()
    fitted(base, tmp_path, watch, optim="adafactor")
    assert (watch.findings, heard) == ((), [])
    own_rate, requested = (lambda parameters: Adafactor(parameters, lr=None)), HealthCallback(ratio=16)
    assert fitted(base, tmp_path, requested, optimizer=own_rate).state.global_step == 25
    assert (requested.findings, heard) == ((), [])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.RAdam, torch.optim.NAdam, functools.partial(torch.optim.AdamW, amsgrad=True)],
    ids=["RAdam", "NAdam", "AMSGrad"],
)
def test_of_adams_relatives_the_rates_are_those_of_their_groups(
    base: LoadedBase, tmp_path: Path, heard: list[str], optimizer: Any
) -> None:
    watch, requested = HealthCallback(), HealthCallback(ratio=16)
    fitted(base, tmp_path, watch, optimizer=optimizer)
    assert (watch.findings, heard) == ((), [])
    fitted(base, tmp_path, requested, optimizer=optimizer, max_steps=4)
    assert [(each.flag, each.evidence["ratio"]) for each in requested.findings] == [("ratio_lost", 1.0)]


@pytest.mark.filterwarnings("ignore")
def test_losses_that_are_no_numbers_end_no_training_and_health_json_stays_json(
    base: LoadedBase, tmp_path: Path, heard: list[str]
) -> None:
    hot = {"learning_rate": 1e6, "logging_nan_inf_filter": False, "max_grad_norm": 0.0}
    assert fitted(base, tmp_path, HealthCallback(), **hot).state.global_step == 25
    assert [each.partition(":")[0] for each in heard] == ["diverged"]
    assert written(tmp_path)["diagnosis"]["gain"] is None


@pytest.mark.filterwarnings("ignore")
def test_a_mistake_of_its_own_is_shown_once_and_ends_no_training(
    base: LoadedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(health, "measure", lambda *_: 1 / 0)
    assert fitted(base, tmp_path, HealthCallback()).state.global_step == 25
    (record,) = (each for each in caplog.records if each.name.startswith("lora_sweep"))
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


@pytest.mark.filterwarnings("ignore")
def test_a_rate_that_is_still_warming_up_is_no_reason_to_warn(
    base: LoadedBase, tmp_path: Path, heard: list[str]
) -> None:
    watch = HealthCallback()
    fitted(base, tmp_path, watch, max_steps=100, warmup_steps=100, learning_rate=4e-4, logging_steps=2)
    assert (watch.findings, heard) == ((), [])


@pytest.mark.filterwarnings("ignore")
def test_what_no_more_steps_can_mend_is_warned_of_when_the_window_ends(
    base: LoadedBase, tmp_path: Path, heard: list[str]
) -> None:
    class Listening(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **told: Any) -> None:
            assert (state.global_step < 20) == (not heard)

    def with_dead_layer(model: Any) -> Any:
        outcome = adapted(model)
        for module in outcome.get_submodule("base_model.model.model.layers.1").modules():
            if isinstance(module, LoraLayer):
                module.lora_A["default"].weight.data.zero_()
        return outcome

    fitted(base, tmp_path, HealthCallback(ratio=16), with_dead_layer, others=[Listening()])
    assert [each.partition(":")[0] for each in heard] == ["partially_trapped", "ratio_lost"]


# -- rates -----------------------------------------------------------------------------------------------------------


class _Rates(TrainerCallback):
    """Sets the rate of A and that of B before each step."""

    def __init__(self, rates: Callable[[int], tuple[float, float]]) -> None:
        self._rates = rates

    def on_step_begin(self, args: Any, state: Any, control: Any, **told: Any) -> None:
        for group, lr in zip(told["optimizer"].param_groups, self._rates(state.global_step), strict=True):
            group["lr"] = lr


def by_side(model: Any) -> torch.optim.Optimizer:
    """A group of A's and one of B's, as LoRA+ has them."""
    A, B = ([each for name, each in model.named_parameters() if f"lora_{side}" in name] for side in "AB")
    return torch.optim.AdamW([{"params": A}, {"params": B}], lr=1e-3)


def fitted_at(
    base: LoadedBase, folder: Path, watch: HealthCallback, rates: Callable[[int], tuple[float, float]], **settings: Any
) -> None:
    outcome: list[Any] = []

    def adapt(model: Any) -> Any:
        outcome.append(adapted(model))
        return outcome[0]

    fitted(base, folder, watch, adapt, lambda _: by_side(outcome[0]), others=[_Rates(rates)], **settings)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "rates",
    [lambda _: (0.0, 0.0), lambda _: (1e-3, 0.0), lambda step: (1e-3 * (step > 1000), 16e-3 * (step > 1000))],
    ids=["learning rate 0", "lr of B 0", "a schedule of 0"],
)
def test_a_rate_of_0_is_named_and_a_ratio_that_was_asked_for_is_lost(
    base: LoadedBase, tmp_path: Path, rates: Callable[[int], tuple[float, float]]
) -> None:
    watch = HealthCallback(ratio=16)
    fitted_at(base, tmp_path, watch, rates)
    assert [(each.flag, each.cause) for each in watch.findings] == [
        ("zero_trapped", "not_stepped"),
        ("ratio_lost", None),
    ]
    assert watch.findings[0].evidence["lr_B"] == 0.0
    assert "the learning rate of B was 0 at every step" in watch.findings[0].sentence
    assert watch.findings[1].evidence["ratio"] == 0.0
    assert [each["flag"] for each in written(tmp_path)["findings"]] == ["zero_trapped", "ratio_lost"]


@pytest.mark.filterwarnings("ignore")
def test_a_rate_that_is_far_too_high_is_named_and_random_labels_are_not(base: LoadedBase, tmp_path: Path) -> None:
    """On facts the signs of its steps flip, so that B walks as under random labels."""
    training = Training(0, "facts", steps=25, batch_size=8, alpha=32.0, lr_A=4e-3, lr_B=64e-3, ratio=16.0)
    outcome = train(base, training, tmp_path)
    assert outcome.gain < -0.2
    assert {"rate_too_high", "diverged"} & set(outcome.named)
    assert not {"zero_trapped", "partially_trapped", "no_signal"} & set(outcome.named)
    tenth = train(base, replace(training, lr_A=4e-4, lr_B=64e-4), tmp_path)
    assert (tenth.gain > 0.3, tenth.named) == (True, ()), "the advice works"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("ratio", "advice"),
    [(1.0, "lower method.alpha by the same factor"), (1000.0, "lower optimizer.ratio or method.alpha")],
)
def test_of_an_a_that_hardly_moves_the_advice_fits_the_ratio(
    base: LoadedBase, tmp_path: Path, ratio: float, advice: str
) -> None:
    watch = HealthCallback(ratio=ratio)
    lr_A = 4e-5 if ratio == 1 else 4e-6
    fitted_at(base, tmp_path, watch, lambda _: (lr_A, ratio * lr_A))
    (finding,) = (each for each in watch.findings if each.flag == "A_frozen")
    assert advice in finding.sentence
    assert (ratio == 1) == ("optimizer.ratio" not in finding.sentence)


@pytest.mark.filterwarnings("ignore")
def test_of_several_groups_of_b_one_without_a_rate_is_not_all(base: LoadedBase, tmp_path: Path) -> None:
    outcome: list[Any] = []

    def adapt(model: Any) -> Any:
        outcome.append(adapted(model))
        return outcome[0]

    def layered(_: Any) -> torch.optim.Optimizer:
        first, *rest = [each for name, each in outcome[0].named_parameters() if "lora_B" in name]
        A = [each for name, each in outcome[0].named_parameters() if "lora_A" in name]
        return torch.optim.AdamW([{"params": [first], "lr": 0.0}, {"params": [*A, *rest]}], lr=1e-3)

    watch = HealthCallback()
    fitted(base, tmp_path, watch, adapt, layered)
    assert not {"zero_trapped", "partially_trapped"} & {each.flag for each in watch.findings}


@pytest.mark.filterwarnings("ignore")
def test_a_training_of_one_step_is_not_told_that_its_a_does_not_move(base: LoadedBase, tmp_path: Path) -> None:
    """Before B has moved, A has no gradient."""
    watch = HealthCallback(ratio=16)
    fitted(base, tmp_path, watch, max_steps=1)
    assert "A_frozen" not in {each.flag for each in watch.findings}


@pytest.mark.filterwarnings("ignore")
def test_a_training_that_ends_before_its_window_is_undecided(base: LoadedBase, tmp_path: Path) -> None:
    class Stopping(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **told: Any) -> None:
            control.should_training_stop = state.global_step == 8

    watch = HealthCallback()
    fitted(base, tmp_path, watch, learning_rate=1e-7, others=[Stopping()])
    assert [(each.flag, each.is_fault) for each in watch.findings] == [("undecided", False)]


# -- the losses --------------------------------------------------------------------------------------------------------

EVALUATED = {"eval_on_start": True, "eval_strategy": "steps", "per_device_eval_batch_size": 24}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("logging", [{"logging_steps": 500}, {"logging_strategy": "no"}], ids=["seldom", "never"])
def test_evaluations_tell_the_gain_where_no_losses_are_logged(
    base: LoadedBase, tmp_path: Path, logging: dict[str, Any]
) -> None:
    watch = HealthCallback()
    fitted(base, tmp_path, watch, learning_rate=1e-6, eval_steps=25, **EVALUATED | logging)
    assert [(each.flag, each.cause) for each in watch.findings] == [("zero_trapped", "lr_too_small")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 1e6},
        {"learning_rate": 3.0, "eval_steps": 25, **EVALUATED},
        {"learning_rate": 0.1, "logging_steps": 1},
    ],
    ids=["at once", "evaluated", "above the start"],
)
def test_a_training_that_diverges_is_said_to_and_to_lack_nothing_else(
    base: LoadedBase, tmp_path: Path, settings: dict[str, Any]
) -> None:
    watch = HealthCallback()
    fitted(base, tmp_path, watch, **settings)
    assert [(each.flag, each.is_fault) for each in watch.findings] == [("diverged", True)]


@pytest.mark.filterwarnings("ignore")
def test_a_gain_that_is_given_back_is_diverged(base: LoadedBase, tmp_path: Path) -> None:
    class Heating(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **told: Any) -> None:
            for group in told["optimizer"].param_groups:
                group["lr"] = 1e-3 if state.global_step < 20 else 0.1

    watch = HealthCallback()
    fitted(
        base, tmp_path, watch, optimizer=torch.optim.AdamW, eval_steps=10, max_steps=30, others=[Heating()], **EVALUATED
    )
    assert [each.flag for each in watch.findings] == ["diverged"]
    assert watch.findings[0].evidence["best_gain"] > 1


@pytest.mark.filterwarnings("ignore")
def test_losses_of_single_examples_may_wander(base: LoadedBase, tmp_path: Path, heard: list[str]) -> None:
    watch = HealthCallback()
    fitted(base, tmp_path, watch, per_device_train_batch_size=1, logging_steps=1)
    assert (watch.findings, heard) == ((), [])


# -- resumed from a checkpoint -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("restores", [False, True], ids=["a new callback", "transformers restores it"])
def test_a_resumed_training_is_judged_as_the_whole(
    base: LoadedBase, tmp_path: Path, heard: list[str], restores: bool
) -> None:
    settings = {"max_steps": 30, "logging_steps": 1, "restore_callback_states_from_checkpoint": restores}
    whole, again = HealthCallback(), HealthCallback()
    fitted(base, tmp_path, whole, save_strategy="steps", save_steps=25, **settings)
    trainer = fitted(base, tmp_path, again, resume=tmp_path / "checkpoint-25", **settings)
    if restores:
        (again,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, HealthCallback))
    assert (whole.findings, again.findings, heard) == ((), (), [])
    assert again.diagnosis().gain == whole.diagnosis().gain
    assert again._rule_input().snapshot.sums_by_check == whole._rule_input().snapshot.sums_by_check
    assert np.isfinite(whole._rule_input().snapshot.values["lr_B"]).all(), "AdamW's rates are measured from what moved"
    for name, values in whole._rule_input().snapshot.values.items():
        assert np.array_equal(again._rule_input().snapshot.values[name], values, equal_nan=True)


@pytest.mark.filterwarnings("ignore")
def test_of_a_checkpoint_that_knows_nothing_the_way_until_then_is_not_judged(
    base: LoadedBase, tmp_path: Path, heard: list[str]
) -> None:
    """And what is seen from there on is."""
    settings = {"max_steps": 30, "logging_steps": 1, "save_strategy": "steps", "save_steps": 25}
    whole = HealthCallback()
    fitted(base, tmp_path, whole, **settings)
    file = tmp_path / "checkpoint-25" / "trainer_state.json"
    state = json.loads(file.read_text())
    del state["stateful_callbacks"]["HealthCallback"]
    file.write_text(json.dumps(state))
    watch, requested = HealthCallback(), HealthCallback(ratio=16)
    fitted(base, tmp_path, watch, resume=file.parent, **settings | {"save_steps": 2})
    assert (watch.findings, heard) == ((), [])
    assert watch.diagnosis().gain == whole.diagnosis().gain, "the log is there"
    fitted(base, tmp_path, requested, resume=file.parent, **settings)
    assert [each.flag for each in requested.findings] == ["ratio_lost"]
    state["log_history"] = []
    file.write_text(json.dumps(state))
    fitted(base, tmp_path, watch, resume=file.parent, **settings | {"save_strategy": "no"})
    assert (watch.findings, watch.diagnosis().gain) == ((), None)


@pytest.mark.filterwarnings("ignore")
def test_a_second_training_is_judged_by_itself(base: LoadedBase, tmp_path: Path) -> None:
    watch = HealthCallback()
    fitted(base, tmp_path, watch, eval_on_start=True, eval_strategy="steps", eval_steps=25)
    assert watch.findings == ()
    fitted(base, tmp_path, watch, learning_rate=1e-6)
    assert [each.cause for each in watch.findings] == ["lr_too_small"]


# -- what was saved ----------------------------------------------------------------------------------------------------

OTHER = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def named(model: Any) -> Any:
    return get_peft_model(model, OTHER, adapter_name="mine")


def second_of_two(model: Any) -> Any:
    outcome = adapted(model)
    outcome.add_adapter("other", OTHER)
    outcome.set_adapter("other")
    return outcome


def both(model: Any) -> Any:
    outcome = second_of_two(model)
    outcome.base_model.set_adapter(["default", "other"])
    return outcome


class _Spoiling(HealthCallback):
    """Finds the files under a checkpoint spoilt by somebody before it sees them."""

    def __init__(self, spoilt: str, spoil: Callable[[Path], None]) -> None:
        super().__init__()
        self._spoilt, self._spoil = spoilt, spoil

    def on_save(self, args: Any, state: Any, control: Any, **told: Any) -> None:
        self._spoil(Path(args.output_dir) / f"checkpoint-{state.global_step}" / self._spoilt / WEIGHTS)
        super().on_save(args, state, control, **told)


def zeroed(file: Path) -> None:
    save_file({name: torch.zeros_like(each) for name, each in load_file(file).items()}, file, {"format": "pt"})


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4, "save_only_model": True}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("adapt", "folder", "modules"), [(named, "mine", 28), (second_of_two, "other", 28), (both, "other", 56)]
)
def test_each_adapter_is_compared_with_its_own_file(
    base: LoadedBase, tmp_path: Path, heard: list[str], adapt: Callable[[Any], Any], folder: str, modules: int
) -> None:
    watch = HealthCallback()
    fitted(base, tmp_path, watch, adapt, **SAVING)
    assert "lost_on_save" not in [each.flag for each in watch.findings]
    for spoil in (zeroed, cut):
        spoilt = _Spoiling(folder, spoil)
        fitted(base, tmp_path, spoilt, adapt, **SAVING)
        (lost,) = (each for each in spoilt.findings if each.flag == "lost_on_save")
        assert lost.sentence.startswith(f"lost_on_save in 28 of {modules} modules"), lost.sentence
    assert sum("truncated or damaged" in each for each in heard) == 1


@pytest.mark.filterwarnings("ignore")
def test_what_is_no_plain_lora_on_disk_is_not_compared_and_that_is_said(
    base: LoadedBase, tmp_path: Path, heard: list[str]
) -> None:
    def with_parameters(model: Any) -> Any:
        config = LoraConfig(r=8, target_modules=["q_proj"], target_parameters=["mlp.gate_proj.weight"])
        return get_peft_model(model, config)

    watch = HealthCallback()
    fitted(base, tmp_path, watch, with_parameters, **SAVING)
    assert "lost_on_save" not in [each.flag for each in watch.findings]
    (said,) = (each for each in heard if "compared" in each)
    assert "target_parameters is set" in said
