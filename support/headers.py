"""What the tables of files and options may hold: types, sizes and nesting.

Others may have written such a file, so nothing in it is used before `checked` has compared it with
a class of this page. A class lists what a program reads. It ignores other keys, unless they would
change what is computed.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from ast_model import UserError

Text = Annotated[str, Meta(max_length=4096)]
Count = Annotated[int, Meta(ge=0, le=10**12)]
Size = Annotated[int, Meta(ge=1, le=65_536)]
Frames = Annotated[int, Meta(ge=16, le=6_000)]  # a patch, a minute
Number = Annotated[float, Meta(ge=-1e30, le=1e30)]  # neither infinite nor NaN
Positive = Annotated[float, Meta(ge=1e-9, le=1e30)]
Scale = Annotated[float, Meta(gt=0, le=65_536)]
Thousandths = Annotated[int, Meta(ge=-1000, le=1000)]
Pool = Literal["mean", "cls", "cls_dist"]  # the keys of ast_model.POOL


def checked(content: Any, kind: type, origin: Path | str) -> Any:
    """`content` as a `kind`. A UserError names `origin`, the key and what it should be."""
    try:
        return msgspec.convert(content, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        what, _, key = str(error).replace("`", "").rpartition(" - at ")
        message = f"{key.lstrip('$.')}: {what}" if what else key  # not all name a place
        raise UserError(f"{origin}: {message[:400]}") from None


class Part(Struct):
    """Bounds of the numbers of a method's parts, by their names in petl.py and petl_more.py.

    A part has only some of these fields. Nothing uses the defaults.
    """

    part: Text
    # The rank of a LoRA of peft need not divide the width, so the rate need not be whole.
    rr: Annotated[float, Meta(ge=0.5, le=65_536)] = 1
    lora_rr: Annotated[float, Meta(ge=0.5, le=65_536)] = 1
    alpha: Scale = 1
    prompts: Size = 1
    targets: Annotated[str, Meta(pattern=r"\A[qkvo]{1,4}\Z")] = "q"
    seed: Count = 0
    kernel: Size = 1
    experts: Size = 1
    slots: Size = 1


class Method(Struct):
    """What load_weights.to_dict returns."""

    name: Text
    lr: Number
    parts: Annotated[list[Part], Meta(max_length=8)]
    head_lr: Number | UnsetType = UNSET
    blocks: tuple[Size, Size] | UnsetType = UNSET


# ----------------------------------------------------------------- the headers of files of tensors


class Settings(Struct):
    """What programs read of a run's train.Settings. The other settings are only compared."""

    dataset: Text
    weights: Text
    method: Method
    clips: Text
    n_frames: Frames


class RunConfig(Settings):
    """config.json of a run: its settings, and where its sounds and features were."""

    seed: Count
    epochs: Count
    mask_frames: Count
    choose_by: Text
    balance: bool
    cache_dir: Text
    data_dir: Text | None
    group: Text | None
    windows: Annotated[float, Meta(ge=0.16, le=60)] | None  # as --seconds
    background: bool


class Backbone(Struct, forbid_unknown_fields=True):
    """A load_weights.Backbone."""

    name: Text
    sha256: Text


class Shape(Struct, forbid_unknown_fields=True):
    """An ast_model.ASTConfig. load_weights.py compares it with the tensors."""

    n_frames: Frames
    n_mels: Literal[128]  # the features have as many
    patch: Size
    stride: Size
    dim: Size
    depth: Size
    heads: Size
    eps: Scale
    n_classes: Size
    pool: Pool
    hidden: Size | None


class Result(Struct):
    """How well a fold answered, and what it took."""

    fold: Count
    accuracy: Number
    validation_accuracy: Number | None
    epoch: Count
    seconds: Number
    peak_memory_mb: Count | None
    # With enough validation clips. All are in percent.
    calibration_error: Number | UnsetType = UNSET
    calibrated_error: Number | UnsetType = UNSET
    unsure: Number | UnsetType = UNSET  # of the test clips
    sure_accuracy: Number | UnsetType = UNSET  # of those that are not unsure
    logmel_accuracy: Number | UnsetType = UNSET  # these two: of own sounds
    logmel_balanced_accuracy: Number | UnsetType = UNSET


class Epoch(Struct):
    """What programs read of a row of metrics.csv."""

    fold: Count
    epoch: Count
    loss: Number
    accuracy: Number | Literal[""]  # "": there are no validation clips


class Record(Struct):
    """How a fold was trained, and its answers for the clips of split.csv: validation, then test."""

    history: list[Epoch]
    predictions: list[Count]  # numbers of classes
    millionths: list[Annotated[int, Meta(ge=0, le=10**6)]]  # the probabilities of these classes


class Parameters(Struct):
    petl: Count
    head: Count
    total: Annotated[int, Meta(ge=1)]


class Calibration(Struct, forbid_unknown_fields=True):
    """A calibration.Calibration."""

    temperature: Scale
    min_confidence: Number
    mean: list[Number]
    std: list[Positive]
    directions: Annotated[list[list[Thousandths]], Meta(min_length=1, max_length=16)]
    alpha: Number
    limit: Number
    slope: Positive


class Header(Struct, kw_only=True):
    """What any file of tensors may say of itself."""

    classes: list[Text] | UnsetType = UNSET
    settings: Settings | UnsetType = UNSET
    result: Result | UnsetType = UNSET
    record: Record | UnsetType = UNSET
    parameters: Parameters | UnsetType = UNSET
    versions: dict[str, Text] | UnsetType = UNSET
    calibration: Calibration | UnsetType = UNSET


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


def check_header(content: dict, origin: Path | str) -> None:
    """UserError unless this is the header of a file of ours."""
    header = checked(content, Whole if "config" in content else Trained, origin)
    n_classes = header.config.n_classes if "config" in content else header.n_classes
    names = header.classes or []
    if header.classes is not UNSET and not len(names) == len(set(names)) == n_classes:
        raise UserError(f"{origin}: classes: Expected {n_classes} names, each of them once")
    if header.record and max(header.record.predictions, default=0) >= n_classes:
        raise UserError(f"{origin}: record.predictions: Expected numbers below {n_classes}")
    if header.calibration:
        size = len(header.calibration.mean)
        rows = [header.calibration.std, *header.calibration.directions]
        if any(len(row) != size for row in rows):
            raise UserError(f"{origin}: calibration: Expected rows of {size} numbers")


# ------------------------------------------------------------------------ files of other programs


class Names(Struct, kw_only=True):
    """The names of the classes by their numbers, from the config.json of any program."""

    model_type: Text = ""
    problem_type: Text | None = None
    id2label: dict[str, Text] = {}

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
    hidden_act: Text = "gelu"
    qkv_bias: bool = True
    layer_norm_eps: Scale = 1e-12


class Extractor(Struct):
    """preprocessor_config.json of transformers' AST. None: as the model has it."""

    feature_extractor_type: Text | None = None
    sampling_rate: Count | None = None
    num_mel_bins: Count | None = None
    max_length: Count | None = None
    do_normalize: bool = True
    mean: Number = -4.2677393
    std: Positive = 4.5689974


class LoRA(Struct, kw_only=True):
    """What is read of peft's adapter_config.json. Other entries show when tensors do not fit."""

    peft_type: Text = "nothing known"
    r: Size = 8
    lora_alpha: Scale = 8
    use_dora: bool | None = False
    use_rslora: bool | None = False
    alpha_pattern: dict[str, Any] | None = None
    init_lora_weights: bool | Text | None = True
    base_model_name_or_path: Text | None = None
