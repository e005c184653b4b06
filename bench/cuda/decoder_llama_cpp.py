#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Times llama.cpp's decoders on the GPU beside decoder_bench, with the same types of weights.

usage: decoder_llama_cpp.py --llama-bench PROGRAM [--sluice PROGRAM] [--geometry NAME]...
                            [--types TYPE,TYPE,...] [--folder FOLDER] [--repetitions N]
                            [--budget SECONDS] [--commit TEXT] [--machine TEXT] [--version TEXT]

llama-bench is llama.cpp's own program, built with -DGGML_CUDA=ON. Per geometry and type a GGUF file
of random levels is made in --folder (up to 9 GB for the quantised ones, removed again), all matrices
of that type, with no vocabulary. Needs numpy.

  step     one token behind a cache of so many entries: llama-bench generates the last 128 of them,
           so that its cache, rounded up to 256, has as many rows as sluice reads. Its time is the
           host's clock over whole steps, logits brought to the host, no token chosen; sluice's is
           that of replays of a graph that chooses the token, on a full cache with 4 sinks, each step
           evicting.
  prefill  4,096 tokens, nothing evicted. llama-bench with micro-batches of 512 and 1,024, the
           faster one counts; sluice in chunks of 2,048.

llama.cpp rounds activations to 8-bit integers before products with quantised weights and keeps keys
and values in f16; sluice keeps activations in float32 in single steps and rounds them to bf16 for
chunks, keys and values in bf16. Both run flash attention and all layers on the GPU.

sluice's program runs before llama-bench, and its steps again behind it. One JSON object per case on
stdout: milliseconds, medians; `ratio` is llama.cpp's time over sluice's. What goes on is told on
stderr. Exit status 1 if a case of llama.cpp's is missing.
"""

import argparse
import json
import math
import pathlib
import statistics
import struct
import subprocess
import sys
import time
import typing

import numpy


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
    "tiny": Geometry(320, 256, 512, 4, 2, 64, 2, (256, 512)),
}
GENERATED, PROMPT, MICRO_BATCHES = 128, 4096, (512, 1024)
# ggml's number of a type, elements and bytes of a block.
TYPES = {"bf16": (30, 1, 2), "q8_0": (8, 32, 34), "q4_0": (2, 32, 18)}
F32, ALIGNMENT = 0, 32


# --- A model file ----------------------------------------------------------------------------------


def random_blocks(kind, cols, random, count=1 << 20):
    """Bytes of so many blocks of a matrix with `cols` columns; weights have variance 1 / cols."""
    _, elements, size = TYPES[kind]
    if kind == "bf16":
        wide = random.standard_normal(count, dtype=numpy.float32) / numpy.float32(cols ** 0.5)
        return (wide.view(numpy.uint32) >> 16).astype(numpy.uint16).tobytes()
    levels = 256 if kind == "q8_0" else 16
    blocks = numpy.frombuffer(bytearray(random.bytes(count * size)), numpy.uint8)
    blocks = blocks.reshape(count, size)
    scale = numpy.float16(((levels ** 2 - 1) / 12 * cols) ** -0.5)
    blocks[:, :2] = numpy.frombuffer(scale.tobytes(), numpy.uint8)
    return blocks.tobytes()


def tensors(g):
    """(name, rows or None for a norm, cols) in the order of the file."""
    query, kv = g.heads * g.head_dim, g.kv_heads * g.head_dim
    yield "token_embd.weight", g.vocab, g.hidden
    for layer in range(g.layers):
        for name, rows, cols in (
                ("attn_norm", None, g.hidden), ("attn_q", query, g.hidden), ("attn_k", kv, g.hidden),
                ("attn_v", kv, g.hidden), ("attn_output", g.hidden, query),
                ("ffn_norm", None, g.hidden), ("ffn_gate", g.feed_forward, g.hidden),
                ("ffn_up", g.feed_forward, g.hidden), ("ffn_down", g.hidden, g.feed_forward)):
            yield f"blk.{layer}.{name}.weight", rows, cols
    yield "output_norm.weight", None, g.hidden
    yield "output.weight", g.vocab, g.hidden


def write_model(path, name, kind):
    """A GGUF file, version 3 (little-endian; the format's names are those of its specification)."""
    g = GEOMETRIES[name]
    number, elements, size = TYPES[kind]

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    values = [("general.architecture", "llama"), ("general.name", f"random {name}"),
              ("general.quantization_version", 2), ("llama.vocab_size", g.vocab),
              ("llama.context_length", 2 * max(g.entries)), ("llama.embedding_length", g.hidden),
              ("llama.block_count", g.layers), ("llama.feed_forward_length", g.feed_forward),
              ("llama.attention.head_count", g.heads),
              ("llama.attention.head_count_kv", g.kv_heads),
              ("llama.attention.layer_norm_rms_epsilon", 1e-5),
              ("llama.rope.dimension_count", g.head_dim), ("llama.rope.freq_base", 500000.0),
              ("tokenizer.ggml.model", "no_vocab")]
    entries = list(tensors(g))
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(entries), len(values))
    for key, value in values:
        head += text(key) + (struct.pack("<I", 8) + text(value) if isinstance(value, str)
                             else struct.pack("<II", 4, value) if isinstance(value, int)
                             else struct.pack("<If", 6, value))
    sizes, offset = [], 0
    for tensor, rows, cols in entries:
        shape = (cols,) if rows is None else (cols, rows)
        length = 4 * cols if rows is None else rows * cols // elements * size
        head += text(tensor) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape,
                                           F32 if rows is None else number, offset)
        sizes.append(length)
        offset += -(-length // ALIGNMENT) * ALIGNMENT
    random = numpy.random.default_rng(1)
    pools = {cols: random_blocks(kind, cols, random) for _, rows, cols in entries if rows}
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % ALIGNMENT))
        for (_, rows, cols), length in zip(entries, sizes):
            if rows is None:
                file.write(numpy.ones(cols, numpy.float32).tobytes())
            else:
                whole, rest = divmod(length, len(pools[cols]))
                for _ in range(whole):
                    file.write(pools[cols])
                file.write(memoryview(pools[cols])[:rest])
            file.write(bytes(-length % ALIGNMENT))


