"""What a seed, a fold and an epoch change in a run of train.py, and what they must not; and every
step of it by hand.

A run is watched from outside: what the model reads, what is differentiated, what AdamW does. It is
then computed again from the table of clips, their features and the formulas of section III-A.
"""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import SMALL_AST, write_csv
from safetensors.torch import load_file
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import data
import train
from ast_model import AST
from load_weights import load_ast, load_trained

EPOCHS, BATCH, STEPS = 5, 7, 3  # 18 clips train in a fold: batches of 7, 7 and 4
# (seed, fold), in the order in which they are trained
RUNS = [(0, 1), (0, 3), (0, 4), (7, 1), (7, 3), (7, 4)]
# fold k tests k and validates k - 1
TRAINING, VALIDATION = {1: (2, 3), 3: (1, 4), 4: (1, 2)}, {1: 4, 3: 2, 4: 3}


class Watched:
    """One fold as it went: `start` is what it trains from, `events` and `steps` are what happened,
    in order.

    events: ("train" or "eval", clips, what the model read, type of its answer). steps: dicts of
    learning rate, trained tensors before and after, gradients, loss, and what the model read since
    the last step (`events`).
    """

    def __init__(self, model: AST):
        self.model, self.events, self.steps, self.losses = model, [], [], []
        self.names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        self.start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def tensors(self) -> dict:
        return {
            name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad
        }

    def clips(self, epoch: int) -> list[int]:
        """The clips of an epoch in the order in which they were trained on."""
        return [
            i
            for step in self.steps[STEPS * (epoch - 1) : STEPS * epoch]
            for e in step["events"]
            for i in e[1]
        ]


class Sounds:
    """36 clips of noise with a tone, 3 classes in 4 folds of 9, listed in no order; their features
    and their labels.
    """

    def __init__(self, root: Path):
        rng, time = np.random.default_rng(0), np.arange(32_000) / 16_000
        clips = [(fold, label) for fold in (1, 2, 3, 4) for label in (0, 1, 2) for _ in range(3)]
        clips = [clips[i] for i in rng.permutation(36)]
        self.folds, self.labels = (np.array(column) for column in zip(*clips, strict=True))
        features = []
        for i, label in enumerate(self.labels):
            tone = np.sin(2 * np.pi * (300 + 1200 * label + 200 * rng.standard_normal()) * time)
            wave = rng.uniform(0.3, 0.5) * tone + 0.03 * rng.standard_normal(32_000)
            soundfile.write(root / f"{i}.wav", wave, 16_000, subtype="PCM_16")
            wave, _ = soundfile.read(root / f"{i}.wav", dtype="float32")
            features.append(data.to_input(data.fbank(torch.from_numpy(wave)[None]), 200))
        self.features = torch.cat(features).half().float()
        self.folds_table = self.write(root / "folds.csv", "fold", self.folds)
        self.split_table = self.write(
            root / "split.csv", "split", np.where(self.folds > 2, "train", "test")
        )
        few = np.flatnonzero(self.labels == 2)[2:]  # of the last class two clips are left
        self.plain_table = self.write(root / "plain.csv", "remark", self.folds, without=few)

    def write(self, table: Path, column: str, values, without=()) -> Path:
        rows = [
            f"{i}.wav,class {self.labels[i]},{value}"
            for i, value in enumerate(values)
            if i not in without
        ]
        return write_csv(table, f"path,label,{column}", *rows)

    def of(self, *folds: int) -> list[int]:
        return np.flatnonzero(np.isin(self.folds, folds)).tolist()

    def which(self, x: torch.Tensor) -> list[int]:
        """The clips in a batch, known by the values that no mask has changed."""
        same = x[:, None, ::3, ::3] == self.features[None, :, ::3, ::3]
        return same.flatten(2).float().mean(2).argmax(1).tolist()


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Sounds:
    return Sounds(tmp_path_factory.mktemp("sounds"))


