"""Intervals, paired tests and claims: against published examples, counts by hand, and predictions
made up here."""

import csv
import json
import sys
from itertools import product

import numpy as np
import pytest
from helpers import SMALL_AST, answered, make_run, table_of

from sounds.paper import RECORDING
from support.records import read_run
from tools import campaign, cells, claims, evidence, experiments, tables
from tools.cells import Cell
from tools.finished import finished

# ------------------------------------------------------------------------------ intervals and tests


def test_students_interval():
    """The hours of sleep in Student (1908), Biometrika 6: R's t.test gives 1.58, 0.7001142 to
    2.4598858."""
    hours = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    mean, half = np.mean(hours), evidence.student(hours)
    assert (mean - half, mean + half) == pytest.approx((0.7001142, 2.4598858), abs=1e-7)
    assert evidence.student([80.0, 80.0]) == 0


@pytest.mark.parametrize(
    ("right", "clips", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_of_one_run(right, clips, low, high):
    """Newcombe (1998), Statistics in Medicine 17, Table I, method 3."""
    assert np.round(np.array(evidence.wilson(right, clips)) / 100, 4).tolist() == [low, high]
    accuracy = evidence.accuracy([scores(*[1] * right, *[0] * (clips - right))])
    assert accuracy == pytest.approx((100 * right / clips, *evidence.wilson(right, clips)))


def test_holms_correction():
    """The example of Wikipedia's 'Holm-Bonferroni method', and the steps of Holm (1979) by hand: 3
    x 0.01 = 0.03, then 2 x 0.012 = 0.024, which may not be less; equals; and never above 1."""
    assert evidence.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert evidence.holm([0.012, 0.01, 0.5]) == pytest.approx([0.03, 0.03, 0.5])
    assert (
        evidence.holm([0.6, 0.7]) == [1, 1]
        and evidence.holm([0.2]) == [0.2]
        and evidence.holm([]) == []
    )


def scores(*values: float, first=0) -> evidence.Scores:
    return {(1, f"{i}.wav", f"{i}.wav", "a"): value for i, value in enumerate(values, first)}


def test_a_sign_test_counts_clips():
    """9 against 3: twice (220 + 66 + 12 + 1) / 2**12.

    Clips that both tell, or that seeds even out, have no say.
    """
    one = evidence.difference([scores(*[1] * 9, *[-1] * 3, *[0] * 8)])
    assert (one.more, one.less, one.recordings, one.seeds) == (9, 3, 20, 1)
    assert one.p == pytest.approx(598 / 4096) and one.points == pytest.approx(30)
    assert one.holds(one.p) == evidence.UNTOLD
    two = evidence.difference([scores(1, 1, 1, 0), scores(-1, 1, 0, 0)])
    assert (two.more, two.less, two.seeds) == (2, 0, 2) and two.p == pytest.approx(0.5)
    assert evidence.difference([scores(0, 0, 0)]).p == 1


def test_the_bootstrap_draws_clips():
    """200 clips for it and 100 against of 1,000: 10 points, +- 1.96 sqrt((0.3 - 0.1**2) / 1000)."""
    one = evidence.difference([scores(*[1] * 200, *[-1] * 100, *[0] * 700)])
    assert one.points == pytest.approx(10)
    assert (one.low, one.high) == pytest.approx((10 - 3.338, 10 + 3.338), abs=0.25)
    assert one.holds(one.p) == evidence.YES and one.holds(0.051) == evidence.UNTOLD
    other = evidence.difference([scores(*[-1] * 200, *[1] * 100, *[0] * 700)])
    assert other.holds(other.p) == evidence.NO and other.points == pytest.approx(-10)


def test_the_bootstrap_draws_seeds_too():
    """All 4 x 4 draws of two seeds and two clips by hand; and seeds that differ on all clips: no
    clip's interval."""
    values = np.array([[3.0, 1.0], [0.0, 0.0]])  # (seeds, clips)
    draws = [values[np.ix_(s, c)].mean() for s, c in product(product((0, 1), repeat=2), repeat=2)]
    _, *bounds = evidence.bootstrap(values, np.ones((2, 2)))
    assert bounds == pytest.approx([100 * min(draws), 100 * max(draws)])
    assert evidence.bootstrap(np.array([[1] * 50, [0] * 50]), np.ones((2, 50))) == (50, 0, 100)


def test_the_interval_is_students_where_seeds_scatter():
    """10, 20 and 30 points: 20 +- 4.302653 x 10 / sqrt(3), where the bootstrap has some 10 to 30;
    and the bootstrap's where they do not scatter."""
    one = evidence.difference([scores(*[1] * n, *[0] * (100 - n)) for n in (10, 20, 30)])
    assert (one.points, one.low, one.high) == pytest.approx(
        (20, 20 - 24.8414, 20 + 24.8414), abs=1e-3
    )
    assert one.p < 1e-6 and one.holds(one.p) == evidence.UNTOLD  # the seed may have made it
    same = evidence.difference([scores(*[1] * 20, *[0] * 80)] * 3)
    assert (same.low, same.high) == pytest.approx((20 - 7.84, 20 + 7.84), abs=1)


def test_interval_and_sign_test_must_agree():
    """Three seeds: 75 clips that one of them tells and the other method does not, 40 the other way
    round in all."""
    gains = [[1 if k % 3 == seed else 0 for k in range(75)] for seed in range(3)]
    one = evidence.difference([scores(*gain, *[-1] * 40, *[0] * 2885) for gain in gains])
    assert (
        one.high < 0
        and (one.more, one.less) == (75, 40)
        and one.p < 0.01
        and one.holds(one.p) == evidence.UNTOLD
    )


def test_pieces_of_a_recording_are_one_clip():
    """By their spans: as many pieces as one likes make no recording surer.

    A number sign alone is a name.
    """
    names = {
        f"{r}.wav#{k / 2}-{k / 2 + 1}": 1 if r < 4 else -1 for r in range(6) for k in range(50)
    }
    names |= {"rain.wav#2-": 0, "take#1.wav": 0}
    one = evidence.difference(
        [{("1", evidence.recording_of(name, None), name, "a"): s for name, s in names.items()}]
    )
    assert (one.recordings, one.more, one.less) == (8, 4, 2) and one.p == pytest.approx(44 / 64)
    assert one.points == pytest.approx(100 * 100 / 302) and one.low < 0


@pytest.mark.parametrize(
    ("dataset", "paths", "recording"),
    [
        ("esc50", ("audio/1-100032-A-0.wav", "audio/1-100032-B-0.wav"), "100032"),
        ("us8k", ("audio/fold1/101415-3-0-2.wav", "audio/fold1/101415-3-1-10.wav"), "101415"),
        ("gsc", ("bed/0a7c2a8d_nohash_0.wav", "yes/0a7c2a8d_nohash_12.wav"), "0a7c2a8d"),
        (
            "fsc",
            ("wavs/speakers/2BqVo8kVB2/0a31.wav", "wavs/speakers/2BqVo8kVB2/0b2.wav"),
            "2BqVo8kVB2",
        ),
    ],
)
def test_names_say_what_is_of_one_recording(dataset, paths, recording):
    """As the releases describe their names. Another name is a recording of its own."""
    assert [evidence.recording_of(path, RECORDING[dataset]) for path in paths] == [recording] * 2
    assert evidence.recording_of("audio/dog.wav", RECORDING[dataset]) == "audio/dog.wav"


def test_groups_are_of_one_recording(tmp_path):
    """Those of --group, which config.json has, whatever the dataset."""
    finish(tmp_path, "rw")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"group": r"^(\d)"}))
    run = finished(read_run(tmp_path))
    assert [recording for _, recording, _, _ in evidence.scores_of(run)] == [
        "0",
        "1",
    ]


