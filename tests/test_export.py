"""Every export opened by the library it is meant for, the way back from peft, and `show`."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import peft
import pytest
import torch
import transformers
from helpers import SETTINGS, SMALL_AST, SMALL_CONFIG, constant, save_random, write_ast
from safetensors.torch import load_file, save_file

import data
import load_weights
import petl
from ast_model import POOL
from load_weights import load_ast, load_trained, save_ast, save_trained, to_dict
from support import headers
from support.checkpoints import read_header, write_tensors
from tools import export, predict

ROOT = Path(petl.__file__).parent
AST = "audio_spectrogram_transformer"
CLASSES = ["rain", "sea, waves", "dog", "wind"]


@pytest.fixture
def fbank() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 60, 128)


@pytest.fixture
def command(capsys):
    """Runs `tools.export WORDS`; returns what it prints."""

    def call(*words, code: int = 0) -> str:
        capsys.readouterr()
        assert export.main([str(word) for word in words]) == code
        out, err = capsys.readouterr()
        assert code == 0 or (err.startswith("error: ") and err.count("\n") == 1 and not out)
        return err if code else out

    return call


@pytest.fixture
def export_to(command, tmp_path):
    """Exports tmp_path/fold1.safetensors to the format `to`; returns what is printed."""

    def call(to: str, out: str, *words, code: int = 0) -> str:
        fold = tmp_path / "fold1.safetensors"
        return command("export", fold, "--to", to, "--out", tmp_path / out, *words, code=code)

    return call


def noise(samples: int, batch: int = 1) -> torch.Tensor:
    return 0.1 * torch.randn(batch, samples, generator=torch.Generator().manual_seed(2))


# ------------------------------------------------------------------------------------------- merged


@pytest.mark.parametrize("pool", POOL)
@pytest.mark.parametrize("method", ["lora_qkvo", "hydra", "bitfit", "linear", "full_ft"])
def test_merged_is_one_plain_ast(method, pool, tmp_path, fbank, export_to):
    model = save_random(tmp_path / "fold1.safetensors", method, pool)
    export_to("merged", "merged.safetensors")
    plain = load_ast(tmp_path / "merged.safetensors", pool=pool).eval()
    assert not any(hasattr(module, "wrapped") for module in plain.modules())
    assert not hasattr(plain, "method")
    torch.testing.assert_close(plain(fbank), model(fbank), rtol=0, atol=1e-5)
    again = load_trained(tmp_path / "merged.safetensors").eval()  # as predict reads it
    assert torch.equal(again(fbank), plain(fbank))


def test_merged_in_half_the_size(tmp_path, fbank, export_to):
    model = save_random(tmp_path / "fold1.safetensors", "lora")
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    export_to("merged", "whole.safetensors")
    export_to("merged", "half.safetensors", "--half")
    assert half.stat().st_size < 0.52 * whole.stat().st_size
    half = load_ast(half).eval()
    assert half.head.weight.dtype == torch.float32
    assert 0 < (half(fbank) - model(fbank)).abs().max() < 0.02


def test_a_merged_model_is_a_backbone_too(tmp_path, export_to):
    save_random(tmp_path / "fold1.safetensors", "hydra")
    export_to("merged", "merged.safetensors")
    model = load_ast(tmp_path / "merged.safetensors", n_frames=100, n_classes=7, pool="cls")
    assert model.config.heads == 2 and model(torch.randn(1, 100, 128)).shape == (1, 7)


def test_adapters_cannot_be_merged(tmp_path, export_to):
    save_random(tmp_path / "fold1.safetensors", "houlsby_par")
    message = export_to("merged", "merged.safetensors", code=2)
    assert (
        "'houlsby_par' cannot be merged: a plain AST has no layer Bottleneck; --to onnx" in message
    )
    assert not (tmp_path / "merged.safetensors").exists()


# ------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("method", ["lora", "hydra", "bitfit", "full_ft"])
def test_transformers_opens_it(method, tmp_path, export_to):
    """From the waveform on: the library's extractor and model against our features and model."""
    ours = save_random(tmp_path / "fold1.safetensors", method, "cls_dist")
    export_to("hf", "hf")
    load = transformers.AutoModelForAudioClassification.from_pretrained
    theirs, info = load(tmp_path / "hf", output_loading_info=True)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[key], info
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "hf")
    assert theirs.config.id2label == dict(enumerate(CLASSES)) and theirs.config.label2id["dog"] == 2
    for samples in (5_000, 9_840, 20_000):  # shorter than 60 frames, as long, longer
        wave = noise(samples)
        inputs = extractor(wave[0].numpy(), sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            expected = ours(data.to_input(data.fbank(wave), 60))
            assert (theirs.eval()(**inputs).logits - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("to", ["hf", "peft"])
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_other_heads_have_no_place_in_transformers(to, pool, tmp_path, export_to):
    save_random(tmp_path / "fold1.safetensors", "lora", pool)
    message = export_to(to, "out", code=2)
    assert f"--to {to} needs a model trained with --pool cls_dist" in message
    assert "no weights can express" in message
    assert not (tmp_path / "out").exists()


NOT_PLAIN = "'probe' cannot be merged: a plain AST has no layer Standardised; --to onnx takes all"


@pytest.mark.parametrize(("to", "message"), [
    ("merged", NOT_PLAIN),
    ("hf", NOT_PLAIN),
    ("peft", "--to peft takes one of LoRA, DoRA, RsLoRA alone, not 'probe'; --to onnx takes all"),
])  # fmt: skip
def test_a_head_that_reads_all_layers_has_no_place_elsewhere(to, message, tmp_path, export_to):
    save_random(tmp_path / "fold1.safetensors", "probe")
    assert export_to(to, "out.safetensors", code=2) == f"error: {message}\n"
    assert not (tmp_path / "out.safetensors").exists()


# --------------------------------------------------------------------------------------------- peft


@pytest.mark.parametrize("method", ["lora", "lora_qkvo"])
def test_peft_opens_it(method, tmp_path, fbank, export_to):
    """As the command says: on the backbone in its own place, with another length and head."""
    ours = save_random(tmp_path / "fold1.safetensors", method, "cls_dist")
    said = export_to("peft", "peft")
    scope = {
        # transformers loads such names when they are asked for.
        "AutoConfig": transformers.AutoConfig,
        "AutoModelForAudioClassification": transformers.AutoModelForAudioClassification,
        "PeftModel": peft.PeftModel,
    }
    exec("\n".join(line.strip() for line in said.splitlines()[1:]), scope)
    assert str(SMALL_AST) in said and scope["base"].config.max_length == 60
    assert scope["base"].config.id2label == dict(enumerate(CLASSES))
    with torch.no_grad():
        assert (scope["model"].eval()(input_values=fbank).logits - ours(fbank)).abs().max() <= 1e-4


def test_a_backbone_without_a_place_of_its_own_travels_along(tmp_path, export_to):
    """transformers cannot open random:tiny by that name."""
    torch.manual_seed(0)
    model = petl.apply(load_ast("random:tiny", 60, 4, "cls_dist"), "lora").eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.v.b.weight, std=0.2)
    save_trained(model, tmp_path / "fold1.safetensors", {"classes": CLASSES})
    export_to("peft", "peft")
    base = peft.PeftConfig.from_pretrained(tmp_path / "peft").base_model_name_or_path
    theirs = transformers.AutoModelForAudioClassification.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
    fbank = torch.randn(2, 60, 128)
    with torch.no_grad():
        assert (theirs(input_values=fbank).logits - model(fbank)).abs().max() <= 1e-4


def test_there_and_back(tmp_path, fbank, command, export_to):
    ours = save_random(tmp_path / "fold1.safetensors", "lora_qk", "cls_dist")
    export_to("peft", "peft")
    command("import", tmp_path / "peft", "--out", tmp_path / "back.safetensors")
    back = load_trained(tmp_path / "back.safetensors").eval()
    assert torch.equal(back(fbank), ours(fbank))
    header = read_header(tmp_path / "back.safetensors")
    (lora,) = header["method"]["parts"]
    assert header["classes"] == CLASSES
    assert lora["targets"] == "qk" and lora["alpha"] / lora["rr"] == 8 / 128


def peft_lora(folder, base=SMALL_AST, n_classes=5, **config):
    """A LoRA as a user of peft trains it; random, so that nothing is left at its start."""
    torch.manual_seed(3)
    theirs = transformers.AutoModelForAudioClassification.from_pretrained(
        base, num_labels=n_classes, ignore_mismatched_sizes=True
    )
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **config}
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**config))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Adapter 'default'", UserWarning)  # lora_bias
        theirs.save_pretrained(folder)
    return theirs.eval()


