"""The chapters of tutorial/: whole, short, with outputs, about code that exists; and checks that
see usual mistakes.
"""

import ast
import importlib
import inspect
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.linalg import svd

import data

ROOT = Path(data.__file__).parent
TUTORIAL = ROOT / "tutorial"
sys.path.append(str(TUTORIAL))
checks, show = importlib.import_module("checks"), importlib.import_module("show")
CHAPTERS = sorted(TUTORIAL.glob("*.ipynb"))
OURS = {file.stem for file in ROOT.glob("*.py")} | {"sounds", "support", "tools", "checks", "show"}


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def text_of(cell: dict) -> str:
    return "".join(cell["source"])


@pytest.fixture(params=CHAPTERS, ids=lambda path: path.stem)
def chapter(request) -> Path:
    return request.param


def test_a_chapter_is_short_and_was_executed_from_top_to_bottom(chapter):
    assert chapter.stat().st_size < 300_000
    assert sum(len(text_of(cell).split()) for cell in cells(chapter, "markdown")) <= 1800
    code = cells(chapter, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = [output["output_type"] for cell in code for output in cell["outputs"]]
    assert "error" not in kinds and len(kinds) > 5
    assert all(output.get("name") != "stderr" for cell in code for output in cell["outputs"])


def test_every_exercise_is_open_and_its_solution_is_right(chapter):
    said = {"check": {}, "solved": {}}
    for cell in cells(chapter, "code"):
        output = "".join(line for out in cell["outputs"] for line in out.get("text", []))
        for function, name in re.findall(r"\b(check|solved)\(checks\.(\w+),", text_of(cell)):
            said[function][name] = output
    assert 2 <= len(said["check"]) <= 3 and said["check"].keys() == said["solved"].keys()
    assert all(
        output == "Still open: answer above, then run this cell again.\n"
        for output in said["check"].values()
    )
    assert all(set(output.split("\n")) == {"Right.", ""} for output in said["solved"].values())


def names_in(tree: ast.AST) -> set[str]:
    """Dotted names of our modules and of what is imported from them."""
    known, found = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            known |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
    for node in ast.walk(tree):
        first, _, rest = (
            ast.unparse(node).partition(".") if isinstance(node, ast.Attribute) else ("", "", "")
        )
        if first in known and re.fullmatch(r"[\w.]+", rest):
            found.add(f"{known[first]}.{rest}")
    return {name for name in (*known.values(), *found) if name.split(".")[0] in OURS}


def resolve(name: str):
    """The object of a dotted name; AttributeError or ModuleNotFoundError if there is none."""
    first, *rest = name.split(".")
    thing = importlib.import_module(first)
    for part in rest:
        if inspect.ismodule(thing) and not hasattr(thing, part):
            importlib.import_module(f"{thing.__name__}.{part}")
        thing = getattr(thing, part)
    return thing


def test_a_chapter_names_what_exists(chapter):
    for cell in cells(chapter, "code"):
        for name in names_in(ast.parse(text_of(cell))):
            resolve(name)
    for cell in cells(chapter, "markdown"):
        for name in re.findall(r"`([\w.]+\.\w+)`", text_of(cell)):
            if name.split(".")[0] in OURS and not name.endswith(".py"):
                resolve(name)
        for file in re.findall(r"`([\w/]+\.py)`", text_of(cell)):
            assert (ROOT / file).is_file(), file


def windows(text: str) -> set[tuple[str, ...]]:
    """Every three lines of code that follow each other, without imports, comments and lines of a
    word or two.
    """
    lines = [line.strip() for line in text.splitlines()]
    lines = [
        line for line in lines if len(line) > 12 and not line.startswith(("import ", "from ", "#"))
    ]
    return set(zip(lines, lines[1:], lines[2:], strict=False))


def test_a_chapter_copies_no_code(chapter):
    files = [
        file
        for pattern in ("*.py", "sounds/*.py", "support/*.py", "tools/*.py")
        for file in ROOT.glob(pattern)
    ]
    ours = set().union(*(windows(file.read_text()) for file in files))
    for cell in cells(chapter, "code"):
        copied = windows(text_of(cell)) & ours
        assert not copied, f"call it instead: {sorted(copied)[0]}"


# --------------------------------------------------------------------------------------- the checks


def normalised(fb):
    return (fb - data.MEAN) / (2 * data.STD)


def columns_from(position, grid, steps, start=0):
    kept = position[:, 2:].unflatten(1, grid)[:, :, start : start + steps]
    return torch.cat([position[:, :2], kept.flatten(1, 2)], dim=1)


def post_norm(block, x):
    x = block.norm1(x + block.attn(x))
    return block.norm2(x + block.ffn(x))


def means(model, x, from_first=False, front=2):
    first = tokens = model.embed(x)
    found = [tokens[:, front:].mean(1)]
    for block in model.blocks:
        tokens = block(first if from_first else tokens)
        found.append(tokens[:, front:].mean(1))
    return torch.stack(found, dim=1)


def sides(down_zero: bool, up_zero: bool, bias_zero: bool = True):
    """A writer of exercise 7.3: which of the two sides starts at zero."""

    def make(dim, rank):
        down, up = torch.nn.Linear(dim, rank), torch.nn.Linear(rank, dim)
        for linear, zero in ((down, down_zero), (up, up_zero)):
            if zero:
                torch.nn.init.zeros_(linear.weight)
                if bias_zero:
                    torch.nn.init.zeros_(linear.bias)
        return down, up

    return make


def gate(q, k, p, scale=True, n=None):
    scores = q @ torch.cat([p, k], dim=2).mT / (q.shape[-1] ** 0.5 if scale else 1)
    return scores.softmax(-1)[..., : n or p.shape[2]].sum(-1, keepdim=True)


def laid_out(conv, h, grid):
    image = h[:, 2:].transpose(1, 2).unflatten(2, grid)
    return torch.cat([h[:, :2], conv(image).flatten(2).transpose(1, 2)], dim=1)


def differences(u, grid, dim=2):
    step = u[:, 2:].unflatten(1, grid)
    step = step - step.roll(1, dim)
    return torch.cat([torch.zeros_like(u[:, :2]), step.flatten(1, 2)], dim=1)


class Volume(torch.nn.Module):
    """A writer's wrapper of exercise 11.3."""

    def __init__(self, wrapped, start=1.0, of_input=False):
        super().__init__()
        self.wrapped, self.factor, self.of_input = (
            wrapped,
            torch.nn.Parameter(torch.tensor(start)),
            of_input,
        )

    def forward(self, u):
        return self.wrapped(self.factor * u) if self.of_input else self.factor * self.wrapped(u)


def volumes(model, **options):
    for block in model.blocks:
        block.attn = Volume(block.attn, **options)
    return model


def t_interval(gains, t=3.18245):
    half = t * gains.std() / len(gains) ** 0.5
    return gains.mean() - half, gains.mean() + half


WRONG = [  # judge, an answer, a word of what is said of it
    (checks.frames_of_a_second, 100, "reach over"),
    (checks.frames_of_a_second, 97, "first frame"),
    (checks.change_of_half_the_volume, 0.25, "logarithm"),
    (checks.change_of_half_the_volume, -0.6931, "square"),
    (checks.change_of_half_the_volume, -6.0206, "decibels"),
    (
        checks.padded_input,
        lambda fb, n: F.pad(normalised(fb), (0, 0, 0, n - fb.shape[1])),
        "after padding",
    ),
    (
        checks.padded_input,
        lambda fb, n: 2 * normalised(F.pad(fb, (0, 0, 0, n - fb.shape[1]))),
        "2 STD",
    ),
    (
        checks.padded_input,
        lambda fb, n: normalised(F.pad(fb, (0, 0, n - fb.shape[1], 0))),
        "end of the clip",
    ),
    (
        checks.padded_input,
        lambda fb, n: normalised(F.pad(fb, (0, 0, 0, max(0, n - fb.shape[1])))),
        "cut as well",
    ),
    (checks.tokens_of_five_seconds, 589, "distillation"),
    (checks.tokens_of_five_seconds, 250, "overlap"),
    (checks.number_of_a_token, 32, "in front"),
    (checks.number_of_a_token, 65, "order of time"),
    (checks.cut_positions, lambda p, grid, n: p[:, : 2 + grid[0] * n], "flat table"),
    (checks.cut_positions, columns_from, "first columns"),
    (
        checks.cut_positions,
        lambda p, grid, n: columns_from(p, grid, n, (grid[1] - n) // 2),
        "half of what is left",
    ),
    (
        checks.cut_positions,
        lambda p, grid, n: columns_from(p, grid, n, n // 2),
        "middle of the table",
    ),
    (checks.sum_of_weights, 1.0, "one row"),
    (checks.attention, lambda q, k, v: (q @ k.mT).softmax(-1) @ v, "scale is missing"),
    (
        checks.attention,
        lambda q, k, v: (q @ k.mT / q.shape[-1] ** 0.5).softmax(-2) @ v,
        "wrong axis",
    ),
    (checks.attention, lambda q, k, v: q @ k.mT / q.shape[-1] ** 0.5 @ v, "softmax is missing"),
    (
        checks.attention,
        lambda q, k, v: (k @ q.mT / q.shape[-1] ** 0.5).softmax(-1) @ v,
        "exchanged",
    ),
    (checks.block, lambda b, x: x + b.ffn(b.norm2(x + b.attn(b.norm1(x)))), "second sum"),
    (checks.block, lambda b, x: x + b.attn(b.norm1(x)) + b.ffn(b.norm2(x)), "parallel"),
    (checks.block, lambda b, x: b.ffn(b.norm2(b.attn(b.norm1(x)))), "residual"),
    (checks.block, lambda b, x: post_norm(b, x), "post-norm"),
    (checks.parameters_of_a_head, 1280, "bias"),
    (
        checks.standardised,
        lambda a, b: ((a - a.mean(0)) / a.std(0), (b - b.mean(0)) / b.std(0)),
        "own statistics",
    ),
    (
        checks.standardised,
        lambda a, b: ((a - a.mean()) / a.std(), (b - a.mean()) / a.std()),
        "own mean",
    ),
    (
        checks.means_of_layers,
        lambda model, x: means(model, x, from_first=True),
        "not the first tokens",
    ),
    (checks.means_of_layers, lambda model, x: means(model, x)[:, 1:], "before the first block"),
    (checks.means_of_layers, lambda model, x: means(model, x, front=0), "two tokens in front"),
    (checks.rate_at_a_quarter, 0.75, "straight line"),
    (checks.rate_at_a_quarter, 0.7071, "halved"),
    (checks.best_weights, lambda model: model.state_dict(), "live tensors"),
    (checks.best_weights, lambda model: dict(model.state_dict()), "live tensors"),
    (checks.best_weights, lambda model: list(model.parameters()), "names"),
    (
        checks.masked_batch,
        lambda x, draws, training: data.spec_augment(x, draws),
        "masks on test clips",
    ),
    (checks.masked_batch, lambda x, draws, training: x, "should be masked"),
    (checks.parameters_of_lora, 110_592, "both count"),
    (checks.parameters_of_lora, 18_432, "every block"),
    (checks.merged_weight, lambda weight, a, b, scale: weight + b @ a, "scale is missing"),
    (checks.merged_weight, lambda weight, a, b, scale: weight + scale * (a.T @ b.T), "transposed"),
    (checks.merged_weight, lambda weight, a, b, scale: scale * b @ a, "replace"),
    (
        checks.low_rank,
        lambda update, r: svd(update)[0][:, :r] @ svd(update)[2][:r],
        "singular values are missing",
    ),
    (checks.low_rank, lambda update, r: update, "whole update"),
    (checks.parameters_of_adapters, 12 * (2 * 768 * 12 + 12 + 768), "LayerNorm"),
    (checks.parameters_of_adapters, 20_748, "one block"),
    (checks.adapter_in_sequence, lambda S, A, u: A(S(u)), "residual path is missing"),
    (checks.adapter_in_sequence, lambda S, A, u: S(u) + A(u), "parallel"),
    (checks.sides_of_a_bottleneck, sides(True, True), "both sides"),
    (checks.sides_of_a_bottleneck, sides(False, False), "no side"),
    (checks.sides_of_a_bottleneck, sides(False, True, bias_zero=False), "bias is left"),
    (checks.parameters_of_a_convolution, 12 * 12 * 9 + 12, "3 x 3"),
    (checks.parameters_of_a_convolution, 48, "depthwise"),
    (checks.gated, lambda z: z[..., 4:] * z[..., :4].sigmoid(), "second half"),
    (checks.gated, lambda z: z[..., :4] * z[..., 4:].softmax(-1), "compete"),
    (
        checks.convolution_over_the_grid,
        lambda conv, h, grid: laid_out(conv, h, grid[::-1]),
        "(F, T)",
    ),
    (
        checks.convolution_over_the_grid,
        lambda conv, h, grid: laid_out(conv, h, grid)[:, 2:],
        "missing",
    ),
    (checks.parameters_of_deep_prompts, 25 * 768, "each block"),
    (checks.gate_of_equal_scores, 24 / (24 + 590), "one half are keys"),
    (checks.gate_of_a_prefix, lambda q, k, p: gate(q, k, p, scale=False), "scale"),
    (checks.gate_of_a_prefix, lambda q, k, p: 1 - gate(q, k, p), "1 - lambda"),
    (
        checks.gate_of_a_prefix,
        lambda q, k, p: (q @ p.mT).softmax(-1).sum(-1, keepdim=True),
        "prefix alone",
    ),
    (checks.half_of_an_interval, 1.96 * 2 / 3**0.5, "1.96"),
    (checks.interval_of_differences, lambda a, b: t_interval(a - b, t=1.96), "1.96"),
    (checks.interval_of_differences, lambda a, b: t_interval(b - a), "first - second"),
    (checks.few_shot_draw, lambda labels, shots, seed: [*range(shots)], "9, not 3"),
    (checks.few_shot_draw, lambda labels, shots, seed: [*range(1, 10)], "each class by itself"),
    (checks.few_shot_draw, lambda labels, *_: [*range(9)], "every seed"),
    (checks.megabytes_of_a_file, (248_976 + 39_986) / 1e6, "four bytes"),
    (checks.differences_in_time, lambda u, grid: differences(u, grid), "roll"),
    (
        checks.differences_in_time,
        lambda u, grid: F.pad(u.diff(dim=1), (0, 0, 1, 0)),
        "along the sequence",
    ),
    (checks.learned_volume, lambda model: model, "nothing trains"),
    (checks.learned_volume, lambda model: volumes(model, start=0.5), "pretrained function"),
    (checks.learned_volume, lambda model: volumes(model, of_input=True), "its output"),
    (checks.accuracy_of_the_largest, 33.33, "chance"),
    (
        checks.folds_by_recording,
        lambda recordings, n: [i % n for i in range(len(recordings))],
        "leak",
    ),
    (checks.folds_by_recording, lambda recordings, n: [0] * len(recordings), "empty"),
    (
        checks.balanced_accuracy,
        lambda truth, said: 100 * (truth == said).float().mean(),
        "plain accuracy",
    ),
]


@pytest.mark.parametrize(("judge", "answer", "word"), WRONG)
def test_checks_say_what_is_wrong(judge, answer, word, capsys):
    show.check(judge, answer)
    said = capsys.readouterr().out
    assert said.startswith("Not yet: ") and word in said
    with pytest.raises(ValueError, match=judge.__name__):
        show.solved(judge, answer)


def test_every_check_is_used_and_is_tried_with_wrong_answers():
    judges = {
        name
        for name, thing in vars(checks).items()
        if inspect.isfunction(thing) and name != "compare"
    }
    judges = {
        name
        for name in judges
        if inspect.getmodule(getattr(checks, name)) is checks and name[0] != "_"
    }
    used = {
        name
        for path in CHAPTERS
        for cell in cells(path, "code")
        for name in re.findall(r"check\(checks\.(\w+),", text_of(cell))
    }
    assert judges == used == {judge.__name__ for judge, _, _ in WRONG}


@pytest.mark.parametrize("answer", [None, ..., lambda *_: None, lambda *_: ...])
def test_no_answer_is_open(answer, capsys):
    show.check(checks.padded_input, answer)
    assert capsys.readouterr().out.startswith("Still open")


def test_compare():
    right, wrong = torch.ones(2, 3), {"twice.": 2 * torch.ones(2, 3)}
    assert show.compare(right + 1e-6, right, wrong) is None
    assert show.compare(right * 2, right, wrong) == "twice."
    assert "(2, 3)" in show.compare(right.T, right, wrong)
    assert "none of the usual" in show.compare(right * 3, right, wrong)
