"""What is right, and what usually goes wrong: one function for each exercise of the chapters.

Each takes the reader's answer, a value or a function, and returns what is wrong with it, or None
(`show.compare`).
"""

import copy

import torch
import torch.nn.functional as F
from show import compare, given

import ast_model
import data
import load_weights

# ----------------------------------------------------------------------------- 1: sound to features


def frames_of_a_second(answer):
    return compare(
        answer,
        98,
        {
            (
                "100 frames start in a second, but the last ones would reach over its end: a "
                "frame needs 400 samples."
            ): (100),
            (
                "no frame is centred on the edge here, as some libraries do: frames lie wholly "
                "inside the clip."
            ): (101),
            "count the first frame as well: one more than the steps of 160 that fit behind it.": 97,
        },
    )


def change_of_half_the_volume(answer):
    return compare(
        answer,
        2 * torch.tensor(0.5).log(),
        {
            "the filters add up the power, which is the square of the amplitude.": (
                torch.tensor(0.5).log()
            ),
            "that is decibels; the features are natural logarithms.": (
                20 * torch.tensor(0.5).log10()
            ),
            "the logarithm makes a sum of a factor: the change is what is added.": 0.25,
            "that would be the change of a sound made louder.": -2 * torch.tensor(0.5).log(),
        },
    )


def padded_input(answer):
    fb = (
        torch.randn(2, 60, data.N_MELS, generator=torch.Generator().manual_seed(1)) * data.STD
        + data.MEAN
    )
    normal = (fb - data.MEAN) / (2 * data.STD)
    behind, before = (0, 0, 0, 38), (0, 0, 38, 0)
    right = data.to_input(fb, 98)
    wrong = compare(
        answer(fb, 98),
        right,
        {
            (
                "normalise after padding: the checkpoint has seen padding that was normalised "
                "with the rest."
            ): F.pad(normal, behind),
            (
                "divide by 2 STD: the checkpoint was trained on features with standard deviation "
                "0.5."
            ): (2 * right),
            "pad at the end of the clip, not at its beginning.": (
                (F.pad(fb, before) - data.MEAN) / (2 * data.STD)
            ),
            "it is not normalised.": F.pad(fb, behind),
            "a batch comes in front: frames are the last dimension but one.": right.mT,
        },
    )
    if wrong:
        return wrong
    kept = data.to_input(fb, 40)
    return compare(
        answer(fb, 40),
        kept,
        {
            "of a long clip, keep the beginning, not the end.": data.to_input(fb[:, 20:], 40),
            "a longer clip has to be cut as well.": normal,
        },
    )


# -------------------------------------------------------------------- 2: patches, tokens, positions


def tokens_of_five_seconds(answer):
    return compare(
        answer,
        590,
        {
            "those are the patches: two tokens stand in front of them.": 588,
            "the AST has [distillation] besides [CLS].": 589,
            "patches overlap: one starts every 10 frames and bands, not every 16.": 8 * 31 + 2,
            "along an axis of n there are (n - 16) // 10 + 1 patches.": 11 * 48 + 2,
        },
    )


def number_of_a_token(answer):
    return compare(
        answer,
        34,
        {
            "two tokens stand in front of the patches.": 32,
            "that would be the order of time; the grid is flattened by bands first.": (
                2 + 5 * 12 + 3
            ),
            "of the two in front, [distillation] is missing.": 33,
        },
    )


def cut_positions(answer):
    grid, steps = (3, 8), 4
    table = torch.arange(2 + 24.0)[None, :, None].expand(1, 26, 2)
    columns, front = table[:, 2:].unflatten(1, grid), table[:, :2]
    other = table[:, 2:].unflatten(1, grid[::-1])[:, 2:6].flatten(1, 2)
    middle = columns[:, :, 2:6].flatten(1, 2)
    wrong = compare(
        answer(table, grid, steps),
        torch.cat([front, middle], dim=1),
        {
            "these are the first columns; take the middle ones.": torch.cat(
                [front, columns[:, :, :4].flatten(1, 2)], 1
            ),
            "these are the first rows of the flat table: patches of other bands.": table[
                :, : 2 + 12
            ],
            "the rows in front are missing.": middle,
            "the grid is flattened by bands first: (F, T), not (T, F).": torch.cat(
                [front, other], dim=1
            ),
            "flatten the grid as it was, by bands first.": torch.cat(
                [front, columns[:, :, 2:6].transpose(1, 2).flatten(1, 2)], dim=1
            ),
        },
    )
    three = [
        torch.cat([front, columns[:, :, start : start + 3].flatten(1, 2)], dim=1)
        for start in range(4)
    ]
    return wrong or compare(
        answer(table, grid, 3),
        three[3],
        {
            "half of what is left out is not T // 2 - steps // 2 if one of the two is odd.": three[
                2
            ],
            "the middle of the table counts as well: T // 2 - steps // 2.": three[1],
        },
    )


