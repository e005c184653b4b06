#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""sluice and llama.cpp in turns, on the same weights, threads and tasks.

    python3 bench/versus_llama_cpp.py --model MODEL.gguf [--types Q8_0 Q4_0 BF16] [--threads 2]
                               [--program build/bench/speed_bench] [--output bench/results]

Needs the package llama-cpp-python (a build for this processor: CMAKE_ARGS=-DGGML_NATIVE=ON). From
the model, one file a weight type is made (llama.cpp's own quantiser, all matrices of one type) in
--work. Each round runs both programs on each task, one after the other, because the machine drifts;
a row's figures are medians over rounds, the ratio is the median of the rounds' ratios with its range.

  decode:N   ms a token behind N cached tokens, f16 keys and values, flash attention on
  prefill:N  tokens a second of reading N tokens at once
  ttft:N     the same and the first token, ms
  endless:N  N tokens in the steady state of a context of 1,024 with 4 kept. llama.cpp drops half of
             the rest and shifts when the context is full (as its programs do); with --evict-one
             beside it also one token a step, which is what attention sinks + window means. sluice
             keeps 4 sinks + 1,020 keys: it has no shift.

With --steps OURS THEIRS instead of tasks: the distribution of single steps of the endless stream, for
each weight type OURS steps of sluice and THEIRS of llama.cpp a round (its steps take longer), written to
OUTPUT/llama_cpp_steps_tTHREADS.jsonl; plot.py draws both beside each other.

Nothing is asserted here. Writes OUTPUT/llama_cpp_tTHREADS.jsonl and prints a table.
"""

import argparse
import ctypes
import json
import pathlib
import statistics
import subprocess
import sys
import time

CONTEXT, KEEP = 1024, 4


# ---- the peer, in a process of its own ---------------------------------------------------------

class Peer:
    """llama.cpp through its C interface."""

    def __init__(self, model, threads, context):
        import llama_cpp  # only the worker needs it
        self.api = llama_cpp
        llama_cpp.llama_backend_init()
        begin = time.perf_counter()
        self.model = llama_cpp.llama_model_load_from_file(
            model.encode(), llama_cpp.llama_model_default_params())
        self.load_ms = (time.perf_counter() - begin) * 1e3
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = 1
        params.type_k = params.type_v = 1  # f16
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp made no context for {model}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.memory = llama_cpp.llama_get_memory(self.context)

    def tokens(self, count):
        """Any tokens: times do not depend on which."""
        return [(7919 * i + 13) % self.vocab for i in range(count)]

    def feed(self, tokens):
        """Appends tokens; logits of the last."""
        for first in range(0, len(tokens), 512):
            chunk = tokens[first:first + 512]
            array = (self.api.llama_token * len(chunk))(*chunk)
            if self.api.llama_decode(self.context,
                                     self.api.llama_batch_get_one(array, len(chunk))) != 0:
                raise RuntimeError("llama_decode failed")

    def best(self):
        """The most likely token, as greedy sampling takes it."""
        logits = self.api.llama_get_logits_ith(self.context, -1)
        import numpy
        return int(numpy.ctypeslib.as_array(logits, shape=(self.vocab,)).argmax())

    def reset(self):
        self.api.llama_memory_clear(self.memory, True)

    def step(self, token):
        """Feeds a token and predicts the next; milliseconds and the token."""
        begin = time.perf_counter()
        self.feed([token])
        token = self.best()
        return (time.perf_counter() - begin) * 1e3, token


def peak_resident_mb():
    """Peak of this process alone: a child inherits ru_maxrss of who started it across exec."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def peer_task(model, threads, name, count):
    """Milliseconds, and the time to load."""
    if name == "decode":
        peer = Peer(model, threads, count + 64)
        peer.feed(peer.tokens(max(count, 1)))
        token, times = peer.best(), []
        for _ in range(50):
            ms, token = peer.step(token)
            times.append(ms)
        return times[2:], peer.load_ms
    if name in ("prefill", "ttft"):
        peer = Peer(model, threads, count + 64)
        times = []
        for _ in range(3):
            peer.reset()
            begin = time.perf_counter()
            peer.feed(peer.tokens(count))
            if name == "ttft":
                peer.best()
            times.append((time.perf_counter() - begin) * 1e3)
        return times, peer.load_ms
    peer = Peer(model, threads, CONTEXT)
    peer.feed(peer.tokens(CONTEXT - 1))
    token, times, past = peer.best(), [], CONTEXT - 1
    for _ in range(count):
        begin = time.perf_counter()
        if past + 1 > CONTEXT - 1:
            discard = 1 if name == "evict-one" else (past - KEEP) // 2
            peer.api.llama_memory_seq_rm(peer.memory, 0, KEEP, KEEP + discard)
            peer.api.llama_memory_seq_add(peer.memory, 0, KEEP + discard, past, -discard)
            past -= discard
        peer.feed([token])
        token = peer.best()
        past += 1
        times.append((time.perf_counter() - begin) * 1e3)
    return times, peer.load_ms


def worker(arguments):
    """Prints one JSON object for each task."""
    silence = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
        lambda *_: None)
    import llama_cpp
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    for task in arguments.tasks:
        name, count = task.split(":")
        times, load_ms = peer_task(str(arguments.model), arguments.threads, name, int(count))
        peak = peak_resident_mb()
        print(json.dumps({"task": task, "load_ms": load_ms, "peak_resident_mb": peak,
                          "ms": times}), flush=True)


