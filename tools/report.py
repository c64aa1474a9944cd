"""A page to look at a run and to listen to it: one file that any browser opens, also offline.

    python -m tools.report runs/demo/houlsby_par/seed0

The numbers are those of the run. The models of the run classify the clips on the page once more.
The template is report.html, with report.css and report.js. The page fetches nothing, and its own
policy forbids it to.
"""

import base64
import hashlib
import io
import shlex
import sys
from itertools import groupby, zip_longest
from pathlib import Path

import numpy as np
import soundfile
import torch

from data import HOP, RATE, WINDOW, Dataset, fbank, load_dataset, to_input
from load_weights import load_trained
from sounds.audio import read_audio
from sounds.clip import WHOLE
from support.command import (
    Parser,
    UserError,
    choose_device,
    exit_code,
    first_of,
    needed,
    positive,
    warn,
)
from support.console import balanced_accuracy, findings, is_balanced, is_fitted
from support.files import default_cache_dir, path_in, to_bytes, write_text
from support.processes import say
from support.progress import Bar
from support.records import Run, read_run
from tools.evidence import accuracy, scores_of, stats
from tools.figures import pyplot
from tools.finished import finished

HERE = Path(__file__).parent


def template():
    """The template of a page. UserError if jinja2 is not installed."""
    with needed("a report needs"):
        import jinja2
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")


# ------------------------------------------------------------------------------ the clips of a page


def interest(row: dict) -> tuple[bool, float]:
    """Sorts answers: the most confident mistakes first, then the least certain right answers."""
    is_right = row["label"] == row["prediction"]
    probability = float(row["probability"])
    return is_right, probability if is_right else -probability


def in_turn(lists) -> list[dict]:
    """The first row of each list, then the second row of each, and so on."""
    return [row for turn in zip_longest(*lists) for row in turn if row]


def evenly(rows: list[dict]) -> list[dict]:
    """The rows, one of each class in turn.

    A class gives one row of each answer in turn. The rows of an answer come by `interest`.
    """
    cells = {}
    for row in sorted(rows, key=interest):
        cells.setdefault(row["label"], {}).setdefault(row["prediction"], []).append(row)
    return in_turn(in_turn(answers.values()) for answers in cells.values())


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture_of(features: torch.Tensor, sound_frames: int) -> str:
    """Features (n_frames, n_mels) as the model reads them, of which `sound_frames` are no padding.

    Time goes to the right, low tones are below, and bright is loud. Padding is as dark as silence.
    """
    pixels = features.T.numpy().copy()
    low, high = np.quantile(pixels[:, :sound_frames], [0.01, 0.999])
    pixels[:, sound_frames:] = low
    buffer = io.BytesIO()
    pyplot().imsave(
        buffer, pixels, vmin=low, vmax=high, cmap="magma", origin="lower", format="webp"
    )
    return data_uri(buffer.getvalue(), "image/webp")


