"""The Audio Spectrogram Transformer (AST) in one file, as section II-A of the paper describes it.

"The paper" is Cappellazzo et al., "Parameter-Efficient Transfer Learning of Audio Spectrogram
Transformers" (2023). The AST itself is the model of Gong, Chung and Glass, "AST: Audio Spectrogram
Transformer" (Interspeech 2021). It cuts a spectrogram into overlapping 16x16 patches, makes a token
of every patch, and reads the tokens with a pre-norm Transformer encoder.

This file imports torch and nothing else. It knows no adapters, no LoRA and no prompts. `petl.py`
and `petl_more.py` replace modules of an AST by wrappers. They rely on these names:

    AST        config, embed, blocks, norm, head; vector, encode, pool
    Embedding  patches
    Block      norm1, attn, norm2, ffn
    Attention  q, k, v, o
    FFN        fc1, fc2
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

POOL = ("mean", "cls", "cls_dist")  # how tokens become one vector, see AST.pool


class UserError(ValueError):
    """An input that cannot be used. The message says what is wrong, where, and what to do.

    The commands print the message as one line and exit with code 2. Every other exception is a
    mistake in the program and keeps its traceback.
    """


@dataclass(frozen=True)
class ASTConfig:
    """The shape of an AST.

    The defaults are AST-Base as released for AudioSet (clips of 10.24 s). Only `pool` differs: it
    is that of the paper's authors, see AST.pool.
    """

    n_frames: int = 1024  # of the spectrogram, one every 10 ms
    n_mels: int = 128
    patch: int = 16
    stride: int = 10  # patches overlap by 6 in both directions
    dim: int = 768
    depth: int = 12
    heads: int = 12
    eps: float = 1e-12  # of every LayerNorm
    n_classes: int = 527
    pool: str = "mean"  # one of POOL
    hidden: int | None = None  # width of the feed-forward layer; None means 4 dim

    def __post_init__(self):
        if self.pool not in POOL:
            raise UserError(f"pool is {self.pool!r}; choose one of {', '.join(POOL)}")
        if self.heads < 1 or self.dim % self.heads:
            raise UserError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        if min(self.n_frames, self.n_mels) < self.patch:
            raise UserError(
                f"{self.n_frames} frames x {self.n_mels} bands do not hold one patch of "
                f"{self.patch} x {self.patch}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along frequency and along time: (12, 101) at 1024 frames, (12, 49) at 500."""
        n_frequency = (self.n_mels - self.patch) // self.stride + 1
        n_time = (self.n_frames - self.patch) // self.stride + 1
        return n_frequency, n_time

    @property
    def n_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def n_tokens(self) -> int:
        """Length of the token sequence: the patches and two tokens in front of them.

        Section II-A counts the patches and [CLS]. The pretrained checkpoint has a second token
        behind [CLS], [distillation]. Its training began with DeiT, an image model that was trained
        on ImageNet-1K and has both tokens. (Section III-A says ImageNet-21K.)
        """
        return 2 + self.n_patches


class Embedding(nn.Module):
    """A spectrogram to tokens: one for each patch, [CLS] and [distillation] in front of them.

    A learned position embedding is added to every token.
    """

    def __init__(self, config: ASTConfig):
        super().__init__()
        self.input_shape = (config.n_frames, config.n_mels)
        self.patches = nn.Conv2d(1, config.dim, config.patch, config.stride)
        self.cls = nn.Parameter(torch.empty(1, 1, config.dim))
        self.dist = nn.Parameter(torch.empty(1, 1, config.dim))
        self.position = nn.Parameter(torch.empty(1, config.n_tokens, config.dim))
        for parameter in (self.cls, self.dist, self.position):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, spectrogram):  # (batch, n_frames, n_mels)
        if spectrogram.shape[1:] != self.input_shape:
            n_frames, n_mels = self.input_shape
            given = tuple(spectrogram.shape)
            raise UserError(f"this AST reads (batch, {n_frames}, {n_mels}), not {given}")
        image = spectrogram.transpose(1, 2).unsqueeze(1)  # (batch, 1, n_mels, n_frames)
        patches = self.patches(image)  # (batch, dim, n_frequency, n_time)
        # One row for each patch, first all times of the lowest frequencies: patch (f, t) is row
        # f * n_time + t.
        patches = patches.flatten(2).transpose(1, 2)  # (batch, n_patches, dim)
        batch = spectrogram.shape[0]  # an ONNX export would take len(spectrogram) for a constant
        cls = self.cls.expand(batch, -1, -1)
        dist = self.dist.expand(batch, -1, -1)
        return torch.cat([cls, dist, patches], dim=1) + self.position  # (batch, n_tokens, dim)


