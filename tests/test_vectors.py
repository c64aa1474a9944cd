"""What a frozen backbone makes of the clips: computed once, kept on disk, and what probes learn
from it."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import SMALL_AST, build_features
from safetensors.torch import load_file
from test_speed import CPU, settings
from torch import nn

import ast_model
import petl
import train
from data import Clips, Split, folds_of, load_dataset
from load_weights import load_ast, load_trained, to_dict
from petl_more import SSF, Statistics
from sounds.audio import read_audio
from support import recorder, records, vectors
from support.calibration import Calibration
from support.checkpoints import read_header
from support.console import describe
from support.rows import row_type, writable_rows
from tools import export, predict


def batches(monkeypatch) -> list[int]:
    """The sizes of the batches that go through a backbone from now on.

    At the end of a fold the validation clips go through half of it once more. They do not count.
    """
    sizes = []
    middles_of = recorder.middles_of

    def uncounted(*args):
        count = len(sizes)
        found = middles_of(*args)
        del sizes[count:]
        return found

    monkeypatch.setattr(recorder, "middles_of", uncounted)
    original = ast_model.Embedding.forward
    monkeypatch.setattr(
        ast_model.Embedding, "forward", lambda self, x: sizes.append(len(x)) or original(self, x)
    )
    return sizes


def fold(folder: Path, method: str, number: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    return load_file(folder / f"esc10/{method}/seed{seed}/fold{number}.safetensors")


def same_bits(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --------------------------------------------------------------------------------------- the probes


@pytest.mark.parametrize("pool", ["mean", "cls", "cls_dist"])
def test_a_linear_probe_runs_the_backbone_once_per_clip(
    pool, train_main, tmp_path, monkeypatch, capsys
):
    """The same weights and accuracies as when all clips go through it in every epoch, for all folds
    and seeds; and a later run finds what the first one kept."""
    options = ["--method", "linear", "--no-mask", "--pool", pool, "--lr", 1e-3]
    options += ["--folds", "1,2", "--seed", "0,1", "--cache-dir", tmp_path / "cache"]
    sizes = batches(monkeypatch)
    assert train_main(*options, "--out", tmp_path / "kept") == 0
    assert sum(sizes) == 50  # fold 1 takes all clips: 30 train, 10 validate, 10 test
    assert "each clip goes through the backbone once" in capsys.readouterr().out
    assert train_main(*options, "--out", tmp_path / "again") == 0 and sum(sizes) == 50
    capsys.readouterr()
    assert train_main(*options, "--keep", 0.5, "--out", tmp_path / "fewer") == 0
    assert "goes through the backbone" not in capsys.readouterr().out

    monkeypatch.setattr(
        train, "skip_frozen", lambda model, clips, *_: (model, clips)
    )  # the plain loop
    sizes.clear()
    assert train_main(*options, "--out", tmp_path / "plain") == 0
    assert sum(sizes) == 2 * 2 * (2 * (30 + 10) + 10)
    for seed in (0, 1):
        runs = [
            tmp_path / out / f"esc10/linear/seed{seed}/result.json" for out in ("kept", "plain")
        ]
        results = [json.loads(run.read_text())["folds"] for run in runs]
        assert [fold["accuracy"] for fold in results[0]] == [
            fold["accuracy"] for fold in results[1]
        ]
        for number in (1, 2):
            one, again, plain = (
                fold(tmp_path / out, "linear", number, seed) for out in ("kept", "again", "plain")
            )
            assert same_bits(one, again) and one.keys() == plain.keys()
            for name in one:
                assert (one[name] - plain[name]).abs().max() <= 1e-5, name


def test_a_masked_probe_says_that_it_takes_the_long_way(train_main, tmp_path, monkeypatch, capsys):
    """`probe` has to see its 30 training clips without masks as well."""
    sizes = batches(monkeypatch)
    for method, more in (("linear", 0), ("probe", 30)):
        sizes.clear()
        assert (
            train_main("--method", method, "--cache-dir", tmp_path / "cache", "--batch-size", 1)
            == 0
        )
        assert sum(sizes) == 2 * (30 + 10) + 10 + more
        printed = capsys.readouterr().out
        assert "every epoch masks the clips anew" in printed and "--no-mask" in printed


def test_only_probes_call_themselves_so():
    for name, method in petl.METHODS.items():
        said = describe(replace(settings(4), method=to_dict(method)), CPU.device)
        assert ("linear probe" in said) == (name in ("linear", "probe"))


def test_only_the_needed_clips_are_computed(train_main, tmp_path, monkeypatch):
    sizes = batches(monkeypatch)
    words = ["--no-mask", "--shots", 1, "--batch-size", 1, "--cache-dir", tmp_path / "cache"]
    for method in ("linear", "probe"):
        sizes.clear()
        assert train_main(*words, "--method", method) == 0
        assert sum(sizes) == 10 + 10 + 10  # one of each class trains
    sizes.clear()
    assert train_main("--method", "probe", *words, "--folds", "1,2") == 0
    assert 0 < sum(sizes) < 30  # what fold 1 had not


def test_a_linear_probe_by_hand():
    """Mean of the normalised tokens, scale and shift, and the head. No file: nothing is kept."""
    torch.manual_seed(0)
    model = petl.apply(load_ast(SMALL_AST, 60, 4), "linear")
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    clips = Clips(torch.randn(5, 60, 128), torch.zeros(5, dtype=int))
    network, pooled = vectors.skip_frozen(model, clips, Split([0], [1], [4]), settings(2), CPU)
    logits = network(pooled.features[[0, 1, 4]])
    torch.testing.assert_close(
        logits, model.eval()(clips.features[[0, 1, 4]]), rtol=1e-4, atol=1e-4
    )
    assert not pooled.features[[2, 3]].any()


def test_a_probe_is_standardised_on_its_training_clips_alone(
    train_main, tmp_path, esc50_dir, cache_dir
):
    """Mean and standard deviation by hand, from the features; of the drawn clips; with masks the
    same."""
    dataset = load_dataset("esc10", esc50_dir, cache_dir)
    features, _ = build_features(dataset, 100, cache_dir)
    model = petl.apply(load_ast(SMALL_AST, 100, 10), "probe").eval()
    with torch.no_grad():
        every = model.vector(torch.from_numpy(features).float()).double()
    words = ["--method", "probe", "--epochs", 1, "--folds", "1,2"]
    for name, more in (
        ("all", ["--no-mask"]),
        ("few", ["--no-mask", "--shots", 2]),
        ("masked", []),
    ):
        assert train_main(*words, *more, "--out", tmp_path / name) == 0
    for name, shots in (("all", None), ("few", 2)):
        for number, split in list(folds_of(dataset, 0, (), shots).items())[:2]:
            tensors = fold(tmp_path / name, "probe", number)
            for clips, equal in (
                (split.train, True),
                (split.train + split.val, False),
                (split.train[1:], False),
            ):
                mean, std = every[clips].mean(0), every[clips].std(0, correction=0).clamp_min(1e-3)
                near = [
                    (tensors["head.mean"] - mean).abs().max() < 1e-3,
                    (tensors["head.std"] - std).abs().max() < 1e-3,
                ]
                assert near == [equal, equal]
    masked, plain = (fold(tmp_path / name, "probe", 2) for name in ("masked", "all"))
    assert same_bits(*({n: run[n] for n in ("head.mean", "head.std")} for run in (masked, plain)))
    assert not torch.equal(masked["head.wrapped.weight"], plain["head.wrapped.weight"])


def test_what_was_trained_on_kept_vectors_listens_as_well(
    train_main, tmp_path, esc50_dir, cache_dir
):
    """From sound files, by tools.predict and onnxruntime: the accuracy that the run printed."""
    words = ["--method", "probe", "--no-mask", "--epochs", 30, "--lr", 5e-3, "--batch-size", 8]
    assert train_main(*words) == 0
    file = tmp_path / "runs/esc10/probe/seed0/fold1.safetensors"
    dataset = load_dataset("esc10", esc50_dir, cache_dir)
    clips = dataset.folds[1].train + dataset.folds[1].test
    waves, labels = [read_audio(dataset.paths[i]) for i in clips], np.array(dataset.labels)[clips]
    classifier = replace(
        predict.load(file, device="cpu"), calibrations=[Calibration()]
    )  # as the ONNX file
    ours = predict.probabilities(classifier, waves)
    right = ours.argmax(1) == labels
    assert 100 * right[30:].mean() == pytest.approx(read_header(file)["result"]["accuracy"])
    assert right[:30].mean() > 0.8
    export.export_onnx(load_trained(file), {}, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    theirs = [session.run(None, {"waveform": wave[None]})[0][0] for wave in waves]
    assert np.abs(theirs - ours).max() < 1e-3


def test_what_hardly_differs_is_not_blown_up():
    model = petl.apply(load_ast(SMALL_AST, 60, 4), "probe")
    clips = Clips(torch.randn(1, 60, 128).expand(3, -1, -1), torch.zeros(3, dtype=int))
    network, seen = vectors.skip_frozen(model, clips, Split([0, 1], [], [2]), settings(3), CPU)
    head = network.head
    assert head is model.head and (head.std == torch.tensor(1e-3)).all()
    assert (head.mean - model.eval().vector(clips.features[:1])[0]).abs().max() < 2e-3
    torch.testing.assert_close(
        network(seen.features.float()), head.wrapped.bias.expand(3, -1), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("method", ["linear", "probe"])
def test_a_later_run_computes_the_same_bits(method, train_main, tmp_path):
    """Fold 2 after fold 1, and in a run of its own, which has nothing of the clips yet."""
    options = [
        "--method",
        method,
        "--no-mask",
        "--shots",
        1,
        "--batch-size",
        3,
        "--dtype",
        "bfloat16",
    ]
    for folds in ("1,2", "2"):
        assert (
            train_main(
                *options,
                "--folds",
                folds,
                "--out",
                tmp_path / folds,
                "--cache-dir",
                tmp_path / f"c{folds}",
            )
            == 0
        )
    assert same_bits(*(fold(tmp_path / folds, method, 2) for folds in ("1,2", "2")))


def test_an_interrupted_probe_goes_on_to_the_same_bits(train_main, tmp_path, monkeypatch):
    """With masks, on another machine: nothing of what was computed first is there."""
    words = ["--method", "probe", "--epochs", 3]
    assert train_main(*words, "--out", tmp_path / "whole") == 0
    save = records.save_progress

    def once(file, progress, settings, state):
        save(file, progress, settings, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(records, "save_progress", once)
        assert train_main(*words, "--out", tmp_path / "broken") == 130
    assert (
        train_main(
            *words, "--out", tmp_path / "broken", "--resume", "--cache-dir", tmp_path / "cache"
        )
        == 0
    )
    assert same_bits(*(fold(tmp_path / name, "probe") for name in ("whole", "broken")))


def test_two_processes_are_one(train_main, tmp_path, esc50_dir):
    """One computes the vectors, and the other waits. What is standardised is equal to the bit."""
    words = ["--method", "probe", "--no-mask", "--epochs", "2", "--batch-size", "8"]
    assert train_main(*words, "--out", tmp_path / "one", "--cache-dir", tmp_path / "a") == 0
    places = [
        "--dataset",
        "esc10",
        "--data-dir",
        esc50_dir,
        "--weights",
        SMALL_AST,
        "--folds",
        1,
        "--seconds",
        1,
        "--cache-dir",
        tmp_path / "b",
        "--out",
        tmp_path / "two",
    ]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        train.__file__,
    ]
    subprocess.run([*torchrun, *map(str, [*places, *words])], check=True, capture_output=True)
    one, two = (fold(tmp_path / out, "probe") for out in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)
        assert name not in ("head.mean", "head.std") or torch.equal(one[name], two[name])
    (a,), (b,) = (sorted((tmp_path / cache / "vectors").glob("*.rows")) for cache in "ab")
    assert a.name == b.name and a.read_bytes() == b.read_bytes()


# ------------------------------------------------------------------------------------- what is kept


def small(method: str | petl.Method = "probe", n_frames: int = 60, **changes) -> ast_model.AST:
    return petl.apply(load_ast(SMALL_AST, n_frames, 4, **changes), method)


def sounds(file: Path | None, n_frames: int = 60, count: int = 10) -> Clips:
    features = torch.randn(count, n_frames, 128, generator=torch.Generator().manual_seed(0)).half()
    return Clips(features, torch.zeros(count, dtype=int), file)


def keep(
    model, clips: Clips, needed=range(10), batch: int = 3, machine=CPU, **changes
) -> torch.Tensor:
    return vectors.vectors_of(
        model, clips, list(needed), replace(settings(batch), **changes), machine
    )


def test_vectors_are_those_of_the_network(tmp_path):
    """float16 of what the head of `probe` reads, float32 for `linear`; blocks of neighbours, and
    not one more."""
    clips = sounds(tmp_path / "features/x.rows")
    for method, kind in (("probe", torch.float16), ("linear", torch.float32)):
        model = small(method)
        made = keep(model, clips, [4, 9])
        assert made.dtype == kind and made.shape == (
            10,
            {"probe": 4 * 64 * 3, "linear": 64}[method],
        )
        expected = model.vector(
            clips.features.float()
        ).detach()  # the LayerNorm of `linear` is as it was trained
        if method == "linear":
            made = made * model.norm.weight + model.norm.bias
        near = {"probe": 1e-3, "linear": 1e-5}[method]
        torch.testing.assert_close(
            made[[3, 4, 5, 9]].float(), expected[[3, 4, 5, 9]], rtol=near, atol=near
        )
        assert [i for i in range(10) if not keep(small(method), clips, [4, 9])[i].any()] == [
            0,
            1,
            2,
            6,
            7,
            8,
        ]
    assert len(list((tmp_path / "vectors").glob("x-*.rows"))) == 2


def test_what_vectors_are_known_by(tmp_path, monkeypatch):
    """Each change alone has vectors of its own; and what changes nothing finds those that are
    there."""
    sizes, file = batches(monkeypatch), tmp_path / "features/x.rows"
    clips = sounds(file)
    moved = load_ast(SMALL_AST, 60, 4)
    moved.backbone = replace(moved.backbone, sha256="0" * 64)
    scaled = load_ast(SMALL_AST, 60, 4)
    scaled.config = replace(scaled.config, eps=1e-3)
    changed = replace(clips, features=clips.features.clone())
    changed.features[7, 3, 2] += 0.01
    cases = [
        (small(), clips, {}),
        (small(petl.Method("own", (Statistics(), SSF()), "-", "-")), clips, {}),
        (petl.apply(moved, "probe"), clips, {}),
        (petl.apply(scaled, "probe"), clips, {}),
        (small("linear"), clips, {}),
        (small("linear", pool="cls"), clips, {}),
        (small(), clips, {"dtype": "bfloat16"}),
        (small(), clips, {"batch": 4}),
        (small(n_frames=61), sounds(file, 61), {}),
        (small(), changed, {}),
        (small(), sounds(file, count=9), {}),
    ]
    for model, heard, changes in cases:
        sizes.clear()
        needed = range(len(heard.labels))
        first = keep(model, heard, needed, **changes).clone()
        assert sum(sizes) == len(heard.labels), changes
        again = petl.apply(
            load_ast(SMALL_AST, heard.features.shape[1], 4, model.config.pool), model.method
        )
        again.backbone, again.config = model.backbone, model.config
        lr = {"lr": 0.5, "epochs": 9, "seed": 3, "shots": 2}  # of the rest nothing counts
        assert torch.equal(keep(again, heard, needed, **changes, **lr), first) and sum(
            sizes
        ) == len(heard.labels)


def test_a_row_without_its_key_is_computed_again(tmp_path, monkeypatch):
    """The key is written last: what was killed before has none. A batch is three neighbours."""
    sizes, clips, model = batches(monkeypatch), sounds(tmp_path / "features/x.rows"), small()
    whole = keep(model, clips).clone()
    (file,) = (tmp_path / "vectors").glob("*.rows")
    content = file.read_bytes()
    rows = writable_rows(file, row_type((4 * 64 * 3,)), 10)
    rows["key"][4] = 0
    rows["features"][4] = 7
    del rows
    sizes.clear()
    assert torch.equal(keep(model, clips), whole) and sum(sizes) == 3
    assert file.read_bytes() == content


def test_a_file_that_is_not_whole_is_made_again(tmp_path, monkeypatch):
    sizes, clips, model = batches(monkeypatch), sounds(tmp_path / "features/x.rows"), small()
    whole = keep(model, clips).clone()
    (file,) = (tmp_path / "vectors").glob("*.rows")
    content = file.read_bytes()
    for length in (0, 100, len(content) - 1):
        file.write_bytes(content[:length])
        sizes.clear()
        assert torch.equal(keep(model, clips), whole) and sum(sizes) == 10
    assert file.read_bytes() == content


def test_a_complete_file_is_only_read(tmp_path, monkeypatch):
    """Somebody else's cache may be read-only: there is nothing to lock and nothing to write."""
    clips, model = sounds(tmp_path / "features/x.rows"), small()
    whole = keep(model, clips).clone()
    (file,) = (tmp_path / "vectors").glob("*.rows")
    file.chmod(0o444)
    monkeypatch.setattr(vectors, "locked", lambda path: pytest.fail("locked"))
    assert torch.equal(keep(model, clips), whole)


