"""Compare ways to say how sure an answer is, on speakers, recordings and sounds never trained on.

    python -m tools.confidence                  # the demo; with espeak-ng also words, new speakers
    python -m tools.confidence --esc10 ESC-50   # and ESC-10, three of its classes left out

Everything is fitted on validation clips. Foreign sounds are of no class: 68 other kinds for the
demo, other words by the test speakers, the classes left out. A finished run is not trained again.
"""

import shutil
import subprocess
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

WORDS = ["red", "green", "blue", "yellow", "seven", "window", "paper", "music", "river", "stone"]
OTHER_WORDS = ["zebra", "orange", "hello", "nine", "table", "candle", "water", "mountain"]
VOICES = {  # of espeak-ng
    "train": ["en-us+f2", "en-gb+m3", "en-us+Annie", "en-gb-scotland+m7", "en-gb+linda"],
    "val": ["en-us+Alex", "en-gb-x-rp+f5"],
    "test": ["en-us+boris", "en-029+steph", "en-us+belinda", "en-gb+Michael"],
}
LEFT_OUT = ("dog", "rain", "helicopter")  # of ESC-10
COLUMNS = ("AUROC right", "AUROC foreign", "kept", "wrong", "foreign", "noise", "silence")
TITLE = """# How sure an answer is

Written by `python -m tools.confidence`, all in percent. AUROC: of right against wrong answers, and
of test clips against foreign sounds. Then the limit at which nine of ten right validation answers
stay: right test answers that are kept, and wrong ones, foreign sounds, noise and silence refused.
"""


def words(folder: Path) -> list[np.ndarray]:
    """Write words by the voices of espeak-ng, and clips.csv. Returns other words by test voices."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [("path", "label", "split")]
    foreign = []
    speakers = [(part, voice) for part, voices in VOICES.items() for voice in voices]
    for part, voice in speakers:
        for word in WORDS * 6 + (OTHER_WORDS * 3 if part == "test" else []):
            file = folder / f"{len(rows) + len(foreign)}.wav"
            options = ["-p", str(rng.integers(30, 70)), "-s", str(rng.integers(130, 200))]
            subprocess.run(["espeak-ng", "-v", voice, *options, "-w", file, word], check=True)
            if word in WORDS:
                rows.append((file.name, word, part))
            else:
                foreign.append(read_audio(file))
    write_text(folder / "clips.csv", csv_of(rows))
    return foreign


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
    folder.mkdir(parents=True, exist_ok=True)
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

    def vim(which):
        """ViM of the middles (1) or of the vectors (2): its scores, and the factors from them."""
        logits, read = answers["val"][0], answers["val"][which]
        found = calibration.Calibration(**calibration.fit(logits, labels, read))
        scores = {part: found.score(some[0], some[which]) for part, some in answers.items()}
        scores["val"] = calibration.scores_of_parts(logits, read)
        factors = {p: calibration.factor(s, found.limit, found.slope) for p, s in scores.items()}
        return found.temperature, scores, factors

    temperature, scores, by_middle = vim(1)
    _, _, by_vector = vim(2)
    right = answers["val"][0].argmax(1) == labels
    p = {part: (some[0] / temperature).softmax(1).amax(1) for part, some in answers.items()}

    def lower_rank(part):
        """The lower one of two ranks among right validation answers: two thresholds are one."""
        rank = torch.searchsorted(p["val"][right].sort().values, p[part], right=True)
        other = torch.searchsorted((-scores["val"][right]).sort().values, -scores[part], right=True)
        return torch.minimum(rank, other).double()

    return {
        "largest probability": p,
        "energy": {part: some[0].logsumexp(1) for part, some in answers.items()},
        "ViM of the middle alone": {part: -scores[part] for part in p},
        "probability and ViM of the middle, two thresholds": {part: lower_rank(part) for part in p},
        "probability, lowered by ViM of the head's vector": {n: p[n] * by_vector[n] for n in p},
        "**probability, lowered by ViM of the middle**": {n: p[n] * by_middle[n] for n in p},
    }


def auroc(higher: torch.Tensor, lower: torch.Tensor) -> float:
    """How often a number of `higher` is above one of `lower`, in percent. Equal ones count half."""
    return 50 * ((higher[:, None] - lower).sign() + 1).mean().item()


def measure(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[float]:
    """The numbers of COLUMNS. `right` says which answers to "val" and "test" are right."""
    least = calibration.tenth(found["val"][right["val"]])
    test, wrong = found["test"][right["test"]], found["test"][~right["test"]]
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
    split = {"val": clips.folds[1].val, "test": clips.folds[1].test}
    labels = {part: torch.tensor(clips.labels)[split[part]] for part in split}
    waves = {part: [read_audio(clips.paths[i]) for i in split[part]] for part in split}
    waves["foreign"] = foreign
    rng = np.random.default_rng(0)
    samples = len(foreign[0])
    waves["noise"] = [
        level * rng.standard_normal(samples) for level in np.geomspace(0.001, 0.3, 100)
    ]
    waves["silence"] = [np.zeros(samples)]
    answers = {part: answers_to(model, some) for part, some in waves.items()}
    right = {part: answers[part][0].argmax(1) == labels[part] for part in split}
    lines = [f"\n**{name}, `{method}`**\n", f"| confidence | {' | '.join(COLUMNS)} |"]
    lines.append("|---" + "|--:" * len(COLUMNS) + "|")
    for way, found in confidences(answers, labels["val"]).items():
        lines.append(f"| {way} | {' | '.join(f'{x:.0f}' for x in measure(found, right))} |")
    return "\n".join(lines) + "\n"


def parse(argv: list[str] | None):
    parser = Parser("python -m tools.confidence", description="Compare ways to be sure.")
    parser.add_argument("--esc10", type=Path, help="a release of ESC-50, or its archive")
    parser.add_argument("--out", type=Path, default=Path("runs/confidence"), help="runs and sounds")
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir())
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="write the tables there, too")
    return parser.parse_args(argv)


def run(args) -> None:
    kinds = [synth.render(kind, take, seed=7) for kind in synth.SOURCE for take in range(10)]
    experiments = [("demo", kinds, "linear", None), ("demo", kinds, "houlsby_par", None)]
    if shutil.which("espeak-ng"):
        table = args.out / "words" / "clips.csv"
        foreign = words(table.parent)
        for method in ("linear", "houlsby_par"):
            experiments.append(("words by new speakers", foreign, method, table))
    if args.esc10:
        table = args.out / "esc10" / "clips.csv"
        foreign = esc10(args.esc10, table.parent)
        experiments.append(("ESC-10, new recordings", foreign, "linear", table))
    text = TITLE
    for experiment in experiments:
        text += compare(args, *experiment)
    print(text, end="")
    if args.table:
        write_text(args.table, text)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