@pytest.fixture(scope="module")
def watch(sounds, tmp_path_factory):
    """Runs train.py on the miniature; returns the folder of the method and one Watched for each
    fold.
    """

    def call(*options, table=None) -> tuple[Path, list[Watched]]:
        out, watched = tmp_path_factory.mktemp("runs"), []

        def before(module, args):
            if (
                isinstance(module, AST)
                and torch.is_grad_enabled()
                and not any(w.model is module for w in watched)
            ):
                watched.append(Watched(module))

        def after(module, args, logits):
            if isinstance(module, AST):
                phase = "train" if torch.is_grad_enabled() else "eval"
                assert module.training == (phase == "train")
                x = args[0].detach().clone()
                watched[-1].events.append((phase, sounds.which(x), x, logits.dtype))

        def before_step(optimizer, *_):
            assert type(optimizer) is torch.optim.AdamW
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            # all that trains, and nothing else
            assert sorted(map(id, parameters)) == sorted(watched[-1].names)
            rates = {
                watched[-1].names[id(p)]: group["lr"]
                for group in optimizer.param_groups
                for p in group["params"]
            }
            since = sum(len(step["events"]) for step in watched[-1].steps)
            watched[-1].steps.append(
                {
                    "rates": rates,
                    "before": watched[-1].tensors(),
                    "losses": list(watched[-1].losses),
                    "gradients": {watched[-1].names[id(p)]: p.grad.clone() for p in parameters},
                    "events": [event for event in watched[-1].events if event[0] == "train"][
                        since:
                    ],
                }
            )
            watched[-1].losses.clear()

        def after_step(*_):
            watched[-1].steps[-1]["after"] = watched[-1].tensors()

        def backward(loss, *args, **kwargs):
            assert loss.dtype == torch.float32
            watched[-1].losses.append(loss.item())
            return original(loss, *args, **kwargs)

        hooks = [
            torch.nn.modules.module.register_module_forward_pre_hook(before),
            torch.nn.modules.module.register_module_forward_hook(after),
            register_optimizer_step_pre_hook(before_step),
            register_optimizer_step_post_hook(after_step),
        ]
        original = torch.Tensor.backward
        torch.Tensor.backward = backward
        logmel = train.scores_of_logmel  # its fit is not what is watched
        train.scores_of_logmel = lambda *_: {}
        defaults = {
            "--dataset": "csv",
            "--data-dir": table or sounds.folds_table,
            "--weights": SMALL_AST,
            "--seconds": 2,
            "--method": "houlsby_par",
            "--epochs": EPOCHS,
            "--batch-size": BATCH,
            "--lr": 5e-3,
            "--device": "cpu",
            "--out": out,
            "--cache-dir": sounds.folds_table.parent / "cache",
        }
        try:
            assert (
                train.main(
                    [str(word) for pair in defaults.items() for word in pair] + list(options)
                )
                == 0
            )
        finally:
            torch.Tensor.backward = original
            train.scores_of_logmel = logmel
            for hook in hooks:
                hook.remove()
        (folder,) = (out / "csv").iterdir()
        return folder, watched

    return call


@pytest.fixture(scope="module")
def campaign(watch) -> tuple[Path, dict[tuple[int, int], Watched]]:
    """Two seeds and three folds, masked: the folder and what happened by (seed, fold)."""
    folder, watched = watch("--seed", "0,7", "--folds", "1,3,4")
    return folder, dict(zip(RUNS, watched, strict=True))


def differ(values) -> bool:
    """Whether no two of the values, which are lists or tensors, are equal."""
    values = [torch.as_tensor(value) for value in values]
    return not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


def answers(model: AST, tensors: dict, x: torch.Tensor) -> torch.Tensor:
    return torch.func.functional_call(model, tensors, (x,))


def percent_right(logits: torch.Tensor, labels) -> float:
    return (
        100
        * sum(int(a) == int(b) for a, b in zip(logits.argmax(1), labels, strict=True))
        / len(labels)
    )


# ------------------------------------------------------------------------------------ what is drawn


def test_every_epoch_takes_all_training_clips_in_an_order_of_its_own(campaign, sounds):
    orders = []
    for (_, fold), watched in campaign[1].items():
        training = sounds.of(*TRAINING[fold])
        epochs = [watched.clips(epoch) for epoch in range(1, EPOCHS + 1)]
        assert all(sorted(order) == training != order for order in epochs)
        orders += [[training.index(i) for i in order] for order in epochs]
    assert differ(orders)


