"""The figures of campaigns, and of a single run."""

import csv
import json
import sys

import pytest
from helpers import make_esc50

from support.scores import mistakes
from tools import experiments, figures


def test_figures_of_a_campaign(here):
    assert here("fig2", "fig3", "--methods", "dpt,full_ft,linear") == 0
    for stem in ("fig2-*", "fig3-*"):
        (png,), (svg,) = ((here.out / "figures").glob(f"{stem}.{kind}") for kind in ("png", "svg"))
        assert png.read_bytes()[:4] == b"\x89PNG" and b"</svg>" in svg.read_bytes()
    (file,) = (here.out / "figures").glob("fig3-*.csv")
    records = list(csv.DictReader(file.read_text().splitlines()))
    dpt = [int(r["trained"]) for r in records if r["curve"] == "DPT"]
    assert len(dpt) >= 3 and dpt == sorted(set(dpt)) and records[-1]["curve"] == "Full FT"


def test_error_bars_are_intervals(monkeypatch, tmp_path):
    """Also where all runs are equal and rounding puts the mean beside its interval."""
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure.axes[0]))
    curve = [(200, 80.0, 79.0, 82.0), (100, 70.0, 70.0 + 1e-12, 70.0)]
    figures.draw_curves({"demo": {"LoRA": curve, "Full FT": [(9000, 90.0, 85.0, 95.0)]}}, tmp_path / "fig")
    ((_, _, (bars,)),) = drawn[0].containers
    segments = [segment.tolist() for segment in bars.get_segments()]
    assert segments == [[[100, 70], [100, 70]], [[200, 79], [200, 82]]]
    (band,) = drawn[0].patches
    assert (band.get_y(), band.get_height()) == (85, 10)


def test_plot_of_a_run(here, cache_dir, monkeypatch, capsys):
    """All folds in one matrix, whose diagonal is the accuracy that train.py reported."""
    assert here("table1", "--methods", "full_ft", "--epochs", "3", "--", "--folds", "1,3") == 0
    (run,) = here.started
    counted = []
    original = figures.draw_confusion
    monkeypatch.setattr(figures, "draw_confusion", lambda first, *rest: counted.append(first) or original(first, *rest))
    drawn, draw = [], figures.draw_mistakes
    monkeypatch.setattr(figures, "draw_mistakes", lambda first, *rest: drawn.append(first) or draw(first, *rest))
    assert experiments.main(["plot", str(run)]) == 0  # it finds the sounds where the run did
    (counts,) = counted
    assert counts.sum() == 40 and (counts.sum(1) == 4).all()  # 2 folds, 10 classes, 2 clips of each
    accuracy = json.loads((run / "result.json").read_text())["accuracy"]
    assert 100 * counts.trace() / 40 == pytest.approx(accuracy)
    rows = [row for row in csv.DictReader((run / "predictions.csv").read_text().splitlines()) if row["part"] == "test"]
    wrong = [row for row in rows if row["label"] != row["prediction"]]
    assert [row["path"] for row in drawn[0]] == [row["path"] for row in mistakes(wrong)] and len(drawn[0]) == 5
    for name in ("confusion", "curves", "mistakes"):
        assert (run / f"{name}.png").exists() and (run / f"{name}.svg").exists()
    capsys.readouterr()
    other = make_esc50(run / "other")
    assert experiments.main(["plot", str(run), "--data-dir", str(other)]) == 2
    assert "of its test clips (audio/" in capsys.readouterr().err


def test_matplotlib_is_asked_for_before_anything_is_trained(here, monkeypatch, capsys):
    for module in ("matplotlib", "sklearn.manifold"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            assert here("table1", "fig3", "--methods", "full_ft") == 2
            name = module.partition(".")[0]
            expected = f"error: figures need {name}: pip install -r requirements-figures.txt\n"
            assert capsys.readouterr().err == expected
    assert not here.started