# --- The two programs ------------------------------------------------------------------------------


def say(text):
    print(f"decoder_llama_cpp: {text}", file=sys.stderr, flush=True)


def lines_of(command, seconds):
    """The JSON objects that a program prints; its other output and its failure are told."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired) as error:
        say(error)
        return []
    if done.returncode != 0:
        say(f"{command[0]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def run_sluice(program, types, tasks):
    """Milliseconds by (task, model, type, size)."""
    chosen = [word for kind in types for word in ("--weights", kind)]
    found = {}
    for task in tasks:
        for row in lines_of([program, "--case", task, *chosen], 200):
            say(json.dumps(row))
            if row["bench"] == "decoder_step" and row["overlap"]:
                found["step", row["model"], row["type"], row["entries"]] = row["ms"]
            elif row["bench"] == "decoder_prefill" and row["prompt"] == row["window"] == PROMPT:
                found["prefill", row["model"], row["type"], row["prompt"]] = row["ms"]
    return found


def run_llama_bench(program, model, entries, repetitions):
    """Yields (task, size, milliseconds, spread, its row)."""
    common = [program, "-m", str(model), "-ngl", "99", "-fa", "1", "-o", "jsonl", "-b", "2048",
              "-r", str(repetitions)]
    depths = ",".join(str(size - GENERATED) for size in entries)
    rows = lines_of([*common, "-p", "0", "-n", str(GENERATED), "-d", depths, "-ub", "1024"], 200)
    rows += lines_of([*common, "-p", str(PROMPT), "-n", "0", "-ub",
                      ",".join(map(str, MICRO_BATCHES))], 200)
    for row in rows:
        if "CUDA" not in row["backends"] or not row["gpu_info"]:
            raise RuntimeError(f"llama-bench found no GPU (backends: {row['backends']})")
        step = row["n_gen"] > 0
        times = [1e-6 * sample / (GENERATED if step else 1) for sample in row["samples_ns"]]
        size = row["n_depth"] + GENERATED if step else row["n_prompt"]
        yield ("step" if step else "prefill", size, statistics.median(times),
               max(times) - min(times), row)


def measure(name, kind, options, cases):
    """Adds llama.cpp's figures of a model to `cases`: the faster row of each."""
    path = options.folder / f"random-{name}-{kind}.gguf"
    try:
        write_model(path, name, kind)
        for task, size, ms, spread, row in run_llama_bench(
                options.llama_bench, path, GEOMETRIES[name].entries, options.repetitions):
            say(f"{name}, {kind}, {task}, {size}, micro-batch {row['n_ubatch']}: {ms:.3f} ms, "
                f"spread {spread:.3f}")
            case = cases.setdefault((task, name, kind, size), {})
            if ms < case.get("llama_cpp_ms", math.inf):
                meta = {"machine": options.machine or row["gpu_info"],
                        "commit": options.commit or commit_of_folder(),
                        "llama_cpp": options.version or row["build_number"], "weights": "random"}
                case |= {"llama_cpp_ms": ms, "llama_cpp_spread_ms": spread, "meta": meta}
                if task == "prefill":
                    case["micro_batch"] = row["n_ubatch"]
    finally:
        path.unlink(missing_ok=True)


