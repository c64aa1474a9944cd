"""What predict.py and the commands of load_weights.py print and write, held to lines and numbers typed by hand."""

import csv
import io
import json
import math
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import huggingface_hub
import numpy as np
import onnxruntime
import pytest
import soundfile
import torch
from conftest import SMALL_AST, save_random
from safetensors.torch import load_file, save_file

import load_weights
import petl
import predict
from data import fbank, read_audio, to_input
from load_weights import load_ast, load_trained, read_header, save_ast, save_trained

CLASSES = ["rain", "sea, waves", "dog", "wind"]
SHA256 = "afdbe74769c46f9cafa50e9c2ccaed1d14ca1df42b25d1c1a9bdb5c91017a261"  # of the small AST
N_FRAMES = 60  # of the models here: windows of 0.6 s, 59 * 160 + 400 samples


def constant(path: Path, *probabilities: float, classes: list[str] | None = None, n_frames: int = N_FRAMES) -> Path:
    """A fold file that gives every sound these probabilities."""
    model = petl.apply(load_ast(SMALL_AST, n_frames, len(probabilities)), "linear")
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor(probabilities).log())
    save_trained(model, path, {"classes": classes} if classes else {})
    return path


def sound(path: Path, samples: int, rate: int = 16_000) -> Path:
    """A glide: no two windows are alike."""
    time = np.arange(samples) / rate
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * (300 + 400 * time) * time), rate)
    return path


@pytest.fixture
def answer(capsys):
    """Runs predict.py; returns its lines, and checks its exit code."""

    def call(*words, code: int = 0) -> list[str]:
        capsys.readouterr()
        found = predict.main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert found == code and (bool(err) is bool(code)), err
        return out.splitlines()

    return call


@pytest.fixture
def command(capsys):
    """Runs `load_weights.py WORDS`; returns what it prints."""

    def call(*words) -> str:
        capsys.readouterr()
        assert load_weights.main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    return call


# --------------------------------------------------------------------------------------------------------- predict.py


def test_answers_are_sorted_and_three_unless_told(tmp_path, answer):
    fold = constant(tmp_path / "fold1.safetensors", 0.125, 0.5, 0.125, 0.25, classes=CLASSES)
    file = sound(tmp_path / "a.wav", 8000)
    (line,) = answer(fold, file)
    assert line == f"{file}{0.5:22.2f} s  sea, waves 0.500  wind 0.250  rain 0.125"  # of equal ones the first
    (line,) = answer(fold, file, "--json")
    classes = [{"class": name, "probability": p} for name, p in (("sea, waves", 0.5), ("wind", 0.25), ("rain", 0.125))]
    assert json.loads(line) == {"file": str(file), "what": "file", "start": 0.0, "end": 0.5, "classes": classes}
    lines = answer(fold, file, "--csv", "--top", 9)
    assert lines == [
        "file,what,start,end,rank,class,probability,error",
        f'{file},file,0.000,0.500,1,"sea, waves",0.500000,',
        f"{file},file,0.000,0.500,2,wind,0.250000,",
        f"{file},file,0.000,0.500,3,rain,0.125000,",
        f"{file},file,0.000,0.500,4,dog,0.125000,",
    ]


def test_a_file_that_cannot_be_read_in_every_form(tmp_path, answer, capsys):
    """Exit code 1, the reason, and the others answered."""
    fold = constant(tmp_path / "fold1.safetensors", 0.75, 0.25)
    good, bad = sound(tmp_path / "a.wav", 4000), tmp_path / "absent.wav"
    found = [json.loads(line) for line in answer(fold, bad, good, "--json", code=1)]
    assert found[0] == {"file": str(bad), "what": "file", "error": "No such file or directory"}
    assert found[1]["classes"] == [
        {"class": "class 0", "probability": 0.75}, {"class": "class 1", "probability": 0.25},
    ]  # fmt: skip
    assert answer(fold, bad, good, "--csv", code=1)[1] == f"{bad},file,,,,,,No such file or directory"
    assert len(answer(fold, bad, good, code=1)) == 1
    assert predict.main([str(fold), str(bad), "--json"]) == 1
    assert capsys.readouterr().err == f"error: {bad}: No such file or directory\n"


