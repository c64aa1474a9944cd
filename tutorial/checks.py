"""What is right, and what usually goes wrong: one function for each exercise of the chapters.

Each takes the reader's answer, a value or a function, and returns what is wrong with it, or None (`show.compare`).
"""

import torch
import torch.nn.functional as F
from show import compare, given

import ast_model
import data
import load_weights

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


# ---------------------------------------------------------------------------------- 2: patches, tokens, positions


def tokens_of_five_seconds(answer):
    return compare(answer, 590, {
        "those are the patches: two tokens stand in front of them.": 588,
        "the AST has [distillation] besides [CLS].": 589,
        "patches overlap: one starts every 10 frames and bands, not every 16.": 8 * 31 + 2,
        "along an axis of n there are (n - 16) // 10 + 1 patches.": 11 * 48 + 2,
    })  # fmt: skip


def number_of_a_token(answer):
    return compare(answer, 34, {
        "two tokens stand in front of the patches.": 32,
        "that would be the order of time; the grid is flattened by bands first.": 2 + 5 * 12 + 3,
        "of the two in front, [distillation] is missing.": 33,
    })  # fmt: skip


def cut_positions(answer):
    grid, steps = (3, 8), 4
    table = torch.arange(2 + 24.0)[None, :, None].expand(1, 26, 2)
    columns, front = table[:, 2:].unflatten(1, grid), table[:, :2]
    other = table[:, 2:].unflatten(1, grid[::-1])[:, 2:6].flatten(1, 2)
    middle = columns[:, :, 2:6].flatten(1, 2)
    return compare(answer(table, grid, steps), torch.cat([front, middle], dim=1), {
        "these are the first columns; take the middle ones.": torch.cat([front, columns[:, :, :4].flatten(1, 2)], 1),
        "these are the first rows of the flat table: patches of other bands.": table[:, : 2 + 12],
        "the rows in front are missing.": middle,
        "the grid is flattened by bands first: (F, T), not (T, F).": torch.cat([front, other], dim=1),
        "flatten the grid as it was, by bands first.":
            torch.cat([front, columns[:, :, 2:6].transpose(1, 2).flatten(1, 2)], dim=1),
    })  # fmt: skip


# ---------------------------------------------------------------------------------------- 3: attention and the block


def sum_of_weights(answer):
    return compare(answer, 110, {
        "that is the sum of one row: each token has a row of its own.": 1,
        "that would need every weight to be one.": 110 * 110,
        "the patches are not all: [CLS] and [distillation] attend as well.": 108,
    })  # fmt: skip


def attention(answer):
    q, k, v = torch.randn(3, 2, 2, 5, 8, generator=torch.Generator().manual_seed(3)).unbind()
    scores = q @ k.mT
    scaled = scores / 8**0.5
    return compare(answer(q, k, v), F.scaled_dot_product_attention(q, k, v), {
        "the scale is missing: divide by the root of d_k before the softmax.": scores.softmax(-1) @ v,
        "divide by the root of d_k, not by d_k.": (scores / 8).softmax(-1) @ v,
        "the softmax goes along the wrong axis: a token's weights over all keys are one in sum.":
            scaled.softmax(-2) @ v,
        "the softmax goes along the heads: give it dim=-1.": scaled.softmax(1) @ v,
        "the softmax is missing.": scaled @ v,
        "divide before the softmax, not after it.": scores.softmax(-1) / 8**0.5 @ v,
        "keys and queries are exchanged: rows belong to queries.": scaled.mT.softmax(-1) @ v,
        "these are the weights; multiply them with v.": scaled.softmax(-1),
    })  # fmt: skip


def block(answer):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(4)
        made = ast_model.Block(ast_model.ASTConfig(dim=16, heads=2))
        for norm in (made.norm1, made.norm2):
            torch.nn.init.normal_(norm.weight)
        x = torch.randn(2, 5, 16)
        attended = made.attn(made.norm1(x))
        middle = x + attended
        after = made.norm1(x + made.attn(x))
        return compare(answer(made, x), made(x), {
            "the second sum starts from the middle, which attention has changed, not from x.":
                x + made.ffn(made.norm2(middle)),
            "the FFN reads what attention has changed: both in parallel is another model.":
                middle + made.ffn(made.norm2(x)),
            "the residual connections are missing: a sub-layer adds to the stream.":
                made.ffn(made.norm2(attended)),
            "the LayerNorms are missing.": x + made.attn(x) + made.ffn(x + made.attn(x)),
            "each sub-layer has a LayerNorm of its own: norm2 before the FFN.":
                middle + made.ffn(made.norm1(middle)),
            "that is post-norm; here the LayerNorms stand before the sub-layers.":
                made.norm2(after + made.ffn(after)),
            "the FFN is missing.": middle,
        })  # fmt: skip


# --------------------------------------------------------------------------------------------- 4: a pretrained backbone


def parameters_of_a_head(answer):
    return compare(answer, 1290, {
        "there is a bias for each class besides the weights.": 1280,
        "there is one bias for each class, not for each number that is read.": 1280 + 128,
        "it reads one vector for a clip, not one for each token.": 110 * 128 * 10 + 10,
    })  # fmt: skip


