"""Each optimizer in a slot against the same optimizer on PEFT's own adapter."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from conftest import config_of
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

from lora_sweep import pack as pack_room
from lora_sweep.base.load import LoadedBase
from lora_sweep.data import Data, order
from lora_sweep.pack import Pack, Settings, Trial, low_bits

MakeTrial = Callable[..., Trial]
IGNORED = "ignore:`is_gradient_checkpointing` is deprecated"
RATIO = 4.0
STEPS = 6

THEIRS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups),
    "adamw_8bit": lambda groups: bitsandbytes.optim.AdamW8bit(groups),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
}
KNOBS: dict[str, dict[str, float]] = {
    "adamw": {"base_lr": 1e-3},
    "adamw_8bit": {"base_lr": 1e-3},
    "sgd": {"base_lr": 0.3, "momentum": 0.9},
}


def theirs(base: LoadedBase, data: Data, trial: Trial) -> torch.Tensor:
    """Training losses of PEFT with the optimizer over two groups."""
    model = AutoModelForCausalLM.from_pretrained(base.name_or_path, dtype=base.dtype).eval()
    torch.manual_seed(trial.train.seed)
    settings = LoraConfig(r=trial.method.rank, lora_alpha=trial.method.alpha, target_modules="all-linear")
    adapted = get_peft_model(model, settings)
    named = [(name, parameter) for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    sides: list[dict[str, Any]] = [
        {"params": [parameter for name, parameter in named if side in name], "lr": lr, "weight_decay": 0.01}
        for side, lr in (("lora_A", trial.lr_A), ("lora_B", trial.lr_B))
    ]
    optimizer = THEIRS[trial.optimizer.optim](sides)
    rows, losses = order(len(data.train), trial.train.seed), []
    for step in range(trial.train.max_steps):
        batch = data.train.batch(rows(step * trial.train.batch_size, trial.train.batch_size))
        logits = adapted(input_ids=batch.input_ids).logits[:, :-1].flatten(0, 1)
        nll = functional.cross_entropy(logits, batch.input_ids[:, 1:].flatten(), reduction="none")
        loss = nll[batch.loss_mask[:, 1:].flatten()].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def trial_with(trial: MakeTrial, optim: str, number: int = 0, **knobs: Any) -> Trial:
    shared = {"ratio": RATIO, "weight_decay": 0.01, "max_steps": STEPS, "eval_every": STEPS // 2, "slots": 3}
    # 8-bit states begin at 4,096 numbers a tensor: rank 32 of width 128.
    return trial(number, optim=optim, **({"rank": 32, "alpha": 32.0} | shared | KNOBS[optim] | knobs))


def trained(pack: Pack, cell: int) -> list[float]:
    return [step.train_loss for each in pack.advance() if each.cell == cell for step in each.steps]


@pytest.mark.filterwarnings(IGNORED)
@pytest.mark.parametrize("optim", THEIRS)
def test_a_slot_steps_like_peft_alone_whoever_shares_the_pack(
    base: LoadedBase, style: Data, trial: MakeTrial, optim: str
) -> None:
    one = trial_with(trial, optim)
    others = [trial_with(trial, optim, 1, rank=8, ratio=1.0), trial_with(trial, optim, 2, rank=16, seed=3)]
    pack = Pack(base, style, Settings.of(one), 32)
    for each in (others[0], one, others[1]):
        pack.admit(each)
    mine = trained(pack, 0) + trained(pack, 0)
    pack.close()
    # A rounding apart, an 8-bit state falls on its other neighbour now and then.
    assert mine == pytest.approx(theirs(base, style, one).tolist(), rel=1e-4 if optim == "adamw_8bit" else 1e-5)


@pytest.mark.parametrize("optim", THEIRS)
def test_the_first_step_moves_b_by_its_own_rate_and_a_not_at_all(
    base: LoadedBase, style: Data, trial: MakeTrial, optim: str
) -> None:
    """B starts at 0, so A has no gradient; Adam's first step is the sign times the rate of B."""
    one = trial_with(trial, optim, max_steps=1, eval_every=1, weight_decay=0.0)
    pack = Pack(base, style, Settings.of(one), 32)
    slot = pack._at(pack.admit(one))
    drawn = {name: view.clone() for name, view in slot.A.items()}
    pack.advance()
    moved = torch.cat([view.abs().flatten() for view in slot.B.values()])
    assert all(torch.equal(view, drawn[name]) for name, view in slot.A.items())
    if optim == "sgd":
        gradients = torch.cat([p.grad.flatten() for p in slot.group("B") if p.grad is not None])
        assert torch.allclose(moved, one.lr_B * gradients.abs(), rtol=1e-5)
    else:
        assert float(moved.median()) == pytest.approx(RATIO * one.optimizer.base_lr, rel=1e-3)
    pack.close()


