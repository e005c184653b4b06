#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Writes the small well-formed files that the fuzzers of audio and pictures start from.

usage: make_frame_seeds.py DATA_FOLDER
"""

import pathlib
import random
import struct
import sys


def wav(tag, bits, channels, rate, samples, extensible=False, before=b"", length=None):
    block = channels * bits // 8
    fmt = struct.pack("<HHIIHH", 0xFFFE if extensible else tag, channels, rate, rate * block, block, bits)
    if extensible:
        fmt += struct.pack("<HHIH", 22, bits, 3, tag) + bytes.fromhex("000000001000800000aa00389b71")
    body = b"WAVE" + before + b"fmt " + struct.pack("<I", len(fmt)) + fmt
    body += b"data" + struct.pack("<I", len(samples) if length is None else length) + samples
    return b"RIFF" + struct.pack("<I", len(body)) + body


def main():
    data = pathlib.Path(sys.argv[1])
    noise = random.Random(3)
    folder = data / "wav"
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "s16_mono.wav": wav(1, 16, 1, 16000, noise.randbytes(200)),
        "u8_stereo.wav": wav(1, 8, 2, 8000, noise.randbytes(100)),
        "s24_extensible.wav": wav(1, 24, 2, 48000, noise.randbytes(120), extensible=True),
        "f32_list.wav": wav(3, 32, 1, 44100, struct.pack("<8f", *[i / 8 for i in range(8)]),
                            before=b"LIST" + struct.pack("<I", 5) + b"abcde\0"),
        "f64_unknown_length.wav": wav(3, 64, 1, 16000, struct.pack("<4d", 0, 0.5, -0.5, 1),
                                      length=0xFFFFFFFF),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)

    folder = data / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    header = b"YUV4MPEG2 W6 H4 F25:1 Ip A1:1 C"
    files = {
        "two.ppm": b"".join(b"P6\n5 3\n255\n" + noise.randbytes(45) for _ in range(2)),
        "grey.pgm": b"P5 # a comment\n4 4 255\n" + noise.randbytes(16),
        "420.y4m": header + b"420jpeg\n" + 2 * (b"FRAME\n" + noise.randbytes(36)),
        "444_full.y4m": header + b"444 XCOLORRANGE=FULL\n" + b"FRAME\n" + noise.randbytes(72),
        "mono.y4m": header + b"mono\n" + b"FRAME Ip\n" + noise.randbytes(24),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()
