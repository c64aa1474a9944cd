"""Files of tensors from anywhere: fetched, read without executing anything, errors in one line."""

import json
import pickle
from pathlib import Path

import huggingface_hub
import huggingface_hub.utils
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from support.command import UserError, first_of
from support.files import whole_file


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


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path} (it holds no table): download it again")
    return content


def read_metadata(path: Path) -> dict:
    """The description under the key `ast_petl` of a .safetensors file; empty in files that others wrote."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("ast_petl", "{}"))


def read_header(path: Path) -> dict:
    """The description in a file of `save_trained` or `save_ast`. UserError if it is damaged or something else."""
    try:
        if header := read_metadata(path):
            return header
        reason = "it has no such header"
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
    raise UserError(f"{path} is no whole file of trained parts ({reason}): delete it and train it again")


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
