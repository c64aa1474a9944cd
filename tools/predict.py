"""Classify sounds with what train.py trained, or tag them with the pretrained model.

    python -m tools.predict runs/demo/houlsby_par/seed0 recording.wav folder_of_sounds/
    python -m tools.predict --tags street.mp3  # AudioSet's 527 tags, nothing trained

    from tools.predict import load
    classify = load("runs/demo/houlsby_par/seed0")
    classify("recording.wav").best  # the class, or "unsure"; all probabilities: .classes
    classify(samples, 44_100).confidence  # an array at any rate

A sound longer than the training clips is read in windows. Its answer is the mean of theirs. A
recording is read as it comes: never more than one batch of its windows is in memory.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from ast_model import AST
from data import FRONT_END, HOP, WINDOW, fbank, to_input
from load_weights import find_checkpoint, load_ast, load_trained
from sounds.audio import (
    LOWEST_RATE,
    RATE,
    SUFFIXES,
    check_length,
    files_in,
    mono,
    stream_audio,
)
from sounds.groups import warn_of_spellings
from sounds.windows import BACKGROUND
from support.calibration import Calibration, middle_and_vector, width_of_middle
from support.checkpoints import read_header, read_names
from support.command import (
    Parser,
    UserError,
    choose_device,
    choose_dtype,
    exit_code,
    first_of,
    nearest,
    positive,
    printable,
    warn,
)
from support.files import csv_of
from support.progress import Bar
from support.records import fold_files, read_folds
from support.speed import Machine
from tools.answers import (
    COLUMNS,
    EVENT_COLUMNS,
    Answer,
    events_of,
    print_answer,
    print_event,
    save_embeddings,
    write_track,
)
from tools.truth import labels_of, print_scores, require_own_tracks

BATCH = 16  # windows at once
SILENT = 2e-4  # the peak of a window that is silent: six steps of 16 bits
SOFTMAX = partial(torch.softmax, dim=-1)


class Unreadable(ValueError):
    """A sound that cannot be read, and the reason."""


@dataclass(frozen=True)
class Classifier:
    """Models whose answers are averaged: one model, or the models of several folds.

    `load` makes one. It is called with a sound and returns an Answer.
    """

    models: list[AST]
    classes: list[str]
    activation: Callable[[torch.Tensor], torch.Tensor]  # logits to probabilities
    calibrations: list[Calibration]  # one of each model
    min_confidence: float
    machine: Machine  # the device

    def __call__(self, sound: Path | str | np.ndarray, rate: int | None = None) -> Answer:
        """The answer on a whole sound, with all classes. The arguments are those of `listen`."""
        for answer in self.listen(sound, rate, top=len(self.classes)):
            whole = answer
        return whole

    def listen(
        self,
        sound: Path | str | np.ndarray,
        rate: int | None = None,
        hop: float | None = None,
        top: int = 3,
    ) -> Iterator[Answer]:
        """Yield an Answer on each window of a sound, with its best class, as it is heard.

        The last Answer is on the whole sound, with the best `top` classes. A sound is a file, or
        samples (samples,) in [-1, 1] at `rate` Hz. A window begins `hop` seconds after the window
        before it. None means half a window. Raises Unreadable, a ValueError, and UserError for a
        hop that is longer than a window or no frame at all.
        """
        n_frames = self.models[0].config.n_frames
        frames = n_frames // 2 if hop is None else hop * RATE / HOP
        if not 0.5 < frames <= n_frames + 0.5:
            longest = f"{n_frames * HOP / RATE:g} s"
            raise UserError(f"--hop {hop}: give a hop from 0.01 s to {longest}, a whole window")
        is_file = isinstance(sound, Path | str)
        blocks = stream_audio(Path(sound)) if is_file else [at_16_khz(sound, rate)]
        windows = cut(blocks, n_frames, round(frames) * HOP)
        total = 0
        count = 0
        while True:
            try:
                batch = list(islice(windows, BATCH))
            except ValueError as error:
                raise Unreadable(f"{sound}: {error}") from None
            if not batch:
                break
            rows = self.score([wave for _, wave in batch])
            for (start, wave), row in zip(batch, rows, strict=True):
                end = (start + len(wave)) / RATE
                total = total + row.astype(float)
                count += 1
                is_silent = bool(np.abs(wave).max() < SILENT)
                yield replace(self.answer(row, 1, start / RATE, end), is_silent=is_silent)
        yield self.answer(total / count, top, 0.0, end)

    @torch.inference_mode()
    def score(self, waves: list[np.ndarray]) -> np.ndarray:
        """Windows of sound, each (samples,), to (windows, classes + 1 + dim * models).

        First the probabilities, then the factor of Calibration.known. Both are the mean over the
        models. Then come the vectors that the heads of the models read.
        """
        n_frames = self.models[0].config.n_frames
        waves = [torch.from_numpy(wave).to(self.machine.device) for wave in waves]
        x = torch.stack([to_input(fbank(wave), n_frames) for wave in waves])
        total = 0
        vectors = []
        for model, calibration in zip(self.models, self.calibrations, strict=True):
            with self.machine.autocast(dtype_on(self.machine)):
                middle, vector = middle_and_vector(model, x)
                logits = model.head(vector).float()
            probabilities = self.activation(logits / calibration.temperature)
            known = calibration.known(logits, middle)
            total = total + torch.cat([probabilities, known[:, None]], dim=1)
            vectors.append(vector.float())
        return torch.cat([total / len(vectors), *vectors], dim=1).cpu().numpy()

    def answer(self, row: np.ndarray, top: int, start: float, end: float) -> Answer:
        """A row of `score` in words. Names of classes may come from anyone, so they are escaped."""
        count = len(self.classes)
        order = np.argsort(-row[:count], kind="stable")[:top]
        best = tuple((printable(self.classes[i]), float(row[i])) for i in order)
        confidence = best[0][1] * float(row[count])
        unsure = confidence < self.min_confidence
        vector = row[count + 1 :].astype(np.float32)
        probabilities = row[:count].copy()  # of the row alone, because a recording has many
        return Answer(start, end, best, confidence, unsure, vector, probabilities)


def probabilities(classifier: Classifier, waves: list[np.ndarray]) -> np.ndarray:
    """Windows of sound, each (samples,), to probabilities (windows, classes)."""
    return classifier.score(waves)[:, : len(classifier.classes)]


# ------------------------------------------------------------------------------------- the models


def load(
    path: Path | str,
    weights: str | None = None,
    min_confidence: float | None = None,
    device: str = "auto",
) -> Classifier:
    """The model of a fold file, or the models of all folds in a run folder.

    `weights` says where the backbone is now. An answer of less than `min_confidence` is "unsure".
    None takes the value at which nine of ten right answers on the validation clips stay. Without
    such clips it is 0. Raises UserError.
    """
    path = Path(path)
    if path.is_dir():
        headers = list(read_folds(path).values())
        files = list(fold_files(path).values())
    else:
        headers = [read_header(path)]
        files = [path]
    if not files:
        raise UserError(f"{path} holds no fold*.safetensors: give a run with a finished fold")
    models = [load_trained(file, weights) for file in files]
    classes = headers[0].get("classes")
    if classes is None:
        classes = [f"class {i}" for i in range(models[0].config.n_classes)]
    calibrations = []
    for file, header, model in zip(files, headers, models, strict=True):
        if header.get("front_end", FRONT_END) != FRONT_END:
            raise UserError(f"{file} was trained with another front end than {FRONT_END}")
        calibration = Calibration(**header.get("calibration", {}))
        width = width_of_middle(model)
        numbers = len(calibration.mean)
        if numbers not in (0, width):
            raise UserError(f"{file}: calibration.mean: Expected {width} numbers, got {numbers}")
        calibrations.append(calibration)
    if min_confidence is None:
        min_confidence = float(np.mean([each.min_confidence for each in calibrations]))
    machine = place(models, device)
    return Classifier(models, classes, SOFTMAX, calibrations, min_confidence, machine)


def load_tagger(
    weights: str = "audioset", min_confidence: float | None = None, device: str = "auto"
) -> Classifier:
    """The pretrained AST with its own head."""
    model = load_ast(weights, pool="cls_dist").eval()
    classes = class_names(weights, model.config.n_classes)
    machine = place([model], device)
    floor = min_confidence or 0.0
    return Classifier([model], classes, activation_of(weights), [Calibration()], floor, machine)


def activation_of(weights: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """What makes probabilities of the logits of a checkpoint's own head.

    The config.json of transformers calls it problem_type. If it says nothing, as that of AudioSet's
    checkpoint, several tags may be true at once: a sigmoid. UserError for a head of no classes.
    """
    problem = read_names(find_checkpoint(weights)[1]).problem_type
    if problem == "single_label_classification":
        return SOFTMAX
    if problem not in (None, "multi_label_classification"):
        raise UserError(f"{weights}: its config.json says problem_type {problem!r}: it has no tags")
    return torch.sigmoid


def place(models: list[AST], device: str) -> Machine:
    """Move models to the device of this name."""
    machine = Machine(choose_device(device))
    for model in models:
        machine.prepare(model, dtype_on(machine))
    return machine


def dtype_on(machine: Machine) -> str:
    return choose_dtype("auto", machine.device)


def class_names(weights: str, n_classes: int) -> list[str]:
    """The names of the classes of a checkpoint's own head: the id2label of its config.json."""
    names = read_names(find_checkpoint(weights)[1]).classes()
    if len(names) != n_classes:
        count = f"{len(names)} names for the {n_classes} classes of its head"
        raise UserError(f"{weights}: id2label in its config.json has {count}")
    return names


