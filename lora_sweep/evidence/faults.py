"""Trainings by transformers' Trainer, PEFT and torch's optimizers, and how each cause is provoked in one."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lora_sweep.adapters.peft_template import peft_chatter_off, peft_config
from lora_sweep.adapters.reader import WEIGHTS
from lora_sweep.base.load import LoadedBase
from lora_sweep.bench.hf_trainer import IGNORE_INDEX, collate
from lora_sweep.callback import HealthCallback
from lora_sweep.data import encode
from lora_sweep.data.tasks import biographies as world
from lora_sweep.records import Example

ECHO_TOKENS = 24

Hook = Callable[[nn.Module], None]


def _nothing(_: nn.Module) -> None:
    pass


@dataclass(frozen=True)
class Training:
    """One training; a fault changes it."""

    seed: int
    task: Literal["style", "facts", "echo"] = "style"
    """echo: the prompts of facts, completed by the base itself at random: nothing that it does not know."""
    steps: int = 60
    batch_size: int = 4
    rank: int = 8
    alpha: float = 16.0
    lr_A: float = 1e-3
    lr_B: float = 4e-3
    ratio: float = 4.0
    """Asked for."""
    weight_decay_B: float = 0.0
    eps: float = 1e-8
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW
    one_cycle: bool = False
    """A schedule that gives every group one rate."""
    loss_scale: float = 1.0
    dtype: torch.dtype = torch.float32
    """Of the adapter."""
    before_optimizer: Hook = _nothing
    after_optimizer: Hook = _nothing
    zeroes_file: bool = False


Change = Callable[[Training], Training]


@dataclass(frozen=True)
class Fault:
    """How a cause is provoked. Its twin is the same training without the fault."""

    name: str
    cause: str
    """The rule that should name it."""
    inject: Change
    twin: Change = lambda training: training


def _factors(model: nn.Module, side: str) -> list[tuple[nn.Module, nn.Parameter]]:
    """(linear, its weight) of each lora_A or lora_B."""
    holders = [module for name, module in model.named_modules() if name.endswith(f"lora_{side}.default")]
    return [(module, module.weight) for module in holders if isinstance(module.weight, nn.Parameter)]


def _go_by(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "base_layer") and isinstance(module.base_layer, nn.Linear):
            module.__dict__["forward"] = module.base_layer.forward


def _in_layers(*layers: int) -> Hook:
    def gone_by(model: nn.Module) -> None:
        for layer in layers:
            _go_by(model.get_submodule(f"base_model.model.model.layers.{layer}"))

    return gone_by


def _zero_A(model: nn.Module) -> None:
    for _, A in _factors(model, "A"):
        A.data.zero_()


def _replace_parameters(model: nn.Module) -> None:
    for side in "AB":
        for linear, weight in _factors(model, side):
            linear.weight = nn.Parameter(weight.data.clone())


def _round_gradients(model: nn.Module) -> None:
    for side in "AB":
        for _, weight in _factors(model, side):
            weight.register_hook(lambda gradient: gradient.half().to(gradient.dtype))


def _with(**knobs: Any) -> Change:
    return lambda training: replace(training, **knobs)


_FACTS: dict[str, Any] = {"task": "facts", "steps": 120, "batch_size": 8, "lr_A": 2e-3, "lr_B": 8e-3}
_TINY: dict[str, Any] = {"lr_A": 1e-6, "lr_B": 1e-6, "ratio": 1.0}
_SLOW: dict[str, Any] = {"lr_A": 1e-5, "lr_B": 1e-5, "ratio": 1.0, "steps": 300}
_FAR_APART: dict[str, Any] = {"lr_A": 4e-6, "ratio": 1000.0}

FAULTS: Sequence[Fault] = (
    Fault("a forward pass by all layers but the last", "not_in_graph", _with(before_optimizer=_in_layers(0, 1, 2))),
    Fault("a forward pass by one layer in four", "not_in_graph", _with(before_optimizer=_in_layers(1))),
    Fault("A = B = 0", "dead_product", _with(before_optimizer=_zero_A)),
    Fault(
        "parameters replaced once the optimizer was built", "not_stepped", _with(after_optimizer=_replace_parameters)
    ),
    Fault("gradients in fp16, loss x 1e-6", "underflow", _with(before_optimizer=_round_gradients, loss_scale=1e-6)),
    Fault("loss x 1e-8", "eps_limited", _with(loss_scale=1e-8)),
    Fault("eps 10", "eps_limited", _with(eps=10.0)),
    Fault(
        "Adam, coupled decay 1000",
        "decay_trapped",
        _with(optimizer=torch.optim.Adam, weight_decay_B=1000.0, **_SLOW),
        _with(**_SLOW),
    ),
    Fault("OneCycleLR with one max_lr", "ratio_lost", _with(one_cycle=True)),
    Fault(
        "adapter in bf16, lr 1e-4, 400 steps",
        "precision_stalled",
        _with(dtype=torch.bfloat16, lr_A=1e-4, lr_B=1e-4, ratio=1.0, steps=400),
        _with(lr_A=1e-4, lr_B=1e-4, ratio=1.0, steps=400),
    ),
    Fault("lr 1e-6", "lr_too_small", _with(**_TINY)),
    Fault("labels drawn from the base itself", "no_signal", _with(**_FACTS | {"task": "echo"}), _with(**_FACTS)),
    Fault("the saved file zeroed", "lost_on_save", _with(zeroes_file=True)),
    Fault("adapter in bf16, lr 1e-5", "A_frozen", _with(dtype=torch.bfloat16, lr_A=1e-5, lr_B=1e-5, ratio=1.0)),
    Fault("ratio 1000", "A_frozen", _with(**_FAR_APART)),
)
"""Provoked in transformers' Trainer."""

