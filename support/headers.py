"""Types and bounds of what a file or an option says: its sizes, its kinds and its nesting.

Others may have written such a file, so nothing in it is believed before `checked` has compared it
with a class of this page. Keys that the class does not have are ignored. The numbers of a method's
parts are bounded here by the names of their fields, so that petl.py needs no bounds.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, ValidationError

from ast_model import UserError

Text = Annotated[str, Meta(min_length=1, max_length=4096, pattern=r"\A[^\0]*\Z")]
Name = Annotated[str, Meta(max_length=4096)]
Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Count = Annotated[int, Meta(ge=0, le=10**12)]
Seed = Annotated[int, Meta(ge=0, lt=2**31)]
Size = Annotated[int, Meta(ge=1, le=65_536)]
Frames = Annotated[int, Meta(ge=16, le=6_000)]  # a patch, a minute
Finite = Annotated[float, Meta(ge=-1e30, le=1e30)]
Share = Annotated[float, Meta(ge=0, le=1)]
Percent = Annotated[float, Meta(ge=0, le=100)]
LearningRate = Annotated[float, Meta(gt=0, le=1)]
Pool = Literal["mean", "cls", "cls_dist"]  # the keys of ast_model.POOL
# A whole number stays whole. The rank of a LoRA of peft need not divide the width.
Rate = Annotated[int, Meta(ge=1, le=65_536)] | Annotated[float, Meta(ge=0.5, le=65_536)]
Alpha = Annotated[int, Meta(ge=1, le=65_536)] | Annotated[float, Meta(gt=0, le=65_536)]

T = TypeVar("T")


def checked(content: Any, kind: type[T], origin: Path | str) -> T:
    """`content` as a `kind`. A UserError names `origin`, the key and what it should be."""
    try:
        return msgspec.convert(content, kind)
    except (ValidationError, RecursionError) as error:
        what, _, key = str(error).replace("`", "").rpartition(" - at ")
        if not what:  # it says no place
            raise UserError(f"{origin}: {key[:200]}") from None
        raise UserError(f"{origin}: {key.removeprefix('$.')}: {what[:200]}") from None


# ---------------------------------------------------------------------------- methods and settings

# What the fields of a method's parts may be. The names are those of petl.py and petl_more.py.
LIMITS = {
    "at": Literal["attn", "ffn"],
    "how": Literal[
        "par_before", "seq_after", "seq_before", "par_before_residual", "seq_after_no_residual"
    ],
    "rr": Rate,
    "alpha": Alpha,
    "prompts": Annotated[int, Meta(ge=1, le=4_096)],
    "targets": Annotated[str, Meta(pattern=r"\A[qkvo]{1,4}\Z")],
    "seed": Seed,
    "deep": bool,
    "kernel": Size,
    "experts": Size,
    "slots": Size,
}
Part = msgspec.defstruct(
    "Part", [("part", Name), *((name, kind | UnsetType, UNSET) for name, kind in LIMITS.items())]
)


class Method(Struct):
    """A method as load_weights.to_dict returns it. Other fields of its parts stay as they are."""

    name: Name
    lr: LearningRate
    parts: Annotated[list[dict[str, Any]], Meta(max_length=8)]
    blocks: Annotated[list[Size], Meta(min_length=2, max_length=2)] | UnsetType = UNSET

    def __post_init__(self):
        msgspec.convert(self.parts, list[Part])


class Settings(Struct):
    """The fields of train.Settings."""

    dataset: Name
    weights: Text
    backbone: Digest
    method: Method
    pool: Pool
    seed: Seed
    shots: Count | None
    clips: Digest
    n_frames: Frames
    epochs: Count
    batch_size: Count
    lr: LearningRate
    mask_frames: Count
    dtype: Name
    keep: Share | None
    balance: bool
    choose_by: Name


class RunConfig(Settings):
    """config.json of a run: its settings, and where its sounds and features were."""

    cache_dir: Text
    data_dir: Text | None
    group: Text | None
    windows: Annotated[float, Meta(ge=0, le=60)] | None


# -------------------------------------------------------------------- headers of files of tensors


class Backbone(Struct):
    """A load_weights.Backbone."""

    name: Text
    sha256: Digest


class Shape(Struct):
    """An ast_model.ASTConfig. load_weights.py compares it with the tensors."""

    n_frames: Frames
    n_mels: Literal[128]  # the features have as many
    patch: Size
    stride: Size
    dim: Size
    depth: Size
    heads: Size
    eps: Share
    n_classes: Size
    pool: Pool
    hidden: Size | None = None


class Result(Struct):
    """What came out of a fold."""

    fold: Count
    accuracy: Percent
    validation_accuracy: Percent | None
    epoch: Count
    seconds: float
    peak_memory_mb: Count | None = None
    calibration_error: Percent | UnsetType = UNSET
    calibrated_error: Percent | UnsetType = UNSET


class Record(Struct):
    """How a fold was trained, and what it answered."""

    history: list[dict[str, int | float | str]]  # rows of metrics.csv
    # For the validation clips, then for the test clips, in the order of split.csv:
    predictions: list[Count]  # numbers of classes
    millionths: list[Count]  # the probabilities of these classes


class Parameters(Struct):
    petl: Count
    head: Count
    total: Annotated[int, Meta(ge=1, le=10**12)]


class Calibration(Struct):
    """A calibration.Calibration."""

    temperature: Annotated[float, Meta(ge=0.01, le=100)]
    min_confidence: Share
    whitening: list[list[Finite]]
    centres: Annotated[list[list[Finite]], Meta(min_length=1)]


class Header(Struct, kw_only=True):
    """What every file of tensors may say of itself."""

    digest: Digest
    method: Method | UnsetType = UNSET
    n_frames: Frames | UnsetType = UNSET
    n_classes: Size | UnsetType = UNSET
    pool: Pool | UnsetType = UNSET
    backbone: Backbone | UnsetType = UNSET
    front_end: dict[str, int | float] | UnsetType = UNSET
    classes: Annotated[list[Name], Meta(min_length=1)] | UnsetType = UNSET
    settings: Settings | UnsetType = UNSET
    result: Result | UnsetType = UNSET
    record: Record | UnsetType = UNSET
    parameters: Parameters | UnsetType = UNSET
    versions: dict[str, Name] | UnsetType = UNSET
    calibration: Calibration | UnsetType = UNSET

    def __post_init__(self):
        n_classes = getattr(self, "config", self).n_classes
        if self.classes is not UNSET and len(self.classes) != n_classes:
            raise ValueError(f"classes: Expected {n_classes} names, got {len(self.classes)}")
        if self.record is not UNSET and max(self.record.predictions, default=0) >= n_classes:
            raise ValueError(f"record.predictions: Expected numbers below {n_classes}")
        if self.calibration is not UNSET:
            rows = [*self.calibration.whitening, *self.calibration.centres]
            square = len(self.calibration.whitening) == n_classes
            if not square or {len(row) for row in rows} != {n_classes}:
                raise ValueError(f"calibration: Expected rows of {n_classes} numbers")


class Trained(Header, kw_only=True):
    """The header of load_weights.save_trained."""

    method: Method
    n_frames: Frames
    n_classes: Size
    pool: Pool
    backbone: Backbone


class Whole(Header, kw_only=True):
    """The header of load_weights.save_ast."""

    config: Shape


# ------------------------------------------------------------------------ files of other programs


class Names(Struct, kw_only=True):
    """The names of the classes by their numbers, from the config.json of any program."""

    model_type: Name = ""
    id2label: dict[str, Name] = {}

    def __post_init__(self):
        if self.id2label.keys() != {str(i) for i in range(len(self.id2label))}:
            raise ValueError("id2label: Expected the numbers 0, 1, 2, ... as keys")

    def classes(self) -> list[str]:
        return [self.id2label[str(i)] for i in range(len(self.id2label))]


class HuggingFace(Names, kw_only=True):
    """config.json of transformers' AST. None: the tensors say it."""

    num_attention_heads: Size | None = None
    max_length: Frames | None = None
    num_mel_bins: Size = 128
    frequency_stride: Size = 10
    time_stride: Size = 10
    hidden_act: Name = "gelu"
    qkv_bias: bool = True
    layer_norm_eps: Share = 1e-12


class Adapter(Struct, kw_only=True):
    """adapter_config.json of peft. Only with these defaults is an adapter one of our methods."""

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
