"""What files that describe something hold: a type and bounds for every key that is read, in one place.

`checked` compares; what it returns holds nothing of another kind. Unknown keys are ignored; a key that came later has a
default, so that files of earlier versions open. The numbers of a method's parts have bounds by the names of their fields, so that petl.py needs none.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, ValidationError

from support.command import UserError

Text = Annotated[str, Meta(min_length=1, max_length=4096, pattern=r"\A[^\0]*\Z")]
Name = Annotated[str, Meta(max_length=4096)]
Count = Annotated[int, Meta(ge=0, le=10**12)]
Fold = Annotated[int, Meta(ge=0, lt=2**31)]
Size = Annotated[int, Meta(ge=1, le=65_536)]
Frames = Annotated[int, Meta(ge=1, le=6_000)]  # a minute
Seed = Annotated[int, Meta(ge=0, lt=2**31)]
Finite = Annotated[float, Meta(ge=-1e30, le=1e30)]
Percent = Annotated[float, Meta(ge=0, le=100)]
Seconds = Annotated[float, Meta(ge=0, le=1e12)]
LearningRate = Annotated[float, Meta(gt=0, le=1)]
Pool = Literal["mean", "cls", "cls_dist"]  # the keys of ast_model.POOL
# Of a method. Whole numbers stay whole; a LoRA of peft may have a rank that does not divide the width.
Rate = Annotated[int, Meta(ge=1, le=65_536)] | Annotated[float, Meta(ge=0.5, le=65_536)]
Alpha = Annotated[int, Meta(ge=1, le=65_536)] | Annotated[float, Meta(gt=0, le=65_536)]
PromptCount = Annotated[int, Meta(ge=1, le=4_096)]
Targets = Annotated[str, Meta(pattern=r"\A[qkvo]{1,4}\Z")]

T = TypeVar("T")


def checked(content: Any, kind: type[T], origin: Path | str) -> T:
    """`content` as a `kind`. UserError that names `origin`, the key and what it should be."""
    try:
        return msgspec.convert(content, kind)
    except (ValidationError, RecursionError) as error:
        what, _, key = str(error).replace("`", "").partition(" - at ")
        raise UserError(f"{origin}: " + (f"{key.removeprefix('$.')}: {what}" if key else what)) from None


# ------------------------------------------------------------------------------------------- fold files, whole models


# What the numbers of a method's parts may be, by the names of their fields in petl.py and petl_more.py.
LIMITS = {
    "at": Literal["attn", "ffn"],
    "how": Literal["par_before", "seq_after", "seq_before", "par_before_residual", "seq_after_no_residual"],
    "rr": Rate, "alpha": Alpha, "prompts": PromptCount, "targets": Targets, "seed": Seed, "deep": bool,
    "kernel": Size, "experts": Size, "slots": Size,
}  # fmt: skip
Part = msgspec.defstruct("Part", [("part", Name), *((name, kind | UnsetType, UNSET) for name, kind in LIMITS.items())])


class Method(Struct):
    name: Name
    lr: LearningRate
    parts: Annotated[list[dict[str, Any]], Meta(max_length=8)]
    blocks: Annotated[list[Size], Meta(min_length=2, max_length=2)] | UnsetType = UNSET

    def __post_init__(self):
        msgspec.convert(self.parts, list[Part])


@dataclass(frozen=True)
class Backbone:
    """Where weights came from, and their `load_weights.fingerprint`: the same whatever the file format."""

    name: Text
    sha256: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class FoldResult(Struct):
    fold: Fold
    accuracy: Percent
    validation_accuracy: Percent | None
    epoch: Count
    seconds: Seconds
    peak_memory_mb: Count | None = None
    calibration_error: Percent | UnsetType = UNSET  # of the test clips, without the temperature and with it
    calibrated_error: Percent | UnsetType = UNSET


class Parameters(Struct):
    petl: Count
    head: Count
    total: Annotated[int, Meta(ge=1, le=10**12)]


class Record(Struct):
    """How a fold was trained and what it answered: its rows of metrics.csv and predictions.csv."""

    history: Annotated[list[dict[str, int | float | str]], Meta(min_length=1)]
    predictions: list[Count]  # numbers of classes: of the clips that validate, then of those that test, as in split.csv
    millionths: list[Annotated[int, Meta(ge=0, le=10**6)]]  # the probabilities of these classes

    def __post_init__(self):
        if len(self.predictions) != len(self.millionths):
            raise ValueError(f"Expected {len(self.predictions)} millionths, got {len(self.millionths)}")


class Calibration(Struct):
    """What support/calibration.py has fitted."""

    temperature: Annotated[float, Meta(ge=0.01, le=100)]
    min_confidence: Annotated[float, Meta(ge=0, le=1)]
    whitening: list[list[Finite]]
    centres: Annotated[list[list[Finite]], Meta(min_length=1)]


class Shape(Struct):
    """An `ast_model.ASTConfig`; `load_weights` compares it with the tensors."""

    n_frames: Frames
    n_mels: Literal[128]  # that of the features
    patch: Size
    stride: Size
    dim: Size
    depth: Size
    heads: Size
    eps: Annotated[float, Meta(ge=0, le=1)]
    n_classes: Size
    pool: Pool
    hidden: Size | None = None


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a run: two runs with the same settings are the same experiment.

    A field that comes later has a default: that of the runs before it.
    """

    dataset: Name
    weights: Text  # as the user named it; what counts is `backbone`
    backbone: Name  # SHA-256
    method: dict  # as load_weights.to_dict has it, fitted to the width of the backbone
    pool: Pool
    seed: Seed
    shots: Count | None
    clips: Name  # SHA-256 of split.csv: which clips train, validate and test
    n_frames: Frames
    epochs: Count
    batch_size: Count
    lr: LearningRate
    mask_frames: Count
    dtype: Name
    keep: Annotated[float, Meta(gt=0, lt=1)] | None = None  # share of the patches in training
    balance: bool = False  # the loss weighs all classes alike
    best: Literal["accuracy", "balanced"] = "accuracy"  # by which the best epoch on the validation clips is chosen