class Attention(nn.Module):
    """Multi-head self-attention (MHSA), eq. (2) and (3), with biases, which the paper leaves out.

    The projections are four separate modules, so that LoRA can adapt each of them. With
    prefix-tuning (petl.PrefixLinear) k and v return more tokens than q.
    """

    def __init__(self, config: ASTConfig):
        super().__init__()
        self.heads = config.heads
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)

    def forward(self, x):  # (batch, tokens, dim)
        q = self.split_heads(self.q(x))
        k = self.split_heads(self.k(x))
        v = self.split_heads(self.v(x))
        mixed = F.scaled_dot_product_attention(q, k, v)  # eq. (2): softmax(q k^T / sqrt(d_h)) v
        return self.o(self.merge_heads(mixed))  # eq. (3): Concat(head_1, ..., head_Nh) W_o

    def split_heads(self, x):  # (batch, tokens, dim) -> (batch, heads, tokens, dim / heads)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def merge_heads(self, x):  # (batch, heads, tokens, dim / heads) -> (batch, tokens, dim)
        return x.transpose(1, 2).flatten(2)


class FFN(nn.Module):
    """Feed-forward network, eq. (4). The paper writes ReLU, but the pretrained AST has GELU."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):  # (batch, tokens, dim)
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """One pre-norm Transformer layer, eq. (1)."""

    def __init__(self, config: ASTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, config.eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, config.eps)
        self.ffn = FFN(config.dim, config.hidden or 4 * config.dim)

    def forward(self, x):  # (batch, tokens, dim)
        x = x + self.attn(self.norm1(x))
        x = x + self.ffn(self.norm2(x))
        return x


class AST(nn.Module):
    """The whole model: spectrograms (batch, n_frames, n_mels) to logits (batch, n_classes).

    The spectrograms are normalised log-Mel filterbanks, as `data.to_input` returns them. What
    `data.fbank` returns is not normalised yet.
    """

    def __init__(self, config: ASTConfig):
        super().__init__()
        self.config = config
        self.embed = Embedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, config.eps)
        self.head = make_head(config)

    def forward(self, spectrogram):  # (batch, n_frames, n_mels)
        return self.head(self.vector(spectrogram))  # (batch, n_classes)

    def vector(self, spectrogram):
        """The vector of each clip that the head reads, (batch, dim)."""
        return self.pool(self.features(spectrogram))

    def features(self, spectrogram):
        """The tokens after the last block and the final LayerNorm, (batch, tokens, dim)."""
        tokens = self.embed(spectrogram)
        tokens = self.encode(tokens)
        return self.norm(tokens)

    def encode(self, tokens):
        """Tokens through all blocks, (batch, tokens, dim) to the same shape."""
        for block in self.blocks:
            tokens = block(tokens)
        return tokens

    def pool(self, tokens):
        """Tokens (batch, tokens, dim) to one vector of each clip, (batch, dim).

        Section III-A says that the head "uses the entire output sequence", and does not say how.
        The authors' code takes the mean over all tokens: [CLS], [distillation] or the prompts that
        replace it, and the patches.
        """
        if self.config.pool == "cls":
            return tokens[:, 0]
        if self.config.pool == "cls_dist":  # the AudioSet head of the checkpoint reads this
            return (tokens[:, 0] + tokens[:, 1]) / 2
        return tokens.mean(1)


def make_head(config: ASTConfig) -> nn.Module:
    """One linear layer. With `cls_dist` a LayerNorm comes first, as in the AudioSet checkpoint."""
    linear = nn.Linear(config.dim, config.n_classes)
    if config.pool == "cls_dist":
        return nn.Sequential(nn.LayerNorm(config.dim, config.eps), linear)
    return linear
