"""The main job on real input: sweeps/smollm2_facts.yaml by the program, its winner in the hands of PEFT alone."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from processor import BF16_PRODUCTS, as_found
from test_pack import IGNORED
from test_worker import environment
from torch.nn import functional

from lora_sweep.data import TokenSet
from lora_sweep.data import load as load_data
from lora_sweep.data.tasks import real_facts
from lora_sweep.records import Example
from lora_sweep.sweep import sweep_file

pytestmark = [pytest.mark.real, pytest.mark.timeout(2700), pytest.mark.filterwarnings(IGNORED)]

SWEEP = str(Path(__file__).parents[2] / "sweeps/smollm2_facts.yaml")


def lora_sweep(*arguments: str) -> str:
    command = [sys.executable, "-m", "lora_sweep", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    print(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


LOSS_TOLERANCE_NATS = 0.01
"""bf16: PEFT alone multiplies in another order, and on some processors without fp32 sums."""


def token_losses(model: Any, part: TokenSet) -> tuple[torch.Tensor, torch.Tensor]:
    """(nats of the counted tokens, whether each ends its example), by the model's own logits."""
    batch = part.batch(torch.arange(len(part)))
    with torch.no_grad():
        # With a cache, transformers would not tell the examples of a row apart.
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[:, :-1]
    labels = batch.input_ids[:, 1:]
    nll = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view(labels.shape)
    loss_mask = batch.loss_mask[:, 1:]
    return nll[loss_mask], (labels == model.config.eos_token_id)[loss_mask]


def accuracy(model: Any, tokenizer: Any, examples: Sequence[Example]) -> float:
    """Share of prompts that the model, decoding greedily, goes on with the right answer; capitals do not matter."""
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    prompts = tokenizer([example.prompt for example in examples], return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model.generate(**prompts, do_sample=False, max_new_tokens=8, pad_token_id=tokenizer.pad_token_id)
    said = tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [
        re.match(rf"\s*{re.escape(example.completion.strip())}(?!\w)", text, re.IGNORECASE) is not None
        for example, text in zip(examples, said, strict=True)
    ]
    return sum(right) / len(right)


@as_found(BF16_PRODUCTS)
@pytest.mark.parametrize(
    ("overrides", "cells"),
    [
        pytest.param(["method.rank=8"], 3, id="one-rank"),
        pytest.param([], 6, id="as-shipped", marks=pytest.mark.full),
    ],
)
def test_the_shipped_sweep_teaches_smollm2_facts_that_peft_alone_completes(
    in_folder: Path, overrides: list[str], cells: int
) -> None:
    began = time.monotonic()
    lora_sweep("launch", SWEEP, *overrides)
    seconds = time.monotonic() - began
    study = in_folder / "outputs/smollm2_facts"
    table = [json.loads(line) for line in (study / "trials.jsonl").read_text().splitlines()]
    assert len(table) == cells
    assert {row["state"] for row in table} == {"COMPLETE"}
    assert seconds < 25 * 60
    best = min(table, key=lambda row: row["eval_loss"])
    assert best["eval_loss"] <= 0.75 * best["base_loss"]
    assert len(list((study / "wandb").glob("offline-run-*"))) == len(table)
    lora_sweep("pick", str(study))

    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    loaded = AutoPeftModelForCausalLM.from_pretrained(str(study / "production/adapter"), dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(loaded.peft_config["default"].base_model_name_or_path)
    config = sweep_file.read(SWEEP, [])[0].base()
    assert config.model.dtype == "bf16"
    data = load_data(config.data, tokenizer)
    adapted, ends = token_losses(loaded, data.evaluation)
    assert float(adapted.mean()) == pytest.approx(best["eval_loss"], abs=LOSS_TOLERANCE_NATS)
    with loaded.disable_adapter():
        base, _ = token_losses(loaded, data.evaluation)
    assert float(base.mean()) == pytest.approx(best["base_loss"], rel=1e-2)
    # The answers themselves, without the end of text that any fine-tuning teaches.
    answers = float(adapted[~ends].mean() / base[~ends].mean())
    held_in = real_facts.facts(config.data.subjects, config.data.seed).eval
    after = accuracy(loaded, tokenizer, held_in)
    with loaded.disable_adapter():
        before = accuracy(loaded, tokenizer, held_in)
    print(f"{len(table)} cells in {seconds:.0f} s; loss of the answers alone: {answers:.1%} of the base's")
    print(f"{len(held_in)} held-in facts completed: base {before:.1%}, adapter {after:.1%}")
    assert answers <= 0.75
    assert after >= before + 0.3
