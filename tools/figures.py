"""The figures of tools/experiments.py: numbers or finished runs in, PNG and SVG out.

Above is what draws, below what reads a run. The colours are those of Okabe and Ito, which
colour-blind eyes tell apart, without their yellow, which vanishes on paper. Markers and lines
differ as well, so that nothing depends on colour.
"""

from pathlib import Path

import numpy as np
import torch

from data import Clips, Dataset, load_clips, load_dataset
from load_weights import load_trained
from support.command import Parser, UserError, choose_dtype, first_of, needed
from support.files import whole_file
from support.progress import Bar
from support.records import Run, read_run
from support.speed import autocast
from tools.answers import printable
from tools.evidence import interval

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "*"]
LINES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1))]
GRID = {"color": "#dddddd", "linewidth": 0.6}


def pyplot():
    """matplotlib.pyplot, set up for files. UserError if it or scikit-learn is not installed."""
    with needed("figures need"):
        import matplotlib
        import sklearn.manifold  # noqa: F401
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "0", "axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update(dict.fromkeys(("font.size", "axes.titlesize", "figure.titlesize"), 9))
    return plt


def save(figure, path: Path) -> None:
    """As `path`.png and `path`.svg."""
    for kind, metadata in {
        "png": {},
        "svg": {"Date": None},
    }.items():  # no date: the same numbers give the same file
        with whole_file(path.with_name(f"{path.name}.{kind}")) as temporary:
            figure.savefig(temporary, format=kind, dpi=200, bbox_inches="tight", metadata=metadata)
    pyplot().close(figure)
    print(f"written to {path}.png and .svg", flush=True)


def plain(text: str) -> str:
    """A name as matplotlib can show it: all of it is text, and its dollars begin no formula."""
    return printable(text).replace("$", r"\$")


def draw_curves(
    panels: dict[str, dict[str, list[tuple[int, float, float, float]]]], path: Path
) -> None:
    """Accuracy against trained parameters.

    panels: {panel: {curve: [(parameters, accuracy in %, low, high)]}}, the ends of its interval.
    The curve "Full FT" is one point far to the right. It is drawn as a dashed line at its height,
    with a band for its interval.
    """
    figure, axes = pyplot().subplots(
        1, len(panels), figsize=(1.6 + 3.4 * len(panels), 3.4), squeeze=False
    )
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        for i, (name, points) in enumerate(curves.items()):
            x, y, low, high = np.array(sorted(points)).T
            if name == "Full FT":
                axis.axhspan(low[0], high[0], color="#666666", alpha=0.12, linewidth=0)
                axis.axhline(
                    y[0], color="#666666", linestyle=(0, (6, 3)), linewidth=1.2, label=name
                )
                title += f" ({name} trains {x[0]:,.0f} parameters)"
            else:
                style = {
                    "color": COLOURS[i % 7],
                    "marker": MARKERS[i % 10],
                    "linestyle": LINES[i % 6],
                }
                bars = np.clip([y - low, high - y], 0, None)  # equal runs have none, up to rounding
                axis.errorbar(
                    x,
                    y,
                    bars,
                    label=name,
                    markersize=5,
                    linewidth=1.4,
                    elinewidth=0.8,
                    capsize=2,
                    **style,
                )
        axis.set(
            xscale="log",
            title=title,
            xmargin=0.06,
            ymargin=0.12,
            ylabel="test accuracy (%), 95 % interval",
            xlabel="trained parameters (final LayerNorm and head apart)",
        )
        axis.grid(which="major", **GRID)
    legend_below(figure, axes[0], ncol=5)
    save(figure, path)


