"""Classify sounds with what train.py trained, or tag them with the pretrained model.

    python -m tools.predict runs/demo/houlsby_par/seed0 recording.wav folder_of_sounds/
    python -m tools.predict --tags street.mp3                    # AudioSet's 527 tags, nothing trained

A sound longer than the training clips is read in windows. `windows_of` cuts all files into one stream of windows,
`score` turns that stream into probabilities, batch by batch, `answers` gathers them again file by file. Everything is
lazy: at no time more than one batch of windows is in memory, however many files there are and however long they are.
"""

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ast_model import AST
from data import FRONT_END, HOP, WINDOW, fbank, to_input
from load_weights import find_checkpoint, load_ast, load_trained
from sounds.audio import RATE, SUFFIXES, files_in, length_of, stream_audio
from support.checkpoints import read_header, read_names
from support.command import Parser, UserError, choose_device, choose_dtype, exit_code, positive
from support.speed import Machine, autocast, prepare

COLUMNS = "file,what,start,end,rank,class,probability,error"  # of --csv


@dataclass(frozen=True)
class Classifier:
    """Models whose probabilities are averaged: one, or those of several folds. All read and answer the same."""

    models: list[AST]
    classes: list[str]
    activation: Callable[[torch.Tensor], torch.Tensor]  # logits to probabilities

    @property
    def n_frames(self) -> int:
        return self.models[0].config.n_frames


@dataclass(frozen=True)
class Window:
    """A piece of a file, or the reason why there is none. A file that breaks off ends with such a reason."""

    file: Path
    start: int = 0  # samples at 16 kHz
    wave: np.ndarray | None = None  # (samples,)
    error: str | None = None


@dataclass(frozen=True)
class Answer:
    """What is said about a window or about a whole file; seconds, and the best classes with their probabilities."""

    file: Path
    what: str  # "window" or "file"
    start: float = 0.0
    end: float = 0.0
    best: tuple[tuple[str, float], ...] = ()
    error: str | None = None


# ------------------------------------------------------------------------------------------------------- the models


def load_classifier(path: Path, weights: str | None) -> Classifier:
    """The model of a fold file, or those of all folds in a run folder. `weights`: where the backbone is now."""
    if not path.exists():
        raise UserError(f"{path}: no such run or checkpoint; give a folder or a foldK.safetensors that train.py wrote")
    folds = sorted(path.glob("fold*.safetensors"), key=lambda file: (len(file.name), file.name))  # fold2 before fold10
    files = folds if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no fold*.safetensors: give the folder of a run with a finished fold")
    headers = [read_header(file) for file in files]
    for file, header in zip(files, headers, strict=True):
        if header.get("front_end", FRONT_END) != FRONT_END:
            raise UserError(f"{file} was trained with another front end: {header['front_end']}, not {FRONT_END}")
        for fact in ("classes", "n_frames"):
            if header.get(fact) != headers[0].get(fact):
                raise UserError(f"{file} and {files[0]} have other {fact}: they are not folds of one run")
    models = [load_trained(file, weights) for file in files]
    classes = headers[0].get("classes") or [f"class {i}" for i in range(models[0].config.n_classes)]
    return Classifier(models, classes, lambda logits: logits.softmax(-1))


def load_tagger(weights: str) -> Classifier:
    """The pretrained AST with its own head. Several tags may be true at once: a sigmoid, not a softmax."""
    model = load_ast(weights, pool="cls_dist")
    return Classifier([model], class_names(weights, model.config.n_classes), torch.sigmoid)


def class_names(weights: str, n_classes: int) -> list[str]:
    """Names of the classes that a checkpoint's own head knows, the id2label of its config.json."""
    config_path = None if weights.startswith("random:") else find_checkpoint(weights)[1]
    names = read_names(config_path).classes() if config_path else []
    if not names:
        raise UserError(f"{weights}: the names of its classes are unknown; they stand in the config.json beside it")
    if len(names) != n_classes:
        raise UserError(
            f"{config_path}: id2label: Expected as many names as the head has, {n_classes}, got {len(names)}"
        )
    return names


# ------------------------------------------------------------------------------------------------ sounds to windows


def find_sounds(paths: Iterable[Path]) -> list[Path]:
    """Files as they are, folders with every sound beneath them; each only once. UserError for folders without any."""
    found = {}
    for path in paths:
        files = files_in(path)[0] if path.is_dir() else [path]
        if not files:
            raise UserError(f"{path} holds no sounds ({', '.join(SUFFIXES)})")
        found.update(dict.fromkeys(files))
    return list(found)


