"""Size of each module's update, layer by module, as one picture a trial; the colors mean the same in every trial."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

DECADES = (-5.0, 0.0)
"""Of s |BA|_F / |W|_F: the darkest and the brightest color."""
CELL, MARGIN, LINE = (56, 16), 12, 18
"""Pixels: (width, height) of a module, around all, and of a line of text."""
SCALE = ((20, 11, 52), (84, 15, 109), (159, 42, 99), (221, 81, 58), (252, 165, 10), (245, 249, 180))
"""From the least to the largest: dark violet over red to light yellow, readable in grey too."""
NOTHING = (255, 255, 255)
MARK, GREY = (0, 114, 255), (200, 200, 200)
BRIGHT = 330
"""Sum of a color's parts above which black is read better than white."""


def draw(sizes: Mapping[str, float], causes: Mapping[str, str]) -> bytes:
    """A PNG.

    A module whose update is 0 or not finite is white.

    Args:
        sizes: module -> s |BA|_F / |W|_F.
        causes: module -> what traps it, framed in blue.
    """
    rows = list(dict.fromkeys(_layer(name) for name in sizes))
    columns = list(dict.fromkeys(_last(name) for name in sizes))
    font, small = ImageFont.load_default(size=12), ImageFont.load_default(size=10)
    left = MARGIN + 8 + max(int(font.getlength(row)) for row in rows)
    wide = max(CELL[0], 8 + max(int(font.getlength(column)) for column in columns))
    top = MARGIN + 2 * LINE
    width = max(left + wide * len(columns) + MARGIN, 420)
    picture = Image.new("RGB", (width, top + CELL[1] * len(rows) + 3 * LINE + MARGIN), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((MARGIN, MARGIN), "size of the update, s |BA| / |W|", fill="black", font=font)
    for place, column in enumerate(columns):
        pen.text((left + place * wide + 2, MARGIN + LINE), column, fill="black", font=font)
    for place, row in enumerate(rows):
        pen.text((MARGIN, top + place * CELL[1]), row, fill="black", font=font)
    for name, size in sizes.items():
        x, y = left + columns.index(_last(name)) * wide, top + rows.index(_layer(name)) * CELL[1]
        fill, is_trapped = _color(size), name in causes
        box = (x, y, x + wide - 2, y + CELL[1] - 2)
        pen.rectangle(box, fill=fill, outline=MARK if is_trapped else GREY, width=2 if is_trapped else 1)
        pen.text((x + 4, y + 1), f"{size:.2g}", fill="black" if sum(fill) > BRIGHT else "white", font=small)
    _legend(pen, font, left, top + CELL[1] * len(rows) + LINE // 2, sorted(set(causes.values())))
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def _legend(pen: ImageDraw.ImageDraw, font: Any, x: int, y: int, causes: Sequence[str]) -> None:
    low, high = DECADES
    steps = int(high - low) * 4
    for step in range(steps + 1):
        exponent = low + (high - low) * step / steps
        pen.rectangle((x + step * 10, y, x + step * 10 + 10, y + 10), fill=_color(10**exponent))
    pen.text((x, y + 12), f"1e{low:.0f}", fill="black", font=font)
    pen.text((x + steps * 10 - 4, y + 12), "1", fill="black", font=font)
    if causes:
        pen.text((x, y + 12 + LINE), f"blue frame: {', '.join(causes)}", fill=MARK, font=font)


def _color(size: float) -> tuple[int, int, int]:
    if not (size > 0 and math.isfinite(size)):
        return NOTHING
    low, high = DECADES
    place = min(max((math.log10(size) - low) / (high - low), 0.0), 1.0) * (len(SCALE) - 1)
    lower = min(int(place), len(SCALE) - 2)
    share = place - lower
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(SCALE[lower], SCALE[lower + 1], strict=True))
    return red, green, blue


def _layer(name: str) -> str:
    """Of `model.layers.3.self_attn.q_proj`: `3`, the number of the layer; the whole name where there is none."""
    match = re.search(r"\.(\d+)\.", name)
    return match[1] if match else name


def _last(name: str) -> str:
    return name.rpartition(".")[2]
