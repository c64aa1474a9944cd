"""A method with other numbers: what --rr, --alpha and --prompts say, and what suits a narrow backbone."""

import math
from dataclasses import replace

from support.command import UserError
from support.headers import LIMITS, checked


def override(method, rr: int | None = None, alpha: float | None = None, prompts: int | None = None, kernel=None):
    """The method with another reduction rate, alpha, number of prompts or window, in every part that has one.

    Raises UserError where the method has no such setting.
    """
    for setting, value in {"rr": rr, "alpha": alpha, "prompts": prompts, "kernel": kernel}.items():
        if value is None:
            continue
        if not any(hasattr(part, setting) for part in method.parts):
            raise UserError(f"method {method.name!r} has no setting {setting!r}: leave --{setting} out")
        if not 0 < value < math.inf:
            raise UserError(f"--{setting} is {value}; it must be a positive number")
        said = f"--{setting} is {value}"
        checked(value, LIMITS[setting], said)
        try:
            parts = [replace(part, **{setting: value}) if hasattr(part, setting) else part for part in method.parts]
        except ValueError as error:  # the part itself refuses it
            raise UserError(f"{said}: {error}") from None
        method = replace(method, parts=tuple(parts))
    return method


NARROW_LR = {"full_ft": 5e-4, "linear": 1e-2}  # ten times that of METHODS


def narrowed(method, dim: int):
    """The method for a backbone of `dim` dimensions: what the paper chose for 768 does not suit a narrow one.

    RR 64 at 768 dimensions is a bottleneck of 12; at 128 it would be 2. Reduction rates are divided so that about 8
    remain, by 4 at 128 dimensions and not at all from 384 on, and prompts become fewer, of which an even number stays.
    What trains the backbone's own weights or the head alone learns faster there. Both were chosen on the demo backbone.
    """
    factor = round(512 / dim)
    if factor <= 1:
        return method
    scale = {"rr": lambda n: max(1, n // factor), "prompts": lambda n: max(2, n // factor // 2 * 2)}
    parts = (
        replace(part, **{name: f(getattr(part, name)) for name, f in scale.items() if hasattr(part, name)})
        for part in method.parts
    )
    return replace(method, parts=tuple(parts), lr=NARROW_LR.get(method.name, method.lr))


def check_method(method, args) -> None:
    """UserError for a number on the command line that the method has not, or that is out of its bounds."""
    override(method, args.rr, args.alpha, args.prompts, args.kernel)


def fitted(method, config, args, lr: float | None = None):
    """The method as a run trains it: `narrowed` to the backbone of shape `config`, then with the numbers of `args`.

    `lr` is the dataset's own rate for this method, if it has one. Raises UserError for what the method cannot do.
    """
    keep, blocks = args.keep, args.blocks
    method = narrowed(method, config.dim)
    method = replace(method, lr=args.lr or lr or method.lr, blocks=blocks)
    method = override(method, args.rr, args.alpha, args.prompts, args.kernel)
    if keep and any(hasattr(part, "needs_all_patches") for part in method.parts):
        raise UserError(f"--keep {keep}: {method.name!r} needs the whole grid of patches; choose another method")
    if blocks and not 1 <= blocks[0] <= blocks[1] <= config.depth:
        what = f"this backbone has the blocks 1 to {config.depth}; give the first and the last of them, or one"
        raise UserError(f"--blocks {blocks[0]}-{blocks[1]}: {what}")
    if blocks and (not method.parts or any(hasattr(part, "needs_all_blocks") for part in method.parts)):
        raise UserError(f"--blocks: {method.name!r} changes what comes before or after the blocks; leave it out")
    if config.pool != "mean" and any(hasattr(part, "pools_itself") for part in method.parts):
        raise UserError(f"--pool {config.pool}: {method.name!r} pools in its own way; leave it out")
    return method
