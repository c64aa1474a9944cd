"""tools.check on stand-ins, made on the spot: each kind of failure is planted once and found."""

import csv
import json
import math
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
import transformers
from helpers import SMALL_AST, make_esc50

import data
import load_weights
import train
from load_weights import load_ast
from tools import bench, check, predict
from tools.bench import Bench, random_clips
from tools.check import NotThere, Wrong

ROOT = Path(check.__file__).parents[1]
AUDIOSET = {i: f"sound {i}" for i in range(527)} | {
    0: "Speech",
    137: "Music",
    526: "Field recording",
}
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}
CPU = Bench(torch.device("cpu"), n_frames=60, batch=2, repeats=1, weights=str(SMALL_AST))


def save_ast_of_transformers(folder: Path, names: dict[int, str] = AUDIOSET, **config) -> str:
    """A random checkpoint and its extractor as the library saves them.

    They have all keys of the AudioSet model's files.
    """
    ids = {name: i for i, name in names.items()}
    config = transformers.ASTConfig(
        architectures=["ASTForAudioClassification"], id2label=names, label2id=ids, **config
    )
    with torch.device("meta"):
        model = transformers.ASTForAudioClassification(config)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        std = 0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 0.1
        torch.nn.init.normal_(
            parameter, mean=float("norm" in name and name.endswith("weight")), std=std
        )
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one Mel filter is empty
        transformers.ASTFeatureExtractor(max_length=config.max_length).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> str:
    return save_ast_of_transformers(tmp_path_factory.mktemp("checkpoint"), **SMALL)


@pytest.fixture
def checkpoint(original, tmp_path) -> Path:
    """A copy to damage."""
    for file in Path(original).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture(scope="module")
def esc50(tmp_path_factory) -> Path:
    return make_esc50(tmp_path_factory.mktemp("data") / "ESC-50")


def fake_hub(cache: Path, folder: Path) -> None:
    """What huggingface_hub keeps of a repository it has fetched.

    There are blobs, a snapshot of links to them, and a branch.
    """
    repository = cache / "models--MIT--ast-finetuned-audioset-10-10-0.4593"
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = repository / "snapshots" / commit
    for place in (snapshot, repository / "blobs", repository / "refs"):
        place.mkdir(parents=True)
    for file in folder.iterdir():
        blob = repository / "blobs" / f"{len(file.name):040x}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
    (repository / "refs" / "main").write_text(commit)


def change_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def lines_of(text: str) -> dict[str, str]:
    """The status of each check by its name."""
    return {line[11:37].strip(): line[:11].strip() for line in text.splitlines()}


# -------------------------------------------------------------------------------------- all at once


