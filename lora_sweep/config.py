"""The schema: every knob, its unit and its bounds.

Values live in conf/, one folder per group; this file says what a value may be, and which values go together.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, StringConstraints

from lora_sweep.errors import Fault


def _no_truth_value(value: Any) -> Any:
    """Python counts True as 1; in a configuration it is a slip."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


_NO_TRUTH_VALUE = BeforeValidator(_no_truth_value)
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), _NO_TRUTH_VALUE]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), _NO_TRUTH_VALUE]
Share = Annotated[float, Field(ge=0, lt=1), _NO_TRUTH_VALUE]
InnerShare = Annotated[float, Field(gt=0, lt=1), _NO_TRUTH_VALUE]
Whole = Annotated[int, Field(ge=0), _NO_TRUTH_VALUE]
Seed = Annotated[int, Field(ge=0, lt=2**32), _NO_TRUTH_VALUE]
Count = Annotated[int, Field(ge=1), _NO_TRUTH_VALUE]
Several = Annotated[int, Field(ge=2), _NO_TRUTH_VALUE]
Text = Annotated[str, StringConstraints(min_length=1)]
"""Never empty: a shell variable that is not set would name the working directory."""
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Tag = Annotated[str, StringConstraints(min_length=1, max_length=64)]
"""As W&B takes them: not empty, at most 64 characters."""

_FORBID = ConfigDict(extra="forbid", use_attribute_docstrings=True)


def _yaml_off(value: Any) -> Any:
    """YAML reads `off` as false."""
    return "off" if value is False else value


@dataclass(frozen=True)
class ModelConfig:
    __pydantic_config__ = _FORBID

    name: Name
    """Of the preset, for tables and W&B."""
    path: Text | None
    """Hub id, checkpoint folder or .gguf file; `embedded:tiny` is the base in the package, `package:NAME/FILE` a file
    in an installed Python package."""
    revision: Text | None
    """Commit or tag of a hub id; null: the newest."""
    dtype: Literal["auto", "fp32", "bf16", "fp64"]
    """Of the frozen base; adapters are fp32 (fp64 on an fp64 base). auto: the checkpoint's own, fp32 where it declares
    none (GGUF), bf16 for fp16: the same memory, and what overflows fp16 stays finite."""
    quantization: Literal["nf4", "int8"] | None
    """Of the weights of the base's linears, but for the output layer, by bitsandbytes (extra `quant`); activations and
    what is computed with them are in `dtype`."""
    attn_implementation: Literal["sdpa", "eager"]
    """transformers' attention: sdpa, or eager where an architecture has no other."""
    trust_remote_code: bool
    """Runs code that lies beside the checkpoint; heard on the command line only, never from a file."""


@dataclass(frozen=True)
class DataConfig:
    __pydantic_config__ = _FORBID

    name: Literal["facts", "style", "real_facts", "files", "hub"]
    """Where examples come from: an embedded task, files of your own, or a data set of the hub."""
    path: Text | None
    """`files`: a file (.jsonl, .json, .csv, .parquet, .arrow, .txt) or a folder of them. `hub`: a data set's id."""
    subset: Text | None
    """Of a hub data set that has several."""
    split: Text | None
    """Of a hub data set: the one to train on."""
    revision: Text | None
    """Commit or tag of a hub data set; null: the newest."""
    eval_path: Text | None
    """Evaluation file or folder; null: a share of the training data, held out by a hash of each example."""
    eval_split: Text | None
    """Of a hub data set: the one to evaluate on; null: a share of `split`."""
    eval_share: InnerShare
    """Of the training examples, held out where no evaluation data is given."""
    format: Literal["auto", "alpaca", "dolly", "sharegpt", "messages", "prompt_completion", "text"]
    """Which columns an example has (lora_sweep/data/README.md); `auto`: by the columns that are there."""
    columns: dict[str, str]
    """The data's own names for the columns of a format, e.g. `{prompt: question, completion: answer}`."""
    undesirable: Literal["refuse", "skip", "train"]
    """Rows of preference data whose `label` is false, answers not to give. refuse: they are an error; skip: they are
    left out; train: they are trained like the others."""
    chat_template: Text | None
    """Jinja file for `messages`; null: the tokenizer's own."""
    subjects: Count | None
    """Facts, style: people. Real facts: cities and elements. Null for data of your own."""
    max_length: Several
    """Tokens an example; longer ones are cut."""
    pack_examples: bool
    """Several short examples a row; none sees another. A batch then counts rows, not examples."""
    eval_size: Count | None
    """At most so many evaluation examples; null: all."""
    probe_size: Count
    """Training examples measured like the evaluation set."""
    retention: Text | None
    """Text on which forgetting is measured: a file or folder like `path`, or `embedded:tiny`, what its base knows."""
    retention_size: Count
    """At most so many stretches of max_length tokens of it."""
    seed: Seed
    """Of the task's own making and of the choice of examples, not of the training order."""


