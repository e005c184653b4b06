#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Runs the experiments of the README with the stream_text program and writes their JSON lines.

    python3 bench/experiments.py --program build/examples/01_stream_text/stream_text \\
        --model MODEL.gguf --prose PROSE.txt [--tiny TINY.gguf] [--only NAME ...]
        [--output bench/results]

Experiments (each writes OUTPUT/NAME.jsonl; bench/plot.py draws them, --table prints the README's
tables from files that exist):

  perplexity       full, window and sinks + window over --tokens tokens of prose at each of --sizes
                   (cache entries a token sees, itself included: 4 sinks + the rest, or all window),
                   f16 keys and values, positions in the cache
  recompute        the recomputed window and sinks + window over --recompute-tokens of the prose,
                   scoring every --score-every-th token only: the same tokens for both
  recompute_ratio  milliseconds a token of both, from single steps in the steady state
  endless          --tiny-tokens tokens written by the tiny model and --model-tokens by the real one:
                   step latency and resident memory by tenths
  ttft             time to first token by prompt length, from the moment at which reading the
                   prompt begins (it is all there) to the first token; median of five

Nothing is asserted here: these are measurements. Run on a quiet machine.
"""

import argparse
import json
import math
import os
import pathlib
import platform
import subprocess
import sys

SINKS = 4


def machine():
    """What the numbers were measured on."""
    name = platform.machine()
    for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    return f"{name}, {os.cpu_count()} cores"


def commit():
    """The commit that is measured, with a plus when files differ from it."""
    here = pathlib.Path(__file__).resolve().parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, text=True,
                          capture_output=True, check=False).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "--", "../include", "../examples"],
                             cwd=here, text=True, capture_output=True, check=False).stdout.strip()
    return (head or "unknown") + ("+" if changed else "")


class Runner:
    """Runs stream_text and keeps what it reports."""

    def __init__(self, options):
        self.options = options
        self.meta = {"machine": machine(), "commit": commit(), "threads": options.threads}

    def run(self, model, *arguments, text=None):
        """The last JSON object that the program prints."""
        command = [str(self.options.program), "-m", str(model), "--format", "json",
                   "-t", str(self.options.threads), *map(str, arguments)]
        print("+", " ".join(command), file=sys.stderr, flush=True)
        done = subprocess.run(command, input=text, text=True, stdout=subprocess.PIPE, check=True,
                              stderr=None if self.options.verbose else subprocess.DEVNULL)
        return json.loads(done.stdout.splitlines()[-1])

    def write(self, name, records):
        """One file an experiment."""
        self.options.output.mkdir(parents=True, exist_ok=True)
        path = self.options.output / f"{name}.jsonl"
        lines = []
        for record in records:
            setting = record.pop("meta", {})
            setting = setting.get("setting", setting)
            kept = {key: setting[key] for key in
                    ("family", "weight_types", "position", "keys", "kv_type", "chunk",
                     "temperature", "seed") if key in setting}
            for key in ("inter_token_ms", "decode_tokens_per_s", "prefill_tokens_per_s",
                        "cache_bytes", "peak_resident_bytes"):
                if key in record.get("report", {}):
                    kept[key] = record["report"][key]
            record.pop("report", None)
            if "model" in record:
                record["model"] = pathlib.Path(record["model"]).name
            lines.append(json.dumps(record | {"meta": self.meta | kept}))
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"wrote {path}", file=sys.stderr)


def sink_window(size):
    """A query of this cache sees `size` entries, itself included."""
    return ["--policy", "sink-window", "--sinks", SINKS, "--window", size - SINKS]


def perplexity(runner, options):
    """Every policy at every size over the whole prose."""
    base = ["--perplexity", options.prose, "-n", options.tokens, "--ppl-stride", 1024]
    runs = []
    for size in options.sizes:
        runs += [sink_window(size), ["--policy", "window", "--window", size]]
    runs.append(["--policy", "full", "--capacity", options.tokens])
    for run in runs:
        yield runner.run(options.model, *base, *run)


def recompute(runner, options):
    """The recomputed window against sinks + window on the same scored tokens."""
    base = ["--perplexity", options.prose, "-n", options.recompute_tokens,
            "--score-every", options.score_every]
    for size in options.sizes:
        yield runner.run(options.model, *base, *sink_window(size))
        yield runner.run(options.model, *base, "--policy", "recompute", "--window", size)


def recompute_ratio(runner, options):
    """Latency of a step in the steady state, both ways."""
    text = options.prose.read_text(encoding="utf-8")
    for size in (256, 512, 1024, 2048):
        prompt = text[:8 * size]  # more tokens than the window holds
        base = ["-f", "-", "--ignore-eos", "--temp", 1, "--seed", 1]
        fast = runner.run(options.model, *base, *sink_window(size), "-n", 201, text=prompt)
        steps = 6 if size >= 1024 else 11
        slow = runner.run(options.model, *base, "--policy", "recompute", "--window", size,
                          "-n", steps, text=prompt)
        yield {"kind": "recompute_ratio", "window": size, "model": str(options.model),
               "recompute_ms": slow["inter_token_ms"]["p50"],
               "sink_window_ms": fast["inter_token_ms"]["p50"], "meta": fast["setting"]}


def endless(runner, options):
    """Long streams: tenths of latency and memory."""
    log = options.output / "latency.json"
    options.output.mkdir(parents=True, exist_ok=True)
    # Temperature keeps a stream from falling into a loop; its text is not judged here.
    base = ["-p", "The", "--ignore-eos", "--temp", 1, "--seed", 1, "--latency-log", log]
    for model, tokens, window in ((options.tiny, options.tiny_tokens, 252),
                                  (options.model, options.model_tokens, 1020)):
        if model is None or tokens == 0:
            continue
        report = runner.run(model, *base, "-n", tokens, "--sinks", SINKS, "--window", window)
        record = json.loads(log.read_text(encoding="utf-8"))
        log.unlink()
        yield record | {"report": report}


def ttft(runner, options):
    """Time to first token by prompt length."""
    text = options.prose.read_text(encoding="utf-8")
    for length in (16, 64, 128, 256, 512, 1024, 2048, 4096):
        for _ in range(5 if length <= 1024 else 3):
            report = runner.run(options.model, "-f", "-", "-n", 1, *sink_window(1024),
                                text=text[:length * 4])
            yield {"kind": "ttft", "prompt_tokens": report["tokens_read"],
                   "ms": report["ttft_from_first_input_ms"]["p50"], "policy": "sink-window",
                   "model": str(options.model), "meta": report["setting"]}


EXPERIMENTS = {"perplexity": perplexity, "recompute": recompute,
               "recompute_ratio": recompute_ratio, "endless": endless, "ttft": ttft}


def load(options, name):
    """Records of an experiment that has been run."""
    path = options.output / f"{name}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def size_of(record):
    """Entries that a token sees, itself included."""
    return None if record["window"] is None else record["sinks"] + record["window"]


def print_tables(options):
    """The README's tables, from the files."""
    records = load(options, "perplexity")
    if records:
        sizes = sorted({size_of(r) for r in records} - {None})
        print(f"| perplexity over {records[0]['tokens'][-1]} tokens | "
              + " | ".join(map(str, sizes)) + " |")
        print("|---" * (len(sizes) + 1) + "|")
        for policy in ("sink-window", "window"):
            row = {size_of(r): r["ppl"][-1] for r in records if r["policy"] == policy}
            print(f"| {policy} | " + " | ".join(f"{row[s]:.2f}" for s in sizes) + " |")
        for record in records:
            if record["policy"] == "full":
                print(f"| full (all {record['tokens'][-1]} kept) | {record['ppl'][-1]:.2f} |")
        print()
    records = load(options, "recompute")
    if records:
        sizes = sorted({size_of(r) for r in records})
        print(f"| perplexity of every {records[0]['score_every']}th token, {records[0]['scored']} "
              "tokens | " + " | ".join(map(str, sizes)) + " |")
        print("|---" * (len(sizes) + 1) + "|")
        for policy in ("recompute", "sink-window"):
            row = {size_of(r): math.exp(r["nll_mean"]) for r in records if r["policy"] == policy}
            print(f"| {policy} | " + " | ".join(f"{row[s]:.2f}" for s in sizes) + " |")
        print()
    records = load(options, "recompute_ratio")
    if records:
        print("| ms per token | " + " | ".join(str(r["window"]) for r in records) + " |")
        print("|---" * (len(records) + 1) + "|")
        print("| recompute | " + " | ".join(f"{r['recompute_ms']:.0f}" for r in records) + " |")
        print("| sink-window | "
              + " | ".join(f"{r['sink_window_ms']:.2f}" for r in records) + " |")
        print("| ratio | " + " | ".join(
            f"{r['recompute_ms'] / r['sink_window_ms']:.0f}x" for r in records) + " |")
        print()
    for record in load(options, "endless"):
        bins = record["bins"]
        second, last = bins[1], bins[-1]
        worst = max(b["p999_us"] / b["median_us"] for b in bins)
        print(f"{record['model']}, {bins[-1]['to']} tokens: step median {second['median_us']:.1f} us "
              f"in the second tenth, {last['median_us']:.1f} us in the last "
              f"({100 * (last['median_us'] / second['median_us'] - 1):+.1f}%); resident "
              f"{second['rss_bytes'] / 1e6:.2f} MB, {last['rss_bytes'] / 1e6:.2f} MB "
              f"({100 * (last['rss_bytes'] / second['rss_bytes'] - 1):+.2f}%); "
              f"p99.9 / median at most {worst:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=pathlib.Path,
                        default=pathlib.Path("build/examples/01_stream_text/stream_text"))
    parser.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--tiny", type=pathlib.Path)
    parser.add_argument("--prose", type=pathlib.Path, help="from bench/austen.py")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("bench/results"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=40960)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--recompute-tokens", type=int, default=12288)
    parser.add_argument("--score-every", type=int, default=128)
    parser.add_argument("--tiny-tokens", type=int, default=1_000_000)
    parser.add_argument("--model-tokens", type=int, default=50_000)
    parser.add_argument("--only", nargs="+", choices=sorted(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--table", action="store_true", help="only print the tables")
    parser.add_argument("--verbose", action="store_true", help="show what stream_text says")
    options = parser.parse_args()
    if not options.table:
        for name in ("model", "prose"):
            if getattr(options, name) is None:
                parser.error(f"--{name} is needed to measure")
        runner = Runner(options)
        for name in options.only:
            runner.write(name, EXPERIMENTS[name](runner, options))
    print_tables(options)


if __name__ == "__main__":
    main()
