"""How sure an answer is. A fold's validation clips tell it.

There are two questions. *Which class is it?* One temperature makes the probabilities right on
average (Guo et al., 2017). *Is it anything known?* Probabilities do not answer that: they say which
of the classes a sound is, if it is one of them, so noise gets a class, too.

So the confidence in an answer is its probability times a factor. The factor is 1 for sounds like
nine of ten validation clips, and near 0 for sounds unlike all of them. It is computed from ViM's
score (Wang et al., "ViM: Out-Of-Distribution with Virtual-logit Matching", CVPR 2022, eq. (4) to
(7)). ViM reads the vector of the head. Here it reads the middle of the network, because the head's
vector keeps what tells the classes apart, and loses much of what else a sound is.
`python -m tools.confidence` compares this score with others.
"""

from dataclasses import dataclass

import torch
from torch import nn

ENOUGH = 10  # right answers, of which nine stay
PARTS = 5  # of the validation clips: each is measured by what the others tell
RANK = 16  # principal directions


# ----------------------------------------------------------------------- the middle of the network


def half_of(model):
    """The number of blocks before the middle."""
    return (len(model.blocks) + 1) // 2


def middle_of(model, spectrogram):
    """The mean and the standard deviation over the tokens after half of the blocks, (clips, 2 dim).

    A model without blocks has the vector that the head reads.
    """
    if not model.blocks:
        return model.vector(spectrogram).float()
    tokens = model.embed(spectrogram)
    for block in model.blocks[: half_of(model)]:
        tokens = block(tokens)
    return statistics(tokens)


def statistics(tokens):  # (clips, tokens, dim)
    tokens = tokens.float()
    return torch.cat([tokens.mean(1), tokens.std(1)], dim=1)  # (clips, 2 dim)


def middle_and_vector(model, spectrogram):
    """`middle_of` and the vector that the head reads, (clips, dim), at the price of the vector."""
    if not model.blocks:
        vector = model.vector(spectrogram)
        return vector.float(), vector
    middles = []

    def keep(block, arguments, tokens):
        middles.append(statistics(tokens))

    with model.blocks[half_of(model) - 1].register_forward_hook(keep):
        vector = model.vector(spectrogram)
    return middles[0], vector


def width_of_middle(model):
    """2 dim; without blocks, the length of the vector."""
    if model.blocks:
        return 2 * model.config.dim
    linear = [module for module in model.head.modules() if isinstance(module, nn.Linear)]
    return linear[-1].in_features


@torch.inference_mode()
def middles_of(model, clips, indices, settings, machine):
    """The middle of the network for the clips `indices`, (clips, 2 dim), on the CPU."""
    model.eval()

    def compute(some):
        x, _ = clips.batch(some, machine.device)
        with machine.autocast(settings.dtype):
            return middle_of(model, x)

    index = torch.tensor(indices, dtype=torch.long, device=clips.features.device)
    return machine.in_batches(compute, index, settings.batch_size).cpu()


# ------------------------------------------------------------------------------------- what is kept


