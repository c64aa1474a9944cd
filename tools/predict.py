"""Classify sounds with what train.py trained, or tag them with the pretrained model.

    python -m tools.predict runs/demo/houlsby_par/seed0 recording.wav folder_of_sounds/
    python -m tools.predict --tags street.mp3                    # AudioSet's 527 tags, nothing trained

    from tools.predict import load
    classify = load("runs/demo/houlsby_par/seed0")
    classify("recording.wav").best                               # the class, or "unsure"; all probabilities: .classes
    classify(samples, 44_100).confidence                         # an array at any rate

A sound longer than the training clips is read in windows. `windows_of` cuts all sounds into one stream of windows,
`score` turns that stream into probabilities, batch by batch, `answers` gathers them again sound by sound. Everything is
lazy: at no time more than one batch of windows is in memory, however many files there are and however long they are.
"""

import argparse
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ast_model import AST
from data import FRONT_END, HOP, WINDOW, fbank, to_input
from load_weights import find_checkpoint, load_ast, load_trained
from sounds.audio import RATE, SUFFIXES, files_in, length_of, stream_audio
from support import command
from support.calibration import Calibration
from support.checkpoints import read_header, read_names
from support.command import Parser, UserError, choose_device, choose_dtype, exit_code, first_of, positive
from support.files import whole_file
from support.progress import Bar
from support.records import fold_files, read_folds
from support.speed import Machine, autocast, prepare
from tools.answers import COLUMNS, Answer, events_of, printable, save_embeddings, shown, write_tracks

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Classifier:
    """Models whose answers are averaged: one, or those of several folds. All read and answer the same.

    `load` makes one. It is called with a sound and returns an Answer.
    """

    models: list[AST]
    classes: list[str]
    activation: Callable[[torch.Tensor], torch.Tensor]  # logits to probabilities
    calibrations: list[Calibration]  # of each model
    min_confidence: float = 0.0
    device: torch.device = CPU
    dtype: str = "float32"

    @property
    def n_frames(self) -> int:
        return self.models[0].config.n_frames

    def __call__(self, sound: Path | str | np.ndarray, rate: int | None = None) -> Answer:
        """A file, or samples (samples,) or (samples, channels) in [-1, 1] at `rate` Hz, to an Answer on all classes.

        Raises ValueError with the reason for a sound that cannot be read.
        """
        if rate is None and isinstance(sound, np.ndarray):
            raise ValueError("samples need a rate: classify(samples, 44_100)")
        sound = Path(sound) if rate is None else at_16_khz(sound, rate)
        (answer,) = deque(self.listen([sound], top=len(self.classes)), maxlen=1)
        if answer.error is not None:
            raise ValueError(f"{sound}: {answer.error}")
        return answer

    def listen(
        self, sounds: Iterable[Path | str | np.ndarray], hop: float | None = None, top: int = 3, batch_size: int = 32
    ) -> Iterator[Answer]:
        """Of each sound, a file or samples (samples,) at 16 kHz, an Answer on every window, with its best class, and
        then on the whole, with the best `top`; or one with an `error`.

        A window begins `hop` seconds after the one before it (None: half a window), and they come as they are heard.
        Raises UserError for a hop that is longer than a window or no frame at all.
        """
        wanted = self.n_frames // 2 if hop is None else hop * RATE / HOP  # frames
        if not 0.5 < wanted <= self.n_frames + 0.5:
            long = f"windows are {self.n_frames * HOP / RATE:g} s long"
            raise UserError(f"--hop {hop}: {long}, give a hop of 0.01 s to that")
        windows = windows_of(sounds, self.n_frames, round(wanted) * HOP)
        return answers(score(windows, self, batch_size), self, top)


@dataclass(frozen=True)
class Window:
    """A piece of a sound, or the reason why there is none. A file that breaks off ends with such a reason."""

    number: int  # of its sound: arrays have no name, and the same file may come twice
    file: Path | None
    start: int = 0  # samples at 16 kHz
    wave: np.ndarray | None = None  # (samples,)
    error: str | None = None


# ------------------------------------------------------------------------------------------------------- the models


