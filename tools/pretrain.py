"""Make a backbone from recordings of any kind: the model says which recording a piece is from.

    python -m tools.pretrain SOUNDS --steps 6000 --out backbone.safetensors

A piece lasts half a second to five seconds. It is heard faster or slower, higher or lower, in a
room, through a filter or a telephone, at another level, with noise or another sound beneath it, and
masked. All of this is done to features: to log-Mel powers. Two losses are added. One asks for the
recording by name, as a class. The other asks that two pieces of a recording are more alike than
pieces of different ones (Khosla et al., 2020). So the model learns what stays the same.

One piece of seven is a sound of `sounds/synth.py`, whose 68 kinds are classes, too.

`weights/README.md` has the recordings of the demo's backbone. The number of a batch decides what is
in it. So the same command continues an interrupted run where its state was last saved.
"""

import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from ast_model import AST
from load_weights import find_checkpoint, load_ast, save_ast
from sounds import synth
from sounds.audio import files_in, read_audio
from sounds.groups import expression_of
from support.checkpoints import check_suffix, sha256_of, unpickled, write_state
from support.command import Parser, UserError, exit_code, positive, warn
from support.processes import say
from support.progress import Bar
from support.records import check_not_of_run

LONGEST = 20  # seconds of a recording that are used
LENGTHS = (48, 64, 96, 128, 192, 256, 384, 512)  # frames of a piece: 0.5 to 5.1 s
N_FRAMES = max(LENGTHS)  # of the backbone that comes out
TOKENS = 12_000  # patches of a batch, about
MADE = 0.15  # the share of made sounds
TAKES = 200  # of each kind of made sound
LR = 1e-3
COOL = 0.3  # the share of the steps, the last ones, in which the learning rate falls to zero
FLOOR = math.log(2**-23)  # of a log-Mel power: digital silence, see data.fbank

low, high = np.log1p([20 / 700, data.RATE / 1400])
MEL = np.linspace(low, high, data.N_MELS + 2)[1:-1]  # the middle of each band
HZ = 700 * np.expm1(MEL)


def nats(decibels):
    """What is added to the logarithm of a power."""
    return decibels * math.log(10) / 10


class Recordings(NamedTuple):
    """What there is to hear, as features, and how often each is drawn."""

    features: list[np.ndarray]  # each (frames, 128) float16, of recordings and then of made sounds
    labels: np.ndarray  # the class of each
    chances: np.ndarray  # of the recordings, cumulated
    members: list[list[int]]  # the recordings of each class


def features_of(wave: np.ndarray) -> np.ndarray:
    """(samples,) to (frames, 128) float16."""
    with torch.inference_mode():
        return data.fbank(torch.from_numpy(wave)[None])[0].half().numpy()


def read_all(folder: Path, same: str | None) -> Recordings:
    """The recordings beneath a folder, each once, at a peak of 1, and made sounds behind them.

    Those under 0.1 s, silent or unreadable are left out. UserError unless two are left. `same` is
    a regular expression: files in which its parentheses find the same texts are one class.
    Otherwise every recording is a class of its own. A folder in SOUNDS with n recordings is drawn
    from in proportion to n^(3/4).
    """
    found = {}
    places = []
    labels = []
    classes = {}
    files, _ = files_in(folder)
    for file in Bar(files, "reading", unit="file"):
        try:
            wave = read_audio(file, LONGEST)
        except ValueError as error:
            warn(f"{file} {error}, left out")
            continue
        if len(wave) < data.RATE / 10 or np.abs(wave).max() <= 1e-3:
            continue
        wave = wave / np.abs(wave).max()
        digest = sha256_of(torch.from_numpy(wave))
        if digest in found:
            continue
        found[digest] = features_of(wave)
        name = file.relative_to(folder)
        places.append(name.parts[0])
        match = re.search(same, str(name)) if same else None
        key = match.groups() if match and any(match.groups()) else str(name)
        labels.append(classes.setdefault(key, len(classes)))
    if len(found) < 2:
        raise UserError(
            f"{folder} has {len(found)} recordings of at least 0.1 s; "
            "give a folder with two or more"
        )
    members = [[] for _ in classes]
    for i, label in enumerate(labels):
        members[label].append(i)
    _, which, sizes = np.unique(places, return_inverse=True, return_counts=True)
    chances = sizes[which] ** -0.25
    made = []
    for kind in sorted(synth.SOURCE):
        for take in Bar(range(TAKES), f"making {kind}", unit="sound"):
            made.append(features_of(synth.render(kind, take, 0).astype(np.float32)))
            labels.append(len(classes))
        classes[kind] = len(classes)
    features = list(found.values()) + made
    return Recordings(features, np.array(labels), (chances / chances.sum()).cumsum(), members)


