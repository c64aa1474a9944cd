"""The loop of train.py: what a step does, and that a reader can change it in one place.

Five changes are made as a reader would make them: by a small patch of the source text, or by a
function that takes the place of one.
"""

import math
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import settings_of, tiny_ast
from torch import nn

import petl
import train
from data import Clips, Split
from support.speed import Machine

CPU = Machine(torch.device("cpu"))
SPLIT = Split(train=list(range(8)), val=[8, 9], test=[10, 11])


def made_up_clips() -> Clips:
    generator = torch.Generator().manual_seed(0)
    return Clips(torch.randn(12, 36, 36, generator=generator), torch.tensor([0, 1, 2] * 4))


def learner_of(module=train, method: str = "houlsby_par", **settings) -> train.Learner:
    torch.manual_seed(0)
    model = petl.apply(tiny_ast(), method)
    return module.Learner(model, settings_of(**settings), CPU)


def patched(before: str, after: str) -> types.ModuleType:
    """train.py with one piece of its text replaced."""
    text = Path(train.__file__).read_text(encoding="utf-8")
    assert text.count(before) == 1
    module = types.ModuleType("patched_train")
    exec(compile(text.replace(before, after), "patched_train.py", "exec"), module.__dict__)
    return module


@pytest.fixture(autouse=True)
def known_to_dataclasses(monkeypatch):
    """Dataclasses look their module up by its name."""
    monkeypatch.setitem(
        __import__("sys").modules, "patched_train", types.ModuleType("patched_train")
    )


def rates_of(learner: train.Learner, epochs: int = 1) -> list[list[float]]:
    """The learning rate of every group in every step of some epochs."""
    rates = []
    learner.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append([group["lr"] for group in optimizer.param_groups])
    )
    for epoch in range(1, epochs + 1):
        train.train_epoch(learner, made_up_clips(), SPLIT.train, epoch)
    return rates


# ----------------------------------------------------------------------------------------- one step


def test_a_step_by_hand():
    """Two steps of AdamW on the mean cross-entropy of a batch, written out."""
    learner = learner_of(epochs=1, batch_size=4, lr=0.01)
    expected = {n: p.detach().double() for n, p in learner.network.named_parameters()}
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in expected.items()}
    clips = made_up_clips()
    copy = petl.apply(tiny_ast(), "houlsby_par").double()
    torch.manual_seed(5)
    order = torch.randperm(8)
    losses = []
    for step, batch in enumerate(order.split(4)):
        copy.load_state_dict(expected)
        copy.zero_grad()
        loss = F.cross_entropy(copy(clips.features[batch].double()), clips.labels[batch])
        loss.backward()
        losses.append(loss.item())
        rate = 0.01 * (1 + math.cos(math.pi * step / 2)) / 2
        for name, parameter in copy.named_parameters():
            if parameter.grad is None:
                continue
            mean, square = moments[name]
            mean.mul_(0.9).add_(0.1 * parameter.grad)
            square.mul_(0.98).add_(0.02 * parameter.grad**2)
            corrected = mean / (1 - 0.9 ** (step + 1))
            size = (square / (1 - 0.98 ** (step + 1))).sqrt() + 1e-6
            value = expected[name]
            expected[name] = value - rate * 0.1 * value - rate * corrected / size

    torch.manual_seed(5)
    found = train.train_epoch(learner, clips, SPLIT.train, 1)
    torch.testing.assert_close(found, torch.tensor(losses), rtol=1e-5, atol=1e-6)
    for name, parameter in learner.network.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=0, atol=2e-4)


