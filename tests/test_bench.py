"""tools.bench: it counts what a formula counts, compares what computes the same, and shows every row."""

import json
import re
import sys

import pytest
import soundfile
import torch
from helpers import SMALL_AST, tiny_ast
from torch.nn.functional import cross_entropy

import data
import petl
from ast_model import ASTConfig
from load_weights import load_ast
from tools import bench, bench_fold, export

METHODS = [None, "lora", "houlsby_par", "full_ft"]


def by_hand(config: ASTConfig, method: str | None) -> int:
    """All operations for one clip.

    With L tokens, width d, hidden width h: a product of a sequence with an (n, m) matrix takes 2 L n m. So a projection
    P takes 2 L d d, a block 4 P + 4 L d h for its linear layers and A = 4 L L d for its attention (scores and mixing).
    The backward pass needs as much again for the gradient of an input, and as much again for that of a weight. A frozen
    weight needs no weight gradient; and what comes before the first trained weight needs no input gradient: the patches
    never do, with LoRA neither do q, k and v of the first block, nor the scores the part towards k. Attention takes 2 A
    backward. Adapters of rank r take 4 L d r.
    """
    L, d, h, depth = config.n_tokens, config.dim, config.hidden or 4 * config.dim, config.depth
    patches = 2 * (L - 2) * config.patch**2 * d
    projection, attention = 2 * L * d * d, 4 * L * L * d
    linears = 4 * projection + 4 * L * d * h
    head = 2 * d * config.n_classes
    forward = patches + depth * (linears + attention) + head
    if method is None:
        return forward
    backward = depth * (linears + 2 * attention) + 2 * head
    if method == "full_ft":
        return forward + backward + patches + depth * linears
    adapter = 4 * L * d * petl.rank_of(d, petl.METHODS[method].parts[0].rr)
    if method == "houlsby_par":
        return forward + backward + depth * 2 * 3 * adapter
    # LoRA, at q and v: there are two adapters in every block here as well
    unneeded = 3 * projection + attention // 2 + adapter
    return forward + backward + depth * 2 * 3 * adapter - unneeded


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [{"n_frames": 56, "pool": "cls_dist"}, {"n_frames": 86, "hidden": 80, "depth": 3}])
def test_flops_are_those_of_the_formula(method, shape):
    config = tiny_ast(**shape).config
    assert bench.flops(config, method) == by_hand(config, method)


def test_flops_in_numbers():
    """Of the base AST on five seconds: 113 GFLOP forward, the first number of the README's shares."""
    config = ASTConfig(n_frames=500, n_classes=50, pool="cls_dist")
    assert bench.flops(config, None) == 113_286_540_288
    assert bench.flops(config, "lora") == 237_323_762_688


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
    expected = {row: ["ours", "sdpa", "eager"] for row in bench.QUICK}
    probe = rows.pop(("linear probe, epoch 2", 100))
    features = rows.pop(("features", 500))
    assert rows == expected
    assert probe == ["ours", "ours, plain", "sdpa", "eager"] and features == ["ours", "extractor"]


def test_the_numbers_are_whole(quick):
    assert "float32" in quick["machine"]
    for result in quick["results"]:
        assert result["ms_per_clip"] > 0 and result["spread"] >= 0
        if result["row"].endswith("step") or result["row"] == "inference":
            config = load_ast("random:demo", result["n_frames"], 50, "cls_dist").config
            work = bench.flops(config, bench.STEPS[result["row"]]) / 1e6  # GFLOP per clip times ms per second
            assert result["gflops"] == pytest.approx(work / result["ms_per_clip"])
            assert 0 < result["share_of_gemm"] < 1.5  # a narrow model is far below, and clocks are noisy
            assert result["memory_mb"] > 3  # 0.84 M parameters in float32
    seconds = {(r["row"], r["n_frames"], r["contestant"]): r["ms_per_clip"] for r in quick["results"]}
    assert seconds["linear probe, epoch 2", 100, "ours"] < seconds["linear probe, epoch 2", 100, "ours, plain"]


@pytest.mark.parametrize("method", METHODS)
def test_contestants_train_the_same(method):
    """As many trained parameters, and the same function: with adapters and LoRA away from zero, or after a step."""
    _, setup = bench.parse(["--weights", "random:demo", "--batch", "3", "--device", "cpu"])
    models = bench.contestants(method, 100, setup)
    clips = bench.random_clips(3, 100, setup)
    x, y = clips.batch(torch.arange(3), setup.device)
    counts = {sum(p.numel() for p in model.parameters() if p.requires_grad) for model in models.values()}
    assert len(counts) == 1
    if method is None:
        return
    if method == "full_ft":  # adapters and LoRA start from different random numbers, and so move differently
        for model in models.values():
            step, _ = bench.pass_of(method, model, clips, setup)
            assert len(step()) == 1
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
    _, setup = bench.parse(["--weights", "random:demo", "--device", "cpu"])
    original = bench.load_ast

    def other(*args):  # same shape, another number somewhere
        model = original(*args)
        model.head[1].bias.data[0] += 1
        return model

    plain = original("random:demo", 100, 50, "cls_dist")
    monkeypatch.setattr(bench, "write_hf", lambda model, *rest: export.write_hf(plain, *rest))
    monkeypatch.setattr(bench, "load_ast", other)
    with pytest.raises(RuntimeError, match="do not compute the same"):
        bench.contestants(None, 100, setup)


