"""How sure an answer is. The logits of a fold's validation clips tell it.

What they tell is kept as `calibration` in the header of the fold file. One temperature makes the
probabilities right on average (Guo et al., 2017). Probabilities say which of the classes a sound
is, if it is one of them: noise gets a class, too. So the confidence in an answer is its
probability times a factor. The factor is small where the logits lie farther from those of every
class than is usual, by their Mahalanobis distance (Lee et al., 2018).
"""

from dataclasses import dataclass

import torch

ENOUGH = 10  # right answers, of which nine stay
PARTS = 5  # of the validation clips: each is measured by what the others tell


@dataclass(frozen=True)
class Calibration:
    """The defaults change nothing: for runs without validation clips.

    `min_confidence` is what nine of ten right answers of the validation clips have, or more.
    `whitening` (classes, classes) makes distances of logits Mahalanobis', 1 being usual.
    `centres` (classes with validation clips, classes) are the whitened mean logits of each class.
    """

    temperature: float = 1.0
    min_confidence: float = 0.0
    whitening: list[list[float]] = ()
    centres: list[list[float]] = ()

    def known(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (clips, classes) to factors (clips,).

        The factor is 1 for half of the known sounds, and near 0 for sounds of no class.
        """
        if not self.centres:
            return torch.ones(len(logits), device=logits.device)
        whitening = torch.tensor(self.whitening, dtype=torch.double)
        centres = torch.tensor(self.centres, dtype=torch.double)
        return factor(distances(finite(logits), whitening, centres)).to(logits)


def finite(logits):
    """The logits in float64 on the CPU. float16 may have overflowed."""
    return logits.cpu().double().nan_to_num(0, 65_504, -65_504)


def distances(logits, whitening, centres):
    """The squared distance of each clip to the nearest centre, (clips,)."""
    return torch.cdist(logits @ whitening, centres).amin(1).square()


def factor(distances):
    return (1 - distances).clamp_max(0).exp()


def fit(logits, labels):
    """The Calibration of validation clips as plain JSON types.

    logits: (clips, classes). labels: (clips,). None if fewer than ENOUGH clips are answered right.
    """
    logits = finite(logits)
    right = logits.argmax(1) == labels
    if right.sum() < ENOUGH:
        return None
    temperature = temperature_of(logits, labels)
    # Measured by Gaussians that know them, these clips would lie nearer than new ones do.
    part = torch.arange(len(logits)) % PARTS
    squares = torch.empty(len(logits), dtype=torch.double)
    for k in range(PARTS):
        others = part != k
        whitening, centres = gaussians(logits[others], labels[others])
        squares[part == k] = distances(logits[part == k], whitening, centres)
    usual = squares.median().clamp_min(1e-12)  # where all are alike
    whitening, centres = gaussians(logits, labels)
    confidence = (logits / temperature).softmax(1).amax(1) * factor(squares / usual)
    least = confidence[right].sort().values[right.sum() // 10].item()
    return {
        "temperature": round(temperature, 6),
        "min_confidence": int(1e6 * least) / 1e6,
        "whitening": rounded(whitening / usual.sqrt()),
        "centres": rounded(centres / usual.sqrt()),
    }


def rounded(matrix):
    return [[float(f"{x:.6g}") for x in row] for row in matrix.tolist()]


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
        middle = (low + high) / 2
        slope = (((logits * 10**middle).softmax(1) - targets) * logits).sum()
        if slope > 0:
            high = middle
        else:
            low = middle
    return 10**-middle


def gaussians(logits, labels):
    """One Gaussian for each class, with the covariance of all: whitening and whitened means.

    The whitening is (classes, classes), the means are (classes that are there, classes). Few clips
    leave directions without any spread. So there is, besides, one clip in every direction that is
    as far out as the average clip.
    """
    seen, number = labels.unique(return_inverse=True)
    means = torch.stack([logits[labels == label].mean(0) for label in seen])
    rest = logits - means[number]
    spread = (logits - logits.mean(0)).square().mean().clamp_min(1e-12)
    identity = torch.eye(logits.shape[1], dtype=torch.double)
    covariance = (rest.T @ rest + spread * identity) / len(logits)
    whitening = torch.linalg.cholesky(torch.linalg.inv(covariance))
    return whitening, means @ whitening


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

    `validated` and `tested` are pairs of logits (clips, classes) and labels (clips,).
    """
    found = fit(*validated)
    if found is None:
        return header
    logits, labels = tested
    result = dict(header["result"])
    for name, divisor in (("calibration_error", 1), ("calibrated_error", found["temperature"])):
        probabilities, answers = (finite(logits) / divisor).softmax(1).max(1)
        result[name] = round(error(probabilities, answers == labels), 4)
    return {**header, "result": result, "calibration": found}