# ----------------------------------------------------------------------- 3: attention and the block


def sum_of_weights(answer):
    return compare(
        answer,
        110,
        {
            "that is the sum of one row: each token has a row of its own.": 1,
            "that would need every weight to be one.": 110 * 110,
            "the patches are not all: [CLS] and [distillation] attend as well.": 108,
        },
    )


def attention(answer):
    q, k, v = torch.randn(3, 2, 2, 5, 8, generator=torch.Generator().manual_seed(3)).unbind()
    scores = q @ k.mT
    scaled = scores / 8**0.5
    return compare(
        answer(q, k, v),
        F.scaled_dot_product_attention(q, k, v),
        {
            "the scale is missing: divide by the root of d_k before the softmax.": (
                scores.softmax(-1) @ v
            ),
            "divide by the root of d_k, not by d_k.": (scores / 8).softmax(-1) @ v,
            (
                "the softmax goes along the wrong axis: a token's weights over all keys are one "
                "in sum."
            ): (scaled.softmax(-2) @ v),
            "the softmax goes along the heads: give it dim=-1.": scaled.softmax(1) @ v,
            "the softmax is missing.": scaled @ v,
            "divide before the softmax, not after it.": scores.softmax(-1) / 8**0.5 @ v,
            "keys and queries are exchanged: rows belong to queries.": scaled.mT.softmax(-1) @ v,
            "these are the weights; multiply them with v.": scaled.softmax(-1),
        },
    )


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
        return compare(
            answer(made, x),
            made(x),
            {
                "the second sum starts from the middle, which attention has changed, not from x.": (
                    x + made.ffn(made.norm2(middle))
                ),
                "the FFN reads what attention has changed: both in parallel is another model.": (
                    middle + made.ffn(made.norm2(x))
                ),
                "the residual connections are missing: a sub-layer adds to the stream.": made.ffn(
                    made.norm2(attended)
                ),
                "the LayerNorms are missing.": x + made.attn(x) + made.ffn(x + made.attn(x)),
                "each sub-layer has a LayerNorm of its own: norm2 before the FFN.": (
                    middle + made.ffn(made.norm1(middle))
                ),
                "that is post-norm; here the LayerNorms stand before the sub-layers.": made.norm2(
                    after + made.ffn(after)
                ),
                "the FFN is missing.": middle,
            },
        )


# ------------------------------------------------------------------------- 4: a pretrained backbone


def parameters_of_a_head(answer):
    return compare(
        answer,
        1290,
        {
            "there is a bias for each class besides the weights.": 1280,
            "there is one bias for each class, not for each number that is read.": 1280 + 128,
            "it reads one vector for a clip, not one for each token.": 110 * 128 * 10 + 10,
        },
    )