def load(
    path: Path | str, weights: str | None = None, min_confidence: float | None = None, device: str = "auto"
) -> Classifier:
    """The model of a fold file, or those of all folds in a run folder, as something to call with a sound.

    weights: where the backbone is now. min_confidence: what is less sure is answered "unsure"; None takes the value at
    which nine of ten right answers on the validation clips stay (without such clips: 0). Raises UserError.
    """
    path, device = Path(path), choose_device(device)
    if not path.exists():
        raise UserError(f"{path}: no such run or checkpoint; give a folder or a foldK.safetensors that train.py wrote")
    if path.is_dir():
        headers = list(read_folds(path).values())
        files = list(fold_files(path).values())
    else:
        headers = [read_header(path)]
        files = [path]
    if not files:
        raise UserError(f"{path} holds no fold*.safetensors: give the folder of a run with a finished fold")
    for file, header in zip(files, headers, strict=True):
        if header.get("front_end", FRONT_END) != FRONT_END:
            raise UserError(f"{file} was trained with another front end: {header['front_end']}, not {FRONT_END}")
    models = [load_trained(file, weights) for file in files]
    classes = headers[0].get("classes") or [f"class {i}" for i in range(models[0].config.n_classes)]
    calibrations = [Calibration(**header.get("calibration", {})) for header in headers]
    if min_confidence is None:
        min_confidence = float(np.mean([each.min_confidence for each in calibrations]))
    classifier = Classifier(models, classes, partial(torch.softmax, dim=-1), calibrations, min_confidence)
    return placed(classifier, device)


def load_tagger(weights: str = "audioset", min_confidence: float | None = None, device: str = "auto") -> Classifier:
    """The pretrained AST with its own head. Several tags may be true at once: a sigmoid, not a softmax."""
    model = load_ast(weights, pool="cls_dist").eval()
    names = class_names(weights, model.config.n_classes)
    classifier = Classifier([model], names, torch.sigmoid, [Calibration()], min_confidence or 0.0)
    return placed(classifier, choose_device(device))


def placed(classifier: Classifier, device: torch.device, dtype: str = "auto") -> Classifier:
    """The same on a device and in a type of arithmetic, by default the one that suits the device."""
    dtype = choose_dtype(dtype, device)
    for model in classifier.models:
        prepare(model, dtype, Machine(device))
    return replace(classifier, device=device, dtype=dtype)


def class_names(weights: str, n_classes: int) -> list[str]:
    """Names of the classes that a checkpoint's own head knows, the id2label of its config.json."""
    config_path = None if weights.startswith("random:") else find_checkpoint(weights)[1]
    names = read_names(config_path).classes() if config_path else []
    if not names:
        raise UserError(f"{weights}: the names of its classes are unknown; they stand in the config.json beside it")
    if len(names) != n_classes:
        expected = f"Expected as many names as the head has, {n_classes}, got {len(names)}"
        raise UserError(f"{config_path}: id2label: {expected}")
    return names


# ------------------------------------------------------------------------------------------------ sounds to windows


def find_sounds(paths: Iterable[Path]) -> list[Path]:
    """Files as they are, folders with every sound beneath them; each only once. UserError for folders without any."""
    found = {}
    for path in paths:
        files, others = files_in(path) if path.is_dir() else ([path], [])
        if not files:
            raise UserError(f"{path} holds no sounds ({', '.join(SUFFIXES)})")
        if names := [file.name for file in others if not file.name.endswith(".events.txt")]:  # written here
            command.warn(f"{path}: {len(names)} files are no {', '.join(SUFFIXES)}, ignored ({first_of(names)})")
        found.update(dict.fromkeys(files))
    return list(found)


def at_16_khz(samples: np.ndarray, rate: int) -> np.ndarray:
    """Samples (samples,) or (samples, channels) to mono float32, (samples,). ValueError if they are no sound."""
    import soxr

    given = np.asarray(samples)
    turned = given.ndim == 2 and given.shape[1] > max(64, given.shape[0])  # it is (channels, samples)
    if given.dtype.kind != "f" or turned:  # integers, as of a 16-bit file, would be thousands of times too loud
        wanted = "give floats in [-1, 1], (samples,) or (samples, channels)"
        raise ValueError(f"no sound: {given.dtype} {given.shape}; {wanted}")
    wave = given.astype(np.float32)
    if wave.ndim not in (1, 2) or not wave.size or not np.isfinite(wave).all() or not 1 <= rate <= 10_000_000:
        raise ValueError(f"no sound: {wave.shape} at {rate} Hz; give finite (samples,) or (samples, channels)")
    return soxr.resample(wave if wave.ndim == 1 else wave.mean(axis=1), rate, RATE)


