# SPDX-License-Identifier: MIT
"""Compares the C++ example with PyTorch's decoding of the same file, word for word and at the same audio times.

    python3 make_goldens.py --model listen-en.gguf --shards DIR --out FOLDER --count 100 --all-voices --ks 0,1,3,5,7
    python3 check_equality.py --goldens FOLDER --model listen-en.gguf --listen build/.../listen

Every utterance is given to the example at its latency, without end-points. Exit status 1 if any word differs. The test ListenerGoldens of
sluice_test_stream compares the same folder piece for piece ($SLUICE_LISTEN_GOLDENS).
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import wave

import features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goldens", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--listen", required=True, help="the built example 03_listen")
    parser.add_argument("--most", type=int, default=10**9, help="goldens to compare")
    parser.add_argument("--options", default="--endpoint-ms 0 --max-utterance-ms 60000 --activations f32")
    args = parser.parse_args()
    with open(os.path.join(args.goldens, "goldens.json"), encoding="utf-8") as file:
        goldens = json.load(file)["utterances"][: args.most]
    equal: collections.Counter = collections.Counter()
    total: collections.Counter = collections.Counter()
    times = times_equal = 0
    for golden in goldens:
        path = os.path.join(args.goldens, golden["audio"])
        with wave.open(path) as file:
            samples = file.getnframes()
        k = golden["k"]
        command = [args.listen, "--json", "--model", args.model, "--latency", str(k) if k else "all", *args.options.split(), path]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        words = [event for line in done.stdout.splitlines() if (event := json.loads(line)).get("kind") == "word"]
        text = " ".join(word["text"] for word in words)
        total[k] += 1
        equal[k] += text == golden["text"]
        if text != golden["text"]:
            print(f"{golden['audio']}, k = {k}:\n  PyTorch {golden['text']}\n  C++     {text}")
        for word, (frames, finished) in zip(words, golden["words"]):
            first = features.frame_end(frames - 1) / 16
            last = samples / 16 if finished else first  # words of the end stand at the end
            times += 1
            times_equal += first - 0.51 < word["audio_ms"] < last + 0.51
    for k in sorted(total):
        print(f"k = {k or 'all'}: {equal[k]} of {total[k]} utterances equal")
    print(f"written at the same audio time: {times_equal} of {times} words")
    sys.exit(0 if equal == total else 1)


if __name__ == "__main__":
    main()