def test_seeds_may_test_different_clips():
    """As they do where the seed draws them: the mean of the means of the seeds."""
    one = evidence.difference([scores(*[1] * 10), scores(*[0] * 30, first=5)])
    assert (
        one.recordings == 35 and one.points == pytest.approx(50) and (one.more, one.less) == (10, 0)
    )


def folds(*sizes_and_right: tuple[int, int]) -> evidence.Scores:
    """Folds with so many clips, of which so many are right."""
    found = {}
    for fold, (size, right) in enumerate(sizes_and_right):
        for i in range(size):
            found[fold, f"{fold}-{i}", f"{fold}-{i}", "a"] = int(i < right)
    return found


def test_an_accuracy_is_the_mean_over_folds_and_seeds():
    """Folds of 10 and 40 clips, 100 and 50 % right: 75 %, and not 30 of 50."""
    mean, low, high = evidence.accuracy([folds((10, 10), (40, 20))])
    assert mean == pytest.approx(75) and low < 75 < high
    # Clips alone: only the second fold varies, with half of the weight. 1.96 x 50 / sqrt(40) / 2
    # would be 7.7, were the number of clips of a fold not drawn as well.
    assert 60 < low < 72 and 78 < high < 90
    mean, *_ = evidence.accuracy([folds((10, 10), (40, 20)), folds((10, 5), (40, 0))])
    assert mean == pytest.approx((75 + 25) / 2)