def test_the_folds_of_a_run_vote_with_their_probabilities(tmp_path, answer):
    """Not with their logits: the mean of (0.9, 0.1) and (0.2, 0.8) and (0.5, 0.5)."""
    for fold, probabilities in enumerate(((0.9, 0.1), (0.2, 0.8), (0.5, 0.5)), start=1):
        constant(tmp_path / "run" / f"fold{fold}.safetensors", *probabilities, classes=["a", "b"])
    (line,) = answer(tmp_path / "run", sound(tmp_path / "a.wav", 4000), "--json")
    found = {entry["class"]: entry["probability"] for entry in json.loads(line)["classes"]}
    assert found == {"a": pytest.approx(1.6 / 3, abs=2e-6), "b": pytest.approx(1.4 / 3, abs=2e-6)}


@pytest.mark.parametrize(
    ("options", "samples", "spans"),  # in samples; a window has 9,840
    [
        ((), 9_840 + 159, [(0, 9_999)]),  # not a frame more than one window
        ((), 9_840 + 160, [(0, 9_840), (160, 10_000)]),
        ((), 20_000, [(0, 9_840), (4_800, 14_640), (9_600, 19_440), (10_080, 20_000)]),  # half a window
        (("--hop", "0.6"), 29_040, [(0, 9_840), (9_600, 19_440), (19_200, 29_040)]),
        (("--hop", "0.456"), 20_000, [(0, 9_840), (7_360, 17_200), (10_080, 20_000)]),  # 46 frames
        (("--hop", "0.01"), 10_200, [(0, 9_840), (160, 10_000), (320, 10_200)]),
    ],
)
def test_windows_by_hand(tmp_path, answer, options, samples, spans):
    """Where they lie, and that a file's answer is the mean of theirs."""
    model = save_random(tmp_path / "fold1.safetensors", "convpass_pfeiffer_seq")
    file = sound(tmp_path / "a.wav", samples)
    lines = [json.loads(line) for line in answer(tmp_path / "fold1.safetensors", file, "--json", "--windows", *options)]
    *windows, whole = lines
    assert [(row["start"], row["end"]) for row in windows] == [
        (round(a / 16e3, 3), round(b / 16e3, 3)) for a, b in spans
    ]
    assert (whole["what"], whole["start"], whole["end"]) == ("file", 0.0, round(samples / 16_000, 3))
    wave = torch.from_numpy(read_audio(file))
    with torch.no_grad():
        scores = [model(to_input(fbank(wave[None, a:b]), N_FRAMES)).softmax(-1)[0] for a, b in spans]
    for row, expected in zip(windows, scores, strict=True):
        assert row["what"] == "window" and row["classes"] == [
            {"class": CLASSES[expected.argmax()], "probability": pytest.approx(expected.max().item(), abs=3e-6)}
        ]
    mean = torch.stack(scores).mean(0)
    assert whole["classes"][0] == {
        "class": CLASSES[mean.argmax()], "probability": pytest.approx(mean.max().item(), abs=3e-6),
    }  # fmt: skip


@pytest.mark.parametrize("hop", ["0.004", "0.61", "-0.3"])
def test_hops_that_no_window_has(tmp_path, hop, capsys):
    fold = constant(tmp_path / "fold1.safetensors", 0.5, 0.5)
    assert predict.main([str(fold), str(sound(tmp_path / "a.wav", 4000)), "--hop", hop]) == 2
    assert capsys.readouterr().err == (
        f"error: --hop {float(hop)}: windows are 0.6 s long, give a hop of 0.01 s to that\n"
    )


