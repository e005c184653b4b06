#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Times flex_attention on the prefill cases of segment_attention_bench: compiled, attention alone.

usage: prefill_attention_torch.py

Sinks and window are a block mask; nothing is rotated or appended here. One JSON object a line.
"""

import json
import statistics

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

TOKENS, HEADS, HEAD_DIM, SINKS = 32768, 32, 128, 4


def main():
    attend = torch.compile(flex_attention)
    query, key, value = (
        torch.randn(1, HEADS, TOKENS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        for _ in range(3)
    )
    for window in (1024, 4096):

        def visible(batch, head, q, k, window=window):
            return (q >= k) & ((q - k < window) | (k < SINKS))

        mask = create_block_mask(visible, None, None, TOKENS, TOKENS, device="cuda", _compile=True)
        pairs = sum(min(i + 1, window) + min(max(i + 1 - window, 0), SINKS) for i in range(TOKENS))
        for _ in range(3):
            attend(query, key, value, block_mask=mask)
        torch.cuda.synchronize()
        times = []
        for _ in range(15):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            attend(query, key, value, block_mask=mask)
            end.record()
            end.synchronize()
            times.append(1000 * begin.elapsed_time(end))
        time = statistics.median(times)
        row = {
            "bench": "prefill_attention",
            "kernel": f"flex_attention, PyTorch {torch.__version__}",
            "heads": f"{HEADS}:{HEADS}",
            "head_dim": HEAD_DIM,
            "tokens": TOKENS,
            "sinks": SINKS,
            "window": window,
            "us": round(time, 1),
            "spread_us": round(max(times) - min(times), 1),
            "tflop_per_s": round(4 * HEAD_DIM * HEADS * pairs / time * 1e-6, 1),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