def test_a_fold_starts_with_tensors_of_its_own(campaign):
    """Head and method are new in every seed and fold, the backbone is that of the checkpoint in all
    of them.
    """
    starts = [watched.start for watched in campaign[1].values()]
    for name in (
        "head.weight",
        "head.bias",
        "blocks.0.attn.adapter.down.weight",
        "blocks.1.ffn.adapter.down.bias",
    ):
        assert differ(start[name] for start in starts)
    backbone = load_ast(SMALL_AST, 200, 3).state_dict()
    for start in starts:
        for name, tensor in start.items():
            if ".adapter.up." in name:
                assert not tensor.any()
            elif not name.startswith("head.") and ".adapter." not in name:
                assert torch.equal(tensor, backbone[name.replace(".wrapped.", ".")]), name


def test_a_run_draws_the_same_again(campaign, watch):
    """One fold of one seed alone, after nothing else: the same to the last bit."""
    folder, (again,) = watch("--seed", "7", "--folds", "3")
    first = campaign[1][7, 3]
    assert all(torch.equal(first.start[name], again.start[name]) for name in first.start)
    assert [event[1] for event in again.events] == [event[1] for event in first.events]
    assert all(
        torch.equal(one[2], other[2]) for one, other in zip(again.events, first.events, strict=True)
    )
    one, other = (load_file(run / "seed7" / "fold3.safetensors") for run in (folder, campaign[0]))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_masks_and_length_of_a_run_do_not_change_the_order(campaign, watch, sounds):
    """Another number of epochs, another method and no masks: the same clips in the same order, as
    they are.
    """
    _, (other,) = watch(
        "--seed", "7", "--folds", "3", "--epochs", "2", "--no-mask", "--method", "lora"
    )
    assert len(other.steps) == 2 * STEPS
    assert [other.clips(epoch) for epoch in (1, 2)] == [
        campaign[1][7, 3].clips(epoch) for epoch in (1, 2)
    ]
    assert all(torch.equal(x, sounds.features[clips]) for _, clips, x, _ in other.events)


def test_masks_are_new_for_every_clip_of_every_epoch(campaign, sounds):
    """One band of up to 24 filters and one of up to 32 of 200 frames, as 80 of 500, in training
    only.
    """
    bands = []
    for watched in campaign[1].values():
        for phase, clips, x, _ in watched.events:
            if phase == "eval":
                assert torch.equal(x, sounds.features[clips])
                continue
            for clip, seen in zip(clips, x, strict=True):
                mels, frames = (seen == 0).all(0), (seen == 0).all(1)
                assert torch.equal(
                    seen, sounds.features[clip].masked_fill(mels | frames[:, None], 0)
                )
                bands.append([])
                for band in (mels, frames):
                    where = band.nonzero().flatten().tolist()
                    assert where == list(range(where[0], where[-1] + 1)) if where else True
                    bands[-1] += [len(where), where[0] if where else 0]
    assert len(bands) == len(RUNS) * EPOCHS * 18 and len(set(map(tuple, bands))) > 500
    widths = np.array(bands)[:, [0, 2]]
    assert (widths.max(0) < [24, 32]).all() and (widths.max(0) >= [22, 30]).all()
    assert widths.mean(0) == pytest.approx([11.5, 15.5], rel=0.2)


def test_few_shots_are_drawn_by_the_seed(watch, sounds):
    options = ("--shots", "2", "--folds", "1,3", "--epochs", "1")
    folder, watched = watch(*options, "--seed", "0,1,2")
    drawn = {}
    for (seed, fold), run in zip([(s, f) for s in (0, 1, 2) for f in (1, 3)], watched, strict=True):
        clips = sorted(i for step in run.steps for event in step["events"] for i in event[1])
        assert set(clips) <= set(sounds.of(*TRAINING[fold]))
        assert np.bincount(sounds.labels[clips]).tolist() == [2, 2, 2] and len(set(clips)) == 6
        with open(folder / f"seed{seed}" / "split.csv") as file:
            rows = [row for row in csv.DictReader(file) if row["fold"] == str(fold)]
        listed = {
            part: sorted(int(row["path"][:-4]) for row in rows if row["split"] == part)
            for part in ("train", "val", "test")
        }
        assert listed == {
            "train": clips,
            "val": sounds.of(VALIDATION[fold]),
            "test": sounds.of(fold),
        }
        assert all(row["label"] == f"class {sounds.labels[int(row['path'][:-4])]}" for row in rows)
        drawn[seed, fold] = clips
    assert differ(drawn[seed, 1] for seed in (0, 1, 2)) and differ(
        drawn[seed, 3] for seed in (0, 1, 2)
    )
    _, (again, _) = watch(*options, "--seed", "1")
    assert (
        sorted(i for step in again.steps for event in step["events"] for i in event[1])
        == drawn[1, 1]
    )


