"""Files of tensors from anywhere: fetched, read without executing anything, errors in one line."""

import hashlib
import json
import re
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import torch
from msgspec import to_builtins
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from support.command import UserError
from support.files import whole_file
from support.headers import HuggingFace, Names, T, Trained, Whole, checked

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PLAIN = (*FLOATS, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)
FORMER = "ce8a12f8beb7b8c9b1b6d2fd9e466cf4c912220e09543a9ac25fa343f3a1bee8"  # fingerprint of what lay in weights/ once


def remedy(sha256: str) -> str:
    """What to do where this backbone is wanted and another one is at hand."""
    former = "git show 138e3dd:weights/ast_demo.safetensors > former.safetensors gets it; then --weights"
    return f"{former} former.safetensors" if sha256 == FORMER else "give the right one as weights"


def fetch(repository: str) -> tuple[Path, Path]:
    """The weights and config.json of a model on the Hugging Face hub, through the user's own cache."""
    import huggingface_hub.utils  # here: it takes long, and few commands fetch anything
    from huggingface_hub.errors import EntryNotFoundError

    huggingface_hub.utils.logging.set_verbosity_error()  # no line for each of its five retries
    try:
        config = huggingface_hub.hf_hub_download(repository, "config.json")
        try:
            weights = huggingface_hub.hf_hub_download(repository, "model.safetensors")
        except EntryNotFoundError:
            weights = huggingface_hub.hf_hub_download(repository, "pytorch_model.bin")
    except Exception as error:  # the hub's client raises whatever its network stack does: all of it means "not fetched"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"cannot fetch {repository} from the Hugging Face hub ({reason}): download its config.json and "
            "model.safetensors by hand, and give their folder as --weights"
        ) from None
    return Path(weights), Path(config)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, all of them numbers in main memory; UserError names one that is not."""
    try:
        content = load_file(path) if path.suffix == ".safetensors" else unpickled(path)
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it ends too early"
        raise UserError(f"cannot read {path} ({reason}): download it again, or convert it to .safetensors") from None
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{path} holds no table of tensors: give a checkpoint of an AST")
    for name, tensor in content.items():
        if kind := unusual(tensor):
            raise UserError(f"{path}: {name} {kind}: give a checkpoint of plain numbers")
    return {str(name): tensor.detach() for name, tensor in content.items()}


def check_suffix(out: Path) -> None:
    """UserError unless `read_tensors` could read again what is to be written to `out`: it goes by the suffix."""
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: give the name of a file that ends in .safetensors")


def unpickled(path: Path):
    """What is in a file of torch.save; nothing is executed. ValueError with the reason if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of tensors that `unusual` refuses
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a small machine runs what the bytes say: a damaged file may raise anything
        if "GLOBAL" in str(error):
            raise ValueError("it holds Python code, which is never executed here") from None
        if isinstance(error, RuntimeError) and str(error):
            raise ValueError(str(error).splitlines()[0]) from None
        raise ValueError("it is no file of tensors") from None  # their own texts recommend to load it unsafely
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as zipped:  # an old format is no zip
        if damaged := zipped.testzip():  # torch does not look at checksums
            raise ValueError(f"its part {damaged} is damaged")
    return content


