"""The examples in docstrings are one story: from a sweep file to a study's rows."""

import doctest
import importlib
from pathlib import Path
from typing import Any

STORY = (
    "sweep.sweep_file", "sweep.sweep", "sweep.equivalence", "base.load", "data.prepare", "pack.pack", "study.study",
    "study.view", "report.results", "cli.config_table", "runner.verify_equivalence",
)  # fmt: skip
"""Modules in the order in which their examples build on one another."""


def test_the_examples_are_true(in_folder: Path) -> None:
    defined: dict[str, Any] = {}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    examples = 0
    for name in STORY:
        module = importlib.import_module(f"lora_sweep.{name}")
        # In the order of the file.
        for test in sorted(doctest.DocTestFinder(exclude_empty=True).find(module), key=lambda each: each.lineno or 0):
            examples += len(test.examples)
            test.globs = {**vars(module), **defined}
            runner.run(test, clear_globs=False)
            defined |= {key: value for key, value in test.globs.items() if vars(module).get(key) is not value}
    assert examples >= 20
    assert runner.summarize(verbose=False).failed == 0