def test_without_folds_the_seed_draws_what_tests(watch, sounds):
    """Of the 12 clips of a class two test, two validate and eight train; of two clips one tests and
    one trains.
    """
    folder, watched = watch("--seed", "0,7", "--epochs", "1", table=sounds.plain_table)
    tested = []
    for seed, run in zip((0, 7), watched, strict=True):
        seen = {
            phase: [i for p, clips, _, _ in run.events if p == phase for i in clips]
            for phase in ("train", "eval")
        }
        parts = [seen["train"], seen["eval"][:4], seen["eval"][4:]]
        assert len(set(seen["train"] + seen["eval"])) == 26
        counts = [np.bincount(sounds.labels[part], minlength=3).tolist() for part in parts]
        assert counts == [[8, 8, 1], [2, 2, 0], [2, 2, 1]]
        with open(folder / f"seed{seed}" / "split.csv") as file:
            test = [int(row["path"][:-4]) for row in csv.DictReader(file) if row["split"] == "test"]
        assert sorted(parts[2]) == sorted(test)
        tested.append(sorted(test))
    assert differ(tested)


def test_dropout_acts_in_training_only(watch):
    """Convpass drops one number in ten in every epoch anew; tested is what is whole."""
    kept, seen = {"train": [], "eval": []}, set()

    def hook(module, args, output):
        if isinstance(module, torch.nn.Dropout):
            phase = "train" if torch.is_grad_enabled() else "eval"
            assert module.training == (phase == "train")
            seen.add(module)
            kept[phase].append(output[args[0] != 0].ne(0))

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        _, (run,) = watch("--method", "convpass_pfeiffer_par", "--folds", "1", "--epochs", "2")
    finally:
        handle.remove()
    assert len(seen) == run.model.config.depth  # no other dropout anywhere
    assert (
        torch.cat(kept["train"]).float().mean() == pytest.approx(0.9, abs=0.01)
        and torch.cat(kept["eval"]).all()
    )
    assert differ(kept["train"])


# ------------------------------------------------------------------------------- every step by hand


def test_gradients_are_those_of_the_mean_loss_of_the_batch(campaign, watch, sounds):
    """Also of the last batch, which is smaller, and of one that is taken in parts: each clip weighs
    the same in it.
    """
    folder, parted = watch("--micro-batch", "3", "--epochs", "1", table=sounds.split_table)
    model = load_trained(campaign[0] / "seed0" / "fold1.safetensors")
    assert [len(event[1]) for step in parted[0].steps for event in step["events"]] == [
        3,
        3,
        1,
        3,
        3,
        1,
        3,
        1,
    ]
    (row,) = csv.DictReader((folder / "seed0" / "metrics.csv").read_text().splitlines())
    assert float(row["loss"]) == pytest.approx(
        sum(sum(step["losses"]) for step in parted[0].steps) / STEPS, abs=1e-6
    )
    for watched in (*campaign[1].values(), *parted):
        for step in watched.steps:
            clips = [i for event in step["events"] for i in event[1]]
            tensors = {name: tensor.requires_grad_() for name, tensor in step["before"].items()}
            logits = answers(model, tensors, torch.cat([event[2] for event in step["events"]]))
            probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
            loss = -probabilities[torch.arange(len(clips)), sounds.labels[clips]].log().sum() / len(
                clips
            )
            assert sum(step["losses"]) == pytest.approx(loss.item(), abs=1e-5)
            for name, gradient in zip(
                tensors, torch.autograd.grad(loss, tensors.values()), strict=True
            ):
                assert (
                    step["gradients"][name] - gradient
                ).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7, name


