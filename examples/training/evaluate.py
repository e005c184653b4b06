# SPDX-License-Identifier: MIT
"""Word error rates and lags of exported or trained models on folders of synthesised test speech.

    python3 evaluate.py --group listen-en.gguf --interleaved interleaved.pt --reencode reencode.pt --batch batch.pt --pieces pieces.json \\
        --column held_out_voices=DIR --column noisy=DIR@10 --json results.json

A column is a folder of shards (data.py), @ and a number adds coloured noise at that ratio in dB (seeded). Every utterance is followed by 200 ms of
silence. Lags: AL and LAAL in source words (a word counts as read once the aligned end is within the frames heard) and in milliseconds of audio.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time

import numpy as np
import torch

import data
import decode
import features
import lag
import model as listening
from decode import Policy
from pieces import Pieces

TRAIL = 3200
KS = (1, 3, 5, 7)


def policies(layout: str) -> dict[str, Policy]:
    out = {"batch": Policy("batch")}
    out.update({f"ctc k={k} delay=4": Policy("ctc", k, 4) for k in KS})
    if layout == "group":
        out.update({f"ctc k=1 delay={delay}": Policy("ctc", 1, delay) for delay in (0, 2, 6, 8)})
        out.update({f"stride k={k}": Policy("stride", k, stride=10) for k in KS})
        out.update({f"oracle k={k}": Policy("oracle", k) for k in KS})
    return out


def load_model(path: str, pieces: Pieces | None) -> tuple[listening.Listener, Pieces]:
    if path.endswith(".gguf"):
        import export

        return export.read(path)
    saved = torch.load(path, map_location="cpu", weights_only=True)
    model = listening.Listener(listening.Sizes(**saved["sizes"]))
    model.load_state_dict({key: value.float() for key, value in saved["state"].items()})
    return model.eval(), pieces


class Column:
    """Test utterances in order of length, in batches."""

    def __init__(self, spec: str, pieces: Pieces, device: str, most: int, batch: int):
        self.name, _, place = spec.partition("=")
        folder, _, noise = place.partition("@")
        corpus = data.load(folder, "cpu")
        audio = corpus.audio.numpy()
        order = np.argsort(corpus.samples, kind="stable")
        if most and len(order) > most:
            order = order[np.linspace(0, len(order) - 1, most).astype(int)]
        self.index = order
        self.references, self.ends, self.samples, self.waves = [], [], [], []
        for i in order:
            start, count = corpus.starts[i], corpus.samples[i]
            self.references.append(pieces.decode(corpus.token_ids[i, : corpus.tokens[i]].tolist()).split())
            self.ends.append(corpus.word_ends[i, : corpus.words[i]].tolist())
            self.waves.append(np.concatenate((audio[start : start + count], np.zeros(TRAIL, np.int16))))
            self.samples.append(int(count) + TRAIL)
        self.batches = []
        generator = torch.Generator(device).manual_seed(5)
        for first in range(0, len(order), batch):
            rows = list(range(first, min(first + batch, len(order))))
            wave = torch.zeros(len(rows), max(self.samples[r] for r in rows), device=device)
            for place_in, r in enumerate(rows):
                wave[place_in, : self.samples[r]] = torch.from_numpy(self.waves[r].astype(np.float32) / 32768.0).to(device)
            if noise:
                lengths = torch.tensor([float(self.samples[r]) for r in rows], device=device)
                wave = features.augment(wave, lengths, generator, only_noise_db=float(noise))
            self.batches.append((rows, wave))

    def frames(self, row: int) -> int:
        return int(features.source_frames(self.samples[row]))

    def oracle(self, row: int) -> list[int]:
        ends = np.array([self.ends[row]])
        return data.heard_frames(ends, np.array([self.frames(row)]))[0].tolist() if len(ends[0]) else []


def run(model, layout: str, column: Column, policy: Policy, ends_word: list[bool]) -> list[decode.Utterance]:
    out: list[decode.Utterance] = []
    for rows, wave in column.batches:
        mel = model.normalise(features.log_mel(wave))
        frames = [column.frames(r) for r in rows]
        oracle = [column.oracle(r) for r in rows]
        if layout == "interleaved":
            out += decode.decode_interleaved(model, mel, frames, policy, oracle, ends_word)
        else:
            engine = decode.decode_reencode if layout == "reencode" else decode.decode_group
            out += engine(model, decode.source_pass(model, mel), frames, policy, oracle, ends_word)
    return out


def score(column: Column, utterances: list[decode.Utterance], pieces: Pieces) -> dict:
    errors = words = 0
    lags = []
    for row, u in enumerate(utterances):
        reference, hypothesis = column.references[row], pieces.decode(u.tokens).split()
        errors += lag.word_errors(reference, hypothesis)
        words += len(reference)
        total = column.samples[row]
        if not u.words or column.ends[row][0] < 0:
            continue
        heard = [total if finished else min(features.frame_end(frames - 1), total) for frames, finished in u.words]
        read = [len(reference) if finished else sum(end <= h for end in column.ends[row]) for h, (_, finished) in zip(heard, u.words)]
        lags.append(lag.lagging(read, len(reference), len(reference)) + lag.lagging([h / 16 for h in heard], total / 16, len(reference)))
    mean = np.mean(lags, 0) if lags else [float("nan")] * 4
    return {"wer": 100 * errors / words, "words": words, "al_words": mean[0], "laal_words": mean[1], "al_ms": mean[2], "laal_ms": mean[3]}


def ctc_report(model, column: Column, pieces: Pieces) -> dict:
    """The CTC head alone, and when its end-of-word labels come relative to the aligned ends (utterances with the right number of words)."""
    errors = words = 0
    offsets = []
    for rows, wave in column.batches:
        labels = decode.source_pass(model, model.normalise(features.log_mel(wave)))[2].tolist()
        for r, row_labels in zip(rows, labels):
            row_labels = row_labels[: column.frames(r)]
            collapsed = [a for a, b in zip(row_labels, [model.blank] + row_labels) if a != b and a != model.blank]
            errors += lag.word_errors(column.references[r], pieces.decode(collapsed).split())
            words += len(column.references[r])
            reached = decode.reach_table(row_labels, pieces.ends_word, model.blank)[1:]
            if len(reached) == len(column.ends[r]) and column.ends[r][0] >= 0:
                offsets += [(features.frame_end(f - 1) - end) / 16 for f, end in zip(reached, column.ends[r])]
    spread = np.percentile(offsets, [5, 50, 95]).tolist() if offsets else []
    return {"wer": 100 * errors / words, "label_after_end_ms": {"mean": float(np.mean(offsets)) if offsets else None, "5_50_95": spread}}


def table(results: dict) -> str:
    columns = sorted({c for rows in results.values() for row in rows.values() for c in row})
    lines = ["| layout | policy | " + " | ".join(f"{c}: WER %" for c in columns) + " | LAAL words | LAAL ms | AL words | AL ms |", "|---" * (len(columns) + 6) + "|"]
    for layout, rows in results.items():
        for policy, by_column in rows.items():
            cells = [f"{by_column[c]['wer']:.1f}" if c in by_column else "" for c in columns]
            lags = by_column.get("held_out_voices") or next(iter(by_column.values()))
            extra = [f"{lags[k]:.2f}" if "words" in k else f"{lags[k]:.0f}" for k in ("laal_words", "laal_ms", "al_words", "al_ms")] if "al_ms" in lags else [""] * 4
            lines.append(f"| {layout} | {policy} | " + " | ".join(cells + extra) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for layout in ("group", "interleaved", "reencode", "batch"):
        parser.add_argument("--" + layout, help=f"file of the model with layout {layout} (.gguf or .pt)")
    parser.add_argument("--pieces", help="pieces.json, for .pt files")
    parser.add_argument("--column", action="append", required=True)
    parser.add_argument("--most", type=int, default=0, help="utterances of a column at most, evenly over the lengths; 0: all")
    parser.add_argument("--batch-size", type=int, default=250, help="utterances side by side; 16 is a good choice on a CPU")
    parser.add_argument("--json")
    parser.add_argument("--policies", default=".*", help="regular expression of the policies' names, e.g. 'batch|ctc k=[13] delay=4'")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False

    pieces = Pieces.load(args.pieces) if args.pieces else None
    results: dict = {}
    for layout in ("group", "interleaved", "reencode", "batch"):
        path = getattr(args, layout)
        if not path:
            continue
        model, pieces = load_model(path, pieces)
        model = model.to(args.device)
        columns = [Column(spec, pieces, args.device, args.most, args.batch_size) for spec in args.column]
        rows = results.setdefault(layout, {})
        for column in columns:
            began = time.time()
            for name, policy in policies(layout).items():
                if not re.fullmatch(args.policies, name):
                    continue
                rows.setdefault(name, {})[column.name] = score(column, run(model, layout, column, policy, pieces.ends_word), pieces)
            if layout in ("group", "batch"):
                rows.setdefault("ctc head alone", {})[column.name] = ctc_report(model, column, pieces)
            print(f"{layout} {column.name}: {time.time() - began:.1f} s", file=sys.stderr, flush=True)
        if args.json:
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump(results, file, indent=1)
    print(table(results))


if __name__ == "__main__":
    main()