def test_micro_batches_are_the_same_step():
    whole = learner_of()
    pieces = learner_of()
    pieces.machine = Machine(CPU.device, micro_batch=3)
    for learner in (whole, pieces):
        torch.manual_seed(1)
        train.train_epoch(learner, made_up_clips(), SPLIT.train, 1)
    for a, b in zip(whole.network.parameters(), pieces.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_pieces_of_a_batch():
    """Masked clips, each of them once, whatever the size of a piece."""
    clips = made_up_clips()
    batch = torch.tensor([3, 1, 7, 5])
    found = []
    for micro_batch in (None, 3):
        machine = Machine(CPU.device, micro_batch)
        torch.manual_seed(2)
        found.append(list(train.pieces(batch, clips, settings_of(mask_frames=10), machine)))
    (x, y, weight), *rest = found[0]
    assert not rest and weight == 1 and y.tolist() == clips.labels[batch].tolist()
    masked = (x == 0) & (clips.features[batch] != 0)
    assert masked.any() and torch.equal(x[~masked], clips.features[batch][~masked])
    assert [len(piece[1]) for piece in found[1]] == [3, 1]
    assert torch.equal(torch.cat([piece[0] for piece in found[1]]), x)


def test_the_weights_of_classes():
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    weights = train.weights_of_classes(labels, torch.arange(4))  # three clips of class 0, one of 1
    assert weights[:2].tolist() == pytest.approx([4 / (2 * 3), 4 / 2])


# ------------------------------------------------------------------------ five changes by a reader


def test_gradient_clipping():
    """Before the step the gradients have the length that was asked for, and not without the
    patch.
    """
    step = (
        "        scaler.step(optimizer)  # optimizer.step(), unless gradients of float16"
        " overflowed\n"
    )
    clip = (
        "        scaler.unscale_(optimizer)\n"
        "        nn.utils.clip_grad_norm_(learner.network.parameters(), 1e-3)\n"
    )
    lengths = {}
    for name, module in (("plain", train), ("clipped", patched(step, clip + step))):
        learner = learner_of(module)
        lengths[name] = []

        def remember(optimizer, *_, into=lengths[name]):
            groups = optimizer.param_groups
            gradients = [p.grad for group in groups for p in group["params"]]
            into.append(nn.utils.get_total_norm(gradients).item())

        learner.optimizer.register_step_pre_hook(remember)
        module.train_epoch(learner, made_up_clips(), SPLIT.train, 1)
    assert min(lengths["plain"]) > 1e-2
    assert lengths["clipped"] == pytest.approx([1e-3, 1e-3], rel=1e-3)


def test_warm_up(monkeypatch):
    """Another function of the step in place of `cosine`."""
    monkeypatch.setattr(
        train, "cosine", lambda first_rate, step, steps: first_rate * (step + 1) / steps
    )
    rates = rates_of(learner_of(epochs=2, batch_size=4, lr=0.4), epochs=2)
    assert [method for method, _ in rates] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert [head for _, head in rates] == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_label_smoothing():
    """The loss of the first step, by hand: 0.9 of the weight on the label, 0.1 on all classes."""
    module = patched('reduction="sum")', 'reduction="sum", label_smoothing=0.1)')
    learner = learner_of(module)
    clips = made_up_clips()
    logits = learner.network(clips.features[:4])
    log_probabilities = logits.log_softmax(1)
    targets = 0.9 * F.one_hot(clips.labels[:4], 3) + 0.1 / 3
    expected = -(targets * log_probabilities).sum(1).mean()
    losses = module.train_epoch(learner, clips, [0, 1, 2, 3], 1)
    assert losses.tolist() == pytest.approx([expected.item()], rel=1e-5)
    assert abs(expected - F.cross_entropy(logits, clips.labels[:4])) > 1e-4


def test_two_learning_rates():
    """Head and adapters with rates of their own, and both are annealed to zero."""
    learner = learner_of(epochs=2, batch_size=4, lr=0.01, head_lr=0.1)
    groups = [group["params"] for group in learner.optimizer.param_groups]
    assert [p.data_ptr() for p in groups[1]] == [
        p.data_ptr() for p in learner.network.head.parameters()
    ]
    trained = [p for p in learner.network.parameters() if p.requires_grad]
    assert len(groups[0]) + len(groups[1]) == len(trained)
    rates = rates_of(learner, epochs=2)
    annealed = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert [adapters for adapters, _ in rates] == pytest.approx(
        [0.01 * share for share in annealed]
    )
    assert [head for _, head in rates] == pytest.approx([0.1 * share for share in annealed])


def test_two_learning_rates_after_an_interruption():
    """The optimizer's state has the annealed rates; the first ones are kept all the same."""
    before = learner_of(epochs=2, batch_size=4, lr=0.2, head_lr=0.4)
    train.train_epoch(before, made_up_clips(), SPLIT.train, 1)
    after = learner_of(epochs=2, batch_size=4, lr=0.2, head_lr=0.4)
    after.load_state(before.state())
    rates = []
    after.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append([group["lr"] for group in optimizer.param_groups])
    )
    train.train_epoch(after, made_up_clips(), SPLIT.train, 2)
    shares = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in (2, 3)]
    assert rates == [pytest.approx([0.2 * share, 0.4 * share]) for share in shares]