@pytest.mark.parametrize("start", [False, "gaussian", "orthogonal"])
def test_a_lora_of_peft_that_starts_beside_its_backbone(start, tmp_path, command):
    theirs = peft_lora(tmp_path / "peft", init_lora_weights=start)
    command("import", tmp_path / "peft", "--out", tmp_path / "fold.safetensors")
    fbank = torch.randn(2, 100, 128)
    with torch.no_grad():
        ours = load_trained(tmp_path / "fold.safetensors").eval()(fbank)
        assert (theirs(input_values=fbank).logits - ours).abs().max() <= 1e-5


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_lora_of_peft_that_starts_in_its_backbone(start, tmp_path, command):
    """The adapter is what was trained on another backbone than the one it names."""
    peft_lora(tmp_path / "peft", init_lora_weights=start)
    assert command("import", tmp_path / "peft", "--out", tmp_path / "fold.safetensors", code=2) == (
        f"error: {tmp_path / 'peft'} started by init_lora_weights '{start}', which changed its "
        "backbone too: save it by save_pretrained with path_initial_model_for_weight_conversion\n"
    )
    assert not (tmp_path / "fold.safetensors").exists()


def test_what_a_config_leaves_out_is_what_transformers_leaves_out():
    ours, theirs = headers.HuggingFace(), transformers.ASTConfig()
    shape = ("num_mel_bins", "frequency_stride", "time_stride")
    for name in (*shape, "hidden_act", "qkv_bias", "layer_norm_eps"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_what_an_adapter_leaves_out_is_what_peft_leaves_out():
    ours, theirs = headers.LoRA(), peft.LoraConfig()
    for name in ("r", "lora_alpha", "use_dora", "use_rslora", "init_lora_weights"):
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["classifier"]},
        {"modules_to_save": ["classifier", f"{AST}.layernorm"], "target_modules": ["k_proj"]},
        {"r": 5, "use_rslora": True},  # no divisor of 64; the head stays that of the checkpoint
        {"layers_to_transform": [1]},
    ],
)
def test_a_lora_trained_with_peft_opens_here(config, tmp_path, command):
    theirs = peft_lora(tmp_path / "peft", **config)
    file = tmp_path / "peft/adapter_config.json"
    written = json.loads(file.read_text())
    written = {name: written[name] for name in written if written[name]}  # as earlier versions
    file.write_text(json.dumps(written))
    command("import", tmp_path / "peft", "--out", tmp_path / "fold.safetensors")
    ours = load_trained(tmp_path / "fold.safetensors").eval()
    fbank = torch.randn(2, 100, 128)
    with torch.no_grad():
        assert (theirs(input_values=fbank).logits - ours(fbank)).abs().max() <= 1e-5
    if "modules_to_save" not in config:
        header = read_header(tmp_path / "fold.safetensors")
        assert header["classes"] == [f"LABEL_{i}" for i in range(5)]


