"""What the chapters share: code of the repository on the page, sounds and pictures, runs of
train.py, exercises.
"""

import ast
import inspect
import sys
import tempfile
import textwrap
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the chapters import petl, data, ... from here

STYLE = {
    "figure.dpi": 90,
    "figure.constrained_layout.use": True,
    "image.aspect": "auto",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


# ------------------------------------------------------------------------------------------- to see


def source(*objects) -> None:
    """Show functions, classes or methods as they stand in the repository; a constant as (module,
    "NAME").
    """
    from IPython.display import Markdown, display  # here, as the tests need the exercises alone

    for item in objects:
        module, code = (
            item if isinstance(item, tuple) else (inspect.getmodule(item), inspect.getsource(item))
        )
        if isinstance(item, tuple):
            text = inspect.getsource(module)
            nodes = [
                node
                for node in ast.parse(text).body
                if isinstance(node, ast.Assign | ast.AnnAssign)
            ]
            names = {
                ast.unparse(getattr(node, "target", None) or node.targets[0]): node
                for node in nodes
            }
            code = ast.get_source_segment(text, names[code])
        file = Path(module.__file__).resolve().relative_to(ROOT).as_posix()
        display(Markdown(f"`{file}`\n```python\n{textwrap.dedent(code).rstrip()}\n```"))


def hear(wave) -> None:
    """A player for one waveform at 16 kHz."""
    from IPython.display import Audio, display

    display(Audio(wave, rate=16_000))


def panels(rows: int = 1, columns: int = 1, height: float = 2.2, **options):
    """A figure as wide as the page and its axes, an array if there are several. `height`: of a row,
    in inches.
    """
    from matplotlib import pyplot as plt

    plt.rcParams.update(STYLE)
    return plt.subplots(rows, columns, figsize=(8.4, height * rows), **options)


def spectrogram(axis, features, title: str = "", **options):
    """Features (frames, bands) with time to the right and pitch upwards."""
    image = axis.imshow(
        features.T, origin="lower", cmap="magma", interpolation="nearest", **options
    )
    axis.set(title=title, xlabel="frame (10 ms)", ylabel="Mel band")
    return image


# ------------------------------------------------------------------------------------------- to run


def run(*words):
    """`python train.py WORDS`, quietly and with its results in a temporary folder; one seed, one
    fold.

    Returns `accuracy` in percent, `history` (a dict of numbers per epoch), `model`, tested and in
    evaluation mode, and `result`, all that result.json has.
    """
    import train
    from load_weights import load_trained
    from support.checkpoints import read_header

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        args = train.parse([str(word) for word in (*words, "--out", folder)])
        result = train.run(args)
        file = next(Path(folder).glob("*/*/seed*/fold*.safetensors"))
        rows = read_header(file)["record"]["history"]
        history = [
            {name: float(row[name] or "nan") for name in ("epoch", "loss", "accuracy")}
            for row in rows
        ]
        return SimpleNamespace(
            accuracy=result["accuracy"], history=history, model=load_trained(file), result=result
        )


def quick(method, shots: int, epochs: int, seed: int = 0, tests: int = 500):
    """Train on the demo by `train.train_fold`, without validation clips, and test on `tests` of the
    1,000 test clips.

    method: a name or a Method. Returns `accuracy` in percent, `right` (tests,), whether each was
    told, `trained`, how many parameters besides the head, and `model` in evaluation mode.
    """
    import data
    import petl
    import train
    from load_weights import load_ast, to_dict
    from support.files import default_cache_dir
    from support.variants import narrowed

    cpu, cache = torch.device("cpu"), default_cache_dir()
    dataset = data.load_dataset("demo", None, cache)
    clips, _ = data.load_clips(dataset, 98, cpu, cache, skip_bad=False)
    split = data.folds_of(dataset, seed, shots=shots)[1]
    split = data.Split(split.train, [], split.test[:: len(split.test) // tests])
    pretrained = load_ast("demo", 98, len(dataset.classes))
    if isinstance(method, str):
        method = petl.find(method)
    method = narrowed(method, pretrained.config.dim)
    settings = train.Settings(
        dataset="demo",
        weights="demo",
        backbone="",
        method=to_dict(method),
        pool="mean",
        seed=seed,
        shots=shots,
        clips="",
        n_frames=98,
        epochs=epochs,
        batch_size=16,
        lr=method.lr,
        head_lr=method.head_lr or method.lr,
        mask_frames=0,
        dtype="float32",
    )
    machine = train.Machine(cpu)
    with redirect_stdout(StringIO()):
        model = train.adapted(pretrained, method, 1, settings, machine)
        network, inputs = train.skip_frozen(model, clips, settings, machine)
        learner = train.Learner(network, settings, machine)
        _, logits, labels = train.train_fold(learner, inputs, split, 1, train.Progress())
    right = logits.argmax(1) == labels
    accuracy, trained = train.score_of(logits, labels, "accuracy"), petl.count(model)["petl"]
    return SimpleNamespace(accuracy=accuracy, right=right, trained=trained, model=model.eval())


# ---------------------------------------------------------------------------------------- exercises


class Open(Exception):
    """There is no answer yet: None, ..., or a function that returns one of them."""


def given(answer):
    """The answer, if there is one."""
    if answer is None or answer is ...:
        raise Open
    return answer


def compare(answer, right, mistakes: dict | None = None) -> str | None:
    """None if `answer` is `right`, else what is wrong with it. `mistakes`: {what to say: what who
    makes it gets}.
    """
    answer, right = (
        torch.as_tensor(given(answer)).detach().double(),
        torch.as_tensor(right).detach().double(),
    )
    for word, wrong in {None: right, **(mistakes or {})}.items():
        wrong = torch.as_tensor(wrong).detach().double()
        if answer.shape == wrong.shape and torch.allclose(answer, wrong, rtol=1e-3, atol=1e-5):
            return word
    if answer.shape != right.shape:
        return f"the shape should be {tuple(right.shape)}, and yours is {tuple(answer.shape)}."
    return (
        "the value is not right, and it is none of the usual mistakes (a number: to a thousandth)."
    )


def check(judge, answer) -> None:
    """Print what `judge`, a function of checks.py, says of the reader's answer: open, right, or
    what is wrong.
    """
    try:
        wrong = judge(given(answer))
    except Open:
        print("Still open: answer above, then run this cell again.")
    else:
        print(f"Not yet: {wrong}" if wrong else "Right.")


def solved(judge, answer) -> None:
    """The same check for the solution at the end of a chapter: a ValueError unless it is right."""
    if wrong := judge(answer):
        raise ValueError(f"{judge.__name__}: {wrong}")
    print("Right.")
