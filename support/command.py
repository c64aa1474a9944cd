"""What the commands have in common: errors for people, options, the device."""

import argparse
import difflib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from ast_model import UserError
from support import stop

# ------------------------------------------------------------------------------------------ options


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print its whole usage
        raise UserError(f"{message} (--help shows all options)")


def numbers(text):
    """The numbers of "0,1,2", each of them once."""
    words = text.split(",")
    if not all(is_number(word) for word in words):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of whole numbers like 0,1,2, below 2**31"
        )
    return list(dict.fromkeys(map(int, words)))


def span(text):
    first, dash, last = text.partition("-")
    return int(first), int(last if dash else first)


def is_number(text: str) -> bool:
    """Whether a text is a whole number below 2**31."""
    return re.fullmatch("[0-9]{1,10}", text) is not None and int(text) < 2**31


def positive(text):
    """A number from 1 on. argparse makes a message of the ValueError."""
    if not is_number(text) or int(text) == 0:
        raise ValueError
    return int(text)


def check_options(args, own):
    """UserError for an option of train.py that is out of its bounds.

    Some options are for the user's `own` sounds.
    """
    for name in ("lr", "head_lr"):
        rate = getattr(args, name)
        if rate is not None and not 0 < rate <= 1:
            option = name.replace("_", "-")
            raise UserError(f"--{option} is {rate}; it must be positive and at most 1")
    if args.keep is not None and not 0 < args.keep < 1:
        raise UserError(f"--keep is {args.keep}; it must be a share between 0 and 1")
    if args.seconds is not None and not 0.16 <= args.seconds <= 60:
        raise UserError(f"--seconds is {args.seconds}; a clip must last 0.16 s (one patch) to 60 s")
    for name, given in (
        ("group", args.group is not None),
        ("windows", args.windows),
        ("no-background", not args.background),
        ("skip-silent", args.skip_silent),
    ):
        if given and not own:
            raise UserError(
                f"--{name} is for your own sounds, --dataset folder or csv, not for {args.dataset}"
            )
    if args.windows and args.dataset == "csv":
        raise UserError(
            "--windows cuts the recordings of --dataset folder; --dataset csv cuts what its labels "
            "or its columns start and end name"
        )
    if args.windows and args.seconds is None:
        raise UserError("--windows: say by --seconds how long the windows are")


def chosen_folds(chosen, known, dataset):
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
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # `meta` has no numbers
    except (RuntimeError, AssertionError):
        raise UserError(
            f"--device {name}: this PyTorch ({torch.__version__}) cannot use it; choose auto, cpu, "
            "cuda, cuda:1, ... or mps"
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


# ------------------------------------------------------------------------- what is printed, errors


def printable(text: object) -> str:
    """A text that a terminal can print. A control character in a name would command the terminal.

    A control character becomes its escape, such as \\x1b. A byte NN of a file's name that is no
    text becomes \\xNN. Python reads such a byte as the character \\udcNN.
    """
    shown = (c if c.isprintable() else repr(c)[1:-1] for c in str(text))
    return "".join(shown).replace("\\udc", "\\x")


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command. What the user can mend becomes one line and the exit code 2."""
    if signal.getsignal(signal.SIGINT) is stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):  # names of files that the locale cannot show
        with suppress(AttributeError):  # a test's output is no file
            stream.reconfigure(errors="backslashreplace")
    try:
        code = command() or 0
        sys.stdout.flush()  # an error of what is still to be written shows now
        return code
    except UserError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2
    except OSError as error:  # the machine's state, not a mistake of the program
        forget_output()
        if isinstance(error, BrokenPipeError):  # `| head` has seen enough
            return 1
        print(f"error: {printable(reason_of(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        return 130


def forget_output():
    """Lose what cannot be printed. Else Python would complain once more when it flushes."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def reason_of(error: OSError, where: Path | str = "the output", mend: str = "") -> str:
    """One line about what went wrong, and where: `where`, unless the error itself says it.

    `mend` follows a full disk.
    """
    where = error.filename or where
    if error.errno == errno.ENOSPC:
        return f"the disk is full ({where}): free some space{mend}"
    return f"{where}: {error.strerror or error}"


def no_place(error: OSError, places: dict[str, Path]) -> str:
    """A question for the end of a message, if the error is about the place that an option names."""
    if error.filename is None or error.errno == errno.ENOSPC:
        return ""
    at = Path(error.filename).absolute()
    for option, place in places.items():
        place = place.absolute()
        if at.is_relative_to(place) or place.is_relative_to(at):
            return f"; is {option} a folder to write to?"
    return ""


def out_of_memory(error):
    """Whether the memory of a GPU or a CPU was too small. PyTorch has no class for a CPU's."""
    is_known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return is_known or "can't allocate memory" in str(error)


@contextmanager
def needed(by: str, packages: str = "-r requirements-figures.txt"):
    """Turn a missing package into a UserError. `by` says who needs it, `packages` how to get it."""
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        raise UserError(f"{by} {package}: pip install {packages}") from None


def warn(message: str) -> None:
    print(f"warning: {printable(message)}", file=sys.stderr)


def nearest(name: str, known: Iterable[str], what: str) -> None:
    """UserError that suggests the nearest name unless `name` is one of `known`."""
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise UserError(f"unknown {what} {name!r}: did you mean {close!r}?")


def first_of(names: list[str]) -> str:
    """The first five of a list, for a message. Names with a comma in them stand in quotes."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    shown = [repr(name) if "," in name else name for name in names[:5]]
    return ", ".join(shown) + more or "nothing"