def windows_of(sounds: Iterable[Path | str | np.ndarray], n_frames: int, hop: int) -> Iterator[Window]:
    """All windows of all sounds, one after the other. One that cannot be read gives its reason instead."""
    for number, sound in enumerate(sounds):
        file = None if isinstance(sound, np.ndarray) else Path(sound)
        try:
            blocks = [at_16_khz(sound, RATE)] if file is None else stream_audio(file)
            for start, wave in cut(blocks, n_frames, hop):
                yield Window(number, file, start, wave)
        except ValueError as error:
            yield Window(number, file, error=str(error))


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
def heard(classifier: Classifier, waves: list[np.ndarray]) -> np.ndarray:
    """Windows of sound, each (samples,), to what is known of them: (windows, classes + 1 + dim * models).

    The probabilities and the factor of Calibration.known, both the mean over the models; then the vectors that their
    heads read, one beside the other.
    """
    n_frames, device = classifier.n_frames, classifier.device
    batch = torch.zeros(len(waves), n_frames * HOP + WINDOW - 1)  # the most samples that make no frame more
    for row, wave in zip(batch, waves, strict=True):
        row[: len(wave)] = torch.from_numpy(wave)
    features = fbank(batch.to(device))  # (windows, n_frames, 128)
    # Shorter sounds end in zeros *after* the logarithm, as in training; here they were padded before it.
    frames = torch.tensor([max(1, (len(wave) - WINDOW) // HOP + 1) for wave in waves], device=device)
    beyond = torch.arange(n_frames, device=device) >= frames[:, None]
    x = to_input(features.masked_fill(beyond[:, :, None], 0), n_frames)
    sums, vectors = 0, []
    try:
        for model, calibration in zip(classifier.models, classifier.calibrations, strict=True):
            with autocast(device, classifier.dtype):
                vector = model.vector(x)
                logits = model.head(vector).float()
            scores = classifier.activation(logits / calibration.temperature)
            sums = sums + torch.cat([scores, calibration.known(logits)[:, None]], dim=1)
            vectors.append(vector.float())
    except (RuntimeError, MemoryError) as error:
        if not command.out_of_memory(error):
            raise
        raise UserError(f"out of memory on {device} with {len(waves)} windows: choose a smaller --batch-size") from None
    return torch.cat([sums / len(vectors), *vectors], dim=1).cpu().numpy()


def probabilities(classifier: Classifier, waves: list[np.ndarray]) -> np.ndarray:
    """Windows of sound, each (samples,), to probabilities (windows, classes)."""
    return heard(classifier, waves)[:, : len(classifier.classes)]


def score(
    windows: Iterator[Window], classifier: Classifier, batch_size: int
) -> Iterator[tuple[Window, np.ndarray | None]]:
    """Each window with its row of `heard`, None for one that could not be read. Batches span sounds."""
    while batch := list(islice(windows, batch_size)):
        waves = [window.wave for window in batch if window.error is None]
        rows = iter(heard(classifier, waves)) if waves else iter(())
        for window in batch:
            yield window, next(rows) if window.error is None else None


def answers(scored: Iterable[tuple[Window, np.ndarray | None]], classifier: Classifier, top: int) -> Iterator[Answer]:
    """For each sound an answer on every window and then, from their mean, on the whole; or one with an error."""
    for (_, file), windows in groupby(scored, key=lambda pair: (pair[0].number, pair[0].file)):
        total, n, end = 0, 0, 0.0
        for window, row in windows:
            if window.error is not None:  # always the last of a file
                yield Answer(file, "file", error=window.error)
                break
            end = (window.start + len(window.wave)) / RATE
            yield answer_of(row, classifier, 1, file, "window", window.start / RATE, end)
            total, n = total + row.astype(float), n + 1
        else:
            yield answer_of(total / n, classifier, top, file, "file", 0.0, end)


def answer_of(row: np.ndarray, classifier: Classifier, top: int, *where) -> Answer:
    """A row of `heard` in words; `where`: file, what, start and end of the Answer."""
    names, count = classifier.classes, len(classifier.classes)
    best = tuple((names[i], float(row[i])) for i in np.argsort(-row[:count], kind="stable")[:top])
    confidence = best[0][1] * float(row[count])
    unsure = confidence < classifier.min_confidence
    return Answer(*where, best, confidence, unsure, row[count + 1 :].astype(np.float32))


# ------------------------------------------------------------------------------------------------ the command line


def share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text[:100]!r} is no number from 0 to 1")
    return float(text)


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
    add("--events", action="store_true", help="what is heard when: an Audacity label track beside each file, "
        "FILE.events.txt, or with --json or --csv the same in this form")  # fmt: skip
    add("--threshold", type=share, default=0.5, help="the probability that an event has all along (%(default)s)")
    add("--min-length", type=float, default=0.0, metavar="S", help="leave out shorter events (%(default)s)")
    add("--min-confidence", type=share, metavar="P", help="what is less sure is answered 'unsure'; default: where nine "
        "of ten right answers on the validation clips stay")  # fmt: skip
    add("--embeddings", type=Path, metavar="FILE.npz", help="write the vector of each file, or with --windows window")
    add("--hop", type=float, metavar="S", help="seconds from one window to the next; default: half a window")
    form = partial(parser.add_mutually_exclusive_group().add_argument, dest="form", action="store_const")
    form("--json", const="json", help="one JSON object per line")
    form("--csv", const="csv", help="one row for each class of a file")
    add("--batch-size", type=positive, default=32, help="windows at once (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parser.parse_intermixed_args(argv)
    args.checkpoint, args.sounds = (None, args.paths) if args.tags else (args.paths[0], args.paths[1:])
    if not args.sounds:
        raise UserError("no sounds to classify: give files or folders after the checkpoint (--help shows all options)")
    if args.events and (args.windows or args.embeddings):
        raise UserError(f"--events cannot go with {'--windows' if args.windows else '--embeddings'}")
    if args.embeddings and args.embeddings.suffix != ".npz":  # it may be a sound, which would be lost
        raise UserError("--embeddings: give the name of a file that ends in .npz")
    if not 0 <= args.min_length < math.inf:
        raise UserError(f"--min-length {args.min_length}: give a number of seconds")
    return args


def run(args: argparse.Namespace) -> int:
    """Answer every file that can be read; 1 if there was one that cannot."""
    files = find_sounds(args.sounds)
    if args.tags:
        classifier = load_tagger(args.weights or "audioset", args.min_confidence, args.device)
    else:
        classifier = load(args.checkpoint, args.weights, args.min_confidence, args.device)
    told = watched(classifier.listen(files, args.hop, args.top, args.batch_size), files)
    if args.events:
        told = events_of(told, args.threshold, args.min_length)
    if args.events and not args.form:
        told = write_tracks(told)
    wanted = {"event"} if args.events else {"file", "window"} if args.windows else {"file"}
    width = 2 + max(len(printable(file)) for file in files)
    if args.form == "csv":
        print(COLUMNS)
    failed, embedded = 0, []
    with whole_file(args.embeddings) if args.embeddings else nullcontext() as embeddings:
        for answer in told:
            if answer.error is not None:
                failed += 1
                tqdm.write(f"error: {printable(answer.file)}: {answer.error}", file=sys.stderr)
            elif args.embeddings and answer.what == ("window" if args.windows else "file"):
                embedded.append(answer)
            if answer.what in wanted if answer.error is None else args.form:
                tqdm.write(shown(answer, args.form, width), file=sys.stdout)
        if args.embeddings:
            save_embeddings(embedded, embeddings)
    return 1 if failed else 0


def watched(told: Iterable[Answer], files: list[Path]) -> Iterator[Answer]:
    """The same answers, with a bar on a terminal that says how many seconds of sound have been heard."""
    seconds = float(np.nansum([*map(length_of, files)])) if sys.stderr.isatty() else None  # only the bar asks
    with Bar(total=seconds, desc="listening", unit="s", unit_scale=True) as progress:
        so_far = 0.0
        for answer in told:
            if answer.what == "window":
                progress.update(max(0.0, answer.end - so_far))
            so_far = answer.end if answer.what == "window" else 0.0
            yield answer


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
