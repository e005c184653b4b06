# SPDX-License-Identifier: MIT
"""Records what PyTorch writes with the shipped file, for comparison with the C++ runtime: utterances of held-out voices and their goldens.

    python3 make_goldens.py --model ../03_listen/listen-en.gguf --shards DIR --out ../../tests/data/listen --longest 1.55
    python3 make_goldens.py --model ../03_listen/listen-en.gguf --shards DIR --out /tmp/equality --count 100 --all-voices --ks 0,1,3,5,7
    SLUICE_LISTEN_GOLDENS=/tmp/equality sluice_test_stream --gtest_filter='ListenerGoldens.*'

Without --all-voices only utterances of flite (rms) and festival (ked) are taken, whose voices may be redistributed freely. Written: uN.wav (16 kHz,
16 bit, with 200 ms of silence at the end), goldens.json and mel.f32, the normalised log-mel features of u0 as little-endian float32 [frames, 80].
goldens.json: {"utterances": [{audio, voice, reference, k (0: the whole utterance first), delay, tokens, words: [[source frames heard, whether the
input was over], ...], text}, ...], "ctc": {audio: greedy labels of the source frames}}; one utterance entry for every k.
"""

from __future__ import annotations

import argparse
import json
import os
import wave

import numpy as np
import torch

import data
import decode
import export
import features
from decode import Policy
from voices import ENGINES

DELAY = 4
SILENCE = 3200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--shards", required=True, help="test speech of synthesise.py --test")
    parser.add_argument("--out", required=True)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--longest", type=float, default=16.0, help="seconds, with the silence at the end")
    parser.add_argument("--all-voices", action="store_true")
    parser.add_argument("--ks", default="0,1,3")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.makedirs(args.out, exist_ok=True)
    model, pieces = export.read(args.model)
    corpus = data.load(args.shards, "cpu")
    names = sorted(ENGINES)
    free = np.isin(corpus.voices, [names.index("flite"), names.index("festival")]) | args.all_voices
    fits = np.flatnonzero(free & (corpus.samples + SILENCE <= args.longest * features.RATE) & (corpus.words >= 2))
    if args.longest < 16:  # much text in little audio
        fits = fits[np.argsort(-corpus.words[fits], kind="stable")]
    elif len(fits) > args.count:
        fits = fits[np.linspace(0, len(fits) - 1, args.count).astype(int)]
    goldens, labels = [], {}
    for n, i in enumerate(fits[: args.count]):
        start, count = int(corpus.starts[i]), int(corpus.samples[i])
        samples = np.concatenate((corpus.audio[start : start + count].numpy(), np.zeros(SILENCE, np.int16)))
        with wave.open(os.path.join(args.out, f"u{n}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(features.RATE)
            file.writeframes(samples.astype("<i2").tobytes())
        frames = features.source_frames(len(samples))
        mel = model.normalise(features.log_mel(torch.from_numpy(samples.astype(np.float32) / 32768.0)[None]))
        if n == 0:
            mel[0].numpy().astype("<f4").tofile(os.path.join(args.out, "mel.f32"))
        source = decode.source_pass(model, mel)
        name = f"u{n}.wav"
        labels[name] = source[2][0, :frames].tolist()
        reference = pieces.decode(corpus.token_ids[i, : corpus.tokens[i]].tolist())
        for k in map(int, args.ks.split(",")):
            policy = Policy("ctc", k, DELAY) if k else Policy("batch")
            u = decode.decode_group(model, source, [frames], policy, None, pieces.ends_word)[0]
            goldens.append({"audio": name, "voice": names[corpus.voices[i]], "reference": reference, "k": k, "delay": DELAY, "tokens": u.tokens,
                            "words": u.words, "text": pieces.decode(u.tokens)})
    with open(os.path.join(args.out, "goldens.json"), "w", encoding="utf-8") as file:
        lines = lambda rows: ",\n".join(rows)
        file.write('{"utterances": [\n' + lines(json.dumps(entry) for entry in goldens) + '\n],\n"ctc": {\n')
        file.write(lines(f'"{name}": {json.dumps(row)}' for name, row in labels.items()) + "\n}}\n")


if __name__ == "__main__":
    main()