def test_all_is_right_with_the_checkpoint_in_the_hubs_cache(original, esc50, tmp_path):
    """The command itself, offline, with `audioset` where huggingface_hub would have put it."""
    fake_hub(tmp_path / "hub", Path(original))
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    words = ["--data-dir", esc50, "--cache-dir", tmp_path / "cache", "--device", "cpu"]
    command = [sys.executable, "-m", "tools.check", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stderr.splitlines()
    assert all("60 clips of 12 classes, where the release has" in line for line in said), said
    statuses = lines_of(done.stdout)
    assert len(statuses) == 13
    assert statuses.pop("features") in (
        "right",
        "not there",
    )  # torchaudio is built for one version of torch
    assert set(statuses.values()) == {"right"}, done.stdout


def test_a_full_size_checkpoint(tmp_path):
    """12 layers, 768 wide, 527 classes, every key of the real config.json."""
    weights = save_ast_of_transformers(tmp_path)
    assert check.opens(weights).startswith("12 blocks, 768 wide, 527 classes")
    assert check.tensors(weights) == "203 tensors are those that transformers reads"
    assert "logits differ by" in check.logits(weights, 500)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["max_length"] == 1024 and written["architectures"] == [
        "ASTForAudioClassification"
    ]


@pytest.fixture
def quick(monkeypatch):
    """The command without its training; `quick` is what the training was given."""
    used = []
    monkeypatch.setattr(
        check, "methods", lambda bench: used.append(bench.weights) or "as it should"
    )
    monkeypatch.setattr(check, "time_of", lambda *_: "a minute")
    monkeypatch.setattr(check, "features", lambda: "as they should be")
    return used


def test_no_network_and_no_data_is_not_wrong(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert check.main(["--cache-dir", str(tmp_path), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    statuses = lines_of(out)
    absent = {name for name, status in statuses.items() if status == "not there"}
    assert absent == {"checkpoint", "labels of ESC-50"} and len(statuses) == 9
    assert (
        "download its config.json, preprocessor_config.json and model.safetensors by hand" in out
        and "train.py fetches it" in out
    )
    assert quick == ["random:base"]  # what trains needs no checkpoint


def test_something_wrong_ends_with_1(quick, tmp_path, capsys):
    """A checkpoint of another kind: random weights train in its place.

    A folder that is not there is wrong, too.
    """
    options = ["--cache-dir", str(tmp_path), "--device", "cpu", "--weights"]
    assert check.main([*options, str(SMALL_AST)]) == 1
    assert lines_of(capsys.readouterr().out)["checkpoint"] == "wrong" and quick == ["random:base"]
    assert check.main([*options, str(tmp_path / "absent")]) == 1
    assert "no weights at" in capsys.readouterr().out


def test_a_wrong_option_ends_with_2(capsys):
    assert check.main(["--device", "abacus"]) == 2
    assert "error: --device abacus" in capsys.readouterr().err


def test_a_crash_is_a_line(capsys):
    assert check.report("sums", lambda: 1 // 0) == "wrong"
    assert capsys.readouterr().out.split(maxsplit=2)[:2] == ["wrong", "sums"]


def test_without_transformers(monkeypatch, original):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for compare in (check.tensors, lambda weights: check.logits(weights, 500), check.tags):
        with pytest.raises(NotThere, match=r"transformers.*pip install -r requirements-dev\.txt"):
            compare(original)
    assert "527 classes" in check.opens(original)


def test_a_file_that_transformers_cannot_read(tmp_path, original):
    (tmp_path / "ast.pth").write_bytes(b"")
    with pytest.raises(
        NotThere, match=r"transformers cannot read .*ast\.pth, it needs config\.json"
    ):
        check.tensors(str(tmp_path / "ast.pth"))


# ------------------------------------------------------------------------------ planted: checkpoint


def test_the_head_of_another_checkpoint(tmp_path):
    weights = save_ast_of_transformers(tmp_path, {0: "yes", 1: "no"}, max_length=100, **SMALL)
    with pytest.raises(Wrong, match="a head of 2 classes, where AudioSet has 527"):
        check.opens(weights)


def test_positions_of_zeros_for_another_length(monkeypatch, original):
    """What the authors' code does without a word."""
    resize = load_weights.resize_positions
    monkeypatch.setattr(
        load_weights, "resize_positions", lambda *args: resize(*args) * (args[1] == args[2])
    )
    check.logits(original, 1024)
    with pytest.raises(Wrong, match="tokens differ by"):
        check.logits(original, 500)


def test_positions_from_another_place(monkeypatch, original):
    monkeypatch.setattr(load_weights, "crop_or_stretch", lambda grid, size: grid[..., :size])
    with pytest.raises(Wrong, match="tokens differ by"):
        check.logits(original, 500)


def test_only_the_head_differs(monkeypatch, original):
    """Tokens are right, logits are not."""
    monkeypatch.setattr(load_weights.AST, "pool", lambda self, tokens: tokens.mean(1))
    with pytest.raises(Wrong, match="logits differ by"):
        check.logits(original, 500)


def test_swapped_projections(monkeypatch, original):
    """q and k: tensors and tokens show it.

    The table of names that the loader reads is not the one that checks it.
    """
    swap = {"q": "k", "k": "q"}
    names = [
        (row[0], *load_weights.NAMES[{5: 6, 6: 5}.get(i, i)][1:])
        for i, row in enumerate(load_weights.NAMES)
    ]
    assert [row[0] for row in names[5:7]] == [f".attn.{letter}." for letter in swap]
    check.tensors(original)
    monkeypatch.setattr(load_weights, "NAMES", names)
    with pytest.raises(AssertionError, match=r"not equal(.|\n)*'blocks\.0\.attn\.k\.bias'"):
        check.tensors(original)
    with pytest.raises(Wrong, match="tokens differ by"):
        check.logits(original, 1024)


def test_names_of_classes_read_in_another_order(monkeypatch, original):
    """As strings 10 comes before 2."""
    monkeypatch.setattr(
        predict,
        "class_names",
        lambda weights, n_classes: [AUDIOSET[i] for i in sorted(AUDIOSET, key=str)],
    )
    with pytest.raises(
        Wrong,
        match=r"called Speech, sound 1, sound 10, .*; by transformers Speech, sound 1, sound 2",
    ):
        check.tags(original)


# ------------------------------------------------------------------------ planted: features, ESC-50


def test_features_beside_torchaudio(monkeypatch):
    """A stand-in for torchaudio, which is asked for what the docstring of data.fbank says."""
    change = 0.0

    def other(wave, **settings):
        assert settings == {
            "sample_frequency": 16_000,
            "window_type": "hanning",
            "num_mel_bins": 128,
        }
        return data.fbank(wave)[0] + change

    kaldi = SimpleNamespace(fbank=other)
    monkeypatch.setitem(sys.modules, "torchaudio", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchaudio.compliance", SimpleNamespace(kaldi=kaldi))
    assert check.features() == "log-Mel features differ by 0 at most"
    change = 2e-3
    with pytest.raises(Wrong, match=r"log-Mel features differ by 0\.002, more than 0\.001"):
        check.features()
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    monkeypatch.setitem(sys.modules, "torchaudio.compliance", None)
    with pytest.raises(NotThere, match="torchaudio"):
        check.features()


def test_esc50_is_found_in_the_cache_and_not_fetched(tmp_path):
    with pytest.raises(NotThere):
        check.esc50(None, tmp_path)
    make_esc50(tmp_path / "ESC-50")
    assert check.esc50(None, tmp_path).startswith("60 clips have the class and the fold")


@pytest.mark.parametrize(
    ("column", "change"),
    [("target", lambda rows, i: rows[i - 5]), ("fold", lambda rows, i: int(rows[i]) % 5 + 1)],
)
def test_labels_and_folds_shifted_by_one(tmp_path, column, change):
    table = make_esc50(tmp_path / "ESC-50") / "meta" / "esc50.csv"
    rows = list(csv.DictReader(table.read_text().splitlines()))
    values = [row[column] for row in rows]
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({**row, column: change(values, i)} for i, row in enumerate(rows))
    with pytest.raises(Wrong, match=r"60 clips have another class or fold: \d-\d+-A-\d+, "):
        check.esc50(None, tmp_path)


# -------------------------------------------------------------------------------- planted: training


@pytest.fixture(scope="module")
def backbone():
    return load_ast(SMALL_AST, 60, 50)


def test_a_projection_that_never_learns(monkeypatch, backbone):
    """Both sides of an adapter at zero: weight decay cannot move them, and no gradient does."""
    check.moves("pfeiffer_par", backbone, CPU)
    adapted = train.adapted

    def both_zero(*args):
        model = adapted(*args)
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                parameter.data.zero_()
        return model

    monkeypatch.setattr(train, "adapted", both_zero)
    with pytest.raises(Wrong, match=r"pfeiffer_par: .*adapter.* does not learn"):
        check.moves("pfeiffer_par", backbone, CPU)


def test_adapter_plus_may_leave_out_whole_batches():
    """In a step of two clips some block of twelve leaves out both of them: that is no mistake."""
    check.moves("adapter_plus", load_ast("random:tiny", 100, 50), replace(CPU, n_frames=100))


def test_decay_is_no_learning(monkeypatch, backbone):
    """What a loss does not depend on moves all the same, by weight decay."""
    make = train.Learner

    def learner(*args):
        made = make(*args)
        made.network.norm.weight.register_hook(torch.zeros_like)
        return made

    monkeypatch.setattr(train, "Learner", learner)
    with pytest.raises(Wrong, match=r"linear: norm\.weight does not learn"):
        check.moves("linear", backbone, CPU)


def test_a_frozen_weight_that_moves(monkeypatch, backbone):
    epoch = train.train_epoch

    def leaking(learner, *args):
        learner.network.blocks[0].ffn.fc1.weight.data += 1e-6
        return epoch(learner, *args)

    monkeypatch.setattr(train, "train_epoch", leaking)
    with pytest.raises(
        Wrong, match=r"linear: blocks\.0\.ffn\.fc1\.weight is frozen, and has moved"
    ):
        check.moves("linear", backbone, CPU)


def test_a_loss_that_is_not_finite(monkeypatch, backbone):
    monkeypatch.setattr(train, "train_epoch", lambda *_: torch.tensor([1.0, math.nan]))
    with pytest.raises(Wrong, match=r"lora: the losses are \[1\.0, nan\]"):
        check.moves("lora", backbone, CPU)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(backbone, dtype):
    """float16 needs more steps: its scaler leaves the first ones out."""
    check.moves("lora", backbone, replace(CPU, dtype=dtype))


def test_time_for_a_fold(monkeypatch):
    """Of ESC-50: 50 epochs of 1,200 clips that train and 400 that validate, then 400 that test."""
    asked = []

    def clips(n, bench):
        asked.append((bench.n_frames, n))
        return random_clips(n, CPU)

    monkeypatch.setattr(check, "random_clips", clips)
    monkeypatch.setattr(check, "in_turn", lambda *_: {"train": [3.0, 2.0], "test": [1.0, 1.5]})
    seconds = 50 * (1200 * 1.0 + 400 * 0.5) + 400 * 0.5
    line = f"{seconds / 3600:.0f} hours (1.0 clips/s in batches of 2)"
    assert check.time_of("esc50", CPU) == line
    monkeypatch.setattr(Bench, "prepare", lambda bench, model, dtype: model)
    monkeypatch.setattr(check, "pass_of", lambda *_: None)
    check.time_of("gsc", replace(CPU, device=torch.device("cuda")))
    assert asked == [(500, 2), (100, 128)]
    assert {name: sum(sizes) for name, sizes in check.SIZES.items()} == {
        "esc50": 2000,
        "esc10": 400,
        "us8k": 8732,
        "gsc": 105_829,
        "fsc": 30_043,
    }


def test_the_times_are_those_of_training_and_evaluation(monkeypatch):
    measured = {}

    def in_turn(ways, repeats):
        measured.update(bench.in_turn(ways, repeats))
        return measured

    monkeypatch.setattr(check, "in_turn", in_turn)
    check.time_of("gsc", CPU)
    assert 0 < min(measured["test"]) < min(measured["train"]) < 2
