"""What the commands have in common: errors for people, options, the device."""

import argparse
import difflib
import errno
import gc
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from ast_model import UserError

NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print its whole usage
        raise UserError(f"{message[:1000]} (--help shows all options)")

    def parse_known_args(self, args=None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            if word.startswith("--") and word.endswith("=--"):  # argparse would make an empty list of it
                self.error(f"argument {word[:-3]}: expected one argument")
        return super().parse_known_args(args, namespace)


def numbers(text: str) -> list[int]:
    for word in text.split(","):
        if not is_number(word):
            what = "too large" if word.isdecimal() else "no list of whole numbers like 0,1,2"
            raise argparse.ArgumentTypeError(f"{text[:100]!r} is {what}")
    return list(dict.fromkeys(int(word) for word in text.split(",")))  # each of them once


def span(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    return int(first), int(last if dash else first)


def is_number(text: str) -> bool:
    """Whether a text is a whole number, of no more digits than anything here can have."""
    return text.isdecimal() and len(text) <= 12


def positive(text: str) -> int:
    if not is_number(text.strip().removeprefix("+")) or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"invalid positive value: {text[:100]!r}")
    return int(text)


def check_options(args: argparse.Namespace, own: bool) -> None:
    """UserError for an option of train.py that is out of its bounds, or for the user's `own` sounds alone.
    `args.windows` becomes seconds, or None."""
    if args.lr is not None and not 0 < args.lr <= 1:
        raise UserError(f"--lr is {args.lr}; it must be positive and at most 1")
    if args.keep is not None and not 0 < args.keep < 1:
        raise UserError(f"--keep is {args.keep}; it must be a share between 0 and 1")
    if args.seconds is not None and not 0.16 <= args.seconds <= 60:
        raise UserError(f"--seconds is {args.seconds}; a clip must last 0.16 s (one patch) to 60 s")
    for name in ("group", "windows"):
        if getattr(args, name) not in (None, False) and not own:
            raise UserError(f"--{name} is for your own sounds, --dataset folder or csv, not for {args.dataset}")
    if args.group and len(args.group) > 1000:  # config.json would not take it
        raise UserError(f"--group has {len(args.group)} characters; give it 1000 or less")
    if args.windows and args.seconds is None:
        raise UserError("--windows: say by --seconds how long the windows are")
    args.windows = args.seconds if args.windows else None
    if max(args.seed) >= 2**31:
        raise UserError(f"--seed {max(args.seed)} is too large; choose numbers below {2**31}")


def chosen_folds(chosen: list[int] | None, known: list[int], dataset: str) -> list[int]:
    """Those of --folds, or all. UserError for one that the dataset does not have."""
    if unknown := set(chosen or []) - set(known):
        raise UserError(f"--folds {min(unknown)}: {dataset} has the folds {', '.join(map(str, known))}")
    return chosen or known


def choose_device(name: str) -> torch.device:
    """The device of this process; under torchrun each has its own GPU. UserError if it is not there."""
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
        raise UserError(f"--device {name}: there is none that this PyTorch ({torch.__version__}) can use") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def choose_dtype(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command. What the user can mend becomes one line and the exit code 2, here and in the other commands."""
    print_anything()
    # What PyTorch brings stays, and loading more of it or 100,000 clips leaves no garbage: a tenth of a start's time.
    gc.freeze()
    gc.set_threshold(50_000)
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
    """Let nothing that is printed be an error: names of files hold what the locale cannot show."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before the start
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        with suppress(AttributeError):  # a test's output is no file
            getattr(sys, name).reconfigure(errors="backslashreplace")


def reason_of(error: OSError, where: Path | str = "the output", mend: str = "", what: str = "") -> str:
    """One line about `where`, unless the error itself says where: that the disk is full, or `what` went wrong."""
    where = str(error.filename or where)
    where = where if len(where) <= 1000 else f"{where[:100]}..."  # it is too long to be a name
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({where}): free some space{mend}"
    return f"{what}{where}: {error.strerror or error}"


def no_place(error: OSError, places: dict[str, Path]) -> str:
    """A question behind the message, where what an option names is no folder, or not one to write to."""
    at = Path(str(error.filename or "")).absolute()
    for option, place in places.items():
        if error.errno in NO_PLACE and (at.is_relative_to(place.absolute()) or place.absolute().is_relative_to(at)):
            return f"; is {option} a folder to write to?"
    return ""


def out_of_memory(error: Exception) -> bool:
    """Also that of a CPU, which PyTorch has no name for."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def forget_output() -> None:
    """What is still to be printed and cannot be is lost: Python would complain once more when it flushes at the end."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    with suppress(OSError, ValueError):  # a test's output is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def explained(device: torch.device, tried: int, out: Path, cache_dir: Path):
    """What the machine has too little of becomes a UserError; `tried` is the batch that did not fit into its memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"out of memory on {device}: choose a --micro-batch smaller than {tried}") from None
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        said = reason_of(error, out, mend=", then add --resume to go on")
        raise UserError(said + no_place(error, {"--out": out, "--cache-dir": cache_dir})) from None
    except KeyboardInterrupt:
        hint = "interrupted: the same command with --resume goes on after the last finished epoch"
        raise KeyboardInterrupt(hint) from None


@contextmanager
def at_most(seconds: float, message: str):
    """UserError with this message where what is done inside takes longer; only where there are such signals."""

    def stop(*_):
        raise UserError(message)

    try:
        before = signal.signal(signal.SIGALRM, stop)
    except (AttributeError, ValueError):  # another system, or not in the main thread
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def needed(so: str, packages: str = "-r requirements-figures.txt"):
    """For imports: what is not installed becomes a UserError, `so` being who needs it and `packages` how to get it."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{so} {(error.name or '').partition('.')[0]}: pip install {packages}") from None


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def nearest(name: str, known: Iterable[str], what: str, hint: str = "") -> str:
    """`name` if it is one of `known`; else a UserError that suggests the nearest."""
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
    raise UserError(f"unknown {what} {name!r}: did you mean {close!r}?" + (hint or f" There are {', '.join(known)}"))


def first_of(names: list[str]) -> str:
    """The first five of a list, for a message."""
    shown = [name if len(name) <= 100 else f"{name[:97]}..." for name in names[:5]]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"
