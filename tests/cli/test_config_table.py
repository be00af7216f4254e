"""lora-sweep config: every key with its default, bound and description."""

import json
from dataclasses import fields

from conftest import Run

from lora_sweep.config import GROUPS


def test_every_key_of_the_schema_is_described(run: Run) -> None:
    said = run("config", "--json")
    assert said.code == 0
    keys = json.loads(said.out)
    assert list(keys) == [f"{group}.{field.name}" for group, section in GROUPS.items() for field in fields(section)]
    for name, key in keys.items():
        assert len(key["description"]) > 5, name
        assert key["bound"] and key["default"], name
    assert keys["optimizer.ratio"]["bound"] == "a number, above 0"
    assert keys["train.max_steps"]["default"].isdecimal()
    assert keys["train.eval_every"]["bound"] == "a whole number, at least 1"
    assert "steps" in keys["health.check_every"]["description"]


def test_one_group_is_shown_alone_and_a_misspelt_one_is_named(run: Run) -> None:
    said = run("config", "optimizer")
    assert said.code == 0
    names = [line.split(" = ")[0] for line in said.out.splitlines() if " = " in line and not line.startswith(" ")]
    assert names == [f"optimizer.{field.name}" for field in fields(GROUPS["optimizer"])]
    wrong = run("config", "optimiser")
    assert wrong.code == 2
    assert wrong.err == "GROUP: no such group, got 'optimiser' (did you mean optimizer?)\n"
