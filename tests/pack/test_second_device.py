"""A pack on a device that is not the host's: its tensors lie together, whatever it is asked to do."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from second_device import CUDA, Mixed, SecondDevice, second_device

from lora_sweep.base.load import LoadedBase
from lora_sweep.data import Data
from lora_sweep.pack import Pack, Settings, Trial, low_bits, optimizers
from lora_sweep.records import Evaluation

MakeTrial = Callable[..., Trial]
SHARED = {"max_steps": 6, "eval_every": 2, "slots": 2, "batch_size": 1, "base_lr": 1e-3, "target_modules": ["o_proj"]}


@pytest.fixture
def device() -> Iterator[SecondDevice]:
    with second_device() as evaluations:
        yield evaluations


@pytest.fixture(scope="module")
def few(style: Data) -> Data:
    return replace(style, evaluation=style.evaluation.take(np.arange(4)), probe=style.probe.take(np.arange(2)))


def there(base: LoadedBase) -> LoadedBase:
    """A copy of the base on the second device."""
    return replace(base, model=copy.deepcopy(base.model).to(CUDA))


def test_what_torch_does_not_mix_is_not_mixed_here(device: SecondDevice) -> None:
    host, far = torch.ones(3), torch.ones(3, device="cuda")
    assert (host.device.type, far.device, far.is_cuda) == ("cpu", CUDA, True)
    assert (far[:2] * 2).device == far.sum().to(torch.float64).device == torch.zeros_like(far).device == CUDA
    assert far.cpu().device == far.to("cpu").device == host.device
    assert host.to(far).device == host.cuda().device == CUDA
    for mix in (
        lambda: far + host,
        lambda: torch.stack([host, far]),
        lambda: torch.stack([host.sum(), far.sum()]),
        lambda: host[far.long()],
        lambda: torch._foreach_add_([far.sum()], [host.sum()]),
        lambda: far.numpy(),
    ):
        with pytest.raises(Mixed):
            mix()
    far[torch.tensor([0])] = host.sum()
    far.copy_(host)
    assert (far + host.sum()).tolist() == [4.0] * 3


def trained(base: LoadedBase, data: Data, trials: list[Trial], folder: Path) -> tuple[list[Evaluation], set[Any]]:
    """Three evaluations, before the last the second slot is restored; and where its optimizer's state lies."""
    pack, evaluations = Pack(base, data, Settings.of(trials[0]), max(each.method.rank for each in trials)), []
    try:
        pack.evaluate_base()
        for each in trials:
            pack.admit(each)
        evaluations += pack.advance()
        evaluations += pack.advance()
        pack.checkpoint(1)(folder)
        pack.export(0)(folder / "exported")
        pack.evict(1)
        assert pack.restore(trials[1], folder) == 1
        state = [value for _, _, value in pack._at(1)._state() if isinstance(value, torch.Tensor)]
        places = {"paged" if optimizers.is_paged(value) else value.device for value in state}
        evaluations += pack.advance()
    finally:
        pack.close()
    return evaluations, places


@pytest.mark.parametrize(
    "knobs",
    [
        {"optim": "adamw", "dropout": 0.1, "max_grad_norm": 0.5},
        {"optim": "adamw", "fixed_shapes": True},
        {"optim": "sgd", "momentum": 0.9, "base_lr": 0.3},
    ],
    ids=["adamw", "adamw-fixed", "sgd"],
)
def test_a_pack_is_evaluated_kept_and_restored_on_its_device(
    base: LoadedBase, few: Data, trial: MakeTrial, knobs: dict[str, Any], tmp_path: Path
) -> None:
    trials = [trial(i, rank=4 << i, seed=i, **(SHARED | knobs)) for i in range(2)]
    with second_device():
        mine, places = trained(there(base), few, trials, tmp_path / "there")
    assert places == {CUDA}
    here, _ = trained(base, few, trials, tmp_path / "here")
    assert [(each.cell, each.step, each.eval_loss) for each in mine] == [
        (each.cell, each.step, each.eval_loss) for each in here
    ]


@pytest.mark.parametrize(
    ("optim", "like", "tolerance"),
    [("paged_adamw", "adamw", 1e-5), ("paged_adamw_8bit", "adamw_8bit", 0.0)],
)
def test_paged_moments_stay_paged_and_their_memory_is_used_again(
    base: LoadedBase,
    few: Data,
    trial: MakeTrial,
    optim: str,
    like: str,
    tolerance: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tensors are paged from 100,000 numbers on: rank 800 of width 128."""
    monkeypatch.setattr(low_bits, "_free", {})
    paged, plain = (
        [trial(i, rank=800, seed=i, **(SHARED | {"optim": each})) for i in range(2)] for each in (optim, like)
    )
    with second_device() as device:
        mine, places = trained(there(base), few, paged, tmp_path / "there")
    assert "paged" in places
    modules = len(mine[0].snapshot.modules)
    assert len(device.paged) == 2 * modules * 2 * 2, "two moments of A and B of each module, in two slots"
    here, _ = trained(base, few, plain, tmp_path / "here")
    for one, other in zip(mine, here, strict=True):
        assert (one.cell, one.step) == (other.cell, other.step)
        assert one.eval_loss == pytest.approx(other.eval_loss, rel=tolerance, abs=0)


@pytest.mark.parametrize(("optim", "waits"), [("adamw", 0), ("sgd", 0), ("adamw_8bit", 0), ("paged_adamw_8bit", 2)])
def test_a_step_waits_for_the_device_at_most_once_a_slot_and_only_for_paging(
    base: LoadedBase, few: Data, trial: MakeTrial, optim: str, waits: int
) -> None:
    trials = [trial(i, rank=32, **(SHARED | {"optim": optim})) for i in range(2)]
    with second_device() as device:
        pack = Pack(there(base), few, Settings.of(trials[0]), 32)
        for each in trials:
            pack.admit(each)
        pack._train_step()
        before = device.waits
        pack._train_step()
        assert device.waits - before == waits
        pack.close()
