"""Progress of a run: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.text import Text
from typing_extensions import Self

# Between two lines of a log that is not a terminal.
SECONDS_PER_LINE = 5.0
_LONGEST_BAR, _SHORTEST_BAR = 40, 5


class RunProgress:
    """Display of a run's progress, loss, images per second, time left and codes in use.

    On a terminal as a bar that fits its width; elsewhere a line every `SECONDS_PER_LINE` seconds, and one at the end.
    ``console`` None: nothing is shown.
    """

    def __init__(
        self,
        console: Console | None,
        name: str,
        total: int,
        *,
        start: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._total, self._start, self._done = name, total, start, start
        self._clock, self._began = clock, clock()
        self._printed = self._began
        self._facts: list[str] = []
        self._usage = ""
        self._bar = self._log = None
        if console is not None and console.is_terminal:
            self._bar = Progress(_Line(self, console), console=console)
        else:
            self._log = console

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.add_task(self._name, total=self._total, completed=self._start)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._done > self._start and kind is None:
            self._print()

    def update(self, done: int) -> None:
        """Set the number that is done of the total."""
        self._done = done
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)
        elif self._clock() - self._printed >= SECONDS_PER_LINE and done < self._total:
            self._print()

    def report(self, *, loss: float | None = None, speed: float | None = None, usage: str = "", more: str = "") -> None:
        """Set the values to show. ``speed`` in images per second; ``usage``, and what ``more`` there is, in words."""
        self._facts = [
            *([] if loss is None else [f"loss {loss:.4f}"]),
            *([] if speed is None else [f"{speed:,.0f} images/s"]),
            *([more] if more else []),
        ]
        self._usage = usage

    def line(self, width: int | None = None) -> Text:
        """Format one line of at most ``width`` columns (None: no limit). If it is too long, the bar is left out,
        then codes, speed and loss."""
        done = f"{self._done}/{self._total}"
        parts = [self._name, done, *self._facts, self._left(), self._usage]
        parts = [part for part in parts if part]
        if width is None:
            return Text("  ".join(parts))
        dispensable = [part for part in (*self._facts, self._usage) if part]
        while dispensable and len(" ".join(parts)) > width:
            parts.remove(dispensable.pop())
        line = Text(no_wrap=True, overflow="crop")
        line.append(parts[0], style="bold")
        length = min(_LONGEST_BAR, width - len(" ".join(parts)) - 1)
        if length >= _SHORTEST_BAR:
            full = length * self._done // max(1, self._total)
            line.append(" ").append("━" * full, style="bar.complete").append("━" * (length - full), style="bar.back")
        return line.append("".join(f" {part}" for part in parts[1:]))

    def _left(self) -> str:
        if self._done == self._start:
            return ""
        seconds = (self._clock() - self._began) / (self._done - self._start) * (self._total - self._done)
        minutes, seconds = divmod(int(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours // 24}d {hours % 24}h left" if hours >= 100 else f"{hours}:{minutes:02}:{seconds:02} left"

    def _print(self) -> None:
        if self._log is not None:
            self._printed = self._clock()
            self._log.print(self.line(), soft_wrap=True, highlight=False)


class _Line(ProgressColumn):
    def __init__(self, progress: RunProgress, console: Console) -> None:
        super().__init__()
        self._progress, self._console = progress, console

    def render(self, task: Task) -> Text:
        return self._progress.line(self._console.width)
