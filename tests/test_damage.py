"""What others wrote, and what is damaged: it opens as it should, or one line says which file and
what is wrong."""

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import SMALL_AST, make_folder, save_random, train_on, write_sound
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import petl
import train
from ast_model import POOL
from data import load_dataset
from load_weights import from_dict, load_ast, load_trained, save_ast, to_dict
from sounds.audio import read_audio
from sounds.fetch import unpack
from support import headers
from support.checkpoints import read_header, read_json, read_tensors, sha256_of, write_tensors
from support.command import UserError, positive
from support.processes import join
from support.recorder import protected
from support.records import Progress, read_progress, read_run, save_progress
from tools import export, predict, report
from tools.merge import merge
from tools.predict import class_names, load

ROOT = Path(train.__file__).parent
few = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
RESULT = {
    "fold": 1,
    "accuracy": 50.0,
    "validation_accuracy": None,
    "epoch": 2,
    "seconds": 1.5,
    "peak_memory_mb": None,
}
COUNTS = {"petl": 5, "head": 5, "total": 100}
DEEP = "[" * 100_000 + "]" * 100_000
odd = st.one_of(
    st.sampled_from(
        [None, True, "", "x", [], {}, [1], {"a": 1}, 0, -1, 0.5, 10**9, 10**30, 1e300, -1e-9, "\0"]
    ),
    st.sampled_from([float("nan"), float("inf"), "x" * 10_000, [[[[]]]], {"0": 0}]),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
)


