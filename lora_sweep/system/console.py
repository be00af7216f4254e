"""The console: whatever is drawn on it, texts from outside command nobody's terminal."""

from collections.abc import Iterable

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from lora_sweep.system.terminal import printable


class Console(RichConsole):
    """rich's, but every text is made printable; rich's own control codes stay."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def say(console: RichConsole, line: str) -> None:
    """As it is: no markup, colors or line breaks of rich's."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