@pytest.mark.parametrize(("saved", "n_classes"), [
    (["dense"], 5), (["dense"], 3), (["classifier.dense"], 3), (["classifier"], 3),
    (["layernorm"], 5), (["classifier.layernorm"], 5), (None, 5),
])  # fmt: skip
def test_a_head_of_which_peft_saved_a_part(saved, n_classes, tmp_path, command):
    """The other part is the checkpoint's, whose LayerNorm is not fresh. Its head has 5 classes."""
    state = load_file(SMALL_AST / "model.safetensors")
    torch.manual_seed(5)
    state["classifier.layernorm.weight"] = torch.randn(64)
    state["classifier.layernorm.bias"] = torch.randn(64)
    base = write_ast(tmp_path / "base", state, SMALL_CONFIG)
    theirs = peft_lora(tmp_path / "peft", base, n_classes, modules_to_save=saved)
    command("import", tmp_path / "peft", "--out", tmp_path / "fold.safetensors")
    ours = load_trained(tmp_path / "fold.safetensors")
    fbank = torch.randn(2, 100, 128)
    with torch.no_grad():
        assert (theirs(input_values=fbank).logits - ours(fbank)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"alpha_pattern": {"q_proj": 2}}, "holds LORA: only LoRA, DoRA and rsLoRA can be read"),
        ({"rank_pattern": {"q_proj": 2}}, "does not fit the method 'lora': blocks.0.attn.q.a"),
        ({"bias": "all"}, "does not fit the method 'lora': blocks.0.attn.k.bias"),
        ({"bias": "lora_only"}, "does not fit the method 'lora': blocks.0.attn.q.base_layer.bias"),
        ({"lora_bias": True}, "does not fit the method 'lora': blocks.0.attn.q.lora_B.bias"),
        ({"target_modules": ["fc1"]}, "does not fit the method 'lora': blocks.0.ffn.fc1.a.weight"),
        ({"target_modules": ["projection"]}, "does not fit the method 'lora': embed.patches.a"),
        ({"modules_to_save": [f"{AST}.embeddings"]}, "does not fit the method 'lora': embed.cls"),
    ],
)
def test_what_cannot_be_read_from_peft(config, message, tmp_path, command):
    peft_lora(tmp_path / "peft", **config)
    out = tmp_path / "fold.safetensors"
    assert message in command("import", tmp_path / "peft", "--out", out, code=2)
    assert not out.exists()


def test_an_adapter_that_was_trained_on_other_features(tmp_path, command):
    """Its mean and std are those of its base, or it is refused: the frozen embedding has them."""
    out = tmp_path / "fold.safetensors"
    base = write_ast(tmp_path / "base", load_file(SMALL_AST / "model.safetensors"), SMALL_CONFIG)
    theirs = peft_lora(tmp_path / "peft", base)
    own = transformers.ASTFeatureExtractor(max_length=100, mean=-10.0, std=2.0)
    own.save_pretrained(tmp_path / "peft")
    said = command("import", tmp_path / "peft", "--out", out, code=2)
    assert "preprocessor_config.json: mean and std are (-10.0, 2.0), those of its backbone" in said
    own.save_pretrained(base)
    command("import", tmp_path / "peft", "--out", out)
    fb = torch.randn(2, 100, 128) - 5
    with torch.no_grad():
        expected = theirs(input_values=(fb + 10) / 4).logits
        assert (load_trained(out)(data.to_input(fb, 100)) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("to", ["hf", "peft"])
def test_exports_of_a_backbone_with_its_own_features(to, tmp_path, export_to):
    """The folder describes what its tensors read: the embedding has the mean and std inside."""
    base = write_ast(tmp_path / "base", load_file(SMALL_AST / "model.safetensors"), SMALL_CONFIG)
    transformers.ASTFeatureExtractor(max_length=100, mean=-10.0, std=2.0).save_pretrained(base)
    model = trained(base, "lora", tmp_path / "fold1.safetensors", n_frames=100)
    export_to(to, "out")
    out = tmp_path / "out"
    theirs = transformers.AutoModelForAudioClassification.from_pretrained(
        out if to == "hf" else base,
        config=transformers.AutoConfig.from_pretrained(out),
        ignore_mismatched_sizes=True,
    )
    if to == "peft":
        theirs = peft.PeftModel.from_pretrained(theirs, out)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(out)
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 16_240).astype("f4")
    x = data.to_input(data.fbank(torch.from_numpy(wave)[None]), 100)
    with torch.no_grad():
        expected = theirs.eval()(**extractor(wave, 16_000, return_tensors="pt")).logits
        assert (model(x) - expected).abs().max() <= 1e-4