def places(content, path=()):
    """Where a table of JSON has values, tables among them."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def changed(content: dict, place: tuple, value=..., remove=False) -> dict:
    content = copy.deepcopy(content)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    if remove:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return content


def metadata_of(file) -> dict:
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["ast_petl"])


def without_digest(header: dict) -> dict:
    return {name: value for name, value in header.items() if name != "digest"}


def with_header(file, header, out):
    """The same tensors under another header, with the digest of both: as somebody else may write
    it."""
    if isinstance(header, str):
        save_file(load_file(file), out, {"ast_petl": header})
    else:
        write_tensors(out, load_file(file), without_digest(header))
    return out


def says(action, *words) -> bool:
    """Whether `action` is refused, which one line must say with all of `words`; nothing else may be
    raised."""
    start = time.perf_counter()
    try:
        action()
    except UserError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 1000, message
        assert all(str(word) in message for word in words), (message, words)
        refused = True
    else:
        refused = False
    assert time.perf_counter() - start < 5
    return refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    record = {
        "history": [{"fold": 1, "epoch": 1, "loss": 0.5, "accuracy": ""}],
        "predictions": [0, 3],
        "millionths": [10**6, 300_000],
    }
    more = {
        "result": RESULT,
        "parameters": COUNTS,
        "versions": {"torch": "2"},
        "record": record,
        "calibration": {
            "temperature": 0.9,
            "min_confidence": 0.3,
            "mean": [0.5] * 128,
            "std": [1.0] * 128,
            "directions": [[125] * 128],
            "alpha": 1.0,
            "limit": 2.0,
            "slope": 1.0,
        },
    }
    for method in ("lora", "houlsby_par", "dpt"):
        save_random(folder / f"{method}.safetensors", method, pool="cls_dist", **more)
    model = load_trained(folder / "lora.safetensors")
    save_ast(merge(model), folder / "whole.safetensors", {"classes": ["a", "b", "c", "d"]})
    return folder


# ----------------------------------------------------------------------------- headers and settings


@few
@given(data=st.data())
@pytest.mark.parametrize("name", ["lora", "houlsby_par", "dpt", "whole"])
def test_a_header_of_other_kinds(folder, tmp_path, name, data):
    """Every key that is read may be missing or hold anything: the model is the same, or its file
    and key are named."""
    file = folder / f"{name}.safetensors"
    header = metadata_of(file)
    place = data.draw(st.sampled_from(sorted(places(header), key=str)))
    remove = data.draw(st.booleans()) if isinstance(place[-1], str) else False
    value = None if remove else data.draw(odd)
    new = with_header(file, changed(header, place, value, remove), tmp_path / "new.safetensors")
    named = {
        "result",
        "parameters",
        "versions",
        "classes",
        "n_classes",
        "n_frames",
        "backbone",
        "method",
        "config",
        "record",
        "calibration",
    }
    if not says(lambda: load(new), *([new] if place[0] in named else [])):
        classifier = load(new)
        assert len(classifier.classes) == classifier.models[0].config.n_classes
        model = classifier.models[0]
        assert model(torch.zeros(1, model.config.n_frames, 128)).isfinite().all()
    says(lambda: export.show(new))


@pytest.mark.parametrize(
    ("name", "place", "value", "expected"),
    [
        ("lora", ("n_frames",), 15, "n_frames: Expected int >= 16"),
        ("lora", ("n_classes",), 10**9, "n_classes: Expected int <="),
        ("lora", ("backbone", "sha256"), 7, "backbone.sha256: Expected str, got int"),
        ("lora", ("classes",), ["a"], "classes: Expected 4 names"),
        ("lora", ("method", "parts", 0, "rr"), 0, "rr: Expected float >= 0.5"),
        ("lora", ("method", "parts", 0, "targets"), "qx", "targets"),
        ("lora", ("result", "accuracy"), float("nan"), "result.accuracy: Expected float >= -1e+30"),
        (
            "lora",
            ("classes",),
            ["a", "b", "c", "a"],
            "classes: Expected 4 names, each of them once",
        ),
        ("lora", ("record", "millionths", 0), 10**6 + 1, "record.millionths[0]: Expected int <="),
        ("lora", ("record", "history", 0), {}, "record.history[0]: Object missing required field"),
        ("lora", ("record", "history", 0, "loss"), "x", "record.history[0].loss: Expected float"),
        ("lora", ("record", "predictions", 0), 4, "record.predictions: Expected numbers below 4"),
        (
            "lora",
            ("calibration", "temperature"),
            0,
            "calibration.temperature: Expected float > 0",
        ),
        (
            "lora",
            ("calibration", "directions", 0),
            [1] * 127,
            "calibration: Expected rows of 128 numbers",
        ),
        (
            "lora",
            ("calibration", "std"),
            [1.0],
            "calibration: Expected rows of 128 numbers",
        ),
        ("lora", ("calibration", "mean", 3), float("inf"), "calibration.mean[3]"),
        ("lora", ("calibration", "std", 3), 0.0, "calibration.std[3]"),
        ("lora", ("calibration", "directions", 0, 7), 1001, "calibration.directions[0][7]"),
        ("lora", ("calibration", "slope"), 0, "calibration.slope: Expected float >= 1e-09"),
        ("dpt", ("method", "parts", 0, "prompts"), 10**9, "prompts: Expected int <= 65536"),
        ("houlsby_par", ("method", "parts", 0, "how"), "none", "no adapter 'attn', 'none'"),
        ("houlsby_par", ("method", "parts", 0, "how"), [], "the part 'Adapter'"),
        ("houlsby_par", ("method", "blocks"), [1], "method.blocks: Expected array of length 2"),
        ("lora", ("backbone", "later"), 1, "backbone: Object contains unknown field later"),
        ("whole", ("config", "depth"), 10**9, "config.depth: Expected int <="),
        ("whole", ("config", "depth"), 3, "config.depth: Expected 2"),
        ("whole", ("config", "n_classes"), 3, "classes: Expected 3 names"),
        ("whole", ("config", "n_mels"), 130, "config.n_mels: Invalid enum value 130"),
        ("whole", ("config", "pool"), "max", "config.pool: Invalid enum value 'max'"),
        ("whole", ("config", "later"), 1, "config: Object contains unknown field later"),
    ],
)
def test_the_message_names_the_key(folder, tmp_path, name, place, value, expected):
    file = folder / f"{name}.safetensors"
    new = with_header(file, changed(metadata_of(file), place, value), tmp_path / "new.safetensors")
    assert says(lambda: load_trained(new), new, expected)
    says(lambda: export.show(new))


@pytest.mark.parametrize(
    "text", ["[]", "7", "null", '"x"', "{", '{"config": ' + DEEP + "}", DEEP, '{"n_frames": NaN}']
)
def test_a_header_that_is_no_table(folder, tmp_path, text):
    new = with_header(folder / "lora.safetensors", text, tmp_path / "new.safetensors")
    assert says(lambda: load_trained(new), new)
    assert says(lambda: load_ast(new), new)


def test_unknown_keys_are_ignored(folder, tmp_path):
    for name in ("lora", "whole"):
        file = folder / f"{name}.safetensors"
        header = {**metadata_of(file), "later": [{"a": None}]}
        header.pop("front_end", None)
        if name == "lora":
            header["method"]["later"] = 1
        new = load_trained(with_header(file, header, tmp_path / "new.safetensors"))
        assert all(
            torch.equal(a, b)
            for a, b in zip(new.parameters(), load_trained(file).parameters(), strict=True)
        )


def test_an_unknown_field_of_a_part_is_refused(folder, tmp_path):
    """It would change what is computed."""
    file = folder / "lora.safetensors"
    header = metadata_of(file)
    header["method"]["parts"][0]["later"] = 1
    new = with_header(file, header, tmp_path / "new.safetensors")
    assert says(lambda: load_trained(new), new, "unexpected keyword argument 'later'")


def test_every_method_and_pool_is_as_declared():
    assert set(headers.Pool.__args__) == set(POOL)
    for method in petl.METHODS.values():
        assert from_dict(json.loads(json.dumps(to_dict(method)))).parts == method.parts


HF = json.loads((SMALL_AST / "config.json").read_text())
READ = [
    name
    for name in HF
    if name in {field.name for field in headers.msgspec.structs.fields(headers.HuggingFace)}
]


@few
@given(name=st.sampled_from(READ), value=odd)
def test_a_config_of_transformers(tmp_path, name, value):
    (tmp_path / "model.safetensors").write_bytes((SMALL_AST / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**HF, name: value}))
    if not says(lambda: load_ast(tmp_path, pool="cls_dist"), tmp_path):
        assert load_ast(tmp_path, pool="cls_dist").config.n_classes == 5
    if not says(lambda: class_names(str(tmp_path), 5), tmp_path):
        assert len(class_names(str(tmp_path), 5)) == 5


@pytest.mark.parametrize("text", ["[]", DEEP, '{"model_type": ' + DEEP + "}", "", "\xff", "nan"])
def test_a_config_that_is_no_table(tmp_path, text):
    (tmp_path / "model.safetensors").write_bytes((SMALL_AST / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert says(lambda: load_ast(tmp_path, pool="cls_dist"), "config.json")


@few
@given(data=st.data())
def test_an_adapter_of_peft(folder, tmp_path_factory, data):
    peft = folder / "peft"
    if not peft.exists():
        assert (
            export.main(
                ["export", str(folder / "lora.safetensors"), "--to", "peft", "--out", str(peft)]
            )
            == 0
        )
    file = peft / "adapter_config.json"
    written = json.loads(
        (file if not (peft / "kept.json").exists() else peft / "kept.json").read_text()
    )
    (peft / "kept.json").write_text(json.dumps(written))
    name = data.draw(st.sampled_from(sorted(written)))
    value = data.draw(odd | st.just(...))
    file.write_text(
        json.dumps({key: v for key, v in {**written, name: value}.items() if v is not ...})
    )
    out = tmp_path_factory.mktemp("out") / "fold1.safetensors"
    if not says(lambda: export.import_peft(peft, out, str(SMALL_AST))):
        assert load_trained(out).method.name == "lora"


CONFIG = {
    "dataset": "esc10",
    "weights": "demo",
    "method": {"name": "linear", "lr": 0.1, "parts": []},
    "backbone": "0" * 64,
    "pool": "mean",
    "seed": 0,
    "shots": None,
    "clips": "0" * 64,
    "n_frames": 50,
    "epochs": 2,
    "batch_size": 32,
    "lr": 0.01,
    "head_lr": 0.01,
    "mask_frames": 0,
    "dtype": "float32",
    "keep": None,
    "balance": False,
    "choose_by": "accuracy",
    "data_dir": None,
    "cache_dir": "/c",
    "group": None,
    "windows": None,
    "background": True,
}


@few
@given(data=st.data())
def test_what_a_run_says_of_itself(tmp_path, data):
    place = data.draw(st.sampled_from(sorted(places(CONFIG), key=str)))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(changed(CONFIG, place, data.draw(odd))))
    says(lambda: read_json(file, headers.RunConfig), file)
    file.write_text(json.dumps({**CONFIG, "later": 1}))
    assert not says(lambda: read_json(file, headers.RunConfig))


def test_headers_are_read_as_they_were_written(folder):
    for file in folder.glob("*.safetensors"):
        assert read_header(file) == without_digest(metadata_of(file))


def test_a_file_without_a_digest_is_refused(folder, tmp_path):
    for name in ("lora", "whole"):
        file = folder / f"{name}.safetensors"
        new = with_header(
            file, json.dumps(without_digest(metadata_of(file))), tmp_path / "new.safetensors"
        )
        assert says(lambda new=new: load_trained(new), new, "it is damaged")


# ------------------------------------------------------------------------------------------ tensors

STATE = load_file(SMALL_AST / "model.safetensors")
BLOCK = "audio_spectrogram_transformer.encoder.layer.1"
WEIGHT = f"{BLOCK}.attention.attention.query.weight"
SPOILT = {
    "not a number": lambda t: t.index_put(
        (torch.zeros(t.dim(), 1, dtype=torch.long).unbind()), torch.tensor(torch.nan)
    ),
    "infinite": lambda t: t / 0,
    "scalar": lambda t: t.sum(),
    "empty": lambda t: t[:0],
    "a dimension more": lambda t: t[None],
    "flat": lambda t: t.flatten(),
    "twice": lambda t: torch.cat([t, t]),
}
ONLY_PICKLED = {
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1)),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "complex": lambda t: t.to(torch.complex64),
    "larger than its storage": lambda t: torch.ones(1).expand(10**13),
    "8 bits": lambda t: t.to(torch.float8_e4m3fn),
}


def spoil(tensor, how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these kinds are to disappear from torch
        spoilt = {**SPOILT, **ONLY_PICKLED}[how](tensor)
    assume(how != "flat" or tensor.dim() > 1)
    return spoilt


@few
@given(name=st.sampled_from(sorted(STATE)), how=st.sampled_from([*SPOILT, *ONLY_PICKLED]))
def test_a_spoilt_tensor_in_a_backbone(tmp_path, name, how):
    (tmp_path / "config.json").write_text(json.dumps(HF))
    state = {**STATE, name: spoil(STATE[name], how)}
    torch.save(state, tmp_path / "model.bin")
    assert says(lambda: load_ast(tmp_path / "model.bin", pool="cls_dist"), "model.bin")
    if how in SPOILT:
        save_file(
            {name: tensor.contiguous() for name, tensor in state.items()},
            tmp_path / "other.safetensors",
        )
        assert says(
            lambda: load_ast(tmp_path / "other.safetensors", pool="cls_dist"), "other.safetensors"
        )


@pytest.mark.parametrize("number", ["x", "1000000", "-1", "1.5", "9" * 5000, "", "²"])
def test_layers_of_odd_numbers(tmp_path, number):
    (tmp_path / "config.json").write_text(json.dumps(HF))
    state = {
        name.replace(".layer.1.", f".layer.{number}."): tensor for name, tensor in STATE.items()
    }
    save_file(state, tmp_path / "model.safetensors")
    assert says(lambda: load_ast(tmp_path, pool="cls_dist"))


@few
@given(data=st.data(), how=st.sampled_from(sorted(SPOILT)))
@pytest.mark.parametrize("name", ["lora", "dpt", "whole"])
def test_a_spoilt_tensor_in_a_file_of_ours(folder, tmp_path, name, data, how):
    file, new = folder / f"{name}.safetensors", tmp_path / "new.safetensors"
    tensors = load_file(file)
    spoilt = data.draw(st.sampled_from(sorted(tensors)))
    tensors[spoilt] = spoil(tensors[spoilt], how).contiguous()
    write_tensors(new, tensors, without_digest(metadata_of(file)))
    assert says(lambda: load_trained(new), new)


@few
@given(data=st.data())
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_bytes_of_any_kind_as_weights(tmp_path, suffix, data):
    file = tmp_path / f"model{suffix}"
    start = data.draw(
        st.sampled_from(
            [b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x02}q\x00", b"root:x:0:0:root:/root:/bin/sh\n"]
        )
    )
    file.write_bytes(start + data.draw(st.binary(max_size=200)))
    assert says(lambda: load_ast(file), file)


# ------------------------------------------------------------------------------------------- damage


def flipped(content: bytes, bit: int) -> bytes:
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


@few
@given(data=st.data())
@pytest.mark.parametrize("name", ["lora", "dpt", "whole"])
def test_a_flipped_bit_is_never_used(folder, tmp_path, name, data):
    content = (folder / f"{name}.safetensors").read_bytes()
    new = tmp_path / "new.safetensors"
    new.write_bytes(flipped(content, data.draw(st.integers(0, 8 * len(content) - 1))))
    if not says(lambda: load(new), new):  # where nobody reads: nothing is changed
        assert read_header(new).items() >= read_header(folder / f"{name}.safetensors").items()
        assert sha256_of(load_file(new)) == sha256_of(load_file(folder / f"{name}.safetensors"))


@few
@given(data=st.data())
def test_a_cut_file_is_never_used(folder, tmp_path, data):
    content = (folder / "lora.safetensors").read_bytes()
    (tmp_path / "new.safetensors").write_bytes(
        content[: data.draw(st.integers(0, len(content) - 1))]
    )
    assert says(lambda: load_trained(tmp_path / "new.safetensors"), "new.safetensors")


SETTINGS = train.Settings(**{field.name: CONFIG[field.name] for field in fields(train.Settings)})


def progress_file(path) -> bytes:
    tensors = {"head.weight": torch.arange(200.0)}
    row = {
        "fold": 1,
        "epoch": 1,
        "step": 1,
        "loss": 1.0,
        "accuracy": 50.0,
        "lr": "0.1",
        "clips/s": 8.0,
    }
    best = {
        "accuracy": 50.0,
        "score": 50.0,
        "epoch": 1,
        "tensors": tensors,
        "validation": (torch.ones(3, 4), torch.zeros(3)),
    }
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(100))], betas=(0.9, 0.98))
    state = {"tensors": tensors, "optimizer": optimizer.state_dict(), "scaler": {}, "best": best}
    state["epoch"] = 1
    save_progress(path, Progress(1, [row]), SETTINGS, state)
    return path.read_bytes()


@few
@given(data=st.data())
def test_a_damaged_state_is_never_resumed(tmp_path, data):
    file = tmp_path / "fold1.resume.pt"
    content = progress_file(file)
    progress, state = read_progress(file, 1, SETTINGS, resume=True)
    assert len(progress.history) == 1 and state.keys() >= {
        "tensors",
        "optimizer",
        "scaler",
        "best",
        "epoch",
    }
    cut = data.draw(st.booleans())
    at = data.draw(st.integers(0, 8 * len(content) - 1))
    file.write_bytes(content[: at // 8] if cut else flipped(content, at))
    if not says(
        lambda: read_progress(file, 1, SETTINGS, resume=True),
        "fold1.resume.pt is damaged: delete it",
    ):
        new, read = read_progress(file, 1, SETTINGS, resume=True)
        assert sha256_of([read, new.history]) == sha256_of([state, progress.history])


@pytest.mark.parametrize("content", [{}, [], torch.ones(3), {"digest": "0" * 64}, 7])
def test_what_is_no_state_is_never_resumed(tmp_path, content):
    torch.save(content, tmp_path / "fold1.resume.pt")

    def read():
        read_progress(tmp_path / "fold1.resume.pt", 1, SETTINGS, resume=True)

    assert says(read, "fold1.resume.pt is damaged: delete it")


@pytest.fixture(scope="module")
def run(esc50_dir, cache_dir, tmp_path_factory):
    """A finished run with two folds."""
    out = tmp_path_factory.mktemp("runs")
    words = [
        "--dataset",
        "esc10",
        "--data-dir",
        esc50_dir,
        "--weights",
        SMALL_AST,
        "--epochs",
        1,
        "--folds",
        "1,2",
        "--seconds",
        0.5,
        "--method",
        "linear",
        "--cache-dir",
        cache_dir,
        "--out",
        out,
    ]
    assert train.main([str(word) for word in words]) == 0
    return out / "esc10" / "linear" / "seed0"


@few
@given(
    data=st.data(), name=st.sampled_from(["split.csv", "fold1.safetensors", "fold2.safetensors"])
)
def test_what_a_run_left_is_never_used_damaged(run, tmp_path, data, name):
    """A bit that is flipped or an end that is missing: refused, naming a file."""
    folder = shutil.copytree(run, tmp_path / "copy", dirs_exist_ok=True)
    content = (run / name).read_bytes()
    at = data.draw(st.integers(0, 8 * len(content) - 1))
    (folder / name).write_bytes(
        content[: at // 8] if data.draw(st.booleans()) else flipped(content, at)
    )
    if not says(lambda: read_run(folder), folder):
        new, old = read_run(folder), read_run(run)
        assert (new.config, new.split, new.folds) == (old.config, old.split, old.folds)


# --------------------------------------------------------------- numbers, streams, places, archives


def ends(call, *words, code=2):
    """`call` is a main that returns `code` after one line with all of `words`."""

    def check(capsys):
        assert call() == code
        error = capsys.readouterr().err
        assert (
            error.startswith("error: ")
            and error.count("\n") == 1
            and all(word in error for word in words)
        ), error
        assert len(error) < 1500

    return check


@pytest.mark.parametrize(
    "words",
    [
        "--batch-size 99999999999999999999",
        "--epochs 0",
        "--shots -1",
        "--folds " + "1" * 50,
        "--seed " + "9" * 50,
        "--method dpt --prompts 1000000000",
        "--method lora --rr 1000000000",
        "--method lora --alpha 1e300",
        "--lr 1.5",
        "--lr nan",
        "--seconds nan",
        "--micro-batch 1" + "0" * 50,
    ],
)
def test_numbers_on_the_command_line(words, capsys, tmp_path):
    words = f"{words} --data-dir {tmp_path} --dataset folder --cache-dir {tmp_path}".split()
    ends(lambda: train.main(words), words[0 if "--method" not in words else 2])(capsys)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "0"},
        {"RANK": "x", "WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "29500"},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"},
    ],
)
def test_an_environment_of_torchrun_set_by_half(environment, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert says(lambda: join(torch.device("cpu")), "start by torchrun")


def test_a_pipe_is_no_sound_and_no_checkpoint(folder, tmp_path, capsys):
    os.mkfifo(tmp_path / "x.wav")
    with pytest.raises(ValueError, match="is no file"):
        read_audio(tmp_path / "x.wav")
    with pytest.raises(ValueError, match="null byte"):
        read_audio(Path(f"{tmp_path}/a\0.wav"))
    assert says(lambda: load(tmp_path / "x.wav", None), "it is no file")
    assert says(lambda: load_ast(tmp_path / "x.wav"), "no weights at")
    (tmp_path / "y.wav").mkdir()
    ends(
        lambda: predict.main([str(folder / "lora.safetensors"), str(tmp_path / "y.wav")]),
        "holds no sounds",
    )(capsys)


def test_no_pipe_is_waited_for(tmp_path):
    """In the place of a file of a run, of weights, of a table or of a label track."""

    def too_long(*_):
        raise TimeoutError("it waits for the pipe")

    pipe = tmp_path / "a.txt"
    os.mkfifo(pipe)
    write_sound(tmp_path / "a.wav")
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)
    try:
        assert says(lambda: read_json(pipe, headers.RunConfig), pipe, "is no file")
        assert says(lambda: read_progress(pipe, 1, SETTINGS, resume=True), pipe, "is damaged")
        for name in ("x.safetensors", "x.bin"):
            os.mkfifo(tmp_path / name)
            assert says(lambda name=name: read_tensors(tmp_path / name), name, "is no file")
        for dataset, place in (("csv", pipe), ("csv", tmp_path), ("gsc", tmp_path / "gsc")):
            for name in ("validation_list.txt", "testing_list.txt"):
                (tmp_path / "gsc").mkdir(exist_ok=True)
                if not (tmp_path / "gsc" / name).exists():
                    os.mkfifo(tmp_path / "gsc" / name)
            with pytest.raises(OSError, match="is no file"):
                load_dataset(dataset, place, tmp_path)
    finally:
        signal.alarm(0)


def test_no_name_commands_the_terminal(tmp_path, capsys):
    """Folders, classes and files whose names would set the title, move the cursor, turn the line.

    Whether they were heard, refused, reported or shown.
    """
    evil = "\x1b]0;title\x07\x9b2A\n\u202e\r"
    sounds = make_folder(tmp_path / evil, 5, (evil, "low"))
    (sounds / "low" / f"{evil}.wav").write_text("no sound")
    (sounds / "low" / f"{evil}.doc").write_text("no sound")
    out = tmp_path / "out" / evil
    assert train_on("folder", sounds, tmp_path, "--out", out) == 2
    assert train_on("folder", sounds, tmp_path, "--out", out, "--skip-bad") == 0
    run = out / "folder" / "linear" / "seed0"
    fold = str(run / "fold1.safetensors")
    assert report.main([str(run)]) == 0
    assert report.main([str(out)]) == 2  # no run: the error names it
    assert predict.main([fold, str(sounds)]) == 1  # one cannot be read
    assert predict.main([fold, str(sounds), "--events"]) == 1
    assert export.main(["show", fold]) == 0
    merged = str(tmp_path / f"{evil}.safetensors")
    assert export.main(["export", fold, "--to", "merged", "--out", merged]) == 0
    assert export.main(["export", fold, "--to", "hf", "--out", str(out / "hf")]) == 2
    printed = "".join(capsys.readouterr())
    assert "\\x1b]0;title\\x07\\x9b2A\\n\\u202e\\r" in printed
    assert "\n\\u202e" not in printed
    assert printed.isascii() and printed.replace("\n", "").isprintable()


def run_in_shell(command):
    command = f"{sys.executable} -m tools.{command}"
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=60
    )


def test_whole_numbers_are_those_of_32_bits():
    assert positive("2147483647") == 2147483647
    for text in ("0", "2147483648"):
        with pytest.raises(ValueError):
            positive(text)


def test_streams(folder, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(16_000), 16_000)
    words = f"predict {folder / 'lora.safetensors'} {tmp_path / 'a.wav'}"
    bench = f"bench --quick --weights random:demo --json {tmp_path}/x.json"
    ways = [
        f"{words} > /dev/full",
        f"{bench} > /dev/full",
        f"{words} | true; exit ${{PIPESTATUS[0]}}",
    ]
    with ThreadPoolExecutor() as pool:
        *fulls, piped = pool.map(run_in_shell, ways)
    for full in fulls:
        assert full.returncode == 2 and full.stderr.startswith(
            "error: the disk is full (the output)"
        ), full
        assert full.stderr.count("\n") == 1
    assert piped.returncode in (0, 1) and not piped.stderr


def test_what_was_said_before_an_error_is_not_lost():
    """Where stdout is no terminal, what is printed waits in the process."""
    call = "exit_code(lambda: print('one result') or open('/absent/file'))"
    words = [sys.executable, "-c", f"from support.command import exit_code\nexit({call})"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=ROOT, timeout=60, env=environment
    )
    assert (done.returncode, done.stdout) == (2, "one result\n")
    assert done.stderr == "error: /absent/file: No such file or directory\n"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENOSPC])
def test_what_is_no_place_to_write_to_is_asked_for(tmp_path, number):
    """Where it lies in that place, or above it; a sound that cannot be read is no such place, and
    neither is a full disk."""
    hint = number != errno.ENOSPC
    for at, option in (
        ("runs/x", "--out"),
        ("", "--out"),
        ("cache/y.npy", "--cache-dir"),
        ("a.wav", None),
    ):
        args = train.parse(["--out", f"{tmp_path}/runs", "--cache-dir", f"{tmp_path}/cache"])
        where = protected(args, 8)
        with pytest.raises(UserError) as error, where:
            raise OSError(number, os.strerror(number), str(tmp_path / at))
        asked = f"is {option} a folder to write to?" in str(error.value)
        assert asked == bool(hint and option) and str(tmp_path / at) in str(error.value)


def tarred(mode):
    def make(file):
        with tarfile.open(file, mode) as tar:
            tar.add(SMALL_AST / "config.json", "config.json")

    return make


def zipped(file):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(SMALL_AST / "config.json", "config.json")


@few
@given(data=st.data())
@pytest.mark.parametrize(
    "make", [tarred("w"), tarred("w:gz"), tarred("w:bz2"), tarred("w:xz"), zipped]
)
def test_damaged_archives(tmp_path, make, data):
    archive, out = tmp_path / "archive", tmp_path / "out"
    make(archive)
    content = archive.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        archive.write_bytes(content[:at])
    else:
        archive.write_bytes(
            content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1 :]
        )
    if says(lambda: unpack(archive, out), archive):
        assert not out.exists()
    shutil.rmtree(out, ignore_errors=True)


@pytest.mark.parametrize(("offsets", "value"), [((6, 8), 1), ((8, 10), 77)])
def test_archives_that_are_encrypted_or_of_unknown_compression(tmp_path, offsets, value):
    zipped(tmp_path / "a.zip")
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[offsets[0]] = value
    content[content.index(b"PK\x01\x02") + offsets[1]] = value
    (tmp_path / "a.zip").write_bytes(content)
    assert says(
        lambda: unpack(tmp_path / "a.zip", tmp_path / "out"),
        "a.zip is not a whole zip or tar archive",
    )


def test_a_full_disk_is_said_in_one_line(folder, tmp_path, monkeypatch, capsys):
    """Wherever a command writes: a file that is whole or not there."""

    def full(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for to, out in (("merged", "merged.safetensors"), ("hf", "hf"), ("peft", "peft")):
        words = [
            "export",
            str(folder / "lora.safetensors"),
            "--to",
            to,
            "--out",
            str(tmp_path / out),
        ]
        ends(lambda words=words: export.main(words), "the disk is full")(capsys)
        assert not [file for file in tmp_path.rglob("*") if file.is_file()]
    words = ["--out", str(tmp_path), "--cache-dir", str(tmp_path / "cache")]
    assert train.main(words) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: the disk is full")
    assert not list(tmp_path.rglob("*.wav"))
