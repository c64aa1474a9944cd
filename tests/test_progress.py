"""Signs of life: a line a minute where there is no terminal."""

import io

import pytest
from helpers import Terminal

from support import progress
from support.progress import Bar, Signs


@pytest.fixture
def clock():
    """A clock that is set by hand."""
    return type("Clock", (), {"now": 0.0, "__call__": lambda self: self.now})()


def test_a_line_a_minute(clock, capsys):
    """200 clips, of which 20 were there before: 2 s a clip."""
    signs = Signs(200, "clips", 20, clock)
    for done in range(21, 100):
        clock.now += 2
        signs(done, "features")
    assert capsys.readouterr().err.splitlines() == [
        "features: 50 of 200 clips, about 5.0 minutes to go", "features: 80 of 200 clips, about 4.0 minutes to go",
    ]  # fmt: skip


def test_nothing_of_short_work_in_a_terminal_or_of_another_process(clock, capsys, monkeypatch):
    def signs() -> str:
        clock.now, asked = 0.0, Signs(100, "clips", clock=clock)
        for done in (1, 2, 3):
            clock.now += 20
            asked(done, "features")
        return capsys.readouterr().err

    assert signs() == "features: 3 of 100 clips, about 32 minutes to go\n"
    with monkeypatch.context() as patch:
        patch.setattr(progress, "is_first", lambda: False)
        assert signs() == ""
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    assert signs() == "" and terminal.getvalue() == ""


@pytest.mark.parametrize("total", [4, None])
def test_a_bar_without_a_terminal(total, clock, capsys):
    """Around a loop, or told what is done; of an unknown number too."""

    def slowly():
        for i in range(4):
            clock.now += 40
            yield i

    assert list(Bar(slowly(), "work", total=total, unit="file", clock=clock)) == [0, 1, 2, 3]
    far = ("2 of 4 files, about 80 s to go", "4 of 4 files, about 0 s to go") if total else ("2 files", "4 files")
    assert capsys.readouterr().err.splitlines() == [f"work: {text}" for text in far]
    with Bar(desc="work", total=total, unit="file", clock=clock) as bar:
        clock.now += 59
        bar.update(1)
        clock.now += 1
        bar.update(1)
    assert capsys.readouterr().err.splitlines() == [f"work: {'2 of 4 files, about 60 s to go' if total else '2 files'}"]


@pytest.mark.parametrize(("unit", "words"), [("B", "bytes"), ("s", "s"), ("clip", "clips")])
def test_what_a_bar_counts(unit, words, clock, capsys):
    with Bar(desc="work", total=4000, unit=unit, clock=clock) as bar:
        clock.now += 60
        bar.update(1000)
    assert capsys.readouterr().err == f"work: 1,000 of 4,000 {words}, about 3.0 minutes to go\n"


def test_a_bar_in_a_terminal(monkeypatch, clock):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    assert list(Bar([1, 2, 3], "work", unit="file", clock=clock, file=terminal)) == [1, 2, 3]
    assert (
        isinstance(terminal, io.StringIO) and "work: 100%" in terminal.getvalue() and "to go" not in terminal.getvalue()
    )
