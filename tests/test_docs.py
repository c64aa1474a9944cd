"""What the pages say can be done can be done: links, commands, examples and tables."""

import argparse
import csv
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import SMALL_AST, make_folder, of_run, save_random, write_sound

import petl
import train
from ast_model import AST, ASTConfig
from data import load_dataset
from support.checkpoints import read_header
from tools import experiments, export
from tools.cells import TARGETS
from tools.predict import load

ROOT = Path(train.__file__).parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("tutorial/*.ipynb")])
README = (ROOT / "README.md").read_text(encoding="utf-8")


def text_of(page: Path) -> str:
    """The text of a page. A notebook's is that of its cells without code."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def blocks_of(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


# -------------------------------------------------------------------------------------------- links


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = text_of(page)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def test_files_of_this_repository_that_a_text_names_are_there():
    """In pages, in code, and so in the messages of programs."""
    folders = "docs|results|sounds|support|tests|tools|tutorial|weights"
    name = rf"(?<![\w./-])(?:{folders})/[\w./-]*\.(?:csv|ipynb|json|md|npz|png|py|svg)\b"
    code = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("tests/core/*.py")]
    for file in [*PAGES, *code]:
        for found in set(re.findall(name, text_of(file))):
            assert (ROOT / found).exists(), f"{file}: {found}"


# ----------------------------------------------------------------------------------------- commands


class Parsed(BaseException):
    """Raised in place of the work of a command whose options are right."""


def commands_of(text: str) -> list[list[str]]:
    """The commands of train.py and of tools in the bash blocks of a page, as lists of words."""
    found = []
    for block in blocks_of(text, "bash"):
        variables = {}
        for line in block.replace("\\\n", " ").splitlines():
            for name in set(re.findall(r"\$(\w+)", line)):
                line = line.replace(f"${name}", variables.get(name, "1"))
            words = shlex.split(line, comments=True)
            if len(words) == 1 and re.match(r"[A-Z]+=", words[0]):
                name, _, value = words[0].partition("=")
                variables[name] = value
            for i, word in enumerate(words):
                if word == "train.py" or (word.startswith("tools.") and words[i - 1] == "-m"):
                    found.append(words[i:])
    return found


PRINTED = [(page.name, command) for page in PAGES for command in commands_of(text_of(page))]


@pytest.mark.parametrize(("page", "words"), PRINTED, ids=[" ".join(words) for _, words in PRINTED])
def test_options_of_commands_are_right(page, words, monkeypatch):
    monkeypatch.setitem(petl.METHODS, "gain", petl.METHODS["lora"])  # the README's example
    program, *options = words
    if program == "train.py":
        train.parse(options)
        return
    if program == "tools.experiments" and options[0] not in ("compare", "keep", "show"):
        experiments.parse(options)
        return
    for name in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, name)

        def parse_only(self, *arguments, parse=parse):
            parse(self, *arguments)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, name, parse_only)
    with pytest.raises(Parsed):
        importlib.import_module(program).main(options)


def test_pages_have_commands():
    assert len(PRINTED) > 30 and {"README.md", "own_sounds.md"} <= {page for page, _ in PRINTED}


# ----------------------------------------------------------------------------------------- examples


def example(heading: str, text: str = README) -> str:
    """The first Python block below a heading."""
    return blocks_of(text.partition(f"## {heading}\n")[2], "python")[0]


def test_the_example_in_your_code(tmp_path, monkeypatch, capsys):
    """With random weights in place of the download."""
    monkeypatch.chdir(tmp_path)
    code = example("Use it in your code")
    assert '"audioset"' in code
    names = {}
    exec(code.replace('"audioset"', '"random:demo"'), names)
    assert "'head'" in capsys.readouterr().out
    assert names["model"].method.name == "lora" and not names["model"].training
    b = names["model"].blocks[0].attn.q.b.weight  # zero before the step
    assert b.abs().max() > 0


def test_the_example_of_a_method(tmp_path):
    """At the end of petl_more.py it trains with the options of train.py, and predicts."""
    later_methods = (ROOT / "petl_more.py").read_text()
    (tmp_path / "petl_more.py").write_text(later_methods + example("Add a method"))
    make_folder(tmp_path / "sounds")
    train = ["-c", "import sys, train; sys.exit(train.main())", "--method", "gain"]
    train += ["--dataset", "folder", "--data-dir", "sounds", "--weights", SMALL_AST]
    train += ["--epochs", "1", "--cache-dir", "cache"]
    predict = ["-m", "tools.predict", "runs/folder/gain/seed0", "sounds"]
    for command in (train, predict):
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    header = read_header(tmp_path / "runs/folder/gain/seed0/fold1.safetensors")
    assert header["method"]["parts"] == [{"part": "Gains"}]
    assert header["parameters"]["petl"] == 2 * 64


def test_the_example_of_predictions(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/demo/lora/seed0"
    run.mkdir(parents=True)
    save_random(run / "fold1.safetensors", "lora", **of_run(1))
    write_sound(tmp_path / "recording.wav")
    write_sound(tmp_path / "two_hours.flac", seconds=2)
    page = (ROOT / "docs/predict_and_export.md").read_text(encoding="utf-8")
    exec(example("From Python", page), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5 and lines[-1].startswith("0.0 2.0")


def test_the_example_of_folds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ann_1", "ann_2", "bob_1", "cid_1", "dan_1", "eve_1", "fay_1"):
        for label in ("dog", "rain"):
            write_sound(tmp_path / "my_sounds" / label / f"{name}.wav")
    page = (ROOT / "docs/own_sounds.md").read_text(encoding="utf-8")
    exec(example("How good is it?", page), {})
    dataset = load_dataset("csv", tmp_path / "my.csv", tmp_path)
    tested = [[dataset.groups[i] for i in split.test] for split in dataset.folds.values()]
    names = [["ann", "ann"], ["bob", "fay"], ["cid"], ["dan"], ["eve"]]
    assert tested == [2 * each for each in names]


def test_the_example_of_onnx(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_random(tmp_path / "fold1.safetensors", "lora", **of_run(1))
    write_sound(tmp_path / "recording.wav")
    command = ["export", "fold1.safetensors", "--to", "onnx", "--out", "model.onnx"]
    assert export.main(command) == 0
    page = (ROOT / "docs/predict_and_export.md").read_text(encoding="utf-8")
    capsys.readouterr()
    exec(example("Export", page), {})
    best, probability = capsys.readouterr().out.rsplit(maxsplit=1)
    answer = load("fold1.safetensors")("recording.wav")
    assert best == answer.classes[0][0]
    assert float(probability) == pytest.approx(answer.classes[0][1], abs=1e-4)


# ------------------------------------------------------------------------------------------- tables


def test_the_page_of_methods_is_what_its_command_prints(capsys):
    assert train.main(["--list-methods", "--markdown"]) == 0
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    assert page == capsys.readouterr().out, (
        "run: python train.py --list-methods --markdown > docs/methods.md"
    )


def test_markdown_is_for_the_list_of_methods(capsys):
    assert train.main(["--markdown"]) == 2
    assert "--markdown is for --list-methods" in capsys.readouterr().err


def test_the_table_of_the_readme():
    """Counts are those of `petl.count`, averages the paper's, accuracies those of results/."""
    averages = {}
    for table in (TARGETS["published1"], TARGETS["table1"]):
        for row, (method, *_) in table.rows.items():
            averages[method] = table.numbers.get((row, "avg"))
    demo = {}
    for name in ("newer-demo", "table1-demo"):
        with open(ROOT / f"results/{name}.csv", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row["weights"] == "demo":
                    demo[row["method"]] = f"{float(row['mean']):.2f}"
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| ([\d,]+) \| ([\d.-]+) \| ([\d.]+) \|$", README, re.M)
    assert len(rows) == 8
    for name, trained, average, accuracy in rows:
        with torch.device("meta"):
            model = petl.apply(AST(ASTConfig(n_frames=500, n_classes=50)), name)
        count = petl.count(model)
        assert trained == f"{count['petl'] or count['head']:,}", name
        assert average == (averages.get(name) or "-"), name
        assert accuracy == demo[name], name