def test_updates_are_those_of_adamw_under_one_cosine(campaign):
    """Betas 0.9 and 0.98, eps 1e-6, decay 0.1 on everything; the learning rate falls from 0.005 to
    zero in one arc, that of the head of a narrow backbone from 0.01.
    """
    for watched in campaign[1].values():
        total = EPOCHS * STEPS
        value = {name: watched.start[name].double() for name in watched.names.values()}
        m, v = (
            {name: torch.zeros_like(tensor) for name, tensor in value.items()} for _ in range(2)
        )
        assert len(watched.steps) == total
        for t, step in enumerate(watched.steps):
            assert step["rates"].keys() == step["gradients"].keys()
            for name, gradient in step["gradients"].items():
                first = 1e-2 if name.startswith("head.") else 5e-3
                lr = first * (1 + math.cos(math.pi * t / total)) / 2
                assert step["rates"][name] == pytest.approx(lr, rel=1e-6)
                m[name] = 0.9 * m[name] + 0.1 * gradient
                v[name] = 0.98 * v[name] + 0.02 * gradient.double() ** 2
                mean, square = m[name] / (1 - 0.9 ** (t + 1)), v[name] / (1 - 0.98 ** (t + 1))
                value[name] = value[name] * (1 - lr * 0.1) - lr * mean / (square.sqrt() + 1e-6)
                assert (step["after"][name] - value[name]).abs().max() <= 1e-6, name


def test_a_linear_probe_is_a_step_of_the_whole_model(sounds, tmp_path):
    """The unmasked probe keeps what the backbone made of each clip: loss, update and accuracy are
    those without it.
    """
    training, tested = sounds.of(*TRAINING[1]), sounds.of(1)
    models, losses = [], []
    for lr in (1e-12, 1e-2):  # where nothing moves, the file holds the tensors at the start
        words = [
            "--dataset",
            "csv",
            "--data-dir",
            sounds.folds_table,
            "--weights",
            SMALL_AST,
            "--method",
            "linear",
            "--no-mask",
            "--seconds",
            2,
            "--folds",
            1,
            "--epochs",
            1,
            "--batch-size",
            18,
            "--lr",
            lr,
            "--device",
            "cpu",
            "--out",
            tmp_path / str(lr),
            "--cache-dir",
            sounds.folds_table.parent / "cache",
        ]
        assert train.main([str(word) for word in words]) == 0
        run = tmp_path / str(lr) / "csv" / "linear" / "seed0"
        models.append(load_trained(run / "fold1.safetensors"))
        losses += [
            float(row["loss"])
            for row in csv.DictReader((run / "metrics.csv").read_text().splitlines())
        ]
        accuracy = percent_right(models[-1](sounds.features[tested]), sounds.labels[tested])
        assert json.loads((run / "result.json").read_text())["accuracy"] == pytest.approx(
            accuracy, abs=1e-4
        )
    start = [p for p in models[0].parameters() if p.requires_grad]
    loss = torch.nn.functional.cross_entropy(
        models[0](sounds.features[training]), torch.tensor(sounds.labels[training])
    )
    assert losses == pytest.approx([loss.item()] * 2, abs=1e-5)
    trained = [p for p in models[1].parameters() if p.requires_grad]
    assert len(trained) == len(start) == 4  # final LayerNorm and head
    for before, after, gradient in zip(
        start, trained, torch.autograd.grad(loss, start), strict=True
    ):
        expected = before * (1 - 1e-2 * 0.1) - 1e-2 * gradient / (gradient.abs() + 1e-6)
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float16", 5e-3), ("bfloat16", 5e-2), ("float32", 1e-5)]
)
def test_half_precision_where_asked_for_and_scaled_where_needed(
    dtype, tolerance, watch, campaign, sounds
):
    """Model in the type, loss and trained tensors in float32; float16 alone multiplies the loss for
    its gradients.
    """
    _, (run,) = watch("--dtype", dtype, "--epochs", "1", "--folds", "1", "--no-mask")
    assert {event[3] for event in run.events} == {getattr(torch, dtype)}
    model = load_trained(campaign[0] / "seed0" / "fold1.safetensors")
    for step in run.steps:
        ((_, clips, x, _),) = step["events"]
        assert {tensor.dtype for tensor in step["before"].values()} == {torch.float32}
        tensors = {name: tensor.requires_grad_() for name, tensor in step["before"].items()}
        loss = torch.nn.functional.cross_entropy(
            answers(model, tensors, x), torch.from_numpy(sounds.labels[clips])
        )
        assert step["losses"][0] / loss.item() == pytest.approx(
            65536 if dtype == "float16" else 1, rel=tolerance
        )
        (gradient,) = torch.autograd.grad(loss, tensors["head.weight"])
        assert (
            step["gradients"]["head.weight"] - gradient
        ).abs().max() <= 4 * tolerance * gradient.abs().max()


