# SPDX-License-Identifier: MIT
"""Shards of synthesised speech, and the plan of training batches drawn from them.

A shard is NAME.i16 (16 kHz mono samples, one utterance after the other) and NAME.npz with, per utterance: samples, tokens (count), words (count),
voice and kind; and flat arrays token_ids and word_ends (in samples; -1 where the synthesizer gave no times).
"""

from __future__ import annotations

import dataclasses
import glob
import os
import queue
import threading

import numpy as np
import torch

import features
from pieces import BOS, EOS

# (source frames, target rows, utterances) of one batch: about 30,000 rows each, static shapes
BUCKETS = ((96, 32, 240), (144, 48, 160), (200, 64, 116), (288, 96, 80), (400, 128, 58))
SAMPLES_PER_FRAME = features.HOP * features.SUBSAMPLING
K_CHOICES = ((1, 0.22), (2, 0.13), (3, 0.2), (5, 0.12), (7, 0.08), (0, 0.25))  # 0 = the whole input first
NEVER = 10**6


@dataclasses.dataclass
class Corpus:
    starts: np.ndarray
    samples: np.ndarray
    tokens: np.ndarray
    words: np.ndarray
    voices: np.ndarray
    kinds: np.ndarray
    token_ids: np.ndarray  # [N, 128]
    word_ends: np.ndarray  # [N, 64]
    audio: torch.Tensor  # int16, flat

    @property
    def hours(self) -> float:
        return float(self.samples.sum()) / features.RATE / 3600


def _padded(counts: np.ndarray, flat: np.ndarray, width: int, dtype) -> np.ndarray:
    out = np.zeros((len(counts), width), dtype)
    out[np.arange(width)[None] < counts[:, None]] = flat
    return out


def load(folder: str, device: str) -> Corpus:
    names = sorted(glob.glob(os.path.join(folder, "*.npz")))
    if not names:
        raise SystemExit(f"no shards in {folder}")
    parts = [np.load(name) for name in names]
    column = lambda key: np.concatenate([part[key] for part in parts])
    samples = column("samples").astype(np.int64)
    total = int(samples.sum())
    audio = torch.empty(total + 2 * features.RATE, dtype=torch.int16, device=device)
    at = 0
    for name, part in zip(names, parts):
        count = int(part["samples"].sum())
        if count:
            audio[at : at + count] = torch.from_numpy(np.fromfile(name[:-4] + ".i16", np.int16, count)).to(device)
        at += count
    tokens, words = column("tokens").astype(np.int64), column("words").astype(np.int64)
    return Corpus(
        starts=np.concatenate(([0], np.cumsum(samples)[:-1])),
        samples=samples,
        tokens=tokens,
        words=words,
        voices=column("voices"),
        kinds=column("kinds"),
        token_ids=_padded(tokens, column("token_ids"), 128, np.int16),
        word_ends=_padded(words, column("word_ends"), 64, np.int32),
        audio=audio,
    )