@dataclass(frozen=True)
class MethodConfig:
    __pydantic_config__ = _FORBID

    name: Literal["lora"]
    """The kind of adapter."""
    rank: Count
    """Rows of A and columns of B: the largest rank that the update can have."""
    alpha: Positive
    """scaling = alpha / rank, with rsLoRA alpha / sqrt(rank)."""
    use_rslora: bool
    """Whether scaling divides alpha by the root of the rank (2312.03732) and not by the rank."""
    dropout: Share
    """Probability of dropping an element of the adapter's input."""
    target_modules: Any
    """`all-linear`, a list of module names, or a regular expression: PEFT's own words."""


@dataclass(frozen=True)
class OptimizerConfig:
    __pydantic_config__ = _FORBID

    name: Literal["loraplus"]
    """AdamW with one group for A and one for B (2402.12354); ratio 1 is plain AdamW."""
    ratio: Positive
    """lr of B over lr of A."""
    base_lr: Positive
    """lr of A at the top of the schedule."""
    weight_decay: NotNegative
    """Decoupled, of A; a step decays by lr x weight_decay."""
    weight_decay_B: NotNegative | None
    """Of B; null: the same as A's."""
    optim: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "sgd"]
    """What steps the groups; 8 bits of state and paging by bitsandbytes (extra `quant`; paging needs a GPU)."""
    beta1: Share
    """Decay of AdamW's first moment, a step."""
    beta2: Share
    """Decay of AdamW's second moment, a step."""
    eps: Positive
    """What AdamW adds to the root of the second moment."""
    momentum: Share
    """Of SGD."""
    eps_rule: Literal["torch", "scaled"]
    """torch: eps for A and B. scaled: eps of B is eps x s, as B's gradient is; at alpha = rank (s = 1) the same."""
    decay_rule: Literal["torch", "scaled"]
    """torch: a step decays B by lr of B x its weight decay. scaled: by lr of A x it, whatever the ratio."""
    clip_rule: Literal["torch", "scaled"]
    """Norm compared with train.max_grad_norm. torch: sqrt(|g_A|^2 + |g_B|^2). scaled: sqrt(|g_A|^2 + |g_B / s|^2)."""


@dataclass(frozen=True)
class TrainConfig:
    __pydantic_config__ = _FORBID

    max_steps: Count
    """Optimizer steps."""
    batch_size: Count
    """Examples a micro-batch of one trial."""
    gradient_accumulation_steps: Count
    """Micro-batches an optimizer step."""
    eval_every: Count
    """Optimizer steps between evaluations; the last step is always evaluated."""
    eval_batch_size: Count
    """Evaluation examples a forward pass of one trial."""
    warmup_steps: Whole
    """Optimizer steps in which the learning rates rise from 0 to their top."""
    schedule: Literal["constant", "linear", "cosine"]
    """Factor on every group's lr after the warm-up; linear and cosine end at 0."""
    max_grad_norm: Positive | None
    """Clips a trial's whole gradient norm; null: no clipping."""
    gradient_checkpointing: bool
    """Recompute activations in the backward pass: less memory, about a third more time."""
    seed: Seed
    """Initial A, order of the data, dropout masks."""
    slots: Count | None
    """Adapters trained at once on one base; null: auto, the fastest measured in the first steps."""
    fixed_shapes: bool
    """Every pass has all slots, the largest rank and the full length, whoever shares it: equal bits, more time."""
    compile: bool
    """Compile the base with torch.compile: minutes at the start, faster steps on a GPU."""


@dataclass(frozen=True)
class SamplerConfig:
    __pydantic_config__ = _FORBID

    name: Literal["grid", "optuna"]
    """grid runs every cell of the grid; optuna draws cells."""
    n_trials: Count | None
    """Cells to draw; null for a grid, which runs all its cells."""
    instance: dict[str, Any] | None
    """`_target_: optuna.samplers.<class>` and its arguments."""


@dataclass(frozen=True)
class PrunerConfig:
    __pydantic_config__ = _FORBID

    name: Literal["none", "asha", "optuna"]
    """none trains every cell to its end; asha and optuna stop some at their evaluations."""
    eta: Several | None
    """ASHA: one in eta goes on at each rung."""
    min_steps: Count | None
    """ASHA: optimizer steps before the first rung."""
    instance: dict[str, Any] | None
    """`_target_: optuna.pruners.<class>` and its arguments."""


@dataclass(frozen=True)
class TrackerConfig:
    __pydantic_config__ = _FORBID

    name: Literal["wandb", "none"]
    """wandb makes one run a trial beside the record on disk; none makes none."""
    mode: Literal["offline", "online"]
    """offline keeps runs on disk until `wandb sync`; online sends them as trials train."""
    project: Name
    """Of W&B."""
    entity: Name | None
    """W&B user or team; null: the account's default."""
    tags: list[Tag]
    """Of every run, beside the flags."""


@dataclass(frozen=True)
class LauncherConfig:
    __pydantic_config__ = _FORBID

    name: Literal["local"]
    """Where trials train: local is this machine."""
    device: Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    """auto: a GPU where there is one, else the CPU."""
    threads: Count | None
    """CPU threads of torch; null: as many as torch takes."""


