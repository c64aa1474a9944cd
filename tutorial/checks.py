"""What is right, and what usually goes wrong: one function for each exercise of the chapters.

Each takes the reader's answer, a value or a function, and returns what is wrong with it, or None (`show.compare`).
"""

import torch
import torch.nn.functional as F
from show import compare

import data

# ------------------------------------------------------------------------------------------- 1: sound to features


def frames_of_a_second(answer):
    return compare(answer, 98, {
        "100 frames start in a second, but the last ones would reach over its end: a frame needs 400 samples.": 100,
        "no frame is centred on the edge here, as some libraries do: frames lie wholly inside the clip.": 101,
        "count the first frame as well: one more than the steps of 160 that fit behind it.": 97,
    })  # fmt: skip


def change_of_half_the_volume(answer):
    return compare(answer, 2 * torch.tensor(0.5).log(), {
        "the filters add up the power, which is the square of the amplitude.": torch.tensor(0.5).log(),
        "that is decibels; the features are natural logarithms.": 20 * torch.tensor(0.5).log10(),
        "the logarithm makes a sum of a factor: the change is what is added.": 0.25,
        "that would be the change of a sound made louder.": -2 * torch.tensor(0.5).log(),
    })  # fmt: skip


def padded_input(answer):
    generator = torch.Generator().manual_seed(1)
    fb = torch.randn(2, 60, data.N_MELS, generator=generator) * data.STD + data.MEAN
    normal = (fb - data.MEAN) / (2 * data.STD)
    behind, before = (0, 0, 0, 38), (0, 0, 38, 0)
    right = data.to_input(fb, 98)
    wrong = compare(answer(fb, 98), right, {
        "normalise after padding: the checkpoint has seen padding that was normalised with the rest.":
            F.pad(normal, behind),
        "divide by 2 STD: the checkpoint was trained on features with standard deviation 0.5.": 2 * right,
        "pad at the end of the clip, not at its beginning.": (F.pad(fb, before) - data.MEAN) / (2 * data.STD),
        "it is not normalised.": F.pad(fb, behind),
        "a batch comes in front: frames are the last dimension but one.": right.mT,
    })  # fmt: skip
    if wrong:
        return wrong
    kept = data.to_input(fb, 40)
    return compare(answer(fb, 40), kept, {
        "of a long clip, keep the beginning, not the end.": data.to_input(fb[:, 20:], 40),
        "a longer clip has to be cut as well.": normal,
    })  # fmt: skip