def heard_frames(ends: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """The number of source frames after which a word that ends at sample `ends` [B, W] has been heard, within 1 ... frames [B]."""
    return np.clip((ends - features.FRAME) // SAMPLES_PER_FRAME + 2, 1, frames[:, None])


def word_of_token(token_ids: np.ndarray, ends_word: np.ndarray) -> np.ndarray:
    """[B, T] -> index of the word that each piece belongs to."""
    closed = np.cumsum(ends_word[token_ids], axis=1)
    return closed - ends_word[token_ids]


class Batches:
    """An endless, seeded stream of training batches as host arrays, prepared by a thread."""

    def __init__(self, corpus: Corpus, layout: str, ends_word: np.ndarray, seed: int, ahead: int = 8):
        self.corpus, self.layout, self.ends_word = corpus, layout, ends_word.astype(np.int64)
        slack = 4000
        need = corpus.samples + slack
        self.members = []
        taken = (corpus.tokens > 126) | (corpus.words > 63) | (corpus.words == 0)
        for frames, rows, _ in BUCKETS:
            fits = ~taken & (need <= frames * SAMPLES_PER_FRAME) & (corpus.tokens + 1 <= rows)
            self.members.append(np.flatnonzero(fits))
            taken |= fits
        self.seed = seed
        self.queue: queue.Queue = queue.Queue(ahead)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def epoch_batches(self) -> int:
        return sum(len(members) // size for members, (_, _, size) in zip(self.members, BUCKETS))

    def _run(self) -> None:
        epoch = 0
        while True:
            rng = np.random.default_rng([self.seed, epoch])
            plan = []
            for bucket, (members, (_, _, size)) in enumerate(zip(self.members, BUCKETS)):
                order = rng.permutation(members)
                if 0 < len(order) < size:  # tiny corpora: repeat
                    order = np.resize(order, size)
                plan += [(bucket, order[i : i + size]) for i in range(0, len(order) - size + 1, size)]
            for index in rng.permutation(len(plan)):
                self.queue.put(self.make(*plan[index], rng))
            epoch += 1

    def next(self) -> dict:
        return self.queue.get()

    def make(self, bucket: int, index: np.ndarray, rng: np.random.Generator) -> dict:
        corpus = self.corpus
        frames, rows, batch = BUCKETS[bucket]
        length = frames * SAMPLES_PER_FRAME
        n = corpus.samples[index]
        # playing speed, then silence before and after, so that all fits
        slowest = np.maximum(0.86, n / (length - 1600))
        speed = np.where(rng.random(batch) < 0.7, rng.uniform(slowest, np.maximum(1.16, slowest + 0.01)), np.maximum(1.0, slowest))
        spoken = np.floor((n - 2) / speed).astype(np.int64)
        room = length - spoken
        lead = np.floor(np.minimum(room, rng.choice([3200, 9600], batch)) * rng.random(batch)).astype(np.int64)
        trail = np.floor(np.minimum(room - lead, 16000) * rng.random(batch)).astype(np.int64)
        valid = np.clip((np.maximum(lead + spoken + trail - features.FRAME, 0) // features.HOP) // 4 + 1, 1, frames)

        tokens = corpus.token_ids[index, :rows].astype(np.int64)
        counts, words = corpus.tokens[index], corpus.words[index]
        word_ends = corpus.word_ends[index]
        aligned = word_ends[:, 0] >= 0
        jitter = rng.integers(-4, 7, (batch, 1)) + rng.integers(-2, 3, word_ends.shape)
        ends = heard_frames(lead[:, None] + word_ends / speed[:, None], valid).astype(np.int64) + jitter
        ends = np.clip(ends, 1, valid[:, None])

        k = rng.choice([c for c, _ in K_CHOICES], batch, p=[p for _, p in K_CHOICES])
        k = np.where((k == 0) | ~aligned | (self.layout == "batch"), NEVER, k)
        row = np.arange(rows)[None]
        word = word_of_token(tokens, self.ends_word)
        needed = word + k[:, None] - 1
        whole = (needed >= words[:, None]) | (row >= counts[:, None])
        heard = np.take_along_axis(ends, np.minimum(needed, 63), 1)
        heard = np.where(whole, valid[:, None], heard)
        heard = np.maximum.accumulate(heard, 1)
        scored = row <= counts[:, None]
        if self.layout == "reencode":
            last = np.where(rng.random(batch) < 0.35, NEVER, rng.integers(0, np.maximum(words, 1)))
            partial = (last < words) & (last + k - 1 < words)
            at = np.take_along_axis(ends, np.minimum(np.minimum(last, 63) + np.minimum(k, 64) - 1, 63)[:, None], 1)
            heard = np.broadcast_to(np.where(partial[:, None], at, valid[:, None]), heard.shape)
            scored &= ~partial[:, None] | ((word <= last[:, None]) & (row < counts[:, None]))

        inside = row < counts[:, None]
        labels = np.where(inside, tokens, EOS)
        inputs = np.concatenate((np.full((batch, 1), BOS), np.where(inside, tokens, EOS)[:, :-1]), 1)
        return {
            "bucket": bucket,
            "starts": corpus.starts[index],
            "samples": n,
            "speed": speed,
            "lead": lead,
            "spoken": spoken,
            "warp": np.where(rng.random(batch) < 0.6, rng.integers(0, len(features.WARPS), batch), len(features.WARPS) // 2),
            "frames": tuple(valid.tolist()),  # lengths stay on the host: CTC asks for them there
            "heard": np.ascontiguousarray(heard),
            "inputs": inputs,
            "labels": np.where(scored, labels, -100),
            "ctc": labels,
            "tokens": tuple(counts.tolist()),
        }


def speech(audio: torch.Tensor, batch: dict[str, torch.Tensor], length: int) -> torch.Tensor:
    """[B, length] in [-1, 1]: each utterance at its speed (linear interpolation) after its lead of silence."""
    at = (torch.arange(length, device=audio.device)[None] - batch["lead"][:, None]).double() * batch["speed"][:, None]
    inside = (at >= 0) & (at < (batch["samples"] - 1)[:, None])
    left = at.floor().clamp(min=0)
    part = (at - left).float()
    index = batch["starts"][:, None] + left.long().minimum((batch["samples"] - 2)[:, None])
    a, b = audio[index].float(), audio[index + 1].float()
    return torch.where(inside, (a + (b - a) * part) / 32768.0, 0.0)
