# SPDX-License-Identifier: MIT
"""Compares the C++ example with PyTorch's decoding of the same file, word for word and, where the example's JSON has them, piece for piece.

    python3 evaluate.py --group listen-en.gguf --column held_out_voices=DIR --dump dump.json --dump-audio audio.npz ...
    python3 check_equality.py --dump dump.json --audio audio.npz --model listen-en.gguf --listen build/.../listen

Every utterance is written as a 16-bit WAV file and given to the example at latency all, 1, 3, 5 and 7 words without end-points. Exit status 1 if
any word differs. Also compared: the audio time at which each word was written.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import wave

import numpy as np

import features

LATENCIES = {"batch": "all", "ctc k=1 delay=4": "1", "ctc k=3 delay=4": "3", "ctc k=5 delay=4": "5", "ctc k=7 delay=4": "7"}


def listen(command: list[str]) -> list[dict]:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [event for line in done.stdout.splitlines() if (event := json.loads(line)).get("kind") == "word"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dump", required=True)
    parser.add_argument("--audio", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--listen", required=True, help="the built example 03_listen")
    parser.add_argument("--most", type=int, default=0)
    parser.add_argument("--options", default="--endpoint-ms 0 --max-utterance-ms 60000 --activations float32")
    args = parser.parse_args()
    with open(args.dump, encoding="utf-8") as file:
        expected = json.load(file)
    audio = np.load(args.audio)
    if args.most:
        expected = expected[: args.most]
    bad = 0
    equal = dict.fromkeys(LATENCIES, 0)
    pieces_compared = times = times_equal = 0
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "utterance.wav")
        for n, entry in enumerate(expected):
            with wave.open(path, "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(features.RATE)
                file.writeframes(audio[f"u{n:03d}"].astype("<i2").tobytes())
            for policy, latency in LATENCIES.items():
                want = entry["policies"][policy]
                words = listen([args.listen, "--json", "--model", args.model, "--latency", latency, *args.options.split(), path])
                got = " ".join(word["text"] for word in words)
                same = got == want["text"]
                if words and all("tokens" in word for word in words):
                    tokens = [token for word in words for token in word["tokens"]]
                    same = same and tokens == want["tokens"]
                    pieces_compared += len(tokens)
                for word, frames, finished in zip(words, want["word_frames"], want["finished"]):
                    due = entry["samples"] if finished else features.frame_end(frames - 1)
                    times += 1
                    times_equal += abs(word["audio_ms"] - due / 16) < 0.51
                equal[policy] += same
                if not same:
                    bad += 1
                    print(f"utterance {n}, {policy}:\n  PyTorch {want['text']}\n  C++     {got}")
    for policy, count in equal.items():
        print(f"{policy}: {count} of {len(expected)} utterances equal")
    print(f"{pieces_compared} pieces compared; written at the same audio time: {times_equal} of {times} words")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