def standardised(answer):
    generator = torch.Generator().manual_seed(5)
    train = torch.randn(30, 4, generator=generator) * torch.tensor([1, 5, 0.1, 2]) + 3
    test = torch.randn(20, 4, generator=generator) * 3 - 1
    mean, std, both = train.mean(0), train.std(0), torch.cat([train, test])

    def glued(train, test):
        return torch.cat([train, test])

    return compare(
        glued(*given(answer(train, test))),
        glued((train - mean) / std, (test - mean) / std),
        {
            (
                "the test clips' own statistics are not known when the model is used: take those "
                "of the training clips."
            ): glued((train - mean) / std, (test - test.mean(0)) / test.std(0)),
            (
                "the statistics have seen the test clips: compute them from the training clips "
                "alone."
            ): ((both - both.mean(0)) / both.std(0)),
            "each number has its own mean and standard deviation: over the clips, dim 0.": glued(
                (train - train.mean()) / train.std(), (test - train.mean()) / train.std()
            ),
            "divide by the standard deviation, not by the variance.": glued(
                (train - mean) / std**2, (test - mean) / std**2
            ),
            "the test clips have to be standardised as well.": glued((train - mean) / std, test),
        },
    )


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

        return compare(
            answer(model, x),
            means(states),
            {
                "the means before the first block are missing.": means(states[1:]),
                "a block reads what the block before it made, not the first tokens.": means(
                    [states[0], *first]
                ),
                "leave out the two tokens in front.": torch.stack(
                    [tokens.mean(1) for tokens in states], dim=1
                ),
                "average over the tokens, dimension 1, not over the numbers of a token.": (
                    torch.stack([tokens[:, 2:].mean(2) for tokens in states], dim=1)
                ),
                "the last LayerNorm is no layer of its own here.": means(
                    [*states[:-1], model.norm(states[-1])]
                ),
            },
        )


# ----------------------------------------------------------------------------- 5: the training loop


def rate_at_a_quarter(answer):
    quarter = torch.tensor(torch.pi / 4)
    return compare(
        answer,
        (1 + quarter.cos()) / 2,
        {
            "that would be a straight line; the cosine falls slowly at first.": 0.75,
            "all steps are half a wave, from the top to the bottom, not a quarter of one.": (
                (quarter / 2).cos()
            ),
            "the wave runs from 1 to -1; lifted and halved it runs from 1 to 0.": quarter.cos(),
            "all steps are half a wave, not a whole one.": 0.5,
        },
    )


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
    return compare(
        torch.cat([kept[name].flatten() for name in ("weight", "bias")]),
        before,
        {
            "these are the live tensors: training on has changed them. Copy each one (clone).": (
                before + 1
            ),
        },
    )


def masked_batch(answer):
    x, draws = (
        torch.rand(3, 98, 128, generator=torch.Generator().manual_seed(7)) + 1,
        torch.full((3, 4), 0.5),
    )
    draws[1:] *= torch.tensor([[0.5], [0.8]])
    masked = data.spec_augment(x, draws)
    wrong = compare(
        answer(x, draws, False),
        x,
        {
            "masks on test clips: the model would be tested on what it cannot hear.": masked,
        },
    )
    return wrong or compare(
        answer(x, draws, True),
        masked,
        {
            "training clips should be masked.": x,
            "each clip has masks of its own: give all rows of `draws`.": data.spec_augment(
                x, draws[:1].expand(3, 4)
            ),
        },
    )


# ------------------------------------------------------------------------------------------ 6: LoRA


def parameters_of_lora(answer):
    return compare(
        answer,
        221_184,
        {
            "A and B both count.": 221_184 // 2,
            "every block has its own.": 221_184 // 12,
            "those are the parameters of whole matrices: r is 6.": 2 * 768 * 768 * 12,
            (
                "queries, keys, values and the output would be twice as many: here are two "
                "projections."
            ): (2 * 221_184),
        },
    )


def merged_weight(answer):
    generator = torch.Generator().manual_seed(8)
    weight, a, b = (torch.randn(size, generator=generator) for size in ((6, 6), (2, 6), (6, 2)))
    return compare(
        answer(weight, a, b, 0.25),
        weight + 0.25 * b @ a,
        {
            "the scale is missing: s belongs to the product.": weight + b @ a,
            "transposed: a weight is stored as (out, in), so the A B of eq. (5) is b @ a.": (
                weight + 0.25 * (b @ a).T
            ),
            "add the product to the weight, it does not replace it.": 0.25 * b @ a,
            "the scale belongs to the product alone, not to the weight.": 0.25 * (weight + b @ a),
            "the scale counts once, not for a and b each.": weight + 0.0625 * b @ a,
        },
    )