class Remembered(train.Progress):
    """Keeps what the loop tells it."""

    def __init__(self):
        self.accuracies = []

    def validated(self, epoch, accuracy, state):
        self.accuracies.append(accuracy)


ANSWERS = [  # logits of the two validation clips, whose labels are 2 and 0, after each epoch
    [[0.0, 0.0, 0.1], [0.1, 0.0, 0.0]],  # both right, hardly
    [[0.0, 0.0, 9.0], [0.0, 0.5, 0.4]],  # one right, with a smaller loss
    [[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]],
]


def best_of_three_epochs(module, monkeypatch) -> dict:
    answers = iter(ANSWERS)

    def evaluate(learner, clips, indices):
        logits = next(answers) if indices == SPLIT.val else [[0.0, 0.0, 0.0]] * len(indices)
        return torch.tensor(logits), clips.labels[indices]

    monkeypatch.setattr(module, "evaluate", evaluate)
    log = Remembered()
    best, *_ = module.train_fold(learner_of(module, epochs=3), made_up_clips(), SPLIT, 1, log)
    assert log.accuracies == [100, 50, 0]
    return best


def test_another_choice_of_the_best_epoch(monkeypatch):
    """The smallest loss on the validation clips in place of the highest accuracy."""
    assert best_of_three_epochs(train, monkeypatch)["epoch"] == 1
    module = patched(
        "score = score_of(logits, labels, settings.choose_by)",
        "score = -F.cross_entropy(logits, labels).item()",
    )
    best = best_of_three_epochs(module, monkeypatch)
    assert best["epoch"] == 2 and best["score"] < 0 and best["accuracy"] == 50


def test_the_first_of_equal_epochs_and_the_last_without_validation():
    assert train.is_better(50.0, None)
    assert train.is_better(50.1, {"score": 50.0})
    assert not train.is_better(50.0, {"score": 50.0})
    assert train.is_better(None, {"score": None})


# ----------------------------------------------------------------------------- ready for a GPU


@pytest.mark.parametrize("method", petl.METHODS)
def test_an_epoch_neither_waits_for_a_gpu_nor_mixes_devices(method):
    """An epoch on the device `meta`, whose tensors have no numbers.

    A number that is asked for (`item`, `tolist`, `cpu`, a condition) is an error there, and so is a
    product with a tensor of another device.
    """
    device = torch.device("meta")
    machine = Machine(device)
    model = machine.prepare(petl.apply(tiny_ast(), method), "float32")
    features = torch.empty(8, 36, 36, dtype=torch.float16, device=device)
    clips = Clips(features, torch.zeros(8, dtype=torch.long, device=device))
    learner = train.Learner(model, settings_of(mask_frames=10), machine)
    losses = train.train_epoch(learner, clips, SPLIT.train, 1)
    assert losses.shape == (2,) and losses.device == device
    for ask in (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.cpu, bool):
        with pytest.raises(RuntimeError):
            ask(losses[0])
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 36, 36))


@pytest.mark.parametrize("mistake", ["loss.item()", "loss.cpu()", "loss = loss + torch.ones(1)"])
def test_mistakes_are_found_on_meta(mistake):
    """What the test above is for: each of these would slow a GPU down, or fail on it."""
    line = "            losses[step] += loss.detach()\n"
    module = patched(line, f"            {mistake}\n{line}")
    device = torch.device("meta")
    model = petl.apply(tiny_ast(), "lora").to(device)
    clips = Clips(
        torch.empty(8, 36, 36, device=device), torch.zeros(8, dtype=torch.long, device=device)
    )
    learner = module.Learner(model, settings_of(), Machine(device))
    with pytest.raises(RuntimeError):
        module.train_epoch(learner, clips, SPLIT.train, 1)
