"""The pack against its oracles: PEFT with torch's AdamW, the same trial alone, and PEFT's loader."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import config_of
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from processor import BF16_ATTENTION, BF16_PRODUCTS, THREADS, VECTORS, as_found, either
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from lora_sweep.base import load as model_room
from lora_sweep.base import source
from lora_sweep.base.load import LoadedBase
from lora_sweep.config import ModelConfig
from lora_sweep.data import Data, TokenSet, order
from lora_sweep.errors import UserError
from lora_sweep.pack import DamagedCheckpoint, Pack, PackOutOfMemory, Settings, Trial
from lora_sweep.pack.capacity import MOST_ROUNDS
from lora_sweep.pack.dropout import keep_mask, slot_key
from lora_sweep.pack.linear import Pass
from lora_sweep.pack.loss import OutputLayer
from lora_sweep.records import Cell, Evaluation

MakeTrial = Callable[..., Trial]
IGNORED = "ignore:`is_gradient_checkpointing` is deprecated"


def packed(base: LoadedBase, data: Data, trials: list[Trial], slots: int = 0, rank: int = 0) -> list[Evaluation]:
    """The first evaluation of each trial, all in one pack."""
    slots = slots or len(trials)
    together = [replace(trial, train=replace(trial.train, slots=slots)) for trial in trials]
    pack = Pack(base, data, Settings.of(together[0]), rank or max(trial.method.rank for trial in trials))
    try:
        for trial in together:
            pack.admit(trial)
        return pack.advance()
    finally:
        pack.close()


def losses(evaluation: Evaluation) -> torch.Tensor:
    return torch.tensor([step.train_loss for step in evaluation.steps], dtype=torch.float64)


def largest_difference(mine: torch.Tensor, other: torch.Tensor) -> float:
    """Relative."""
    return float(((mine - other).abs() / other.abs()).max())


def plain_peft_losses(base: LoadedBase, data: Data, trial: Trial) -> torch.Tensor:
    """The oracle: PEFT's LoraConfig on the whole base, torch's AdamW, the groups of create_loraplus_optimizer."""
    arguments = {"dtype": base.dtype, "attn_implementation": base.model.config._attn_implementation}
    model = AutoModelForCausalLM.from_pretrained(base.name_or_path, **arguments)
    return peft_losses(model.eval(), data, trial)


def peft_losses(model: Any, data: Data, trial: Trial) -> torch.Tensor:
    """Training losses of PEFT on this very model, step by step."""
    method, optimizer, train = trial.method, trial.optimizer, trial.train
    torch.manual_seed(train.seed)
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=method.rank,
            lora_alpha=method.alpha,
            use_rslora=method.use_rslora,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    adam = create_loraplus_optimizer(
        adapted,
        torch.optim.AdamW,
        lr=optimizer.base_lr,
        loraplus_lr_ratio=optimizer.ratio,
        loraplus_weight_decay=optimizer.weight_decay,
        eps=optimizer.eps,
        betas=(optimizer.beta1, optimizer.beta2),
    )
    rows = order(len(data.train), train.seed)
    each, b = train.batch_size * train.gradient_accumulation_steps, train.batch_size
    values = []
    for step in range(train.max_steps):
        chosen = rows(step * each, each)
        batch = data.train.batch(chosen)
        loss_mask = batch.loss_mask[:, 1:]
        total = 0.0
        for first in range(0, each, b):
            ids = batch.input_ids[first : first + b]
            logits = adapted(input_ids=ids).logits[:, :-1].flatten(0, 1)
            nll = functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none").view(b, -1)
            loss = (nll * loss_mask[first : first + b]).sum() / loss_mask.sum()
            loss.backward()
            total += loss.item()
        adam.step()
        adam.zero_grad()
        values.append(total)
    return torch.tensor(values, dtype=torch.float64)


@as_found(VECTORS)
@pytest.mark.filterwarnings(IGNORED)
@pytest.mark.parametrize(
    ("use_rslora", "ratio", "accumulation"),
    [
        (False, 1.0, 1),
        (True, 16.0, 4),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in itertools.product([False, True], [1.0, 16.0], [1, 4])
            if each not in ((False, 1.0, 1), (True, 16.0, 4))
        ),
    ],
)
def test_one_slot_gives_the_losses_of_peft_and_torch(
    base: LoadedBase, style: Data, trial: MakeTrial, use_rslora: bool, ratio: float, accumulation: int
) -> None:
    one = trial(
        rank=8,
        alpha=16.0,
        use_rslora=use_rslora,
        ratio=ratio,
        base_lr=1e-4,
        weight_decay=0.01,
        gradient_accumulation_steps=accumulation,
        batch_size=2,
    )
    mine = losses(packed(base, style, [one])[0])
    assert len(mine) == 50
    assert largest_difference(mine, plain_peft_losses(base, style, one)) < 1e-5


def mixed(trial: MakeTrial, **shared: Any) -> list[Trial]:
    """Eight trials that differ in everything that slots may differ in."""
    return [
        trial(0, rank=8, alpha=16.0, base_lr=2e-4, **shared),
        trial(1, rank=4, alpha=8.0, base_lr=5e-4, schedule="linear", **shared),
        trial(2, rank=16, alpha=16.0, use_rslora=True, ratio=4.0, base_lr=1e-4, **shared),
        trial(3, rank=2, alpha=4.0, ratio=16.0, base_lr=1e-4, weight_decay=0.1, **shared),
        trial(4, rank=8, alpha=16.0, seed=1, base_lr=3e-4, warmup_steps=5, **shared),
        trial(5, rank=32, alpha=32.0, use_rslora=True, base_lr=1e-4, max_grad_norm=1.0, **shared),
        trial(6, rank=1, alpha=1.0, base_lr=1e-3, seed=3, schedule="cosine", **shared),
        trial(7, rank=8, alpha=32.0, ratio=2.0, weight_decay=0.01, weight_decay_B=0.5, base_lr=2e-4, **shared),
    ]


@as_found(VECTORS)
def test_each_of_eight_slots_gives_what_it_gives_alone(base: LoadedBase, style: Data, trial: MakeTrial) -> None:
    trials = mixed(trial)
    for one, evaluation in zip(trials, packed(base, style, trials), strict=True):
        alone = losses(packed(base, style, [one])[0])
        assert alone.max() < 1.5 * alone[0], "all of them calm: a hot trial amplifies rounding"
        assert largest_difference(losses(evaluation), alone) < 1e-5


@pytest.mark.parametrize(
    ("checkpointing", "steps"),
    [
        (True, 6),
        pytest.param(True, 25, marks=pytest.mark.slow),
        pytest.param(False, 50, marks=pytest.mark.full),
        pytest.param(True, 50, marks=pytest.mark.full),
    ],
)
def test_in_double_precision_packing_changes_nothing_even_with_dropout_and_checkpointing(
    base64: LoadedBase, style: Data, trial: MakeTrial, checkpointing: bool, steps: int
) -> None:
    shared = {"dropout": 0.1, "gradient_checkpointing": checkpointing, "max_steps": steps, "eval_every": steps}
    trials = mixed(trial, **shared)
    trials[0] = replace(trials[0], method=replace(trials[0].method, dropout=0.0))
    trials[7] = replace(trials[7], optimizer=replace(trials[7].optimizer, base_lr=1e-3))  # hot
    for one, evaluation in zip(trials, packed(base64, style, trials), strict=True):
        alone = packed(base64, style, [one])[0]
        assert largest_difference(losses(evaluation), losses(alone)) < 1e-9
        assert evaluation.eval_loss == pytest.approx(alone.eval_loss, rel=1e-9)


@as_found(VECTORS)
@pytest.mark.parametrize("threads", either(THREADS), indirect=True)
def test_a_slot_that_is_not_a_number_changes_no_bit_of_the_others(
    base: LoadedBase, style: Data, trial: MakeTrial, threads: int
) -> None:
    knobs = {"max_steps": 12, "eval_every": 12, "fixed_shapes": True}
    calm = [trial(i, rank=4 + i, base_lr=2e-4, **knobs) for i in range(3)]
    wild = trial(9, rank=8, base_lr=1e30, **knobs)
    tame = trial(9, rank=2, base_lr=1e-4, seed=5, **knobs)
    with_wild = packed(base, style, [calm[0], wild, *calm[1:]], rank=8)
    with_tame = packed(base, style, [tame, *calm], rank=8)
    assert with_wild[1].diverged
    assert with_wild[1].last_finite_step is not None
    assert with_wild[1].last_finite_step < 12
    for mine, other in zip([with_wild[0], *with_wild[2:]], with_tame[1:], strict=True):
        assert torch.equal(losses(mine), losses(other))
        assert mine.eval_loss == other.eval_loss
        assert (mine.eval_losses == other.eval_losses).all()


def assert_a_neighbours_dropout_changes_no_bit(base: LoadedBase, style: Data, trial: MakeTrial) -> None:
    knobs = {"max_steps": 4, "eval_every": 4, "rank": 4, "batch_size": 2, "base_lr": 3e-3, "fixed_shapes": True}
    one = trial(0, **knobs)
    with_dropout, without = (packed(base, style, [one, trial(1, seed=1, dropout=p, **knobs)])[0] for p in (0.1, 0.0))
    assert torch.equal(losses(with_dropout), losses(without))
    assert with_dropout.eval_loss == without.eval_loss


def test_a_neighbour_with_dropout_changes_no_bit_of_a_slot_without(
    base: LoadedBase, style: Data, trial: MakeTrial
) -> None:
    assert_a_neighbours_dropout_changes_no_bit(base, style, trial)


@pytest.mark.parametrize("bf16", either(BF16_PRODUCTS, BF16_ATTENTION), indirect=True)
def test_a_neighbour_with_dropout_changes_no_bit_on_a_base_in_bf16(style: Data, trial: MakeTrial, bf16: bool) -> None:
    base = model_room.load(config_of("model.dtype=bf16").model, torch.device("cpu"))
    assert_a_neighbours_dropout_changes_no_bit(base, style, trial)


def test_refilling_a_slot_changes_no_bit_of_the_others(base: LoadedBase, style: Data, trial: MakeTrial) -> None:
    keeps = trial(0, rank=4, slots=2, max_steps=8, eval_every=4, fixed_shapes=True)
    leaves, comes = (
        trial(1, rank=8, slots=2, max_steps=8, eval_every=4, fixed_shapes=True),
        trial(2, slots=2, seed=7, max_steps=8, eval_every=4, fixed_shapes=True),
    )

    def run(refill: bool) -> list[Evaluation]:
        pack = Pack(base, style, Settings.of(keeps), 8)
        try:
            mine, other = pack.admit(keeps), pack.admit(leaves)
            first = pack.advance()
            if refill:
                pack.evict(other)
                assert pack.admit(comes) == other
            later = pack.advance()
        finally:
            pack.close()
        assert mine == 0
        return [first[0], later[0], later[1]]

    stayed, refilled = run(False), run(True)
    assert torch.equal(losses(stayed[1]), losses(refilled[1]))
    assert stayed[1].eval_loss == refilled[1].eval_loss
    fresh = packed(base, style, [keeps, comes], rank=8)[1]
    assert torch.equal(losses(refilled[2]), losses(fresh))


def test_with_fixed_shapes_slots_that_are_not_due_together_have_the_losses_they_have_alone(
    base: LoadedBase, style: Data, trial: MakeTrial
) -> None:
    """The third trial comes at step 2 of the first, whose last evaluation is at step 3."""
    knobs = {"max_steps": 3, "eval_every": 2, "slots": 2, "rank": 4, "batch_size": 1, "fixed_shapes": True}
    trials = [trial(i, seed=i, base_lr=1e-3 * (1 + 3 * i), **knobs) for i in range(4)]

    def evaluated(waiting: list[Trial], first: int) -> dict[tuple[int, int], float]:
        """(cell, step) -> loss; cell 1 leaves at step 2."""
        pack, values = Pack(base, style, Settings.of(trials[0]), 4), {}
        try:
            for _ in range(first):
                pack.admit(waiting.pop(0))
            while pack.live:
                values |= {(each.cell, each.step): each.eval_loss for each in pack.advance()}
                for slot, cell in pack.live.items():
                    if pack.step(slot) == 3 or (cell.number, pack.step(slot)) == (1, 2):
                        pack.evict(slot)
                        if waiting:
                            pack.admit(waiting.pop(0))
        finally:
            pack.close()
        return values

    alone = [evaluated([each], 1) for each in trials]
    together = evaluated(list(trials), 2)
    assert together == {key: loss for each in alone for key, loss in each.items()}


def test_a_trial_restored_from_its_checkpoint_goes_on_bit_for_bit(
    base: LoadedBase, style: Data, trial: MakeTrial, tmp_path: Path
) -> None:
    one = trial(
        0,
        rank=4,
        slots=2,
        max_steps=8,
        eval_every=4,
        fixed_shapes=True,
        schedule="cosine",
        warmup_steps=2,
        dropout=0.1,
        ratio=4.0,
    )

    def second_half(interrupted: bool) -> Evaluation:
        pack = Pack(base, style, Settings.of(one), 4)
        try:
            slot = pack.admit(one)
            pack.advance()
            if interrupted:
                pack.checkpoint(slot)(tmp_path)
                pack.evict(slot)
                pack.admit(trial(1, rank=2, slots=2, max_steps=8, eval_every=4, fixed_shapes=True))
                slot = pack.restore(one, tmp_path)
                assert pack.step(slot) == 4
            return next(evaluation for evaluation in pack.advance() if evaluation.cell == 0)
        finally:
            pack.close()

    whole, resumed = second_half(False), second_half(True)
    assert torch.equal(losses(whole), losses(resumed))
    assert whole.eval_loss == resumed.eval_loss
    assert whole.tokens == resumed.tokens
    other = trial(0, rank=4, slots=2, max_steps=8, eval_every=4, fixed_shapes=True, base_lr=1.0)
    pack = Pack(base, style, Settings.of(other), 4)
    with pytest.raises(DamagedCheckpoint, match="other settings"):
        pack.restore(other, tmp_path)
    assert pack.fits(other)
    pack.close()


@pytest.mark.filterwarnings(IGNORED)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_exported_adapter_loads_with_peft_and_gives_the_recorded_loss(
    base: LoadedBase, style: Data, trial: MakeTrial, tmp_path: Path, use_rslora: bool
) -> None:
    one = trial(0, rank=4, use_rslora=use_rslora, ratio=4.0, base_lr=1e-3, max_steps=10, eval_every=10, slots=2)
    pack = Pack(base, style, Settings.of(one), 8)
    slot = pack.admit(one)
    evaluation = pack.advance()[0]
    pack.export(slot)(tmp_path)
    pack.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.name_or_path), str(tmp_path))
    loaded.eval()
    assert mean_loss(loaded, style.evaluation) == pytest.approx(evaluation.eval_loss, rel=1e-4)
    merged = loaded.merge_and_unload()
    assert mean_loss(merged, style.evaluation) == pytest.approx(evaluation.eval_loss, rel=1e-4)


def mean_loss(model: Any, part: TokenSet) -> float:
    batch = part.batch(torch.arange(len(part)))
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids).logits[:, :-1]
    nll = functional.cross_entropy(logits.flatten(0, 1).float(), batch.input_ids[:, 1:].flatten(), reduction="none")
    loss_mask = batch.loss_mask[:, 1:].flatten()
    return float(nll[loss_mask].mean())


def test_the_base_losses_are_those_of_the_untouched_base(base: LoadedBase, style: Data, trial: MakeTrial) -> None:
    one = trial(0, slots=2, eval_batch_size=5)
    before = mean_loss(base.model, style.evaluation)
    pack = Pack(base, style, Settings.of(one), 8)
    pack.admit(one)
    measured = pack.evaluate_base()
    pack.close()
    assert measured.eval_loss == pytest.approx(before, rel=1e-6)
    assert measured.probe_loss == pytest.approx(mean_loss(base.model, style.probe), rel=1e-6)
    assert mean_loss(base.model, style.evaluation) == before
    assert len(measured.eval_losses) == len(style.evaluation)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "v_proj"], r".*layers\.[01]\..*up_proj", ["lm_head", "o_proj"]]
)
def test_chunks_of_the_output_layer_change_no_loss_and_no_gradient(
    base64: LoadedBase, style: Data, trial: MakeTrial, targets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trial(0, target_modules=targets, dropout=0.2, max_steps=4, eval_every=4, base_lr=1e-3)
    whole = packed(base64, style, [one])[0]
    monkeypatch.setattr("lora_sweep.pack.loss.CHUNK_LOGITS", 4 * 1024 * 7)
    chunked = packed(base64, style, [one])[0]
    assert largest_difference(losses(chunked), losses(whole)) < 1e-12
    assert chunked.eval_loss == pytest.approx(whole.eval_loss, rel=1e-12)


def test_positions_that_do_not_count_get_no_logits_and_lose_nothing(base64: LoadedBase) -> None:
    model = base64.model
    output = OutputLayer(model, Pass())
    assert output.selects
    ids = torch.arange(3 * 12).view(3, 12) * 5 % 97
    counts = (torch.arange(3 * 11).view(3, 11) % 4 == 1).double()
    places = functional.pad(counts, (0, 1)).flatten().nonzero().flatten()
    heads: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda _, given, __: heads.append(given[0].shape[:-1].numel()))
    embedded = model.get_input_embeddings().weight.requires_grad_()
    try:
        gradients = []
        for loss_mask in (None, places):
            values = output.backward(ids, counts / 3, loss_mask=loss_mask)
            gradients.append((values * counts, embedded.grad, output.losses(ids, loss_mask=loss_mask) * counts))
            embedded.grad = None
    finally:
        hook.remove()
        embedded.requires_grad_(False)
    assert heads == [33, 33, len(places), len(places)]
    for whole, part in zip(*gradients, strict=True):
        assert torch.allclose(whole, part, rtol=1e-12, atol=1e-14)


class TrainerSettings(TorchDispatchMode):
    """Which operations hand a number to the host: on a GPU it waits there for all that is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"):
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_pass_asks_nothing_of_the_device(base: LoadedBase, is_packed: bool) -> None:
    output = OutputLayer(base.model, Pass())
    ids = torch.randint(0, 1000, (4, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(6).repeat(2).expand(4, 12) if is_packed else None
    with TrainerSettings() as calls:
        losses = output.losses(ids, positions)
    assert calls.found == []
    halves = torch.cat([output.losses(half) for half in ids.split(6, dim=1)], dim=1)
    if is_packed:
        assert largest_difference(losses[:, [*range(5), *range(6, 11)]], halves) < 1e-5
    else:
        assert torch.equal(
            losses,
            functional.cross_entropy(
                base.model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            ).view(4, 11),
        )


@pytest.mark.parametrize("beside", ["alone", "together"])
def test_rows_of_one_example_take_the_path_of_rows_of_several_whoever_stands_beside_them(
    base: LoadedBase, beside: str
) -> None:
    """Else the kernel, and the last bits, would depend on what the other rows hold."""
    output = OutputLayer(base.model, Pass())
    ids = torch.randint(0, 1000, (2, 12), generator=torch.Generator().manual_seed(0))
    one, two = torch.arange(12), torch.arange(6).repeat(2)
    first = output.losses(ids, torch.stack([one, two]))[0]
    assert torch.equal(first, output.losses(ids, torch.stack([one, one if beside == "alone" else two]))[0])


def tiny_stranger(kind: str) -> Any:
    from transformers import Gemma2Config, GPT2Config

    small = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if kind == "gpt2":  # Conv1D instead of Linear, dropout of its own
        return GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **small)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "gemma2":  # caps its logits, so the output layer alone does not give them
        return Gemma2Config(num_key_value_heads=1, head_dim=16, final_logit_softcapping=2.0, **shape, **small)
    return LlamaConfig(**shape, **small)


@pytest.mark.filterwarnings(IGNORED, "ignore:fan_in_fan_out is set")
@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "llama"])
def test_other_architectures_train_like_peft_alone(kind: str, trial: MakeTrial, tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_stranger(kind)).save_pretrained(tmp_path)
    config = ModelConfig("local", str(tmp_path), None, "fp32", None, "sdpa", False)
    at = source.source(config)
    attention = "eager" if kind == "gemma2" else "sdpa"
    loaded = AutoModelForCausalLM.from_pretrained(at.name_or_path, dtype=torch.float32, attn_implementation=attention)
    loaded.requires_grad_(False).eval()
    stranger = LoadedBase(loaded, None, at.name_or_path, None, torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (12, 16), generator=generator)
    loss_mask = torch.ones_like(ids, dtype=torch.bool)
    loss_mask[:, :3] = False
    part = TokenSet.of(list(zip(ids.tolist(), loss_mask.tolist(), strict=True)))
    data = Data(part, part, part)
    one = trial(0, rank=4, base_lr=1e-3, max_steps=10, eval_every=10, batch_size=2, ratio=4.0)
    with_others = packed(
        stranger, data, [one, trial(1, rank=8, base_lr=1e-3, max_steps=10, eval_every=10, batch_size=2)]
    )
    assert largest_difference(losses(with_others[0]), plain_peft_losses(stranger, data, one)) < 1e-5