def test_other_adapters_of_peft(tmp_path, command):
    for kind in ("LOHA", "IA3", "VERA"):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
        said = command("import", tmp_path, "--out", tmp_path / "f.safetensors", code=2)
        assert f"holds {kind}: only LoRA" in said
    (tmp_path / "adapter_config.json").write_text("{")
    assert "cannot read" in command("import", tmp_path, "--out", tmp_path / "f.safetensors", code=2)
    said = command("import", SMALL_AST, "--out", tmp_path / "f.safetensors", code=2)
    assert f"cannot read {SMALL_AST / 'adapter_config.json'} ([Errno 2] No such file" in said
    assert said.endswith("give a folder that peft's save_pretrained wrote\n")


def test_another_base_for_peft(tmp_path, command):
    """The head of the adapter has another width than random:tiny."""
    peft_lora(tmp_path / "peft")
    words = ["import", tmp_path / "peft", "--out", tmp_path / "fold.safetensors"]
    said = command(*words, "--weights", "random:tiny", code=2)
    assert "does not fit the method 'lora'" in said


def test_only_lora_goes_to_peft(tmp_path, export_to):
    for method in ("adapter_lora", "hydra"):
        save_random(tmp_path / "fold1.safetensors", method, "cls_dist")
        message = export_to("peft", "p", code=2)
        assert f"takes one of LoRA, DoRA, RsLoRA alone, not '{method}'" in message


# --------------------------------------------------------------------------------------------- ONNX


@pytest.mark.parametrize(
    "method",
    ["linear", "spt", "dpt", "prefix", "houlsby_mixed", "convpass_pfeiffer_seq",
     "convpass2d_pfeiffer_par", "hydra", "adapter_dpt_lora", "probe"],
)  # fmt: skip
def test_onnxruntime_runs_every_kind_of_method(method, tmp_path, export_to):
    pool = {"dpt": "cls_dist", "prefix": "cls"}.get(method, "mean")
    model = save_random(tmp_path / "fold1.safetensors", method, pool)
    said = export_to("onnx", "model.onnx")
    assert "waveforms (batch, samples) at 16 kHz to probabilities (batch, 4)" in said
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch, samples in ((1, 3), (4, 4_000), (2, 9_840), (1, 9_841), (3, 30_000)):
        wave = noise(samples, batch)
        with torch.no_grad():
            expected = model(data.to_input(data.fbank(wave), 60)).softmax(-1)
        (found,) = session.run(None, {"waveform": wave.numpy()})
        assert found.shape == (batch, 4) and np.abs(found - expected.numpy()).max() <= 1e-3
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == CLASSES
    assert json.loads(facts["front_end"])["sample_rate"] == 16_000


def test_features_as_a_convolution():
    """The graph's features against float64, where rounding shows most: tones, and an offset."""
    seconds = torch.arange(16_000) / 16_000
    tone = torch.sin(2 * torch.pi * 440 * seconds)
    waves = torch.stack([0.9 * tone, 0.5 + 0.001 * tone, torch.zeros(16_000), noise(16_000)[0]])
    seen = []

    class Model(torch.nn.Module):
        config = load_ast("random:tiny", n_frames=98, n_classes=2).config

        def forward(self, x):
            seen.append(x * 2 * data.STD + data.MEAN)
            return torch.zeros(len(x), 2)

    export.Listener(Model())(waves)
    power = data.spectrum(waves.double().unfold(-1, 400, 160)).abs().square()
    exact = (power @ data.mel_filters(torch.device("cpu")).double()).clamp_min(2**-23).log()
    graph = (seen[0] - exact).abs().amax((1, 2))
    ours = (data.fbank(waves) - exact).abs().amax((1, 2))
    assert graph[0] <= 1.5 * ours[0]  # of the tone, most bands hold nothing but rounding
    assert graph[1] <= 2e-3 and graph[2:].max() <= 1e-4