def test_an_interval_of_seeds_contains_what_clips_and_seeds_vary():
    """Seeds that agree: 1.96 sqrt(0.2 x 0.8 / 1000) of the clips. Seeds that scatter: Student's."""
    same = scores(*[1] * 800, *[0] * 200)
    mean, low, high = evidence.accuracy([same] * 5)
    assert mean == pytest.approx(80)
    assert (low, high) == pytest.approx((80 - 2.48, 80 + 2.48), abs=0.2)
    three = [scores(*[1] * n, *[0] * (1000 - n)) for n in (700, 800, 900)]
    assert evidence.accuracy(three) == pytest.approx((80, 80 - 24.8414, 100), abs=1e-3)
    one_recording = {(1, "r", f"{i}.wav", "a"): int(i < 8) for i in range(10)}
    # Of one recording nothing can be drawn: there is Wilson's interval of one trial.
    assert evidence.accuracy([one_recording] * 2) == pytest.approx((80, *evidence.wilson(1, 1)))


def test_an_interval_of_answers_that_are_all_right():
    """It is that of one run, whether the clips lie in folds or are tested with two seeds."""
    all_right = (100, *evidence.wilson(24, 24))
    assert all_right[1] == pytest.approx(86.2, abs=0.05)
    assert evidence.accuracy([scores(*[1] * 24)] * 2) == pytest.approx(all_right)
    assert evidence.accuracy([folds((12, 12), (12, 12))]) == pytest.approx(all_right)
    # Two methods that agree on 24 clips: (1 - x)^24 = 0.05.
    same = evidence.difference([scores(*[0] * 24)])
    assert (same.low, same.high) == pytest.approx((-11.73, 11.73), abs=0.01)


# ---------------------------------------------------------------------------------- what runs leave


def finish(run, *folds: str) -> None:
    """A finished run of no matter what."""
    words = ["--dataset", "esc10", "--method", "lora", "--weights", SMALL_AST, "--seconds", 0.5]
    make_run(run, [str(word) for word in words], *folds)


def test_scores_are_of_the_finished_folds(tmp_path):
    finish(tmp_path, "rw", "ww")
    assert len(evidence.scores_of(finished(read_run(tmp_path)))) == 4
    (tmp_path / "fold2.safetensors").unlink()
    first = {(1, "0.wav", "0.wav", "bell"): 1, (1, "1.wav", "1.wav", "bell"): 0}
    assert evidence.scores_of(finished(read_run(tmp_path))) == first


def compare(*runs) -> int:
    return experiments.main(["compare", *map(str, runs)])


def test_compare_two_runs(tmp_path, capsys):
    finish(tmp_path / "a", "r" * 16, "rrrrw" * 4)
    finish(tmp_path / "b", "w" * 16, "wrrrr" * 4)
    finish(tmp_path / "c", "r" * 16, "rrrrr" * 4)
    assert compare(tmp_path / "a", tmp_path / "b") == 0
    printed = capsys.readouterr().out
    assert (
        "+50.00 [" in printed
        and "36 recordings, seeds: 1 (+50.00); right more often on 20, less on 4" in printed
    )
    assert "p = 0.0015, by Holm's correction 0.0015; the first is better\n" in printed
    assert compare(tmp_path / "b", tmp_path / "a") == 0 and "-50.00 [" in (
        printed := capsys.readouterr().out
    )
    assert "the second is better\n" in printed
    assert compare(tmp_path / "a", tmp_path / "c", tmp_path / "b") == 0
    to_c, to_b, of_seeds = capsys.readouterr().out.splitlines()
    assert to_c.endswith("p = 0.12, by Holm's correction 0.12; which is better cannot be told")
    assert to_b.endswith("p = 0.0015, by Holm's correction 0.0031; the first is better")
    assert of_seeds.startswith("With one seed")


