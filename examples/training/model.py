# SPDX-License-Identifier: MIT
"""The listening model: causal convolutions over log-mels feed a Llama decoder in which speech frames and text pieces are two groups of rows.

Three layouts share one set of sizes:
  group         two position counters; frames see frames of a window, text sees its past and the frames heard when it was written
  interleaved   one counter by order of arrival, causal over everything (frames see text written before them)
  reencode      contiguous positions, source then target; the target is encoded anew after every read
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

import features

WINDOW = 256  # source frames that a row sees at most
ROPE_BASE = 10000.0
NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Sizes:
    width: int = 256
    layers: int = 10
    heads: int = 4
    feed_forward: int = 704
    pieces: int = 512

    @property
    def head(self) -> int:
        return self.width // self.heads


def rotary(positions: torch.Tensor, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [..., head / 2] for positions [...]."""
    frequency = ROPE_BASE ** (-torch.arange(0, head, 2, device=positions.device, dtype=torch.float32) / head)
    angle = positions.to(torch.float32)[..., None] * frequency
    return torch.cos(angle), torch.sin(angle)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates interleaved pairs of [B, N, H, head] by [B, N, head / 2]."""
    pairs = x.unflatten(-1, (-1, 2))
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS) * weight).to(x.dtype)


def project(x, norm_weight, qkv, cos, sin, heads: int):
    """Normalised rows -> rotated queries and keys, and values, each [B, N, H, head]."""
    q, k, v = F.linear(norm(x, norm_weight), qkv).unflatten(-1, (3, heads, -1)).unbind(2)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def attend(q, k, v, mask):
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask).transpose(1, 2).flatten(2)


def finish(x, attended, out, ffn_norm, gate_up, down):
    x = x + F.linear(attended, out)
    gate, up = F.linear(norm(x, ffn_norm), gate_up).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, down)


def block(x, mask, cos, sin, attn_norm, qkv, out, ffn_norm, gate_up, down, heads: int):
    """One layer over whole sequences; master weights are cast to the rows' type."""
    qkv, out, gate_up, down = (weight.to(x.dtype) for weight in (qkv, out, gate_up, down))
    q, k, v = project(x, attn_norm, qkv, cos, sin, heads)
    return finish(x, attend(q, k, v, mask), out, ffn_norm, gate_up, down)


class Layer(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        width, wide = sizes.width, sizes.feed_forward
        scale = width**-0.5
        deep = scale / (2 * sizes.layers) ** 0.5
        self.attn_norm = nn.Parameter(torch.ones(width))
        self.qkv = nn.Parameter(torch.randn(3 * width, width) * scale)
        self.out = nn.Parameter(torch.randn(width, width) * deep)
        self.ffn_norm = nn.Parameter(torch.ones(width))
        self.gate_up = nn.Parameter(torch.randn(2 * wide, width) * scale)
        self.down = nn.Parameter(torch.randn(width, wide) * deep * (width / wide) ** 0.5)

    def weights(self) -> tuple[torch.Tensor, ...]:
        return (self.attn_norm, self.qkv, self.out, self.ffn_norm, self.gate_up, self.down)


class Listener(nn.Module):
    def __init__(self, sizes: Sizes = Sizes()):
        super().__init__()
        self.sizes = sizes
        width = sizes.width
        self.register_buffer("mel_mean", torch.zeros(features.MELS))
        self.register_buffer("mel_std", torch.ones(features.MELS))
        self.conv1 = nn.Linear(3 * features.MELS, width)
        self.conv2 = nn.Linear(3 * width, width)
        self.proj = nn.Linear(width, width)
        self.embedding = nn.Parameter(torch.randn(sizes.pieces, width) * width**-0.5)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.final_norm = nn.Parameter(torch.ones(width))
        self.ctc = nn.Linear(width, sizes.pieces + 1)

    @property
    def blank(self) -> int:
        return self.sizes.pieces

    def normalise(self, mel: torch.Tensor) -> torch.Tensor:
        return (mel - self.mel_mean) / self.mel_std

    def subsample(self, mel: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Normalised [B, M, 80] -> [B, (M - 1) // 4 + 1, width]; two zero rows stand before the first frame of each convolution."""

        def strided(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
            x = F.pad(x, (0, 0, 2, 0))
            rows = x.unfold(1, 3, 2).transpose(2, 3).flatten(2)  # oldest tap first, channels inner
            return F.gelu(F.linear(rows, layer.weight.to(dtype), layer.bias.to(dtype)))

        x = strided(strided(mel.to(dtype), self.conv1), self.conv2)
        return F.linear(x, self.proj.weight.to(dtype), self.proj.bias.to(dtype))

    def embed(self, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return F.embedding(tokens, self.embedding).to(dtype)

    def trunk(self, x: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, run=block) -> torch.Tensor:
        """All layers and the final norm over [B, N, width] with a mask [B, 1, N, N] (True = seen)."""
        cos, sin = rotary(positions, self.sizes.head)
        for layer in self.layers:
            x = run(x, mask, cos, sin, *layer.weights(), self.sizes.heads)
        return norm(x, self.final_norm)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.embedding.to(hidden.dtype)).float()

    def ctc_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.ctc.weight.to(hidden.dtype), self.ctc.bias.to(hidden.dtype)).float()


def layout(name: str, frames: int, heard: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [B, S + T] and mask [B, 1, S + T, S + T] of training rows, stored source first.

    frames: S. heard [B, T]: the number of source frames that target row r sees, V_r (never decreasing along r); for `reencode` all V_r of an
    utterance are equal. Every row sees itself at least, so that no softmax is empty.
    """
    batch, rows = heard.shape
    device = heard.device
    source = torch.arange(frames, device=device)
    target = torch.arange(rows, device=device)
    if name == "interleaved":
        # row r comes after V_r frames and r earlier target rows; frame j after the target rows with V <= j
        written = torch.searchsorted(heard.contiguous(), source.expand(batch, -1).contiguous(), right=True)
        positions = torch.cat((source + written, heard + target), 1)
        mask = positions[:, :, None] >= positions[:, None, :]
        index = torch.cat((source.expand(batch, -1), heard - 1), 1)  # the newest frame that a row may see
        near = index[:, :, None] - source[None, None] < WINDOW
        mask[:, :, :frames] &= near
    else:
        offset = heard if name == "reencode" else torch.zeros_like(heard)
        positions = torch.cat((source.expand(batch, -1), offset + target), 1)
        mask = torch.zeros(batch, frames + rows, frames + rows, dtype=torch.bool, device=device)
        age = source[:, None] - source[None, :]
        mask[:, :frames, :frames] = (age >= 0) & (age < WINDOW)
        seen = heard[:, :, None] - source[None, None]
        mask[:, frames:, :frames] = (seen > 0) & (seen <= WINDOW)
        mask[:, frames:, frames:] = target[:, None] >= target[None, :]
    return positions, mask[:, None]