def test_a_wrong_graph_is_not_kept(tmp_path, monkeypatch):
    model = save_random(tmp_path / "fold1.safetensors", "lora")
    fbank = data.fbank
    monkeypatch.setattr(data, "fbank", lambda waves: fbank(waves) + 3)  # unknown to the graph
    with pytest.raises(RuntimeError, match="onnxruntime and torch differ by"):
        export.export_onnx(model, {}, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_without_onnx(missing, tmp_path, monkeypatch, export_to):
    save_random(tmp_path / "fold1.safetensors", "lora")
    monkeypatch.setitem(sys.modules, missing, None)
    message = export_to("onnx", "model.onnx", code=2)
    assert f"--to onnx needs {missing}: pip install onnx onnxruntime" in message


# --------------------------------------------------------------------------- show, the command line


def test_show_prints_what_the_file_is(train_main, tmp_path, command):
    train_main("--method", "lora", "--pool", "cls_dist")
    file = tmp_path / "runs/esc10/lora/seed0/fold1.safetensors"
    header = read_header(file)
    said = command("show", file)
    lines = {line[:12].strip(): line[12:] for line in said.splitlines()}
    assert lines.pop("file") == str(file)
    lines.pop("confidence", None)
    shown = {name: json.loads(text) for name, text in lines.items()}
    assert shown == {name: header[name] for name in header if name not in ("record", "calibration")}
    lora = {"part": "LoRA", "targets": "qv", "rr": 16, "alpha": 8}  # fitted to 64 dimensions
    rates = {name: header["settings"][name] for name in ("lr", "head_lr")}
    assert shown["method"] == {"name": "lora", **rates, "parts": [lora]}
    assert shown["classes"][:2] == ["sound 0", "sound 4"] and shown["n_classes"] == 10
    assert shown["backbone"]["name"] == str(SMALL_AST) and shown["n_frames"] == 100
    assert shown["backbone"]["sha256"] == load_ast(SMALL_AST, pool="cls_dist").backbone.sha256
    assert shown["versions"]["torch"] == torch.__version__ and shown["settings"]["seed"] == 0


def test_show_of_a_merged_model_and_of_a_bare_one(tmp_path, command, export_to):
    save_random(tmp_path / "fold1.safetensors", "hydra")
    export_to("merged", "merged.safetensors")
    assert '"hidden": 130' in command("show", tmp_path / "merged.safetensors")
    said = command("show", tmp_path / "fold1.safetensors")
    assert 'classes     ["rain", "sea, waves", "dog", "wind"]\n' in said
    assert "config" not in said and "result" not in said


def test_files_that_are_something_else(tmp_path, command):
    (tmp_path / "cut.safetensors").write_bytes(save_random_bytes(tmp_path)[:500])
    for words in (["show"], ["export", "--to", "onnx", "--out", tmp_path / "out.onnx"]):
        said = command(*words, tmp_path / "cut.safetensors", code=2)
        assert "no whole file of trained parts" in said
        assert "it has no such header" in command(*words, SMALL_AST / "model.safetensors", code=2)
        assert "no whole file" in command(*words, tmp_path / "absent", code=2)
        said = f"error: {tmp_path} is a folder: give one file of trained parts, foldK.safetensors\n"
        assert command(*words, tmp_path, code=2) == said


def save_random_bytes(tmp_path) -> bytes:
    save_random(tmp_path / "whole.safetensors", "lora")
    return (tmp_path / "whole.safetensors").read_bytes()


def test_a_header_of_another_method(tmp_path, command):
    """The tensors of an adapter under the name of another method."""
    save_random(tmp_path / "fold1.safetensors", "lora")
    header = read_header(tmp_path / "fold1.safetensors")
    header["method"] = to_dict(petl.METHODS["houlsby_par"])
    tensors = load_file(tmp_path / "fold1.safetensors")
    write_tensors(tmp_path / "mixed.safetensors", tensors, header)
    words = ["export", tmp_path / "mixed.safetensors", "--to", "onnx"]
    said = command(*words, "--out", tmp_path / "model.onnx", code=2)
    assert "does not fit the method 'houlsby_par'" in said


def test_the_wrong_backbone(tmp_path, export_to):
    save_random(tmp_path / "fold1.safetensors", "lora")
    message = export_to("merged", "out.safetensors", "--weights", "random:tiny", code=2)
    assert "was trained on the backbone" in message


def test_words_that_do_not_fit(tmp_path, command, export_to):
    save_random(tmp_path / "fold1.safetensors", "lora", "cls_dist")
    assert "invalid choice: 'tflite'" in export_to("tflite", "x", code=2)
    assert "--half goes with --to merged" in export_to("onnx", "x", "--half", code=2)
    assert "its name must end in .onnx" in export_to("onnx", "rain.wav", code=2)
    assert "--help shows all options" in command(code=2)
    (tmp_path / "file").touch()
    said = export_to("merged", "file/x.safetensors", code=2)
    assert said == f"error: {tmp_path / 'file'}: File exists\n"
    said = export_to("hf", "file", code=2)
    assert said == f"error: {tmp_path / 'file'}: Not a directory\n"
    (tmp_path / "folder.onnx").mkdir()
    said = export_to("onnx", "folder.onnx", code=2)
    assert said == f"error: {tmp_path / 'folder.onnx'}: is there and no file\n"
    for out in (tmp_path / "merged.bin", tmp_path / "fold2"):  # what no command could read again
        message = f"error: --out {out}: give the name of a file that ends in .safetensors\n"
        assert export_to("merged", out.name, code=2) == message and not out.exists()
        assert command("import", tmp_path, "--out", out, code=2) == message


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("to", "out", "message"), [
    ("merged", "fold1.safetensors", "is, or holds, what is read here"),
    ("merged", "link.safetensors", "is, or holds, what is read here"),
    ("merged", "fold2.safetensors", "would be a file of the run there"),
    ("merged", "fold3.safetensors", "would be a file of the run there"),  # which is not trained yet
    ("hf", ".", "is a folder with other files: give the name of a new folder"),
    ("peft", ".", "is a folder with other files: give the name of a new folder"),
    ("merged", "odd/model.safetensors", "is, or holds, what is read here"),
    ("hf", "odd", "is, or holds, what is read here"),
    ("peft", "odd", "is, or holds, what is read here"),
    ("hf", "other", "is a folder with other files: give the name of a new folder"),
    ("peft", "other", "is a folder with other files: give the name of a new folder"),
])  # fmt: skip
def test_no_export_writes_over_a_run_or_what_it_reads(
    to, out, message, tmp_path, odd_backbone, export_to
):
    """tmp_path is a run with two folds. Its backbone and a run without the fold lie in it."""
    trained(odd_backbone, "lora", tmp_path / "fold1.safetensors")
    trained(odd_backbone, "lora", tmp_path / "fold2.safetensors")
    (tmp_path / "config.json").write_text('{"dataset": "esc50"}')
    (tmp_path / "link.safetensors").symlink_to("fold1.safetensors")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"dataset": "esc50"}')
    (tmp_path / "other/fold1.safetensors").write_bytes(b"trained for a day")
    before = contents(tmp_path)
    assert message in export_to(to, out, code=2)
    assert contents(tmp_path) == before


