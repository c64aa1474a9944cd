"""What makes training fast must not change what it computes."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_ast
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy

import petl
import train
from data import Clips
from support import onednn_linear, recorder, speed
from support.onednn_linear import OneDNNLinear, use_onednn
from support.speed import Machine
from train import Settings

CPU = Machine(torch.device("cpu"))


def settings(batch_size: int) -> Settings:
    return Settings(
        dataset="demo",
        weights="",
        backbone="",
        method={},
        pool="mean",
        seed=0,
        shots=None,
        clips="",
        n_frames=60,
        epochs=1,
        batch_size=batch_size,
        lr=1e-3,
        head_lr=1e-3,
        mask_frames=0,
        dtype="float32",
    )


def gradients(model, x, y) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)  # of the dropout
    model.train().zero_grad()
    cross_entropy(model(x).float(), y).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def batch(model, size=3):
    torch.manual_seed(0)
    return torch.randn(size, model.config.n_frames, model.config.n_mels), torch.arange(
        size
    ) % model.config.n_classes


# -------------------------------------------------------------------------------- the linear layers


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7)])
def test_onednn_linear_is_the_linear_layer(trained, shape):
    """Output and all gradients, for vectors and sequences; as exact as float32 can be."""
    torch.manual_seed(0)
    plain = nn.Linear(7, 4).requires_grad_(trained)
    fast = use_onednn(nn.Sequential(nn.Linear(7, 4)))[0]
    fast.load_state_dict(plain.state_dict())
    fast.requires_grad_(trained)
    assert type(fast) is OneDNNLinear and fast.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(shape)
    results = []
    for layer in (plain, fast):
        leaf = x.clone().requires_grad_(True)
        out = layer(leaf)
        (out**2).sum().backward()
        results.append([out, leaf.grad, layer.weight.grad, layer.bias.grad])
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    wide, x = nn.Linear(768, 256), torch.randn(64, 768)
    exact = x.double() @ wide.weight.double().t() + wide.bias.double()
    assert (use_onednn(nn.Sequential(wide))(x) - exact).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "method", ["full_ft", "lora", "houlsby_par", "prefix", "bitfit", "adapter_dpt_lora"]
)
def test_onednn_gives_the_same_gradients_to_a_method(method):
    torch.manual_seed(0)
    model = petl.apply(tiny_ast(), method)
    x, y = batch(model)
    before = gradients(model, x, y)
    after = gradients(use_onednn(model), x, y)
    assert (
        any(type(module) is OneDNNLinear for module in model.modules())
        and before.keys() == after.keys()
    )
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_frozen_layer_keeps_no_input():
    """That is where the memory of training goes."""
    layer = use_onednn(nn.Sequential(nn.Linear(8, 4)))[0].requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    frozen = layer(x)
    assert frozen.grad_fn.saved_tensors[0] is None
    trained = layer.requires_grad_(True)(x)
    assert trained.grad_fn.saved_tensors[0] is not None


@pytest.mark.parametrize("fails", [None, "capability", "library", "system", "maker"])
def test_onednn_helps_amd_with_avx_512(fails, monkeypatch, tmp_path):
    file = tmp_path / "cpuinfo"
    if fails != "system":
        maker = "GenuineIntel" if fails == "maker" else "AuthenticAMD"
        file.write_text(f"vendor_id\t: {maker}\nflags\t: avx512f\n")
    monkeypatch.setattr(onednn_linear, "Path", {"/proc/cpuinfo": file}.get)
    monkeypatch.setattr(
        torch.backends.cpu,
        "get_cpu_capability",
        lambda: "AVX2" if fails == "capability" else "AVX512",
    )
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: fails != "library")
    assert onednn_linear.onednn_helps() is (fails is None)


def test_prepare_chooses_onednn_by_the_processor(monkeypatch):
    for helps in (True, False):
        monkeypatch.setattr(speed, "onednn_helps", lambda helps=helps: helps)
        model = CPU.prepare(petl.apply(tiny_ast(), "lora"), "float32")
        assert (type(model.blocks[0].attn.k) is OneDNNLinear) == helps
        model = CPU.prepare(petl.apply(tiny_ast(), "lora"), "bfloat16")
        assert type(model.blocks[0].attn.k) is nn.Linear


# --------------------------------------------------------------------------------- types and memory


@pytest.mark.parametrize(
    "method", ["lora", "bitfit", "convpass2d_houlsby_par", "adapter_dpt", "full_ft"]
)
def test_frozen_weights_in_bfloat16_change_no_bit(method):
    """They hold what autocast would make of them. Trained ones and LayerNorms stay in float32."""
    torch.manual_seed(0)
    model = petl.apply(tiny_ast(), method)
    x, y = batch(model)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(model, x, y)

    before = run()
    CPU.prepare(model, "bfloat16")
    after = run()
    assert all(torch.equal(before[name], after[name]) for name in before)
    frozen = petl.inner(model.blocks[1]).ffn
    types = {p.dtype for p in petl.inner(frozen).fc1.parameters() if not p.requires_grad}
    assert types == (set() if method == "full_ft" else {torch.bfloat16})
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.blocks[0].norm1.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "lora"],
        ["--method", "convpass_houlsby_par"],
        ["--method", "linear", "--no-mask"],
    ],
)
def test_compiled_or_not(options, train_main, tmp_path, monkeypatch):
    """By torch's tracer, without the C++ compiler behind it, that not every machine has."""
    compiled, compile_ = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model: compiled.append(1) or compile_(model, backend="eager")
    )
    options = [*options, "--lr", "5e-3"]
    assert train_main(*options, "--folds", "1,2", "--out", tmp_path / "a") == 0 and not compiled
    assert (
        train_main(*options, "--folds", "1,2", "--out", tmp_path / "b", "--compile") == 0
        and len(compiled) == 2
    )
    for fold in (1, 2):
        one, other = (
            load_file(tmp_path / out / f"esc10/{options[1]}/seed0/fold{fold}.safetensors")
            for out in "ab"
        )
        assert one.keys() == other.keys()
        assert all((one[name] - other[name]).abs().max() <= 1e-5 for name in one)


