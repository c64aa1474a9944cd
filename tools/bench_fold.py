"""A fold end to end, from sound files to test accuracy: train.py beside the Trainer of transformers with peft.

    python -m tools.bench fold   # sounds made here, in the layout of ESC-10; or --data-dir ESC-50-master

Both adapt one model by one LoRA: clips, fold, epochs, batch, rates and AdamW are the same, but that the Trainer's
decays no biases and LayerNorms. Both write down every epoch, and test the best by the validation clips. In the first
run nothing has been computed; in the second there is what the first has kept. transformers is used as its users do: its
dataset decodes, resamples and extracts whenever a clip is read (`Trainer`), or keeps in files what was extracted, as
`datasets.map` does (`Trainer, kept`). All run in turn in one process on the CPU, in which each has run before: imports
do not count.
"""

import io
import shutil
import tempfile
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import torch

import petl
import train
from data import DATASETS
from load_weights import load_ast
from sounds import paper, synth
from sounds.audio import RATE
from sounds.tables import read_table
from support.command import needed
from support.files import table_of
from support.variants import fitted
from tools.export import write_hf

STAGES = ("reading", "training", "evaluation", "other")
COLUMNS = ("filename", "fold", "target", "category", "esc10")  # of meta/esc50.csv
CASES = [("random:base", 40, 1), ("random:demo", 100, 5)]  # weights, clips, epochs
WARM = ("random:demo", 40, 1)


@dataclass(frozen=True)
class Fold:
    """What the contestants have in common."""

    sounds: Path  # in the layout of the release
    model: Path  # a folder, as transformers writes it
    method: petl.Method  # as it fits the model
    epochs: int
    batch: int


class Watch:
    """Seconds of each stage; all time belongs to one, `other` if to none that is named."""

    def __init__(self):
        self.spent, self.stage, self.since = dict.fromkeys(STAGES, 0.0), "other", time.perf_counter()

    def switch(self, stage: str) -> str:
        now, before = time.perf_counter(), self.stage
        self.spent[before] += now - self.since
        self.stage, self.since = stage, now
        return before

    @contextmanager
    def on(self, stage: str):
        """Also a decorator."""
        before = self.switch(stage)
        try:
            yield
        finally:
            self.switch(before)


# ----------------------------------------------------------------------------------------------------------- the sounds


