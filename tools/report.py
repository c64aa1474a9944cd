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
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from data import HOP, RATE, WINDOW
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
from support.files import to_bytes, write_text
from support.progress import Bar
from support.records import Run, read_run
from tools.evidence import interval, stats
from tools.figures import batched, clips_of_run

HERE = Path(__file__).parent
BUDGET = (
    14_000_000  # characters of all clips: with the rest a page has at most 15 MB, which mail takes
)
TEXT = 1_000  # characters about a clip, besides its sound and its picture
SHADES = 8  # of a cell of the confusion matrix: report.css has as many
WIDEST = 60  # classes; with more there is a list of frequent mistakes instead of a matrix
CHART = (320, 140)  # width and height of a learning curve
UNTOLD = (
    "method",
    "backbone",
    "clips",
    "cache_dir",
    "data_dir",
)  # of config.json: hashes, and whose machine it was


def libraries():
    """jinja2, PIL.Image and matplotlib's colours. UserError if one of them is not installed."""
    with needed("a report needs"):
        import jinja2
        from matplotlib import colormaps
        from PIL import Image
    return jinja2, Image, colormaps


# ------------------------------------------------------------------------------ the clips of a page


def interest(row: dict) -> tuple[bool, float]:
    """Sorts answers: the most confident mistakes first, then the least certain right answers."""
    is_right = row["label"] == row["prediction"]
    probability = float(row["probability"])
    return is_right, probability if is_right else -probability


def in_turn(lists: Iterable[list]) -> list:
    """The first of each, then the second of each, and so on."""
    lists = list(lists)
    return [one[i] for i in range(max(map(len, lists))) for one in lists if i < len(one)]


def evenly(rows: list[dict]) -> list[dict]:
    """The rows, one of each class in turn.

    Of a class there is one of each answer in turn. The rows of an answer come by `interest`.
    """
    cells = {}
    for row in sorted(rows, key=interest):
        cells.setdefault(row["label"], {}).setdefault(row["prediction"], []).append(row)
    return in_turn(in_turn(of_class.values()) for of_class in cells.values())


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture_of(features: torch.Tensor) -> str:
    """Features (n_frames, n_mels) as the model reads them.

    Time goes to the right, low tones are below, and bright is loud.
    """
    _, image, colormaps = libraries()
    shown = features.T.flip(0).numpy()  # (n_mels, n_frames)
    low, high = np.quantile(shown, [0.01, 0.999])
    colours = colormaps["magma"](((shown - low) / max(high - low, 1e-6)).clip(0, 1), bytes=True)[
        ..., :3
    ]
    buffer = io.BytesIO()
    image.fromarray(np.ascontiguousarray(colours)).save(buffer, "webp", quality=80)
    return data_uri(buffer.getvalue(), "image/webp")