def test_other_clips_have_a_file_of_their_own(tmp_path):
    """Whoever has mapped the vectors of the clips as they were keeps them."""
    clips, model = sounds(tmp_path / "features/x.rows"), small()
    mine = keep(model, clips)
    before = mine.clone()
    other = replace(clips, features=clips.features + 1)
    assert not torch.equal(keep(model, other), before) and torch.equal(mine, before)
    assert len(list((tmp_path / "vectors").glob("*.rows"))) == 2


def slowly(file: Path, log: Path, seconds: float) -> None:
    torch.set_num_threads(1)
    original = ast_model.Embedding.forward

    def forward(self, x):
        with open(log, "a") as lines:
            lines.write(f"{len(x)}\n")
        time.sleep(seconds)
        return original(self, x)

    ast_model.Embedding.forward = forward
    keep(small(), sounds(file, count=60), range(60))


def start(*args) -> multiprocessing.Process:
    process = multiprocessing.get_context("spawn").Process(target=slowly, args=args)
    process.start()
    return process


def computed(log: Path) -> int:
    return sum(map(int, log.read_text().split())) if log.exists() else 0


def test_a_killed_process_loses_nothing_and_two_share_the_work(tmp_path):
    """Killed after some batches; then two at the same time, of which one waits for the other."""
    file, log = tmp_path / "features/x.rows", tmp_path / "log"
    process = start(file, log, 0.05)
    while computed(log) < 20:
        time.sleep(0.02)
        assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = computed(log)
    assert before < 60
    for process in [start(file, log, 0.05) for _ in range(2)]:
        process.join()
        assert process.exitcode == 0
    assert 60 <= computed(log) <= 60 + 3  # the batch that the kill broke off
    fresh = sounds(tmp_path / "other/features/x.rows", count=60)
    assert torch.equal(
        keep(small(), sounds(file, count=60), range(60)), keep(small(), fresh, range(60))
    )
