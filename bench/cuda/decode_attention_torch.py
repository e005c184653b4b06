#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Times PyTorch's attention on the cases of decode_attention_bench, in the same manner.

usage: decode_attention_torch.py [--flex]

A graph holds one call a layer, each with keys and values of its own; the time is the median replay
over the layers. Nothing is rotated, appended or evicted here. One JSON object a line, on stdout.
"""

import argparse
import json
import statistics
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

CASES = [
    # name, batch, query heads, KV heads, keys, layers
    ("1028", 1, 32, 8, 1028, 32),
    ("4100", 1, 32, 8, 4100, 32),
    ("32772", 1, 32, 8, 32772, 16),
    ("batch8x4096", 8, 32, 8, 4096, 16),
    ("batch64x4096", 64, 32, 8, 4096, 8),
]
HEAD_DIM = 128


def time_graph(step, layers):
    """Microseconds of one call, the median of 15 times enough replays for 10 ms."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for layer in range(layers):
            step(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            step(layer)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run(replays):
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return 1000 * begin.elapsed_time(end) / replays / layers

    run(3)
    replays = max(1, int(10000 / (run(3) * layers)))
    return statistics.median(run(replays) for _ in range(15))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flex", action="store_true", help="flex_attention too, compiled")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    flex = None
    if arguments.flex:
        from torch.nn.attention.flex_attention import flex_attention

        flex = torch.compile(flex_attention, dynamic=False)
    for name, batch, qo_heads, kv_heads, keys, layers in CASES:
        shape = (layers, batch, kv_heads, keys, HEAD_DIM)
        k = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        v = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        q = torch.randn((batch, qo_heads, 1, HEAD_DIM), device="cuda", dtype=torch.bfloat16)
        ways = {}
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):

            def sdpa(layer, backend=backend):
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k[layer], v[layer], enable_gqa=True)

            ways["sdpa_" + backend.name.lower()] = sdpa

        # Query heads of a KV head as rows of one head: what GQA is to a kernel that knows only MHA.
        folded = q.view(batch, kv_heads, qo_heads // kv_heads, HEAD_DIM)

        def sdpa_folded(layer):
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(folded, k[layer], v[layer])

        ways["sdpa_flash_folded"] = sdpa_folded
        if flex is not None:
            ways["flex"] = lambda layer: flex(q, k[layer], v[layer], enable_gqa=True)
        for way, step in ways.items():
            row = {"bench": "torch", "way": way, "torch": torch.__version__, "case": name,
                   "batch": batch, "heads": f"{qo_heads}:{kv_heads}", "keys": keys,
                   "layers": layers}
            try:
                with torch.no_grad():
                    microseconds = time_graph(step, layers)
                gigabytes = 4 * batch * kv_heads * keys * HEAD_DIM / 1e9
                row |= {"us": round(microseconds, 3),
                        "tb_per_s": round(gigabytes / microseconds * 1e3, 3)}
            except RuntimeError as error:
                row["error"] = str(error).splitlines()[0][:120]
            print(json.dumps(row), flush=True)
        del k, v, ways
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
