"""Groups stay in one part: in what the seed draws, in few-shot draws, and in splits and folds of
the user's own."""

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers import make_folder, split_of, train_on, write_csv, write_sound

from data import Dataset, folds_of, load_dataset, random_split
from sounds.clip import Clip
from sounds.groups import group_hint, parts_of, with_groups, with_stretches
from support.command import UserError


def crowd(seed: int, groups: int, classes: int) -> tuple[list[int], list[str]]:
    """Clips of groups of which each has some of the classes, more or fewer clips of each; each
    class has two groups."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 6, (groups, classes)) * rng.integers(0, 2, (groups, classes))
    counts[0] += 1
    counts[1] += 1
    pairs = [
        (label, f"g{group}")
        for group in range(groups)
        for label in range(classes)
        for _ in range(counts[group, label])
    ]
    labels, names = zip(*(pairs[i] for i in rng.permutation(len(pairs))), strict=True)
    return list(labels), list(names)


@pytest.mark.parametrize("seed", range(8))
def test_drawn_parts_do_not_divide_groups(seed):
    labels, groups = crowd(seed, groups=12, classes=4)
    parts = parts_of(labels, groups, seed)
    of_group = defaultdict(set)
    for group, part in zip(groups, parts, strict=True):
        of_group[group].add(part)
    assert all(len(found) == 1 for found in of_group.values())
    assert parts == parts_of(labels, groups, seed)
    for label in range(4):  # every class trains and is tested
        count = Counter(part for part, its in zip(parts, labels, strict=True) if its == label)
        assert count["train"] and count["test"], label


def test_equal_groups_are_divided_in_fifths():
    labels, groups = (
        [i % 3 for i in range(150)],
        [f"speaker {i // 15}" for i in range(150)],
    )  # 5 of each class
    drawn = [parts_of(labels, groups, seed) for seed in range(6)]
    assert all(Counter(parts) == {"train": 90, "val": 30, "test": 30} for parts in drawn)
    assert len({tuple(parts) for parts in drawn}) == 6
    two = parts_of([0] * 6, ["a", "a", "a", "b", "b", "b"], 0)
    assert sorted(two) == ["test"] * 3 + ["train"] * 3  # as classes of two clips are


def test_a_group_without_which_a_class_could_not_train_is_not_taken():
    """'b' has the only other clips of class 1; and a group that is too large for a fifth waits for
    a smaller one."""
    for seed in range(10):
        parts = parts_of([0, 0, 0, 1, 1], ["a", "b", "c", "b", "d"], seed)
        assert {"b", "d"} & {g for g, part in zip("abcbd", parts, strict=True) if part == "train"}
        parts = dict(
            zip("a" * 20 + "bcdef", parts_of([0] * 25, list("a" * 20 + "bcdef"), seed), strict=True)
        )
        assert parts["a"] == "train" and Counter(parts.values()) == {"train": 1, "test": 5}


def test_stretches_of_a_recording_validate():
    """Two of eight: about a quarter of the labels, in whole stretches, others by another seed.

    The two windows of a label stay together. What tests is not touched.
    """
    spans = {}
    for i in range(60):  # labels of two seconds, a second apart
        spans[2 * i] = (3.0 * i, 3.0 * i + 1)
        spans[2 * i + 1] = (3.0 * i + 1, 3.0 * i + 2)
    spans |= {120: (0.0, 1.0), 121: (5.0, 6.0)}  # of another recording
    labels = [i // 2 % 4 for i in range(122)]
    paths = [Path("a.wav")] * 120 + [Path("b.wav")] * 2
    parts = ["train"] * 120 + ["test"] * 2
    drawn = [with_stretches(parts, labels, paths, spans, seed) for seed in range(6)]
    assert len({tuple(found) for found in drawn}) > 1
    for found in drawn:
        assert 28 <= found.count("val") <= 32 and found[120:] == ["test"] * 2
        assert found[0:120:2] == found[1:120:2]
        changes = sum(one != other for one, other in pairwise(found[:120]))
        assert changes <= 4  # two stretches have four ends
    assert with_stretches(parts, labels, paths, spans, 0) == drawn[0]


def test_a_class_keeps_training_pieces():
    """Class 2 has one piece, which never validates, and class 1 two, in two stretches."""
    spans = {i: (2.0 * i, 2.0 * i + 1) for i in range(16)}
    labels = [1] + [0] * 11 + [1, 0, 0, 2]
    paths = [Path("a.wav")] * 16
    for seed in range(100):
        found = with_stretches(["train"] * 16, labels, paths, spans, seed)
        assert Counter(found) == {"train": 12, "val": 4}
        trains = {label for label, part in zip(labels, found, strict=True) if part == "train"}
        assert trains == {0, 1, 2}


def test_few_shots_are_drawn_from_the_groups_that_train():
    labels, groups = crowd(3, groups=12, classes=3)
    paths = [Path(f"{i}.wav") for i in range(len(labels))]
    dataset = Dataset("crowd", Path("."), ["a", "b", "c"], paths, labels, {}, groups)
    split, few = folds_of(dataset, 5)[1], folds_of(dataset, 5, shots=2)[1]
    assert set(few.train) < set(split.train) and len(few.train) == 6 and few.test == split.test
    assert not {groups[i] for i in few.train} & {groups[i] for i in few.test + few.val}
    assert random_split(dataset, 5) != random_split(replace(dataset, groups=[]), 5)


def test_what_groups_are_called():
    root = Path("/my")
    clips = [Clip(root / name, "x") for name in ("a/ann_1.wav", "a/ann_2.wav", "b/bob_1.wav")]
    assert [clip.group for clip in with_groups(root, clips, r"/(.*)_")] == ["ann", "ann", "bob"]
    assert with_groups(root, clips, None) == clips
    pieces = [clip._replace(span=(float(i), i + 1.5)) for i, clip in enumerate(clips)]
    assert [clip.group for clip in with_groups(root, pieces, None)] == [
        "a/ann_1.wav",
        "a/ann_2.wav",
        "b/bob_1.wav",
    ]
    by_themselves = with_groups(root, pieces, "(.*)")
    assert by_themselves[1].group == "a/ann_2.wav#1-2.5"
    kept = with_groups(root, pieces, r"/([^/]+?)_\d\.wav$")
    assert [clip.group for clip in kept] == ["ann", "ann", "bob"]
    named = [clip._replace(group="mine") for clip in pieces]
    assert with_groups(root, named, None) == named
    spellings = [Clip(root / name, "x") for name in ("Ren\u00e9_1.wav", "Rene\u0301 _2.wav")]
    assert [clip.group for clip in with_groups(root, spellings, "(.*)_")] == ["Ren\u00e9"] * 2
    (blank,) = with_groups(root, [Clip(root / "a _1.wav", "x")], "a(.*)_")
    assert blank.group == " "
    with pytest.raises(UserError, match=r"b/bob_1\.wav: every clip must have one"):
        with_groups(root, clips, "a/(ann)")
    with pytest.raises(UserError, match=r"'\(an' is no regular expression"):
        with_groups(root, clips, "(an")
    with pytest.raises(UserError, match="into parentheses"):
        with_groups(root, clips, "ann")


def test_runs_with_groups(tmp_path, capsys):
    root = make_folder(tmp_path / "my", count=1)
    for label, name in enumerate(("bell", "drum", "flute")):
        for speaker in ("ann", "bob", "eve"):
            for i in range(2):
                write_sound(root / name / f"{speaker}{i}.wav", 10 * label)
        (root / name / "0.wav").unlink()
    pattern = ["--group", r"/([a-z]+)\d\.wav$"]
    assert train_on("folder", root, tmp_path, *pattern) == 0
    parts = {
        part: {name.split("/")[1][:3] for name in names}
        for part, names in split_of("folder", tmp_path).items()
    }
    assert sorted(map(len, parts.values())) == [1, 1, 1] and len(set.union(*parts.values())) == 3
    assert (
        train_on("folder", root, tmp_path) == 2
    )  # another experiment: a random split without groups
    assert train_on("demo", None, tmp_path, *pattern) == 2
    assert "--group is for your own sounds" in capsys.readouterr().err

    rows = [
        [f"my/{name}/{who}{i}.wav", name, who]
        for name in ("bell", "drum")
        for who in ("ann", "bob")
        for i in "01"
    ]
    table = write_csv(tmp_path / "t.csv", "path,label,group", *rows)
    dataset = load_dataset("csv", table, tmp_path)
    assert dataset.groups == [row[2] for row in rows]
    test = {dataset.groups[i] for i in random_split(dataset, 1).test}
    assert len(test) == 1 and not test & {dataset.groups[i] for i in random_split(dataset, 1).train}
    option = load_dataset("csv", table, tmp_path, group="([01])")  # it comes before the column
    assert option.groups == ["0", "1"] * 4


@pytest.mark.parametrize(
    ("header", "more", "group", "message"),
    [
        (
            "path,label,group,split",
            ["ann,train", "ann,test", "bob,train", "bob,train"],
            None,
            r"the group 'ann' is in train \(a0.wav\) and in test \(a1.wav\): a group must be in",
        ),
        (
            "path,label,group,fold",
            ["ann,1", "bob,2", "bob,1", "eve,2"],
            None,
            r"'bob' is in 2 \(a1.wav\) and in 1",
        ),
        ("path,label,fold", ["1", "2", "1", "2"], "^(a)", "--group '.*' finds no group in b0.wav"),
        (
            "path,label,fold",
            ["1", "2", "1", "2"],
            "^([ab])",
            r"the group 'a' is in 1 \(a0.wav\) and in 2 \(a1.wav\)",
        ),
        ("path,label,group", ["ann", "", "bob", "bob"], None, "line 3: an empty group"),
        (
            "path,label,group",
            ["ann", "eve", "bob", "bob"],
            None,
            "class 'b' has one clip, or clips of one group only",
        ),
    ],
)
def test_groups_that_cannot_be(tmp_path, header, more, group, message):
    names = ["a0", "a1", "b0", "b1"]
    rows = [
        f"{write_sound(tmp_path / f'{name}.wav').name},{name[0]},{end}"
        for name, end in zip(names, more, strict=True)
    ]
    with pytest.raises(UserError, match=message) as error:
        load_dataset("csv", write_csv(tmp_path / "t.csv", header, *rows), tmp_path, group)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        # Recordings and their pieces; a name without a number is a recording.
        (
            ["x/rec1_03.wav", "x/rec1_04.wav", "x/rec2_01.wav", "x/b.ogg"],
            ["rec1", "rec1", "rec2", "b"],
        ),
        (["x/a-001.wav", "x/a-002.wav", "x/b-1.wav", "x/b-2.wav"], ["a", "a", "b", "b"]),
        (
            ["talk.part1.wav", "talk.Part2.wav", "other.wav", "c d.wav"],
            ["talk", "talk", "other", "c d"],
        ),
        # One recording may be in two classes.
        (["x/r_1.wav", "x/r_2.wav", "x/s.wav", "x/t.wav", "y/r_3.wav", "y/q.wav"], list("rrstrq")),
        # All clips of a class would be one group, so each is a group.
        (
            ["x/r_1.wav", "x/r_2.wav", "x/s_1.wav", "x/s_2.wav", "y/y (_1.wav", "y/y (_2.wav"],
            ["r", "r", "s", "s", "y (_1.wav", "y (_2.wav"],
        ),
        # Letters count takes, as in ESC-50's names, if the names go on alike behind them.
        (
            ["x/1-32-A-0.wav", "x/1-32-B-0.wav", "x/1-38-A-0.wav", "x/1-4-A-0.wav", "x/b.ogg"],
            ["1-32", "1-32", "1-38", "1-4", "b"],
        ),
        (["x/r_A.wav", "x/r_B.wav", "x/s_A.wav", "x/t.wav"], ["r", "r", "s", "t"]),
        (["x/ann_A_1.wav", "x/ann_B_2.wav", "x/bob_A_1.wav", "x/bob_C_1.wav"], None),
        (["x/x_A_1.wav", "x/x_B_1.wav", "y/y_A_1.wav", "y/y_B_1.wav"], None),
        # The speaker names a recording, and not the number alone.
        (
            ["7/7_jackson_1.wav", "7/7_jackson_2.wav", "7/7_theo_1.wav", "7/7_theo_2.wav"],
            ["7_jackson", "7_jackson", "7_theo", "7_theo"],
        ),
        # Numbers of clips, hours and random names say nothing.
        (["x/x_1.wav", "x/x_2.wav", "y/y-1.wav", "y/y-2.wav"], None),
        (["x/x_1.wav", "x/x_2.wav", "x/x_3.wav", "x/odd.wav"], None),
        (["x/20240501_123000.wav", "x/20240501_124000.wav", "x/20240502_1.wav", "x/a.wav"], None),
        (["x/1C0A-4B1E-A0.wav", "x/1C0A-4B1E-B0.wav", "x/7F-A.wav"], None),
        (["x/1.wav", "x/2.wav", "x/10", "x/rec1.wav"], None),
    ],
)
def test_names_of_pieces(names, groups):
    root = Path("/my")
    clips = [Clip(root / name, name.split("/")[0] if "/" in name else "") for name in names]
    hint = group_hint(clips)
    if groups is None:
        assert hint == ""
    else:
        assert [clip.group for clip in with_groups(root, clips, hint)] == groups


def test_the_hint_of_a_dataset(tmp_path):
    """Groups of any other kind are better than what names look like."""
    files = ["ann_1.wav", "ann_2.wav", "bob_1.wav", "bob_2.wav"]
    rows = [[f"{name}/{file}", name, file[:3]] for name in ("bell", "drum") for file in files]
    for path, _, _ in rows:
        write_sound(tmp_path / path)
    hint = load_dataset("folder", tmp_path, tmp_path).group_hint
    assert (
        load_dataset("folder", tmp_path, tmp_path, group=hint).groups
        == ["ann", "ann", "bob", "bob"] * 2
    )
    assert load_dataset("folder", tmp_path, tmp_path, group="(.*)").group_hint == ""
    assert load_dataset("folder", tmp_path, tmp_path, windows=0.1).group_hint == hint
    windows = load_dataset("folder", tmp_path, tmp_path, group=hint, windows=0.1)
    assert len(windows.groups) > 8 and set(windows.groups) == {"ann", "bob"}
    table = write_csv(tmp_path / "t.csv", "path,label", *[row[:2] for row in rows])
    assert load_dataset("csv", table, tmp_path).group_hint == hint
    table = write_csv(tmp_path / "t.csv", "path,label,group", *rows)
    assert load_dataset("csv", table, tmp_path).group_hint == ""
