"""Compare ways to say how sure an answer is, on sounds never trained on.

    python -m tools.confidence                  # the demo
    python -m tools.confidence --esc10 ESC-50   # and ESC-10, three of its classes left out

Everything is fitted on validation clips. Foreign sounds are of no class: 68 other kinds for the
demo, and the classes left out. A finished run is not trained again.
"""

import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch

import train
from data import fbank, load_dataset, to_input
from load_weights import load_trained
from sounds import synth
from sounds.audio import read_audio
from support import calibration
from support.command import Parser, exit_code
from support.files import csv_of, default_cache_dir, write_text

LEFT_OUT = ("dog", "rain", "helicopter")  # of ESC-10
COLUMNS = ("AUROC right", "AUROC foreign", "kept", "wrong", "foreign", "noise", "silence")
TITLE = """# How sure an answer is

Written by `python -m tools.confidence`, all in percent. AUROC: of right against wrong answers, and
of test clips against foreign sounds. Then the limit at which nine of ten right validation answers
stay: right test answers that are kept, and wrong ones, foreign sounds, noise and silence refused.
"""


def esc10(data_dir: Path, folder: Path) -> list[np.ndarray]:
    """Write clips.csv of ESC-10 without three classes. Returns the clips of these classes."""
    dataset = load_dataset("esc10", data_dir, folder)
    rows = [("path", "label", "split")]
    foreign = []
    for part, clips in vars(dataset.folds[1]).items():
        for i in clips:
            name = dataset.classes[dataset.labels[i]]
            if name in LEFT_OUT:
                foreign.append(read_audio(dataset.paths[i]))
            else:
                rows.append((dataset.paths[i].resolve(), name, part))
    write_text(folder / "clips.csv", csv_of(rows))
    return foreign


@torch.inference_mode()
def answers_to(model, waves) -> tuple[torch.Tensor, ...]:
    """Logits (clips, classes), middles (clips, 2 dim) and vectors (clips, dim), in float64."""
    found = []
    for wave in waves:
        x = to_input(fbank(torch.from_numpy(wave.astype(np.float32))), model.config.n_frames)
        middle, vector = calibration.middle_and_vector(model, x[None])
        found.append((model.head(vector), middle, vector))
    return tuple(calibration.finite(torch.cat(rows)) for rows in zip(*found, strict=True))


def confidences(answers: dict[str, tuple], labels: torch.Tensor) -> dict[str, dict]:
    """Ways to be sure: for each the confidences (clips,) of every part, higher is surer.

    `answers` are of `answers_to`, for "val" and other parts. `labels` are of the validation clips.
    """
    logits, middles, vectors = answers["val"]
    kept = calibration.Calibration(**calibration.fit(logits, labels, middles))
    of_head = calibration.Calibration(**calibration.fit(logits, labels, vectors))
    ways = {}
    for part, (logits, middles, vectors) in answers.items():
        if part == "val":  # each fifth is measured by the others
            scores = calibration.scores_of_parts(logits, middles)
            scores_of_head = calibration.scores_of_parts(logits, vectors)
        else:
            scores = kept.score(logits, middles)
            scores_of_head = of_head.score(logits, vectors)
        p = (logits / kept.temperature).softmax(1).amax(1)
        by_middle = calibration.factor(scores, kept.limit, kept.slope)
        by_head = calibration.factor(scores_of_head, of_head.limit, of_head.slope)
        for way, numbers in (
            ("largest probability", p),
            ("ViM of the middle alone", -scores),
            ("probability, lowered by ViM of the head's vector", p * by_head),
            ("**probability, lowered by ViM of the middle**", p * by_middle),
        ):
            ways.setdefault(way, {})[part] = numbers
    return ways


def auroc(higher: torch.Tensor, lower: torch.Tensor) -> float:
    """How often a number of `higher` is above one of `lower`, in percent. Equal ones count half."""
    return 50 * ((higher[:, None] - lower).sign() + 1).mean().item()


def measure(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[float]:
    """The numbers of COLUMNS. `right` says which answers to "val" and "test" are right."""
    least = calibration.tenth(found["val"][right["val"]])
    test = found["test"][right["test"]]
    wrong = found["test"][~right["test"]]
    row = [auroc(test, wrong), auroc(found["test"], found["foreign"])]
    row.append(100 * (test >= least).double().mean().item())
    for some in (wrong, found["foreign"], found["noise"], found["silence"]):
        row.append(100 * (some < least).double().mean().item())
    return row


def compare(args, name: str, foreign: list, method: str, table: Path | None = None) -> str:
    """Train by a method, and return a table of all ways."""
    dataset = "csv" if table else "demo"
    out = args.out / name.replace(" ", "_")
    words = ["--dataset", dataset, "--method", method, "--weights", "demo", "--no-mask"]
    words += ["--out", out, "--cache-dir", args.cache_dir, "--device", "cpu"]
    words += ["--data-dir", table, "--epochs", 15] if table else []
    with redirect_stdout(sys.stderr):
        train.run(train.parse([str(word) for word in words]))
    model = load_trained(out / dataset / method / "seed0" / "fold1.safetensors")
    clips = load_dataset(dataset, table, args.cache_dir)
    rng = np.random.default_rng(0)
    samples = len(foreign[0])
    levels = np.geomspace(0.001, 0.3, 100)
    waves = {
        "foreign": foreign,
        "noise": [level * rng.standard_normal(samples) for level in levels],
        "silence": [np.zeros(samples)],
    }
    labels = {}
    for part in ("val", "test"):
        chosen = getattr(clips.folds[1], part)
        labels[part] = torch.tensor([clips.labels[i] for i in chosen])
        waves[part] = [read_audio(clips.paths[i]) for i in chosen]
    answers = {part: answers_to(model, some) for part, some in waves.items()}
    right = {part: answers[part][0].argmax(1) == labels[part] for part in labels}
    lines = [f"\n**{name}, `{method}`**\n", f"| confidence | {' | '.join(COLUMNS)} |"]
    lines.append("|---" + "|--:" * len(COLUMNS) + "|")
    for way, found in confidences(answers, labels["val"]).items():
        lines.append(f"| {way} | {' | '.join(f'{x:.0f}' for x in measure(found, right))} |")
    return "\n".join(lines)


def parse(argv: list[str] | None):
    parser = Parser(
        "python -m tools.confidence", description="Compare ways to say how sure an answer is."
    )
    parser.add_argument("--esc10", type=Path, help="also on ESC-10: a folder of ESC-50, or its zip")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/confidence"),
        help="folder for runs and sounds (%(default)s)",
    )
    parser.add_argument(
        "--cache-dir", type=Path, default=default_cache_dir(), help="for features (%(default)s)"
    )
    return parser.parse_args(argv)


def run(args) -> None:
    print(TITLE, end="")
    kinds = [synth.render(kind, take, seed=7) for kind in synth.SOURCE for take in range(10)]
    print(compare(args, "demo", kinds, "linear"))
    print(compare(args, "demo", kinds, "houlsby_par"))
    if args.esc10:
        folder = args.out / "esc10"
        foreign = esc10(args.esc10, folder)
        name = "ESC-10, new recordings"
        print(compare(args, name, foreign, "linear", folder / "clips.csv"))


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
