"""How far long work is: a line a minute where there is no terminal."""

import pytest
from helpers import Terminal

from support import progress
from support.progress import Bar, in_words


@pytest.fixture
def clock(monkeypatch):
    """The clock of all bars, which is set by hand."""
    clock = type("Clock", (), {"now": 0.0, "time": lambda self: self.now})()
    monkeypatch.setattr("tqdm.std.time", clock.time)
    return clock


def slowly(clock, seconds: float, count: int):
    for i in range(count):
        clock.now += seconds
        yield i


def test_durations_in_words():
    assert [in_words(s) for s in (119, 120, 7200, 172_799, 172_800)] == [
        "119 s",
        "2.0 minutes",
        "2.0 hours",
        "48 hours",
        "2.0 days",
    ]


def test_a_line_a_minute(clock, capsys):
    """Around a loop, 2 s a clip; nothing else is printed, at the beginning or at the end."""
    assert list(Bar(slowly(clock, 2, 80), "features", total=200)) == list(range(80))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("[")[0].split() for line in lines] == [
        ["features:", "15%", "30/200"],
        ["features:", "30%", "60/200"],
    ]
    assert "01:00<05:40" in lines[0]  # 170 clips more


@pytest.mark.parametrize("total", [4, None])
def test_what_is_told_step_by_step(total, clock, capsys):
    with Bar(desc="work", total=total, unit="file") as bar:
        for seconds in (59, 1, 30, 30):
            clock.now += seconds
            bar.update(1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "2/4" in lines[0] if total else "2file" in lines[0]


def test_nothing_of_short_work_or_of_another_process(clock, capsys, monkeypatch):
    assert list(Bar(slowly(clock, 14, 4), "work")) == [0, 1, 2, 3]
    monkeypatch.setattr(progress, "is_first", lambda: False)
    assert list(Bar(slowly(clock, 100, 4), "work")) == [0, 1, 2, 3]
    assert capsys.readouterr().err == ""


def test_a_bar_in_a_terminal(monkeypatch, clock):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    assert list(Bar([1, 2, 3], "work", unit="file", file=terminal)) == [1, 2, 3]
    assert "work: 100%" in terminal.getvalue() and "\r" in terminal.getvalue()
