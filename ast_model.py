"""The Audio Spectrogram Transformer (AST) in one file, as section II-A of the paper describes it.

"The paper" is Cappellazzo et al., "Parameter-Efficient Transfer Learning of Audio Spectrogram
Transformers" (2023). The AST itself is the model of Gong, Chung and Glass, "AST: Audio Spectrogram
Transformer" (Interspeech 2021). It cuts a spectrogram into overlapping 16x16 patches, makes a token
of every patch, and reads the tokens with a pre-norm Transformer encoder.

This file imports torch and nothing else. It knows no adapters, no LoRA and no prompts: `petl.py`
replaces modules by their attribute names (`embed`, `blocks`, `attn`, `ffn`, `q`, `fc1`, ...), so
these names are the interface.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

POOL = ("mean", "cls", "cls_dist")  # how tokens become one vector, see AST.pool


@dataclass(frozen=True)
class ASTConfig:
    """The shape of an AST.

    The defaults are AST-Base as released for AudioSet (clips of 10.24 s). Only `pool` differs: the
    paper takes the mean of all tokens.
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
            raise ValueError(f"pool is {self.pool!r}; choose one of {', '.join(POOL)}")
        if self.heads < 1 or self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        if min(self.n_frames, self.n_mels) < self.patch:
            shape = f"{self.n_frames} frames x {self.n_mels} bands"
            raise ValueError(f"{shape} do not hold one {self.patch}-wide patch")

    @property
    def grid(self) -> tuple[int, int]:
        """F x T patches, along frequency and time: 12 x 101 at 1024 frames, 12 x 49 at 500."""
        bands = (self.n_mels - self.patch) // self.stride + 1
        steps = (self.n_frames - self.patch) // self.stride + 1
        return bands, steps

    @property
    def n_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def n_tokens(self) -> int:
        """N of section II-A: the patches, [CLS], and [distillation], which the paper leaves out."""
        return 2 + self.n_patches


class Embedding(nn.Module):
    """Makes tokens of a spectrogram: one for every patch, two more in front; adds positions."""

    def __init__(self, config: ASTConfig):
        super().__init__()
        self.input_shape = (config.n_frames, config.n_mels)
        self.patches = nn.Conv2d(1, config.dim, config.patch, config.stride)
        self.cls = nn.Parameter(torch.empty(1, 1, config.dim))
        self.dist = nn.Parameter(torch.empty(1, 1, config.dim))
        self.position = nn.Parameter(torch.empty(1, config.n_tokens, config.dim))
        for parameter in (self.cls, self.dist, self.position):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, fbank):  # (batch, n_frames, n_mels)
        if fbank.shape[1:] != self.input_shape:
            shape = ", ".join(map(str, self.input_shape))
            raise ValueError(f"this AST reads (batch, {shape}), not {tuple(fbank.shape)}")
        image = fbank.transpose(1, 2).unsqueeze(1)  # (batch, 1, n_mels, n_frames)
        patches = self.patches(image)  # (batch, dim, F, T)
        patches = patches.flatten(2).transpose(1, 2)  # (batch, F T, dim), row f T + t
        batch = fbank.shape[0]  # not len(fbank), which an ONNX export would freeze
        cls = self.cls.expand(batch, -1, -1)
        dist = self.dist.expand(batch, -1, -1)
        return torch.cat([cls, dist, patches], dim=1) + self.position  # (batch, 2 + F T, dim)


class Attention(nn.Module):
    """Multi-head self-attention (MHSA), eq. (2) and (3).

    The projections are four separate modules, so that LoRA can adapt each of them. k and v may
    return more tokens than q: prefix-tuning (petl.PrefixLinear) adds tokens to both.
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
        heads = F.scaled_dot_product_attention(q, k, v)  # eq. (2): softmax(q k^T / sqrt(d_k)) v
        return self.o(self.merge_heads(heads))  # eq. (3): Concat(head_1, ..., head_h) W_o

    def split_heads(self, x):  # (batch, tokens, dim) -> (batch, heads, tokens, dim / heads)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def merge_heads(self, x):  # (batch, heads, tokens, dim / heads) -> (batch, tokens, dim)
        return x.transpose(1, 2).flatten(2)


class FFN(nn.Module):
    """Feed-forward network, eq. (4). The paper writes ReLU; the pretrained AST has GELU."""

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
    """The whole model: a spectrogram (batch, n_frames, n_mels) to logits (batch, n_classes)."""

    def __init__(self, config: ASTConfig):
        super().__init__()
        self.config = config
        self.embed = Embedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, config.eps)
        self.head = make_head(config)

    def forward(self, fbank):  # (batch, n_frames, n_mels)
        return self.head(self.vector(fbank))  # (batch, n_classes)

    def vector(self, fbank):
        """What the head reads of each clip, (batch, dim)."""
        return self.pool(self.features(fbank))

    def features(self, fbank):
        """Tokens after the final LayerNorm, (batch, tokens, dim)."""
        return self.norm(self.encode(self.embed(fbank)))

    def encode(self, tokens):
        """Tokens through all blocks, (batch, tokens, dim) in and out."""
        for block in self.blocks:
            tokens = block(tokens)
        return tokens

    def pool(self, tokens):
        """Tokens (batch, tokens, dim) to one vector (batch, dim)."""
        if self.config.pool == "cls":
            return tokens[:, 0]
        if self.config.pool == "cls_dist":  # as the AudioSet head of the checkpoint reads them
            return (tokens[:, 0] + tokens[:, 1]) / 2
        return tokens.mean(1)  # section III-A: the mean of "the entire output sequence"


def make_head(config: ASTConfig) -> nn.Module:
    """One linear layer. With `cls_dist` a LayerNorm comes first, as in the AudioSet checkpoint."""
    linear = nn.Linear(config.dim, config.n_classes)
    if config.pool == "cls_dist":
        return nn.Sequential(nn.LayerNorm(config.dim, config.eps), linear)
    return linear
