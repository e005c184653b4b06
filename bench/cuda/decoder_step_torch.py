#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Times one-token steps of whole decoders in PyTorch on the cases of decoder_bench --case step.

usage: decoder_step_torch.py [--sluice PROGRAM] [--geometry NAME]... [--ways NAME,NAME,...]
                             [--budget SECONDS] [--commit TEXT] [--machine TEXT]
                             [--device cuda|cpu]

Random bf16 weights, batch 1. A step embeds a token, passes all layers, forms logits, chooses the
likeliest token and leaves it for the next step. Keys and values lie in a static cache that is full:
every step overwrites the oldest row behind the first four and attends to all rows, without a mask.
Keys are seen where they once came (sluice rotates a second query for its sinks, which stay near).
Ways:

  eager      launched from Python, one operation after the other; products of query, key and value
             and of gate and up fused
  graph      the same, replayed as one CUDA graph
  compiled   torch.compile in the pieces between attention, replayed as one CUDA graph
  tuned      the same with coordinate_descent_tuning: products become Triton kernels of their own,
             fused with what stands around them
  overlapped the same, launched before the kernel ahead has ended (programmatic dependent launch)
  autotuned  the same as compiled with max_autotune: the fastest of cuBLAS and Triton for a product

Attention is scaled_dot_product_attention by cuDNN, flash, or flash with the query heads of a KV
head as rows of one: each way's fastest counts (eager: cuDNN's).

Each way's first step is held against a plain float32 computation of the same weights and cache.
One JSON object per geometry and cache size on stdout: milliseconds, medians of 15 times 8 steps, and
`ratio` = the best way's time over sluice's, which runs before and after. What goes on is told on
stderr. Exit status 1 if a way failed or differs from float32 by more than bf16's rounding.
"""

import argparse
import json
import math
import pathlib
import statistics
import subprocess
import sys
import time
import typing

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


class Geometry(typing.NamedTuple):
    vocab: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    entries: tuple  # of the cache, one case each


GEOMETRIES = {
    "llama-2-7b": Geometry(32000, 4096, 11008, 32, 32, 128, 32, (256, 1024, 4096)),
    "llama-3-8b": Geometry(128256, 4096, 14336, 32, 8, 128, 32, (1024, 4096, 32768)),
    "tiny": Geometry(320, 64, 160, 4, 2, 16, 3, (32, 48)),
}
# How a way compiles its pieces; None: not at all.
WAYS = {"compiled": {}, "graph": None, "eager": None,
        "tuned": {"coordinate_descent_tuning": True},
        "overlapped": {"coordinate_descent_tuning": True, "triton.enable_pdl": True},
        "autotuned": {"max_autotune": True}}
EPS, SINKS, POSITION = 1e-5, 4, 1_000_000
# Relative, of the logits and of the last layer's new key and value. Some 200 roundings to bf16 lie
# one behind the other, each of up to 2^-9 of what passes it: 200^0.5 * 2^-9 = 0.028.
BOUND = 0.03


# --- A step ----------------------------------------------------------------------------------------


def rms_norm(x, weight):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


def rotate(x, cos, sin):
    """x: [heads, head_dim]; cos, sin: [head_dim / 2], float32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def project(x, norm, qkv, keys, values, rows, cos, sin, heads, kv_heads):
    """The query, [1, heads, 1, head_dim]; the new key and value go to their rows of the cache."""
    fused = F.linear(rms_norm(x, norm), qkv).view(heads + 2 * kv_heads, -1)
    query, key, value = fused.split((heads, kv_heads, kv_heads))
    keys[rows] = rotate(key, cos, sin)
    values[rows] = value
    return rotate(query, cos, sin).view(1, heads, 1, -1)


def behind_attention(x, attended, out, norm, gate_up, down):
    x = x + F.linear(attended.reshape(1, -1), out)
    gate, up = F.linear(rms_norm(x, norm), gate_up).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, down)


# The three pieces that are compiled.


def start(token, position, embedding, frequencies, first_rows, ring, *projection):
    """From the token to the first query; also what all layers share."""
    x = embedding[token]
    angles = position * frequencies
    cos, sin = angles.cos().float(), angles.sin().float()
    rows = first_rows + SINKS + (position - SINKS) % ring
    norm, qkv, keys, values, heads, kv_heads = projection
    return x, rows, cos, sin, project(x, norm, qkv, keys, values, rows, cos, sin, heads, kv_heads)