@pytest.mark.parametrize("native", [True, False])
def test_automatic_precision_on_a_gpu(native, sounds, tmp_path, monkeypatch):
    """bfloat16 where the GPU computes in it, not where it is only emulated; the run is stopped
    before it needs one.
    """

    def interrupt(*_):
        raise KeyboardInterrupt

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or native,
    )
    monkeypatch.setattr(
        torch, "empty", lambda *sizes, device=None, **options: empty(*sizes, **options)
    )
    monkeypatch.setattr(torch.nn.Module, "to", interrupt)
    words = [
        "--dataset",
        "csv",
        "--data-dir",
        sounds.folds_table,
        "--weights",
        SMALL_AST,
        "--seconds",
        2,
        "--out",
        tmp_path,
        "--cache-dir",
        sounds.folds_table.parent / "cache",
    ]
    assert train.main([str(word) for word in words]) == 130
    (config,) = tmp_path.rglob("config.json")
    assert json.loads(config.read_text())["dtype"] == ("bfloat16" if native else "float16")


# ---------------------------------------------------------------------- what is chosen and reported


def test_test_clips_are_seen_once_and_at_the_end(campaign, sounds):
    """Every epoch trains, then validates; after the last one the test clips follow, each of them
    once.
    """
    for (_, fold), watched in campaign[1].items():
        val, test = sounds.of(VALIDATION[fold]), sounds.of(fold)
        phases, seen = [], []
        for phase, clips, _, _ in watched.events:
            if not phases or phase != phases[-1]:
                phases.append(phase)
                seen.append([])
            seen[-1] += clips
        assert phases == ["train", "eval"] * EPOCHS
        assert [sorted(clips) for clips in seen[1:-1:2]] == [val] * (EPOCHS - 1)
        assert sorted(seen[-1][: len(val)]) == val and sorted(seen[-1][len(val) :]) == test


def test_the_first_best_epoch_is_kept_and_tested(campaign, sounds):
    """Validation accuracies from the tensors after each epoch, test accuracy from the file: as
    reported.
    """
    chosen, reported = [], []
    for (seed, fold), watched in campaign[1].items():
        folder = campaign[0] / f"seed{seed}"
        model = load_trained(folder / f"fold{fold}.safetensors")
        val, test = sounds.of(VALIDATION[fold]), sounds.of(fold)
        ends = [step["after"] for step in watched.steps[STEPS - 1 :: STEPS]]
        with torch.no_grad():
            accuracies = [
                percent_right(answers(model, end, sounds.features[val]), sounds.labels[val])
                for end in ends
            ]
            accuracy = percent_right(model(sounds.features[test]), sounds.labels[test])
        best = accuracies.index(max(accuracies))
        file = load_file(folder / f"fold{fold}.safetensors")
        assert file.keys() == ends[best].keys() and all(
            torch.equal(file[n], t) for n, t in ends[best].items()
        )
        (result,) = (
            r
            for r in json.loads((folder / "result.json").read_text())["folds"]
            if r["fold"] == fold
        )
        expected = {"accuracy": accuracy, "validation_accuracy": max(accuracies), "epoch": best + 1}
        assert {name: result[name] for name in expected} == pytest.approx(expected)
        metrics = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
        written = [float(row["accuracy"]) for row in metrics if row["fold"] == str(fold)]
        assert written == pytest.approx(accuracies, abs=1e-4)
        chosen.append(best + 1)
        reported.append(accuracy != max(accuracies))
    # else mistakes would not show
    assert len(set(chosen)) > 2 and EPOCHS not in chosen and sum(reported) > 1


