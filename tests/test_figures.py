"""The figures of campaigns, and of a single run."""

import csv
import json
import sys

import numpy as np
import pytest

from tools import experiments, figures
from tools.evidence import interval


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
    figures.draw_curves(
        {"demo": {"LoRA": curve, "Full FT": [(9000, 90.0, 85.0, 95.0)]}}, tmp_path / "fig"
    )
    ((_, _, (bars,)),) = drawn[0].containers
    segments = [segment.tolist() for segment in bars.get_segments()]
    assert segments == [[[100, 70], [100, 70]], [[200, 79], [200, 82]]]
    (band,) = drawn[0].patches
    assert (band.get_y(), band.get_height()) == (85, 10)


def test_plot_of_a_run(here, cache_dir, monkeypatch, capsys):
    """All folds in one matrix, whose diagonal is the accuracy that train.py reported; its interval
    is over folds."""
    assert here("table1", "--methods", "full_ft", "--epochs", "3", "--", "--folds", "1,3") == 0
    (run,) = here.started
    counted = []
    original = figures.draw_confusion
    monkeypatch.setattr(
        figures, "draw_confusion", lambda *told: counted.append(told) or original(*told)
    )
    assert experiments.main(["plot", str(run)]) == 0
    ((counts, _, title, _),) = counted
    assert counts.sum() == 40 and (counts.sum(1) == 4).all()  # 2 folds, 10 classes, 2 clips of each
    result = json.loads((run / "result.json").read_text())
    assert 100 * counts.trace() / 40 == pytest.approx(result["accuracy"])
    low, high = interval(
        [fold["accuracy"] for fold in result["folds"]], 40
    )  # as on the page of the run
    assert title.endswith(f": {result['accuracy']:.2f} % [{low:.2f}, {high:.2f}] of 40 test clips")
    for name in ("confusion", "curves"):
        assert (run / f"{name}.png").exists() and (run / f"{name}.svg").exists()


def test_names_are_no_formulas_and_need_not_be_text(tmp_path):
    """A Latin-1 byte, and what matplotlib would set as mathematics."""
    names = ["caf\udce9", "$x^^$", "a_b"]
    assert [figures.plain(name) for name in names] == [r"caf\xe9", r"\$x^^\$", "a_b"]
    figures.draw_confusion(np.eye(3, dtype=int), names, "three classes", tmp_path / "confusion")
    tokens = np.random.default_rng(0).standard_normal((12, 1, 4))
    figures.draw_tsne({"LoRA": tokens}, [0, 1, 2] * 4, names, ["[CLS] token"], tmp_path / "tokens")
    assert {file.name for file in tmp_path.glob("*.png")} == {"confusion.png", "tokens.png"}


def test_matplotlib_is_asked_for_before_anything_is_trained(here, monkeypatch, capsys):
    for module in ("matplotlib", "sklearn.manifold"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            assert here("table1", "fig3", "--methods", "full_ft") == 2
            name = module.partition(".")[0]
            expected = f"error: figures need {name}: pip install -r requirements-figures.txt\n"
            assert capsys.readouterr().err == expected
    assert not here.started