def convert(source, target, kind):
    """One file with all matrices of one type, by llama.cpp's own quantiser."""
    import llama_cpp
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {"F32": llama_cpp.LLAMA_FTYPE_ALL_F32,
                    "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
                    "BF16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
                    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
                    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
                    "Q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1}[kind]
    params.allow_requantize = True
    params.pure = True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(),
                                      ctypes.byref(params)) != 0:
        raise SystemExit(f"llama.cpp could not make {target}")


# ---- the comparison ----------------------------------------------------------------------------

def lines_of(command):
    """JSON lines that a program prints."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def quantile(values, q):
    """Nearest rank."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def compare(options, kind, model):
    """One record for each task."""
    rounds = []
    for number in range(options.rounds):
        print(f"{kind}: round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
        for task in options.tasks:
            ours_task = task.replace("evict-one", "endless")
            ours = lines_of([str(options.program), str(model), str(options.threads),
                             *(["int8"] if options.activations == "int8" else []), ours_task])[0]
            theirs = lines_of([sys.executable, __file__, "--worker", "--model", str(model),
                               "--threads", str(options.threads), "--tasks", task])[0]
            rounds.append((task, ours, theirs))
    for task in options.tasks:
        pairs = [(ours, theirs) for name, ours, theirs in rounds if name == task]
        medians = [(statistics.median(o["ms"]), statistics.median(t["ms"])) for o, t in pairs]
        ratios = [t / o for o, t in medians]
        tail = {side: [max(quantile(p[index]["ms"], q) for p in pairs) for q in (0.99, 0.999, 1)]
                for index, side in enumerate(("sluice", "llama_cpp"))}
        yield {"kind": "versus", "weights": kind, "task": task, "threads": options.threads,
               "activations": options.activations,
               "sluice_ms": statistics.median(o for o, _ in medians),
               "llama_cpp_ms": statistics.median(t for _, t in medians),
               "ratio": statistics.median(ratios), "ratio_min": min(ratios),
               "ratio_max": max(ratios),
               "sluice_p99_p999_max_ms": tail["sluice"],
               "llama_cpp_p99_p999_max_ms": tail["llama_cpp"],
               "sluice_load_ms": statistics.median(o["load_ms"] for o, _ in pairs),
               "llama_cpp_load_ms": statistics.median(t["load_ms"] for _, t in pairs),
               "sluice_peak_mb": max(o["peak_resident_mb"] for o, _ in pairs),
               "llama_cpp_peak_mb": max(t["peak_resident_mb"] for _, t in pairs)}


# How rare a step is: the share of steps that take longer.
SHARES = [10 ** (-power / 10) for power in range(0, 51)]
TRACE = 1200  # steps shown one by one: two of llama.cpp's shifts


def distribution(program, kind, threads, rounds):
    """One record of the steps of all rounds together."""
    steps = sorted(ms for times in rounds for ms in times)
    count = len(steps)
    shares = [share for share in SHARES if share * count >= 1]
    return {"kind": "steps", "program": program, "weights": kind, "threads": threads,
            "steps": count, "median_ms": statistics.median(steps),
            "p99_ms": quantile(steps, 0.99), "p999_ms": quantile(steps, 0.999),
            "max_ms": steps[-1], "median_ms_of_rounds": [statistics.median(t) for t in rounds],
            "p999_ms_of_rounds": [quantile(t, 0.999) for t in rounds],
            "share_slower": shares,
            "slower_than_ms": [steps[max(0, count - max(1, round(share * count)))]
                               for share in shares],
            "trace_ms": [round(ms, 3) for ms in rounds[0][:TRACE]]}


def compare_steps(options, kind, model):
    """One record for each program, their rounds in turns."""
    ours, theirs = [], []
    for number in range(options.rounds):
        print(f"{kind}: round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
        ours.append(lines_of(
            [str(options.program), str(model), str(options.threads),
             *(["int8"] if options.activations == "int8" else []),
             f"endless:{options.steps[0]}"])[0]["ms"])
        theirs.append(lines_of(
            [sys.executable, __file__, "--worker", "--model", str(model), "--threads",
             str(options.threads), "--tasks", f"endless:{options.steps[1]}"])[0]["ms"])
    return [distribution("sluice", kind, options.threads, ours),
            distribution("llama.cpp", kind, options.threads, theirs)]


def print_steps(records):
    """One row a program."""
    print("| weights | program | steps | median | p99 | p99.9 | p99.9 / median | max |")
    print("|---" * 8 + "|")
    for r in records:
        print(f"| {r['weights']} | {r['program']} | {r['steps']:,} | {r['median_ms']:.2f} ms | "
              f"{r['p99_ms']:.2f} | {r['p999_ms']:.2f} | {r['p999_ms'] / r['median_ms']:.2f} | "
              f"{r['max_ms']:.1f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q4_0", "BF16"],
                        choices=["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
    parser.add_argument("--tasks", nargs="+",
                        default=["decode:1", "decode:1024", "decode:4096", "prefill:512",
                                 "ttft:512", "endless:1100", "evict-one:60"])
    parser.add_argument("--steps", type=int, nargs=2, metavar=("OURS", "THEIRS"),
                        help="the distribution of this many endless steps a round, not the tasks")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--activations", choices=["int8", "float32"], default="int8",
                        help="of sluice where weights are quantised (llama.cpp's are 8 bits)")
    parser.add_argument("--program", type=pathlib.Path,
                        default=pathlib.Path("build/bench/speed_bench"))
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("build/bench"),
                        help="folder for the converted models")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("bench/results"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    from experiments import commit, machine
    import llama_cpp
    meta = {"machine": machine(), "commit": commit(), "llama_cpp_python": llama_cpp.__version__,
            "rounds": options.rounds}
    records = []
    for kind in options.types:
        model = options.work / f"{options.model.stem}.{kind}-only.gguf"
        if not model.exists():
            convert(options.model, model, kind)
        made = (compare_steps if options.steps else compare)(options, kind, model)
        records += [record | {"meta": meta} for record in made]
    options.output.mkdir(parents=True, exist_ok=True)
    name = "llama_cpp_steps" if options.steps else "llama_cpp"
    path = options.output / f"{name}_t{options.threads}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    if options.steps:
        print_steps(records)
        return
    print("| weights | task | llama.cpp, ms | sluice, ms | ratio (min to max) | p99.9: llama.cpp, "
          "sluice | peak MB: llama.cpp, sluice |")
    print("|---" * 7 + "|")
    for r in records:
        print(f"| {r['weights']} | {r['task']} | {r['llama_cpp_ms']:.2f} | {r['sluice_ms']:.2f} | "
              f"{r['ratio']:.2f} ({r['ratio_min']:.2f} to {r['ratio_max']:.2f}) | "
              f"{r['llama_cpp_p99_p999_max_ms'][1]:.1f}, {r['sluice_p99_p999_max_ms'][1]:.1f} | "
              f"{r['llama_cpp_peak_mb']:.0f}, {r['sluice_peak_mb']:.0f} |")


if __name__ == "__main__":
    main()
