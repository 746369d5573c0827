"""A CLIP as open_clip names and computes it, written with torch's own layers: the reference of the key conversion."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from tiny_clip import PIXELS, TOKENS
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block: attention and two layers, each after its norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=nn.GELU(), c_proj=nn.Linear(4 * width, width))
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    """Blocks one after another."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Vision(nn.Module):
    """The half that sees."""

    def __init__(self, width: int, heads: int, depth: int, embedding: int, pixels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=14, stride=14, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((pixels // 14) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Tower(width, heads, depth)
        self.proj = nn.Parameter(torch.randn(width, embedding))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        whole = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1)
        states = self.transformer(self.ln_pre(whole + self.positional_embedding))
        return self.ln_post(states[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """open_clip's CLIP; by default tiny, with the head widths of ViT-H-14."""

    def __init__(
        self,
        vocabulary: int,
        text: tuple[int, int, int] = (128, 2, 2),
        vision: tuple[int, int, int] = (160, 2, 2),
        embedding: int = 24,
        tokens: int = TOKENS,
        pixels: int = PIXELS,
    ) -> None:
        super().__init__()
        width, heads, depth = text
        self.visual = Vision(*vision, embedding, pixels)
        self.transformer = Tower(width, heads, depth)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.randn(tokens, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, embedding))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def read(self, ids: Sequence[int]) -> Tensor:
        """Embeds one text; filled up with zeros, as open_clip's tokenizer does it."""
        row = torch.tensor([*ids, *[0] * (len(self.positional_embedding) - len(ids))])
        mask = torch.full((len(row), len(row)), -torch.inf).triu(1)
        states = self.transformer((self.token_embedding(row) + self.positional_embedding)[None], mask)
        return self.ln_final(states)[0, row.argmax()] @ self.text_projection


def make_open_clip(vocabulary: int) -> OpenClip:
    """A tiny untrained model that tells pictures and texts apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return OpenClip(vocabulary).eval()
