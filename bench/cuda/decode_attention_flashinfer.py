#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Times FlashInfer's decode attention on the cases of decode_attention_bench, in the same manner.

usage: decode_attention_flashinfer.py

Needs the package flashinfer-python, which compiles its kernels at first use (minutes; with
FLASHINFER_CUDA_ARCH_LIST=9.0a for that GPU alone). A graph holds one call a layer, each with keys and
values of its own; the time is the median replay over the layers, as in decode_attention_torch.py.

single_decode_with_kv_cache (batch 1, both layouts) and BatchDecodeWithPagedKVCacheWrapper (pages of 16
tokens, planned once for these lengths), each with CUDA cores and tensor cores, without rotation and
with its in-kernel rotation of queries and keys (`rotates`: every key anew in each call). Nothing is
appended or evicted here. `apart` is the distance from PyTorch's attention over the same rows, where
nothing is rotated. One JSON object a line, on stdout.
"""

import json
import sys

import torch
import torch.nn.functional as F
from decode_attention_torch import CASES, HEAD_DIM, time_graph
from flashinfer import __version__ as flashinfer_version
from flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper, single_decode_with_kv_cache

PAGE = 16


def single_ways(q, k, v, batch):
    """Calls by name: f(layer) -> [heads, head_dim]. Keys are [layers, tokens, heads, head_dim]."""
    if batch != 1:
        return {}
    heads_first = (k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous())
    ways = {}
    for layout, (keys, values) in (("NHD", (k, v)), ("HND", heads_first)):
        for cores in (False, True):
            for mode in ("NONE", "ROPE_LLAMA"):
                def call(layer, layout=layout, keys=keys, values=values, cores=cores, mode=mode):
                    return single_decode_with_kv_cache(q[0], keys[layer], values[layer], layout,
                                                       mode, cores)
                ways["single", layout, cores, mode] = call
    return ways


def batch_ways(q, k, v, batch, keys, qo_heads, kv_heads):
    """The same of pages: k is [layers, batch * pages * PAGE, heads, head_dim]."""
    pages = (keys + PAGE - 1) // PAGE
    first = torch.arange(batch + 1, dtype=torch.int32) * pages
    indices = torch.arange(batch * pages, dtype=torch.int32)
    last = torch.full((batch,), keys - (pages - 1) * PAGE, dtype=torch.int32)
    paged = [x.view(x.shape[0], batch * pages, PAGE, kv_heads, HEAD_DIM) for x in (k, v)]
    out = torch.empty_like(q)
    ways = {}
    for cores in (False, True):
        for mode in ("NONE", "ROPE_LLAMA"):
            workspace = torch.zeros(128 << 20, dtype=torch.uint8, device="cuda")
            wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=cores)

            def call(layer, wrapper=wrapper, mode=mode):
                if not getattr(wrapper, "planned", False):
                    wrapper.plan(first.cuda(), indices.cuda(), last.cuda(), qo_heads, kv_heads,
                                 HEAD_DIM, PAGE, pos_encoding_mode=mode,
                                 q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
                    wrapper.planned = True
                return wrapper.run(q, (paged[0][layer], paged[1][layer]), out=out)

            ways["batch", "NHD", cores, mode] = call
    return ways


def reference(q, k, v, batch, keys):
    """Attention over the first layer's rows, float32: [batch, heads, head_dim]."""
    k, v = (x[0].view(batch, -1, x.shape[-2], HEAD_DIM)[:, :keys].transpose(1, 2).float()
            for x in (k, v))
    return F.scaled_dot_product_attention(q.float().unsqueeze(2), k, v, enable_gqa=True).squeeze(2)


def main():
    torch.manual_seed(0)
    for name, batch, qo_heads, kv_heads, keys, layers in CASES:
        room = (keys + PAGE - 1) // PAGE * PAGE  # the rest of the last page is not read
        shape = (layers, batch * room, kv_heads, HEAD_DIM)
        k = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        v = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        q = torch.randn((batch, qo_heads, HEAD_DIM), device="cuda", dtype=torch.bfloat16)
        expected = reference(q, k, v, batch, keys)
        ways = single_ways(q, k[:, :keys], v[:, :keys], batch)
        ways |= batch_ways(q, k, v, batch, keys, qo_heads, kv_heads)
        for (api, layout, cores, mode), step in ways.items():
            row = {"bench": "flashinfer", "way": f"{api}_{layout.lower()}" + "_tensor" * cores,
                   "rotates": mode != "NONE", "flashinfer": flashinfer_version,
                   "torch": torch.__version__, "case": name, "batch": batch,
                   "heads": f"{qo_heads}:{kv_heads}", "keys": keys, "layers": layers}
            try:
                with torch.no_grad():
                    if mode == "NONE":
                        found = step(0).view(expected.shape).float()
                        row["apart"] = round(float((found - expected).norm() / expected.norm()), 5)
                    microseconds = time_graph(step, layers)
                gigabytes = 4 * batch * kv_heads * keys * HEAD_DIM / 1e9
                row |= {"us": round(microseconds, 3),
                        "tb_per_s": round(gigabytes / microseconds * 1e3, 3)}
            except Exception as error:  # one way less
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            print(json.dumps(row), flush=True)
        del k, v, ways, step, expected
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