def sha256_of(content) -> str:
    """Of tensors and plain values in tables and lists, in any order of a table's keys."""
    digest = hashlib.sha256()

    def add(content):
        if isinstance(content, torch.Tensor):
            digest.update(f"{content.dtype} {tuple(content.shape)} ".encode())
            digest.update(content.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(content, dict):
            digest.update(f"{{{len(content)} ".encode())
            for key in sorted(content, key=repr):
                add(key)
                add(content[key])
        elif isinstance(content, list | tuple):
            digest.update(f"[{len(content)} ".encode())
            for value in content:
                add(value)
        else:
            digest.update(f"{content!r} ".encode(errors="backslashreplace"))

    add(content)
    return digest.hexdigest()


def unusual(tensor: torch.Tensor) -> str | None:
    """Why a tensor is not an array of finite numbers; None if it is one."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.device.type != "cpu":
        return "is sparse, nested or without numbers"
    if tensor.dtype not in PLAIN:
        return f"is of type {tensor.dtype}"
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        return "is larger than what is stored of it"
    # Not-a-numbers spread to both ends; asking each number takes 15 times as long.
    if tensor.numel() and not torch.stack(tensor.float().aminmax()).isfinite().all():
        return "holds a number that is not finite"
    return None


def read_json(path: Path, kind: type[T], mend: str = "download it again") -> T:
    """A JSON file that holds a table, as `kind`, one of those in support/headers.py."""
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): {mend}") from None
    return checked(content, kind, path)


def parse_json(text: str | bytes) -> dict:
    """A table of JSON. ValueError with the reason for anything else."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(content, dict):
        raise ValueError("it holds no table")
    return content


def read_names(path: Path) -> Names:
    """What the config.json of a model says, if there is one: a HuggingFace, or the names of another program's."""
    if not path.is_file():
        return HuggingFace()
    names = read_json(path, Names)
    return read_json(path, HuggingFace) if names.model_type == "audio-spectrogram-transformer" else names


def read_hf_config(path: Path) -> HuggingFace:
    """The config.json of a Hugging Face AST; the defaults if there is none, or it is another program's."""
    names = read_names(path)
    return names if isinstance(names, HuggingFace) else HuggingFace()


def read_metadata(path: Path) -> dict:
    """The description under the key `ast_petl` of a .safetensors file; empty in files that others wrote.

    UserError unless it is what support/headers.py says.
    """
    if not path.is_file():
        raise UserError(no_whole_file(path, "it is a folder" if path.is_dir() else "it is no file"))
    try:
        with safe_open(path, "pt") as file:
            header = parse_json((file.metadata() or {}).get("ast_petl", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()} if "digest" in header else {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(no_whole_file(path, str(error).splitlines()[0])) from None
    if not header:
        return header
    known = to_builtins(checked(header, Whole if "config" in header else Trained, path))
    seal = header.pop("seal", None)
    whole = seal is None or seal == sha256_of(header)
    digest = known.pop("digest", None)
    header.pop("digest", None)
    if not whole or (digest is not None and digest != sha256_of([tensors, described(header)])):
        raise UserError(no_whole_file(path, "it is damaged: its SHA-256 is another"))
    return {**header, **known}


def described(header: dict) -> dict:
    """What a digest is of besides tensors: what earlier versions read of a header, so that they find it right."""
    read = {*Whole.__struct_fields__} - {"record", "calibration"}
    return json.loads(json.dumps({name: value for name, value in header.items() if name in read}))


def read_header(path: Path, *needed: str) -> dict:
    """The description in a file of `save_trained` or `save_ast`. UserError if it is damaged or something else, or has
    not all keys that are `needed`."""
    header = read_metadata(path)
    if not header:
        raise UserError(no_whole_file(path, "it has no such header"))
    for name in needed:
        if name not in header:
            raise UserError(no_whole_file(path, f"its header has no {name}"))
    return header


def no_whole_file(path: Path, reason: str) -> str:
    """What is wrong, and what to do: only what train.py wrote is to be deleted, any other file may be a sound."""
    ours = re.fullmatch(r"fold\d+\.safetensors", path.name)
    mend = "delete it and train it again" if ours else "give a run of train.py or a foldK.safetensors"
    return f"{path} is no whole file of trained parts ({reason}): {mend}"


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], header: dict, **metadata: str) -> None:
    """A .safetensors file, whole or not at all, whose description under the key `ast_petl` is `header`. Damage shows by
    a digest of the tensors and what describes them, and by a seal, which is that of the whole description."""
    header = {**header, "digest": sha256_of([tensors, described(header)])}
    header["seal"] = sha256_of(json.loads(json.dumps(header)))
    with whole_file(Path(path)) as temporary:
        temporary.write_bytes(save(tensors, {**metadata, "ast_petl": json.dumps(header, separators=(",", ":"))}))