def low_rank(answer):
    update = torch.randn(6, 6, generator=torch.Generator().manual_seed(9))
    u, sigma, v = torch.linalg.svd(update)
    return compare(
        answer(update, 2),
        u[:, :2] * sigma[:2] @ v[:2],
        {
            "the singular values are missing.": u[:, :2] @ v[:2],
            "these are the smallest singular values; the first are the largest.": (
                u[:, -2:] * sigma[-2:] @ v[-2:]
            ),
            "svd returns v transposed already: the r-th term is a row of it.": (
                u[:, :2] * sigma[:2] @ v[:, :2].T
            ),
            "that is the whole update: keep r terms of the sum.": update,
            "the singular values count once, not squared.": u[:, :2] * sigma[:2] ** 2 @ v[:2],
        },
    )


# --------------------------------------------------------------------------- 7: bottleneck adapters


def parameters_of_adapters(answer):
    matrices = 2 * 768 * 12
    return compare(
        answer,
        12 * (matrices + 12 + 768 + 2 * 768),
        {
            "that is one block, and there are twelve.": matrices + 12 + 768 + 2 * 768,
            "the LayerNorm trains, too: a scale and a shift for each number.": (
                12 * (matrices + 12 + 768)
            ),
            "both sides have a bias, and the LayerNorm trains, too.": 12 * matrices,
            "both sides have a bias: r numbers below and d above.": 12 * (matrices + 2 * 768),
            "these are Houlsby adapters, two in each block.": 24 * (matrices + 12 + 768 + 2 * 768),
        },
    )


def adapter_in_sequence(answer):
    generator = torch.Generator().manual_seed(7)
    u, s, a = torch.randn(2, 3, 4, generator=generator), *torch.randn(2, 4, 4, generator=generator)

    def S(u):
        return (u @ s).tanh()

    def A(u):
        return (u @ a).sin()

    h = S(u)
    return compare(
        answer(S, A, u),
        h + A(h),
        {
            "this is the parallel one: in sequence, A reads what S returns.": h + A(u),
            (
                "the residual path is missing: with A = 0 nothing of S would be left (eq. 6 as "
                "printed)."
            ): A(h),
            (
                "the residual path leads around A, not around S and A: the block adds its own to "
                "the stream."
            ): (u + A(h)),
            "A comes behind S, not before it.": S(A(u)),
            "A comes behind S, not before it: so S(A(u)) is no part of it.": S(A(u)) + A(u),
            "the stream is added by the block, not here.": u + h + A(h),
        },
    )


def sides_of_a_bottleneck(answer):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        down, up = given(answer(16, 4))
        x = torch.randn(5, 16)
        if (down.in_features, down.out_features, up.in_features, up.out_features) != (16, 4, 4, 16):
            return "down goes from dim to rank, up from rank to dim."
        y = up(F.gelu(down(x)))
        (y - 1).square().sum().backward()
    if y.abs().max() > 0:
        only_bias = not up.weight.any() or not down.weight.any()
        return (
            "the bottleneck is not zero at the start:"
            f" {'a bias is left' if only_bias else 'no side is'}."
        )
    if not (down.weight.grad.any() or up.weight.grad.any()):
        return "both sides are at zero: neither weight gets a gradient, now or ever."
    return None


# ----------------------------------------------------- 8: Convpass, Hydra and the conformer adapter


def parameters_of_a_convolution(answer):
    return compare(
        answer,
        12 * 12 * 3 + 12,
        {
            "there is a bias for each channel.": 12 * 12 * 3,
            "that would be a depthwise one: here every channel reads every channel.": 12 * 3 + 12,
            "the window is three along the sequence, not 3 x 3.": 12 * 12 * 9 + 12,
            "one block, please, not all twelve.": 12 * (12 * 12 * 3 + 12),
            "it works on the r channels of the bottleneck, not on d.": 768 * 768 * 3 + 768,
        },
    )


