"""How well events fit labels: compared with a search of all pairings, by hand, and as a command."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from helpers import constant, write_sound

from support.command import UserError
from tools import predict
from tools.truth import labels_of, pairs_of, print_scores


def overlap(one, other) -> float:
    """The IoU of two events on a grid of a thousandth of a second."""
    seconds = [set(range(round(1000 * e[1]), round(1000 * e[2]))) for e in (one, other)]
    return len(seconds[0] & seconds[1]) / len(seconds[0] | seconds[1])


@pytest.mark.parametrize("seed", range(6))
def test_as_many_pairs_as_there_can_be(seed):
    rng = np.random.default_rng(seed)

    def some(count):
        starts = rng.integers(0, 2000, count)
        lengths = rng.integers(100, 900, count)
        return [
            (str(rng.choice(["a", "b"])), start / 1000, (start + length) / 1000, "xy"[start % 2])
            for start, length in zip(starts, lengths, strict=True)
        ]

    def fits(one, other, least):
        same = one[0] == other[0] and one[3] == other[3]
        return same and overlap(one, other) >= least

    events = some(5)
    labels = some(6)
    for least in (0.3, 0.5):
        most = max(
            sum(fits(event, label, least) for event, label in zip(events, order, strict=True))
            for order in permutations(labels, 5)
        )
        pairs = pairs_of(events, labels, least)
        assert len(pairs) == most
        assert all(fits(*pair, least) for pair in pairs)
        assert len({event for event, _ in pairs}) == len({label for _, label in pairs}) == most


def test_scores_by_hand(capsys):
    """A dog is found, and another with an IoU of 0.4; a cat is taken for a dog."""
    labels = [("a", 0, 2, "dog"), ("a", 10, 15, "dog"), ("a", 20, 21, "cat"), ("b", 0, 1, "dog")]
    events = [("a", 0.2, 2, "dog"), ("a", 11, 13, "dog"), ("a", 20, 21, "dog")]
    print_scores(events, labels)
    heading, *rows, beginnings = capsys.readouterr().out.splitlines()
    columns = "in % labels events IoU 0.3: precision recall F1 IoU 0.5: precision recall F1"
    assert heading.split() == columns.split()
    assert [row.split() for row in rows] == [
        ["cat", "1", "0", "0.0", "0.0", "0.0", "0.0", "0.0", "0.0"],
        ["dog", "3", "3", "66.7", "66.7", "66.7", "33.3", "33.3", "33.3"],
        ["together", "4", "3", "66.7", "50.0", "57.1", "33.3", "25.0", "28.6"],
    ]
    assert beginnings == "their beginnings are 0.60 s off (median, at IoU 0.3)"  # of 0.2 and 1
    print_scores([], [])
    assert capsys.readouterr().out.splitlines()[-1].split()[:3] == ["together", "0", "0"]


def test_events_beside_labels(tmp_path, capsys):
    """As a command. The model answers `dog` all the time, so an event is all of a recording."""
    fold = constant(tmp_path / "fold1.safetensors", 0.9, 0.1, classes=["dog", "cat"])
    sounds = [write_sound(tmp_path / "my" / f"{name}.wav", seconds=2) for name in "ab"]
    truth = tmp_path / "truth"
    truth.mkdir()
    (truth / "a.txt").write_text("0.5\t2\tdog (0.93)\n0.1\t0.4\tcat\n")
    (truth / "b.txt").write_text("")

    def run(*words) -> tuple[int, list[str], str]:
        words = [fold, *sounds, "--events", *words]
        code = predict.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, [line.split()[:6] for line in out.splitlines()[-4:]], err

    code, lines, _ = run("--truth", truth)
    assert code == 0 and lines == [
        ["cat", "1", "0", "0.0", "0.0", "0.0"],
        ["dog", "1", "2", "50.0", "100.0", "66.7"],
        ["together", "2", "2", "50.0", "50.0", "50.0"],
        ["their", "beginnings", "are", "0.50", "s", "off"],
    ]
    assert Path(f"{sounds[0]}.events.txt").read_text() == "0.000000\t2.000000\tdog (0.90)\n"
    _, lines, _ = run("--truth", truth, "--without", "cat")
    assert lines[-2] == ["together", "1", "2", "50.0", "100.0", "66.7"]
    _, lines, _ = run("--truth", truth, "--without", "dog")
    assert lines[-1] == ["together", "1", "0", "0.0", "0.0", "0.0"]
    (truth / "b.txt").write_text("0\t1\tDog\n")
    assert "classes that may be one and the same ('Dog' = 'dog')" in run("--truth", truth)[2]
    run("--min-length", 2.5)
    assert Path(f"{sounds[0]}.events.txt").read_text() == ""

    for words, message in (
        (["--without", "dgo"], "unknown class 'dgo': did you mean 'dog'?"),
        (["--min-length", "nan"], "--min-length nan: give a number of seconds"),
        (["--truth", truth, "--csv"], "--truth is for --events, and neither for --json nor for"),
        (["--threshold", "nan"], "--threshold nan: give a number from 0 to 1"),
        (["--threshold", 1.5], "--threshold 1.5: give a number from 0 to 1"),
        (["--min-confidence", "nan"], "--min-confidence nan: give a number from 0 to 1"),
        (["--min-confidence", -1], "--min-confidence -1.0: give a number from 0 to 1"),
        (
            ["--truth", truth, write_sound(tmp_path / "his" / "a.wav")],
            "--truth: 2 sounds would have one label track, a.txt: rename",
        ),
        (["--truth", tmp_path], "a.txt is not there: every sound needs a label track there"),
    ):
        code, _, error = run(*words)
        assert code == 2 and message in error
    for words in (["--min-length", "1"], ["--without", "dog"]):
        assert predict.main([str(fold), str(sounds[0]), *words]) == 2
        assert "--min-length and --without are for --events" in capsys.readouterr().err


def test_labels_without_a_class(tmp_path):
    """Names are those that training reads: an accent may be a character of its own."""
    (tmp_path / "a.txt").write_text("0\t1\tdo\u0308g\n1\t2\tbackground\n2\t3\tc\x1bat\n")
    found = labels_of(Path("x/a.wav"), tmp_path, ["background"])
    assert found == [("x/a.wav", 0.0, 1.0, "d\xf6g"), ("x/a.wav", 2.0, 3.0, "c\\x1bat")]
    with pytest.raises(UserError, match=r"b\.txt is not there"):
        labels_of(Path("x/b.wav"), tmp_path, [])