def test_dropout_masks_are_fair_and_know_neither_padding_nor_neighbours() -> None:
    key = slot_key(seed=3, step=7, micro_batch=0, module="q_proj")
    keys = torch.tensor([key, slot_key(3, 8, 0, "q_proj"), slot_key(4, 7, 0, "q_proj")], dtype=torch.int32)
    p = torch.tensor([0.1, 0.5, 0.0])
    mask = keep_mask(keys, p, (3, 4, 64, 256))
    assert mask[0].float().mean() == pytest.approx(0.9, abs=0.005)
    assert mask[1].float().mean() == pytest.approx(0.5, abs=0.005)
    assert mask[2].all()
    assert torch.equal(keep_mask(keys[:1], p[:1], (1, 4, 32, 256)), mask[:1, :, :32])
    assert torch.equal(keep_mask(keys[:1], p[:1], (1, 4, 32, 256), first_position=32), mask[:1, :, 32:])
    half = keep_mask(keys[[1, 0]], torch.tensor([0.5, 0.5]), (2, 4, 64, 256)).double()
    centred = half - half.mean()
    for shifted in (centred.roll(1, 1), centred.roll(1, 2), centred.roll(1, 3), centred.flip(0)):
        assert abs(float((centred * shifted).mean()) / 0.25) < 0.01