def gated(answer):
    z = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(10))
    first, second = z.chunk(2, dim=-1)
    return compare(
        answer(z),
        first * second.sigmoid(),
        {
            "the second half is the gate.": second * first.sigmoid(),
            "a sigmoid opens each channel by itself; a softmax makes them compete.": (
                first * second.softmax(-1)
            ),
            "the gate needs a sigmoid: it opens from 0 to 1.": first * second,
            "only the gate goes through the sigmoid.": (first * second).sigmoid(),
            "that is the gate without what it lets through.": second.sigmoid(),
            "the halves are the first and the last channels, not every second one.": (
                z[..., ::2] * z[..., 1::2].sigmoid()
            ),
            "without the halves a channel gates itself, and that is swish.": z * z.sigmoid(),
        },
    )


def convolution_over_the_grid(answer):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(13)
        conv, h, grid = torch.nn.Conv2d(4, 4, 3, padding=1), torch.randn(2, 2 + 12, 4), (3, 4)
        front, patches = h[:, :2], h[:, 2:]

        def result(image):
            return torch.cat([front, conv(image).flatten(2).transpose(1, 2)], dim=1)

        channels = patches.transpose(1, 2)
        turned = conv(channels.unflatten(2, (4, 3)).mT)
        right = result(channels.unflatten(2, grid))
        return compare(
            answer(conv, h, grid),
            right,
            {
                "the grid is (F, T), not (T, F).": result(channels.unflatten(2, (4, 3))),
                "the grid is (F, T): tokens go by bands first.": torch.cat(
                    [front, turned.mT.flatten(2).transpose(1, 2)], dim=1
                ),
                "transpose before you lay them out: a reshape alone mixes channels and places.": (
                    result(patches.reshape(2, 4, *grid))
                ),
                "the tokens in front are missing.": right[:, 2:],
                "the tokens in front stay as they are.": torch.cat(
                    [torch.zeros(2, 2, 4), right[:, 2:]], dim=1
                ),
                "that leaves out the convolution.": h,
            },
        )


# -------------------------------------------------------------------------- 9: prompts and prefixes


def parameters_of_deep_prompts(answer):
    return compare(
        answer,
        25 * 768 * 12,
        {
            "each block has prompts of its own.": 25 * 768,
            "a prompt is one vector: key and value are computed from it.": 2 * 25 * 768 * 12,
            "the first block has prompts as well.": 25 * 768 * 11,
            "each head reads its own part of a prompt; there are no more of them.": (
                25 * 768 * 12 * 12
            ),
        },
    )


def gate_of_equal_scores(answer):
    return compare(
        answer,
        12 / 602,
        {
            "of the 24 rows one half are keys; values are not asked.": 24 / 614,
            "the keys of the prefix count in the denominator, too.": 12 / 590,
            (
                "the keys of the prefix count in the denominator, too, and of the 24 rows one "
                "half are keys."
            ): (24 / 590),
            "that is what is left for the tokens, 1 - lambda.": 590 / 602,
        },
    )


def gate_of_a_prefix(answer):
    generator = torch.Generator().manual_seed(9)
    q, k, p = (torch.randn(2, 2, n, 8, generator=generator) for n in (5, 5, 3))
    scores = q @ torch.cat([p, k], dim=2).mT
    scaled = (scores / 8**0.5).softmax(-1)
    right = scaled[..., :3].sum(-1, keepdim=True)
    return compare(
        answer(q, k, p),
        right,
        {
            "the scale is missing: divide by the root of d_k.": (
                scores.softmax(-1)[..., :3].sum(-1, keepdim=True)
            ),
            "this is 1 - lambda, the share of the tokens.": 1 - right,
            "a softmax over the prefix alone always adds up to one: prefix and tokens share one.": (
                torch.ones_like(right)
            ),
            "these are the weights of the single keys: add them up.": scaled[..., :3],
            "that is their mean: add them up.": right / 3,
            "keep the last dimension: (batch, heads, tokens, 1).": right[..., 0],
        },
    )


# ------------------------------------------------------------------- 10: few clips, many parameters


def half_of_an_interval(answer):
    return compare(
        answer,
        4.303 * 2 / 3**0.5,
        {
            (
                "of three numbers s is uncertain itself: take t, not the 1.96 of the normal "
                "distribution."
            ): (1.96 * 2 / 3**0.5),
            "divide by n - 1 in s: the mean is estimated from the same numbers.": (
                4.303 * (8 / 3) ** 0.5 / 3**0.5
            ),
            "the mean of n scatters less than one: divide by the root of n.": 4.303 * 2,
            "divide by the root of n, not by n.": 4.303 * 2 / 3,
            "that is the whole width.": 2 * 4.303 * 2 / 3**0.5,
        },
    )