def windows_of(files: Iterable[Path], n_frames: int, hop: int) -> Iterator[Window]:
    """All windows of all files, one after the other. A file that cannot be read gives its reason instead."""
    for file in files:
        try:
            for start, wave in cut(stream_audio(file), n_frames, hop):
                yield Window(file, start, wave)
        except ValueError as error:
            yield Window(file, error=str(error))


def cut(blocks: Iterable[np.ndarray], n_frames: int, hop: int) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of a sound to windows of `n_frames` frames, as (first sample, samples), one every `hop` samples.

    The last window ends where the sound ends, up to a frame, so that nothing is left out and nothing is padded; only a
    sound shorter than one window stays shorter.
    """
    window = (n_frames - 1) * HOP + WINDOW  # samples under n_frames frames
    start, ahead = 0, np.zeros(0, np.float32)  # `ahead` holds what comes from `start` on
    for block in blocks:
        ahead = np.concatenate([ahead, block])
        while len(ahead) >= window + hop:  # another whole window follows
            yield start, ahead[:window]
            start, ahead = start + hop, ahead[hop:]
    too_many = (len(ahead) - WINDOW) // HOP + 1 - n_frames  # frames
    if too_many > 0:
        yield start, ahead[:window]
        start, ahead = start + too_many * HOP, ahead[too_many * HOP :]
    yield start, ahead


# ----------------------------------------------------------------------------------------- windows to probabilities


@torch.inference_mode()
def probabilities(classifier: Classifier, waves: list[np.ndarray], device: torch.device, dtype: str) -> np.ndarray:
    """Windows of sound, each (samples,), to probabilities (windows, classes), the mean over the models."""
    n_frames = classifier.n_frames
    batch = torch.zeros(len(waves), n_frames * HOP + WINDOW - 1)  # the most samples that make no frame more
    for row, wave in zip(batch, waves, strict=True):
        row[: len(wave)] = torch.from_numpy(wave)
    features = fbank(batch.to(device))[:, :n_frames]
    # Shorter sounds end in zeros *after* the logarithm, as in training; here they were padded before it.
    frames = torch.tensor([max(1, (len(wave) - WINDOW) // HOP + 1) for wave in waves], device=device)
    beyond = torch.arange(n_frames, device=device) >= frames[:, None]
    x = to_input(features.masked_fill(beyond[:, :, None], 0), n_frames)
    try:
        with autocast(device, dtype):
            logits = [model(x).float() for model in classifier.models]
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory on {device} with {len(waves)} windows: choose a smaller --batch-size") from None
    return torch.stack([classifier.activation(one) for one in logits]).mean(0).cpu().numpy()


def score(
    windows: Iterator[Window], classifier: Classifier, batch_size: int, device: torch.device, dtype: str
) -> Iterator[tuple[Window, np.ndarray | None]]:
    """Each window with its probabilities (classes,), None for one that could not be read. Batches span files."""
    while batch := list(islice(windows, batch_size)):
        waves = [window.wave for window in batch if window.error is None]
        scores = iter(probabilities(classifier, waves, device, dtype)) if waves else iter(())
        for window in batch:
            yield window, next(scores) if window.error is None else None


def answers(scored: Iterable[tuple[Window, np.ndarray | None]], classes: list[str], top: int) -> Iterator[Answer]:
    """For each file an answer on every window and then, from their mean, on the whole; or one with an error."""
    for file, windows in groupby(scored, key=lambda pair: pair[0].file):
        total, n, end = np.zeros(len(classes)), 0, 0.0
        for window, scores in windows:
            if window.error is not None:  # always the last of a file
                yield Answer(file, "file", error=window.error)
                break
            end = (window.start + len(window.wave)) / RATE
            yield Answer(file, "window", window.start / RATE, end, best_of(scores, classes, 1))
            total, n = total + scores, n + 1
        else:
            yield Answer(file, "file", 0.0, end, best_of(total / n, classes, top))


def best_of(scores: np.ndarray, classes: list[str], top: int) -> tuple[tuple[str, float], ...]:
    return tuple((classes[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")[:top])


# ----------------------------------------------------------------------------------------------- answers to the user


def printable(path: Path) -> str:
    """A file name may hold bytes that are no text; they are shown as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def shown(answer: Answer, form: str | None, width: int) -> str:
    """An answer as one line for people, its file in `width` columns; as one JSON object, so that a program can read the
    output line by line while it is being written; or as CSV with the columns COLUMNS, a row for each of the classes."""
    file = printable(answer.file)
    if form == "json":
        best = [{"class": name, "probability": round(p, 6)} for name, p in answer.best]
        found = {"start": round(answer.start, 3), "end": round(answer.end, 3), "classes": best}
        return json.dumps({"file": file, "what": answer.what, **({"error": answer.error} if answer.error else found)})
    if form == "csv":
        first, span = (file, answer.what), (f"{answer.start:.3f}", f"{answer.end:.3f}")
        rows = [(*first, *span, rank, name, f"{p:.6f}", "") for rank, (name, p) in enumerate(answer.best, 1)]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows or [(*first, *[""] * 5, answer.error)])
        return text.getvalue().rstrip("\n")
    span = f"{answer.start:9.2f} -{answer.end:9.2f} s" if answer.what == "window" else f"{answer.end:20.2f} s"
    return f"{file:<{width}}{span}  {'  '.join(f'{name} {p:.3f}' for name, p in answer.best)}"