# ------------------------------------------------------------------------- what the model is given


def crop(recording, frames, rng, speed):
    """`frames` frames of a recording at `speed`, (frames, 128), and where the sound ends in them.

    If the recording is longer: from anywhere in it, of three draws the first that is not quiet. If
    it is shorter: it begins at once in half of the pieces and lies anywhere in the others, where
    silence follows.
    """
    wanted = round(frames * speed)
    x = recording
    if len(x) > wanted:
        for _ in range(3):
            start = rng.integers(0, len(recording) - wanted + 1)
            x = recording[start : start + wanted]
            if x.max() > 2:
                break
    x = torch.from_numpy(x.astype(np.float32))
    length = min(frames, max(16, round(len(x) / speed)))
    if length != len(x):
        x = F.interpolate(x.T[None], size=length, mode="linear", align_corners=True)[0].T
    if length == frames:
        return x, frames
    before = 0 if rng.random() < 0.5 else rng.integers(0, frames - length + 1)
    piece = torch.full((frames, data.N_MELS), FLOOR)
    piece[before : before + length] = x
    return piece, frames if before else length


def higher(x, factor, shift):
    """Band b becomes what was at factor b + shift: other pitches, other voices.

    x: (pieces, frames, 128). factor, shift: (pieces,).
    """
    bands = torch.arange(float(data.N_MELS)) * factor[:, None] + shift[:, None]
    lower = bands.floor().clamp(0, data.N_MELS - 2).long()
    share = (bands - lower).clamp(0, 1)[:, None]

    def at(band):
        return x.gather(2, band[:, None].expand(-1, x.shape[1], -1))

    x = at(lower) * (1 - share) + at(lower + 1) * share
    return x.masked_fill((bands > data.N_MELS - 0.5)[:, None], FLOOR)


def gains(size, rng):
    """Filters of `size` pieces, (size, 1, 128), to be added to their features.

    Four of five tilt the spectrum by up to 12 dB and make a wave of up to 6 dB in it.
    """
    drawn = rng.uniform([-12, -6, 0.5, 0], [12, 6, 3, 1], (size, 4))
    tilt, depth, waves, phase = drawn.T[..., None]
    f = HZ / (data.RATE / 2)
    decibels = tilt * (f - 0.3) + depth * np.sin(2 * np.pi * (f * waves + phase))
    decibels *= rng.random((size, 1)) < 0.8
    return torch.from_numpy(nats(decibels)).float()[:, None]


def in_a_room(x, seconds, below):
    """Every power decays by 60 dB in `seconds`, after a first fall by `below` dB.

    x: (pieces, frames, 128). seconds, below: (pieces,).
    """
    decay = 13.8 / (seconds * 100)  # of a frame: 60 dB are 13.8 nats
    echo = (-torch.arange(40.0) * decay[:, None]).exp() * (10 ** (-below / 10))[:, None]
    echo[:, 0] = 1
    power = x.exp().permute(2, 0, 1)  # (128, pieces, frames)
    power = F.conv1d(F.pad(power, (39, 0)), echo.flip(1)[:, None], groups=len(x))
    return power.permute(1, 2, 0).log()


def band_of(hz):
    """The band, not whole, in whose middle a frequency lies."""
    return (math.log1p(hz / 700) - MEL[0]) / (MEL[1] - MEL[0])


