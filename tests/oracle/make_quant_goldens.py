#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Records what the Python package `gguf` makes of seeded values, for quantised_blocks_test.cpp.

Writes tests/data/quant/<type>.bin for each type, little endian:
  uint32 count     values
  uint32 bytes     size of the stored form
  uint32 quantised 1 if the stored form came from the package's quantiser, 0 if from random bytes
  float32[count]   the values before quantisation (only if quantised is 1)
  uint8[bytes]     the stored form
  float32[count]   what the package reads back from it

Run: python3 tests/oracle/make_quant_goldens.py   (needs numpy and gguf; tested with gguf 0.19)
"""

import pathlib
import struct

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "data" / "quant"
COUNT = 2048


def values(rng):
    """Blocks of many magnitudes, with constant, zero and one-sided blocks among them."""
    x = rng.standard_normal(COUNT).reshape(-1, 32)
    x *= np.exp2(rng.integers(-12, 6, size=(len(x), 1)))
    x[3] = 0.0
    x[5] = 0.75
    x[7] = np.abs(x[7])
    x[9] = -np.abs(x[9])
    x[11, 1:] = 0.0
    return x.astype(np.float32).reshape(-1)


def halves(rng, count):
    """Finite float16 bit patterns of either sign, subnormals among them."""
    x = rng.standard_normal(count) * np.exp2(rng.integers(-18, 4, size=count).astype(np.float64))
    return x.astype(np.float16)


def random_blocks(rng, qtype):
    """Stored blocks whose every byte is random, but whose float16 fields are finite."""
    if qtype == Type.Q4_K:
        blocks = rng.integers(0, 256, size=(COUNT // 256, 144), dtype=np.uint8)
        blocks[:, 0:4] = halves(rng, 2 * len(blocks)).reshape(-1, 2).view(np.uint8)
    else:
        blocks = rng.integers(0, 256, size=(COUNT // 256, 210), dtype=np.uint8)
        blocks[:, 208:210] = halves(rng, len(blocks)).reshape(-1, 1).view(np.uint8)
    return blocks


def record(name, qtype, seed):
    rng = np.random.default_rng(seed)
    if qtype in (Type.Q4_K, Type.Q6_K):
        before, stored = None, random_blocks(rng, qtype).reshape(-1)
    else:
        before = values(rng)
        stored = np.ascontiguousarray(quantize(before, qtype)).view(np.uint8).reshape(-1)
    after = dequantize(stored, qtype).astype("<f4").reshape(-1)
    assert after.size == COUNT
    with open(FOLDER / f"{name}.bin", "wb") as file:
        file.write(struct.pack("<III", COUNT, stored.size, before is not None))
        if before is not None:
            file.write(before.astype("<f4").tobytes())
        file.write(stored.tobytes())
        file.write(after.tobytes())


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    types = {
        "f16": Type.F16,
        "bf16": Type.BF16,
        "q8_0": Type.Q8_0,
        "q4_0": Type.Q4_0,
        "q4_1": Type.Q4_1,
        "q4_k": Type.Q4_K,
        "q6_k": Type.Q6_K,
    }
    for seed, (name, qtype) in enumerate(types.items()):
        record(name, qtype, seed)


if __name__ == "__main__":
    main()
