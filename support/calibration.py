"""How sure an answer is: what the logits of a fold's validation clips tell, kept as `calibration` in its header.

One temperature makes the probabilities right on average (Guo et al., 2017). They say which of the classes it is, if it
is one of them: noise gets a class, too. So the confidence in an answer is its probability, less where the logits lie
farther from those of every class than is usual, by their Mahalanobis distance (Lee et al., 2018).
"""

from dataclasses import dataclass

import torch

ENOUGH = 10  # right answers, of which nine stay
PARTS = 5  # of the validation clips: each is measured by what the others tell


@dataclass(frozen=True)
class Calibration:
    """The defaults change nothing: for runs without validation clips."""

    temperature: float = 1.0
    min_confidence: float = 0.0  # nine of ten right answers of the validation clips have this or more
    whitening: list[list[float]] = ()  # (classes, classes): makes distances of logits Mahalanobis', 1 being usual
    centres: list[list[float]] = ()  # (classes with validation clips, classes): the whitened mean logits of each

    def known(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (clips, classes) to factors (clips,): 1 for half of the known sounds, near 0 for what is none."""
        if not self.centres:
            return torch.ones(len(logits), device=logits.device)
        whitening, centres = (torch.tensor(each, dtype=torch.double) for each in (self.whitening, self.centres))
        return factor(distances(finite(logits), whitening, centres)).to(logits)


def finite(logits: torch.Tensor) -> torch.Tensor:
    """In float64 on the CPU; float16 may have overflowed."""
    return logits.cpu().double().nan_to_num(0, 65_504, -65_504)


def distances(logits: torch.Tensor, whitening: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """The squared distance of each, (clips,), to the nearest centre."""
    return torch.cdist(logits @ whitening, centres).amin(1).square()


def factor(distances: torch.Tensor) -> torch.Tensor:
    return (1 - distances).clamp_max(0).exp()


def fit(logits: torch.Tensor, labels: torch.Tensor) -> dict | None:
    """The Calibration of validation clips, their logits (clips, classes) and labels (clips,), as plain JSON types.

    None where fewer than ENOUGH clips are answered right.
    """
    logits, right = finite(logits), logits.argmax(1) == labels
    if right.sum() < ENOUGH:
        return None
    temperature = temperature_of(logits, labels)
    # Measured by Gaussians that know them, these clips would lie nearer than new ones do.
    part, squares = torch.arange(len(logits)) % PARTS, torch.empty(len(logits), dtype=torch.double)
    for held in (part == k for k in range(PARTS)):
        squares[held] = distances(logits[held], *gaussians(logits[~held], labels[~held]))
    usual = squares.median().clamp_min(1e-12)  # where all are alike
    whitening, centres = (each / usual.sqrt() for each in gaussians(logits, labels))
    confidence = (logits / temperature).softmax(1).amax(1) * factor(squares / usual)
    least = confidence[right].sort().values[right.sum() // 10].item()
    found = {"temperature": round(temperature, 6), "min_confidence": int(1e6 * least) / 1e6}
    for name, rows in (("whitening", whitening), ("centres", centres)):
        found[name] = [[float(f"{x:.6g}") for x in row] for row in rows.tolist()]
    return found


def temperature_of(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """What the logits are divided by so that the cross-entropy is least, between 0.01 and 100.

    As by Platt (1999) the targets are not quite 0 and 1: else it would be 0 where every answer is right.
    """
    doubt = 1 / (len(labels) + 2)
    targets = torch.nn.functional.one_hot(labels, logits.shape[1]) * (1 - doubt) + doubt / logits.shape[1]
    low, high = -2.0, 2.0  # log10 of 1 / temperature, in which the slope grows
    for _ in range(50):
        middle = (low + high) / 2
        slope = (((logits * 10**middle).softmax(1) - targets) * logits).sum()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return 10**-middle


def gaussians(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The whitening (classes, classes) and whitened means (classes that are there, classes) of one Gaussian a class,
    with the covariance of all. In every direction there is, besides, one clip as far out as the average clip is: few
    clips leave directions without any spread."""
    seen, number = labels.unique(return_inverse=True)
    means = torch.stack([logits[labels == label].mean(0) for label in seen])
    rest, n = logits - means[number], len(logits)
    spread = (logits - logits.mean(0)).square().mean().clamp_min(1e-12)
    covariance = (rest.T @ rest + spread * torch.eye(logits.shape[1], dtype=torch.double)) / n
    whitening = torch.linalg.cholesky(torch.linalg.inv(covariance))
    return whitening, means @ whitening


def error(probabilities: torch.Tensor, right: torch.Tensor, bins: int = 15) -> float:
    """Expected calibration error in percent (Guo et al., 2017): how far the mean of the probabilities (clips,) of the
    given answers lies from the share that is right, (clips,), on average over bins of equal width."""
    number = (probabilities * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.double).index_add(0, number, right.double() - probabilities.double())
    return 100 * gaps.abs().sum().item() / len(right)


def calibrated(outcome: dict, validated: tuple, tested: tuple) -> dict:
    """What a fold's header says, with its calibration; each a pair of logits (clips, classes) and labels (clips,)."""
    found = fit(*validated)
    if found is None:
        return outcome
    (logits, labels), errors = tested, {}
    for name, temperature in (("calibration_error", 1), ("calibrated_error", found["temperature"])):
        probabilities, answers = (finite(logits) / temperature).softmax(1).max(1)
        errors[name] = round(error(probabilities, answers == labels), 4)
    return {**outcome, "result": {**outcome["result"], **errors}, "calibration": found}