def heard(x, ends, white, rng, order):
    """Pieces (size, frames, 128) as they are heard this time, normalised as the model wants them.

    ends: where the sound of each ends. white: (128,), the log-Mel powers of white noise.
    order: draws the other sounds.
    """
    size, frames, _ = x.shape

    def uniform(least, most):
        return torch.from_numpy(rng.uniform(least, most, size)).float()

    def some(share):
        return torch.from_numpy(rng.random(size) < share)

    factor = torch.where(some(0.7), uniform(0.88, 1.14), torch.ones(size))
    shift = torch.where(some(0.3), uniform(-6, 6), torch.zeros(size))
    x = higher(x, factor, shift)

    mixed = some(0.5).nonzero()[:, 0]
    if len(mixed):  # another of these sounds, 3 to 20 dB below
        others = mixed[torch.randperm(len(mixed), generator=order)]
        other = x[others].roll(1, 0) + gains(len(mixed), rng)
        level = x[mixed].exp().mean((1, 2)).log() - other.exp().mean((1, 2)).log()
        level = level - nats(uniform(3, 20)[mixed])
        x = x.clone()
        x[mixed] = torch.logaddexp(x[mixed], other + level[:, None, None])

    echoing = some(0.25).nonzero()[:, 0]
    if len(echoing):
        seconds = uniform(0.1, 0.8)[echoing]
        x[echoing] = in_a_room(x[echoing], seconds, uniform(3, 15)[echoing])
    x = x + gains(size, rng)

    # A telephone: nothing above 3.4 to 5.5 kHz, and little below 300 Hz.
    narrow = some(0.3)
    cut = torch.tensor([band_of(hz) for hz in (3400, 4000, 5500)])
    cut = cut[torch.from_numpy(rng.integers(0, 3, size))]
    bands = torch.arange(float(data.N_MELS))
    gone = (bands > cut[:, None]) & narrow[:, None]
    weak = (bands < band_of(300)) & (narrow & some(0.5))[:, None]
    x = x - 7.0 * weak[:, None]

    x = x - nats(uniform(0, 35))[:, None, None]
    level = nats(uniform(30, 75))
    noisy = some(0.6)
    noise = white + gains(size, rng) - level[:, None, None]
    drawn = rng.gamma(1.3, 1 / 1.3, (size, frames, data.N_MELS)).astype(np.float32)
    noise = noise + torch.from_numpy(np.log(drawn + 1e-3))
    x = torch.where(noisy[:, None, None], torch.logaddexp(x, noise), x)
    x = x.masked_fill(gone[:, None], FLOOR).clamp_min(FLOOR)

    # Behind the end there is silence, or zeros as data.to_input writes them.
    padded = (torch.arange(frames) >= torch.tensor(ends)[:, None]) & some(0.7)[:, None]
    x = x.masked_fill(padded[..., None], 0.0)
    return (x - data.MEAN) / (2 * data.STD)


def white_noise():
    """The mean log-Mel powers (128,) of white noise with a deviation of 1."""
    noise = torch.randn(1, 10 * data.RATE, generator=torch.Generator().manual_seed(0))
    return data.fbank(noise).exp().mean((0, 1)).log()


