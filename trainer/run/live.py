"""A panel at the bottom of a terminal, redrawn in place; whatever else is told scrolls above it."""

from __future__ import annotations

import atexit
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_NUMBER = re.compile(r"(?<![A-Za-z])\d[\d,.:]*")
_FRAME = 4  # columns that the panel's border and its padding take


def terminal_of_stdout() -> Console | None:
    """The terminal that standard output is, where a cursor can be moved on it; else None."""
    console = Console()
    can_move = console.is_terminal and not console.is_dumb_terminal
    return console if can_move and sys.stdout.isatty() else None


@dataclass(frozen=True)
class Content:
    """What the panel shows."""

    title: str
    progress: str
    share: float
    """of the work that is done"""
    rows: Sequence[Sequence[str]]
    """each a row of short texts, broken between them where the terminal is narrow"""
    alarm: str | None


class LivePanel:
    """Drawn only when asked: no thread of its own competes with the training loop.

    It appears with the first show(). Until close() the cursor is hidden, and what others print on
    the terminal is caught, to be put above the panel.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        # Errors that go to a file belong there.
        caught = sys.stderr.isatty()
        self._live = Live(console=console, auto_refresh=False, redirect_stderr=caught)

    def show(self, content: Content) -> None:
        if not self._live.is_started:
            atexit.register(self.close)
            self._live.start()
        self._live.update(self._panel(content), refresh=True)

    def say(self, text: str, style: str = "") -> None:
        """Print a line above the panel, which stays as it is."""
        self._console.print(Text(text, style))

    def close(self) -> None:
        """Give the cursor back; the panel stays where it is. May be called more than once."""
        self._live.stop()

    def _panel(self, content: Content) -> RenderableType:
        width = self._console.width - _FRAME
        bar = Table.grid(expand=True, padding=(0, 1))
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        bar.add_row(
            _numbers_bold(content.progress),
            ProgressBar(total=1, completed=content.share, complete_style="cyan"),
            _numbers_bold(f"{100 * content.share:.0f} %"),
        )
        lines = [_numbers_bold(line) for row in content.rows for line in flow(row, width)]
        if content.alarm is not None:
            lines.append(Text(f"! {content.alarm}", "bold red", no_wrap=True, overflow="ellipsis"))
        panel = Panel(Group(bar, *lines), title=Text(content.title, "bold"), title_align="left")
        return Group(panel, Text())  # the cursor's own line: an echoed ^C must not tear the panel


def flow(parts: Sequence[str], width: int, gap: str = "   ") -> list[str]:
    """Texts side by side, in as many lines as they need at this width."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(gap) + len(part) <= width:
            lines[-1] += gap + part
        else:
            lines.append(part)
    return lines


def _numbers_bold(text: str) -> Text:
    styled = Text(text, no_wrap=True, overflow="ellipsis")
    styled.highlight_regex(_NUMBER, "bold cyan")
    return styled
