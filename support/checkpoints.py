"""Files of tensors from anywhere: fetched, read without executing anything, errors in one line."""

import json
import pickle
from pathlib import Path
from typing import TypeVar

import huggingface_hub
import huggingface_hub.utils
import torch
from huggingface_hub.errors import EntryNotFoundError
from msgspec import to_builtins
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from support.command import UserError, first_of
from support.files import whole_file
from support.headers import HuggingFace, Names, Trained, Whole, checked

T = TypeVar("T")


def fetch(repository: str) -> tuple[Path, Path]:
    """The weights and config.json of a model on the Hugging Face hub, through the user's own cache."""
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
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        if "GLOBAL" in str(error):
            reason = "it holds Python code, which is never executed here"
        elif isinstance(error, pickle.UnpicklingError):  # whose own text recommends to load it unsafely
            reason = "it is no file of tensors"
        else:
            reason = str(error).splitlines()[0] if str(error) else "it ends too early"
        raise UserError(f"cannot read {path} ({reason}): download it again, or convert it to .safetensors") from None
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{path} holds no table of tensors: give a checkpoint of an AST")
    return content


def read_json(path: Path, kind: type[T], mend: str = "download it again") -> T:
    """A JSON file that holds a table, as `kind`, one of those in support/headers.py."""
    try:
        return checked(parse_json(path.read_bytes()), kind, path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): {mend}") from None


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


def read_metadata(path: Path) -> dict:
    """The description under the key `ast_petl` of a .safetensors file; empty in files that others wrote.

    UserError unless it is what support/headers.py says.
    """
    try:
        with safe_open(path, "pt") as file:
            header = parse_json((file.metadata() or {}).get("ast_petl", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(no_whole_file(path, str(error).splitlines()[0])) from None
    return header and {**header, **to_builtins(checked(header, Whole if "config" in header else Trained, path))}


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
    return f"{path} is no whole file of trained parts ({reason}): delete it and train it again"


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], header: dict, **metadata: str) -> None:
    """A .safetensors file, whole or not at all, whose description under the key `ast_petl` is `header`."""
    with whole_file(Path(path)) as temporary:
        temporary.write_bytes(save(tensors, {**metadata, "ast_petl": json.dumps(header)}))


def fill(model: torch.nn.Module, state: dict[str, torch.Tensor], origin: str, but: str | None = None) -> None:
    """Let the tensors of `state` be those of the model; names that begin with `but` need not be among them.

    Raises UserError for tensors of another shape, for missing and for unknown ones; `origin` says where they are from.
    """
    try:
        missing, unknown = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise UserError(f"{origin} is no AST of one shape: {str(error).splitlines()[-1].strip()}") from None
    missing = [name for name in missing if but is None or not name.startswith(but)]
    if missing or unknown:
        raise UserError(f"{origin} is no AST checkpoint: missing {first_of(missing)}; unknown {first_of(unknown)}")