def between(x, attended, out, ff_norm, gate_up, down, rows, cos, sin, *projection):
    """From one layer's attention to the next one's query."""
    x = behind_attention(x, attended, out, ff_norm, gate_up, down)
    norm, qkv, keys, values, heads, kv_heads = projection
    return x, project(x, norm, qkv, keys, values, rows, cos, sin, heads, kv_heads)


def finish(x, attended, out, ff_norm, gate_up, down, norm, output):
    """Logits, [1, vocab]."""
    return F.linear(rms_norm(behind_attention(x, attended, out, ff_norm, gate_up, down), norm),
                    output)


class Model:
    """Weights, a cache for the largest case, and where a stream stands."""

    def __init__(self, name, device):
        self.name, self.device, self.shape = name, device, GEOMETRIES[name]
        g = self.shape

        def matrix(rows, cols):
            weight = torch.empty((rows, cols), device=device, dtype=torch.bfloat16)
            return weight.normal_(std=1 / math.sqrt(cols))

        def cache():
            return torch.empty((g.kv_heads * max(g.entries), g.head_dim), device=device,
                               dtype=torch.bfloat16).normal_()

        self.norm = torch.ones(g.hidden, device=device, dtype=torch.bfloat16)
        self.embedding = matrix(g.vocab, g.hidden) * math.sqrt(g.hidden)
        self.output = matrix(g.vocab, g.hidden)
        self.layers = [{"qkv": matrix((g.heads + 2 * g.kv_heads) * g.head_dim, g.hidden),
                        "out": matrix(g.hidden, g.heads * g.head_dim),
                        "gate_up": matrix(2 * g.feed_forward, g.hidden),
                        "down": matrix(g.hidden, g.feed_forward),
                        "keys": cache(), "values": cache()} for _ in range(g.layers)]
        half = torch.arange(0, g.head_dim, 2, device=device, dtype=torch.float64)
        self.frequencies = 10000 ** (-half / g.head_dim)
        self.token, self.position, self.first_rows, self.ring = (
            torch.zeros(count, device=device, dtype=torch.int64) for count in (1, 1, g.kv_heads, 1))

    def restart(self, entries):
        """A cache of so many entries, at a position far behind its end."""
        self.token.fill_(1)
        self.position.fill_(POSITION)
        self.ring.fill_(entries - SINKS)
        torch.mul(torch.arange(self.shape.kv_heads, device=self.device), entries,
                  out=self.first_rows)

    def cached(self, layer, name, entries):
        """[1, kv_heads, entries, head_dim]"""
        g = self.shape
        return layer[name][: g.kv_heads * entries].view(1, g.kv_heads, entries, g.head_dim)

    def projection(self, layer):
        return (self.norm, layer["qkv"], layer["keys"], layer["values"], self.shape.heads,
                self.shape.kv_heads)


def step(model, entries, attend, pieces):
    """Logits, [1, vocab]; the next token and position are left in the model."""
    begin, middle, end = pieces
    x, rows, cos, sin, query = begin(model.token, model.position, model.embedding,
                                     model.frequencies, model.first_rows, model.ring,
                                     *model.projection(model.layers[0]))
    for layer, following in zip(model.layers, [*model.layers[1:], None]):
        attended = attend(query, model.cached(layer, "keys", entries),
                          model.cached(layer, "values", entries))
        rest = (layer["out"], model.norm, layer["gate_up"], layer["down"])
        if following is not None:
            x, query = middle(x, attended, *rest, rows, cos, sin, *model.projection(following))
        else:
            logits = end(x, attended, *rest, model.norm, model.output)
    # Not within a piece: a compiled argmax of one row is one block's work.
    model.token.copy_(logits.argmax(dim=-1))
    model.position.add_(1)
    return logits