def test_compare_all_seeds_of_two_methods(tmp_path, capsys):
    for seed, (a, b) in enumerate(
        [("r" * 20, "w" * 20), ("rrrw" * 5, "wwwr" * 5), ("w" * 20, "r" * 20)]
    ):
        finish(tmp_path / "a" / f"seed{seed}", a)
        if seed < 2:
            finish(tmp_path / "b" / f"seed{seed}", b)
    assert compare(tmp_path / "a", tmp_path / "b") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert (
        "+75.00 [" in line
        and "20 recordings, seeds: 2 (+100.00, +50.00); right more often on 15, less on 0" in line
    )
    finish(tmp_path / "c" / "seed7", "r" * 20)
    assert compare(tmp_path / "a", tmp_path / "c") == 2
    assert "have no seed in common" in capsys.readouterr().err
    assert (
        compare(tmp_path / "a" / "seed1", tmp_path / "c" / "seed7") == 0
    )  # one of each: that is what is asked for


def test_runs_that_cannot_be_compared(tmp_path, capsys):
    for name in ("a", "b"):
        finish(tmp_path / name, "rrrw")

    def error() -> str:
        assert compare(tmp_path / "a", tmp_path / "b") == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    finish(tmp_path / "b", "rrw")
    assert "these runs tested different clips, or by different labels" in error()
    finish(tmp_path / "b", "rrrw")
    (tmp_path / "b" / "split.csv").write_text("fold,split,label,path\n")
    assert "split.csv is not that of the run" in error()
    finish(tmp_path / "a", "r")
    finish(tmp_path / "b", "w")
    assert "test clips of 1 recording: nothing to compare" in error()
    assert (
        compare(tmp_path / "a") == 2 and "arguments are required: others" in capsys.readouterr().err
    )
    assert (
        compare(tmp_path / "a", tmp_path / "no") == 2
        and "is no finished run" in capsys.readouterr().err
    )


# -------------------------------------------------------------------------------- tables and claims


def test_marks_of_what_cannot_be_told_apart(tmp_path):
    plan = experiments.parse(
        ["table7", "--datasets", "demo", "--seeds", "0,1", "--out", str(tmp_path)]
    )
    rows = {
        "pfeiffer_seq": "r" * 36 + "w" * 4,
        "adapter_ffn_seq_no_residual": "r" * 33 + "w" * 7,
        "adapter_ffn_par_before": "r" * 20 + "w" * 20,
    }
    done = {
        cell: answered(letters)
        for method, letters in rows.items()
        for cell in (Cell("demo", method, seed, "demo") for seed in (0, 1))
    }
    text, records = tables.render("table7", done, plan)
    lines = {
        line.split("|")[1].strip(): line.split("|")[4].strip()
        for line in text.splitlines()
        if "|" in line
    }
    assert lines["Seq, residual"].startswith("**90.00** [") and lines["Seq, residual"][-1] == "]"
    assert lines["Seq, no residual"].startswith("_82.50_ [")
    assert lines["Seq, no residual"].endswith("] ~")
    assert lines["Par, no residual"].startswith("50.00 [") and "~" not in lines["Par, no residual"]
    assert lines["Par, residual"] == "missing"
    assert "Not compared" not in text and "Seeds more than" not in text
    assert "correction for all 2 comparisons of the table" in text
    told = {record["method"]: (record["behind the best"], record["p"]) for record in records}
    # 3 discordant clips: 2 / 2**3; 16: 2 / 2**16, twice, for there are two comparisons
    assert told["adapter_ffn_seq_no_residual"] == (pytest.approx(7.5), 0.25)
    assert told["adapter_ffn_par_before"] == pytest.approx((40, 4 / 2**16))
    assert told["pfeiffer_seq"] == (None, None)

    for cell in done:
        if cell.method == "pfeiffer_seq":
            done[cell] = answered("r" * 36 + "w" * 5)
    text, _ = tables.render("table7", done, plan)
    assert text.count("] ~") == 2  # whatever nobody has compared may be as good
    assert "Not compared: 2. these runs tested different clips" in text


