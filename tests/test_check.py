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

import huggingface_hub.constants
import pytest
import torch
import transformers
from helpers import SMALL_AST, make_esc50
from safetensors.torch import load_file, save_file

import data
import load_weights
import train
from load_weights import load_ast
from support.command import UserError
from tools import check, comparisons, predict
from tools.bench import Bench
from tools.comparisons import NotThere, Wrong

ROOT = Path(check.__file__).parents[1]
AUDIOSET = {i: f"sound {i}" for i in range(527)} | {0: "Speech", 137: "Music", 526: "Field recording"}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
CPU = Bench(torch.device("cpu"), batch=2, repeats=1)
NO_DATA = (None, Path("/nowhere"), False)


def save_ast_of_transformers(folder: Path, names: dict[int, str] = AUDIOSET, **config) -> str:
    """A random checkpoint and its extractor as the library saves them, with all keys of the AudioSet model's files."""
    ids = {name: i for i, name in names.items()}
    config = transformers.ASTConfig(architectures=["ASTForAudioClassification"], id2label=names, label2id=ids, **config)
    with torch.device("meta"):
        model = transformers.ASTForAudioClassification(config)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        std = 0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 0.1
        torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=std)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one Mel filter is empty
        transformers.ASTFeatureExtractor().save_pretrained(folder)
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
    """What huggingface_hub keeps of a repository it has fetched: blobs, a snapshot of links to them, and a branch."""
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
    return {line[11:37].strip(): line[:11].strip() for line in text.splitlines()[:-1]}


# -------------------------------------------------------------------------------------------------------- all at once


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
    assert len(statuses) == 19 and set(statuses.values()) == {"right"}, done.stdout
    assert done.stdout.splitlines()[-1] == "19 right, 0 wrong, 0 not there"


def test_a_full_size_checkpoint(tmp_path):
    """12 layers, 768 wide, 527 classes, every key of the real config.json."""
    weights = save_ast_of_transformers(tmp_path)
    assert comparisons.opens(weights).startswith("12 blocks, 768 wide, 527 classes")
    assert comparisons.tensors(weights) == "203 tensors are those that transformers reads"
    assert "logits differ by" in comparisons.logits(weights, 500)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["max_length"] == 1024 and written["architectures"] == ["ASTForAudioClassification"]
    assert comparisons.front_end(weights) == "mean -4.2677393, std 4.5689974"


@pytest.fixture
def quick(monkeypatch):
    """The command without its training; `quick` is what the training was given."""
    used = []
    for name in ("methods", "repeats", "resumes"):
        monkeypatch.setattr(check, name, lambda weights, bench: used.append(weights) or "as it should")
    monkeypatch.setattr(check, "speed", lambda *_: (1.0, 0.5, None))
    return used


