"""What reaches a person's terminal."""

import pytest

from lora_sweep.system.terminal import printable


@pytest.mark.parametrize(
    "text, shown",
    [
        ("cell 0007 rank=8", "cell 0007 rank=8"),
        ("Größe 模型 μ", "Größe 模型 μ"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\x1b]0;owned\x07\x1b[2J", "␛]0;owned␇␛[2J"),
        ("over\rwritten\x08", "over␍written␈"),
        ("\x9b31mC1\x85", "\ufffd31mC1\ufffd"),
        ("\u202eexe.txt\u2066", "\ufffdexe.txt\ufffd"),
        ("name\udcff", "name\ufffd"),
        ("\x7f", "␡"),
    ],
)
def test_nothing_that_a_terminal_obeys_is_left_in_a_text(text: str, shown: str) -> None:
    assert printable(text) == shown
