"""What train.py says after its first steps: how long it will take, and on a CPU what would make it bearable."""

from dataclasses import replace

import torch
from helpers import Terminal
from safetensors.torch import load_file

import data
from support import console, records
from support.progress import Signs, in_words
from support.speed import Machine
from tools.bench import Bench

CPU = torch.device("cpu")
SETTINGS = Bench(CPU, batch=4).settings(batch_size=4, epochs=10)
SPLIT = data.Split(list(range(14)), list(range(4)), list(range(6)))


class Optimizer:
    """Calls what is to be called after a step."""

    def register_step_post_hook(self, hook):
        self.hook = hook


def test_what_is_about_to_be_trained():
    method = {"name": "lora", "parts": [{"part": "LoRA"}]}
    plain = replace(SETTINGS, dataset="my", weights="demo", method=method, mask=True)
    line = "10 epochs, batch 4, learning rate 0.0001, {}, weights demo, seed 0, float32, cpu"
    assert console.describe(plain, 2.5, CPU) == "lora on my: 2.5 s a clip, " + line.format("masked")
    odd = console.describe(replace(plain, shots=8, mask=False, keep=0.4, balance=True), 5, CPU)
    what = line.format("unmasked, 40% of the patches, classes weighed alike")
    assert odd == f"lora on my: 8 clips per class, 5 s a clip, {what}"


def said(monkeypatch, capsys, steps: int, seconds_a_step: float, split=SPLIT, machine=None, progress=None) -> list[str]:
    """What is printed within so many steps that all take as long, but for the first one, which takes a minute more."""
    learner, clock = type("Learner", (), {"optimizer": Optimizer()}), [0.0]
    monkeypatch.setattr(console, "now", lambda device: clock[0])
    progress = progress or records.Progress(1)
    console.forecast(learner.optimizer, progress, split, SETTINGS, CPU, 2 if machine is None else machine)
    for step in range(steps):
        clock[0] += seconds_a_step + (60 if step == 0 else 0)
        learner.optimizer.hook(learner.optimizer, (), {})
    return capsys.readouterr().out.splitlines()


def test_a_forecast_in_numbers(monkeypatch, capsys):
    """8 s for each 4 clips: 2 s a clip. Two folds: 2 (10 (14 + 4 / 2) + 6 / 2) clips = 326, 652 s."""
    ways = "on a CPU; what makes it bearable: --shots 8, --folds 1, fewer --epochs, a GPU"
    expected = ["this will take about 11 minutes, 2 folds", ways]
    assert said(monkeypatch, capsys, 2, 8.0) == []
    assert said(monkeypatch, capsys, 3, 8.0) == said(monkeypatch, capsys, 20, 8.0) == expected
    started = records.Progress(1, history=[{}] * 5)  # 5 (14 + 4 / 2) = 80 clips less
    assert said(monkeypatch, capsys, 3, 8.0, progress=started) == ["this will take about 8.2 minutes, 2 folds"]


def test_a_forecast_of_few_steps(monkeypatch, capsys):
    """The second of two steps has 3 clips of 7; a single step is timed from the start, with what it takes to start."""
    two = data.Split(list(range(7)), [], [0, 1])  # 2 (10 x 7 + 1) = 142 clips
    assert said(monkeypatch, capsys, 1, 6.0, two) == []
    assert said(monkeypatch, capsys, 2, 6.0, two) == ["this will take about 4.7 minutes, 2 folds"]  # 2 s a clip
    one = data.Split([0, 1, 2], [], [0, 1])  # 2 (10 x 3 + 1) = 62 clips, 66 s for 3 of them
    assert said(monkeypatch, capsys, 1, 6.0, one)[0] == "this will take about 23 minutes, 2 folds"


def test_no_forecast_of_a_short_run_or_twice_or_by_another_process(monkeypatch, capsys):
    assert said(monkeypatch, capsys, 4, 0.5) == []  # 41 s
    assert said(monkeypatch, capsys, 4, 1.0) == ["this will take about 82 s, 2 folds"]
    assert said(monkeypatch, capsys, 4, 9.0, machine=0) == []
    monkeypatch.setattr(console, "is_first", lambda: False)
    assert said(monkeypatch, capsys, 4, 1.0) == []


def test_a_line_a_minute_of_a_fold(monkeypatch, capsys):
    """Four steps an epoch, ten epochs, the second begins; 25 s each."""
    times = iter(range(0, 1000, 25))
    monkeypatch.setattr(console, "Signs", lambda *args: Signs(*args, clock=lambda: next(times)))
    learner = type("Learner", (), {"optimizer": Optimizer()})
    console.forecast(learner.optimizer, records.Progress(3, history=[{}]), SPLIT, SETTINGS, CPU, 0)
    for _ in range(6):
        learner.optimizer.hook(learner.optimizer, (), {})
    assert capsys.readouterr().err.splitlines() == [
        "fold 3, epoch 2: 7 of 40 steps, about 14 minutes to go",
        "fold 3, epoch 3: 10 of 40 steps, about 12 minutes to go",
    ]


def test_what_makes_a_run_bearable(monkeypatch):
    cpu, gpu = CPU, torch.device("cuda")
    lines = console.forecast_lines
    assert lines(59.9, 1, SETTINGS, cpu) == [] and len(lines(600, 1, SETTINGS, cpu)) == 1
    assert lines(1e6, 5, SETTINGS, gpu) == ["this will take about 12 days, 5 folds"]
    few = replace(SETTINGS, shots=8, epochs=5)
    assert lines(7000, 1, few, cpu) == ["this will take about 117 minutes", "on a CPU; what makes it bearable: a GPU"]
    assert [in_words(s) for s in (119, 120, 7200, 172_799, 172_800)] == [
        "119 s", "2.0 minutes", "2.0 hours", "48 hours", "2.0 days"]  # fmt: skip


def test_the_clock_waits_for_the_device(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    console.now(torch.device("cpu"))
    assert console.now(torch.device("cuda:1")) > 0 and waited == [torch.device("cuda:1")]


def test_a_run_says_it_once_and_reads_the_clock_thrice(train_main, monkeypatch, capsys, tmp_path):
    """Two seeds of two folds, one of them finished before; and it trains what a run trains that says nothing."""
    options = ["--seconds", 0.5, "--batch-size", 8, "--epochs", 1]
    assert train_main(*options, "--out", tmp_path / "silent") == train_main(*options, "--folds", 2) == 0
    assert "this will take" not in capsys.readouterr().out  # quick runs need no such line
    times, folds, left = [], [], console.clips_left
    monkeypatch.setattr(console, "now", lambda device: times.append(device) or 1000.0 * len(times))
    monkeypatch.setattr(console, "clips_left", lambda *args: folds.append(args[-1]) or left(*args))
    assert train_main(*options, "--seed", "0,1", "--folds", "1,2") == 0
    out = capsys.readouterr().out
    assert out.count("this will take about") == out.count("what makes it bearable: --shots 8, --folds 1, a GPU") == 1
    assert ", 3 folds" in out and folds == [3]
    assert len(times) == 3  # at the start, after the first step and after the third
    file = "esc10/houlsby_par/seed0/fold1.safetensors"
    silent, other = load_file(tmp_path / "silent" / file), load_file(tmp_path / "runs" / file)
    assert all(torch.equal(silent[name], other[name]) for name in silent)
