# SPDX-License-Identifier: MIT
"""Writes tests/data/gguf/sample.gguf and small.gguf with the ggml project's own `gguf` package.

sample.gguf holds one tensor of each element type that sluice reads, "<TYPE>.weight", and beside it
what the package dequantises it to, "<TYPE>.dequantised" (F32, the same shape); metadata of every
kind. sample.tsv lists name, type, rows, cols, bytes and CRC-32 of each tensor. small.gguf is a seed
for the fuzzer: mostly header. The package quantises Q8_0, Q4_0 and Q4_1 itself; it has no
quantiser for Q4_K and Q6_K, so their blocks are random bits with small finite scales.

Run: python make_gguf_sample.py <repository>/tests/data/gguf      (pip install gguf numpy)
"""
import pathlib
import sys
import zlib

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

ROWS = 2
PLAIN = [(Type.F32, 24), (Type.F16, 24), (Type.BF16, 24)]
QUANTISED = [(Type.Q8_0, 64), (Type.Q4_0, 64), (Type.Q4_1, 64)]
K_QUANTS = [(Type.Q4_K, 256, 2), (Type.Q6_K, 256, 1)]  # type, cols, half floats that are scales


def k_quant_blocks(rng, kind, num_scales):
    """One block a row: random bits, then the scales where the format has them."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = rng.integers(0, 256, (ROWS, size), dtype=np.uint8)
    scales = rng.uniform(0.001, 0.02, (ROWS, num_scales)).astype(np.float16).view(np.uint8)
    if kind == Type.Q4_K:  # d and dmin come first
        blocks[:, : scales.shape[1]] = scales
    else:  # d comes last
        blocks[:, -scales.shape[1] :] = scales
    return blocks


def add_metadata(writer):
    writer.add_uint8("kind.uint8", 200)
    writer.add_int8("kind.int8", -100)
    writer.add_uint16("kind.uint16", 60000)
    writer.add_int16("kind.int16", -30000)
    writer.add_uint32("kind.uint32", 4000000000)
    writer.add_int32("kind.int32", -2000000000)
    writer.add_uint64("kind.uint64", 2**64 - 1)
    writer.add_int64("kind.int64", -(2**63))
    writer.add_float32("kind.float32", 0.375)
    writer.add_float64("kind.float64", 0.1)
    writer.add_bool("kind.bool", True)
    writer.add_string("kind.string", "na\u00efve \u2581text")
    writer.add_array("kind.strings", ["<s>", "", "\u2581a"])
    writer.add_array("kind.ints", [3, -1, 2])
    writer.add_array("kind.floats", [0.5, -1.25])
    writer.add_array("kind.bools", [True, False, True])


def write_sample(folder):
    rng = np.random.default_rng(20240507)
    writer = gguf.GGUFWriter(folder / "sample.gguf", "llama")
    add_metadata(writer)
    lines = []

    def add(name, kind, data, cols):
        data = np.ascontiguousarray(data)
        # The package wants the logical extents of what is not quantised, bytes of what is.
        writer.add_tensor(name, data, raw_dtype=kind)
        raw = data.tobytes()
        lines.append(f"{name}\t{kind.name}\t{ROWS}\t{cols}\t{len(raw)}\t{zlib.crc32(raw)}")

    for kind, cols in PLAIN + QUANTISED:
        values = rng.normal(0, 1, (ROWS, cols)).astype(np.float32)
        stored = gguf.quants.quantize(values, kind)
        add(f"{kind.name}.weight", kind, stored, cols)
        add(f"{kind.name}.dequantised", Type.F32, gguf.quants.dequantize(stored, kind), cols)
    for kind, cols, num_scales in K_QUANTS:
        stored = k_quant_blocks(rng, kind, num_scales)
        add(f"{kind.name}.weight", kind, stored, cols)
        add(f"{kind.name}.dequantised", Type.F32, gguf.quants.dequantize(stored, kind), cols)
    finish(writer)
    (folder / "sample.tsv").write_text("\n".join(lines) + "\n")


def write_small(folder):
    writer = gguf.GGUFWriter(folder / "small.gguf", "llama")
    add_metadata(writer)
    writer.add_tensor("a", np.arange(8, dtype=np.float32).reshape(2, 4))
    writer.add_tensor("b", np.arange(34, dtype=np.uint8).reshape(1, 34), raw_dtype=Type.Q8_0)
    finish(writer)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    target = pathlib.Path(sys.argv[1])
    write_sample(target)
    write_small(target)
