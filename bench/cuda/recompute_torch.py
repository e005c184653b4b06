#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Times a token of a window that is recomputed, in PyTorch, beside sinks + window of decoder_bench.

usage: recompute_torch.py [--sluice PROGRAM] [--sizes N,N,...] [--budget SECONDS] [--commit TEXT]
                          [--machine TEXT] [--geometry llama-2-7b|tiny] [--device cuda|cpu]
  --sluice PROGRAM  cuda_decoder_bench, run first with --case curve; without it there are no ratios
  --budget SECONDS  no size is begun after so many (default 240)
  --geometry tiny   with --device cpu: whether the script runs at all

Random bf16 weights of Llama-2-7B's geometry. A token of a recomputed window is a forward pass over
the whole window. Three ways:

  eager            what StreamingLLM (arXiv 2309.17453, section 4.5) was compared with: a decoder as
                   Transformers of that time wrote it, not compiled; scores with an additive causal
                   mask, softmax in float32, probabilities times values; logits of every position
  eager_sdpa       the same with scaled_dot_product_attention and that mask
  compiled         the best that one can write: torch.compile'd, products of query, key and value and
                   of gate and up fused, attention causal without a mask (flash and cuDNN; the faster
                   one counts), the last layer's query and feed-forward of the last position alone,
                   its logits alone, replayed as one CUDA graph

