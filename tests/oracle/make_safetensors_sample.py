# SPDX-License-Identifier: MIT
"""Writes tests/data/safetensors/sample.safetensors with the safetensors package and sample.tsv:
name, dtype, extents, bytes and CRC-32 of each tensor.

Run: python make_safetensors_sample.py <repository>/tests/data/safetensors
     (pip install safetensors torch)
"""
import pathlib
import sys
import zlib

import torch
from safetensors.torch import save_file

if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    torch.manual_seed(20240507)
    tensors = {
        "wide.weight": torch.randn(3, 5),
        "half.weight": torch.randn(2, 7).to(torch.float16),
        "brain.weight": torch.randn(7).to(torch.bfloat16),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "ids": torch.arange(4, dtype=torch.int64),
    }
    save_file(tensors, folder / "sample.safetensors", metadata={"format": "pt"})
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    with open(folder / "sample.tsv", "w", encoding="utf-8") as out:
        for name, tensor in tensors.items():
            raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            extents = "x".join(str(extent) for extent in tensor.shape)
            out.write(f"{name}\t{names[tensor.dtype]}\t{extents}\t{len(raw)}\t{zlib.crc32(raw)}\n")