@dataclass(frozen=True)
class Calibration:
    """What a fold file keeps. The defaults change nothing: for runs without validation clips.

    `min_confidence` is what nine of ten right answers of the validation clips have, or more.
    `mean` and `std` (2 dim,) standardise the middle of the network. `directions` (rank, 2 dim) are
    its principal directions, of length 1, in thousandths. `alpha` weighs what lies outside of them
    against the logits. `limit` is the 90th percentile of the score, and `slope` how far above the
    limit the factor is 1/e.
    """

    temperature: float = 1.0
    min_confidence: float = 0.0
    mean: list[float] = ()
    std: list[float] = ()
    directions: list[list[int]] = ()
    alpha: float = 0.0
    limit: float = 0.0
    slope: float = 1.0

    def known(self, logits: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
        """Logits (clips, classes) and middles (clips, 2 dim) to factors (clips,).

        The factor is 1 for nine of ten known sounds, and near 0 for sounds unlike them.
        """
        if not self.mean:
            return torch.ones(len(logits), device=logits.device)
        return factor(self.score(logits, middle), self.limit, self.slope).to(logits)

    def score(self, logits: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
        """Logits and middles to ViM's scores (clips,), float64 on the CPU: higher is less known."""
        mean = torch.tensor(self.mean, dtype=torch.double)
        std = torch.tensor(self.std, dtype=torch.double)
        directions = torch.tensor(self.directions, dtype=torch.double) / 1000
        outside = distances((finite(middle) - mean) / std, directions)
        return score(finite(logits), outside, self.alpha)


def finite(numbers):
    """The numbers in float64 on the CPU. float16 may have overflowed."""
    return numbers.cpu().double().nan_to_num(0, 65_504, -65_504)


def distances(z, directions):
    """How far standardised middles (clips, 2 dim) lie outside of the principal directions."""
    return (z - z @ directions.T @ directions).norm(dim=1)


def score(logits, outside, alpha):
    """ViM's score, eq. (7) before the softmax: higher is less known."""
    return alpha * outside - logits.logsumexp(1)


def factor(scores, limit, slope):
    return ((limit - scores) / slope).clamp_max(0).exp()


# ------------------------------------------------------------------------------- how it is computed


def fit(logits, labels, middle, groups=()):
    """The Calibration of validation clips as plain JSON types.

    logits: (clips, classes). labels: (clips,). middle: (clips, 2 dim). groups: of every clip, or
    none. None if fewer than ENOUGH clips are answered right.
    """
    logits = finite(logits)
    middle = finite(middle)
    right = logits.argmax(1) == labels
    if right.sum() < ENOUGH:
        return None
    temperature = temperature_of(logits, labels)
    scores = scores_of_parts(logits, middle, groups)
    limit = scores.quantile(0.9)
    slope = 2 * (limit - scores.quantile(0.5)).clamp_min(1e-6)  # where all are alike
    confidence = (logits / temperature).softmax(1).amax(1) * factor(scores, limit, slope)
    least = tenth(confidence[right])
    mean, std, directions, alpha = principal(logits, middle, rank_for(logits))
    return {
        "temperature": round(temperature, 6),
        "min_confidence": int(1e6 * least) / 1e6,
        "mean": rounded(mean),
        "std": rounded(std),
        "directions": (1000 * directions).round().int().tolist(),
        "alpha": alpha.item(),
        "limit": limit.item(),
        "slope": slope.item(),
    }


def rank_for(logits):
    """The number of principal directions: fewer if there are few clips."""
    return min(RANK, len(logits) // PARTS)


def parts_of(groups, count):
    """The part of each of `count` clips, (clips,). A group, such as a speaker, is in one part.

    There are PARTS parts, or as many as there are groups. Without two groups, or if one of them has
    nearly all clips, clips are dealt out one by one.
    """
    names = list(dict.fromkeys(groups))
    part = torch.tensor([names.index(group) % PARTS for group in groups])
    if len(names) < 2 or part.bincount().max() > (1 - 1 / PARTS) * count:
        return torch.arange(count) % PARTS
    return part


def scores_of_parts(logits, middle, groups=()):
    """The scores of clips, (clips,). Each part of the clips is measured by the other parts.

    Clips lie nearer to directions that were computed from them than new clips do. Clips of a new
    speaker lie farther still.
    """
    part = parts_of(groups, len(logits))
    scores = torch.empty(len(logits), dtype=torch.double)
    rank = rank_for(logits)
    for k in part.unique():
        others = part != k
        mean, std, directions, alpha = principal(logits[others], middle[others], rank)
        outside = distances((middle[part == k] - mean) / std, directions)
        scores[part == k] = score(logits[part == k], outside, alpha)
    return scores


def tenth(confidence):
    """The number that nine of ten of these confidences (clips,) reach."""
    return confidence.sort().values[len(confidence) // 10].item()


def principal(logits, middle, rank):
    """Mean and deviation of the middles, their principal directions, and ViM's alpha, eq. (6).

    Alpha makes the distances of these clips as large as their greatest logits, on average.
    """
    mean = middle.mean(0)
    std = (middle - mean).square().mean(0).sqrt()
    std = std.clamp_min(1e-3 * std.mean() + 1e-6)  # what hardly differs is not blown up
    z = (middle - mean) / std
    directions = torch.linalg.svd(z, full_matrices=False).Vh[:rank]
    alpha = logits.amax(1).sum().abs() / distances(z, directions).sum().clamp_min(1e-6)
    return mean, std, directions, alpha


def rounded(vector):
    return [float(f"{x:.4g}") for x in vector.tolist()]


def temperature_of(logits, labels):
    """What the logits are divided by so that the cross-entropy is least, between 0.01 and 100.

    The targets are not quite 0 and 1 (Platt, 1999). Otherwise the temperature would be 0 where
    every answer is right.
    """
    doubt = 1 / (len(labels) + 2)
    targets = torch.nn.functional.one_hot(labels, logits.shape[1]) * (1 - doubt)
    targets = targets + doubt / logits.shape[1]
    low = -2.0  # log10 of 1 / temperature, in which the slope grows
    high = 2.0
    for _ in range(50):
        halfway = (low + high) / 2
        slope = (((logits * 10**halfway).softmax(1) - targets) * logits).sum()
        if slope > 0:
            high = halfway
        else:
            low = halfway
    return 10**-halfway


def error(probabilities, right, bins=15):
    """Expected calibration error in percent (Guo et al., 2017).

    It is how far the mean of the probabilities (clips,) of the given answers lies from the share
    that is `right`, (clips,), on average over bins of equal width.
    """
    number = (probabilities * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.double)
    gaps.index_add_(0, number, right.double() - probabilities.double())
    return 100 * gaps.abs().sum().item() / len(right)


def calibrated(header, validated, tested):
    """The header of a fold file with its calibration, if there is one.

    `validated` are logits (clips, classes), labels (clips,), middles (clips, 2 dim) and groups, of
    every clip or none. `tested` are logits, labels and middles. In percent, the result says how far
    probabilities are off, how many test clips are unsure, and how many of the others are right.
    """
    found = fit(*validated)
    if found is None:
        return header
    logits, labels, middles = tested
    result = dict(header["result"])
    for name, divisor in (("calibration_error", 1), ("calibrated_error", found["temperature"])):
        probabilities, answers = (finite(logits) / divisor).softmax(1).max(1)
        result[name] = round(error(probabilities, answers == labels), 4)
    # The last ones are those of tools.predict, divided by the temperature.
    confidence = probabilities * Calibration(**found).known(logits, middles).to(probabilities)
    sure = confidence >= found["min_confidence"]
    result["unsure"] = round(100 * (~sure).double().mean().item(), 4)
    if sure.any():
        result["sure_accuracy"] = round(100 * (answers == labels)[sure].double().mean().item(), 4)
    return {**header, "result": result, "calibration": found}
