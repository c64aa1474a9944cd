"""Files of tensors from anywhere: fetched, read without executing anything, refused in one line."""

import hashlib
import io
import json
import re
import zipfile
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from ast_model import UserError
from support.command import warn
from support.files import require_file, whole_file
from support.headers import Extractor, HuggingFace, Names, check_header, checked

KINDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)

# ------------------------------------------------------------------------------------ any tensors


@cache
def fetch(repository: str) -> tuple[Path, Path]:
    """The weights and config.json of a model on the Hugging Face hub, through the user's cache.

    Beside them lies preprocessor_config.json, if the model has one.

    The hub is asked once. Without a network it takes half a minute until it gives up.
    """
    import huggingface_hub.utils  # here: it takes long, and few commands fetch anything
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    huggingface_hub.utils.logging.set_verbosity_error()  # no line for each of its five retries
    try:
        config = huggingface_hub.hf_hub_download(repository, "config.json")
        try:
            huggingface_hub.hf_hub_download(repository, "preprocessor_config.json")
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # no network to ask whether there is one
                warn(
                    f"{repository} lies here without preprocessor_config.json: taken as AudioSet's"
                )
        try:
            weights = huggingface_hub.hf_hub_download(repository, "model.safetensors")
        except EntryNotFoundError:
            weights = huggingface_hub.hf_hub_download(repository, "pytorch_model.bin")
    except Exception as error:  # the hub's client raises whatever its network stack raises
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"cannot fetch {repository} from the Hugging Face hub ({reason}): download its "
            "config.json, preprocessor_config.json and model.safetensors by hand, and give their "
            "folder as --weights; train.py --weights demo takes the small backbone that is here"
        ) from None
    return Path(weights), Path(config)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, all of them finite numbers in main memory. Else a UserError."""
    try:
        require_file(path)
        content = load_file(path) if path.suffix == ".safetensors" else unpickled(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path} ({error}): download it again, or convert it to .safetensors"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no table of tensors: give a checkpoint of an AST")
    for name, tensor in content.items():
        if problem := unusual(tensor):
            raise UserError(f"{path}: {name} {problem}: give a checkpoint of plain numbers")
    return {str(name): tensor.detach() for name, tensor in content.items()}


def check_suffix(out: Path) -> None:
    """UserError unless `read_tensors` can read a file of this name: the suffix says its format."""
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: give the name of a file that ends in .safetensors")


def unpickled(path: Path):
    """The content of a file of torch.save. A ValueError with the reason if it cannot be read.

    Nothing is executed.
    """
    try:
        require_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        if zipfile.is_zipfile(path):  # files of old versions of PyTorch are none
            with zipfile.ZipFile(path) as zipped:
                if zipped.testzip():  # PyTorch does not look at checksums
                    raise ValueError
    except OSError:
        raise
    except Exception as error:  # the bytes are a program: a damaged file may raise anything
        if "GLOBAL" in str(error):
            raise ValueError("it holds Python code, which is never executed here") from None
        # PyTorch's own text may recommend to load the file unsafely.
        raise ValueError("it is no whole file of tensors") from None
    return content


def write_state(path: Path, state: dict) -> None:
    """Write what `unpickled` reads, whole or not at all."""
    buffer = io.BytesIO()  # torch would call a full disk something else
    torch.save(state, buffer)
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def sha256_of(content) -> str:
    """The SHA-256 of tensors and plain values in tables and lists.

    The order of the keys of a table does not matter.
    """
    text = json.dumps(content, sort_keys=True, default=name_of_tensor)
    return hashlib.sha256(text.encode()).hexdigest()


def name_of_tensor(tensor):
    numbers = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(numbers).hexdigest()}"


def unusual(tensor):
    """Why a tensor is not an array of finite numbers; None if it is one."""
    if not isinstance(tensor, torch.Tensor):
        return "is no tensor"
    if tensor.layout != torch.strided or tensor.is_nested or tensor.device.type != "cpu":
        return "is sparse, nested or without numbers"
    if tensor.dtype not in KINDS:
        return f"is of type {tensor.dtype}"
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        return "is larger than what is stored of it"
    # A NaN makes both ends NaN. Looking at each number would take 15 times as long.
    if tensor.numel() and not torch.stack(tensor.float().aminmax()).isfinite().all():
        return "holds a number that is not finite"
    return None


# -------------------------------------------------------------------------------------- JSON files


def read_json(path: Path, kind: type, mend: str = "download it again"):
    """A JSON file that holds a table, as `kind`, a class of support/headers.py."""
    try:
        require_file(path)
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} ({error}): {mend}") from None
    return checked(content, kind, path)


def read_names(path: Path) -> Names:
    """What the config.json of a model says: a HuggingFace, or another program's Names.

    Without such a file it is a HuggingFace with nothing but defaults.
    """
    if not path.is_file():
        return HuggingFace()
    names = read_json(path, Names)
    if names.model_type == "audio-spectrogram-transformer":
        return read_json(path, HuggingFace)
    return names


def read_hf_config(path: Path) -> HuggingFace:
    """The config.json of a Hugging Face AST. The defaults if another program wrote it.

    A UserError if the AST reads another number of Mel bands than the features here have.
    """
    names = read_names(path)
    config = names if isinstance(names, HuggingFace) else HuggingFace()
    if config.num_mel_bins != HuggingFace().num_mel_bins:
        raise UserError(
            f"{path}: it reads {config.num_mel_bins} Mel bands, the features here have "
            f"{HuggingFace().num_mel_bins}: give another checkpoint"
        )
    return config


def read_mean_and_std(path: Path) -> tuple[float, float]:
    """By what the features are normalised that the checkpoint `path` was trained on.

    transformers writes it beside the checkpoint, into preprocessor_config.json. Without that file,
    and for a file of ours, these are the numbers of AudioSet. A UserError if that file describes
    features that cannot be made here.
    """
    file = path.with_name("preprocessor_config.json")
    if not file.is_file() or is_ours(path):
        return Extractor().mean, Extractor().std
    extractor = read_json(file, Extractor)
    config = read_hf_config(path.with_name("config.json"))
    wanted = {
        "feature_extractor_type": "ASTFeatureExtractor",
        "sampling_rate": 16_000,
        "num_mel_bins": config.num_mel_bins,
        "max_length": config.max_length,  # in transformers, too, the model would refuse another one
    }
    for name, value in wanted.items():
        found = getattr(extractor, name)
        if found != value and None not in (found, value):
            raise UserError(f"{file}: {name}: Expected {value}, got {found}")
    if not extractor.do_normalize:
        return 0.0, 0.5  # (fb - 0) / (2 * 0.5) is fb
    return extractor.mean, extractor.std


def is_ours(path: Path) -> bool:
    """Whether `write_tensors` wrote a file of tensors."""
    if path.suffix != ".safetensors":
        return False
    with safe_open(path, "pt") as file:
        return "ast_petl" in (file.metadata() or {})


# -------------------------------------------------------------------------------- files of our own


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], header: dict, **metadata: str
) -> None:
    """Write a .safetensors file, whole or not at all, with `header` under the key `ast_petl`.

    The header gets a digest of the tensors and of itself, which shows any damage.
    """
    header = json.loads(json.dumps(header))  # JSON has no tuples
    header["digest"] = sha256_of([tensors, header])
    text = json.dumps(header, separators=(",", ":"))
    with whole_file(Path(path)) as temporary:
        temporary.write_bytes(save(tensors, {**metadata, "ast_petl": text}))


def read_metadata(path: Path) -> dict:
    """The header of a file of `write_tensors`, without its digest. Empty in files of others.

    A UserError if the file is damaged, or if the header is not what support/headers.py says.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: give one file of trained parts, foldK.safetensors")
    if not path.is_file():
        raise no_whole_file(path, "it is no file")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("ast_petl", "{}")) or {}
            names = file.keys() if header else []
            tensors = {name: file.get_tensor(name) for name in names}
        digest = header.pop("digest", None)
        is_whole = not header or digest == sha256_of([tensors, header])
    except (SafetensorError, OSError, ValueError, RecursionError, AttributeError) as error:
        raise no_whole_file(path, error) from None
    if not is_whole:
        raise no_whole_file(path, "it is damaged: its SHA-256 is another")
    if header:
        check_header(header, path)
    return header


def read_header(path: Path, *needed: str) -> dict:
    """The header of a file of ours. A UserError if it is damaged or lacks a key that is needed."""
    header = read_metadata(path)
    if not header:
        raise no_whole_file(path, "it has no such header")
    for name in needed:
        if name not in header:
            raise no_whole_file(path, f"its header has no {name}")
    return header


def no_whole_file(path, reason):
    """An error that says what is wrong and what to do.

    Only a file that train.py wrote may be deleted. Another file may be a sound.
    """
    mend = "give a run of train.py or a foldK.safetensors"
    if re.fullmatch(r"fold[0-9]+\.safetensors", path.name):
        mend = "delete it and train it again"
    return UserError(f"{path} is no whole file of trained parts ({reason}): {mend}")