# In the header of a file they are only told.
Told = msgspec.defstruct("Told", [(field.name, field.type | UnsetType, UNSET) for field in fields(Settings)])


@dataclass(frozen=True)
class RunConfig(Settings):
    """config.json of a run."""

    method: Method
    cache_dir: Text = "."
    data_dir: Text | None = None
    group: Text | None = None  # of own sounds: --group, and how many seconds the windows of --windows have
    windows: Seconds | None = None


class Header(Struct, kw_only=True):
    """What a file of tensors may say of itself."""

    method: Method | UnsetType = UNSET
    n_frames: Frames | UnsetType = UNSET
    n_classes: Size | UnsetType = UNSET
    pool: Pool | UnsetType = UNSET
    backbone: Backbone | UnsetType = UNSET
    front_end: dict[str, int | float] | UnsetType = UNSET
    classes: Annotated[list[Name], Meta(min_length=1)] | UnsetType = UNSET
    result: FoldResult | UnsetType = UNSET
    settings: Told | UnsetType = UNSET
    parameters: Parameters | UnsetType = UNSET
    versions: dict[str, Name] | UnsetType = UNSET
    digest: Name | UnsetType = UNSET  # of the tensors
    record: Record | UnsetType = UNSET
    calibration: Calibration | UnsetType = UNSET

    def __post_init__(self):
        n_classes = getattr(self, "config", self).n_classes  # of a Whole or of a Trained
        if self.classes is not UNSET and len(self.classes) != n_classes:
            raise ValueError(f"classes: Expected {n_classes} names, got {len(self.classes)}")
        if self.record is not UNSET and max(self.record.predictions, default=0) >= n_classes:
            raise ValueError(f"record.predictions: Expected numbers below {n_classes}")
        if self.calibration is not UNSET:
            rows = [*self.calibration.whitening, *self.calibration.centres]
            if len(self.calibration.whitening) != n_classes or {len(row) for row in rows} != {n_classes}:
                raise ValueError(f"calibration: Expected {n_classes} rows of whitening, and so many numbers in each")


class Trained(Header, kw_only=True):
    """The header of `save_trained`."""

    method: Method
    n_frames: Frames
    n_classes: Size
    pool: Pool
    backbone: Backbone


class Whole(Header, kw_only=True):
    """The header of `save_ast`."""

    config: Shape


class ResumeState(Struct):
    """foldK.resume.pt; its tensors are compared with the model's when it takes them over."""

    history: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    best: dict[str, Any]
    seconds: Seconds
    tensors: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    digest: Name


class ClassScores(Struct):
    support: Count
    precision: Percent
    recall: Percent
    f1: Percent


class Scores(Struct):
    """What support/scores.py says of all test clips together."""

    accuracy: Percent
    balanced_accuracy: Percent
    macro_f1: Percent
    majority: Percent
    classes: dict[Name, ClassScores]


class RunResult(Struct):
    """result.json of a run."""

    accuracy: Percent
    std: Seconds | None
    folds: Annotated[list[FoldResult], Meta(min_length=1)]
    parameters: Parameters
    seconds: Seconds
    peak_memory_mb: Count | None = None
    versions: dict[str, Name] = {}
    scores: Scores | None = None  # earlier versions had none


# --------------------------------------------------------------------------------------------- files of other programs


class Names(Struct, kw_only=True):
    """Of any program's config.json: the names of the classes by number."""

    model_type: Name = ""
    id2label: dict[str, Name] = {}

    def __post_init__(self):
        if self.id2label.keys() != {str(i) for i in range(len(self.id2label))}:
            raise ValueError("id2label: Expected the numbers 0, 1, 2, ... as keys")

    def classes(self) -> list[str]:
        return [self.id2label[str(i)] for i in range(len(self.id2label))]


class HuggingFace(Names, kw_only=True):
    """config.json of transformers' AST. None: what the tensors say."""

    num_attention_heads: Size | None = None
    max_length: Frames | None = None
    num_mel_bins: Size = 128
    frequency_stride: Size = 10
    time_stride: Size = 10
    hidden_act: Name = "gelu"
    qkv_bias: bool = True
    layer_norm_eps: Annotated[float, Meta(ge=0, le=1)] = 1e-12


class Adapter(Struct, kw_only=True):
    """adapter_config.json of peft: what must have these values, and no others, to be one of our methods."""

    peft_type: Name = "nothing known"
    bias: Name = "none"
    use_dora: bool | None = False
    use_rslora: bool | None = False
    lora_bias: bool | None = False
    rank_pattern: dict[str, Any] | None = None
    alpha_pattern: dict[str, Any] | None = None
    base_model_name_or_path: Name | None = None


class LoRA(Adapter, kw_only=True):
    r: Size
    lora_alpha: Alpha
    init_lora_weights: bool | Name | None = True


class VeRA(Adapter, kw_only=True):
    r: Size
    projection_prng_key: Seed