def batch(recordings, white, step):
    """Pairs of pieces (size, frames, 128), their classes (size,), and how many patches to keep.

    Piece 2 i and piece 2 i + 1 have the same class: they are of one recording, or of two that
    `same` has made one class. The number of frames is that of all pieces of a batch.
    """
    rng = np.random.default_rng([1, step])
    frames = LENGTHS[rng.integers(len(LENGTHS))]
    patches = 12 * ((frames - 16) // 10 + 1)
    kept = int(patches * 0.5) if patches > 60 else int(patches * 0.7)
    kept = min(patches, max(36, min(kept, 160)))
    size = min(256, max(48, TOKENS // kept))

    n_made = len(recordings.features) - len(recordings.chances)
    n_real = len(recordings.chances)
    drawn = np.searchsorted(recordings.chances, rng.random(size)).clip(max=n_real - 1)
    is_made = rng.random(size) < MADE
    drawn = np.where(is_made, n_real + rng.integers(0, n_made, size), drawn)
    drawn = np.repeat(drawn[: size // 2], 2)
    size = len(drawn)
    for i in range(1, size, 2):
        if drawn[i] < n_real:
            alike = recordings.members[recordings.labels[drawn[i]]]
            drawn[i] = alike[rng.integers(len(alike))]
    speeds = np.where(rng.random(size) < 0.7, rng.uniform(0.8, 1.25, size), 1)
    pieces = []
    ends = []
    for i, speed in zip(drawn, speeds, strict=True):
        piece, end = crop(recordings.features[i], frames, rng, speed)
        pieces.append(piece)
        ends.append(end)
    x = heard(torch.stack(pieces), ends, white, rng, torch.Generator().manual_seed(step))
    draws = torch.from_numpy(rng.random((size, 4))).float()
    x = data.spec_augment(x, draws, max_frames=max(8, frames // 5))
    return x, torch.from_numpy(recordings.labels[drawn]), kept


# ---------------------------------------------------------------------------------- the training


def vectors_of(model: AST, x, kept, order):
    """What the head reads of pieces (size, frames, 128) of any length: (size, dim).

    Positions of a shorter piece are those in the middle, as load_weights cuts them. `kept` patches
    of each piece go through the blocks, which is faster, and means that the others are hidden.
    """
    embed = model.embed
    patches = embed.patches(x.transpose(1, 2).unsqueeze(1)).flatten(2).transpose(1, 2)
    n_freq, wide = model.config.grid
    time = patches.shape[1] // n_freq
    start = wide // 2 - time // 2
    grid = embed.position[:, 2:].unflatten(1, (n_freq, wide))
    patches = patches + grid[:, :, start : start + time].flatten(1, 2)
    if kept < patches.shape[1]:
        draws = torch.rand(patches.shape[:2], generator=order)
        chosen = draws.argsort(1)[:, :kept]
        patches = patches.take_along_dim(chosen[..., None], 1)
    front = torch.cat([embed.cls, embed.dist], 1) + embed.position[:, :2]
    tokens = torch.cat([front.expand(len(x), -1, -1), patches], 1)
    return model.pool(model.norm(model.encode(tokens)))


def contrastive(z, labels):
    """The supervised contrastive loss (Khosla et al., 2020) at temperature 0.1. z: (size, 128)."""
    z = F.normalize(z, dim=1)
    similar = z @ z.T / 0.1
    similar.fill_diagonal_(-1e4)
    same = (labels[:, None] == labels).float().fill_diagonal_(0)
    return -(similar.log_softmax(1) * same).sum(1).div(same.sum(1)).mean()


def pretrain(recordings, weights, steps, out, dtype, save_every=250):
    """Train `steps` steps from `weights`, and write the model without its head.

    The learning rate rises for 500 steps, or for a tenth of them if that is less, stays, and falls
    to zero in the last 30 %. The state is saved beside `out` every `save_every` steps. UserError if
    the one that is there is of another training.
    """
    torch.manual_seed(0)  # the new head is drawn
    model = load_ast(weights, N_FRAMES, int(recordings.labels.max()) + 1)
    dim = model.config.dim
    project = nn.Sequential(nn.Linear(dim, 256), nn.GELU(), nn.Linear(256, 128))
    network = nn.ModuleDict({"model": model, "project": project})
    optimizer = torch.optim.AdamW(network.parameters(), LR, (0.9, 0.98), 1e-6, 0.05)
    file = out.with_suffix(".resume.pt")
    sounds = [torch.from_numpy(one) for one in recordings.features]
    classes = torch.from_numpy(recordings.labels)
    which = sha256_of([model.state_dict(), sounds, classes, steps, dtype])
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
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    white = white_noise()
    warm_up = min(500, max(1, steps // 10))
    bar = Bar(range(first, steps), "pretraining", unit="step")
    for step in bar:
        x, labels, kept = batch(recordings, white, step)
        order = torch.Generator().manual_seed(step)  # draws the patches that are kept
        rate = min(1, (step + 1) / warm_up, (steps - step) / (COOL * steps))
        optimizer.param_groups[0]["lr"] = LR * rate
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            vectors = vectors_of(model, x, kept, order)
            logits = model.head(vectors)
            z = project(vectors)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
        loss = loss + contrastive(z.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=loss.item())
        if (step + 1) % save_every == 0:
            state = {"which": which, "step": step + 1}
            state["network"] = network.state_dict()
            state["optimizer"] = optimizer.state_dict()
            write_state(file, state)

    model.head = nn.Identity()
    model.config = replace(model.config, n_classes=1)
    made = f"{len(recordings.chances)} recordings, {steps} steps, from {Path(weights).name}"
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
    add("--same", metavar="REGEX", help="files with the same text in its parentheses are one class")
    add("--steps", type=positive, default=6_000, help="training steps (%(default)s)")
    add("--weights", default="demo", help="weights to start from, as for train.py (%(default)s)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="(%(default)s)")
    add("--out", type=Path, required=True, help="file to write, NAME.safetensors")
    args = parser.parse_args(argv)
    check_suffix(args.out)
    check_not_of_run(args.out)
    if args.same is not None:
        expression_of("--same", args.same)  # a wrong pattern is an error now
    if not args.weights.startswith("random:"):
        find_checkpoint(args.weights)  # and so is a wrong name of weights
    recordings = read_all(args.sounds, args.same)
    pretrain(recordings, args.weights, args.steps, args.out, args.dtype)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: start(argv))


if __name__ == "__main__":
    sys.exit(main())