def test_the_small_backbone_of_the_repository_is_not_written_over(tmp_path, monkeypatch, export_to):
    demo = tmp_path / "demo.safetensors"
    demo.write_bytes(load_weights.DEMO.read_bytes())
    monkeypatch.setattr(load_weights, "DEMO", demo)
    trained("demo", "lora", tmp_path / "fold1.safetensors")
    before = contents(tmp_path)
    assert "what is read here" in export_to("merged", "demo.safetensors", code=2)
    assert contents(tmp_path) == before


def test_an_import_writes_over_no_fold_and_nothing_that_it_reads(tmp_path, odd_backbone, command):
    peft_lora(tmp_path / "peft", odd_backbone)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text('{"dataset": "esc50"}')
    before = contents(tmp_path)
    for out, message in (
        ("peft/adapter_model.safetensors", "is, or holds, what is read here"),
        ("odd/model.safetensors", "is, or holds, what is read here"),
        ("run/fold1.safetensors", "would be a file of the run there"),
    ):
        assert message in command("import", tmp_path / "peft", "--out", tmp_path / out, code=2)
    assert contents(tmp_path) == before
    command("import", tmp_path / "peft", "--out", tmp_path / "run/imported.safetensors")
    command("import", tmp_path / "peft", "--out", tmp_path / "run/imported.safetensors")