@pytest.mark.parametrize("optim", THEIRS)
def test_a_checkpoint_keeps_the_optimizers_state(
    base: LoadedBase, style: Data, trial: MakeTrial, optim: str, tmp_path: Path
) -> None:
    one = trial_with(trial, optim, fixed_shapes=True)
    whole = Pack(base, style, Settings.of(one), 32)
    slot = whole.admit(one)
    whole.advance()
    whole.checkpoint(slot)(tmp_path)
    expected = trained(whole, 0)
    whole.close()
    resumed = Pack(base, style, Settings.of(one), 32)
    resumed.restore(one, tmp_path)
    assert trained(resumed, 0) == expected
    resumed.close()


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("AdamW8bit", "cpu"),
        *(
            pytest.param(name, "cuda", marks=pytest.mark.gpu)
            for name in ("AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit")
        ),
    ],
)
def test_a_step_is_bit_for_bit_that_of_bitsandbytes(name: str, device: str) -> None:
    """The last tensor is large enough to be paged."""
    torch.manual_seed(0)
    drawn = [torch.randn(*shape, device=device) for shape in ((64, 128), (8, 16), (800, 128))]
    gradients = [[torch.randn_like(each) for each in drawn] for _ in range(4)]
    ends = []
    for optimizer_class in (getattr(low_bits, name), getattr(bitsandbytes.optim, name)):
        parameters = [torch.nn.Parameter(each.clone()) for each in drawn]
        groups = [{"params": parameters[:2], "lr": 1e-2, "weight_decay": 0.1}, {"params": parameters[2:], "eps": 1e-4}]
        optimizer = optimizer_class(groups, lr=1e-3)
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        ends.append(parameters)
    assert all(torch.equal(mine, other) for mine, other in zip(*ends, strict=True))
    assert not any(torch.equal(mine, begun) for mine, begun in zip(ends[0], drawn, strict=True))


def test_optimizers_are_of_the_packs_kind(base: LoadedBase, style: Data, trial: MakeTrial) -> None:
    one = trial_with(trial, "adamw")
    pack = Pack(base, style, Settings.of(one), 32)
    assert pack.fits(one)
    assert not pack.fits(trial_with(trial, "sgd"))
    pack.close()


def test_paging_without_a_gpu_and_a_missing_package_are_told_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paged = replace(config_of().optimizer, optim="paged_adamw_8bit")
    (fault,) = pack_room.check(paged, torch.device("cpu"))
    assert fault.field == "optimizer.optim"
    assert fault.remedy == "optimizer.optim=adamw_8bit"
    assert pack_room.check(paged, torch.device("cuda")) == []
    assert pack_room.check(config_of().optimizer, torch.device("cpu")) == []
    monkeypatch.setattr("lora_sweep.base.quant.is_installed", lambda: False)
    (fault,) = pack_room.check(paged, torch.device("cuda"))
    assert fault.remedy == 'pip install "lora-sweep[quant]"'
