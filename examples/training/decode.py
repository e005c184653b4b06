# SPDX-License-Identifier: MIT
"""Greedy simultaneous decoding of batches of utterances under a write policy, for the three layouts.

What an utterance does never depends on the others of its batch, nor on how its audio would be cut into chunks: a word is written at a number of
source frames that the policy gives.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

import model as listening
from pieces import BOS, EOS

MOST_PIECES_A_WORD = 16
MOST_WORDS_BEYOND = 8


def most_pieces(frames: int) -> int:
    """The bound on an utterance's pieces, far beyond any speech."""
    return frames // 3 + 48


@dataclasses.dataclass(frozen=True)
class Policy:
    """When word w (0-based) may be written: kind `ctc` (`delay` frames after the CTC labels have counted w + k words), `stride` ((w + k) * stride
    frames), `oracle` (when the aligned word w + k - 1 ends) or `batch` (at the end)."""

    kind: str
    k: int = 1
    delay: int = 4
    stride: int = 8


class Utterance:
    """The state of one utterance's writing: reached[c] is the number of frames after which c words had been counted."""

    def __init__(self, frames: int, policy: Policy, oracle: list[int] | None, reached: list[int]):
        self.frames, self.policy, self.oracle, self.reached = frames, policy, oracle, reached
        self.tokens: list[int] = []
        self.heard: list[int] = []  # frames that each token's row saw
        self.words: list[tuple[int, bool]] = []  # frames heard and whether the input was over, for each written word
        self.pieces_of_word = 0
        self.waits = True  # for the next moment of writing; not while the pieces of a word are written
        self.was_finished = False  # whether the input was over at that moment
        self.floor = 0  # no write before so many frames
        self.need = 0  # nor before so many counted words
        self.done = False
        self.most = most_pieces(frames)

    def silent(self, labels: list[int], blank: int) -> bool:
        """Whether no frame has a label: nothing was said, whatever the decoder would write."""
        return all(label == blank for label in labels[: self.frames])

    def due(self) -> int | None:
        """The number of frames at which the next word is written before the input's end, as far as is known; None: not yet known or never."""
        policy, word = self.policy, len(self.words)
        if policy.kind == "batch":
            return None
        if policy.kind == "ctc":
            count = word + policy.k
            if count >= len(self.reached):
                return None
            at = self.reached[count] + policy.delay
        elif policy.kind == "stride":
            at = (word + policy.k) * policy.stride
        else:
            if word + policy.k > len(self.oracle):
                return None
            at = self.oracle[word + policy.k - 1]
        if self.need:
            if self.need >= len(self.reached):
                return None
            at = max(at, self.reached[self.need])
        at = max(at, self.floor, 1)
        return at if at <= self.frames else None

    def take(self, token: int, heard: int, finished: bool, ends_word: list[bool]) -> bool:
        """Accepts the model's token; returns whether the fed row stays (False: it is fed again later)."""
        if token == EOS:
            if finished:
                self.done = True
            else:
                counted = sum(1 for frames in self.reached[1:] if frames <= heard)
                self.need, self.floor, self.waits = counted + 1, heard, True
            return finished
        self.tokens.append(token)
        self.heard.append(heard)
        self.pieces_of_word += 1
        self.floor, self.waits = heard, False
        self.done = len(self.tokens) >= self.most
        if ends_word[token] or self.pieces_of_word == MOST_PIECES_A_WORD:
            self.words.append((heard, finished))
            self.pieces_of_word, self.need, self.waits = 0, 0, True
            if finished and len(self.words) >= len(self.reached) - 1 + MOST_WORDS_BEYOND:
                self.done = True
        return True

    @property
    def last(self) -> int:
        return self.tokens[-1] if self.tokens else BOS


def best(logits: torch.Tensor) -> torch.Tensor:
    logits = logits.clone()
    logits[..., :EOS] = -torch.inf
    return logits.argmax(-1)


def reach_table(labels: list[int], ends_word: list[bool], blank: int) -> list[int]:
    """Greedy CTC labels of the frames -> reached[c]; a label counts when it differs from the frame's before it and ends a word."""
    reached, before = [0], blank
    for frame, label in enumerate(labels):
        if label != blank and label != before and ends_word[label]:
            reached.append(frame + 1)
        before = label
    return reached