def test_a_trial_of_another_shape_does_not_fit(base: LoadedBase, style: Data, trial: MakeTrial) -> None:
    pack = Pack(base, style, Settings.of(trial(slots=1)), 8)
    assert pack.fits(trial(rank=8, slots=1))
    assert not pack.fits(trial(rank=16, slots=1))
    assert not pack.fits(trial(batch_size=2, slots=1))
    assert not pack.fits(trial(target_modules=["q_proj"], slots=1))
    pack.admit(trial(slots=1))
    assert not pack.fits(trial(rank=8, slots=1))
    with pytest.raises(ValueError, match="does not fit"):
        pack.admit(trial(slots=1))
    pack.close()


def test_stopping_ends_the_advance_without_an_evaluation(base: LoadedBase, style: Data, trial: MakeTrial) -> None:
    pack = Pack(base, style, Settings.of(trial(slots=1)), 8)
    pack.admit(trial(slots=1))
    calls = iter([False, False, True])
    assert pack.advance(lambda: next(calls)) == []
    assert pack.step(0) == 2
    pack.close()


def short_examples(count: int, seed: int) -> TokenSet:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(count):
        length = int(torch.randint(4, 24, (), generator=generator))
        prompt = int(torch.randint(1, length, (), generator=generator))
        ids = torch.randint(3, 1000, (length,), generator=generator).tolist()
        examples.append((ids, [place >= prompt for place in range(length)]))
    return TokenSet.of(examples)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_examples_have_the_losses_they_have_alone(
    base: LoadedBase, trial: MakeTrial, checkpointing: bool
) -> None:
    """After training on packed rows, each example is measured in its row and alone."""
    train, evaluation = short_examples(60, 0), short_examples(37, 1)
    data = Data(train.packed(64), evaluation.packed(64), train.packed(64))
    knobs = {"max_steps": 6, "eval_every": 6, "batch_size": 2, "eval_batch_size": 4, "slots": 2}
    one = trial(0, rank=4, base_lr=3e-3, ratio=4.0, gradient_checkpointing=checkpointing, **knobs)
    pack = Pack(base, data, Settings.of(one), 8)
    pack.admit(one)
    pack.admit(replace(one, cell=Cell(1), method=replace(one.method, rank=8)))
    measured = pack.advance()
    pack._passes.data = Data(data.train, evaluation.take(data.evaluation.members), data.probe)
    alone = pack._passes.losses(pack._passes.order(pack._live()))[0]
    pack.close()
    assert len(data.evaluation) < len(evaluation)
    for slot, mine in enumerate(measured):
        assert mine.eval_losses.tolist() == pytest.approx(alone[1][slot].tolist(), rel=1e-5)
        assert mine.eval_loss == pytest.approx(alone[0][slot], rel=1e-5)


