"""Types and bounds of what a file or an option says: its sizes, its kinds and its nesting.

Others may have written such a file, so nothing in it is believed before `checked` has compared it
with a class of this page. Keys that the class does not have are ignored. The numbers of a method's
parts are bounded here by the names of their fields, so that petl.py needs no bounds.

What we write ourselves is a TypedDict, which stays a dict. What other programs write is a Struct,
which has defaults for what they leave out.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import msgspec
from msgspec import Meta, Struct, ValidationError

from ast_model import UserError

Text = Annotated[str, Meta(min_length=1, max_length=4096, pattern=r"\A[^\0]*\Z")]
Name = Annotated[str, Meta(max_length=4096)]
Count = Annotated[int, Meta(ge=0, le=10**12)]
Seed = Annotated[int, Meta(ge=0, lt=2**31)]
Size = Annotated[int, Meta(ge=1, le=65_536)]
Frames = Annotated[int, Meta(ge=16, le=6_000)]  # a patch, a minute
Finite = Annotated[float, Meta(ge=-1e30, le=1e30)]
Share = Annotated[float, Meta(ge=0, le=1)]
Percent = Annotated[float, Meta(ge=0, le=100)]
LearningRate = Annotated[float, Meta(gt=0, le=1)]
Pool = Literal["mean", "cls", "cls_dist"]  # the keys of ast_model.POOL
Alpha = Annotated[float, Meta(gt=0, le=65_536)]


def checked(content: Any, kind: type, origin: Path | str) -> Any:
    """`content` as a `kind`. A UserError names `origin`, the key and what it should be."""
    try:
        return msgspec.convert(content, kind)
    except (ValidationError, RecursionError) as error:
        what, _, key = str(error).replace("`", "").rpartition(" - at ")
        message = f"{key.lstrip('$.')}: {what}" if what else key  # not all say a place
        raise UserError(f"{origin}: {message[:400]}") from None


# ---------------------------------------------------------------------------- methods and settings


class Part(Struct):
    """What the fields of a method's parts may be, by their names in petl.py and petl_more.py.

    No value is taken from here. A part of a file has only some of these fields.
    """

    part: Name
    at: Literal["attn", "ffn"] = "attn"
    how: Literal[
        "par_before", "seq_after", "seq_before", "par_before_residual", "seq_after_no_residual"
    ] = "par_before"
    # The rank of a LoRA of peft need not divide the width, so the rate need not be whole.
    rr: Annotated[float, Meta(ge=0.5, le=65_536)] = 1
    alpha: Alpha = 1
    prompts: Annotated[int, Meta(ge=1, le=4_096)] = 1
    targets: Annotated[str, Meta(pattern=r"\A[qkvo]{1,4}\Z")] = "q"
    seed: Seed = 0
    deep: bool = False
    kernel: Size = 1
    experts: Size = 1
    slots: Size = 1


class Method(TypedDict, total=False):
    """What a method has besides if it changes some of the blocks only."""

    blocks: Annotated[list[Size], Meta(min_length=2, max_length=2)]


class NamedMethod(Method):
    """A method as load_weights.to_dict returns it. Other fields of its parts stay as they are."""

    name: Name
    lr: LearningRate
    parts: Annotated[list[dict[str, Any]], Meta(max_length=8)]


class Settings(TypedDict):
    """The fields of train.Settings."""

    dataset: Name
    weights: Text
    backbone: Name
    method: NamedMethod
    pool: Pool
    seed: Seed
    shots: Count | None
    clips: Name
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
    windows: float | None
    background: bool


# -------------------------------------------------------------------- headers of files of tensors


class Backbone(TypedDict):
    """A load_weights.Backbone."""

    name: Text
    sha256: Name


class Shape(TypedDict):
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
    hidden: Size | None


class Errors(TypedDict, total=False):
    """How far probabilities were off, if there were enough validation clips to know it."""

    calibration_error: Percent
    calibrated_error: Percent


class Result(Errors):
    """What came out of a fold."""

    fold: Count
    accuracy: Percent
    validation_accuracy: Percent | None
    epoch: Count
    seconds: float
    peak_memory_mb: Count | None


class Record(TypedDict):
    """How a fold was trained, and what it answered."""

    history: list[dict[str, int | float | str]]  # rows of metrics.csv
    # For the validation clips, then for the test clips, in the order of split.csv:
    predictions: list[Count]  # numbers of classes
    millionths: list[Count]  # the probabilities of these classes


class Parameters(TypedDict):
    petl: Count
    head: Count
    total: Annotated[int, Meta(ge=1)]


class Calibration(TypedDict):
    """A calibration.Calibration."""

    temperature: Alpha
    min_confidence: Share
    whitening: list[list[Finite]]
    centres: list[list[Finite]]


class Header(TypedDict, total=False):
    """What any file of tensors may say of itself."""

    front_end: dict[str, int | float]
    classes: list[Name]
    settings: Settings
    result: Result
    record: Record
    parameters: Parameters
    versions: dict[str, Name]
    calibration: Calibration


class Trained(Header):
    """The header of load_weights.save_trained."""

    method: NamedMethod
    n_frames: Frames
    n_classes: Size
    pool: Pool
    backbone: Backbone


class Whole(Header):
    """The header of load_weights.save_ast."""

    config: Shape


def checked_header(content, origin):
    """The header of a file of ours without unknown keys. UserError for what is none."""
    header = checked(content, Whole if "config" in content else Trained, origin)
    if "method" in header:
        checked(header["method"]["parts"], list[Part], f"{origin}: method.parts")
    n_classes = header.get("config", header)["n_classes"]
    if "classes" in header and len(header["classes"]) != n_classes:
        raise UserError(f"{origin}: classes: Expected {n_classes} names")
    if "record" in header and max(header["record"]["predictions"], default=0) >= n_classes:
        raise UserError(f"{origin}: record.predictions: Expected numbers below {n_classes}")
    if "calibration" in header:
        whitening = header["calibration"]["whitening"]
        rows = whitening + header["calibration"]["centres"]
        if len(whitening) != n_classes or any(len(row) != n_classes for row in rows):
            raise UserError(f"{origin}: calibration: Expected rows of {n_classes} numbers")
    return header


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
    """What is read of peft's adapter_config.json. Other entries show when tensors do not fit."""

    peft_type: Name = "nothing known"
    bias: Name = "none"
    use_dora: bool | None = False
    use_rslora: bool | None = False
    alpha_pattern: dict[str, Any] | None = None
    base_model_name_or_path: Name | None = None


class LoRA(Adapter, kw_only=True):
    r: Size
    lora_alpha: Alpha
    init_lora_weights: bool | Name | None = True