One JSON object per size on stdout, milliseconds, medians; `ratio_to_*` is a way's time over that of
sinks + window with the same number of entries, cache full. A way that fails is named in `errors`.
"""

import argparse
import json
import math
import pathlib
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

GEOMETRIES = {
    # vocabulary, hidden, feed-forward, heads, head size, layers
    "llama-2-7b": (32000, 4096, 11008, 32, 128, 32),
    "tiny": (320, 64, 160, 4, 16, 3),
}
# The row of the goal first: a run that is cut short has it.
SIZES = "4096,1024,256,512,2048,8192,16384"
EPS = 1e-5
HEADS_AT_ONCE = (0, 8, 4)  # 0: all. Fewer where scores of all heads do not fit.


class Model:
    def __init__(self, geometry, device):
        vocab, hidden, feed_forward, self.heads, self.head_dim, layers = GEOMETRIES[geometry]
        self.vocab, self.hidden, self.feed_forward = vocab, hidden, feed_forward
        self.device = device

        def matrix(rows, cols):
            weight = torch.empty((rows, cols), device=device, dtype=torch.bfloat16)
            return weight.normal_(std=1 / math.sqrt(cols))

        norm = torch.ones(hidden, device=device, dtype=torch.bfloat16)
        self.embedding = torch.randn((vocab, hidden), device=device).to(torch.bfloat16)
        self.output, self.output_norm = matrix(vocab, hidden), norm
        self.layers = [
            {"norm": norm, "qkv": matrix(3 * hidden, hidden), "out": matrix(hidden, hidden),
             "ff_norm": norm, "gate_up": matrix(2 * feed_forward, hidden),
             "down": matrix(hidden, feed_forward)}
            for _ in range(layers)
        ]

    def rotation(self, size):
        """cos and sin, [size, head_dim], halves equal."""
        half = torch.arange(0, self.head_dim, 2, device=self.device, dtype=torch.float32)
        angles = torch.outer(torch.arange(size, device=self.device, dtype=torch.float32),
                             10000 ** (-half / self.head_dim))
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)


def rms_norm(x, weight):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


# --- As the paper ran it ---------------------------------------------------------------------------


def matrix_attention(q, k, v, mask, heads_at_once):
    """[heads, tokens, head_dim]; scores of so many heads exist at a time."""
    if heads_at_once:
        parts = [matrix_attention(q[h : h + heads_at_once], k[h : h + heads_at_once],
                                  v[h : h + heads_at_once], mask, 0)
                 for h in range(0, q.shape[0], heads_at_once)]
        return torch.cat(parts)
    scores = torch.matmul(q, k.transpose(1, 2)) / math.sqrt(q.shape[-1])
    scores = scores + mask
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def eager_step(model, tokens, attend):
    """Logits of every position, float32."""
    size, hidden, wide = tokens.numel(), model.hidden, model.feed_forward
    cos, sin = model.rotation(size)
    x = model.embedding[tokens]
    for layer in model.layers:
        h = rms_norm(x, layer["norm"])
        q, k, v = (F.linear(h, layer["qkv"][i * hidden : (i + 1) * hidden])
                   .view(size, model.heads, model.head_dim).transpose(0, 1) for i in range(3))
        attended = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        x = x + F.linear(attended.transpose(0, 1).reshape(size, hidden), layer["out"])
        h = rms_norm(x, layer["ff_norm"])
        gated = F.silu(F.linear(h, layer["gate_up"][:wide])) * F.linear(h, layer["gate_up"][wide:])
        x = x + F.linear(gated, layer["down"])
    return F.linear(rms_norm(x, model.output_norm), model.output).float()


def causal_mask(size, device):
    lowest = torch.finfo(torch.bfloat16).min
    return torch.full((size, size), lowest, device=device, dtype=torch.bfloat16).triu_(1)


# --- The best one can write ------------------------------------------------------------------------


def before_attention(x, norm, qkv, cos, sin, heads, head_dim):
    """[1, heads, tokens, head_dim] each: query, key (both rotated), value."""
    size = x.shape[0]
    fused = F.linear(rms_norm(x, norm), qkv).view(size, 3, heads, head_dim)
    q, k, v = (fused[:, i].transpose(0, 1).unsqueeze(0) for i in range(3))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def after_attention(x, attended, out, norm, gate_up, down):
    x = x + F.linear(attended.squeeze(0).transpose(0, 1).reshape(x.shape), out)
    gate, up = F.linear(rms_norm(x, norm), gate_up).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, down)


def best_step(model, tokens, rotation, backend, before, after):
    """Logits of the last position, [1, vocab]."""
    x = model.embedding[tokens]
    for index, layer in enumerate(model.layers):
        q, k, v = before(x, layer["norm"], layer["qkv"], *rotation, model.heads, model.head_dim)
        last = index + 1 == len(model.layers)
        if last:
            x, q = x[-1:], q[:, :, -1:]
        with sdpa_kernel(backend):
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=not last)
        x = after(x, attended, layer["out"], layer["ff_norm"], layer["gate_up"], layer["down"])
    return F.linear(rms_norm(x, model.output_norm), model.output)


# --- Timing ----------------------------------------------------------------------------------------


def timed(call, device, seconds=1.0):
    """(median, spread) of a call in milliseconds, of 3 to 15 after one that is not counted."""
    def once():
        if device == "cpu":
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    once()
    repeats = min(15, max(3, int(1e3 * seconds / max(once(), 1e-3))))
    times = [once() for _ in range(repeats)]
    return statistics.median(times), max(times) - min(times)


def as_graph(call):
    """The call as a CUDA graph; what it returned lies in the graph's memory."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def measure_eager(model, tokens, row, errors):
    size = tokens.numel()
    mask = causal_mask(size, model.device)
    logits = None
    for heads_at_once in HEADS_AT_ONCE:
        def step(heads_at_once=heads_at_once):
            return eager_step(model, tokens, lambda q, k, v: matrix_attention(
                q, k, v, mask, heads_at_once))
        try:
            row["eager_ms"], row["eager_spread_ms"] = timed(step, model.device)
            row["eager_heads_at_once"] = heads_at_once or model.heads
            logits = step()[-1]
            break
        except RuntimeError as error:
            errors["eager"] = str(error).splitlines()[0][:120]
            free(model.device)
    else:
        return None
    errors.pop("eager", None)
    return logits


def measure_eager_sdpa(model, tokens, row):
    mask = causal_mask(tokens.numel(), model.device)

    def step():
        return eager_step(model, tokens, lambda q, k, v: F.scaled_dot_product_attention(
            q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), attn_mask=mask).squeeze(0))

    row["eager_sdpa_ms"], row["eager_sdpa_spread_ms"] = timed(step, model.device)
    return step()[-1]