@dataclass(frozen=True)
class HealthConfig:
    __pydantic_config__ = _FORBID

    min_gain_of_base: Share
    """A gain over the base below this share of its loss is none..."""
    min_gain_standard_errors: NotNegative
    """... and so is one below so many paired standard errors..."""
    min_gain_of_best: Share
    """... or below this share of the best gain in the study at equal steps."""
    min_delta_rel: NotNegative
    """An update of s |BA|_F / |W|_F below this is too small to matter."""
    max_trapped_delta_rel: NotNegative
    """An update below this is small: an adapter with a larger one does something, whatever its evaluation says..."""
    max_delta_rel: NotNegative
    """... and one above this outweighs the weights: its rate is too high."""
    max_forgetting: NotNegative
    """Nats per token on the retention text, adapter on minus off."""
    check_every: Count
    """Optimizer steps between health checks of the adapters, beside the first ones and each evaluation."""
    action: Literal["flag", "stop"]
    """stop: a trial whose adapter cannot learn any more (not in the graph, A = B = 0, not stepped, underflow) ends once
    that is sure and frees its slot."""


@dataclass(frozen=True)
class StudyConfig:
    __pydantic_config__ = _FORBID

    name: Name
    """Folder and W&B group; defaults to the sweep file's name."""
    root: str
    """Where studies lie, relative to the working directory."""
    keep_adapters: Literal["all"] | Whole
    """`all`: the adapter of every finished trial; k: of the best k only."""
    fold: Annotated[Literal["exact", "near", "off"], BeforeValidator(_yaml_off)]
    """Of cells that are the same run one is run for all. exact: equal by algebra; near: also those that eps or the
    rounding of a quantized base in fp32 moves, by at most 1e-2 of the loss; off: every cell is run."""
    verify_fold: Whole
    """Of so many classes of equal cells of a grid, drawn at random, a second cell is run and compared."""


@dataclass(frozen=True)
class PickConfig:
    __pydantic_config__ = _FORBID

    form: Literal["lora", "rslora", "loraplus"] | None
    """How production.yaml writes the winner, the same run in each. lora: alpha / rank, ratio 1; rslora: alpha /
    sqrt(rank), ratio 1; loraplus: alpha = rank, so that the ratio says it all; null: as it was run."""


@dataclass(frozen=True)
class Config:
    """One trial, whole: what a cell becomes when it is merged into its sweep."""

    model: ModelConfig
    data: DataConfig
    method: MethodConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    sampler: SamplerConfig
    pruner: PrunerConfig
    tracker: TrackerConfig
    launcher: LauncherConfig
    health: HealthConfig
    study: StudyConfig
    pick: PickConfig


RENAMED = {"health": {"look_every": "check_every"}}
"""Group -> {a key of older versions: its name now}; the old one is accepted, with a warning."""

YOUNGER = {"data": {"format": "auto", "undesirable": "refuse"}}
"""Group -> {a key that older studies and options lack: what it means there}."""

GROUPS: dict[str, Any] = {field.name: field.type for field in fields(Config)}


def cross_faults(good: Mapping[str, Any]) -> list[Fault]:
    """Rules between fields, among the groups that are faultless by themselves."""
    faults = []
    train, sampler, pruner, model = (good.get(name) for name in ("train", "sampler", "pruner", "model"))
    if train and train.eval_every > train.max_steps:
        faults.append(Fault("train.eval_every", f"must be at most train.max_steps={train.max_steps}", train.eval_every))
    if train and train.warmup_steps >= train.max_steps:
        rule = f"must be below train.max_steps={train.max_steps}"
        faults.append(Fault("train.warmup_steps", rule, train.warmup_steps))
    if train and train.fixed_shapes and train.slots is None:
        faults.append(Fault("train.slots", "fixed shapes need a fixed number", None, "e.g. train.slots=8"))
    if sampler and sampler.name == "grid" and sampler.n_trials is not None:
        faults.append(
            Fault("sampler.n_trials", "a grid runs all its cells", sampler.n_trials, "null, or sampler=random")
        )
    if sampler and sampler.name == "optuna":
        if sampler.instance is None:
            faults.append(Fault("sampler.instance", "an Optuna sampler is needed", None, "take sampler=tpe or random"))
        if sampler.n_trials is None:
            faults.append(Fault("sampler.n_trials", "a sampler needs the number of cells to draw"))
    if pruner and pruner.name == "asha":
        for name in ("eta", "min_steps"):
            if getattr(pruner, name) is None:
                faults.append(Fault(f"pruner.{name}", "is needed by ASHA"))
    if pruner and pruner.name == "optuna" and pruner.instance is None:
        faults.append(Fault("pruner.instance", "an Optuna pruner is needed", None, "take pruner=median"))
    if model and model.path is None:
        faults.append(Fault("model.path", "a checkpoint folder, .gguf file or hub id is needed"))
    return faults