def test_a_step_on_packed_examples_is_a_step_on_the_same_examples_alone(base64: LoadedBase, trial: MakeTrial) -> None:
    """All examples in one step: packed rows and single rows hold the same tokens, so the gradients are the same."""
    train = short_examples(24, 2)
    rows = train.packed(48)
    steps = {}
    for data, batch in ((Data(rows, rows, rows), len(rows)), (Data(train, train, train), len(train))):
        one = trial(0, rank=4, base_lr=1e-2, max_steps=5, eval_every=5, batch_size=batch, eval_batch_size=8, slots=1)
        steps[batch] = losses(packed(base64, data, [one])[0])
    first, second = steps.values()
    assert largest_difference(first, second) < 1e-9


@pytest.mark.filterwarnings(IGNORED)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_whether_a_base_keeps_packed_examples_apart_is_measured(attention: str, trial: MakeTrial) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=300, **shape, attn_implementation=attention)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    assert OutputLayer(model, Pass()).separates()
    leaky = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    body = leaky.model.forward
    leaky.model.forward = lambda *args, position_ids=None, **kwargs: body(*args, **kwargs)
    assert not OutputLayer(leaky, Pass()).separates()
    stranger = LoadedBase(leaky, None, "leaky", None, torch.float32)
    train = short_examples(4, 3).packed(48)
    with pytest.raises(UserError, match=r"data\.pack_examples: in this base examples of one row see one another"):
        Pack(stranger, Data(train, train, train), Settings.of(trial()), 8)