def test_of_equal_epochs_the_first_is_kept(watch):
    """A learning rate so small that no answer changes: the weights after epoch 1 are tested."""
    folder, (run,) = watch("--lr", "1e-9", "--folds", "1")
    rows = list(csv.DictReader((folder / "seed0" / "metrics.csv").read_text().splitlines()))
    assert len({row["accuracy"] for row in rows}) == 1
    assert json.loads((folder / "seed0" / "result.json").read_text())["folds"][0]["epoch"] == 1
    name, file = (
        "blocks.0.attn.adapter.up.weight",
        load_file(folder / "seed0" / "fold1.safetensors"),
    )
    assert torch.equal(file[name], run.steps[STEPS - 1]["after"][name])
    assert not torch.equal(file[name], run.steps[-1]["after"][name])


def test_without_validation_the_last_epoch_is_tested(watch, sounds):
    folder, (run,) = watch(table=sounds.split_table)
    phases = [event[0] for event in run.events]
    assert phases == sorted(phases, reverse=True)  # all training, then all tests
    assert sorted(i for event in run.events if event[0] == "eval" for i in event[1]) == sounds.of(
        1, 2
    )
    file = load_file(folder / "seed0" / "fold1.safetensors")
    assert all(torch.equal(file[name], tensor) for name, tensor in run.steps[-1]["after"].items())
    (result,) = json.loads((folder / "seed0" / "result.json").read_text())["folds"]
    assert (result["epoch"], result["validation_accuracy"]) == (EPOCHS, None)
    rows = list(csv.DictReader((folder / "seed0" / "metrics.csv").read_text().splitlines()))
    assert [row["accuracy"] for row in rows] == [""] * EPOCHS


def test_metrics_by_hand(campaign):
    for seed in (0, 7):
        rows = list(
            csv.DictReader((campaign[0] / f"seed{seed}" / "metrics.csv").read_text().splitlines())
        )
        assert len(rows) == 3 * EPOCHS
        for i, row in enumerate(rows):
            fold, epoch = (1, 3, 4)[i // EPOCHS], i % EPOCHS + 1
            losses = [
                sum(s["losses"])
                for s in campaign[1][seed, fold].steps[STEPS * epoch - STEPS : STEPS * epoch]
            ]
            assert (row["fold"], row["epoch"], row["step"]) == (
                str(fold),
                str(epoch),
                str(STEPS * epoch),
            )
            assert float(row["loss"]) == pytest.approx(sum(losses) / STEPS, abs=1e-6)
            last = 5e-3 * (1 + math.cos(math.pi * (STEPS * epoch - 1) / (STEPS * EPOCHS))) / 2
            assert float(row["lr"]) == pytest.approx(last, rel=1e-3)


def mean_and_std(values: list[float]) -> list:
    mean = sum(values) / len(values)
    return [mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))]


def test_results_by_hand(campaign):
    """Mean and sample standard deviation over the folds of a seed, and over all folds of all
    seeds.
    """
    whole = json.loads((campaign[0] / "result.json").read_text())
    accuracies, means = [], {}
    for seed in (0, 7):
        result = json.loads((campaign[0] / f"seed{seed}" / "result.json").read_text())
        of_folds = [fold["accuracy"] for fold in result["folds"]]
        assert [fold["fold"] for fold in result["folds"]] == [1, 3, 4]
        assert [result["accuracy"], result["std"]] == pytest.approx(
            mean_and_std(of_folds), abs=1e-3
        )
        accuracies += of_folds
        means[str(seed)] = result["accuracy"]
    assert [whole["accuracy"], whole["std"]] == pytest.approx(mean_and_std(accuracies), abs=1e-3)
    assert whole["seeds"] == means and len(set(accuracies)) > 2
    assert [(fold["seed"], fold["fold"]) for fold in whole["folds"]] == RUNS
