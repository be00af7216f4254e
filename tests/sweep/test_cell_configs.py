"""Configurations put together from parts against those composed whole."""

import random
import time

import pytest

from lora_sweep.errors import ConfigError
from lora_sweep.sweep import compose, sweep_file
from lora_sweep.sweep.check import check

AXES = (
    "method.rank=choice(2,4,8)",
    "method.alpha=choice(8,16.5)",
    "method.use_rslora=choice(true,false)",
    "method.dropout=choice(0,0.1)",
    "method.target_modules=choice(all-linear,[q_proj,v_proj],'.*mlp.*')",
    "optimizer.ratio=choice(1,16)",
    "optimizer.weight_decay_B=choice(0.0,0.1)",
    "optimizer.base_lr=choice(1e-3,1e-2)",
    "train.max_grad_norm=choice(0.5,1)",
    "train.warmup_steps=choice(0,3)",
    "data=choice(facts,style)",
    "data.subjects=choice(8,16)",
)
DERIVED = (
    'method.alpha="${times:2,${method.rank}}"',
    'method.alpha="${.rank}"',
    'method.alpha=choice("${times:2,${.rank}}","${power:${..optimizer.ratio},2}",8)',
    'optimizer.ratio="${divide:${method.alpha},${method.rank}}"',
    'optimizer.weight_decay_B="${.weight_decay}"',
    'optimizer.weight_decay="${divide:1,${times:${method.rank},100}}"',
    'train.eval_every="${train.max_steps}"',
    'train.max_steps="${times:${method.rank},5}"',
    'train.seed="${data.seed}"',
    "data.seed=choice(1,2)",
    'method.target_modules=[q_proj,"${model.name}"]',
    'optimizer.ratio="${data.nothing}"',
)


@pytest.mark.parametrize("seed", range(60))
def test_a_cell_has_the_configuration_that_composing_it_whole_gives(seed: int) -> None:
    drawn = random.Random(seed)
    chosen = {line.partition("=")[0]: line for line in drawn.sample(AXES, 4)}
    chosen |= {line.partition("=")[0]: line for line in drawn.sample(DERIVED, drawn.randrange(5))}
    lines = [
        line.replace("'choice(", "choice(").removesuffix("'") if "choice" in line else line for line in chosen.values()
    ]
    sweep, faults = sweep_file.read("sweeps/quickstart.yaml", lines)
    assert faults == []
    cells = sweep.cells()
    for cell in drawn.sample(cells, min(len(cells), 12)):
        try:
            expected = compose.build(sweep.merged(cell.params))
        except ConfigError as error:
            with pytest.raises(ConfigError) as raised:
                sweep.config(cell)
            assert str(raised.value) == str(error)
        else:
            assert sweep.config(cell) == expected


def test_a_grid_of_ten_thousand_cells_is_checked_in_five_seconds() -> None:
    ten = ",".join(map(str, range(1, 11)))
    lines = [f"{key}=choice({ten})" for key in ("method.rank", "method.alpha", "optimizer.ratio", "train.seed")]
    lines += ["optimizer.base_lr=1e-3", "method.use_rslora=false", "optimizer.eps_rule=scaled"]
    sweep, faults = sweep_file.read("sweeps/quickstart.yaml", lines)
    assert len(sweep.cells()) == 10_000
    began = time.process_time()
    assert [*faults, *check(sweep)[1]] == []
    assert time.process_time() - began < 5
    built = len(sweep.classes("exact"))
    assert built < 10_000
    assert time.process_time() - began < 5, "classes too"
