"""Make a backbone from recordings of any kind: each file is a class of its own.

    python -m tools.pretrain SOUNDS --steps 6000 --out backbone.safetensors

A second of a recording is read at another speed, through another filter, at another level, with
noise and another sound beneath it, and masked. The model says which recording it is.
`weights/README.md` has the recordings of the demo's backbone. The number of a batch decides what is
in it. So the same command continues an interrupted run where its state was last saved, and ends
with the bits of an unbroken one.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from load_weights import load_ast, save_ast
from petl_more import Patchout
from sounds.audio import files_in, read_audio
from support.checkpoints import check_suffix, sha256_of, unpickled, write_state
from support.command import Parser, UserError, exit_code, positive, warn
from support.processes import say
from support.progress import Bar
from support.records import check_not_of_run

N_FRAMES = data.DATASETS["demo"].n_frames
LENGTH = (N_FRAMES - 1) * data.HOP + data.WINDOW  # samples of a crop
LONGEST = 20  # seconds of a recording that are used
KEEP = 0.5  # of the patches, in training: twice as fast
LR = 1e-3
COOL = 0.25  # the share of the steps, the last ones, in which the learning rate falls to zero


def read_all(folder: Path) -> list[np.ndarray]:
    """The recordings beneath a folder, each once, at a peak of 1.

    Those under 0.1 s, silent or unreadable are left out. UserError unless two are left.
    """
    waves = {}
    files, _ = files_in(folder)
    for file in Bar(files, "reading", unit="file"):
        try:
            wave = read_audio(file, LONGEST)
        except ValueError as error:
            warn(f"{file} {error}, left out")
            continue
        if len(wave) >= data.RATE / 10 and np.abs(wave).max() > 1e-3:
            waves[sha256_of(torch.from_numpy(wave))] = wave / np.abs(wave).max()
    if len(waves) < 2:
        raise UserError(
            f"{folder} has {len(waves)} recordings of at least 0.1 s; "
            "give a folder with two or more"
        )
    return list(waves.values())


# -------------------------------------------------------------------------- what the model hears


def crop(wave, rng):
    """LENGTH samples from anywhere in a wave, of four draws the first that is not silent.

    A shorter wave lies anywhere in them.
    """
    if len(wave) <= LENGTH:
        before = rng.integers(0, LENGTH - len(wave) + 1)
        return np.pad(wave, (before, LENGTH - len(wave) - before))
    for _ in range(4):
        start = rng.integers(0, len(wave) - LENGTH + 1)
        clip = wave[start : start + LENGTH]
        if np.abs(clip).max() > 0.05:
            break
    return clip


def faster(clip, rng):
    """At 0.85 to 1.18 times the speed, pitch and all. What is missing at the end is silent."""
    samples = np.arange(LENGTH)
    return np.interp(samples * rng.uniform(0.85, 1.18), samples, clip, right=0)


def heard(waves, i, rng):
    """Recording i, as it is heard this time: (LENGTH,) float32."""
    clip = crop(waves[i], rng)
    if rng.random() < 0.5:
        clip = faster(clip, rng)
    if rng.random() < 0.5:  # another sound, 3 to 20 dB below
        other = crop(waves[rng.integers(len(waves))], rng)
        level = 10 ** (-rng.uniform(3, 20) / 20)
        clip = clip + other * (clip.std() + 1e-6) / (other.std() + 1e-6) * level
    if rng.random() < 0.5:
        noise = rng.standard_normal(LENGTH, np.float32)
        clip = clip + noise * 10 ** (rng.uniform(-70, -30) / 20)
    return (clip * 10 ** (rng.uniform(-30, 0) / 20)).astype(np.float32)


def gains(size, rng):
    """Filters of `size` clips, (size, 1, 128), to be added to their features.

    Four of five tilt the spectrum by up to 12 dB and make a wave of up to 6 dB in it.
    """
    drawn = rng.uniform([-12, -6, 0.5, 0], [12, 6, 3, 1], (size, 4))
    tilt, depth, waves, phase = drawn.T[..., None]
    low, high = np.log1p([20 / 700, data.RATE / 1400])
    mel = np.linspace(low, high, data.N_MELS + 2)[1:-1]  # the middle of each band
    f = 700 * np.expm1(mel) / (data.RATE / 2)
    decibels = tilt * (f - 0.3) + depth * np.sin(2 * np.pi * (f * waves + phase))
    decibels *= rng.random((size, 1)) < 0.8
    return torch.from_numpy(decibels * math.log(10) / 10).float()[:, None]


def batch(waves, size, step):
    """Masked features (size, N_FRAMES, 128), and which recordings they are (size,)."""
    rng = np.random.default_rng([0, step])
    labels = rng.integers(len(waves), size=size)
    clips = torch.from_numpy(np.stack([heard(waves, i, rng) for i in labels]))
    x = data.to_input(data.fbank(clips) + gains(size, rng), N_FRAMES)
    x = data.spec_augment(x, torch.from_numpy(rng.random((size, 4))), max_frames=16)
    return x, torch.from_numpy(labels)


# ---------------------------------------------------------------------------------- the training


def pretrain(waves, weights, steps, out, size=64, save_every=250):
    """Train `steps` steps from `weights`, and write the model without its head.

    The learning rate rises for at most 200 steps, stays, and falls to zero in the last quarter. The
    state is saved beside `out` every `save_every` steps. UserError if the one that is there is of
    another training.
    """
    torch.manual_seed(0)  # the new head is drawn
    model = load_ast(weights, N_FRAMES, len(waves))
    network = Patchout(model, KEEP)
    optimizer = torch.optim.AdamW(model.parameters(), LR, (0.9, 0.98), 1e-6, 0.05)
    file = out.with_suffix(".resume.pt")
    which = sha256_of([model.state_dict(), [torch.from_numpy(wave) for wave in waves], steps, size])
    first = 0
    if file.exists():
        try:
            state = unpickled(file)
        except ValueError:
            state = {}
        if state.get("which") != which:
            raise UserError(
                f"{file} is damaged or of another training: delete it, or give another --out"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    warm = max(1, min(200, steps // 10))
    bar = Bar(range(first, steps), "pretraining", unit="step")
    for step in bar:
        x, labels = batch(waves, size, step)
        torch.manual_seed(step)  # the patches that are kept are drawn
        rate = min(1, (step + 1) / warm, (steps - step) / (COOL * steps))
        optimizer.param_groups[0]["lr"] = LR * rate
        loss = F.cross_entropy(network(x), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=loss.item())
        if (step + 1) % save_every == 0:
            state = {"which": which, "step": step + 1}
            state["model"] = model.state_dict()
            state["optimizer"] = optimizer.state_dict()
            write_state(file, state)

    model.head = nn.Identity()
    model.config = replace(model.config, n_classes=1)
    made = f"{len(waves)} recordings, {steps} steps, from {Path(weights).name}"
    save_ast(model, out, {"pretrained": made}, torch.float16)
    file.unlink(missing_ok=True)
    say(f"written to {out}, made from {made}")


def start(argv):
    parser = Parser(
        "python -m tools.pretrain",
        description="Pretrain a backbone on recordings, each a class of its own.",
    )
    add = parser.add_argument
    add(
        "sounds",
        type=Path,
        metavar="SOUNDS",
        help="a folder with recordings, also in folders below it",
    )
    add("--steps", type=positive, default=6_000, help="training steps (%(default)s)")
    add("--weights", default="demo", help="weights to start from, as for train.py (%(default)s)")
    add("--out", type=Path, required=True, help="file to write, NAME.safetensors")
    args = parser.parse_args(argv)
    check_suffix(args.out)
    check_not_of_run(args.out)
    pretrain(read_all(args.sounds), args.weights, args.steps, args.out)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: start(argv))


if __name__ == "__main__":
    sys.exit(main())