def sound_of(wave: np.ndarray) -> str:
    """Samples at 16 kHz as MP3, which every browser plays."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, wave, RATE, format="MP3")
    return data_uri(buffer.getvalue(), "audio/mpeg")


def cards_of(
    run: Run,
    count: int,
    data_dir: Path | None,
    cache_dir: Path | None,
    weights: str | None,
    device: torch.device,
) -> list[dict]:
    """Up to `count` of the test clips, as many as BUDGET allows, in the order of `interest`.

    Each has its picture, its sound, and the probabilities that the model of its fold gives it.
    """
    dataset, clips, _ = clips_of_run(run, data_dir, cache_dir)
    number = {name: i for i, name in enumerate(dataset.names)}
    heard = (run.config["n_frames"] * HOP + WINDOW) / RATE
    room = BUDGET
    cards = []
    for row in Bar(evenly(run.tested())[:count], "clips of the report"):
        i = number[row["path"]]
        start, end = dataset.spans.get(i, WHOLE)
        try:
            wave = read_audio(dataset.paths[i], min(heard, end - start), start)
        except ValueError as error:
            raise UserError(
                f"{dataset.paths[i]} {error}: mend it, or say where the sounds are, --data-dir"
            ) from None
        features, _ = clips.batch(torch.tensor([i]), torch.device("cpu"))  # which checks them
        card = {**row, "clip": i, "picture": picture_of(features[0]), "sound": sound_of(wave)}
        room -= len(card["picture"]) + len(card["sound"]) + TEXT
        if room < 0:
            break
        cards.append(card)
    off = []
    for fold in run.folds:
        mine = [card for card in cards if card["fold"] == fold]
        if not mine:
            continue
        model = load_trained(run.file(fold), weights).to(device)
        logits = batched(model, clips, [card["clip"] for card in mine], device)
        for card, row in zip(mine, logits.softmax(1).tolist(), strict=True):
            card["told"] = dict(zip(dataset.classes, row, strict=True))
            difference = card["told"][card["prediction"]] - float(card["probability"])
            if abs(difference) > 0.05:  # half precision is less off than this
                off.append(card["path"])
    if off:
        warn(
            f"{len(off)} of {len(cards)} clips ({first_of(off)}) are not what {run.folder} has "
            "tested: did they change?"
        )
    return sorted(cards, key=interest)


# ----------------------------------------------------------------------------------------- the page


def matrix_of(counts: np.ndarray, classes: list[str]) -> list[tuple[str, list[tuple]]]:
    """The confusion matrix `counts`, (classes, classes), as a list of cells for each true class.

    A cell is an answer, how many clips got it, and the cell's shade.
    """
    shades = np.ceil(SHADES * counts / counts.sum(1, keepdims=True).clip(1)).astype(int)
    return [
        (name, list(zip(classes, counts[k].tolist(), shades[k].tolist(), strict=True)))
        for k, name in enumerate(classes)
    ]


def mistakes_of(matrix: list[tuple[str, list[tuple[str, int, int]]]]) -> list[tuple[str, str, int]]:
    """The most frequent ones: true class, answer, how many clips."""
    wrong = [
        (label, answer, n)
        for label, cells in matrix
        for answer, n, _ in cells
        if n and label != answer
    ]
    return sorted(wrong, key=lambda cell: -cell[2])[:WIDEST]


def settings_of(config: dict, result: dict) -> dict:
    """What a reader may want to know of how it was trained."""
    method = {
        f"part {i}": ", ".join(f"{name} {value}" for name, value in part.items() if name != "part")
        for i, part in enumerate(config["method"]["parts"], 1)
    }
    if "blocks" in config["method"]:
        method["blocks"] = "{}-{}".format(*config["method"]["blocks"])
    chosen = {
        name: value for name, value in config.items() if value is not None and name not in UNTOLD
    }
    count = result["parameters"]
    trained = {"parameters trained": f"{count['petl']:,}", "and in the head": f"{count['head']:,}"}
    return {**method, **chosen, **trained, "seconds": result["seconds"], **result["versions"]}


def charts_of(metrics: list[dict]) -> list[dict]:
    """Learning curves of every fold as SVG paths: the loss and the validation accuracy, if any."""
    width, height = CHART
    charts = []
    titles = {"loss": "training loss (nats)", "accuracy": "validation accuracy (%)"}
    for column, title in titles.items():
        folds = {}
        for row in metrics:
            if row[column] != "":
                folds.setdefault(row["fold"], []).append(float(row[column]))
        if not folds:
            continue
        lines = list(folds.values())
        low = min(map(min, lines))
        high = max(map(max, lines))
        epochs = max(map(len, lines))
        paths = []
        for line in lines:
            points = []
            for i, value in enumerate(line):
                x = width * i / max(epochs - 1, 1)
                y = height * (high - value) / (high - low or 1)
                points.append(f"{x:.1f},{y:.1f}")
            paths.append("M" + " ".join(points))
        chart = {"title": title, "low": f"{low:.4g}", "high": f"{high:.4g}", "epochs": epochs}
        chart["paths"] = paths
        chart["last"] = ", ".join(f"{line[-1]:.4g}" for line in lines)
        charts.append(chart)
    return charts


def page_of(run: Run, cards: list[dict]) -> str:
    """The whole page, as text."""
    result = run.result()
    tested = len(run.tested())
    jinja2, _, _ = libraries()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    inlined = {
        kind: (HERE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")
    }
    hashes = {
        kind: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for kind, text in inlined.items()
    }
    low, high = interval([fold["accuracy"] for fold in result["folds"]], tested)
    matrix = matrix_of(run.confusion(), run.classes)
    text = environment.get_template("report.html").render(
        run=shlex.quote(str(run.folder)),
        fold=result["folds"][0]["fold"],
        low=low,
        high=high,
        width=CHART[0],
        height=CHART[1],
        settings=settings_of(run.config, result),
        config=run.config,
        result=result,
        scores=result["scores"],
        tested=tested,
        cards=cards,
        matrix=matrix,
        mistakes=mistakes_of(matrix) if len(matrix) > WIDEST else [],
        charts=charts_of(run.history()),
        inlined=inlined,
        hashes=hashes,
    )
    return to_bytes(text).decode("utf-8", "replace")  # names of files need not be UTF-8


def write_report(argv: list[str] | None) -> None:
    parser = Parser(
        prog="python -m tools.report",
        description="Write a page to look at a run and listen to it: one file, for any browser.",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the folder of a finished run, .../METHOD/seedS")
    add("--out", type=Path, metavar="FILE", help="where the page goes; default: RUN/report.html")
    add(
        "--clips",
        type=positive,
        default=200,
        metavar="N",
        help="how many clips it shows at most (%(default)s)",
    )
    add("--data-dir", type=Path, help="where its dataset is now, if not where the run says")
    add("--weights", help="where its backbone is now, if not where the run says")
    add("--cache-dir", type=Path, help="for downloads and features; default: that of the run")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    libraries()  # missing? now, not after the work
    stats()
    device = choose_device(args.device)
    out = args.out or args.run / "report.html"
    if out.is_dir():
        raise UserError(f"{out} is a folder: --out is the name of a file")
    run = read_run(args.run)
    cards = cards_of(run, args.clips, args.data_dir, args.cache_dir, args.weights, device)
    page = page_of(run, cards)
    write_text(out, page)
    size = f"{len(page) / 1e6:.1f} MB"
    tested = f"{len(cards)} of {len(run.tested()):,} test clips"
    print(f"{out}: {tested}, {size}; open it in a browser")


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: write_report(argv))


if __name__ == "__main__":
    sys.exit(main())
