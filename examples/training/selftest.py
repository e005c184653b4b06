# SPDX-License-Identifier: MIT
"""Checks without trained weights that decoding, row by row, computes what the training layouts compute, that a batch does not mix utterances, that
audio in chunks gives the same features, and that the exported file reads back. Needs torch, numpy and gguf; a minute on a CPU.

    python3 selftest.py
"""

from __future__ import annotations

import os
import random
import tempfile

import numpy as np
import torch

import data
import decode
import export
import features
import model as listening
from lag import lagging, word_errors
from pieces import BOS, MARK, Pieces, learn


def tiny() -> tuple[listening.Listener, list[bool]]:
    state, sizes, pieces = export.untrained()
    model = listening.Listener(sizes)
    model.load_state_dict(state)
    with torch.no_grad():
        model.embedding.mul_(3.0)
    return model.eval(), [piece.endswith(MARK) for piece in pieces]


def check_layouts() -> None:
    model, ends_word = tiny()
    torch.manual_seed(3)
    frames = [40, 31, 300]
    mel = torch.randn(3, 4 * 300 - 3, features.MELS)
    for policy in (decode.Policy("stride", 1, stride=6), decode.Policy("batch"), decode.Policy("ctc", 2, 3)):
        source = decode.source_pass(model, mel)
        for name in ("group", "reencode", "interleaved"):
            if name == "interleaved":
                run = lambda m, f: decode.decode_interleaved(model, m, f, policy, None, ends_word)
            else:
                engine = decode.decode_group if name == "group" else decode.decode_reencode
                run = lambda m, f: engine(model, decode.source_pass(model, m), f, policy, None, ends_word)
            together = run(mel, frames)
            for i, count in enumerate(frames):
                alone = run(mel[i : i + 1, : 4 * count - 3], [count])[0]
                assert alone.tokens == together[i].tokens and alone.words == together[i].words, (name, policy, i)
                heard = alone.heard
                tokens = alone.tokens[:40]
                assert tokens, (name, policy)
                worst = 0.0
                groups = [(heard[: len(tokens)], range(len(tokens)))]
                if name == "reencode":  # one pass for every prefix
                    groups = [([v] * len(tokens), [r for r in range(len(tokens)) if heard[r] == v]) for v in sorted(set(heard[: len(tokens)]))]
                for seen, rows in groups:
                    seen = torch.tensor([seen])
                    positions, mask = listening.layout(name, count, seen)
                    fed = torch.tensor([[BOS] + tokens[:-1]])
                    with torch.no_grad():
                        x = torch.cat((model.subsample(mel[i : i + 1, : 4 * count - 3]), model.embed(fed)), 1)
                        best = decode.best(model.logits(model.trunk(x, positions, mask)[:, count:]))[0].tolist()
                    worst += sum(best[row] != tokens[row] for row in rows)
                assert worst == 0, (name, policy, i, worst)
            print(f"{name}, {policy.kind}: rows fed one by one = training layout, alone = in a batch ({[len(u.tokens) for u in together]} pieces)")


def check_features() -> None:
    rng = np.random.default_rng(0)
    wave = torch.tensor(rng.standard_normal((1, 8000)) * 0.1, dtype=torch.float64)
    whole = features.log_mel(wave)
    assert whole.shape == (1, features.mel_frames(8000), 80)
    # plain loops in float64
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    for t in (0, 7, whole.shape[1] - 1):
        padded = np.concatenate((wave[0, 160 * t : 160 * t + 400].numpy() * window, np.zeros(112)))
        power = np.array([abs(np.sum(padded * np.exp(-2j * np.pi * k * np.arange(512) / 512))) ** 2 for k in range(257)])
        expected = np.log(power @ features.filters() + features.LOG_FLOOR)
        assert np.abs(expected - whole[0, t].numpy()).max() < 1e-4  # the filters are float32
    model, _ = tiny()
    mel = torch.randn(1, 41, 80)
    full = model.subsample(mel)
    for count in (1, 2, 5, 17, 41):
        part = model.subsample(mel[:, :count])
        assert part.shape[1] == (count - 1) // 4 + 1 and torch.allclose(part, full[:, : part.shape[1]], atol=1e-5)
    print("features: equal to plain loops; subsampling is causal")


def check_file() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "untrained.gguf")
        state, sizes, pieces = export.untrained()
        export.write(path, state, sizes, pieces, "untrained")
        model, coder = export.read(path)
        assert coder.pieces == pieces and model.sizes == sizes
        for key, value in model.state_dict().items():
            error = (value - state[key]).abs().max() / state[key].abs().max()
            assert error < 0.006, (key, error)  # half of 1/127, and the scale's half precision
    print("file: reads back within Q8_0")


def check_pieces_and_lag() -> None:
    coder = Pieces(learn({"the": 9, "then": 4, "hen": 3, "i'm": 2}, 70))
    for text in ("the then hen", "zebra i'm quiz"):
        assert coder.decode(coder.encode(text)) == text
    assert word_errors("a b c".split(), "a x c d".split()) == 2
    assert all(abs(a - 2.2) < 1e-9 for a in lagging([2, 3, 4, 4, 4], 4, 5))
    assert np.allclose(lagging([800, 1600, 2400, 2400, 2400], 2400, 3), (800, 1120))
    tokens = np.array([coder.encode("the hen")])
    assert data.word_of_token(tokens, np.array(coder.ends_word, int))[0, -1] == 1
    print("pieces and lag: hand-made cases")


if __name__ == "__main__":
    torch.manual_seed(1)
    random.seed(1)
    check_pieces_and_lag()
    check_features()
    check_file()
    check_layouts()