@torch.no_grad()
def source_pass(model: listening.Listener, mel: torch.Tensor):
    """[B, M, 80] normalised log-mels -> keys and values of all source rows by layer, and their greedy CTC labels [B, S]."""
    x = model.subsample(mel)
    batch, frames, _ = x.shape
    positions = torch.arange(frames, device=x.device).expand(batch, -1)
    age = positions[0][:, None] - positions[0][None]
    mask = ((age >= 0) & (age < listening.WINDOW))[None, None]
    cos, sin = listening.rotary(positions, model.sizes.head)
    keys, values = [], []
    for layer in model.layers:
        attn_norm, qkv, *rest = layer.weights()
        q, k, v = listening.project(x, attn_norm, qkv, cos, sin, model.sizes.heads)
        keys.append(k)
        values.append(v)
        x = listening.finish(x, listening.attend(q, k, v, mask), *rest)
    return keys, values, model.ctc_logits(listening.norm(x, model.final_norm)).argmax(-1)


class Rows:
    """Rows of B utterances fed one a step, with room for all their keys and values."""

    def __init__(self, model: listening.Listener, batch: int, room: int, device):
        self.model, self.room = model, room
        shape = (batch, room, model.sizes.heads, model.sizes.head)
        self.keys = [torch.zeros(shape, device=device) for _ in model.layers]
        self.values = [torch.zeros(shape, device=device) for _ in model.layers]
        self.every = torch.arange(batch, device=device)

    def step(self, x: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """x [B, D] at positions [B] is stored in slots [B]; seen [B, room] marks the slots that it sees. Returns the normed hidden rows."""
        x = x[:, None]
        cos, sin = listening.rotary(positions[:, None], self.model.sizes.head)
        for keys, values, layer in zip(self.keys, self.values, self.model.layers):
            attn_norm, qkv, *rest = layer.weights()
            q, k, v = listening.project(x, attn_norm, qkv, cos, sin, self.model.sizes.heads)
            keys[self.every, slots], values[self.every, slots] = k[:, 0], v[:, 0]
            x = listening.finish(x, listening.attend(q, keys, values, seen[:, None, None]), *rest)
        return listening.norm(x[:, 0], self.model.final_norm)


@torch.no_grad()
def decode_group(model, source, frames: list[int], policy: Policy, oracle, ends_word: list[bool]) -> list[Utterance]:
    keys, values, labels = source
    batch, longest = labels.shape
    device = labels.device
    rows = Rows(model, batch, longest + most_pieces(max(frames)) + 1, device)
    for store, part in ((rows.keys, keys), (rows.values, values)):
        for into, rows_of_layer in zip(store, part):
            into[:, :longest] = rows_of_layer
    labels = labels.tolist()
    tables = [reach_table(labels[i][: frames[i]], ends_word, model.blank) for i in range(batch)]
    all_ = [Utterance(frames[i], policy, oracle[i] if oracle else None, tables[i]) for i in range(batch)]
    for i, u in enumerate(all_):
        u.done = u.silent(labels[i], model.blank)
    slot = torch.arange(rows.room, device=device)[None]
    target = torch.arange(rows.room, device=device)[None] - longest
    moments: list[tuple[int, bool]] = [(0, False)] * batch
    while not all(u.done for u in all_):
        for i, u in enumerate(all_):
            if u.waits:
                at = u.due()
                moments[i] = (at, False) if at is not None else (u.frames, True)
        heard = torch.tensor([m[0] for m in moments], device=device)[:, None]
        index = torch.tensor([len(u.tokens) for u in all_], device=device)[:, None]
        seen = ((slot < longest) & (slot < heard) & (slot >= heard - listening.WINDOW)) | ((target >= 0) & (target <= index))
        x = model.embed(torch.tensor([u.last for u in all_], device=device))
        tokens = best(model.logits(rows.step(x, index[:, 0], longest + index[:, 0], seen))).tolist()
        for u, token, (at, finished) in zip(all_, tokens, moments):
            if not u.done:
                u.take(token, at, finished, ends_word)
    return all_


@torch.no_grad()
def decode_reencode(model, source, frames: list[int], policy: Policy, oracle, ends_word: list[bool]) -> list[Utterance]:
    keys, values, labels = source
    batch, longest = labels.shape
    device = labels.device
    labels = labels.tolist()
    tables = [reach_table(labels[i][: frames[i]], ends_word, model.blank) for i in range(batch)]
    all_ = [Utterance(frames[i], policy, oracle[i] if oracle else None, tables[i]) for i in range(batch)]
    for i, u in enumerate(all_):
        u.done = u.silent(labels[i], model.blank)
    slot = torch.arange(longest, device=device)[None]
    moments: list[tuple[int, bool]] = [(0, False)] * batch
    while not all(u.done for u in all_):
        for i, u in enumerate(all_):
            if u.waits:
                at = u.due()
                moments[i] = (at, False) if at is not None else (u.frames, True)
        count = max(len(u.tokens) for u in all_ if not u.done) + 1
        fed = torch.tensor([([BOS] + u.tokens + [EOS] * count)[:count] for u in all_], device=device)
        heard = torch.tensor([m[0] for m in moments], device=device)[:, None]
        row = torch.arange(count, device=device)
        cos, sin = listening.rotary(heard + row, model.sizes.head)
        near = (slot < heard) & (slot >= heard - listening.WINDOW)
        mask = torch.cat((near[:, None].expand(-1, count, -1), (row[:, None] >= row[None])[None].expand(batch, -1, -1)), 2)[:, None]
        x = model.embed(fed)
        for k_source, v_source, layer in zip(keys, values, model.layers):
            attn_norm, qkv, *rest = layer.weights()
            q, k, v = listening.project(x, attn_norm, qkv, cos, sin, model.sizes.heads)
            x = listening.finish(x, listening.attend(q, torch.cat((k_source, k), 1), torch.cat((v_source, v), 1), mask), *rest)
        index = torch.tensor([min(len(u.tokens), count - 1) for u in all_], device=device)
        hidden = listening.norm(x, model.final_norm)[torch.arange(batch, device=device), index]
        for u, token, (at, finished) in zip(all_, best(model.logits(hidden)).tolist(), moments):
            if not u.done:
                u.take(token, at, finished, ends_word)
    return all_


@torch.no_grad()
def decode_interleaved(model, mel: torch.Tensor, frames: list[int], policy: Policy, oracle, ends_word: list[bool]) -> list[Utterance]:
    """One row a step and utterance, a frame or a written piece: frames are encoded with the text before them in view."""
    embedded = model.subsample(mel)
    batch, longest, _ = embedded.shape
    device = mel.device
    rows = Rows(model, batch, longest + most_pieces(max(frames)) + 1, device)
    all_ = [Utterance(frames[i], policy, oracle[i] if oracle else None, [0]) for i in range(batch)]
    heard, used = [0] * batch, [0] * batch  # frames fed, slots in use
    before = [model.blank] * batch
    sounded = [False] * batch
    frame_of_slot = torch.full((batch, rows.room), 10**6, device=device)  # text slots never leave the window
    slot = torch.arange(rows.room, device=device)[None]
    while not all(u.done for u in all_):
        writes = []
        for i, u in enumerate(all_):
            due = u.due()
            finished = u.was_finished if not u.waits else heard[i] == u.frames and (due is None or due > heard[i])
            write = not u.waits or finished or (due is not None and due <= heard[i])
            writes.append((write, finished))
        at = torch.tensor([min(h, f - 1) for h, f in zip(heard, frames)], device=device)
        write = torch.tensor([w for w, _ in writes], device=device)
        text = model.embed(torch.tensor([u.last for u in all_], device=device))
        x = torch.where(write[:, None], text, embedded[torch.arange(batch, device=device), at])
        slots = torch.tensor([min(n, rows.room - 1) for n in used], device=device)
        frame_of_slot[rows.every, slots] = torch.where(write, 10**6, at)
        newest = torch.where(write, torch.tensor(heard, device=device) - 1, at)[:, None]
        seen = (slot <= slots[:, None]) & (newest - frame_of_slot < listening.WINDOW)
        hidden = rows.step(x, slots, slots, seen)
        labels = model.ctc_logits(hidden).argmax(-1).tolist()
        tokens = best(model.logits(hidden)).tolist()
        for i, u in enumerate(all_):
            if u.done:
                continue
            written, finished = writes[i]
            if written:
                u.was_finished = finished
                used[i] += u.take(tokens[i], heard[i], finished, ends_word)
            else:
                heard[i] += 1
                used[i] += 1
                sounded[i] = sounded[i] or labels[i] != model.blank
                u.done = heard[i] == u.frames and not sounded[i] and not u.tokens
                if labels[i] != model.blank and labels[i] != before[i] and ends_word[labels[i]]:
                    u.reached.append(heard[i])
                before[i] = labels[i]
    return all_