# ------------------------------------------------------------------------------- sounds to windows


def find_sounds(paths: Iterable[Path]) -> list[Path]:
    """Files as they are, and every sound beneath folders. UserError for folders without any."""
    found = []
    for path in paths:
        files, others = files_in(path) if path.is_dir() else ([path], [])
        if not files:
            raise UserError(f"{path} holds no sounds ({', '.join(SUFFIXES)})")
        # Tracks of events were written here.
        names = [file.name for file in others if not file.name.endswith(".events.txt")]
        if names:
            some = first_of(names)
            warn(f"{path}: {len(names)} files are no {', '.join(SUFFIXES)}, ignored ({some})")
        found += files
    return found


def at_16_khz(samples: np.ndarray, rate: int | None) -> np.ndarray:
    """Samples at a rate to float32 at 16 kHz, (samples,). Unreadable if they are no sound.

    Whole numbers, as in a 16-bit file, would be thousands of times too loud.
    """
    import soxr

    wave = np.asarray(samples)
    is_sound = wave.dtype.kind == "f" and wave.ndim == 1 and wave.size and np.isfinite(wave).all()
    if not is_sound or rate is None or not rate >= LOWEST_RATE:
        found = f"{wave.dtype} {wave.shape} at {rate} Hz"
        wanted = "give finite floats in [-1, 1], (samples,), and their rate"
        raise Unreadable(f"no sound: {found}; {wanted}")
    try:
        check_length(len(wave) / rate)
        wave = mono(wave[:, None])
    except ValueError as error:
        raise Unreadable(f"no sound: the array {error}") from None
    return soxr.resample(wave.astype(np.float32), rate, RATE)