def measure_compiled(model, tokens, row, errors, functions):
    rotation = model.rotation(tokens.numel())
    logits = None
    backends = {"cpu": [SDPBackend.MATH]}.get(
        model.device, [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION])
    for backend in backends:
        name = backend.name.lower().removesuffix("_attention")

        def step(backend=backend):
            return best_step(model, tokens, rotation, backend, *functions)

        try:
            step()
            if model.device == "cpu":
                call, result = step, step()
            else:
                graph, result = as_graph(step)
                call = graph.replay
            ms, spread = timed(call, model.device)
            row[f"compiled_{name}_ms"] = ms
            if ms < row.get("compiled_ms", math.inf):
                row["compiled_ms"], row["compiled_spread_ms"] = ms, spread
                row["compiled_attention"] = name
            logits = result[0].float().clone()
            graph = result = call = None
        except RuntimeError as error:
            errors[f"compiled_{name}"] = str(error).splitlines()[0][:120]
        free(model.device)
    return logits


def free(device):
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def measure_size(model, size, ours, functions, meta, geometry):
    tokens = torch.randint(model.vocab, (size,), device=model.device)
    row = {"bench": "recompute_cuda", "model": geometry, "type": "bf16", "entries": size}
    errors, logits = {}, {}
    for way, measure in (
            ("compiled", lambda: measure_compiled(model, tokens, row, errors, functions)),
            ("eager_sdpa", lambda: measure_eager_sdpa(model, tokens, row)),
            ("eager", lambda: measure_eager(model, tokens, row, errors))):
        try:
            logits[way] = measure()
        except Exception as error:  # another size may still go well
            errors[way] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        free(model.device)
    known = {way: x for way, x in logits.items() if x is not None}
    if len(known) > 1:
        reference, *others = known.values()
        scale = reference.norm()
        row["logits_apart"] = max(float((x - reference).norm() / scale) for x in others)
    step = ours.get(size)
    if step:
        row["sink_window_ms"], row["sink_window_spread_ms"] = step["ms"], step["spread_ms"]
        row["of_read_ceiling"] = step["of_read_ceiling"]
        for way in ("eager", "eager_sdpa", "compiled"):
            if f"{way}_ms" in row:
                row[f"ratio_to_{way}"] = row[f"{way}_ms"] / step["ms"]
    if errors:
        row["errors"] = errors
    row["meta"] = meta
    print(json.dumps({key: round(value, 4) if isinstance(value, float) else value
                      for key, value in row.items()}), flush=True)


def run_sluice(program):
    """Steps of decoder_bench by their entries; its own lines go to stderr."""
    done = subprocess.run([program, "--case", "curve"], capture_output=True, text=True, check=False,
                          timeout=120)
    sys.stderr.write(done.stdout + done.stderr)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["entries"]: row for row in rows if row["bench"] == "decoder_step"}


def commit_of_folder():
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                          check=False, cwd=pathlib.Path(__file__).parent)
    return done.stdout.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sluice", metavar="PROGRAM")
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--budget", type=float, default=240)
    parser.add_argument("--commit")
    parser.add_argument("--machine")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="llama-2-7b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--no-compile", action="store_true", help="the third way not compiled")
    options = parser.parse_args()
    start = time.monotonic()

    ours = {}
    if options.sluice:
        try:
            ours = run_sluice(options.sluice)
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"recompute_torch: {error}", file=sys.stderr)
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # each size is compiled for itself
    functions = (before_attention, after_attention)
    if not options.no_compile:
        functions = tuple(torch.compile(f, dynamic=False) for f in functions)
    on_gpu = options.device == "cuda"
    meta = {"machine": options.machine or (torch.cuda.get_device_name() if on_gpu else "CPU"),
            "commit": options.commit or commit_of_folder(), "torch": torch.__version__,
            "compiled": not options.no_compile, "sinks": 4, "weights": "random"}
    with torch.no_grad():
        model = Model(options.geometry, options.device)
        for size in map(int, options.sizes.split(",")):
            if time.monotonic() - start > options.budget:
                print(f"recompute_torch: no time for {size}", file=sys.stderr)
                continue
            measure_size(model, size, ours, functions, meta, options.geometry)
            print(f"recompute_torch: {size} done at {time.monotonic() - start:.0f} s",
                  file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