def draw_tsne(
    panels: dict[str, np.ndarray], labels: list[int], classes: list[str], kinds: list[str], path
) -> None:
    """Tokens of test clips in the plane by t-SNE (van der Maaten and Hinton, 2008).

    panels: a column for each title, tokens (clips, kinds, dim). There is a row for each of `kinds`.
    labels: (clips,).
    """
    plt = pyplot()
    from sklearn.manifold import TSNE

    shown = sorted(set(labels))
    labels = np.array(labels)
    perplexity = min(30, (len(labels) - 1) / 3)
    figure, axes = plt.subplots(
        len(kinds),
        len(panels),
        squeeze=False,
        figsize=(2.4 * len(panels) + 0.3, 2.4 * len(kinds) + 0.3),
    )
    for column, (title, tokens) in enumerate(panels.items()):
        for row, kind in enumerate(kinds):
            plane = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(
                tokens[:, row]
            )
            axis = axes[row][column]
            for i, k in enumerate(shown):
                axis.scatter(
                    *plane[labels == k].T,
                    s=11,
                    c=COLOURS[i % 7],
                    marker=MARKERS[i % 10],
                    linewidths=0,
                    alpha=0.85,
                    label=plain(classes[k]),
                )
            axis.spines[:].set_visible(True)
            names = {
                "title": "" if row else title,
                "ylabel": "" if column else f"t-SNE of the {kind}",
            }
            axis.set(xticks=[], yticks=[], **names)
    legend_below(figure, axes[0][:1], ncol=5, markerscale=2)
    save(figure, path)


