# SPDX-License-Identifier: MIT
"""Speaks sentences with many voices on all cores and writes shards of audio, pieces and word ends (format: data.py).

    python3 synthesise.py --sentences train.tsv --pieces pieces.json --out DIR --workers 64 --seconds 150

Each line of the sentences is KIND<tab>text. Worker w takes every line with number = w modulo the workers; engine, voice, rate and pitch are drawn
for groups of sentences from the seed, the worker's number and the group's. With --test only held-out voices speak, and only voices of training
without it. When --seconds are over, workers stop where they are. At the end DIR/done appears.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import random
import sys
import time

import numpy as np

import voices
from pieces import Pieces

KINDS = ["grammar", "open", "words", "random"]
LONGEST = 16 * voices.RATE - 4000


def parse_shares(text: str) -> dict[str, float]:
    return {name: float(share) for name, share in (part.split("=") for part in text.split(","))}


class Shard:
    def __init__(self, path: str, pieces: Pieces):
        self.path, self.pieces = path, pieces
        self.file = open(path + ".i16", "wb")
        self.rows: list[tuple[int, int, int, int, int]] = []
        self.token_ids: list[int] = []
        self.word_ends: list[int] = []

    def add(self, samples: np.ndarray, words: list[str], ends: list[int] | None, voice: int, kind: int) -> None:
        tokens = [token for word in words for token in self.pieces.word(word)]
        if len(tokens) > 126 or len(words) > 63 or len(samples) < 3200 or len(samples) > LONGEST:
            return
        peak = float(np.abs(samples).max())
        if not np.isfinite(peak) or peak < 1e-3:
            return
        (samples * (0.7 * 32767.0 / peak)).astype(np.int16).tofile(self.file)
        self.rows.append((len(samples), len(tokens), len(words), voice, kind))
        self.token_ids += tokens
        self.word_ends += ends if ends is not None else [-1] * len(words)

    def close(self) -> None:
        self.file.close()
        rows = np.array(self.rows, np.int64).reshape(-1, 5)
        np.savez(
            self.path + ".npz", samples=rows[:, 0], tokens=rows[:, 1], words=rows[:, 2], voices=rows[:, 3].astype(np.int16),
            kinds=rows[:, 4].astype(np.int8), token_ids=np.array(self.token_ids, np.int16), word_ends=np.array(self.word_ends, np.int32),
        )


def join(spoken: list, rng: random.Random) -> list:
    """Now and then two sentences of one voice become one utterance with a gap between them."""
    out, i = [], 0
    while i < len(spoken):
        if i + 1 < len(spoken) and rng.random() < 0.12:
            (a, words_a, ends_a, kind), (b, words_b, ends_b, _) = spoken[i], spoken[i + 1]
            gap = rng.randint(0, 14000)
            if len(a) + gap + len(b) <= LONGEST and (ends_a is None) == (ends_b is None):
                ends = None if ends_a is None else ends_a + [end + len(a) + gap for end in ends_b]
                out.append((np.concatenate((a, np.zeros(gap, np.float32), b)), words_a + words_b, ends, kind))
                i += 2
                continue
        out.append(spoken[i])
        i += 1
    return out


def work(worker: int, args: argparse.Namespace, lines: list[tuple[int, list[str]]], until: float, report) -> None:
    os.nice(5)
    pieces = Pieces.load(args.pieces)
    shard = Shard(os.path.join(args.out, f"shard{worker:03d}"), pieces)
    engines: dict[str, object] = {}
    tally: collections.Counter = collections.Counter()
    shares = dict(args.engines)
    names = sorted(voices.ENGINES)
    rng = random.Random(args.seed * 1000003 + worker)
    at = 0
    try:
        while at < len(lines) and time.time() < until and shares:
            name = rng.choices(list(shares), list(shares.values()))[0]
            began = time.time()
            try:
                if name not in engines:
                    engines[name] = voices.ENGINES[name](**args.options.get(name, {}))
                engine = engines[name]
            except Exception as error:
                print(f"worker {worker}: no {name}: {error!r}", file=sys.stderr, flush=True)
                shares.pop(name)
                continue
            group = lines[at : at + (min(engine.GROUP, 5) if args.test else engine.GROUP)]
            at += len(group)
            choice = engine.choose(rng, args.test)
            spoken = []
            for (kind, words), result in zip(group, engine.speak_all(choice, [words for _, words in group], rng)):
                if result is None:
                    tally[name + ":failed"] += 1
                    continue
                samples, ends = voices.trim(*result)
                if len(samples):
                    spoken.append((samples, words, ends, kind))
                    tally[name + (":plain" if ends is None else ":aligned")] += 1
            for samples, words, ends, kind in join(spoken, rng) if args.join else spoken:
                shard.add(samples, words, ends, names.index(name), kind)
                tally[name + ":ms"] += len(samples) // 16
            tally[name + ":work_ms"] += int(1000 * (time.time() - began))
    except Exception as error:
        print(f"worker {worker} stopped: {error!r}", file=sys.stderr, flush=True)
    shard.close()
    report.put(dict(tally))


def read_sentences(path: str) -> list[tuple[int, list[str]]]:
    with open(path, encoding="ascii") as file:
        rows = (line.rstrip("\n").split("\t") for line in file)
        return [(KINDS.index(kind), text.split()) for kind, text in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", required=True)
    parser.add_argument("--pieces", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engines", type=parse_shares, default="espeak=0.5,flite=0.3,festival=0.2", help="share of the sentences of each engine")
    parser.add_argument("--options", type=json.loads, default="{}", help='JSON, e.g. {"espeak": {"data": "DIR"}}')
    parser.add_argument("--test", action="store_true", help="only the held-out voices")
    parser.add_argument("--join", action=argparse.BooleanOptionalAction, default=True, help="join some pairs of sentences")
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    lines = read_sentences(args.sentences)
    began = time.time()
    report: multiprocessing.Queue = multiprocessing.Queue()
    workers = [
        multiprocessing.Process(target=work, args=(w, args, lines[w :: args.workers], began + args.seconds, report)) for w in range(args.workers)
    ]
    for worker in workers:
        worker.start()
    total: collections.Counter = collections.Counter()
    for _ in workers:
        try:
            total.update(report.get(timeout=min(args.seconds, 1e5) + 60))
        except Exception:
            print("a worker did not report", file=sys.stderr)
    for worker in workers:
        worker.join(10)
        if worker.is_alive():
            worker.kill()
    for name in sorted({key.split(":")[0] for key in total}):
        spoken, cpu = total[name + ":ms"] / 1000, total[name + ":work_ms"] / 1000
        print(f"{name}: {spoken / 3600:.2f} h, aligned {total[name + ':aligned']}, plain {total[name + ':plain']}, failed {total[name + ':failed']}, "
              f"{spoken / max(cpu, 1e-3):.0f} x real time a core", file=sys.stderr)
    print(f"{sum(v for k, v in total.items() if k.endswith(':ms')) / 3.6e6:.2f} h in {time.time() - began:.0f} s", file=sys.stderr)
    open(os.path.join(args.out, "done"), "w").close()


if __name__ == "__main__":
    main()