def test_seeds_that_lie_far_apart_are_listed(tmp_path):
    plan = experiments.parse(
        ["table7", "--datasets", "demo", "--seeds", "0,1", "--out", str(tmp_path)]
    )
    done = {
        Cell("demo", "pfeiffer_seq", 0, "demo"): answered("r" * 40),
        Cell("demo", "pfeiffer_seq", 1, "demo"): answered("r" * 30 + "w" * 10),
        Cell("demo", "pfeiffer_par", 0, "demo"): answered("r" * 39 + "w"),
        Cell("demo", "pfeiffer_par", 1, "demo"): answered("r" * 38 + "w" * 2),
    }
    text, _ = tables.render("table7", done, plan)
    assert "\n- Seeds more than 5 points apart: Seq, residual (100.00, 75.00). " in text


def test_a_single_run_has_wilsons_interval(tmp_path):
    plan = experiments.parse(["table7", "--datasets", "demo", "--out", str(tmp_path)])
    cell = Cell("demo", "pfeiffer_seq", 0, "demo")
    text, _ = tables.render("table7", {cell: answered("r" * 81 + "w" * 182)}, plan)
    assert "30.80 [25.53, 36.62]" in text


def test_claims_are_of_cells_that_tables_and_figures_train():
    """And say in words of the paper what they stand for."""
    others = cells.cells_of(experiments.parse(["all"]))
    of_claims = cells.cells_of(experiments.parse(["claims"]))
    tables_alone = [name for name in cells.TARGETS if name != "claims"]
    of_tables = {cell for cell in of_claims if not cell.alpha}  # no table has other values of that
    assert of_tables <= set(cells.cells_of(experiments.parse(tables_alone)))
    assert set(of_claims) <= set(others) and len(set(of_claims) - of_tables) == 4 * 4
    assert {target for claim in cells.CLAIMS for target in claim.targets} <= cells.TARGETS.keys()
    demo = experiments.parse(["claims", "--datasets", "demo"])
    rows = {}
    for claim in cells.CLAIMS:
        rows[claim.sentence[:25]] = (len(claim.pairs(demo)), claim.columns(demo))
    assert len(rows) == len(cells.CLAIMS)
    assert rows["adapters and LoRA consist"] == (9 * 4, [("demo", None)])
    assert rows["adapters attain the best "] == (4, [("demo", k) for k in (1, 2, 4, 8)])
    assert rows["the parallel adapter turn"] == (4, [("demo", None)])  # in turn, not 4 x 4
    assert rows["for GSC and even more for"] == (13, [])  # of speech
    gains = next(claim for claim in cells.CLAIMS if claim.targets == ["fig3", "fig4"])
    assert gains.columns(experiments.parse(["claims"])) == [
        ("gsc", None),
        ("fsc", None),
        ("esc50", None),
    ]
    (plus, minus) = cells.terms_of(gains.pairs(demo)[1], ("demo", None), 3, demo)
    curve = {
        method: cells.budgets("demo", method, 3, "demo") for method in ("lora", "pfeiffer_par")
    }
    assert plus == [curve["lora"][-1], curve["pfeiffer_par"][0]]
    assert minus == [curve["pfeiffer_par"][-1], curve["lora"][0]]


def test_the_tasks_that_a_claim_is_about():
    """Without --datasets those of its tables; with it, no claim about speech is asked of sounds."""
    everything = experiments.parse(["claims"])
    sounds = experiments.parse(["claims", "--datasets", "esc10,gsc"])
    found = {claim.sentence[:20]: claim for claim in cells.CLAIMS}
    audio = found["the results obtained"]
    speech = found["it seems better to h"]
    both = found["Houlsby adapters and"]
    assert audio.columns(everything) == [("esc50", None), ("us8k", None)]
    assert speech.columns(everything) == [("fsc", None)]
    assert len(both.columns(everything)) == 4
    assert audio.columns(sounds) == [("esc10", None)] and speech.columns(sounds) == [("gsc", None)]