# ------------------------------------------------------------------------------------------------ the command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m tools.predict",
        usage="%(prog)s [options] RUN_OR_CHECKPOINT SOUND...\n       %(prog)s [options] --tags SOUND...",
        description="Classify sounds with a trained model, or tag them with the pretrained one.",
    )
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH",
        help="a run folder (all its folds) or a foldK.safetensors, then sound files and folders of them")  # fmt: skip
    add("--tags", action="store_true", help="no checkpoint: the pretrained model with its own head, 527 AudioSet tags")
    add("--weights", help="where the backbone is, if not where the checkpoint says; with --tags default: audioset")
    add("--top", type=positive, default=3, help="how many classes to show for a file (%(default)s)")
    add("--windows", action="store_true", help="also show the best class of every window of a file")
    add("--hop", type=float, metavar="S", help="seconds from one window to the next; default: half a window")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", dest="form", action="store_const", const="json", help="one JSON object per line")
    output.add_argument(
        "--csv", dest="form", action="store_const", const="csv", help="one row for each class of a file"
    )
    add("--batch-size", type=positive, default=32, help="windows at once (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parser.parse_intermixed_args(argv)
    args.checkpoint, args.sounds = (None, args.paths) if args.tags else (args.paths[0], args.paths[1:])
    if not args.sounds:
        raise UserError("no sounds to classify: give files or folders after the checkpoint (--help shows all options)")
    args.device = choose_device(args.device)
    return args


def run(args: argparse.Namespace) -> int:
    """Answer every file that can be read; 1 if there was one that cannot."""
    files, dtype = find_sounds(args.sounds), choose_dtype("auto", args.device)
    if args.tags:
        classifier = load_tagger(args.weights or "audioset")
    else:
        classifier = load_classifier(args.checkpoint, args.weights)
    for model in classifier.models:
        prepare(model, dtype, Machine(args.device)).eval()
    n_frames = classifier.n_frames
    wanted = n_frames // 2 if args.hop is None else args.hop * RATE / HOP  # frames
    if not 0.5 < wanted <= n_frames + 0.5:
        raise UserError(f"--hop {args.hop}: windows are {n_frames * HOP / RATE:g} s long, give a hop of 0.01 s to that")

    scored = score(windows_of(files, n_frames, round(wanted) * HOP), classifier, args.batch_size, args.device, dtype)
    width = 2 + max(len(printable(file)) for file in files)
    if args.form == "csv":
        print(COLUMNS)
    seconds = float(np.nansum([*map(length_of, files)])) if sys.stderr.isatty() else None  # only the bar asks
    failed, heard = 0, 0.0
    with tqdm(total=seconds, desc="listening", unit="s", unit_scale=True, disable=None) as progress:
        for answer in answers(scored, classifier.classes, args.top):
            if answer.what == "window":
                progress.update(max(0.0, answer.end - heard))
            heard = answer.end if answer.what == "window" else 0.0
            if answer.error is not None:
                failed += 1
                tqdm.write(f"error: {printable(answer.file)}: {answer.error}", file=sys.stderr)
            if (args.windows or answer.what == "file") and (answer.error is None or args.form):
                tqdm.write(shown(answer, args.form, width), file=sys.stdout)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