@pytest.mark.parametrize(("device", "ids"), [("cuda:1", [1]), ("cpu", None)])
def test_each_process_has_the_gpu_it_is_given(device, ids, monkeypatch):
    told = []
    monkeypatch.setattr(speed, "ranks", lambda: (1, 2))
    monkeypatch.setattr(
        speed,
        "DistributedDataParallel",
        lambda *_, **options: told.append(options) or nn.Identity(),
    )
    forward = Machine(torch.device(device)).parallel(nn.Linear(2, 2))
    assert told == [{"device_ids": ids}] and forward.broadcast_buffers is False


@pytest.mark.parametrize(
    ("device", "free", "there"), [("cuda", 201, True), ("cuda", 200, False), ("cpu", 900, False)]
)
def test_what_takes_half_of_the_free_memory_stays(device, free, there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1000))
    tensor = SimpleNamespace(nbytes=100, to=lambda device: "there")
    assert (speed.near(tensor, torch.device(device)) == "there") is there


def test_a_gpu_evaluates_four_times_what_it_trains_on(monkeypatch):
    gpu = Machine(torch.device("cuda"))
    assert [machine.evaluation_batch(9) for machine in (CPU, gpu)] == [9, 36]
    few = [replace(machine, micro_batch=2) for machine in (CPU, gpu)]
    assert [machine.evaluation_batch(9) for machine in few] == [2, 8]
    monkeypatch.setattr(speed, "ranks", lambda: (1, 2))
    assert gpu.evaluation_batch(9) == 20  # of five clips, the larger share


def evaluate(network, clips: Clips, indices: list[int], batch_size: int):
    learner = SimpleNamespace(network=network, settings=settings(batch_size), machine=CPU)
    return train.evaluate(learner, clips, indices)


@pytest.mark.parametrize(
    "full", [torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_evaluation_takes_what_memory_allows(full):
    """Batches are halved when they do not fit, and no clip counts twice. One clip must fit."""
    sizes = []

    def model_with_room_for(room):
        def forward(x):
            sizes.append(len(x))
            if len(x) > room:
                raise full
            return nn.functional.one_hot(x[:, 0].long(), 4)

        model = nn.Module()
        model.forward = forward
        return model

    clips = Clips(torch.arange(4.0).repeat(5)[:, None], torch.tensor([0, 1, 2, 0]).repeat(5))
    logits, labels = evaluate(model_with_room_for(4), clips, list(range(20)), 12)
    answers = recorder.answers_of(logits)
    assert train.score_of(logits, labels, "accuracy") == 75
    assert answers["predictions"] == 5 * [0, 1, 2, 3]
    assert answers["millionths"] == 20 * [round(1e6 * math.e / (math.e + 3))]  # one 1 and three 0
    assert sizes == [12, 6, 3, 3, 3, 3, 3, 3, 2]
    with pytest.raises(type(full)):
        evaluate(model_with_room_for(0), clips, [3], 12)
    answered = evaluate(model_with_room_for(4), clips, [], 12)
    assert [len(each) for each in answered] == [0, 0] and train.score_of(
        *answered, "accuracy"
    ) is None


def test_logits_that_are_no_numbers_have_no_probability():
    """As float16 may give: a fold file with a nan in its header could not be read."""
    clips = Clips(torch.tensor([[torch.nan, 0], [torch.inf, 0], [0, 1]]), torch.tensor([0, 0, 1]))
    answers = recorder.answers_of(evaluate(nn.Identity(), clips, [0, 1, 2], 3)[0])
    assert answers["millionths"] == [0, 0, round(1e6 * math.e / (1 + math.e))]


@pytest.mark.parametrize(
    "units, dim, helps",
    [
        ({"avx512_bf16": True}, 384, True),
        ({"avx512_bf16": False, "amx_bf16": True}, 384, True),
        ({"avx512_bf16": False, "amx_bf16": False}, 384, False),
        ({}, 384, False),  # not of Intel or AMD
        ({"avx512_bf16": True}, 128, False),
    ],
)
def test_bfloat16_helps_where_the_processor_has_it(units, dim, helps, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    assert speed.bfloat16_helps(tiny_ast(dim=dim)) is helps
    assert not speed.bfloat16_helps(nn.Linear(dim, 3))  # last layers: the backbone has no step