def make_sounds(folder: Path, count: int, data_dir: Path | None) -> Path:
    """`count` clips of ESC-10, as many of each fold, in the layout of the release; without `data_dir` each is five
    sounds of `synth`, at 44.1 kHz as there."""
    import soundfile
    import soxr

    (folder / "audio").mkdir(parents=True)
    (folder / "meta").mkdir()
    root = data_dir and paper.locate(paper.ESC50, data_dir, folder)
    if root:
        rows = [row for row in read_table(root / "meta" / "esc50.csv", COLUMNS) if row["esc10"].lower() == "true"]
    else:
        kinds = enumerate(sorted(synth.TARGET))
        rows = [dict(zip(COLUMNS, (f"{fold}-{kind}-{take}.wav", str(fold), target, kind, "True"), strict=True))
                for target, kind in kinds for fold in range(1, 6) for take in range(8)]  # fmt: skip
    folds = [[row for row in rows if row["fold"] == str(fold)] for fold in range(1, 6)]
    rows = [row for fold in folds for row in fold[:: max(1, 5 * len(fold) // count)]]
    for i, row in enumerate(rows):
        file = folder / "audio" / row["filename"]
        if root:
            shutil.copy(root / "audio" / file.name, file)
        else:
            wave = np.concatenate([synth.render(row["category"], 5 * i + k) for k in range(5)])
            soundfile.write(file, soxr.resample(wave, RATE, 44_100), 44_100, subtype="PCM_16")
    (folder / "meta" / "esc50.csv").write_text(table_of(COLUMNS, rows))
    return folder


# ------------------------------------------------------------------------------------------------------- contestants


def ours(fold: Fold, folder: Path, watch: Watch) -> float:
    """Test accuracy, by the command of train.py."""
    options = {
        "--dataset": "esc10", "--data-dir": fold.sounds, "--weights": fold.model, "--method": "lora", "--folds": 1,
        "--pool": "cls_dist", "--epochs": fold.epochs, "--batch-size": fold.batch, "--device": "cpu",
        "--dtype": "float32", "--cache-dir": folder / "cache", "--out": tempfile.mkdtemp(dir=folder),
    }  # fmt: skip
    args = train.parse([*(str(word) for option in options.items() for word in option), "--no-mask"])
    stages = {"load_clips": "reading", "train_epoch": "training", "evaluate": "evaluation"}
    with patch.multiple(train, **{name: watch.on(stage)(getattr(train, name)) for name, stage in stages.items()}):
        return train.run(args)["accuracy"]


class Sounds(torch.utils.data.Dataset):
    """What the Trainer reads; with `kept`, a folder, each clip is decoded and extracted once."""

    def __init__(self, rows: list[dict], fold: Fold, extractor, kept: Path | None, watch: Watch):
        self.rows, self.fold, self.extractor, self.kept, self.watch = rows, fold, extractor, kept, watch

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        with self.watch.on("reading"):
            row = self.rows[i]
            file = self.kept and self.kept / f"{row['filename']}.npy"
            values = np.load(file) if file and file.exists() else self.extracted(row["filename"])
            if file and not file.exists():
                np.save(file, values)
            return {"input_values": values, "labels": row["label"]}

    def extracted(self, name: str) -> np.ndarray:
        import soundfile
        import soxr

        wave, rate = soundfile.read(self.fold.sounds / "audio" / name, dtype="float32")
        return self.extractor(soxr.resample(wave, rate, RATE), sampling_rate=RATE).input_values[0]


def with_lora(model, lora: petl.LoRA):
    """The model of transformers with peft's LoRA of the same rank and scale."""
    from peft import LoraConfig, get_peft_model

    rank = petl.rank_of(model.config.hidden_size, lora.rr)
    return get_peft_model(model, LoraConfig(
        r=rank, lora_alpha=lora.alpha / lora.rr * rank, target_modules=["q_proj", "v_proj"],
        modules_to_save=["audio_spectrogram_transformer.layernorm", "classifier"],
    ))  # fmt: skip


def transformers():
    """The library, silent. UserError where it or peft is not installed."""
    with needed("the comparison needs", "-r requirements-dev.txt"):
        import peft  # noqa: F401
        import transformers
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def theirs(fold: Fold, folder: Path, watch: Watch, keep: bool = False) -> float:
    """Test accuracy, by the Trainer."""
    library, kept = transformers(), folder / "kept" if keep else None
    if kept:
        kept.mkdir(exist_ok=True)
    rows = read_table(fold.sounds / "meta" / "esc50.csv", COLUMNS)
    classes = sorted({int(row["target"]) for row in rows})
    rows = [{**row, "label": classes.index(int(row["target"]))} for row in rows]
    extractor = library.ASTFeatureExtractor.from_pretrained(fold.model)
    parts = [[row for row in rows if row["fold"] in folds] for folds in ("234", "5", "1")]
    training, validation, test = (Sounds(part, fold, extractor, kept, watch) for part in parts)
    model = library.AutoModelForAudioClassification.from_pretrained(fold.model)
    settings = library.TrainingArguments(
        tempfile.mkdtemp(dir=folder), num_train_epochs=fold.epochs, per_device_train_batch_size=fold.batch,
        per_device_eval_batch_size=fold.batch, learning_rate=fold.method.lr, lr_scheduler_type="cosine",
        weight_decay=train.WEIGHT_DECAY, adam_beta1=train.BETAS[0], adam_beta2=train.BETAS[1], adam_epsilon=train.EPS,
        max_grad_norm=0, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="accuracy", label_names=["labels"], remove_unused_columns=False, report_to="none",
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = library.Trainer(
        with_lora(model, *fold.method.parts), settings, train_dataset=training, eval_dataset=validation,
        compute_metrics=lambda out: {"accuracy": 100 * float((out.predictions.argmax(1) == out.label_ids).mean())},
    )  # fmt: skip
    trainer.evaluate = watch.on("evaluation")(trainer.evaluate)
    watch.on("training")(trainer.train)()
    return trainer.evaluate(test)["eval_accuracy"]


CONTESTANTS = {"ours": ours, "Trainer": theirs, "Trainer, kept": lambda *what: theirs(*what, keep=True)}


# --------------------------------------------------------------------------------------------------------- measuring


def measure(case: tuple[str, int, int], data_dir: Path | None, batch: int, repeats: int) -> list[dict]:
    """The first and the second run of every contestant in turn: of each stage the median seconds, of all of them also
    `spread`, half the range in percent."""
    runs = {(run, name): [] for run in ("first", "second") for name in CONTESTANTS}
    (weights, clips, epochs), accuracies = case, {}
    with tempfile.TemporaryDirectory() as place:
        sounds = make_sounds(Path(place) / "sounds", clips, data_dir)
        n_classes = len({row["category"] for row in read_table(sounds / "meta" / "esc50.csv", COLUMNS)})
        torch.manual_seed(0)
        model = load_ast(weights, DATASETS["esc10"].n_frames, n_classes, "cls_dist")
        write_hf(model, {}, Path(place))
        fold = Fold(sounds, Path(place), fitted(petl.find("lora"), model.config), epochs, batch)
        for _ in range(repeats):
            for name, contestant in CONTESTANTS.items():
                with tempfile.TemporaryDirectory() as folder:
                    for run in ("first", "second"):
                        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                            watch = Watch()
                            accuracies[run, name] = contestant(fold, Path(folder), watch)
                            watch.switch("other")
                        runs[run, name].append(watch.spent)
    results = []
    for (run, name), spent in runs.items():
        totals = [sum(seconds.values()) for seconds in spent]
        results.append({
            "weights": weights, "clips": clips, "epochs": epochs, "run": run, "contestant": name,
            **{stage: median(seconds[stage] for seconds in spent) for stage in STAGES}, "seconds": median(totals),
            "spread": 50 * (max(totals) - min(totals)) / median(totals), "accuracy": accuracies[run, name],
        })  # fmt: skip
    return results


def table(data_dir: Path | None, batch: int, repeats: int, quick: bool) -> list[dict]:
    """All cases, or the last alone, printed as they come."""
    transformers()
    line = "| {:<12}| {:>5} | {:>6} | {:<6} | {:<14}|" + " {:>10} |" * 4 + " {:>8} | {:>5} | {:>7} | {:>8} |"
    words = ("weights", "clips", "epochs", "run", "contestant")
    print(line.format(*words, *STAGES, "seconds", "+-", "ours is", "accuracy"))
    print("|---|--:|--:|---|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    measure(WARM, data_dir, batch, 1)
    results = []
    for case in CASES[-1:] if quick else CASES:
        measured = measure(case, data_dir, batch, repeats)
        results += measured
        own = {result["run"]: result["seconds"] for result in measured if result["contestant"] == "ours"}
        for result in measured:
            seconds = [f"{result[stage]:.2f}" for stage in (*STAGES, "seconds")]
            faster = f"{result['seconds'] / own[result['run']]:.2f} x"
            rest = (f"{result['spread']:.0f} %", faster, f"{result['accuracy']:.1f} %")
            print(line.format(*(result[word] for word in words), *seconds, *rest), flush=True)
    return results