def cut(blocks: Iterable[np.ndarray], n_frames: int, hop: int) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of a sound to windows of `n_frames` frames, one every `hop` samples.

    Yields (first sample, samples). The last window ends where the sound ends, up to a frame, so
    that nothing is left out and nothing is padded. Only a sound shorter than one window stays
    shorter.
    """
    window = (n_frames - 1) * HOP + WINDOW  # samples under n_frames frames
    start = 0
    ahead = np.zeros(0, np.float32)  # what comes from `start` on
    for block in blocks:
        ahead = np.concatenate([ahead, block])
        while len(ahead) >= window + hop:  # another whole window follows
            yield start, ahead[:window]
            start += hop
            ahead = ahead[hop:]
    rest = (len(ahead) - window) // HOP * HOP  # whole frames after this window
    if rest > 0:
        yield start, ahead[:window]
        start += rest
        ahead = ahead[rest:]
    yield start, ahead


# ------------------------------------------------------------------------------- the command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m tools.predict",
        description="Classify sounds with a trained model, or tag them with the pretrained one.",
    )
    add = parser.add_argument
    # fmt: off
    add("paths", nargs="+", type=Path, metavar="PATH",
        help="a run folder (all its folds) or a foldK.safetensors, then sounds and folders of them")
    add("--tags", action="store_true",
        help="name no run: the pretrained model gives AudioSet's 527 tags")
    add("--weights", help="weights of the backbone, if they have moved; with --tags: another AST")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")

    answers = parser.add_argument_group("answers")
    add = answers.add_argument
    add("--top", type=positive, default=3, help="show so many classes of a file (%(default)s)")
    add("--hop", type=float, metavar="S", help="seconds from one window of a long sound to the "
        "next; default: half a window")
    add("--min-confidence", type=float, metavar="P", help="an answer of less confidence is "
        "'unsure'; default: what nine of ten right answers on the validation clips have, or 0 for "
        "--events with a class 'background'")
    add("--embeddings", type=Path, metavar="FILE.npz", help="also write what the head reads")
    form = answers.add_mutually_exclusive_group()
    form.add_argument("--json", dest="form", action="store_const", const="json", default="text",
        help="print one JSON object per line")
    form.add_argument("--csv", dest="form", action="store_const", const="csv", default="text",
        help="print one row for each of the --top classes of a file")

    add = parser.add_argument_group("events: when each class is heard").add_argument
    add("--events", action="store_true", help="write a label track for Audacity beside each file, "
        "FILE.events.txt; with --json or --csv print the events instead")
    add("--out", type=Path, metavar="FOLDER", help="write the label tracks into this folder")
    add("--threshold", type=float, default=0.4, help="least probability of an event (%(default)s): "
        "of its class, or of all classes but 'background' together")
    add("--min-length", type=float, metavar="S", help="least seconds of an event; default: one "
        "window long")
    add("--without", action="append", default=[BACKGROUND], metavar="CLASS", help="a class that is "
        "never an event, like 'background'; may be given several times")
    add("--truth", type=Path, metavar="FOLDER", help="compare with label tracks in this folder: "
        "NAME.txt for NAME.wav")
    # fmt: on
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> int:
    """Answer every file that can be read; 1 if there was one that cannot."""
    sounds = args.paths if args.tags else args.paths[1:]
    if not sounds:
        raise UserError("no sounds to classify: give files or folders after the run")
    if args.out and not (args.events and args.form == "text"):
        raise UserError("--out is for the label tracks of --events, not for --json or --csv")
    if args.truth and not (args.events and args.form == "text"):
        raise UserError("--truth is for --events, and neither for --json nor for --csv")
    if not args.events and (args.min_length is not None or len(args.without) > 1):
        raise UserError("--min-length and --without are for --events")
    if args.min_length is not None and not 0 <= args.min_length < math.inf:
        raise UserError(f"--min-length {args.min_length}: give a number of seconds")
    for option, share in (
        ("--threshold", args.threshold),
        ("--min-confidence", args.min_confidence),
    ):
        if share is not None and not 0 <= share <= 1:
            raise UserError(f"{option} {share}: give a number from 0 to 1")
    if args.embeddings and args.embeddings.suffix != ".npz":  # a sound, which would be lost
        raise UserError("--embeddings: give the name of a file that ends in .npz")
    files = find_sounds(sounds)
    tracks = {file: (args.out or file.parent) / f"{file.name}.events.txt" for file in files}
    if len(set(tracks.values())) < len(tracks):
        raise UserError("--out: two sounds of one name would have one label track: rename one")
    if args.truth:
        require_own_tracks(files)
        truth = {file: labels_of(file, args.truth, args.without) for file in files}
    if args.tags:
        classifier = load_tagger(args.weights or "audioset", args.min_confidence, args.device)
    else:
        classifier = load(args.paths[0], args.weights, args.min_confidence, args.device)
    if args.truth:
        labelled = {event[3] for events in truth.values() for event in events}
        warn_of_spellings(args.truth, labelled | set(map(printable, classifier.classes)), "classes")
    if args.events and args.min_confidence is None and BACKGROUND in classifier.classes:
        # What is no event is background. The validation clips, most of which are background, make
        # a threshold that refuses most events of another recording.
        classifier = replace(classifier, min_confidence=0.0)
    for name in args.without:
        if args.events and name != BACKGROUND:
            nearest(name, classifier.classes, "class")
    width = 2 + max(len(printable(file)) for file in files)
    if args.form == "csv":
        print(csv_of([EVENT_COLUMNS if args.events else COLUMNS]), end="")
    found = []  # events
    labels = []  # of the same sounds, from --truth
    names = []
    wholes = []
    answered = 0
    unsure = 0
    failed = 0
    for file in files:
        name = printable(file)
        windows = []
        try:
            heard = classifier.listen(file, hop=args.hop, top=args.top)
            for answer in Bar(heard, name, "window", leave=False):
                windows.append(replace(answer, vector=None))  # all vectors would fill the memory
        except Unreadable as error:
            print(f"error: {printable(error)}", file=sys.stderr)
            failed = 1
            continue
        answered += 1
        unsure += answer.unsure
        if args.embeddings:
            names.append(name)
            wholes.append(answer)  # the last answer is on the whole
        if not args.events:
            print_answer(name, answer, args.form, width)
            continue
        options = args.threshold, args.without, args.min_length
        events = list(events_of(windows[:-1], classifier.classes, *options))
        if args.form == "text":
            write_track(tracks[file], events)
        else:
            for event in events:
                print_event(name, event, args.form)
        if args.truth:
            found += [(name, event.start, event.end, event.best) for event in events]
            labels += truth[file]
    if args.truth:
        print_scores(found, labels)
    if args.embeddings:
        save_embeddings(args.embeddings, names, wholes)
    if answered > 1 and unsure > answered / 2:
        warn(
            f"{unsure} of {answered} files are unsure: they are unlike the sounds that the model "
            "was validated on. Check some answers by ear, and train with such sounds"
        )
    return failed


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