def test_the_papers_own_numbers_agree_with_its_claims():
    """Pair by pair, by the means of the table or else on every dataset: so none is the wrong way
    round. Where the paper's numbers contradict its sentences is said here."""
    wrong = []
    count = 0
    plan = experiments.parse(["claims"])
    tested = [claim for claim in cells.CLAIMS if claim.test == "better"]
    for claim, target in [(one, target) for one in tested for target in one.targets]:
        table = cells.TARGETS[target]
        rows = {words: row for row, (words, *_) in table.rows.items()}
        columns = [" ".join(map(str, filter(None, column))) for column in claim.columns(plan)]
        for pair, column in product(claim.pairs(plan), columns):
            column = "avg" if "means" in claim.where else column
            better, than = (table.numbers.get((rows.get(method), column)) for method in pair)
            if better and than:
                count += 1
                if float(better) <= float(than):
                    wrong.append((claim.where, *pair[1:], column.split()[0]))
    assert count > 400
    # DPT has the third best accuracy on US8K, and the best on GSC with 2 and with 8 clips a class.
    assert set(wrong) == {
        ("abstract; Table I", "dpt", "us8k"),
        ("abstract; Table I", "dpt", "esc50"),
        ("III-B; Table II", "dpt", "gsc"),
        ("III-B; Table II", "dpt", "esc50"),
    }


CLAIM = {"where": "Table I", "sentence": "it is", "targets": ["table1"]}
RIGHT = {
    "lora": "r" * 40,
    "dpt": "r" * 20 + "w" * 20,
    "spt": "r" * 38 + "w" * 2,
    "bitfit": "w" * 40,
}


@pytest.mark.parametrize(
    ("test", "better", "than", "verdict", "counts", "weakest"),
    [
        ("better", ["lora"], ["dpt", "bitfit"], "**holds**", "2, 0, 0", "lora over dpt"),
        ("better", ["lora"], ["dpt", "spt"], "cannot be told", "1, 0, 1", "lora over spt"),
        ("better", ["spt"], ["lora", "dpt"], "cannot be told", "1, 0, 1", "spt over lora"),
        ("better", ["dpt"], ["lora", "bitfit"], "**contradicted**", "1, 1, 0", "dpt over lora"),
        ("better", ["lora"], ["dpt", "prefix"], "missing", "1, 0, 0", "lora over dpt"),
        ("better", ["dpt"], ["lora", "prefix"], "**contradicted**", "0, 1, 0", "dpt over lora"),
        (
            "better",
            ["lora - bitfit"],
            ["dpt - bitfit"],
            "**holds**",
            "1, 0, 0",
            "lora - bitfit over dpt - bitfit",
        ),
        (
            "better",
            ["lora - lora"],
            ["lora - dpt"],
            "**contradicted**",
            "0, 1, 0",
            "lora - lora over lora - dpt",
        ),
        ("better", ["prefix"], ["lora"], "missing", "0, 0, 0", "-"),
        ("not worse", ["spt"], ["lora", "dpt"], "**holds**", "2, 0, 0", "spt over lora"),
        ("not worse", ["spt", "dpt"], ["lora"], "**contradicted**", "1, 1, 0", "dpt over lora"),
        ("not worse", ["spt"], ["prefix"], "missing", "0, 0, 0", "-"),
        ("one is better", ["dpt", "lora"], ["bitfit"], "**holds**", "2, 0, 0", "lora over bitfit"),
        ("one is better", ["bitfit", "lora"], ["dpt"], "**holds**", "1, 1, 0", "lora over dpt"),
        ("one is better", ["spt", "dpt"], ["lora"], "cannot be told", "0, 1, 1", "spt over lora"),
        ("one is not worse", ["spt", "dpt"], ["lora"], "**holds**", "1, 1, 0", "spt over lora"),
        (
            "one is better",
            ["dpt"],
            ["spt", "bitfit"],
            "**contradicted**",
            "1, 1, 0",
            "dpt over spt",
        ),
    ],
)
def test_claims(test, better, than, verdict, counts, weakest, monkeypatch):
    """What it holds by, what contradicts it, and what cannot be told: from predictions that leave
    no doubt, or little; and what has not been trained."""
    claim = cells.Claim(**CLAIM, test=test, better=better, than=than)
    for module in (cells, claims):
        monkeypatch.setattr(module, "CLAIMS", [claim])
    plan = experiments.parse(["claims", "--datasets", "demo"])
    done = {Cell("demo", method, 0, "demo"): answered(row) for method, row in RIGHT.items()}
    records, why = claims.judge(done, plan)
    text = claims.as_text(records)
    assert text["verdict"] == [verdict] and text["the weakest"] == [weakest] and not why
    assert text["pairs: yes, no, untold"] == [counts] and text["dataset"] == ["demo"]
    assert (text["points"] == ["-"]) == (weakest == "-") and text["seeds"] == [
        "-" if weakest == "-" else "1"
    ]