PACKED: Sequence[Fault] = (
    Fault("lr 1e-6", "lr_too_small", _with(**_TINY)),
    Fault("eps 10", "eps_limited", _with(eps=10.0)),
    Fault(
        "AdamW at lr 1e-4, half of B decays a step",
        "decay_trapped",
        _with(lr_A=1e-4, ratio=1.0, weight_decay_B=5000.0),
        _with(lr_A=1e-4, ratio=1.0),
    ),
    Fault("ratio 1000", "A_frozen", _with(**_FAR_APART)),
)
"""Provoked by a sweep's own settings."""


@dataclass(frozen=True)
class Outcome:
    """What became of a training."""

    gain: float
    """Evaluation loss of the base minus that at the end, nats per token, the loss's scale undone."""
    named: tuple[str, ...]
    """All that was said: flags and causes, in the end or on the way."""


def train(base: LoadedBase, training: Training, folder: Path) -> Outcome:
    """One training on the resident base, which is left as it was found."""
    train_rows, eval_rows = (_rows(base, each) for each in _examples(base, training))
    with torch.random.fork_rng(devices=[]), peft_chatter_off():
        torch.manual_seed(training.seed)
        model = get_peft_model(base.model, peft_config(training.rank, training.alpha, False, 0.0, "all-linear"))
    before = {id(module): module.__dict__.get("forward") for module in model.modules()}
    try:
        for side in "AB":
            for _, weight in _factors(model, side):
                weight.data = weight.data.to(training.dtype)
        training.before_optimizer(model)
        optimizer = _optimizer(model, training)
        schedule: Any = LambdaLR(optimizer, lambda _: 1.0)
        if training.one_cycle:
            schedule = OneCycleLR(optimizer, max_lr=training.lr_A, total_steps=training.steps + 1)
        training.after_optimizer(model)
        watch = HealthCallback(ratio=training.ratio)
        callbacks = [_Zeroing(), watch] if training.zeroes_file else [watch]
        trainer = Trainer(
            model,
            _arguments(training, folder),
            data_collator=collate,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            optimizers=(optimizer, schedule),
            compute_loss_func=lambda outputs, labels, **_: training.loss_scale * _loss(outputs.logits, labels),
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        with _listening() as heard:
            trainer.train()
        losses = [row["eval_loss"] / training.loss_scale for row in trainer.state.log_history if "eval_loss" in row]
    finally:
        for module in model.modules():
            if module.__dict__.get("forward") is not before[id(module)]:
                module.__dict__.pop("forward")
        model.unload()
        base.model.eval()
    said = [word for finding in watch.findings for word in (finding.flag, finding.cause) if word is not None]
    # What was warned of on the way was said too, whatever is found in the end.
    return Outcome(losses[0] - losses[-1], (*said, *(flag for flag in heard if flag not in said)))


@contextmanager
def _listening() -> Iterator[list[str]]:
    """The flags that the callback warns of in the log, which nobody else hears meanwhile."""
    flags: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            flags.append(record.getMessage().partition(":")[0])

    ear, logger = Ear(), logging.getLogger("lora_sweep.callback")
    before = logger.level, logger.propagate
    logger.addHandler(ear)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield flags
    finally:
        logger.removeHandler(ear)
        logger.setLevel(before[0])
        logger.propagate = before[1]


class _Zeroing(TrainerCallback):
    """Loses B on save."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / WEIGHTS
        tensors = load_file(file)
        save_file({name: each * ("lora_A" in name) for name, each in tensors.items()}, file, {"format": "pt"})


def _examples(base: LoadedBase, training: Training) -> tuple[list[Example], list[Example]]:
    """(of the training, of the evaluation)."""
    count = training.steps * training.batch_size
    if training.task == "style":
        style = world.style(seed=training.seed)
        rng = Random(training.seed)
        return [rng.choice(style.train) for _ in range(count)], list(style.eval[:24])
    task = world.facts(24, training.seed)
    train_examples = [task.train[place % len(task.train)] for place in range(count)]
    if training.task == "facts":
        return train_examples, list(task.eval)
    echoed = _completed(base, [each.prompt for each in (*train_examples, *task.eval)], training.seed)
    return echoed[:count], echoed[count:]


def _completed(base: LoadedBase, prompts: Sequence[str], seed: int) -> list[Example]:
    """Each prompt with what the base makes of it, drawn from its own distribution."""
    tokenizer = base.tokenizer
    alike: dict[int, list[int]] = {}
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for place, ids in enumerate(encoded):
        alike.setdefault(len(ids), []).append(place)
    completed: dict[int, Example] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Of one length at once, so that nothing is padded.
        for length, places in sorted(alike.items()):
            ids = torch.tensor([encoded[place] for place in places])
            whole = base.model.generate(ids, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=ECHO_TOKENS)
            for place, row in zip(places, whole[:, length:], strict=True):
                completed[place] = Example(tokenizer.decode(row, skip_special_tokens=True) or " ", prompts[place])
    return [completed[place] for place in range(len(prompts))]


def _rows(base: LoadedBase, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
    encoded = encode([(each.prompt, each.completion) for each in examples], base.tokenizer)
    rows = []
    for ids, loss_mask in encoded:
        tokens = torch.as_tensor(ids, dtype=torch.int64)
        mask = torch.as_tensor(loss_mask, dtype=torch.bool)
        rows.append({"input_ids": tokens, "labels": tokens.masked_fill(~mask, IGNORE_INDEX)})
    return rows


def _optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    A, B = ([weight for _, weight in _factors(model, side)] for side in "AB")
    groups = [
        {"params": A, "lr": training.lr_A, "weight_decay": 0.0},
        {"params": B, "lr": training.lr_B, "weight_decay": training.weight_decay_B},
    ]
    return training.optimizer(groups, eps=training.eps)  # type: ignore[call-arg]


def _arguments(training: Training, folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=24,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=training.steps,
        logging_steps=10,
        save_strategy="steps" if training.zeroes_file else "no",
        save_steps=training.steps,
        save_only_model=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        seed=training.seed,
        use_cpu=True,
        log_level="error",
    )


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    shifted = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    return functional.cross_entropy(logits.float().flatten(0, 1), shifted.flatten(), ignore_index=IGNORE_INDEX)