def interval_of_differences(answer):
    first, second = torch.tensor([61.0, 70, 52, 66]), torch.tensor([58.0, 66, 51, 60])
    gains, t = first - second, 3.18245

    def bounds(half):
        return torch.stack([gains.mean() - half, gains.mean() + half])

    both = (first.var() / 4 + second.var() / 4).sqrt()
    low, high = given(answer(first, second))
    return compare(
        torch.tensor([float(low), float(high)]),
        bounds(t * gains.std() / 2),
        {
            (
                "it takes the luck of the clips for a difference: subtract seed by seed before "
                "you take s."
            ): bounds(t * both),
            "take t for n - 1, not 1.96.": bounds(1.96 * gains.std() / 2),
            "divide by the root of n.": bounds(t * gains.std()),
            "divide by n - 1 in s.": bounds(t * gains.std(correction=0) / 2),
            "it is first - second.": -bounds(t * gains.std() / 2).flip(0),
        },
    )


def few_shot_draw(answer):
    labels = [0, 1, 2, 1, 0, 2, 2, 1] * 6

    def drawn(seed):
        return sorted(torch.as_tensor(given(answer(list(labels), 3, seed))).tolist())

    draws = [drawn(seed) for seed in (0, 1, 2)]
    for indices in draws:
        if len(set(indices)) < len(indices):
            return "a clip is drawn twice: do not put back."
        counts = [sum(labels[i] == kind for i in indices) for kind in range(3)]
        if len(indices) != 9:
            return f"3 clips of each of 3 classes are 9, not {len(indices)}."
        if counts != [3, 3, 3]:
            return f"the classes have {counts} clips: draw from each class by itself."
    if draws[0] == draws[1] == draws[2]:
        return "every seed draws the same clips."
    return None if drawn(0) == draws[0] else "the same seed should draw the same clips."


# ------------------------------------------------------------------------- 11: a method of your own


def megabytes_of_a_file(answer):
    return compare(
        answer,
        4 * (248_976 + 39_986) / 1e6,
        {
            "the head and the LayerNorm are trained, so they have to be kept.": 4 * 248_976 / 1e6,
            "a float32 has four bytes.": (248_976 + 39_986) / 1e6,
            "a float32 has four bytes, 32 bits.": 32 * (248_976 + 39_986) / 1e6,
            "in megabytes, please.": 4 * (248_976 + 39_986),
        },
    )


def differences_in_time(answer):
    u = torch.randn(2, 2 + 12, 5, generator=torch.Generator().manual_seed(11))
    front, grid = u[:, :2], u[:, 2:].unflatten(1, (3, 4))
    other = u[:, 2:].unflatten(1, (4, 3))

    def result(patches, front=None):
        return torch.cat(
            [torch.zeros(2, 2, 5) if front is None else front, patches.flatten(1, 2)], dim=1
        )

    step = F.pad(grid.diff(dim=2), (0, 0, 1, 0))
    flat = F.pad(u[:, 2:].diff(dim=1), (0, 0, 1, 0))
    return compare(
        answer(u, (3, 4)),
        result(step),
        {
            "the first step of a band has been compared with the last step of the band below.": (
                result(flat[:, :, None])
            ),
            (
                "it has been compared along the sequence: cut off what is in front, and mind the "
                "ends of the bands."
            ): F.pad(u.diff(dim=1), (0, 0, 1, 0)),
            "these are differences between bands, not in time.": result(
                F.pad(grid.diff(dim=1), (0, 0, 0, 0, 1, 0))
            ),
            "the grid is (F, T): tokens go by bands first.": result(
                F.pad(other.diff(dim=1), (0, 0, 0, 0, 1, 0))
            ),
            "the grid is (F, T), not (T, F).": result(F.pad(other.diff(dim=2), (0, 0, 1, 0))),
            "roll wraps around: nothing comes before the first step.": result(
                grid - grid.roll(1, dims=2)
            ),
            "it is later minus earlier.": result(-step),
            (
                "that is the difference to the next step, which an adapter could read as well, "
                "but not this one."
            ): result(F.pad(grid.diff(dim=2), (0, 0, 0, 1))),
            "the tokens in front have no earlier one: zero.": result(step, front),
            "the first steps have no earlier one: zero, not the token itself.": result(
                torch.cat([grid[:, :, :1], grid.diff(dim=2)], dim=2)
            ),
            "the tokens in front are missing.": step.flatten(1, 2),
        },
    )


