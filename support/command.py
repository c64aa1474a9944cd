"""What the commands have in common: errors for people, options, the device."""

import argparse
import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from ast_model import UserError

NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)

# ------------------------------------------------------------------------------------------ options


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print its whole usage
        raise UserError(f"{message[:1000]} (--help shows all options)")


def numbers(text: str) -> list[int]:
    """The numbers of "0,1,2", each of them once."""
    words = text.split(",")
    if not all(is_number(word) for word in words):
        message = f"{text[:100]!r} is no list of whole numbers like 0,1,2"
        raise argparse.ArgumentTypeError(message)
    return list(dict.fromkeys(map(int, words)))


def span(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    return int(first), int(last if dash else first)


def is_number(text: str) -> bool:
    """Whether a text is a whole number of no more digits than anything here has."""
    return re.fullmatch("[0-9]{1,12}", text) is not None


def positive(text: str) -> int:
    if not is_number(text) or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"invalid positive value: {text[:100]!r}")
    return int(text)


def check_options(args: argparse.Namespace, own: bool) -> None:
    """UserError for an option of train.py that is out of its bounds.

    Some options are for the user's `own` sounds. `args.windows` becomes seconds, or None.
    """
    if args.lr is not None and not 0 < args.lr <= 1:
        raise UserError(f"--lr is {args.lr}; it must be positive and at most 1")
    if args.keep is not None and not 0 < args.keep < 1:
        raise UserError(f"--keep is {args.keep}; it must be a share between 0 and 1")
    if args.seconds is not None and not 0.16 <= args.seconds <= 60:
        raise UserError(f"--seconds is {args.seconds}; a clip must last 0.16 s (one patch) to 60 s")
    for name in ("group", "windows"):
        if getattr(args, name) not in (None, False) and not own:
            raise UserError(
                f"--{name} is for your own sounds, --dataset folder or csv, not for {args.dataset}"
            )
    if args.windows and args.seconds is None:
        raise UserError("--windows: say by --seconds how long the windows are")
    args.windows = args.seconds if args.windows else None
    if max(args.seed) >= 2**31:
        raise UserError(f"--seed {max(args.seed)} is too large; choose numbers below {2**31}")


def chosen_folds(chosen: list[int] | None, known: list[int], dataset: str) -> list[int]:
    """The folds of --folds, or all. UserError for one that the dataset does not have."""
    if unknown := set(chosen or []) - set(known):
        folds = ", ".join(map(str, known))
        raise UserError(f"--folds {min(unknown)}: {dataset} has the folds {folds}")
    return chosen or known


def choose_device(name: str) -> torch.device:
    """The device of this process. Under torchrun each process has its own GPU.

    UserError if there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if not re.fullmatch(r"cpu|mps|cuda:\d+", name):
        raise UserError(f"--device {name}: choose auto, cpu, cuda, cuda:1, ... or mps")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        version = torch.__version__
        raise UserError(
            f"--device {name}: there is none that this PyTorch ({version}) can use"
        ) from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def choose_dtype(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


# ------------------------------------------------------------------------------------------- errors


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command. What the user can mend becomes one line and the exit code 2."""
    print_anything()
    try:
        code = command() or 0
        sys.stdout.flush()  # an error of what is still to be written shows now
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough
        forget_output()
        return 1
    except OSError as error:  # the machine's state, not a mistake of the program
        print(f"error: {reason_of(error)}", file=sys.stderr)
        forget_output()
        return 2
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        return 130


def print_anything() -> None:
    """Let names of files be printed that the locale cannot show."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before the start
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        with suppress(AttributeError):  # a test's output is no file
            getattr(sys, name).reconfigure(errors="backslashreplace")


def forget_output() -> None:
    """Lose what cannot be printed. Else Python would complain once more when it flushes."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    with suppress(OSError, ValueError):  # a test's output is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def reason_of(
    error: OSError, where: Path | str = "the output", mend: str = "", what: str = ""
) -> str:
    """One line about what went wrong, and where: `where`, unless the error itself says it.

    `mend` follows a full disk. `what` precedes any other error.
    """
    where = str(error.filename or where)
    if len(where) > 1000:  # it is too long to be a name
        where = f"{where[:100]}..."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({where}): free some space{mend}"
    return f"{what}{where}: {error.strerror or error}"


def no_place(error: OSError, places: dict[str, Path]) -> str:
    """A question for the end of a message, where an option does not name a folder to write to."""
    if error.errno not in NO_PLACE:
        return ""
    at = Path(str(error.filename or "")).absolute()
    for option, place in places.items():
        place = place.absolute()
        if at.is_relative_to(place) or place.is_relative_to(at):
            return f"; is {option} a folder to write to?"
    return ""


def out_of_memory(error: Exception) -> bool:
    """Whether the memory of a GPU or a CPU was too small. PyTorch has no class for a CPU's."""
    is_known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return is_known or "can't allocate memory" in str(error)


@contextmanager
def explained(device: torch.device, tried: int, out: Path, cache_dir: Path):
    """Turn what the machine has too little of into a UserError. `tried`: clips at once."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"out of memory on {device}: choose a --micro-batch smaller than {tried}"
        ) from None
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        reason = reason_of(error, out, mend=", then add --resume to go on")
        hint = no_place(error, {"--out": out, "--cache-dir": cache_dir})
        raise UserError(reason + hint) from None
    except KeyboardInterrupt:
        hint = "interrupted: the same command with --resume goes on after the last finished epoch"
        raise KeyboardInterrupt(hint) from None


@contextmanager
def needed(by: str, packages: str = "-r requirements-figures.txt"):
    """Turn a missing package into a UserError. `by` says who needs it, `packages` how to get it."""
    try:
        yield
    except ImportError as error:
        name = (error.name or "").partition(".")[0]
        raise UserError(f"{by} {name}: pip install {packages}") from None


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def nearest(name: str, known: Iterable[str], what: str) -> None:
    """UserError that suggests the nearest name unless `name` is one of `known`."""
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        names = ", ".join(known)
        raise UserError(f"unknown {what} {name!r}: did you mean {close!r}? There are {names}")


def first_of(names: list[str]) -> str:
    """The first five of a list, for a message."""
    short = [name if len(name) <= 100 else f"{name[:97]}..." for name in names[:5]]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(short) + more or "nothing"