def limited(pack: Pack, most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device whose memory holds so many slots a pass; returns the widths asked of it."""
    real, calls = pack._passes.train, []

    def train(slots: Any) -> Any:
        calls.append(len(slots))
        values = real(slots)
        if len(slots) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return values

    monkeypatch.setattr(pack._passes, "train", train)
    return calls


def test_the_time_of_an_evaluation_is_had_as_an_evaluation_is_made_and_changes_nothing(
    base: LoadedBase, style: Data, trial: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = {"base_lr": 3e-4, "max_steps": 4, "eval_every": 4, "slots": 3}
    trials = [trial(i, rank=2 + i, **knobs) for i in range(3)]
    pack = Pack(base, style, Settings.of(trials[0]), 8)
    for each in trials:
        pack.admit(each)
    real, calls = pack._passes._add_rows, []

    def within(sums: torch.Tensor, part: TokenSet, rows: torch.Tensor) -> None:
        calls.append((len(sums), len(rows)))
        if len(sums) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        real(sums, part, rows)

    monkeypatch.setattr(pack._passes, "_add_rows", within)
    pack.capacity.fitted(3)
    assert 0 < pack.seconds_a_row() < 1
    assert max(rows for _, rows in calls) == pack.settings.eval_batch_size
    monkeypatch.undo()
    measured = pack.advance()
    pack.close()
    for one, evaluation in zip(trials, measured, strict=True):
        assert largest_difference(losses(evaluation), losses(packed(base, style, [one])[0])) < 1e-5


def test_out_of_memory_shrinks_the_pass_and_costs_no_step(
    base: LoadedBase, style: Data, trial: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = [trial(i, rank=2 + i, base_lr=3e-4, max_steps=4, eval_every=4, slots=5) for i in range(5)]
    pack = Pack(base, style, Settings.of(trials[0]), 8)
    calls = limited(pack, 2, monkeypatch)
    for each in trials:
        pack.admit(each)
    measured = pack.advance()
    pack.close()
    assert max(calls[-3:]) <= 2, "it is not tried again"
    assert calls.count(5) == 1
    assert (pack.capacity.too_many, pack.capacity.fits) == (3, 2)
    for one, evaluation in zip(trials, measured, strict=True):
        assert evaluation.step == 4
        assert largest_difference(losses(evaluation), losses(packed(base, style, [one])[0])) < 1e-5


def test_while_widths_are_tried_one_that_does_not_fit_costs_one_step(
    base: LoadedBase, style: Data, trial: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = {"max_steps": 99, "eval_every": 99, "slots": None, "batch_size": 1, "target_modules": ["o_proj"]}
    trials = [trial(i, rank=2, seed=i, **knobs) for i in range(4)]
    pack = Pack(base, style, Settings.of(trials[0]), 2)
    calls = limited(pack, 2, monkeypatch)
    for each in trials:
        pack.admit(each)
    capacity = pack.measure()
    pack.close()
    assert [width for width in calls if width > 2] == [4]
    assert set(capacity.measured) == {1, 2}
    assert (capacity.too_many, capacity.fits) == (4, 2)


def test_a_trial_that_does_not_fit_by_itself_is_named(
    base: LoadedBase, style: Data, trial: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = Pack(base, style, Settings.of(trial(slots=2)), 8)
    limited(pack, 0, monkeypatch)
    pack.admit(trial(0, rank=4, slots=2))
    second = pack.admit(trial(1, rank=2, slots=2))
    with pytest.raises(PackOutOfMemory) as caught:
        pack.advance()
    assert caught.value.slot == second, "rank 2 lies before rank 4"
    pack.close()


def test_a_trial_whose_evaluation_does_not_fit_takes_no_evaluation_from_the_others(
    base: LoadedBase, style: Data, trial: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one slot a pass, the other is evaluated before it fails."""
    knobs = {"max_steps": 2, "eval_every": 2, "slots": 2, "batch_size": 1, "base_lr": 1e-3}
    small, large = trial(0, rank=2, **knobs), trial(1, rank=8, **knobs)
    pack = Pack(base, style, Settings.of(small), 8)
    real, calls = pack._passes.evaluated, []

    def evaluated(slots: Any) -> Any:
        calls.append([slot.trial.cell.number for slot in slots])
        if large.cell.number in calls[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(slots)

    monkeypatch.setattr(pack._passes, "evaluated", evaluated)
    pack.capacity.slots_per_pass = 1
    pack.admit(small)
    slot = pack.admit(large)
    with pytest.raises(PackOutOfMemory) as caught:
        pack.advance()
    assert caught.value.slot == slot
    assert calls == [[0], [1]]
    pack.evict(slot)
    (evaluation,) = pack.advance()
    pack.close()
    assert (evaluation.cell, evaluation.step, [step.step for step in evaluation.steps]) == (0, 2, [1, 2])
    assert evaluation.tokens_per_second > 0


def test_slots_are_chosen_in_the_first_steps_and_no_loss_shows_it(
    base: LoadedBase, style: Data, trial: MakeTrial
) -> None:
    steps = 3 * MOST_ROUNDS + 1  # the three widths are measured so often if they are all close
    trials = [trial(i, rank=4 << i, base_lr=3e-4, max_steps=steps, eval_every=steps, slots=None) for i in range(3)]
    pack = Pack(base, style, Settings.of(trials[0]), 16)
    assert pack.capacity.slots > 3
    for each in trials:
        pack.admit(each)
    measured = pack.advance()
    pack.close()
    assert pack.capacity.is_chosen
    assert set(pack.capacity.measured) == {1, 2, 3}
    assert pack.capacity.slots_per_pass in (1, 2, 3)
    for one, evaluation in zip(trials, measured, strict=True):
        assert largest_difference(losses(evaluation), losses(packed(base, style, [one])[0])) < 1e-5


def test_ranks_of_4_to_256_waste_no_multiplication(base: LoadedBase, style: Data, trial: MakeTrial) -> None:
    """Each slot's rows meet its own rank only; co-tenants of one rank share a multiplication."""
    ranks = [4, 256, 16, 4, 64, 7]
    trials = [trial(i, rank=rank, max_steps=2, eval_every=2, slots=6) for i, rank in enumerate(ranks)]
    pack = Pack(base, style, Settings.of(trials[0]), 256)
    for each in trials:
        pack.admit(each)
    shapes: list[tuple[int, int]] = []
    enter = pack._passes._enter

    def watched(slots: Any) -> None:
        enter(slots)
        shapes.extend(
            (s.places.stop - s.places.start, next(iter(s.A.values())).shape[1]) for s in pack._passes.now.segments
        )

    pack._passes._enter = watched  # type: ignore[method-assign]
    pack._train_step()
    pack.close()
    assert shapes == [(2, 4), (1, 7), (1, 16), (1, 64), (1, 256)]
    assert sum(count * rank for count, rank in shapes) == sum(ranks), "padded flop above the needed: none"


def test_a_slot_refilled_with_its_rank_is_refilled_in_place(base: LoadedBase, style: Data, trial: MakeTrial) -> None:
    knobs = {"max_steps": 8, "eval_every": 2, "slots": 2}
    pack = Pack(base, style, Settings.of(trial(**knobs)), 16)
    pack.admit(trial(0, rank=4, **knobs))
    leaves = pack.admit(trial(1, rank=4, **knobs))
    pack.advance()
    (bank,) = pack._banks
    where, linears = bank.values.data_ptr(), dict(pack._wrapped.linears)
    pack.evict(leaves)
    assert pack.admit(trial(2, rank=4, seed=9, **knobs)) == leaves
    pack.advance()
    assert [each.values.data_ptr() for each in pack._banks] == [where]
    assert pack._wrapped.linears == linears
    pack.evict(leaves)
    pack.admit(trial(3, rank=16, **knobs))
    pack.advance()
    assert [(each.layout.rank, len(each.taken)) for each in pack._banks] == [(4, 1), (16, 1)]
    pack.close()


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_nothing_is_kept_of_trials_that_have_left(
    base: LoadedBase, style: Data, trial: MakeTrial, fixed_shapes: bool
) -> None:
    knobs = {"max_steps": 1, "eval_every": 1, "slots": 2, "rank": 2, "batch_size": 1, "fixed_shapes": fixed_shapes}
    knobs |= {"target_modules": ["o_proj"], "eval_batch_size": 16}
    pack = Pack(base, style, Settings.of(trial(**knobs)), 2)
    for number in range(4):
        slot = pack.admit(trial(number, seed=number, **knobs))
        pack.advance()
        pack.evict(slot)
    assert list(pack._passes._orders) == [3]
    pack.close()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks everywhere
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiling_the_base_changes_no_loss(
    base64: LoadedBase, style: Data, trial: MakeTrial, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every other feature on; traced by torch.compile and run as traced, without the minutes of its C++."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    knobs = {"max_steps": 4, "eval_every": 2, "slots": 3, "batch_size": 2, "gradient_accumulation_steps": 2}
    knobs |= {"gradient_checkpointing": checkpointing, "max_grad_norm": 0.5, "schedule": "cosine"}

    def run(compiles: bool) -> list[Evaluation]:
        trials = [trial(i, rank=4 << i, dropout=0.1 * i, ratio=4.0, seed=i, compile=compiles, **knobs) for i in (0, 1)]
        comes = trial(2, rank=8, seed=7, compile=compiles, **knobs)
        pack = Pack(base64, style, Settings.of(comes), 8)
        try:
            slots = [pack.admit(each) for each in trials]
            evaluations = pack.advance()
            pack.evict(slots[0])
            pack.admit(comes)
            evaluations += pack.advance()
        finally:
            pack.close()
        return evaluations

    for mine, other in zip(run(True), run(False), strict=True):
        assert largest_difference(losses(mine), losses(other)) < 1e-12
        assert mine.eval_loss == pytest.approx(other.eval_loss, rel=1e-12)
    assert all("forward" not in layer.__dict__ for layer in base64.model.model.layers)