@pytest.mark.parametrize("to", ["hf", "peft"])
def test_an_export_over_an_earlier_one_appears_whole_or_not_at_all(
    to, tmp_path, monkeypatch, export_to
):
    """The second export writes its configs, and then the disk is full."""
    model = petl.apply(load_ast("random:tiny", 60, 4, "cls_dist"), "lora")
    save_trained(model, tmp_path / "fold1.safetensors", {"classes": CLASSES})
    export_to(to, "out")
    before = contents(tmp_path / "out")
    save_random(tmp_path / "fold1.safetensors", "lora", "cls_dist")  # of another backbone
    write = Path.write_bytes
    written = []

    def write_but_no_tensors(path, content):
        written.append(path.name)
        if ".safetensors" in path.name:
            raise OSError(28, "No space left on device")
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_but_no_tensors)
        assert "the disk is full" in export_to(to, "out", code=2)
    assert "config.json" in " ".join(written)
    assert contents(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fold1.safetensors", "out"]

    export_to(to, "out")
    export_to(to, "fresh")
    after = {path.relative_to(tmp_path / "out") for path in contents(tmp_path / "out")}
    assert after == {path.relative_to(tmp_path / "fresh") for path in contents(tmp_path / "fresh")}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["hidden_size"] == 64


def test_an_export_into_an_empty_folder_and_into_the_present_one(tmp_path, monkeypatch, command):
    save_random(tmp_path / "fold1.safetensors", "lora", "cls_dist")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for out in (tmp_path / "empty", tmp_path / "empty", "."):
        command("export", tmp_path / "fold1.safetensors", "--to", "hf", "--out", out)
        monkeypatch.chdir(tmp_path / "empty")
        assert load_ast(tmp_path / "empty").config.n_frames == 60


# ------------------------------------------------------------------ lines and numbers typed by hand

SHA256 = "afdbe74769c46f9cafa50e9c2ccaed1d14ca1df42b25d1c1a9bdb5c91017a261"  # of the small AST
N_FRAMES = 60  # of the models here: windows of 0.6 s, 59 * 160 + 400 samples


HEADER = {
    "classes": ["r\u00e9n", "dog\x1b"],  # printed as it is, and not sent to the terminal
    "parameters": {"petl": 1234, "head": 258, "total": 98765},
    "result": {
        "fold": 3,
        "accuracy": 81.256,
        "validation_accuracy": 90.5,
        "epoch": 7,
        "seconds": 2.0,
        "peak_memory_mb": 5,
    },
    "settings": SETTINGS,
    "versions": {"python": "3.11.7", "torch": "2.0"},
}


def test_show_line_by_line(tmp_path, command):
    file = tmp_path / "fold3.safetensors"
    save_trained(petl.apply(load_ast(SMALL_AST, N_FRAMES, 2), "adapter_lora"), file, HEADER)
    lines = [
        f"file        {file}",
        'classes     ["r\u00e9n", "dog\\u001b"]',
        'parameters  {"petl": 1234, "head": 258, "total": 98765}',
        'result      {"fold": 3, "accuracy": 81.256, "validation_accuracy": 90.5, "epoch": 7, '
        '"seconds": 2.0, "peak_memory_mb": 5}',
        f"settings    {json.dumps(SETTINGS)}",
        'versions    {"python": "3.11.7", "torch": "2.0"}',
        'method      {"name": "adapter_lora", "lr": 0.005, "parts": [{"part": "Adapter", "at": '
        '"ffn", "how": "par_before", "rr": 64}, {"part": "LoRA", "targets": "qv", "rr": 128, '
        '"alpha": 8}]}',
        "n_frames    60",
        "n_classes   2",
        'pool        "mean"',
        'front_end   {"sample_rate": 16000, "window": 400, "hop": 160, "n_fft": 512, "n_mels": '
        '128, "mean": -4.2677393, "std": 4.5689974}',
        f'backbone    {{"name": "{SMALL_AST}", "sha256": "{SHA256}"}}',
    ]
    assert command("show", file).splitlines() == lines


def test_show_of_a_file_that_says_little(tmp_path, command):
    """Without names and results, of a method without parts; and a whole model."""
    file = tmp_path / "fold1.safetensors"
    save_trained(petl.apply(load_ast(SMALL_AST, N_FRAMES, 2), "linear"), file, {})
    lines = command("show", file).splitlines()
    assert lines[1] == 'method      {"name": "linear", "lr": 0.001, "parts": []}'
    assert len(lines) == 7
    save_ast(load_ast(SMALL_AST, N_FRAMES, 2), tmp_path / "whole.safetensors", {})
    lines = command("show", tmp_path / "whole.safetensors").splitlines()
    assert lines[1].startswith('config      {"n_frames": 60, ') and len(lines) == 2


@pytest.fixture
def odd_backbone(tmp_path) -> Path:
    """The small AST with four heads, an eps that matters, and an odd number of frames."""
    folder = tmp_path / "odd"
    folder.mkdir()
    config = json.loads((SMALL_AST / "config.json").read_text())
    config |= {"num_attention_heads": 4, "layer_norm_eps": 0.25, "max_length": 105}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((SMALL_AST / "model.safetensors").read_bytes())
    return folder


def trained(backbone: Path | str, method: str, file: Path, n_frames=67, pool="cls_dist", **header):
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
    "problem_type": "single_label_classification",
    "id2label": {0: "rain", 1: "dog"},
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
def test_folders_for_the_libraries_say_what_the_model_is(to, tmp_path, odd_backbone, export_to):
    trained(odd_backbone, "lora", tmp_path / "fold1.safetensors")
    export_to(to, "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    assert {name: config[name] for name in CONFIG} == CONFIG
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "out").to_dict()
    assert {name: extractor[name] for name in EXTRACTOR} == EXTRACTOR


RESULT = {
    "fold": 1, "accuracy": 1.5, "validation_accuracy": None, "epoch": 2, "seconds": 2.0,
    "peak_memory_mb": None,
}  # fmt: skip


@pytest.mark.parametrize("method", ["lora_qkvo", "hydra", "bitfit", "linear", "full_ft"])
def test_every_way_out_and_back_gives_the_same_logits(method, tmp_path, odd_backbone, export_to):
    """merged and hf, read by `load_ast`; eps, heads and length are nobody's default."""
    model = trained(odd_backbone, method, tmp_path / "fold1.safetensors", result=RESULT)
    export_to("merged", "merged.safetensors")
    export_to("hf", "hf")
    x = torch.randn(2, 67, 128)
    for file in ("merged.safetensors", "hf"):
        again = load_ast(tmp_path / file, pool="cls_dist").eval()
        assert (again.config.eps, again.config.heads, again.config.n_frames) == (0.25, 4, 67)
        with torch.no_grad():
            torch.testing.assert_close(again(x), model(x), rtol=0, atol=2e-5)
    header = read_header(tmp_path / "merged.safetensors")
    assert header["classes"] == ["rain", "dog"] and header["result"] == RESULT
    assert header["method"]["name"] == method and header["backbone"]["name"] == str(odd_backbone)


def test_what_goes_into_the_folder_for_peft(tmp_path, odd_backbone, export_to):
    """Rank, scale and targets; the LoRA under peft's names, and what was trained beside it."""
    method = petl.Method("lora", (petl.LoRA("qo", 32, 12),), "-", "-")  # rank 2, scale 12 / 32
    model = trained(odd_backbone, method, tmp_path / "fold1.safetensors")
    export_to("peft", "out")
    config = peft.PeftConfig.from_pretrained(tmp_path / "out")
    assert (config.peft_type, config.r, config.lora_alpha) == ("LORA", 2, 0.75)
    assert (config.lora_dropout, config.bias) == (0.0, "none")
    assert config.target_modules == {"q_proj", "o_proj"}
    assert config.base_model_name_or_path == str(odd_backbone)
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


@pytest.mark.parametrize("rank", [4, 23])  # a divisor of 64, and none
def test_a_lora_of_peft_written_by_hand(tmp_path, odd_backbone, command, rank):
    """s = lora_alpha / r on one projection of one block; the rest stays that of the backbone."""
    torch.manual_seed(0)
    folder = tmp_path / "peft"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 1.5 * rank}
    config["base_model_name_or_path"] = str(odd_backbone)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    a = torch.randn(rank, 64)
    b = 0.1 * torch.randn(64, rank)
    name = f"base_model.model.{AST}.layers.1.attention.v_proj"
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors")
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
    unfinished = tmp_path / ".out.unfinished"
    for to, where in (
        ("merged", out / "model.safetensors"),
        ("hf", unfinished),
        ("peft", unfinished),
    ):
        words = ["export", tmp_path / "fold1.safetensors", "--to", to, "--out"]
        words.append(where if to == "merged" else out)
        assert export.main([str(word) for word in words]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: the disk is full ({where}")
        assert error.endswith("): free some space\n")
    assert not unfinished.exists()
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    assert (out / "model.safetensors").read_bytes() == b"old"


def test_an_onnx_file_explains_itself(tmp_path, export_to):
    """What goes in and comes out, and as metadata all that a program needs to know."""
    fold = tmp_path / "fold1.safetensors"
    constant(fold, 0.125, 0.875, classes=["rain", "dog"], n_frames=31)
    assert "Of a longer sound it reads the first 0.31 s." in export_to("onnx", "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (heard,) = session.get_inputs()
    (said,) = session.get_outputs()
    assert (heard.name, heard.shape) == ("waveform", ["batch", "samples"])
    assert heard.type == "tensor(float)"
    assert (said.name, said.shape) == ("probabilities", ["batch", 2])
    texts = session.get_modelmeta().custom_metadata_map
    facts = {name: json.loads(texts[name]) for name in texts}
    assert facts == {
        "classes": ["rain", "dog"],
        "n_frames": 31,
        "front_end": {
            "sample_rate": 16000, "window": 400, "hop": 160, "n_fft": 512, "n_mels": 128,
            "mean": -4.2677393, "std": 4.5689974,
        },
    }  # fmt: skip
    (found,) = session.run(None, {"waveform": np.zeros((3, 4000), np.float32)})
    np.testing.assert_allclose(found, [[0.125, 0.875]] * 3, atol=1e-6)
    assert [path.name for path in tmp_path.glob("*onnx*")] == ["model.onnx"]


def test_an_onnx_file_answers_as_tools_predict_does(tmp_path, export_to):
    """With a temperature, and with the first frames of a sound that is longer."""
    fold = tmp_path / "fold1.safetensors"
    model = save_random(fold, "lora", n_frames=31)
    zeros = [0.0] * 128
    known = {"mean": zeros, "std": [1.0] * 128, "directions": [[0] * 128], "alpha": 0.0}
    facts = {"temperature": 3.0, "min_confidence": 0.0, **known, "limit": 1.0, "slope": 1.0}
    save_trained(model, fold, {"calibration": facts})
    export_to("onnx", "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    wave = noise(30 * 160 + 400)[0].numpy()
    expected = predict.load(fold)(wave, 16_000)
    longer = np.concatenate([wave, wave])[None]
    for waves in (wave[None], longer):
        (found,) = session.run(None, {"waveform": waves})
        np.testing.assert_allclose(found[0], expected.probabilities, atol=1e-5)


def test_an_onnx_file_hears_the_last_frame(tmp_path, export_to):
    """Sounds that end where a frame ends, or one sample before."""
    model = save_random(tmp_path / "fold1.safetensors", "linear", n_frames=31)
    export_to("onnx", "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for samples in (399, 400, 559, 560, 720, 30 * 160 + 399, 30 * 160 + 400):
        waves = 0.1 * torch.randn(2, samples, generator=torch.Generator().manual_seed(samples))
        with torch.no_grad():
            expected = model(data.to_input(data.fbank(waves), 31)).softmax(-1)
        (found,) = session.run(None, {"waveform": waves.numpy()})
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(("program", "code"), [("predict", 1), ("export", 2)])
def test_exit_codes_reach_the_shell(program, code, tmp_path):
    """As programs of their own, with a sound or a file of trained parts that is not there."""
    absent = str(tmp_path / "absent.wav")
    fold = constant(tmp_path / "fold1.safetensors", 0.5, 0.5)
    words = [str(fold), absent] if program == "predict" else ["show", absent]
    command = [sys.executable, "-m", f"tools.{program}", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and done.stdout == ""
    assert done.stderr.startswith(f"error: {absent}") and done.stderr.count("\n") == 1