def commit_of_folder():
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                          check=False, cwd=pathlib.Path(__file__).parent)
    return done.stdout.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-bench", required=True, metavar="PROGRAM")
    parser.add_argument("--sluice", metavar="PROGRAM",
                        help="cuda_decoder_bench: run before and after, and ratios to it")
    parser.add_argument("--geometry", choices=GEOMETRIES, action="append",
                        help="default: llama-2-7b and llama-3-8b; tiny is a quick try")
    parser.add_argument("--types", default="q8_0,q4_0",
                        help="of bf16, q8_0, q4_0 (default %(default)s)")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("/dev/shm"),
                        help="for the model files, one at a time (default %(default)s)")
    parser.add_argument("--repetitions", type=int, default=5,
                        help="of llama-bench (default %(default)s)")
    parser.add_argument("--budget", type=float, default=600, metavar="SECONDS",
                        help="no model is begun after so many (default %(default)s)")
    parser.add_argument("--commit", help="of sluice, for the rows (default: this folder's)")
    parser.add_argument("--machine", help="for the rows (default: the GPU as llama.cpp names it)")
    parser.add_argument("--version", help="of llama.cpp, for the rows (default: its build number)")
    options = parser.parse_args()
    types = options.types.split(",")
    if unknown := set(types) - set(TYPES):
        parser.error(f"--types: {', '.join(unknown)}: expected some of {', '.join(TYPES)}")
    names = options.geometry or ["llama-2-7b", "llama-3-8b"]
    begin = time.monotonic()

    def ours(*tasks):
        return [run_sluice(options.sluice, types, tasks)] if options.sluice else []

    runs = ours("step", "prefill")
    cases = {}
    try:
        for name in names:
            for kind in types:
                if time.monotonic() - begin > options.budget:
                    say(f"no time for {name}, {kind}")
                    continue
                measure(name, kind, options, cases)
                say(f"{name}, {kind} done at {time.monotonic() - begin:.0f} s")
    except KeyboardInterrupt:
        say("stopped; what there is follows")
    runs += ours("step")
    for (task, name, kind, size), case in cases.items():
        row = {"bench": "decoder_llama_cpp", "task": task, "model": name, "type": kind,
               "entries" if task == "step" else "prompt": size} | case
        known = [run[task, name, kind, size] for run in runs if (task, name, kind, size) in run]
        if known:
            row |= {"sluice_ms": statistics.mean(known), "sluice_runs_ms": known}
            row["ratio"] = row["llama_cpp_ms"] / row["sluice_ms"]
        row["meta"] = row.pop("meta")  # last
        print(json.dumps({key: float(f"{value:.4g}") if isinstance(value, float) else value
                          for key, value in row.items()}), flush=True)
    expected = sum(len(GEOMETRIES[name].entries) + 1 for name in names) * len(types)
    return 0 if len(cases) == expected else 1


if __name__ == "__main__":
    sys.exit(main())