def attentions(model):
    """Ways to attend, by name: which kernel a step is to run under, and the call."""
    g = model.shape

    def attend(query, keys, values):
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=g.heads != g.kv_heads)

    def folded(query, keys, values):
        return F.scaled_dot_product_attention(
            query.view(1, g.kv_heads, g.heads // g.kv_heads, g.head_dim), keys, values)

    if model.device == "cpu":
        return {"math": (SDPBackend.MATH, attend)}
    found = {"cudnn": (SDPBackend.CUDNN_ATTENTION, attend),
             "flash": (SDPBackend.FLASH_ATTENTION, attend)}
    if g.heads != g.kv_heads:
        found["flash_folded"] = (SDPBackend.FLASH_ATTENTION, folded)
    return found


# --- Whether it is right ---------------------------------------------------------------------------


def reference(model, entries):
    """(logits, the last layer's new key and value) in float32 by other means than a step."""
    g = model.shape
    position = int(model.position)
    slot = SINKS + (position - SINKS) % (entries - SINKS)
    turn = torch.polar(torch.ones_like(model.frequencies), position * model.frequencies)

    def normed(x):
        return x / torch.sqrt((x * x).mean() + EPS)

    def turned(heads):
        pairs = torch.complex(*heads.double().chunk(2, dim=-1)) * turn
        return torch.cat((pairs.real, pairs.imag), dim=-1).float()

    x = model.embedding[int(model.token)].float()
    for layer in model.layers:
        fused = layer["qkv"].float() @ normed(x)
        query, key, value = fused.view(-1, g.head_dim).split((g.heads, g.kv_heads, g.kv_heads))
        query, key = turned(query), turned(key)
        keys, values = (model.cached(layer, name, entries)[0].float() for name in ("keys", "values"))
        keys[:, slot], values[:, slot] = key, value
        query = query.view(g.kv_heads, -1, g.head_dim)
        weights = torch.einsum("hqd,hkd->hqk", query, keys) / math.sqrt(g.head_dim)
        x = x + layer["out"].float() @ torch.einsum(
            "hqk,hkd->hqd", weights.softmax(-1), values).reshape(-1)
        gate, up = (layer["gate_up"].float() @ normed(x)).chunk(2)
        x = x + layer["down"].float() @ (gate * torch.sigmoid(gate) * up)
    return model.output.float() @ normed(x), key, value, slot


def error_of(model, entries, run):
    """The largest relative error of one step that `run` makes; `run` returns its logits."""
    model.restart(entries)
    logits, key, value, slot = reference(model, entries)
    found = run().float().reshape(-1).clone()
    if int(model.token) != int(found.argmax()):
        return math.inf
    last = model.layers[-1]
    pairs = [(found, logits)] + [(model.cached(last, name, entries)[0, :, slot].float(), expected)
                                 for name, expected in (("keys", key), ("values", value))]
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)


# --- Timing ----------------------------------------------------------------------------------------


def as_graph(call):
    """(how to replay, what it leaves behind); not a graph without a GPU."""
    if not torch.cuda.is_available():
        result = [None]

        def replay():
            result[0] = call()
        return replay, result
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = [call()]
    return graph.replay, result


def timed(call, trials, repeats):
    """(median, spread) of a call in milliseconds."""
    on_gpu = torch.cuda.is_available()
    times = []
    for _ in range(trials + 1):  # the first is not counted
        if on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        if on_gpu:
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / repeats)
        else:
            times.append(1e3 * (time.perf_counter() - started) / repeats)
    return statistics.median(times[1:]), max(times[1:]) - min(times[1:])


def measure(model, entries, way, pieces, row):
    """Adds a way's figures to a row."""
    ways = attentions(model)
    if way == "eager":
        ways = dict(list(ways.items())[:1])
    for name, (backend, attend) in ways.items():
        def call(backend=backend, attend=attend):
            with sdpa_kernel(backend):
                return step(model, entries, attend, pieces)

        try:
            if way == "eager":
                error = error_of(model, entries, call)
                ms, spread = timed(call, trials=9, repeats=1)
            else:
                model.restart(entries)
                replay, result = as_graph(call)

                def run(replay=replay, result=result):
                    replay()
                    return result[0]
                error = error_of(model, entries, run)
                ms, spread = timed(replay, trials=15, repeats=8)
        except Exception as problem:  # another way may still go well
            text = f"{type(problem).__name__}: {problem}".splitlines()[0][:160]
            say(f"{model.name}, {entries}: {way}, {name}: {text}")
            row.setdefault("errors", {})[f"{way}, {name}"] = text
            continue
        say(f"{model.name}, {entries}: {way}, {name}: {ms:.3f} ms, error {error:.2e}")
        if error > BOUND:
            text = f"logits or cache differ by {error:.3g}"
            row.setdefault("errors", {})[f"{way}, {name}"] = text
        elif ms < row.get(f"{way}_ms", math.inf):
            row |= {f"{way}_ms": ms, f"{way}_spread_ms": spread, f"{way}_error": error,
                    f"{way}_attention": name}


