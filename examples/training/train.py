# SPDX-License-Identifier: MIT
"""Trains one layout of the listening model on synthesised shards; the schedule is a share of wall time, so it ends when it must.

    python3 train.py --data DIR --pieces pieces.json --out DIR --layout group --seconds 480

Layouts: group (shipped), interleaved, reencode, batch (group positions that always hear the whole input first). Same seed = same batches for all
layouts. Writes OUT/LAYOUT.pt (half precision, replaced every --save seconds) and OUT/LAYOUT.log. Progress on stderr.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

import data
import features
import model as listening
from pieces import Pieces


def say(*words) -> None:
    print(time.strftime("%H:%M:%S"), *words, file=sys.stderr, flush=True)


def to_device(batch: dict, device: str) -> dict:
    out = {}
    for key, value in batch.items():
        if isinstance(value, np.ndarray):
            tensor = torch.from_numpy(np.ascontiguousarray(value))
            out[key] = (tensor.pin_memory() if device == "cuda" else tensor).to(device, non_blocking=True)
        else:
            out[key] = value
    return out


class Trainer:
    def __init__(self, args: argparse.Namespace, pieces: Pieces):
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("high")
        self.device = args.device
        self.layout = "group" if args.layout == "batch" else args.layout
        sizes = listening.Sizes(args.width, args.layers, args.heads, args.feed_forward, len(pieces))
        self.model = listening.Listener(sizes).to(self.device)
        self.run = listening.block
        if args.compile:
            for limit in ("recompile_limit", "cache_size_limit"):  # its name before and since PyTorch 2.6
                if hasattr(torch._dynamo.config, limit):
                    setattr(torch._dynamo.config, limit, 64)
            self.run = torch.compile(listening.block, dynamic=False)
        decay = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim == 1]
        self.parameters = decay + plain
        self.peak = args.rate
        self.optimiser = torch.optim.AdamW(
            [{"params": decay, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=args.rate, betas=(0.9, 0.98), fused=self.device == "cuda",
        )
        self.generator = torch.Generator(self.device).manual_seed(args.seed)
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.ctc_weight = args.ctc

    def mel(self, audio: torch.Tensor, batch: dict, augment: bool = True) -> torch.Tensor:
        frames, _, _ = data.BUCKETS[batch["bucket"]]
        wave = data.speech(audio, batch, frames * data.SAMPLES_PER_FRAME)
        if augment:
            wave = features.augment(wave, batch["spoken"].float(), self.generator)
        return features.log_mel(wave.clamp(-1, 1), batch["warp"], features.WARPS)

    def measure_features(self, audio: torch.Tensor, batches: list[dict]) -> None:
        """Sets the fixed means and deviations from some augmented batches."""
        total, square, count = 0.0, 0.0, 0
        with torch.no_grad():
            for batch in batches:
                mel = self.mel(audio, to_device(batch, self.device)).double().flatten(0, 1)
                total, square, count = total + mel.sum(0), square + mel.square().sum(0), count + len(mel)
        mean = total / count
        self.model.mel_mean.copy_(mean)
        self.model.mel_std.copy_((square / count - mean**2).clamp(min=1e-4).sqrt())

    def loss(self, mel: torch.Tensor, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        frames, _, _ = data.BUCKETS[batch["bucket"]]
        model = self.model
        with torch.no_grad():
            mel = features.mask_features(model.normalise(mel), self.generator)
            positions, mask = listening.layout(self.layout, frames, batch["heard"])
            mask = torch.zeros_like(mask, dtype=self.dtype).masked_fill_(~mask, -torch.inf)
        x = torch.cat((model.subsample(mel, self.dtype), model.embed(batch["inputs"], self.dtype)), 1)
        hidden = model.trunk(x, positions, mask, self.run)
        text = F.cross_entropy(model.logits(hidden[:, frames:]).flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, label_smoothing=0.1)
        log_probs = F.log_softmax(model.ctc_logits(hidden[:, :frames]), -1).transpose(0, 1)
        ctc = F.ctc_loss(log_probs, batch["ctc"], batch["frames"], batch["tokens"], blank=model.blank, zero_infinity=True)
        return text + self.ctc_weight * ctc, text.detach(), ctc.detach()

    def step(self, mel: torch.Tensor, batch: dict, progress: float) -> tuple[torch.Tensor, torch.Tensor]:
        warm = 0.03
        rate = progress / warm if progress < warm else 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warm) / (1 - warm))))
        for group in self.optimiser.param_groups:
            group["lr"] = self.peak * max(rate, 1e-3)
        loss, text, ctc = self.loss(mel, batch)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimiser.step()
        return text, ctc

    def rehearse(self) -> None:
        """Compiles every shape on made-up data, without a change of the weights."""
        for bucket, (frames, rows, batch) in enumerate(data.BUCKETS):
            began = time.time()
            integers = lambda high, *shape: torch.randint(3, high, shape, device=self.device)
            fake = {
                "bucket": bucket,
                "inputs": integers(len(self.model.embedding), batch, rows),
                "labels": integers(len(self.model.embedding), batch, rows),
                "ctc": integers(len(self.model.embedding), batch, rows),
                "heard": torch.full((batch, rows), frames, device=self.device),
                "frames": (frames,) * batch,
                "tokens": (rows // 2,) * batch,
            }
            mel = torch.randn(batch, frames * 4 - 2, features.MELS, device=self.device)
            for again in range(3):
                loss = self.loss(mel, fake)[0]
                loss.backward()
                self.optimiser.zero_grad(set_to_none=True)
                float(loss)
                if again == 1:
                    began_warm = time.time()
            say(f"shape {data.BUCKETS[bucket]}: ready in {time.time() - began:.1f} s, then {1e3 * (time.time() - began_warm):.0f} ms a pass")

    def save(self, path: str, note: dict) -> None:
        state = {key: value.half() if value.ndim > 1 else value.float() for key, value in self.model.state_dict().items()}
        torch.save({"state": state, "sizes": vars(self.model.sizes), "note": note}, path + ".new")
        os.replace(path + ".new", path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of shards; waited for until DATA/done exists")
    parser.add_argument("--pieces", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--layout", default="group", choices=["group", "interleaved", "reencode", "batch"])
    parser.add_argument("--seconds", type=float, default=480, help="training time, counted from the first step")
    parser.add_argument("--until", type=float, help="clock time (seconds since the epoch) at which to end, in place of --seconds")
    parser.add_argument("--steps", type=int, default=10**9, help="at most so many steps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--ctc", type=float, default=0.3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--feed-forward", type=int, default=704)
    parser.add_argument("--save", type=float, default=60, help="seconds between checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    args = parser.parse_args()

    os.makedirs(args.out, exist_ok=True)
    pieces = Pieces.load(args.pieces)
    trainer = Trainer(args, pieces)
    say(f"{args.layout}: {sum(p.numel() for p in trainer.model.parameters()) / 1e6:.2f} M parameters")
    if args.device == "cuda":
        try:
            trainer.rehearse()
        except Exception as error:  # a compiler that does not work must not cost the run
            say("compiled layers failed, going on without:", repr(error)[:2000])
            trainer.run = listening.block
            trainer.rehearse()
    while not os.path.exists(os.path.join(args.data, "done")):
        time.sleep(0.5)
    began = time.time()
    corpus = data.load(args.data, args.device)
    batches = data.Batches(corpus, args.layout, np.array(pieces.ends_word), args.seed)
    say(f"{corpus.hours:.1f} h in {len(corpus.samples)} utterances loaded in {time.time() - began:.1f} s; {batches.epoch_batches()} batches an epoch")
    trainer.measure_features(corpus.audio, [batches.next() for _ in range(6)])

    start = saved = reported = time.time()
    until = args.until or start + args.seconds
    path = os.path.join(args.out, args.layout + ".pt")
    log = open(os.path.join(args.out, args.layout + ".log"), "w", encoding="utf-8")
    trainer.model.train()
    step, sums, seconds_heard = 0, [], 0.0
    while step < args.steps and (now := time.time()) < until:
        batch = to_device(batches.next(), args.device)
        with torch.no_grad():
            mel = trainer.mel(corpus.audio, batch)
        sums.append(torch.stack(trainer.step(mel, batch, max((now - start) / (until - start), step / args.steps))))
        step += 1
        if step % 100 == 0:
            text, ctc = torch.stack(sums).mean(0).tolist()
            sums = []
            line = {"step": step, "seconds": round(time.time() - start, 1), "text": round(text, 4), "ctc": round(ctc, 4)}
            log.write(json.dumps(line) + "\n")
            log.flush()
            if time.time() - reported > 10:
                reported = time.time()
                say(args.layout, json.dumps(line))
            if not math.isfinite(text):
                raise SystemExit("the loss is not finite")
        if time.time() - saved > args.save:
            saved = time.time()
            trainer.save(path, {"step": step, "layout": args.layout, "hours": corpus.hours})
    trainer.save(path, {"step": step, "layout": args.layout, "hours": corpus.hours, "seconds": time.time() - start, "seed": args.seed, "finished": True})
    say(f"{args.layout}: {step} steps in {time.time() - start:.0f} s, epochs {step / max(1, batches.epoch_batches()):.1f}")
    log.close()


if __name__ == "__main__":
    main()