def test_a_long_recording_is_listened_to_as_it_comes():
    """Reading stays one window and a hop ahead, and a batch of windows is answered before the next one is cut."""
    pulled = []

    def blocks():
        for i in range(1000):
            pulled.append(i)
            yield np.zeros(1000, np.float32)

    windows = predict.cut(blocks(), n_frames=4, hop=160)  # 880 samples
    assert next(windows)[0] == 0 and len(pulled) == 2
    assert next(windows)[0] == 160 and len(pulled) == 2
    cut = []

    def counted():
        for start in range(100):
            cut.append(start)
            yield predict.Window(Path("a"), start, np.zeros(880, np.float32))

    model = petl.apply(load_ast(SMALL_AST, 36, 2), "linear").eval()
    classifier = predict.Classifier([model], ["a", "b"], lambda logits: logits.softmax(-1))
    scored = predict.score(counted(), classifier, 5, torch.device("cpu"), "float32")
    assert [next(scored)[0].start for _ in range(5)] == [0, 1, 2, 3, 4] and len(cut) == 5
    answers = predict.answers(scored, ["a", "b"], 1)
    assert next(answers).what == "window" and len(cut) == 10


def test_a_terminal_sees_how_far_it_is(tmp_path):
    """Seconds of sound, overlapping windows counted once, over all files."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    fold = constant(tmp_path / "fold1.safetensors", 0.5, 0.5)
    files = [sound(tmp_path / "a.wav", 40_000), sound(tmp_path / "b.wav", 24_000)]
    with redirect_stderr(Terminal()) as shown, redirect_stdout(io.StringIO()):
        assert predict.main([str(fold), *map(str, files)]) == 0
    assert "listening: 100%" in shown.getvalue() and "4.00/4.00" in shown.getvalue()


def test_tags_come_from_the_audioset_checkpoint_unless_told(tmp_path, answer, monkeypatch):
    """Nothing trained: its own head on the mean of [CLS] and [distillation], a sigmoid for each tag."""
    asked = []

    def deliver(repository, name):
        asked.append((repository, name))
        return str(SMALL_AST / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", deliver)
    file = sound(tmp_path / "street.wav", 16_240)  # 100 frames
    (line,) = answer("--tags", file, "--json", "--top", 5)
    assert {repository for repository, _ in asked} == {"MIT/ast-finetuned-audioset-10-10-0.4593"}
    model = load_ast(SMALL_AST, pool="cls_dist").eval()
    with torch.no_grad():
        tokens = model.features(to_input(fbank(torch.from_numpy(read_audio(file))[None]), 100))
        logits = model.head((tokens[:, 0] + tokens[:, 1]) / 2)[0].tolist()
    expected = {f"LABEL_{i}": pytest.approx(1 / (1 + math.exp(-logit)), abs=3e-6) for i, logit in enumerate(logits)}
    found = json.loads(line)["classes"]
    assert {entry["class"]: entry["probability"] for entry in found} == expected
    assert [entry["probability"] for entry in found] == sorted((e["probability"] for e in found), reverse=True)


def test_a_backbone_that_has_moved(tmp_path, answer, command):
    """Files of trained parts name the place of their backbone; --weights says where it is now."""
    folder = tmp_path / "old"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((SMALL_AST / name).read_bytes())
    model = petl.apply(load_ast(folder, N_FRAMES, 2), "lora").eval()
    save_trained(model, tmp_path / "fold1.safetensors", {"classes": ["a", "b"]})
    folder.rename(tmp_path / "new")
    file, fold = sound(tmp_path / "a.wav", 4000), tmp_path / "fold1.safetensors"
    assert predict.main([str(fold), str(file)]) == 2
    (line,) = answer(fold, file, "--weights", tmp_path / "new", "--json")
    with torch.no_grad():
        expected = model(to_input(fbank(torch.from_numpy(read_audio(file))[None]), N_FRAMES)).softmax(-1).max().item()
    assert json.loads(line)["classes"][0]["probability"] == pytest.approx(expected, abs=3e-6)
    command("export", fold, "--to", "merged", "--out", tmp_path / "m.safetensors", "--weights", tmp_path / "new")
    assert read_header(tmp_path / "m.safetensors")["classes"] == ["a", "b"]


@pytest.mark.parametrize(("program", "code"), [(predict, 1), (load_weights, 2)])
def test_exit_codes_reach_the_shell(program, code, tmp_path):
    """As programs of their own: a sound that is not there, a file of trained parts that is not there."""
    absent = str(tmp_path / "absent.wav")
    words = (
        [str(constant(tmp_path / "fold1.safetensors", 0.5, 0.5)), absent] if program is predict else ["show", absent]
    )
    done = subprocess.run([sys.executable, program.__file__, *words], capture_output=True, text=True)
    assert done.returncode == code and done.stdout == ""
    assert done.stderr.startswith(f"error: {absent}") and done.stderr.count("\n") == 1


# --------------------------------------------------------------------------------------------------------------- show


HEADER = {
    "classes": ["rain", "dog"],
    "parameters": {"petl": 1234, "head": 258, "total": 98765},
    "result": {"fold": 3, "accuracy": 81.256, "validation_accuracy": 90.5, "epoch": 7},
    "settings": {"dataset": "esc50", "method": {"name": "lora"}, "seed": 2, "lr": 0.005},
    "versions": {"python": "3.11.7", "torch": "2.0"},
}


def test_show_line_by_line(tmp_path, command):
    file = tmp_path / "fold3.safetensors"
    save_trained(petl.apply(load_ast(SMALL_AST, N_FRAMES, 2), "adapter_lora"), file, HEADER)
    part = "Adapter(at='ffn', how='par_before', kind='bottleneck', rr=64) + LoRA(targets='qv', rr=128, alpha=8)"
    lines = [
        f"file        {file}, {file.stat().st_size:,} bytes",
        "holds       trained parts only: needs its backbone",
        f"method      adapter_lora: {part}, learning rate 0.005",
        "parameters  1,492 trained (1,234 of the method, 258 of final LayerNorm and head), 1.51 % of 98,765",
        "classes     2: rain, dog",
        "pool        mean",
        f"backbone    {SMALL_AST}, SHA-256 {SHA256}",
        "front end   60 frames; sample_rate 16000, window 400, hop 160, n_fft 512, n_mels 128, mean -4.2677393, std "
        "4.5689974",
        "accuracy    81.26 % of the test clips of fold 3 (epoch 7, best of validation, 90.50 %)",
        "trained on  dataset esc50, seed 2, lr 0.005",
        "versions    python 3.11.7, torch 2.0",
    ]
    assert command("show", file).splitlines() == lines


def test_show_of_a_file_that_says_little(tmp_path, command):
    """Without names, without validation, of a method without parts; and a whole model."""
    file = tmp_path / "fold1.safetensors"
    result = {"fold": 1, "accuracy": 50.0, "validation_accuracy": None, "epoch": 30}
    save_trained(petl.apply(load_ast(SMALL_AST, N_FRAMES, 2), "linear"), file, {"result": result})
    lines = command("show", file).splitlines()
    assert "method      linear: final LayerNorm and head alone, learning rate 0.001" in lines
    assert "classes     2, without names" in lines
    assert "accuracy    50.00 % of the test clips of fold 1 (epoch 30, the last epoch)" in lines
    assert len(lines) == 8
    save_ast(load_ast(SMALL_AST, N_FRAMES, 2), tmp_path / "whole.safetensors", {})
    lines = command("show", tmp_path / "whole.safetensors").splitlines()
    assert lines[1] == "holds       a whole AST, merged" and len(lines) == 2


# ------------------------------------------------------------------------------------------------------------- exports


@pytest.fixture
def odd_backbone(tmp_path) -> Path:
    """The small AST with four heads, an eps that matters, and frames that no stride of ten ends at."""
    folder = tmp_path / "odd"
    folder.mkdir()
    config = json.loads((SMALL_AST / "config.json").read_text())
    config |= {"num_attention_heads": 4, "layer_norm_eps": 0.25, "max_length": 105}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((SMALL_AST / "model.safetensors").read_bytes())
    return folder


def trained(backbone: Path, method: str, file: Path, n_frames: int = 67, pool: str = "cls_dist", **header):
    """A fold file in which everything that the method trains is random."""
    torch.manual_seed(3)
    model = petl.apply(load_ast(backbone, n_frames, 2, pool), method)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_trained(model, file, {"classes": ["rain", "dog"], **header})
    return model.eval()


CONFIG = {
    "architectures": ["ASTForAudioClassification"],
    "model_type": "audio-spectrogram-transformer",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 0.25,
    "patch_size": 16,
    "qkv_bias": True,
    "frequency_stride": 10,
    "time_stride": 10,
    "max_length": 67,
    "num_mel_bins": 128,
    "id2label": {"0": "rain", "1": "dog"},
    "label2id": {"rain": 0, "dog": 1},
}
EXTRACTOR = {
    "feature_extractor_type": "ASTFeatureExtractor",
    "feature_size": 1,
    "sampling_rate": 16000,
    "num_mel_bins": 128,
    "max_length": 67,
    "do_normalize": True,
    "mean": -4.2677393,
    "std": 4.5689974,
    "padding_value": 0.0,
}


@pytest.mark.parametrize("to", ["hf", "peft"])
def test_folders_for_the_libraries_say_what_the_model_is(to, tmp_path, odd_backbone, command):
    trained(odd_backbone, "lora", tmp_path / "fold1.safetensors")
    command("export", tmp_path / "fold1.safetensors", "--to", to, "--out", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {name: config[name] for name in CONFIG} == CONFIG
    extractor = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert {name: extractor[name] for name in EXTRACTOR} == EXTRACTOR


@pytest.mark.parametrize("method", ["lora_qkvo", "hydra", "bitfit", "linear", "full_ft"])
def test_every_way_out_and_back_gives_the_same_logits(method, tmp_path, odd_backbone, command):
    """merged and hf, read again by `load_ast`; with an eps, heads and a length that are nobody's default."""
    fold = tmp_path / "fold1.safetensors"
    model = trained(odd_backbone, method, fold, result={"accuracy": 1.5})
    command("export", fold, "--to", "merged", "--out", tmp_path / "merged.safetensors")
    command("export", fold, "--to", "hf", "--out", tmp_path / "hf")
    x = torch.randn(2, 67, 128)
    for file in ("merged.safetensors", "hf"):
        again = load_ast(tmp_path / file, pool="cls_dist").eval()
        assert (again.config.eps, again.config.heads, again.config.n_frames) == (0.25, 4, 67)
        with torch.no_grad():
            torch.testing.assert_close(again(x), model(x), rtol=0, atol=2e-5)
    header = read_header(tmp_path / "merged.safetensors")
    assert header["classes"] == ["rain", "dog"] and header["result"] == {"accuracy": 1.5}
    assert header["method"]["name"] == method and header["backbone"]["name"] == str(odd_backbone)