def say(text):
    print(f"decoder_step_torch: {text}", file=sys.stderr, flush=True)


def run_sluice(program):
    """Steps of decoder_bench by (model, entries); its own lines go to stderr."""
    done = subprocess.run([program, "--case", "step"], capture_output=True, text=True, check=False,
                          timeout=120)
    sys.stderr.write(done.stdout + done.stderr)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(row["model"], row["entries"]): row["ms"] for row in rows
            if row["bench"] == "decoder_step" and row["overlap"]}


def commit_of_folder():
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                          check=False, cwd=pathlib.Path(__file__).parent)
    return done.stdout.strip()


def finished(row, runs):
    """The row with its best way and the ratio to sluice's steps of one or two runs."""
    known = {way: row[f"{way}_ms"] for way in WAYS if f"{way}_ms" in row}
    if known:
        row["best"] = min(known, key=known.get)
        row["best_ms"] = known[row["best"]]
    ours = [steps[row["model"], row["entries"]] for steps in runs
            if (row["model"], row["entries"]) in steps]
    if ours:
        row["sluice_runs_ms"], row["sluice_ms"] = ours, statistics.mean(ours)
        if known:
            row["ratio"] = row["best_ms"] / row["sluice_ms"]
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value
            for key, value in row.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sluice", metavar="PROGRAM",
                        help="cuda_decoder_bench: run before and after, and ratios to it")
    parser.add_argument("--geometry", choices=GEOMETRIES, action="append",
                        help="default: llama-2-7b and llama-3-8b; tiny is for --device cpu")
    parser.add_argument("--ways", default=",".join(WAYS), help="default: %(default)s")
    parser.add_argument("--budget", type=float, default=240, metavar="SECONDS",
                        help="no way of a geometry is begun after so many (default %(default)s)")
    parser.add_argument("--commit", help="of sluice, for the rows (default: this folder's)")
    parser.add_argument("--machine", help="for the rows (default: the GPU's name)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="cpu: whether the script runs at all")
    options = parser.parse_args()
    ways = options.ways.split(",")
    if unknown := set(ways) - set(WAYS):
        parser.error(f"--ways: {', '.join(unknown)}: expected some of {', '.join(WAYS)}")
    begin = time.monotonic()

    def ours():
        try:
            return [run_sluice(options.sluice)] if options.sluice else []
        except (OSError, subprocess.TimeoutExpired) as error:
            say(error)
            return []

    runs = ours()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.config.recompile_limit = 64  # one for each way and geometry
    device_name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    meta = {"machine": options.machine or device_name,
            "commit": options.commit or commit_of_folder(), "torch": torch.__version__,
            "weights": "random"}
    with torch.no_grad():
        models = [Model(name, options.device)
                  for name in options.geometry or ("llama-2-7b", "llama-3-8b")]
        rows = {(model.name, entries): {"bench": "decoder_step_torch", "model": model.name,
                                        "type": "bf16", "entries": entries}
                for model in models for entries in model.shape.entries}
        try:
            # Ways outermost: what is cut short is missing everywhere.
            for way in ways:
                for model in models:
                    if time.monotonic() - begin > options.budget:
                        say(f"no time for {model.name}: {way}")
                        continue
                    pieces = (start, between, finish)
                    if WAYS[way] is not None:
                        pieces = [torch.compile(piece, dynamic=False, fullgraph=True,
                                                options=WAYS[way]) for piece in pieces]
                    for entries in model.shape.entries:
                        measure(model, entries, way, pieces, rows[model.name, entries])
                    say(f"{model.name}: {way} done at {time.monotonic() - begin:.0f} s")
        except KeyboardInterrupt:
            say("stopped; what there is follows")
        models = model = None
    if options.device == "cuda":
        torch.cuda.empty_cache()
    runs += ours()
    for row in rows.values():
        print(json.dumps(finished(row, runs) | {"meta": meta}), flush=True)
    return 1 if any("errors" in row for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
