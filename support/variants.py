"""A method with other numbers: what --rr, --alpha and --prompts say, and what suits a backbone."""

from dataclasses import replace

from support.command import UserError
from support.headers import Part, checked


def override(method, **numbers: float | None):
    """The method with another reduction rate `rr`, `alpha`, number of `prompts` or `kernel`.

    Every part that has the setting gets it. None leaves it. A UserError if no part has it.
    """
    for setting, value in numbers.items():
        if value is not None:
            method = with_number(method, setting, value)
    return method


def with_number(method, setting, value):
    if not has(method, setting):
        raise UserError(f"method {method.name!r} has no setting {setting!r}: leave --{setting} out")
    checked({"part": "", setting: value}, Part, f"--{setting} is {value}")
    return changed(method, setting, lambda old: value)


def changed(method, setting, change):
    """The method in whose parts the numbers called `setting` are what `change` makes of them."""
    parts = []
    for part in method.parts:
        if hasattr(part, setting):
            part = replace(part, **{setting: change(getattr(part, setting))})
        parts.append(part)
    return replace(method, parts=tuple(parts))


NARROW_LR = {"full_ft": 5e-4, "linear": 1e-2}  # ten times that of METHODS
NARROW_HEAD_LR = NARROW_LR["linear"]


def narrowed(method, dim: int):
    """The method for a backbone of `dim` dimensions, because the paper chose its numbers for 768.

    RR 64 at 768 dimensions is a bottleneck of 12; at 128 it would be 2. Reduction rates are divided
    so that about 8 remain, by 4 at 128 dimensions and not at all from 384 on. Prompts become fewer,
    and their number stays even. Learning rates are multiplied as reduction rates are divided, but
    at most by 4, those of full fine-tuning and `linear` by 10. All of this was chosen by validation
    clips, on the demo.
    The head has the rate that it has in `linear`, so that no method is worse because its head
    learns slowly.
    """
    factor = round(512 / dim)
    if factor <= 1:
        return method
    for setting in ("rr", "lora_rr"):
        method = changed(method, setting, lambda rate: max(1, rate // factor))
    method = changed(method, "prompts", lambda count: max(2, count // factor // 2 * 2))
    lr = NARROW_LR.get(method.name, min(1, min(4, factor) * method.lr))
    head_lr = NARROW_HEAD_LR if method.parts else None  # without parts the head is the method
    return replace(method, lr=lr, head_lr=head_lr)


def check_method(method, args):
    """The method with the numbers of the command line. UserError for one that it cannot have."""
    for name in ("epochs", "lr", "head_lr"):
        if getattr(args, name) is not None and has(method, "is_fitted"):
            option = name.replace("_", "-")
            raise UserError(
                f"--{option}: {method.name!r} is fitted and not trained in steps; leave it out"
            )
    return override(method, rr=args.rr, alpha=args.alpha, prompts=args.prompts, kernel=args.kernel)


def method_for(method, config, args, lr: float | None = None):
    """The method as a run trains it: `narrowed` to the backbone, then with the numbers of `args`.

    `config` is the shape of the backbone. `lr` is the dataset's own rate for this method, if it has
    one. A UserError for what the method cannot do.
    """
    keep = args.keep
    blocks = args.blocks
    method = narrowed(method, config.dim)
    lr = args.lr or lr or method.lr
    method = replace(method, lr=lr, head_lr=args.head_lr or method.head_lr, blocks=blocks)
    method = check_method(method, args)
    if keep and has(method, "needs_all_patches"):
        raise UserError(
            f"--keep {keep}: {method.name!r} needs the whole grid of patches; choose another method"
        )
    if blocks and not 1 <= blocks[0] <= blocks[1] <= config.depth:
        raise UserError(
            f"--blocks {blocks[0]}-{blocks[1]}: this backbone has the blocks 1 to {config.depth}; "
            "give the first and the last of them, or one"
        )
    if blocks and (not method.parts or has(method, "needs_all_blocks")):
        raise UserError(
            f"--blocks: {method.name!r} changes what comes before or after the blocks; leave it out"
        )
    if config.pool != "mean" and has(method, "pools_itself"):
        raise UserError(f"--pool {config.pool}: {method.name!r} pools in its own way; leave it out")
    return method


def has(method, attribute):
    return any(hasattr(part, attribute) for part in method.parts)