def test_what_goes_into_the_folder_for_peft(tmp_path, odd_backbone, command):
    """Rank, scale and targets; the LoRA under peft's names, and what was trained beside it."""
    method = petl.Method("lora", (petl.LoRA("qo", 32, 12),), "-", "-")  # rank 2, scale 12 / 32
    model = trained(odd_backbone, method, tmp_path / "fold1.safetensors")
    command("export", tmp_path / "fold1.safetensors", "--to", "peft", "--out", tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert {name: config[name] for name in ("peft_type", "r", "lora_alpha", "lora_dropout", "bias")} == {
        "peft_type": "LORA", "r": 2, "lora_alpha": 0.75, "lora_dropout": 0.0, "bias": "none",
    }  # fmt: skip
    assert config["target_modules"] == ["q_proj", "o_proj"] and config["base_model_name_or_path"] == str(odd_backbone)
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    prefix = "base_model.model.audio_spectrogram_transformer."
    for n in (0, 1):
        for letter in "qo":
            ours = getattr(model.blocks[n].attn, letter)
            theirs = f"{prefix}layers.{n}.attention.{letter}_proj"
            assert torch.equal(tensors.pop(f"{theirs}.lora_A.weight"), ours.a.weight)
            assert torch.equal(tensors.pop(f"{theirs}.lora_B.weight"), ours.b.weight)
    assert torch.equal(tensors.pop(f"{prefix}layernorm.weight"), model.norm.weight)
    assert torch.equal(tensors.pop("base_model.model.classifier.dense.bias"), model.head[1].bias)
    assert torch.equal(tensors.pop(f"{prefix}embeddings.position_embeddings"), model.embed.position)
    assert len(tensors) == 1 + 3 + 4  # layernorm.bias, head, embeddings


def test_an_onnx_file_explains_itself(tmp_path, command):
    """What goes in and comes out, and as metadata all that a program needs to know."""
    fold = constant(tmp_path / "fold1.safetensors", 0.125, 0.875, classes=["rain", "dog"], n_frames=31)
    command("export", fold, "--to", "onnx", "--out", tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (heard,), (said,) = session.get_inputs(), session.get_outputs()
    assert (heard.name, heard.shape, heard.type) == ("waveform", ["batch", "samples"], "tensor(float)")
    assert (said.name, said.shape) == ("probabilities", ["batch", 2])
    facts = {name: json.loads(fact) for name, fact in session.get_modelmeta().custom_metadata_map.items()}
    assert facts == {
        "classes": ["rain", "dog"],
        "n_frames": 31,
        "front_end": {
            "sample_rate": 16000, "window": 400, "hop": 160, "n_fft": 512, "n_mels": 128, "mean": -4.2677393,
            "std": 4.5689974,
        },
    }  # fmt: skip
    (found,) = session.run(None, {"waveform": np.zeros((3, 4000), np.float32)})
    np.testing.assert_allclose(found, [[0.125, 0.875]] * 3, atol=1e-6)
    assert [path.name for path in tmp_path.glob("*onnx*")] == ["model.onnx"]


def test_an_onnx_file_hears_the_last_frame(tmp_path, command):
    """Sounds that end where a frame ends, or one sample before."""
    model = save_random(tmp_path / "fold1.safetensors", "linear", n_frames=31)
    command("export", tmp_path / "fold1.safetensors", "--to", "onnx", "--out", tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for samples in (399, 400, 559, 560, 720, 30 * 160 + 399, 30 * 160 + 400):
        waves = 0.1 * torch.randn(2, samples, generator=torch.Generator().manual_seed(samples))
        with torch.no_grad():
            expected = model(to_input(fbank(waves), 31)).softmax(-1)
        (found,) = session.run(None, {"waveform": waves.numpy()})
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("rank", [4, 23])  # a divisor of 64, and none
def test_a_lora_of_peft_written_by_hand(tmp_path, odd_backbone, command, rank):
    """s = lora_alpha / r on one projection of one block; the rest stays that of the backbone."""
    torch.manual_seed(0)
    folder = tmp_path / "peft"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 1.5 * rank, "base_model_name_or_path": str(odd_backbone)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    a, b = torch.randn(rank, 64), 0.1 * torch.randn(64, rank)
    name = "base_model.model.audio_spectrogram_transformer.layers.1.attention.v_proj"
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    command("import", folder, "--out", tmp_path / "fold1.safetensors")
    ours = load_trained(tmp_path / "fold1.safetensors")
    plain = load_ast(odd_backbone, pool="cls_dist").eval()
    x = torch.randn(2, 105, 128)
    with torch.no_grad():
        plain.blocks[1].attn.v.weight.add_(1.5 * b @ a)
        torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=1e-4)
    header = read_header(tmp_path / "fold1.safetensors")
    assert header["classes"] == [f"LABEL_{i}" for i in range(5)]
    assert header["parameters"]["petl"] == 2 * 2 * rank * 64  # A and B of both blocks


def test_exports_land_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    """A file that was there stays when the disk fills."""
    save_random(tmp_path / "fold1.safetensors", "lora", "cls_dist")
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for to, where in (("merged", out / "model.safetensors"), ("hf", out), ("peft", out)):
        words = ["export", tmp_path / "fold1.safetensors", "--to", to, "--out", where]
        assert load_weights.main([str(word) for word in words]) == 2
        assert capsys.readouterr().err == f"error: cannot write {where}: No space left on device\n"
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    assert (out / "model.safetensors").read_bytes() == b"old"


def test_csv_of_windows_reads_back(tmp_path, answer):
    fold = constant(tmp_path / "fold1.safetensors", 0.25, 0.75, classes=["a", "b"])
    lines = answer(fold, sound(tmp_path / "a.wav", 20_000), "--csv", "--windows")
    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
    assert [(row["what"], row["start"], row["rank"], row["class"]) for row in rows] == [
        ("window", "0.000", "1", "b"), ("window", "0.300", "1", "b"), ("window", "0.600", "1", "b"),
        ("window", "0.630", "1", "b"), ("file", "0.000", "1", "b"), ("file", "0.000", "2", "a"),
    ]  # fmt: skip
