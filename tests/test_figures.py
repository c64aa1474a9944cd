"""The figures of campaigns."""

import csv
import sys

from tools import figures


def test_figures_of_a_campaign(here):
    assert here("fig3", "--methods", "dpt,full_ft") == 0
    (png,), (svg,) = ((here.out / "figures").glob(f"fig3-*.{kind}") for kind in ("png", "svg"))
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


def test_matplotlib_is_asked_for_before_anything_is_trained(here, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert here("table1", "fig3", "--methods", "full_ft") == 2
    expected = "error: figures need matplotlib: pip install -r requirements-figures.txt\n"
    assert capsys.readouterr().err == expected
    assert not here.started