def test_the_pair_that_contradicts_a_claim_is_named():
    """And not one that is further below, but cannot be told."""
    place = {"test": "better", "better": "a"}
    pairs = [
        {**place, "than": "b", "holds": "cannot be told", "points": -9.0},
        {**place, "than": "c", "holds": "no", "points": -4.0},
        {**place, "than": "d", "holds": "no", "points": -3.0},
        {**place, "than": "e", "holds": "missing"},
    ]
    assert claims.verdict(pairs) == ("no", pairs[1])
    assert claims.verdict(pairs[:1] + pairs[3:]) == ("missing", pairs[0])


def test_all_pairs_of_all_claims_are_corrected_together(monkeypatch):
    """6 clips of 40 differ, 2 / 2**6 = 0.031: alone yes, beside another such pair no longer. The
    same pair twice is one."""
    plan = experiments.parse(["claims", "--datasets", "demo"])
    letters = {"lora": "r" * 40, "dpt": "r" * 34 + "w" * 6, "spt": "w" * 6 + "r" * 34}
    done = {Cell("demo", method, 0, "demo"): answered(row) for method, row in letters.items()}
    one, two = (cells.Claim(**CLAIM, better=["lora"], than=[method]) for method in ("dpt", "spt"))
    untold = ["cannot be told"] * 2
    for listed, expected in (([one], ["yes"]), ([one, one], ["yes"] * 2), ([one, two], untold)):
        monkeypatch.setattr(claims, "CLAIMS", listed)
        records, _ = claims.judge(done, plan)
        assert [record["holds"] for record in records] == expected
        differ = len({claim.than[0] for claim in listed})
        assert records[0]["corrected"] == pytest.approx(differ * 2 / 2**6)


def test_the_command_claims(here, monkeypatch, capsys):
    """Trains what the claims need, once, and says what holds and what is contradicted."""
    kept = [claim for claim in cells.CLAIMS if "Table VII" in claim.where]
    kept += [claim for claim in cells.CLAIMS if claim.tasks == "speech"][:1]
    for module in (cells, claims):
        monkeypatch.setattr(module, "CLAIMS", kept)
    right = {"pfeiffer_seq": "r" * 18 + "ww", "adapter_ffn_par_residual": "r" * 20}

    def train(folder, words):
        return make_run(folder, words, right.get(folder.parent.name, "w" * 20))

    monkeypatch.setattr(campaign, "train_cell", train)
    assert here("claims") == 0 and len(here.started) == 4
    table = table_of(here.out, "claims")
    assert table["'residuals are necessary for sequential adapters'"]["verdict"] == "**holds**"
    other = table["'they [residuals] must be avoided for parallel adapters'"]
    assert other["verdict"] == "**contradicted**" and other["where"] == "appendix C; Table VII"
    printed = capsys.readouterr().out
    assert "- Rows: 1 **holds**, 1 **contradicted**." in printed
    assert "Not asked of these datasets, because of others in kind: 'for GSC and" in printed
    assert "Not tested: 'LoRA using fewer parameters' (a count" in printed
    (file,) = (here.out / "tables").glob("claims-*.csv")
    records = list(csv.DictReader(file.read_text().splitlines()))
    assert [(r["better"], r["than"], r["points"]) for r in records] == [
        ("pfeiffer_seq", "adapter_ffn_seq_no_residual", "90.0"),
        ("adapter_ffn_par_before", "adapter_ffn_par_residual", "-100.0"),
    ]
    words = ["claims", "--methods", "adapter_ffn_par_before,adapter_ffn_par_residual"]
    assert here(*words, out="other") == 0 and len(here.started) == 6
    assert "'residuals are necessary" not in capsys.readouterr().out  # of a claim left out
    assert here("claims", "--methods", "pfeiffer_seq,adapter_ffn_par_residual") == 2
    assert "--methods: no claim compares these with one another" in capsys.readouterr().err


def test_scipy_is_asked_for_before_anything_is_trained(here, monkeypatch, capsys):
    for module in ("scipy", "scipy.stats"):
        monkeypatch.setitem(sys.modules, module, None)
    assert here("table1", "--methods", "linear") == 2 and not here.started
    assert (
        capsys.readouterr().err
        == "error: intervals need scipy: pip install -r requirements-figures.txt\n"
    )