def learned_volume(answer):
    before = (
        load_weights.load_ast("random:demo", n_frames=40, n_classes=2).eval().requires_grad_(False)
    )
    x = torch.randn(2, 40, 128, generator=torch.Generator().manual_seed(12))
    model = given(answer(copy.deepcopy(before)))
    learned = [p for p in model.parameters() if p.requires_grad]
    if not learned:
        return "nothing trains: a learned number is an nn.Parameter of a module in the model."
    for number, block in enumerate(model.blocks, start=1):
        if not isinstance(getattr(block.attn, "wrapped", None), ast_model.Attention):
            return (
                f"block {number}: block.attn should be a wrapper that keeps the attention as"
                " `wrapped`."
            )
    count = sum(p.numel() for p in learned)
    if count != len(model.blocks):
        return f"one number for each of the {len(model.blocks)} blocks, please: {count} train."
    with torch.no_grad():
        if not torch.allclose(model(x), before(x), atol=1e-5):
            return (
                "it does not start at the pretrained function: the factor has to be one, or 1 + s"
                " with s = 0."
            )
        for p in learned:
            p.add_(1)
        for block in before.blocks:
            block.attn.o.weight *= 2
            block.attn.o.bias *= 2
        if not torch.allclose(model(x), before(x), atol=1e-4):
            return (
                "with the factor 2 the attention should write twice as much: multiply its output."
            )
    return None


# ------------------------------------------------------------------------------ 12: your own sounds


def accuracy_of_the_largest(answer):
    return compare(
        answer,
        60,
        {
            (
                "that is chance among equally frequent classes; whoever always says the largest "
                "does better."
            ): (100 / 3),
            (
                "whoever guesses as often as each class is there does worse than who always says "
                "the largest."
            ): (46),
            "in percent, please.": 0.6,
        },
    )


def folds_by_recording(answer):
    recordings = ["b", "a", "c", "a", "b", "d", "c", "a", "e", "b", "f", "d", "e", "f", "a"]
    folds = torch.as_tensor(given(answer(list(recordings), 3))).tolist()
    if len(folds) != len(recordings):
        return f"a fold for each of the {len(recordings)} clips, please: there are {len(folds)}."
    if not set(folds) <= {0, 1, 2}:
        return "folds are numbered from 0 to n - 1."
    parted = len(set(zip(recordings, folds, strict=True))) - len(set(recordings))
    if parted:
        return "a recording has clips in several folds: that is the leak."
    if set(folds) != {0, 1, 2}:
        return "a fold is empty: there are recordings enough for each."
    return None


def balanced_accuracy(answer):
    truth = torch.tensor([0] * 6 + [1] * 3 + [2])
    said = torch.tensor([0, 0, 0, 0, 0, 1, 1, 0, 1, 0])

    def share(where, right):
        return (truth == said)[where == right].float().mean()

    kinds = range(3)
    return compare(
        answer(truth, said),
        100 * sum(share(truth, kind) for kind in kinds) / 3,
        {
            "that is the plain accuracy, in which large classes count most.": (
                100 * (truth == said).float().mean()
            ),
            (
                "divide by the clips that are of the class, not by those that are said to be "
                "(that is precision)."
            ): (100 * sum(share(said, kind).nan_to_num() for kind in kinds) / 3),
            "in percent, please.": sum(share(truth, kind) for kind in kinds) / 3,
            "the class that is never said counts as well, with nothing told.": (
                100 * sum(share(truth, kind) for kind in (0, 1)) / 2
            ),
            "it is the mean over the classes, not their sum.": (
                100 * sum(share(truth, kind) for kind in kinds)
            ),
        },
    )
