"""The Audio Spectrogram Transformer (AST) in one file: section II-A of the paper, with the AST's [distillation] token.

Gong, Chung and Glass, "AST: Audio Spectrogram Transformer", Interspeech 2021. A spectrogram is cut into overlapping
16x16 patches, each patch becomes a token, and a pre-norm Transformer encoder reads the tokens. Nothing here
depends on adapters, LoRA or prompts: `petl.py` wraps the modules defined here, so every name is a place to plug in.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class ASTConfig:
    """The shape of an AST. The defaults: the base model trained on AudioSet's clips of 10.24 s; `pool`: the paper's."""

    n_frames: int = 1024  # of the spectrogram, one every 10 ms
    n_mels: int = 128
    patch: int = 16
    stride: int = 10  # patches overlap by 6 in both directions
    dim: int = 768
    depth: int = 12
    heads: int = 12
    eps: float = 1e-12  # of every LayerNorm
    n_classes: int = 527
    pool: str = "mean"  # how tokens become one vector, see POOL
    hidden: int | None = None  # width of the feed-forward layer, 4 dim unless given

    def __post_init__(self):
        if self.pool not in POOL:
            raise ValueError(f"pool is {self.pool!r}; choose one of {', '.join(POOL)}")
        if self.heads < 1 or self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        if min(self.n_frames, self.n_mels) < self.patch:
            raise ValueError(f"{self.n_frames} frames x {self.n_mels} bands do not hold one {self.patch}-wide patch")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along frequency and along time: (12, 101) at 1024 frames, (12, 49) at 500, (12, 9) at 100."""
        return (self.n_mels - self.patch) // self.stride + 1, (self.n_frames - self.patch) // self.stride + 1

    @property
    def n_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def n_tokens(self) -> int:
        """N of section II-A: the patches, [CLS] and, one more than the paper counts, [distillation]."""
        return 2 + self.n_patches


POOL = {
    "mean": lambda tokens: tokens.mean(1),  # all tokens: "the entire output sequence" of section III-A
    "cls": lambda tokens: tokens[:, 0],
    "cls_dist": lambda tokens: (tokens[:, 0] + tokens[:, 1]) / 2,  # the checkpoint's AudioSet head
}


class Embedding(nn.Module):
    """Spectrogram to tokens: patches through a strided convolution, two extra tokens in front, positions added."""

    def __init__(self, config: ASTConfig):
        super().__init__()
        self.shape = (config.n_frames, config.n_mels)
        self.patches = nn.Conv2d(1, config.dim, config.patch, config.stride)
        self.cls = nn.Parameter(torch.empty(1, 1, config.dim))
        self.dist = nn.Parameter(torch.empty(1, 1, config.dim))
        self.position = nn.Parameter(torch.empty(1, config.n_tokens, config.dim))
        for parameter in (self.cls, self.dist, self.position):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, fbank):  # (batch, n_frames, n_mels)
        if fbank.shape[1:] != self.shape:
            raise ValueError(f"this AST reads (batch, {self.shape[0]}, {self.shape[1]}), not {tuple(fbank.shape)}")
        image = fbank.transpose(1, 2).unsqueeze(1)  # (batch, 1, n_mels, n_frames)
        patches = self.patches(image).flatten(2).transpose(1, 2)  # (batch, F * T, dim): patch index = f * T + t
        batch = fbank.shape[0]  # not len(): an exporter would take it for a constant
        tokens = torch.cat([self.cls.expand(batch, -1, -1), self.dist.expand(batch, -1, -1), patches], dim=1)
        return tokens + self.position  # (batch, 2 + F * T, dim)


class Attention(nn.Module):
    """Multi-head self-attention (MHSA), eq. (2) and (3), with four separate projections for LoRA to adapt."""

    def __init__(self, config: ASTConfig):
        super().__init__()
        self.heads = config.heads
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)

    def forward(self, x):  # (batch, tokens, dim)
        # Each keeps its own length: wrapped, k and v may return more rows than they read (the prefixes of petl.py).
        q, k, v = (self.split(project(x)) for project in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)  # eq. (2) in each head: (batch, heads, tokens, dim / heads)
        return self.o(mixed.transpose(1, 2).flatten(2))  # eq. (3), Concat(heads) W_o: (batch, tokens, dim)

    def split(self, x):  # (batch, tokens, dim) -> (batch, heads, tokens, dim / heads)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FFN(nn.Module):
    """Feed-forward network, eq. (4), with the exact GELU of the pretrained AST (the paper writes ReLU)."""

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
    """Audio Spectrogram Transformer: `fbank` (batch, n_frames, n_mels) to logits (batch, n_classes)."""

    def __init__(self, config: ASTConfig):
        super().__init__()
        self.config = config
        self.embed = Embedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, config.eps)
        self.head = make_head(config)

    def states(self, fbank, kept=None):
        """Tokens of the embedding and then after each block, one by one, (batch, tokens, dim): [CLS], [distillation] or
        prompts, patches.

        kept: (batch, n), indices of the patches that go through the blocks (`data.patchout`); without it all do.
        """
        x = self.embed(fbank)
        if kept is not None:  # counted from the end, as prompts may stand in front
            front, patches = x[:, : -self.config.n_patches], x[:, -self.config.n_patches :]
            x = torch.cat([front, patches.take_along_dim(kept[:, :, None], dim=1)], dim=1)
        yield x
        for block in self.blocks:
            x = block(x)
            yield x

    def encode(self, fbank, kept=None):
        """Tokens after the last block, the last of `states`."""
        for x in self.states(fbank, kept):
            last = x
        return last

    def features(self, fbank, kept=None):
        """Tokens after the final LayerNorm, (batch, tokens, dim)."""
        return self.norm(self.encode(fbank, kept))

    def pool(self, tokens):
        """Tokens (batch, tokens, dim) to one vector (batch, dim)."""
        return POOL[self.config.pool](tokens)

    def vector(self, fbank, kept=None):
        """What the head reads of each clip, (batch, dim)."""
        return self.pool(self.features(fbank, kept))

    def forward(self, fbank, kept=None):
        return self.head(self.vector(fbank, kept))  # (batch, n_classes)


def make_head(config: ASTConfig) -> nn.Module:
    """One linear layer; `cls_dist` puts a LayerNorm before it, as the AudioSet head of the checkpoint has it."""
    linear = nn.Linear(config.dim, config.n_classes)
    return nn.Sequential(nn.LayerNorm(config.dim, config.eps), linear) if config.pool == "cls_dist" else linear
