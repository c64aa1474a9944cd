"""Models and sounds that several test files share, all of them made on the spot."""

import csv
from pathlib import Path

import numpy as np
import soundfile
import torch

import petl
from ast_model import AST, ASTConfig
from load_weights import load_ast, save_trained

REFERENCE = Path(__file__).parent / "reference"
SMALL_AST = REFERENCE / "ast_small"  # 2 layers, 64 dimensions: fast enough for runs of train.py


def tiny_ast(**config) -> AST:
    """A random AST on a 3 x 3 patch grid, small enough for formulas by hand."""
    return AST(ASTConfig(**{"n_frames": 36, "n_mels": 36, "dim": 32, "depth": 2, "heads": 4, "n_classes": 3, **config}))


def make_esc50(root: Path, takes: int = 1, seconds: float = 0.5) -> Path:
    """A miniature of the ESC-50 release: 12 classes, 10 of them ESC-10, `takes` clips for each class and fold.

    The sound of a class is a tone of its own pitch in noise, so that training can succeed.
    """
    rng = np.random.default_rng(0)
    (root / "meta").mkdir(parents=True)
    (root / "audio").mkdir()
    time = np.arange(int(44_100 * seconds)) / 44_100
    with open(root / "meta" / "esc50.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filename", "fold", "target", "category", "esc10", "src_file", "take"])
        for target in range(0, 48, 4):
            for fold in range(1, 6):
                for take in range(takes):
                    name = f"{fold}-{100_000 + target}-{chr(65 + take)}-{target}.wav"
                    tone = np.sin(2 * np.pi * (200 + 100 * target) * time)
                    wave = 0.3 * tone + 0.03 * rng.standard_normal(len(time))
                    soundfile.write(root / "audio" / name, wave, 44_100, subtype="PCM_16")
                    esc10 = target < 40
                    writer.writerow([name, fold, target, f"sound {target}", esc10, 100_000 + target, chr(65 + take)])
    return root


def save_random(path: Path, method: str, pool: str = "mean", n_frames: int = 60, **header) -> AST:
    """A fold file of the small AST in which everything that `method` trains is random. Returns the model, in eval()."""
    torch.manual_seed(0)
    model = petl.apply(load_ast(SMALL_AST, n_frames, 4, pool), method)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.get_submodule("head.1" if pool == "cls_dist" else "head").weight.mul_(5)  # answers far from one another
    save_trained(model, path, {"classes": ["rain", "sea, waves", "dog", "wind"], **header})
    return model.eval()


def campaign_words(sounds: Path, cache_dir: Path, out: Path, *words) -> list[str]:
    """Options of tools.experiments: one epoch of one fold on half a second of ten tones, less than importing torch."""
    own = ["--datasets", "esc10", "--data-dir", f"esc10={sounds}", "--weights", SMALL_AST, "--epochs", 1]
    ours, passed = (words[: (i := words.index("--"))], words[i + 1 :]) if "--" in words else (words, [])
    passed = ["--folds", 1, "--seconds", 0.5, *passed]  # of an option that comes twice the last one counts
    return [str(w) for w in [*own, "--cache-dir", cache_dir, "--out", out, *ours, "--", *passed]]


def table_of(out: Path, target: str) -> dict[str, dict[str, str]]:
    """A Markdown table that tools.experiments wrote, as {row: {heading: text}}."""
    (file,) = (out / "tables").glob(f"{target}-*.md")
    lines = [line for line in file.read_text().splitlines() if line.startswith("|")]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


def constant(path: Path, *probabilities: float, classes: list[str] | None = None, n_frames: int = 60) -> Path:
    """A fold file that gives every sound these probabilities."""
    model = petl.apply(load_ast(SMALL_AST, n_frames, len(probabilities)), "linear")
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor(probabilities).log())
    save_trained(model, path, {"classes": classes} if classes else {})
    return path
