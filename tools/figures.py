"""Figures 3 and 4 of the paper, accuracy against trained parameters, as PNG and SVG.

The colours are those of Okabe and Ito, which colour-blind eyes tell apart, without their yellow,
which vanishes on paper. Markers differ as well, so that nothing depends on colour.
"""

from pathlib import Path

import numpy as np

from support.command import needed
from support.files import whole_file
from support.processes import say

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "os^DvPX"
GREY = "#666666"


def pyplot():
    """matplotlib.pyplot, set up for files. UserError if it is not installed."""
    with needed("figures need"):
        import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.rc("font", size=9)
    lines = plt.cycler(linestyle=["-", "--"])
    plt.rc("axes", prop_cycle=lines * plt.cycler(color=COLOURS, marker=MARKERS))
    plt.rc("axes.spines", top=False, right=False)
    plt.rc("svg", hashsalt="0")  # with no date, the same numbers give the same file
    return plt


def save(figure, path: Path) -> None:
    """As `path`.png and `path`.svg."""
    for kind in ("png", "svg"):
        with whole_file(path.with_name(f"{path.name}.{kind}")) as temporary:
            figure.savefig(temporary, format=kind, dpi=200, metadata={"Date": None})
    say(f"written to {path}.png and .svg")


def draw_curves(
    panels: dict[str, dict[str, list[tuple[int, float, float, float]]]], path: Path
) -> None:
    """Accuracy against trained parameters.

    panels: {panel: {curve: [(parameters, accuracy in %, low, high)]}}, the ends of its interval.
    The curve "Full FT" is one point far to the right. It is drawn as a dashed line at its height,
    with a band for its interval.
    """
    plt = pyplot()
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5 * len(panels), 4.4), squeeze=False, layout="constrained"
    )
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        for name, points in curves.items():
            x, y, low, high = np.array(sorted(points)).T
            if name == "Full FT":
                axis.axhspan(low[0], high[0], color=GREY, alpha=0.12, linewidth=0)
                label = f"{name} ({x[0]:,.0f} parameters)"
                axis.axhline(y[0], color=GREY, linestyle="--", label=label)
            else:
                bars = np.clip([y - low, high - y], 0, None)  # equal runs have none, up to rounding
                axis.errorbar(x, y, bars, label=name, capsize=2)
        axis.set(
            xscale="log",
            title=title,
            xlabel="trained parameters (final LayerNorm and head apart)",
            ylabel="test accuracy (%), 95 % interval",
        )
        axis.grid(color="#dddddd")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False)
    save(figure, path)
    plt.close(figure)