def standardised(answer):
    generator = torch.Generator().manual_seed(5)
    train = torch.randn(30, 4, generator=generator) * torch.tensor([1, 5, 0.1, 2]) + 3
    test = torch.randn(20, 4, generator=generator) * 3 - 1
    mean, std, both = train.mean(0), train.std(0), torch.cat([train, test])

    def glued(train, test):
        return torch.cat([train, test])

    return compare(glued(*given(answer(train, test))), glued((train - mean) / std, (test - mean) / std), {
        "the test clips' own statistics are not known when the model is used: take those of the training clips.":
            glued((train - mean) / std, (test - test.mean(0)) / test.std(0)),
        "the statistics have seen the test clips: compute them from the training clips alone.":
            (both - both.mean(0)) / both.std(0),
        "each number has its own mean and standard deviation: over the clips, dim 0.":
            glued((train - train.mean()) / train.std(), (test - train.mean()) / train.std()),
        "divide by the standard deviation, not by the variance.":
            glued((train - mean) / std**2, (test - mean) / std**2),
        "the test clips have to be standardised as well.": glued((train - mean) / std, test),
    })  # fmt: skip


def means_of_layers(answer):
    model = load_weights.load_ast("random:demo", n_frames=40, n_classes=2).eval()
    x = torch.randn(2, 40, 128, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        states = [model.embed(x)]
        for layer in model.blocks:
            states.append(layer(states[-1]))
        first = [layer(states[0]) for layer in model.blocks]

        def means(states):
            return torch.stack([tokens[:, 2:].mean(1) for tokens in states], dim=1)

        return compare(answer(model, x), means(states), {
            "the means before the first block are missing.": means(states[1:]),
            "a block reads what the block before it made, not the first tokens.": means([states[0], *first]),
            "leave out the two tokens in front.": torch.stack([tokens.mean(1) for tokens in states], dim=1),
            "average over the tokens, dimension 1, not over the numbers of a token.":
                torch.stack([tokens[:, 2:].mean(2) for tokens in states], dim=1),
            "the last LayerNorm is no layer of its own here.": means([*states[:-1], model.norm(states[-1])]),
        })  # fmt: skip


# ----------------------------------------------------------------------------------------------- 5: the training loop


def rate_at_a_quarter(answer):
    quarter = torch.tensor(torch.pi / 4)
    return compare(answer, (1 + quarter.cos()) / 2, {
        "that would be a straight line; the cosine falls slowly at first.": 0.75,
        "all steps are half a wave, from the top to the bottom, not a quarter of one.": (quarter / 2).cos(),
        "the wave runs from 1 to -1; lifted and halved it runs from 1 to 0.": quarter.cos(),
        "all steps are half a wave, not a whole one.": 0.5,
    })  # fmt: skip


def best_weights(answer):
    with torch.random.fork_rng(devices=[]):
        model = torch.nn.Linear(3, 2)
    before = torch.cat([tensor.detach().flatten() for tensor in model.parameters()])
    kept = given(answer(model))
    if set(kept) != {"weight", "bias"}:
        return "it should have the names and tensors of the model's state_dict()."
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)  # training goes on
    return compare(torch.cat([kept[name].flatten() for name in ("weight", "bias")]), before, {
        "these are the live tensors: training on has changed them. Copy each one (clone).": before + 1,
    })  # fmt: skip


def masked_batch(answer):
    x, draws = torch.rand(3, 98, 128, generator=torch.Generator().manual_seed(7)) + 1, torch.full((3, 4), 0.5)
    draws[1:] *= torch.tensor([[0.5], [0.8]])
    masked = data.spec_augment(x, draws)
    wrong = compare(answer(x, draws, False), x, {
        "masks on test clips: the model would be tested on what it cannot hear.": masked,
    })  # fmt: skip
    return wrong or compare(answer(x, draws, True), masked, {
        "training clips should be masked.": x,
        "each clip has masks of its own: give all rows of `draws`.":
            data.spec_augment(x, draws[:1].expand(3, 4)),
    })  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ 6: LoRA


def parameters_of_lora(answer):
    return compare(answer, 221_184, {
        "A and B both count.": 221_184 // 2,
        "every block has its own.": 221_184 // 12,
        "those are the parameters of whole matrices: r is 6.": 2 * 768 * 768 * 12,
        "queries, keys, values and the output would be twice as many: here are two projections.": 2 * 221_184,
    })  # fmt: skip


def merged_weight(answer):
    generator = torch.Generator().manual_seed(8)
    weight, a, b = (torch.randn(size, generator=generator) for size in ((6, 6), (2, 6), (6, 2)))
    return compare(answer(weight, a, b, 0.25), weight + 0.25 * b @ a, {
        "the scale is missing: s belongs to the product.": weight + b @ a,
        "transposed: a weight is stored as (out, in), so the A B of eq. (5) is b @ a.": weight + 0.25 * (b @ a).T,
        "add the product to the weight, it does not replace it.": 0.25 * b @ a,
        "the scale belongs to the product alone, not to the weight.": 0.25 * (weight + b @ a),
        "the scale counts once, not for a and b each.": weight + 0.0625 * b @ a,
    })  # fmt: skip


def low_rank(answer):
    update = torch.randn(6, 6, generator=torch.Generator().manual_seed(9))
    u, sigma, v = torch.linalg.svd(update)
    return compare(answer(update, 2), u[:, :2] * sigma[:2] @ v[:2], {
        "the singular values are missing.": u[:, :2] @ v[:2],
        "these are the smallest singular values; the first are the largest.": u[:, -2:] * sigma[-2:] @ v[-2:],
        "svd returns v transposed already: the r-th term is a row of it.": u[:, :2] * sigma[:2] @ v[:, :2].T,
        "that is the whole update: keep r terms of the sum.": update,
        "the singular values count once, not squared.": u[:, :2] * sigma[:2] ** 2 @ v[:2],
    })  # fmt: skip
