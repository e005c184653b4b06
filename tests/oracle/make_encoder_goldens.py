#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Writes tests/data/encoders/*.safetensors: small encoders with seeded weights and what PyTorch makes
of an input. Each file holds the weights under the names of their Transformers classes, "input" and
"output".

  conformer         transformers.ParakeetEncoder: symmetric convolutions, batch norm, full attention
  conformer_causal  the cache-aware variant as plain PyTorch: causal convolutions, layer norm, and the
                    chunk mask of core frame-stream B.1 for [4, 1]
  moonshine         transformers.MoonshineStreamingEncoder with windows (6, 3), (6, 0), (5, 2)
  vision            transformers' Qwen2.5-VL vision tower: windows of 28 pixels, one whole layer

usage: make_encoder_goldens.py [FOLDER]     (needs torch, transformers >= 5, safetensors)
"""
import pathlib
import sys

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F


def seed_weights(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(module.state_dict().items()):
        if not tensor.is_floating_point():
            continue
        values = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(values.abs() + 0.5)
        elif tensor.dim() <= 1 and name.endswith(("weight", "gamma")):
            tensor.copy_(1 + 0.2 * values)
        elif tensor.dim() <= 1 or "bias" in name or "running_mean" in name:
            tensor.copy_(0.3 * values)
        else:
            fan_in = tensor[0].numel()
            tensor.copy_(values / fan_in**0.5)


def save(folder: pathlib.Path, name: str, module: nn.Module, x: torch.Tensor, y: torch.Tensor):
    tensors = {
        key: value.detach().float().contiguous().clone()
        for key, value in module.state_dict().items()
        if value.is_floating_point() and "inv_freq" not in key
    }
    tensors = {k: (v.reshape(1) if v.dim() == 0 else v) for k, v in tensors.items()}
    tensors["input"] = x.detach().float().contiguous()
    tensors["output"] = y.detach().float().contiguous()
    save_file(tensors, folder / f"{name}.safetensors", {"source": "tests/oracle/make_encoder_goldens.py"})
    print(name, tuple(x.shape), "->", tuple(y.shape))


def parakeet_config():
    from transformers import ParakeetEncoderConfig

    return ParakeetEncoderConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        conv_kernel_size=5, subsampling_factor=8, subsampling_conv_channels=4, num_mel_bins=16,
        dropout=0.0, layerdrop=0.0, activation_dropout=0.0, attention_dropout=0.0,
        attn_implementation="eager",
    )


def conformer(folder: pathlib.Path) -> None:
    from transformers.models.parakeet.modeling_parakeet import ParakeetEncoder

    model = ParakeetEncoder(parakeet_config()).eval()
    seed_weights(model, 1)
    x = torch.randn(1, 77, 16, generator=torch.Generator().manual_seed(2))
    y = model(input_features=x).last_hidden_state
    save(folder, "conformer", model, x[0], y[0])


class CausalConformer(nn.Module):
    """The same tensors' shapes, everything that streams put in: NeMo's causal convolutions, layer
    norm behind the depthwise one, attention limited to chunks."""

    def __init__(self, left: int, right: int):
        super().__init__()
        from transformers.models.parakeet.modeling_parakeet import ParakeetEncoder

        base = ParakeetEncoder(parakeet_config())
        self.subsampling = base.subsampling
        self.layers = base.layers
        self.chunk = right + 1
        self.left_chunks = left // self.chunk
        width = 16
        self.width = width
        # 16 mel frames padded by 2 and 1 three times: 9, 5, 3.
        self.subsampling.linear = nn.Linear(4 * 3, width)
        for layer in self.layers:
            layer.conv.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x[None, None]
        for layer in self.subsampling.layers:
            if isinstance(layer, nn.Conv2d) and layer.kernel_size[0] == 3:
                h = F.conv2d(F.pad(h, (2, 1, 2, 1)), layer.weight, layer.bias, 2, 0, 1, layer.groups)
            else:
                h = layer(h)
        h = h[0].transpose(0, 1).reshape(h.shape[2], -1)
        h = self.subsampling.linear(h) * self.width**0.5
        for layer in self.layers:
            h = self.block(layer, h)
        return h

    def block(self, layer, h):
        h = h + 0.5 * layer.feed_forward1(layer.norm_feed_forward1(h))
        h = h + self.attend(layer.self_attn, layer.norm_self_att(h))
        c = layer.conv
        z = F.glu(c.pointwise_conv1(layer.norm_conv(h).T[None]), dim=1)
        z = F.pad(z, (c.depthwise_conv.kernel_size[0] - 1, 0))
        z = F.conv1d(z, c.depthwise_conv.weight, c.depthwise_conv.bias, groups=self.width)
        z = F.silu(c.norm(z.transpose(1, 2)).transpose(1, 2))
        h = h + c.pointwise_conv2(z)[0].T
        h = h + 0.5 * layer.feed_forward2(layer.norm_feed_forward2(h))
        return layer.norm_out(h)

    def attend(self, a, h):
        """Row by row, from the definition."""
        count, heads = h.shape[0], 2
        dim = self.width // heads
        q = a.q_proj(h).view(count, heads, dim)
        k = a.k_proj(h).view(count, heads, dim)
        v = a.v_proj(h).view(count, heads, dim)
        rates = 1.0 / 10000 ** (torch.arange(0, self.width, 2) / self.width)
        out = torch.zeros(count, heads, dim)
        for i in range(count):
            seen = [j for j in range(count)
                    if 0 <= i // self.chunk - j // self.chunk <= self.left_chunks]
            for head in range(heads):
                scores = []
                for j in seen:
                    angle = (i - j) * rates
                    r = torch.stack([angle.sin(), angle.cos()], -1).reshape(-1)
                    r = a.relative_k_proj(r).view(heads, dim)[head]
                    scores.append((q[i, head] + a.bias_u[head]) @ k[j, head]
                                  + (q[i, head] + a.bias_v[head]) @ r)
                weights = torch.softmax(torch.stack(scores) / dim**0.5, 0)
                out[i, head] = weights @ v[seen, head]
        return a.o_proj(out.reshape(count, self.width))


def conformer_causal(folder: pathlib.Path) -> None:
    model = CausalConformer(4, 1).eval()
    seed_weights(model, 3)
    x = torch.randn(90, 16, generator=torch.Generator().manual_seed(4))
    save(folder, "conformer_causal", model, x, model(x))


def moonshine(folder: pathlib.Path) -> None:
    from transformers import MoonshineStreamingEncoderConfig
    from transformers.models.moonshine_streaming.modeling_moonshine_streaming import (
        MoonshineStreamingEncoder,
    )

    config = MoonshineStreamingEncoderConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, sliding_windows=((6, 3), (6, 0), (5, 2)), frame_ms=1.0,
        attn_implementation="eager",
    )
    model = MoonshineStreamingEncoder(config).eval()
    seed_weights(model, 5)
    generator = torch.Generator().manual_seed(6)
    t = torch.arange(16 * 150) / 16000
    x = torch.sin(2 * torch.pi * (200 + 900 * t) * t) * (0.2 + t) + 0.05 * torch.randn(t.shape, generator=generator)
    y = model(x[None], attention_mask=torch.ones(1, x.numel(), dtype=torch.long)).last_hidden_state
    save(folder, "moonshine", model, x, y[0])


def vision(folder: pathlib.Path) -> None:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel,
    )

    config = Qwen2_5_VLVisionConfig(
        depth=3, hidden_size=24, intermediate_size=36, num_heads=3, out_hidden_size=20, patch_size=7,
        spatial_merge_size=2, temporal_patch_size=2, window_size=28, fullatt_block_indexes=[1],
        attn_implementation="eager",
    )
    model = Qwen2_5_VisionTransformerPretrainedModel(config).eval()
    seed_weights(model, 7)
    rows, cols = 3, 5  # tokens: windows of 2 x 2, cut at the right and at the bottom
    x = torch.randn(rows * cols * 4, 3 * 2 * 7 * 7, generator=torch.Generator().manual_seed(8))
    y = model(x, torch.tensor([[1, 2 * rows, 2 * cols]])).pooler_output
    save(folder, "vision", model, x, y)


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "tests/data/encoders")
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    for make in (conformer, conformer_causal, moonshine, vision):
        make(folder)