def sound_of(wave: np.ndarray) -> str:
    """Samples at 16 kHz as MP3, which every browser plays."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, RATE, format="MP3")
    return data_uri(buffer.getvalue(), "audio/mpeg")


def dataset_of(run: Run, data_dir: Path | None, cache_dir: Path) -> Dataset:
    """The dataset of a run, from where the run found it unless another folder is given.

    What has to be made or downloaded for it goes to `cache_dir`.
    """
    config = run.config
    if data_dir is None and config["data_dir"]:
        data_dir = path_in(config["data_dir"])
    source = config["group"], config["windows"], config["background"]
    return load_dataset(config["dataset"], data_dir, cache_dir, *source)


def cards_of(
    run: Run, dataset: Dataset, count: int, weights: str | None, device: torch.device
) -> list[dict]:
    """Up to `count` of the test clips, in the order of `interest`.

    A card has the picture of a clip, its sound, and the probabilities that the model of its fold
    gives it, divided by the temperature of the fold as in tools.predict.
    """
    number = {name: i for i, name in enumerate(dataset.names)}
    n_frames = run.config["n_frames"]
    samples = n_frames * HOP + WINDOW
    chosen = sorted(evenly(run.tested())[:count], key=fold_of)
    cards = []
    changed = []
    for fold, rows in groupby(Bar(chosen, "clips of the report"), fold_of):
        model = load_trained(run.file(fold), weights).to(device)
        temperature = run.folds[fold].get("calibration", {}).get("temperature", 1)
        for row in rows:
            path = row["path"]
            if path not in number:
                raise UserError(
                    f"{run.folder}: its clip {path} is not in {dataset.root}: "
                    "give the sounds it was trained on as --data-dir"
                )
            wave = wave_of(dataset, number[path], samples)
            # The model was tested on features in half precision.
            mels = fbank(torch.from_numpy(wave)[None])
            features = to_input(mels, n_frames).half().float()
            with torch.inference_mode():
                logits = model(features.to(device))[0].cpu()
            answer = run.classes.index(row["prediction"])
            if abs(logits.softmax(0)[answer] - float(row["probability"])) > 0.05:
                changed.append(path)  # a run in half precision is less off than this
            shares = (logits / temperature).softmax(0).tolist()
            told = dict(zip(run.classes, shares, strict=True))
            row = {**row, "probability": shares[answer]}
            picture = picture_of(features[0], mels.shape[1])
            sound = sound_of(wave[:samples])
            cards.append({**row, "told": told, "picture": picture, "sound": sound})
    if changed:
        warn(
            f"{len(changed)} of {len(cards)} clips ({first_of(changed)}) are not what {run.folder} "
            "has tested: did they change?"
        )
    return sorted(cards, key=interest)


def fold_of(row: dict) -> int:
    return row["fold"]


def wave_of(dataset: Dataset, i: int, samples: int) -> np.ndarray:
    """The first samples of clip `i`, and a few more, as the features of a run were made of them."""
    start, end = dataset.spans.get(i, WHOLE)
    try:
        return read_audio(dataset.paths[i], min(samples / RATE + 0.1, end - start), start)
    except ValueError as error:
        raise UserError(
            f"{dataset.paths[i]} {error}: mend it, or say where the sounds are, --data-dir"
        ) from None


# ----------------------------------------------------------------------------------------- the page


def charts_of(history: list[dict], chosen: dict[int, int], step: str = "epoch") -> list[dict]:
    """Learning curves, a line for each fold: the loss, and the validation accuracy, if any.

    chosen: {fold: the epoch that was tested}. A star marks it. `step` is what epochs are called.
    """
    plt = pyplot()
    charts = []
    titles = {"loss": "training loss (nats)", "accuracy": "validation accuracy (%)"}
    for column, title in titles.items():
        folds = {}
        for row in history:
            if row[column] != "":
                folds.setdefault(row["fold"], {})[row["epoch"]] = row[column]
        if not folds:
            continue
        figure, axis = plt.subplots(figsize=(4.5, 2.5))
        for fold, line in folds.items():
            (curve,) = axis.plot(line.keys(), line.values())
            star = {"marker": "*", "markersize": 15, "color": curve.get_color()}
            if chosen.get(fold) in line:
                axis.plot(chosen[fold], line[chosen[fold]], **star)
        axis.locator_params(axis="x", integer=True)
        axis.set(xlabel=step, ylabel=title)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
        last = ", ".join(f"{list(line.values())[-1]:.4g}" for line in folds.values())
        picture = data_uri(buffer.getvalue(), "image/svg+xml")
        charts.append({"title": title, "last": last, "picture": picture})
    return charts


def page_of(run: Run, dataset: Dataset, cards: list[dict]) -> str:
    """The whole page, as text."""
    result = run.result()
    chosen = {fold["fold"]: fold["epoch"] for fold in result["folds"]}
    step = "penalty" if is_fitted(run.config["method"]) else "epoch"
    tested = len(run.tested())
    inlined = {}
    hashes = {}
    for kind in ("css", "js"):
        inlined[kind] = (HERE / f"report.{kind}").read_text(encoding="utf-8")
        digest = hashlib.sha256(inlined[kind].encode()).digest()
        hashes[kind] = base64.b64encode(digest).decode()
    text = template().render(
        folder=shlex.quote(str(run.folder)),
        folds=list(run.folds),
        interval=accuracy([scores_of(finished(run))])[1:],
        config=run.config,
        result=result,
        tested=tested,
        cards=cards,
        classes=run.classes,
        counts=run.confusion().tolist(),
        balanced=balanced_accuracy(run, dataset) if is_balanced(run) else None,
        findings=findings(run, dataset),
        chosen=chosen,
        charts=charts_of(run.history(), chosen, step),
        step=step,
        inlined=inlined,
        hashes=hashes,
    )
    return to_bytes(text).decode("utf-8", "replace")  # names of files need not be UTF-8


def write_report(argv: list[str] | None) -> None:
    parser = Parser(
        prog="python -m tools.report",
        description="Write a page to look at a run and to listen to it, for any browser.",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the folder of a finished run, .../METHOD/seedS")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="page to write, NAME.html; default: RUN/report.html",
    )
    add("--clips", type=positive, default=200, help="show at most so many clips (%(default)s)")
    add("--data-dir", type=Path, help="folder of the dataset, if it has moved")
    add("--weights", help="weights of the backbone, if they have moved")
    # Not that of the run: a run of somebody else must not choose where files are written.
    cache_dir = default_cache_dir()
    add("--cache-dir", type=Path, default=cache_dir, help="for downloads; default: %(default)s")
    args = parser.parse_args(argv)
    template()  # missing? now, not after the work
    pyplot()
    stats()
    out = args.out or args.run / "report.html"
    if out.suffix != ".html":  # no file of a run, and no sound, has such a name
        raise UserError(f"--out {out}: the name of a page ends in .html")
    run = read_run(args.run)
    device = choose_device("auto")
    dataset = dataset_of(run, args.data_dir, args.cache_dir)
    cards = cards_of(run, dataset, args.clips, args.weights, device)
    page = page_of(run, dataset, cards)
    write_text(out, page)
    tested = f"{len(cards)} of {len(run.tested()):,} test clips"
    say(f"{out}: {tested}, {len(page) / 1e6:.1f} MB; open it in a browser")


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: write_report(argv))


if __name__ == "__main__":
    sys.exit(main())