def test_no_network_and_no_data_is_not_wrong(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert check.main(["--cache-dir", str(tmp_path), "--device", "cpu", "--stand-in", "random:tiny"]) == 0
    out = capsys.readouterr().out
    absent = {name for name, status in lines_of(out).items() if status == "not there"}
    assert absent == {"checkpoint", "front end", "tensors", "logits at 1024 frames", "logits at 500 frames", "tags",
                      "tags on the device", "ESC-50, labels", "ESC-50, features"}  # fmt: skip
    assert "download its config.json and model.safetensors by hand" in out and "--esc50 downloads it" in out
    assert quick == ["random:tiny"] * 3  # what trains needs no checkpoint


def test_something_wrong_ends_with_1(quick, tmp_path, capsys):
    """A checkpoint of another kind: training is checked with the stand-in. A folder that is not there is wrong, too."""
    options = ["--cache-dir", str(tmp_path), "--device", "cpu", "--stand-in", "random:tiny", "--weights"]
    assert check.main([*options, str(SMALL_AST)]) == 1
    assert lines_of(capsys.readouterr().out)["checkpoint"] == "wrong" and quick == ["random:tiny"] * 3
    assert check.main([*options, str(tmp_path / "absent")]) == 1
    assert "no weights at" in capsys.readouterr().out


def test_a_wrong_option_ends_with_2(capsys):
    assert check.main(["--device", "abacus"]) == 2
    assert "error: --device abacus" in capsys.readouterr().err


def test_a_crash_is_a_line(capsys):
    assert check.report("sums", lambda: 1 // 0) == "wrong"
    assert capsys.readouterr().out.split(maxsplit=2)[:2] == ["wrong", "sums"]


def test_without_transformers(monkeypatch, original, esc50, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for compare in (comparisons.tensors, lambda weights: comparisons.logits(weights, 500), comparisons.tags,
                    lambda _: comparisons.esc50_features(esc50, tmp_path, False)):  # fmt: skip
        with pytest.raises(NotThere, match=r"transformers.*pip install -r requirements-dev\.txt"):
            compare(original)
    assert "527 classes" in comparisons.opens(original)


def test_a_file_that_transformers_cannot_read(tmp_path, original):
    (tmp_path / "ast.pth").write_bytes(b"")
    with pytest.raises(NotThere, match=r"config\.json beside ast\.pth"):
        comparisons.tensors(str(tmp_path / "ast.pth"))


# -------------------------------------------------------------------------------------------------- planted: machine


def test_an_old_version(monkeypatch):
    assert f"torch {torch.__version__}" in check.versions()
    known = check.importlib.metadata.version
    versions = {"soxr": "0.4", "torch": "2.11.0"}
    monkeypatch.setattr(check.importlib.metadata, "version", lambda name: versions.get(name) or known(name))
    with pytest.raises(Wrong, match=r"wanted: soxr>=0\.5, not 0\.4; pip"):  # 2.11 works, whatever the pin says
        check.versions()


def test_products_that_are_wrong(monkeypatch):
    assert check.device(CPU).startswith("CPU, ")
    monkeypatch.setitem(check.DTYPES, "float32", torch.int32)
    with pytest.raises(Wrong, match="products in float32 and float64 differ"):
        check.device(CPU)


# ----------------------------------------------------------------------------------------------- planted: checkpoint


def test_the_head_of_another_checkpoint(tmp_path):
    weights = save_ast_of_transformers(tmp_path, {0: "yes", 1: "no"}, max_length=100, **SMALL)
    with pytest.raises(Wrong, match="a head of 2 classes, where AudioSet has 527"):
        comparisons.opens(weights)


def test_positions_of_zeros_in_the_file(checkpoint):
    state = load_file(checkpoint / "model.safetensors")
    state["audio_spectrogram_transformer.embeddings.position_embeddings"].zero_()
    save_file(state, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(Wrong, match=r"nothing but zeros in embed\.position"):
        comparisons.opens(str(checkpoint))


def test_positions_of_zeros_for_another_length(monkeypatch, original):
    """What the authors' code does without a word."""
    resize = load_weights.resize_positions
    monkeypatch.setattr(load_weights, "resize_positions", lambda *args: resize(*args) * (args[1] == args[2]))
    comparisons.logits(original, 1024)
    with pytest.raises(Wrong, match="tokens differ by"):
        comparisons.logits(original, 500)


def test_positions_from_another_place(monkeypatch, original):
    monkeypatch.setattr(load_weights, "crop_or_stretch", lambda grid, size: grid[..., :size])
    with pytest.raises(Wrong, match="tokens differ by"):
        comparisons.logits(original, 500)


def test_only_the_head_differs(monkeypatch, original):
    """Tokens are right, logits are not."""
    monkeypatch.setattr(load_weights.AST, "pool", lambda self, tokens: tokens.mean(1))
    with pytest.raises(Wrong, match="logits differ by"):
        comparisons.logits(original, 500)


def test_swapped_projections(monkeypatch, original):
    """q and k: tensors and tokens show it. The table of names that the loader reads is not the one that checks it."""
    swap = {"q": "k", "k": "q"}
    names = [(row[0], *load_weights.NAMES[{5: 6, 6: 5}.get(i, i)][1:]) for i, row in enumerate(load_weights.NAMES)]
    assert [row[0] for row in names[5:7]] == [f".attn.{letter}." for letter in swap]
    comparisons.tensors(original)
    monkeypatch.setattr(load_weights, "NAMES", names)
    with pytest.raises(Wrong, match=r"8 of 43 tensors are not those .* blocks\.0\.attn\.q\.weight"):
        comparisons.tensors(original)
    with pytest.raises(Wrong, match="tokens differ by"):
        comparisons.logits(original, 1024)


def test_names_of_classes_shifted_by_one(checkpoint):
    names = {str(i): AUDIOSET[(i + 1) % 527] for i in range(527)}
    change_json(checkpoint / "config.json", id2label=names, label2id={name: int(i) for i, name in names.items()})
    with pytest.raises(Wrong, match="its classes 0, 137, 526 of 527 are sound 1, sound 138, Speech, not Speech"):
        comparisons.opens(str(checkpoint))


def test_names_of_classes_read_in_another_order(monkeypatch, original):
    """As strings 10 comes before 2."""
    monkeypatch.setattr(
        predict, "class_names", lambda weights, n_classes: [AUDIOSET[i] for i in sorted(AUDIOSET, key=str)]
    )
    with pytest.raises(Wrong, match=r"called Speech, sound 1, sound 10, .*; by transformers Speech, sound 1, sound 2"):
        comparisons.tags(original)


def test_another_normalisation_beside_the_checkpoint(checkpoint):
    change_json(checkpoint / "preprocessor_config.json", mean=-6.0)
    with pytest.raises(Wrong, match=r"trained on other features: mean -6\.0, not -4\.26"):
        comparisons.front_end(str(checkpoint))
    with pytest.raises(Wrong, match="probabilities differ by"):
        comparisons.tags(str(checkpoint))
    (checkpoint / "preprocessor_config.json").unlink()
    with pytest.raises(NotThere):
        comparisons.front_end(str(checkpoint))
    assert "as transformers hears them" in comparisons.tags(str(checkpoint))  # by the extractor's own defaults


def test_a_device_that_computes_something_else(monkeypatch, original):
    def damaged(model, dtype, machine):
        if dtype == "bfloat16":
            with torch.no_grad():
                model.head[1].bias += 1

    comparisons.tags_on(CPU.device, "float32", original)
    monkeypatch.setattr(predict, "prepare", damaged)
    with pytest.raises(Wrong, match="probabilities in bfloat16 on cpu and on the CPU differ"):
        comparisons.tags_on(CPU.device, "bfloat16", original)


# --------------------------------------------------------------------------------------------------- planted: ESC-50


def test_esc50_is_found_in_the_cache_and_not_fetched(tmp_path):
    with pytest.raises(NotThere):
        comparisons.esc50_labels(None, tmp_path, False)
    make_esc50(tmp_path / "ESC-50")
    assert comparisons.esc50_labels(None, tmp_path, False).startswith("60 clips, 12 classes, 5 folds")


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("target", lambda rows, i: rows[i - 5], "60 clips have another class, 0 another fold"),
        ("fold", lambda rows, i: int(rows[i]) % 5 + 1, "0 clips have another class, 60 another fold"),
    ],
)
def test_labels_and_folds_shifted_by_one(tmp_path, column, change, message):
    table = make_esc50(tmp_path / "ESC-50") / "meta" / "esc50.csv"
    rows = list(csv.DictReader(table.read_text().splitlines()))
    values = [row[column] for row in rows]
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({**row, column: change(values, i)} for i, row in enumerate(rows))
    with pytest.raises(Wrong, match=message):
        comparisons.esc50_labels(None, tmp_path, False)


def test_esc50_that_cannot_be_downloaded_is_not_wrong(monkeypatch, tmp_path):
    def unreachable(*_):
        raise UserError("cannot download it: download it by hand")

    monkeypatch.setattr(comparisons, "load_dataset", unreachable)
    with pytest.raises(NotThere, match="download it by hand"):
        comparisons.esc50_labels(None, tmp_path, True)
    with pytest.raises(NotThere, match="download it by hand"):
        check.accuracy("linear", "random:tiny", None, tmp_path, "cpu", tmp_path)
    with pytest.raises(NotThere, match="the checkpoint"):
        check.accuracy("linear", None, tmp_path, tmp_path, "cpu", tmp_path)
    with pytest.raises(UserError):  # what was given is
        comparisons.esc50_labels(tmp_path, tmp_path, True)


def test_a_name_that_is_not_the_releases(tmp_path):
    root = make_esc50(tmp_path / "ESC-50")
    (root / "audio" / "1-100000-A-0.wav").rename(root / "audio" / "dog.wav")
    table = root / "meta" / "esc50.csv"
    table.write_text(table.read_text().replace("1-100000-A-0.wav", "dog.wav"))
    with pytest.raises(Wrong, match=r"dog\.wav is no name of the release"):
        comparisons.esc50_labels(root, tmp_path, False)


def test_clips_with_another_normalisation(monkeypatch, esc50, tmp_path):
    assert comparisons.esc50_features(esc50, tmp_path, False).startswith("features of 10 clips differ by")
    monkeypatch.setattr(data, "MEAN", -4.2)
    with pytest.raises(Wrong, match=r"features of 10 clips differ by 0\.00\d+, more than 0\.005"):
        comparisons.esc50_features(esc50, tmp_path, False)


def test_one_clip_that_is_read_otherwise(monkeypatch, esc50, tmp_path):
    """A hundredth of a second late."""
    read = data.read_audio
    monkeypatch.setattr(data, "read_audio", lambda path, *args: read(path, *args)[160 * ("-A-24" in path.name) :])
    with pytest.raises(Wrong, match="features of 10 clips differ by"):
        comparisons.esc50_features(esc50, tmp_path, False)


# -------------------------------------------------------------------------------------------------- planted: training


@pytest.fixture(scope="module")
def backbone():
    return load_ast(SMALL_AST, 60, 3)


def test_a_projection_that_never_learns(monkeypatch, backbone):
    """Both sides of an adapter at zero: weight decay cannot move them, and neither gets a gradient."""
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
    """In a step of two clips it leaves out both of them in some block of twelve: that is no mistake."""
    check.moves("adapter_plus", load_ast("random:tiny", 100, 3), replace(CPU, batch=2))


def test_decay_is_no_learning(monkeypatch, backbone):
    """What a loss does not depend on moves all the same, by weight decay."""
    make = train.make_learner

    def learner(*args):
        made = make(*args)
        made.network.norm.weight.register_hook(torch.zeros_like)
        return made

    monkeypatch.setattr(train, "make_learner", learner)
    with pytest.raises(Wrong, match=r"linear: norm\.weight does not learn"):
        check.moves("linear", backbone, CPU)


def test_a_frozen_weight_that_moves(monkeypatch, backbone):
    epoch = train.train_epoch

    def leaking(learner, *args):
        learner.network.blocks[0].ffn.fc1.weight.data += 1e-6
        return epoch(learner, *args)

    monkeypatch.setattr(train, "train_epoch", leaking)
    with pytest.raises(Wrong, match=r"linear: blocks\.0\.ffn\.fc1\.weight is frozen, and has moved"):
        check.moves("linear", backbone, CPU)


def test_a_loss_that_is_not_finite(monkeypatch, backbone):
    monkeypatch.setattr(train, "train_epoch", lambda *_: [1.0, math.nan])
    with pytest.raises(Wrong, match=r"lora: the losses are \[1\.0, nan\]"):
        check.moves("lora", backbone, CPU)


def test_half_precision_with_a_scaler(backbone):
    """float16 needs more steps than two: its scaler leaves the first ones out."""
    assert len(check.steps("linear", 2, backbone, replace(CPU, dtype="bfloat16"))[-1]) == 2
    check.moves("lora", backbone, replace(CPU, dtype="bfloat16"))


def test_two_runs_that_differ(monkeypatch):
    """An epoch that does not follow from its seed."""
    assert "bit for bit" in check.repeats(str(SMALL_AST), CPU)
    monkeypatch.setattr(train, "seed_epoch", lambda *args, **kwargs: None)
    with pytest.raises(Wrong, match="differ by"):
        check.repeats(str(SMALL_AST), CPU)


def test_a_gpu_may_round_otherwise():
    one, other = {"a": torch.ones(4)}, {"a": torch.ones(4) + 1e-3}
    with pytest.raises(Wrong):
        check.same(one, other, CPU, "they")
    gpu = replace(CPU, device=torch.device("cuda"))
    assert check.same(one, other, gpu, "they") == "they differ by 0.001 at most"
    with pytest.raises(Wrong):
        check.same(one, {"a": 1.2 * torch.ones(4)}, gpu, "they")


def test_a_resumed_run_that_differs(monkeypatch):
    """The optimiser forgets; and a train.py that ends with an error is not taken for one that agrees."""
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda *_: None)
    with pytest.raises(Wrong, match="an unbroken run and a resumed one differ by"):
        check.resumes(str(SMALL_AST), CPU)
    monkeypatch.setattr(train, "load_ast", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        check.resumes(str(SMALL_AST), CPU)
    with pytest.raises(Wrong, match=r"train\.py ended with 2, 2, 2: .*no weights at"):
        monkeypatch.undo()
        check.resumes("/nowhere", CPU)
    monkeypatch.setattr(train, "main", lambda words: print("going on after epoch 1") or 1)
    with pytest.raises(Wrong, match="ended with 1, 1, 1"):
        check.resumes(str(SMALL_AST), CPU)


def test_time_for_a_fold(monkeypatch):
    """Of ESC-50: 50 epochs of 1,200 clips that train and 400 that validate, then 400 that test."""
    asked = []
    monkeypatch.setattr(check, "speed", lambda *args: asked.append(args) or (1.0, 0.5, 1234.0))
    seconds = 50 * (1200 * 1.0 + 400 * 0.5) + 400 * 0.5
    line = f"{seconds / 3600:.0f} hours (1.0 clips/s in batches of 2, 1,234 MB)"
    assert check.fold_of("esc50", "w", CPU) == line
    check.fold_of("gsc", "w", replace(CPU, device=torch.device("cuda")))
    assert [(n_frames, bench.batch) for _, n_frames, bench in asked] == [(500, 2), (100, 128)]
    assert {name: sum(sizes) for name, sizes in check.SIZES.items()} == {
        "esc50": 2000, "esc10": 400, "us8k": 8732, "gsc": 105_829, "fsc": 30_043}  # fmt: skip


# -------------------------------------------------------------------------------------------------------- --esc50


def test_accuracies_beside_the_published_ones():
    assert "(published: 75.85 with" in check.verdict("linear", 60.0)
    good = check.verdict("houlsby_par", 85.0)
    assert good.startswith("85.00 % (published: 88.00 with") and "95.6" in good
    with pytest.raises(Wrong, match=r"84\.99 %.*position embeddings.*features or labels.*did not learn"):
        check.verdict("houlsby_par", 84.99)


def test_a_fold_of_both_methods(monkeypatch, quick, original, esc50, tmp_path, capsys):
    """On a miniature, too short to learn from: `linear` has no bound, `houlsby_par` is wrong. Finished folds stay."""
    monkeypatch.setitem(data.DATASETS, "esc50", replace(data.DATASETS["esc50"], n_frames=60, epochs=1))
    for name in ("front_end", "tensors", "logits", "tags", "tags_on", "esc50_features"):
        monkeypatch.setattr(comparisons, name, lambda *_: "as it should")
    places = ["--data-dir", esc50, "--cache-dir", tmp_path / "cache", "--out", tmp_path / "runs", "--weights", original]
    options = [str(word) for word in ("--esc50", "--device", "cpu", *places)]
    for _ in range(2):
        assert check.main(options) == 1
        out, err = capsys.readouterr()
        statuses = lines_of(out)
        assert (statuses["ESC-50, linear"], statuses["ESC-50, houlsby_par"]) == ("right", "wrong"), out
        assert "% (published: 75.85" in out and "is likely position embeddings" in out
    assert "fold 1: test accuracy" in err  # what train.py says goes elsewhere than the lines
    with pytest.raises(Wrong, match=r"train\.py ended with 2"):
        check.accuracy("linear", "/nowhere", esc50, tmp_path / "cache", "cpu", tmp_path / "other")
