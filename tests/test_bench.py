"""tools.bench: it compares what computes the same, and shows every row."""

import json
import re
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy

from tools import bench, export

CPU = bench.Bench(torch.device("cpu"), n_frames=100, batch=3, weights="random:demo")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The short table on the small random backbone: what it prints, and its JSON."""
    file = tmp_path_factory.mktemp("bench") / "numbers.json"
    assert (
        bench.main(["--quick", "--weights", "random:demo", "--device", "cpu", "--json", str(file)])
        == 0
    )
    return json.loads(file.read_text())


def test_every_row_has_every_contestant(quick):
    rows = {}
    for result in quick["results"]:
        rows.setdefault(result["row"], []).append(result["contestant"])
    expected = {row: ["ours", "theirs"] for row in bench.ROWS}
    expected["houlsby_par"] = ["ours"]  # peft has none
    assert rows == expected


def test_the_numbers_are_whole(quick):
    assert "float32" in quick["machine"] and "clips of 100 frames" in quick["machine"]
    for result in quick["results"]:
        assert tuple(result) == bench.COLUMNS
        assert result["batch"] == 4
        assert result["ms_per_clip"] > 0 and result["spread"] >= 0 and result["ratio"] > 0
        if result["row"] not in ("linear", "features"):
            assert result["memory_mb"] > 3  # 0.84 M parameters in float32
        if result["row"] == "full_ft":
            assert result["memory_mb"] > 10  # AdamW keeps two more numbers for each
    ms = {
        (result["row"], result["contestant"]): result["ms_per_clip"] for result in quick["results"]
    }
    assert ms["linear", "ours"] < ms["linear", "theirs"]
    (ratio,) = [
        r["ratio"] for r in quick["results"] if (r["row"], r["contestant"]) == ("linear", "theirs")
    ]
    assert ratio == pytest.approx(ms["linear", "theirs"] / ms["linear", "ours"], rel=0.05)


def test_the_median_and_its_spread(monkeypatch, capsys):
    times = {"ours": [0.1, 0.4, 0.2], "theirs": [0.3, 0.3, 0.3]}
    monkeypatch.setattr(bench, "in_turn", lambda ways, repeats: times)
    ours, theirs = bench.measure("features", CPU)
    assert (ours["ms_per_clip"], ours["spread"], ours["ratio"]) == (
        66.667,
        75.0,
        1.0,
    )  # batches of three
    assert (theirs["ms_per_clip"], theirs["spread"], theirs["ratio"]) == (100.0, 0.0, 1.5)
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("method", [None, "linear", "lora", "full_ft"])
def test_contestants_train_the_same(method):
    """As many trained parameters, the same function: LoRA away from zero, others after a step."""
    models = bench.contestants(method, CPU)
    clips = bench.random_clips(3, CPU)
    x, y = clips.batch(torch.arange(3), CPU.device)
    counts = {
        sum(p.numel() for p in model.parameters() if p.requires_grad) for model in models.values()
    }
    assert len(counts) == 1
    if method is None:
        return
    if method != "lora":  # LoRA starts from different random numbers, and so moves differently
        for model in models.values():
            step = bench.pass_of(method, model, clips, CPU)
            assert len(step()) == 1
        with torch.no_grad():
            ours, theirs = (model.eval()(x) for model in models.values())
        assert (ours - theirs).abs().max() < 1e-2
    else:
        gradients, logits = [], []
        for model in models.values():
            torch.manual_seed(1)
            inserted = [
                p for name, p in model.named_parameters() if re.search(r"lora_|\.[ab](\.|$)", name)
            ]
            assert inserted
            for p in inserted:
                p.data.normal_(std=0.1)
            out = model.train()(x)
            cross_entropy(out, y).backward()
            logits.append(out.detach())
            gradients.append(
                next(p.grad for p in model.parameters() if p.requires_grad and p.shape == (50, 128))
            )
        torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_contestants_that_differ_are_refused(monkeypatch):
    original = bench.load_ast

    def other(*args):  # same shape, another number somewhere
        model = original(*args)
        model.head[1].bias.data[0] += 1
        return model

    plain = original("random:demo", 100, 50, "cls_dist")
    monkeypatch.setattr(bench, "write_hf", lambda model, *rest: export.write_hf(plain, *rest))
    monkeypatch.setattr(bench, "load_ast", other)
    with pytest.raises(RuntimeError, match="do not compute the same"):
        bench.contestants(None, CPU)


def test_the_memory_is_that_of_weights_optimizer_and_step():
    """A step that takes 100 MB, and weights of 4 MB, which AdamW makes 12 if they are trained."""
    network = torch.nn.Linear(1000, 1000, bias=False)
    small = bench.memory_mb(lambda: torch.ones(1_000).sum(), network)
    large = bench.memory_mb(lambda: torch.ones(25_000_000).sum(), network.requires_grad_(False))
    if sys.platform == "linux":
        assert 12 <= small < 32 and 94 < large < 134
    else:
        assert small is large is None


def test_missing_libraries_are_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert bench.main(["--quick", "--weights", "random:demo"]) == 2
    assert (
        "the comparison needs peft: pip install -r requirements-dev.txt" in capsys.readouterr().err
    )


def test_the_defaults(monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "measure", lambda row, setup: seen.append(setup) or [])
    assert bench.main(["--device", "cpu"]) == 0
    setup = seen[0]
    assert (setup.batch, setup.repeats, setup.dtype, setup.n_frames) == (4, 3, "float32", 500)
    assert setup == bench.Bench(torch.device("cpu"))
    assert bench.main(["--device", "cpu", "--quick", "--compile"]) == 0
    assert seen[-1] == bench.Bench(torch.device("cpu"), compile=True, n_frames=100)
    assert bench.main(["--device", "cpu", "--dtype", "bfloat16"]) == 0
    assert seen[-1] == bench.Bench(torch.device("cpu"), dtype="bfloat16")


def test_rows_and_batch_sizes_can_be_chosen(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(bench, "measure", lambda row, setup: seen.append((row, setup.batch)) or [])
    options = ["--device", "cpu", "--rows", "lora", "features", "--batch-size", "2", "5"]
    assert bench.main(options) == 0
    assert seen == [("lora", 2), ("features", 2), ("lora", 5), ("features", 5)]
    assert bench.main(["--batch-size", "0"]) == 2
    assert "--batch-size" in capsys.readouterr().err


def test_a_row_that_does_not_fit_into_memory_does_not_end_the_others(monkeypatch, capsys):
    def measure(row, setup):
        if setup.batch == 9:
            raise torch.OutOfMemoryError
        seen.append((row, setup.batch))
        return []

    seen = []
    monkeypatch.setattr(bench, "measure", measure)
    options = ["--device", "cpu", "--rows", "lora", "--batch-size", "9", "4"]
    assert bench.main(options) == 0
    assert seen == [("lora", 4)]
    assert capsys.readouterr().err == "warning: out of memory: lora, 9 clips at once\n"
