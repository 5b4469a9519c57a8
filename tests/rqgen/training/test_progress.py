"""Progress: a bar that fits the terminal, lines elsewhere."""

from io import StringIO

import pytest
from rich.console import Console

from rqgen.training.progress import SECONDS_PER_LINE, RunProgress


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def long_run(console, clock):
    progress = RunProgress(console, "tokenizer", 300_000, start=1000, clock=clock)
    clock.now += 3600
    progress.update(12_345)
    progress.report(loss=1234.5678, speed=123_456.7, usage="codes 16384/16384/16384/16384")
    return progress


@pytest.mark.parametrize("width", [40, 60, 80, 81, 100, 140, 200])
def test_the_line_fits_and_keeps_the_time_left(width):
    line = long_run(None, Clock()).line(width).plain
    assert len(line) <= width
    assert "tokenizer" in line and "12345/300000" in line and "25:21:18 left" in line
    if width >= 80:
        assert "loss 1234.5678" in line and "123,457 images/s" in line
    assert ("codes 16384" in line) == (width >= 100)


def test_a_terminal_of_80_columns_shows_the_time_left():
    console = Console(file=StringIO(), force_terminal=True, width=80)
    clock = Clock()
    with RunProgress(console, "tokenizer", 300_000, clock=clock) as progress:
        clock.now += 3600
        progress.update(12_345)
        progress.report(loss=1234.5678, speed=123_456.7, usage="codes 16384/16384/16384/16384")
    assert "23:18:04 left" in console.file.getvalue()


def test_a_log_gets_a_line_every_few_seconds_and_one_at_the_end():
    console = Console(file=StringIO(), width=80)
    clock = Clock()
    with RunProgress(console, "prior", 100, clock=clock) as progress:
        for step in range(1, 101):
            clock.now += SECONDS_PER_LINE / 10
            progress.report(loss=1 / step, speed=1000, usage="codes 1/2/3")
            progress.update(step)
    lines = console.file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/100" for step in range(10, 101, 10)]
    assert lines[0] == "prior  10/100  loss 0.1000  1,000 images/s  0:00:45 left  codes 1/2/3"


def test_a_quick_run_gets_one_line_and_an_interrupted_one_none():
    console = Console(file=StringIO())
    with RunProgress(console, "prior", 2) as progress:
        progress.update(1)
        progress.update(2)
    assert console.file.getvalue() == "prior  2/2  0:00:00 left\n"
    with pytest.raises(KeyboardInterrupt), RunProgress(console, "prior", 2) as progress:
        progress.update(1)
        raise KeyboardInterrupt
    with RunProgress(console, "prior", 2, start=2):
        pass
    assert console.file.getvalue().count("\n") == 1


@pytest.mark.parametrize(("hours", "shown"), [(0.5, "0:29:59 left"), (99.5, "99:29:59 left"), (100.5, "4d 4h left")])
def test_time_left(hours, shown):
    clock = Clock()
    progress = RunProgress(None, "prior", 10_001, clock=clock)
    clock.now += hours * 0.36
    progress.update(1)
    assert shown in progress.line().plain
