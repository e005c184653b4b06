#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Records what Hugging Face Transformers' logits processors keep, for sampler_test.cpp.

Writes tests/data/sampler/goldens.json. Needs torch and transformers (recorded with 5.23, CPU).
Run from anywhere: python3 tests/oracle/make_sampler_goldens.py

The processors run in the order in which GenerationMixin builds them (repetition penalty, then
temperature, top-k, top-p, min-p) on float64 scores made from float32 logits. Cases in which a
cumulative probability comes within 1e-9 of a top-p threshold, or a probability of a min-p
threshold, are refused: there the outcome is a matter of rounding.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCAB_SIZE = 64
MARGIN = 1e-9


def make_logits():
    rng = np.random.default_rng(20240607)
    peaked = rng.normal(0.0, 3.0, VOCAB_SIZE)
    flat = rng.normal(0.0, 0.3, VOCAB_SIZE)
    masked = rng.normal(0.0, 2.0, VOCAB_SIZE)
    masked[rng.permutation(VOCAB_SIZE)[:50]] = -math.inf
    tied = rng.integers(-3, 4, VOCAB_SIZE).astype(np.float64)
    return {
        name: values.astype(np.float32)
        for name, values in [("peaked", peaked), ("flat", flat), ("masked", masked), ("tied", tied)]
    }


def refuse_if_close(values, threshold, what):
    if values.numel() and (values - threshold).abs().min().item() < MARGIN:
        raise SystemExit(f"{what}: too close to the threshold, choose another case")


def run(logits, options, history):
    """Scores after all processors, [vocab_size]; the same switches as GenerationMixin."""
    processors = LogitsProcessorList()
    scores = torch.tensor(logits.astype(np.float64))[None]
    ids = torch.tensor([history], dtype=torch.long)
    if options.get("repetition_penalty", 1.0) != 1.0 and history:
        processors.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if options["temperature"] != 1.0:
        processors.append(TemperatureLogitsWarper(options["temperature"]))
    if options.get("top_k", 0) != 0:
        processors.append(TopKLogitsWarper(options["top_k"]))
    if options.get("top_p", 1.0) < 1.0:
        before = processors(ids, scores.clone())[0]
        mass = before.sort(descending=False).values.softmax(-1).cumsum(-1)
        refuse_if_close(mass[mass > 0], 1.0 - options["top_p"], "top_p")
        processors.append(TopPLogitsWarper(options["top_p"]))
    if options.get("min_p", 0.0) > 0.0:
        probabilities = processors(ids, scores.clone())[0].softmax(-1)
        threshold = options["min_p"] * probabilities.max()
        refuse_if_close(probabilities[probabilities > 0], threshold, "min_p")
        processors.append(MinPLogitsWarper(options["min_p"]))
    return processors(ids, scores.clone())[0]


def main():
    logits = make_logits()
    # Tied logits are not combined with top-p: which of the tied tokens torch's unstable sort
    # removes is not defined.
    cases = []

    def add(name, history=(), **options):
        options = {"temperature": 1.0, **options}
        scores = run(logits[name], options, list(history))
        probabilities = scores.softmax(-1)
        kept = torch.nonzero(probabilities > 0).flatten().tolist()
        cases.append(
            {
                "logits": name,
                "history": list(history),
                "options": options,
                "tokens": kept,
                "probabilities": [probabilities[token].item() for token in kept],
            }
        )

    for name in ("peaked", "flat", "masked", "tied"):
        add(name)
        add(name, temperature=0.7)
        add(name, temperature=1.8, top_k=5)
        add(name, top_k=1)
        add(name, top_k=20)
        add(name, top_k=VOCAB_SIZE + 100)
        add(name, min_p=0.05)
        add(name, min_p=0.9, temperature=1.5)
        add(name, history=[3, 3, 7, 60, 3, 12], repetition_penalty=1.3)
        add(name, history=list(range(0, 64, 2)), repetition_penalty=0.8, temperature=0.9)
    for name in ("peaked", "flat", "masked"):
        add(name, top_p=0.9)
        add(name, top_p=0.1)
        add(name, top_p=0.999)
        add(name, top_p=1e-6)
        add(name, top_p=0.5, temperature=2.0)
        add(name, top_k=12, top_p=0.8)
        add(name, top_k=30, top_p=0.95, min_p=0.1, temperature=0.8)
        add(name, history=[1, 2, 3, 5, 8, 13, 21, 34, 55], repetition_penalty=1.2, top_k=25,
            top_p=0.85, min_p=0.02, temperature=1.3)

    def number(value):
        return "-inf" if math.isinf(value) else float(value)

    text = {
        "made_by": f"tests/oracle/make_sampler_goldens.py, transformers {transformers.__version__}",
        "logits": {name: [number(v) for v in values] for name, values in logits.items()},
        "cases": cases,
    }
    path = Path(__file__).resolve().parent.parent / "data" / "sampler" / "goldens.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["{", f' "made_by": {json.dumps(text["made_by"])},', ' "logits": {']
    lines += [",\n".join(f'  "{k}": {json.dumps(v)}' for k, v in text["logits"].items()), " },"]
    lines += [' "cases": [', ",\n".join("  " + json.dumps(case) for case in cases), " ]", "}"]
    path.write_text("\n".join(lines) + "\n")
    print(f"{path.name}: {len(cases)} cases, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