def legend_below(figure, axes, **style) -> None:
    """One legend beneath all panels, each name once."""
    entries = {
        name: handle
        for axis in axes
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.tight_layout()
    figure.legend(
        entries.values(),
        entries,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        frameon=False,
        **style,
    )


def draw_confusion(counts: np.ndarray, classes: list[str], title: str, path: Path) -> None:
    """counts: (classes, classes). A row is a true class, a column a predicted class.

    Numbers are printed up to 20 classes.
    """
    plt = pyplot()
    n = len(classes)
    from sklearn.metrics import ConfusionMatrixDisplay

    size, font = (2.5 + 0.28 * n, 8) if n <= 20 else (2.5 + 0.17 * n, 6)
    figure, axis = plt.subplots(figsize=(size, size))
    names = [plain(name) for name in classes]
    shown = ConfusionMatrixDisplay(
        100 * counts / counts.sum(1, keepdims=True).clip(1), display_labels=names
    )
    shown.plot(
        ax=axis,
        cmap="Blues",
        include_values=n <= 20,
        text_kw={"fontsize": 7},
        xticks_rotation="vertical",
        im_kw={"vmin": 0, "vmax": 100},
        colorbar=False,
    )
    for text, count in zip(shown.text_.flat, counts.flat, strict=True) if n <= 20 else ():
        text.set_text(count or "")  # the colours are percent
    axis.set(xlabel="predicted class", ylabel="true class", title=title)
    axis.tick_params(labelsize=font)
    figure.colorbar(shown.im_, fraction=0.046, pad=0.03, label="% of the clips of the true class")
    save(figure, path)


def draw_history(rows: list[dict], title: str, path: Path) -> None:
    """Training loss and validation accuracy, if there is one, after every epoch.

    rows: those of metrics.csv.
    """
    labels = {"loss": "training loss (nats)", "accuracy": "validation accuracy (%)"}
    labels = {column: label for column, label in labels.items() if any(row[column] for row in rows)}
    figure, axes = pyplot().subplots(1, len(labels), figsize=(3.6 * len(labels), 3), squeeze=False)
    folds = {row["fold"]: None for row in rows}
    for axis, colour, (column, label) in zip(axes[0], COLOURS, labels.items(), strict=False):
        lines = [[float(row[column]) for row in rows if row["fold"] == fold] for fold in folds]
        for line in lines:
            axis.plot(
                range(1, 1 + len(line)),
                line,
                ".-",
                color=colour,
                alpha=0.6,
                linewidth=0.8,
                label="one fold",
            )
        if len(lines) > 1:
            mean = np.mean([line[: min(map(len, lines))] for line in lines], axis=0)
            axis.plot(
                range(1, 1 + len(mean)),
                mean,
                color="black",
                linewidth=1.8,
                label="mean of the folds",
            )
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(**GRID)
    figure.suptitle(title)
    legend_below(figure, axes[0], ncol=2)
    save(figure, path)


# ------------------------------------------------------------------------------------ finished runs


def clips_of_run(
    run: Run, data_dir: Path | None, cache_dir: Path | None
) -> tuple[Dataset, Clips, dict[int, list[int]]]:
    """The dataset of a run, clips with their features, and the test clips of each fold as indices.

    Raises UserError if the clips that it tested are not found, or for other classes.
    """
    config = run.config
    cache_dir = cache_dir or Path(config["cache_dir"])
    data_dir = data_dir or (config["data_dir"] and Path(config["data_dir"]))
    source = config["group"], config["windows"]
    dataset = load_dataset(config["dataset"], data_dir, cache_dir, *source)
    index = {name: i for i, name in enumerate(dataset.names)}
    tested = run.clips("test")
    missing = [row["path"] for row in tested if row["path"] not in index]
    mend = "give the sounds it was trained on as --data-dir"
    if missing:
        clips = f"{len(missing)} of its test clips ({missing[0]}, ...)"
        raise UserError(f"{run.folder}: {clips} are not in {dataset.root}: {mend}")
    # The models answer with the number of a class, which one more class before it changes.
    if run.classes != dataset.classes:
        other = first_of(sorted({*run.classes} ^ {*dataset.classes}))
        raise UserError(
            f"{run.folder} has other classes than {dataset.root} has now ({other}): {mend}"
        )
    cpu = torch.device("cpu")
    clips, _ = load_clips(dataset, config["n_frames"], cpu, cache_dir, skip_bad=True)
    tests = {fold: [] for fold in run.folds}
    for row in tested:
        tests[int(row["fold"])].append(index[row["path"]])
    return dataset, clips, tests


@torch.inference_mode()
def batched(forward, clips: Clips, chosen: list[int], device: torch.device) -> torch.Tensor:
    """`forward` of the chosen clips, in batches on `device`. The outputs are on the CPU."""
    outputs = []
    for index in Bar(torch.tensor(chosen).split(32), "clips", unit="batch"):
        x, _ = clips.batch(index, device)
        with autocast(device, choose_dtype("auto", device)):
            outputs.append(forward(x).float().cpu())
    return torch.cat(outputs)


def draw_tokens(
    runs: dict[str, Path], path: Path, data_dir: Path | None, cache_dir: Path, device: torch.device
) -> None:
    """Figure 2: test clips of ten classes as the models of {title: run} see them.

    All runs have the same first fold.

    [CLS] as in the paper, and the mean of all tokens, which the head reads.
    """
    panels = {}
    first = read_run(next(iter(runs.values())))
    dataset, clips, tests = clips_of_run(first, data_dir, cache_dir)
    fold, test = next(iter(tests.items()))
    classes = sorted({dataset.labels[i] for i in test})[:10]  # as many as in the paper
    chosen = []
    for k in classes:
        chosen += [i for i in test if dataset.labels[i] == k][:50]
    for title, folder in runs.items():
        model = load_trained(folder / f"fold{fold}.safetensors").to(device)

        def both(x, model=model):
            tokens = model.features(x)
            return torch.stack([tokens[:, 0], tokens.mean(1)], dim=1)  # (batch, 2, dim)

        panels[title] = batched(both, clips, chosen, device).numpy()
    labels = [dataset.labels[i] for i in chosen]
    draw_tsne(panels, labels, dataset.classes, ["[CLS] token", "mean of all tokens"], path)


def plot(argv: list[str]) -> None:
    """The command `plot`: confusion matrix and learning curves of a run, into its folder."""
    parser = Parser(
        prog="python -m tools.experiments plot",
        description="Draw the confusion matrix and the learning curves of a run.",
    )
    help_ = "the folder of a finished run, .../METHOD/seedS"
    parser.add_argument("run", type=Path, metavar="RUN", help=help_)
    args = parser.parse_args(argv)
    pyplot()  # missing? now, not after the work
    run = read_run(args.run)
    rows = run.tested()
    accuracies = [fold["accuracy"] for fold in run.result()["folds"]]
    config = run.config
    title = f"{config['method']['name']} on {config['dataset']}, seed {config['seed']}"
    low, high = interval(accuracies, len(rows))
    score = f"{np.mean(accuracies):.2f} % [{low:.2f}, {high:.2f}] of {len(rows):,} test clips"
    draw_confusion(run.confusion(), run.classes, f"{title}: {score}", args.run / "confusion")
    draw_history(run.history(), title, args.run / "curves")
