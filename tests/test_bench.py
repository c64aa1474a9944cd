"""bench.py: it counts what torch counts, compares what computes the same, and shows every row."""

import json
import re
import sys

import bench
import pytest
import torch
from helpers import tiny_ast
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

import petl
from load_weights import load_ast

METHODS = [None, "lora", "houlsby_par", "full_ft"]


@pytest.mark.parametrize("method", METHODS)
def test_flops_are_those_that_torch_counts(method):
    model = petl.apply(tiny_ast(n_frames=56, pool="cls_dist"), method or "linear")
    x, y = torch.randn(1, 56, 36), torch.zeros(1, dtype=int)
    # The kernel that runs attention as two plain products, which the counter sees. It counts no products with vectors.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        if method is None:
            with torch.no_grad():
                model(x)
        else:
            cross_entropy(model(x), y).backward()
    assert bench.flops(model.config, method) == counter.get_total_flops()


def test_flops_of_an_unknown_method():
    with pytest.raises(ValueError, match="no formula for 'spt'"):
        bench.flops(tiny_ast().config, "spt")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The short table on the small random backbone: what it prints, and its JSON."""
    file = tmp_path_factory.mktemp("bench") / "numbers.json"
    threads = torch.get_num_threads()
    assert bench.main(["--quick", "--repeats", "1", "--weights", "random:demo", "--json", str(file)]) == 0
    assert torch.get_num_threads() == threads
    return json.loads(file.read_text())


def test_every_row_has_every_contestant(quick):
    rows = {}
    for result in quick["results"]:
        rows.setdefault((result["row"], result["n_frames"]), []).append(result["contestant"])
    expected = {(row.name, row.n_frames): ["ours", "sdpa", "eager"] for row in bench.ROWS if row.quick}
    probe = rows.pop(("linear probe, epoch 2", 100))
    features = rows.pop(("features", 500))
    assert rows == expected
    assert probe == ["ours", "ours, plain", "sdpa", "eager"] and features[:2] == ["ours", "extractor"]


def test_the_numbers_are_whole(quick):
    assert quick["what"] == "table" and "float32" in quick["machine"]
    for result in quick["results"]:
        assert result["ms_per_clip"] > 0 and result["spread"] >= 0
        if result["row"].endswith("step") or result["row"] == "inference":
            config = load_ast("random:demo", result["n_frames"], 50, "cls_dist").config
            method = next(row.method for row in bench.ROWS if row.name == result["row"])
            work = bench.flops(config, method) / 1e6  # GFLOP per clip times ms per second
            assert result["gflops"] == pytest.approx(work / result["ms_per_clip"])
            assert 0 < result["share_of_gemm"] < 1.5  # a narrow model is far below, and clocks are noisy
            assert result["memory_mb"] > 3  # 0.84 M parameters in float32
    seconds = {(r["row"], r["n_frames"], r["contestant"]): r["ms_per_clip"] for r in quick["results"]}
    assert seconds["linear probe, epoch 2", 100, "ours"] < seconds["linear probe, epoch 2", 100, "ours, plain"]


@pytest.mark.parametrize("method", METHODS)
def test_contestants_train_the_same(method):
    """As many trained parameters, and the same function: with adapters and LoRA away from zero, or after a step."""
    args = bench.parse(["--weights", "random:demo", "--batch", "3", "--device", "cpu"])
    models = bench.contestants(method, 100, args)
    x, y = bench.batch_of(3, 100, args)
    counts = {sum(p.numel() for p in model.parameters() if p.requires_grad) for model in models.values()}
    assert len(counts) == 1
    if method is None:
        return
    if method == "full_ft":  # adapters and LoRA start from different random numbers, and so move differently
        for model in models.values():
            bench.training_step(model.train(), bench.optimizer_of(model, args), x, y, args)
        with torch.no_grad():
            logits = [model.eval()(x) for model in models.values()]
        assert (logits[0] - logits[1]).abs().max() < 1e-2 and (logits[0] - logits[2]).abs().max() < 1e-2
    else:
        gradients, logits = [], []
        for model in models.values():
            torch.manual_seed(1)
            inserted = [p for name, p in model.named_parameters() if re.search(r"adapter|lora_|\.[ab](\.|$)", name)]
            assert inserted
            for p in inserted:
                p.data.normal_(std=0.1)
            out = model.train()(x)
            cross_entropy(out, y).backward()
            logits.append(out.detach())
            gradients.append(next(p.grad for p in model.parameters() if p.requires_grad and p.shape == (50, 128)))
        for other in (1, 2):
            torch.testing.assert_close(logits[0], logits[other], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(gradients[0], gradients[other], rtol=1e-3, atol=1e-5)


def test_contestants_that_differ_are_refused(monkeypatch):
    args = bench.parse(["--weights", "random:demo", "--device", "cpu"])
    original = bench.load_ast

    def other(*args):  # same shape, another number somewhere
        model = original(*args)
        model.head[1].bias.data[0] += 1
        return model

    monkeypatch.setattr(
        bench, "write_hf", lambda model, *rest: write_hf(original("random:demo", 100, 50, "cls_dist"), *rest)
    )
    from export import write_hf

    monkeypatch.setattr(bench, "load_ast", other)
    with pytest.raises(RuntimeError, match="do not compute the same"):
        bench.contestants(None, 100, args)


def test_peak_memory_sees_a_large_tensor():
    device = torch.device("cpu")
    small, large = (bench.peak_mb(lambda n=n: torch.ones(n).sum(), device) for n in (1_000, 25_000_000))
    if sys.platform == "linux":
        assert small < 20 and 90 < large < 130  # 100 MB
    else:
        assert small is large is None


def test_growth(tmp_path, capsys):
    file = tmp_path / "growth.json"
    options = ["growth", "--quick", "--repeats", "1", "--weights", "random:demo", "--json", str(file)]
    assert bench.main(options) == 0
    results = json.loads(file.read_text())["results"]
    assert [(r["n_frames"], r["batch"]) for r in results] == [(n, b) for n in (100, 200, 500) for b in (1, 2)]
    shares = [r["attention_counted"] for r in results[::2]]
    assert shares == sorted(shares) and 0 < shares[0] < shares[-1] < 1
    assert all(r["attention_measured"] > 0 for r in results)
    printed = capsys.readouterr().out
    assert printed.count("\n|") == 8 and "attention measured" in printed


def test_the_experiment_in_shape(capsys):
    assert bench.main(["esc50", "--quick", "--weights", "random:demo"]) == 0
    assert "10 clips, 5 folds, 1 epochs" in capsys.readouterr().out


def test_missing_libraries_are_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert bench.main(["--quick", "--weights", "random:demo"]) == 2
    assert "the comparison needs peft: pip install -r requirements-dev.txt" in capsys.readouterr().err


def test_parse_knows_the_defaults():
    args = bench.parse(["--device", "cpu"])
    assert (args.batch, args.repeats, args.dtype) == (4, 3, "float32")