def test_peak_memory_sees_a_large_tensor():
    small, large = (bench.peak_mb(lambda n=n: torch.ones(n).sum()) for n in (1_000, 25_000_000))
    if sys.platform == "linux":
        assert small < 20 and 90 < large < 130  # 100 MB
    else:
        assert small is large is None


def test_missing_libraries_are_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert bench.main(["--quick", "--weights", "random:demo"]) == 2
    assert "the comparison needs peft: pip install -r requirements-dev.txt" in capsys.readouterr().err


def test_parse_knows_the_defaults():
    _, setup = bench.parse(["--device", "cpu"])
    assert (setup.batch, setup.repeats, setup.dtype) == (4, 3, "float32")
    assert setup == bench.Bench(torch.device("cpu"))
    _, setup = bench.parse(["--device", "cpu", "--quick", "--compile", "--dtype", "bfloat16"])
    assert setup == bench.Bench(torch.device("cpu"), compile=True, dtype="bfloat16", batch=2, quick=True)


def test_a_fold_is_what_its_description_says():
    """Whatever else is asked for, also a device that is not there."""
    _, setup = bench.parse(["fold", "--device", "cuda:99", "--dtype", "bfloat16", "--compile"])
    assert setup == bench.Bench(torch.device("cpu"), batch=8)


def test_less_to_compute(capsys, tmp_path):
    file = tmp_path / "less.json"
    assert bench.main(["--less", "--weights", "random:demo", "--repeats", "1", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    steps = json.loads(file.read_text())["results"]
    assert [step["step"] for step in steps] == ["LoRA ", "LoRA --keep 0.4", "LoRA --blocks 3-4"]
    assert all(f"{step['seconds']:8.2f} s a step" in printed for step in steps)


# ------------------------------------------------------------------------------------------------- a fold end to end


def test_a_release_of_sounds_made_here(tmp_path):
    root = bench_fold.make_sounds(tmp_path / "sounds", 50, None)
    dataset = data.load_dataset("esc10", root, tmp_path)
    assert len(dataset.paths) == 50 and len(dataset.classes) == 10
    assert [len(part) for part in (dataset.folds[1].train, dataset.folds[1].val, dataset.folds[1].test)] == [30, 10, 10]
    info = soundfile.info(dataset.paths[0])
    assert (info.samplerate, info.frames) == (44_100, 5 * 44_100)
    again = bench_fold.make_sounds(tmp_path / "again", 10, root)
    part = data.load_dataset("esc10", again, tmp_path)
    assert len(part.paths) == 10 and {path.read_bytes() for path in part.paths} < {
        p.read_bytes() for p in dataset.paths
    }


def test_both_train_the_same_fold(monkeypatch):
    """Equal seconds would be chance, equal steps and features are not; each second belongs to one stage."""
    steps, heard, step = [], [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *x: steps.append(self.param_groups[0]["lr"]) or step(self)
    )
    extracted = bench_fold.Sounds.extracted
    monkeypatch.setattr(bench_fold.Sounds, "extracted", lambda *x: heard.append(x[1]) or extracted(*x))
    results = bench_fold.measure((str(SMALL_AST), 10, 2), None, 2, 1)
    assert [(result["run"], result["contestant"]) for result in results] == [
        (run, name) for run in ("first", "second") for name in ("ours", "Trainer", "Trainer, kept")
    ]
    assert len(steps) == 6 * 6 and steps[:6] == pytest.approx(steps[12:18])  # 6 clips, by two, twice
    assert len(heard) == 2 * (2 * (6 + 2) + 2) + 10  # again and again, or once
    for result in results:
        assert result["seconds"] == pytest.approx(sum(result[stage] for stage in bench_fold.STAGES))
        assert min(result[stage] for stage in bench_fold.STAGES) > 0 and 0 <= result["accuracy"] <= 100


def test_the_table_of_folds(monkeypatch, capsys):
    def measure(case, data_dir, batch, repeats):
        assert (data_dir, batch, repeats) == (None, 8, 1 if case == bench_fold.WARM else 3)
        names = {**dict(zip(("weights", "clips", "epochs"), case, strict=True)), "run": "first"}
        stages = dict.fromkeys(bench_fold.STAGES, 1.0)
        return [{**names, "contestant": name, **stages, "seconds": seconds, "spread": 2.0, "accuracy": 50.0}
                for name, seconds in (("ours", 4.0), ("Trainer", 6.0))]  # fmt: skip

    monkeypatch.setattr(bench_fold, "measure", measure)
    assert bench.main(["fold", "--quick"]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| random")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["random:demo", "100", "5", "first", name, *["1.00"] * 4, seconds, "2 %", faster, "50.0 %"]
        for name, seconds, faster in (("ours", "4.00", "1.00 x"), ("Trainer", "6.00", "1.50 x"))
    ]


def test_sounds_are_for_the_fold_alone(capsys, tmp_path):
    assert bench.main(["--less", "--data-dir", str(tmp_path)]) == 2
    assert "only `fold` reads sounds" in capsys.readouterr().err
