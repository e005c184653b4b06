#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Draws the benchmark results as PNG and SVG. Needs matplotlib; reads files only, measures nothing.

    python3 bench/plot.py FILE... [--output bench/results]

Each FILE holds JSON lines in the schema below, or is the JSON of a Google Benchmark run
(--benchmark_format=json); several files are drawn together. Only pictures that have data are
written: perplexity, endless, recompute_ratio, ttft, overlap, switch, policies, passkey, versus,
steps, curves, streaminnc, decode_attention_cuda, decoder_cuda, prefill_attention_cuda,
recompute_cuda and, per benchmark program, its sweeps.

JSON lines: one object a line, empty lines and lines beginning with # ignored. `kind` decides:

  {"kind": "perplexity", "policy": "sink-window", "sinks": 4, "window": 508,
   "tokens": [1000, 2000], "ppl": [21.3, 20.9], "nll_mean": 3.04, "meta": {...}}
      policy    full | window | recompute | sink-window (another word becomes a line of its own)
      sinks     first tokens kept; 0 for the other policies
      window    most recent tokens kept; sinks + window is the cache size of the picture; null or 0
                for full
      tokens    tokens seen, rising; ppl: exp(mean negative log-likelihood) of all up to there
      nll_mean  natural logarithm, over the whole stream (optional, not drawn)

  {"kind": "endless", "model": "tiny", "policy": "sink-window", "sinks": 4, "window": 508,
   "bins": [{"from": 0, "to": 100000, "median_us": 80.1, "p99_us": 95, "p999_us": 140,
             "max_us": 900, "rss_bytes": 31000000}], "meta": {...}}
      bins      consecutive parts of the stream (tenths): tokens [from, to), latency of a step in
                microseconds, resident memory of the process at the bin's end in bytes
      a picture for each: records of one model are told apart by policy, cache, meta.threads and
      meta.commit, as far as they differ, or numbered

  {"kind": "recompute_ratio", "window": 256, "recompute_ms": 1500.0, "sink_window_ms": 14.0,
   "model": "...", "meta": {...}}
      window    cache size in tokens; milliseconds per token of both

  {"kind": "ttft", "prompt_tokens": 512, "ms": 900.0, "model": "...", "policy": "...",
   "meta": {...}}
      ms        from the start of reading the prompt to the first output; several records with
                equal prompt_tokens are repetitions: the median is drawn, the range shaded

  {"kind": "overlap", "way": "duplex", "threads_per_side": 1, "r": 0.9, "bound": 1.9,
   "speedup_over_sequential_x1": 1.6, "speedup_min": 1.5, "speedup_max": 1.7, "wall_ms": 900.0,
   "model": "...", "meta": {...}}
      way       sequential | duplex | interleaved | re-encoding; min and max only for duplex
      r         source work over target work, of the sequential run with one thread

  {"kind": "switch", "source_tokens": 1024, "snapshot_us_median": 0.7, "copying_ms": 2.3,
   "model": "...", "meta": {...}}

  {"kind": "policy", "policy": "h2o", "tokens": 20000, "budget": 512, "perplexity": 20.1,
   "entries": 512, "cache_bytes": 12000000, "step_ms": 4.9}
  {"kind": "passkey", "policy": "h2o", "passkey_depth": 0.25, "digits_recalled": 3, "tokens": 2000,
   "budget": 512}
      lines of the program policies --json

  {"kind": "versus", "weights": "Q8_0", "task": "decode:1024", "threads": 2, "sluice_ms": 5.1,
   "llama_cpp_ms": 10.4, "ratio": 2.0, "ratio_min": 1.9, "ratio_max": 2.1, "meta": {...}}
      lines of versus_llama_cpp.py: the ratio is theirs over ours, of rounds in turns

  {"kind": "steps", "program": "sluice", "weights": "Q8_0", "threads": 2, "steps": 200000,
   "share_slower": [1.0, 0.1, 0.01], "slower_than_ms": [4.8, 5.9, 6.4], "trace_ms": [5.0, 5.1]}
      versus_llama_cpp.py --steps: share_slower of the steps take at least slower_than_ms; trace_ms:
      some steps one by one

  {"kind": "curve", "weights": "Q8_0", "threads": 2, "task": "window", "tokens": 1024, "ms": 5.4,
   "ms_least": 5.2, "read_gb_per_s": 31, "limit": 54, "activations": "int8"}
      lines of speed_curves.py; task: window (a step, by the window), stream (reading so many tokens)
      or decode

  {"kind": "streaminnc", "window": 1024, "hop": 256, "work_ratio": 4.0, "speedup": 3.8,
   "deviation_zero_padding": 0.03, "deviation_signal_padding": 0.0, "meta": {...}}
      lines of stream_layers_bench --json: speedup of reuse over running every window anew; with
      features_speedup (of the layers that reuse applies to) and predicted_speedup, drawn too

  {"bench": "decode_attention", "case": "1028", "default": true, "overlap": true, "us": 4.4, ...}
      lines of the GPU programs name themselves by `bench`; drawn are decode_attention beside torch
      (decode_attention_torch.py) and flashinfer (decode_attention_flashinfer.py), decoder_step beside
      decoder_step_torch and decoder_llama_cpp (of the programs of these names), prefill_attention and
      recompute_cuda (recompute_torch.py)

Other kinds (context_bench, head_map_bench, listen_bench, perplexity_bench, parts of
stream_layers_bench and of the GPU programs; TABLES) are tables of their own: they are read over.

`meta` is free (commit, compiler, machine, threads, command): its commit and machine are printed
under the picture. Exit status: 0, or 1 with the reason (file and line) on stderr.
"""

import argparse
import collections
import json
import math
import pathlib
import re
import statistics
import sys

try:
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
except ImportError:
    matplotlib = None  # --check needs none

REQUIRED = {
    "perplexity": {"policy": str, "sinks": int, "window": int | None, "tokens": list, "ppl": list},
    "endless": {"bins": list},
    "recompute_ratio": {"window": int, "recompute_ms": int | float, "sink_window_ms": int | float},
    "ttft": {"prompt_tokens": int, "ms": int | float},
    "overlap": {"way": str, "threads_per_side": int, "r": int | float, "bound": int | float,
                "speedup_over_sequential_x1": int | float, "wall_ms": int | float},
    "switch": {"source_tokens": int, "snapshot_us_median": int | float, "copying_ms": int | float},
    "policy": {"policy": str, "tokens": int, "budget": int, "perplexity": int | float,
               "cache_bytes": int, "step_ms": int | float},
    "passkey": {"policy": str, "passkey_depth": int | float, "digits_recalled": int},
    "versus": {"weights": str, "task": str, "threads": int, "ratio": int | float,
               "ratio_min": int | float, "ratio_max": int | float},
    "steps": {"program": str, "weights": str, "steps": int, "share_slower": list,
              "slower_than_ms": list, "trace_ms": list},
    "curve": {"weights": str, "threads": int, "task": str, "tokens": int, "ms": int | float},
    "streaminnc": {"window": int, "hop": int, "work_ratio": int | float, "speedup": int | float,
                   "deviation_zero_padding": int | float},
}
GPU = {
    "decode_attention": {"case": str, "overlap": bool, "us": int | float},
    "torch": {"case": str, "way": str},
    "flashinfer": {"case": str, "way": str},
    "recompute_cuda": {"entries": int, "meta": dict},
    "decoder_step": {"model": str, "entries": int, "sessions": int, "overlap": bool,
                     "ms": int | float, "of_read_ceiling": int | float},
    "decoder_step_torch": {"model": str, "entries": int},
    "decoder_llama_cpp": {"model": str, "task": str, "type": str, "llama_cpp_ms": int | float},
    "prefill_attention": {"kernel": str, "window": int, "tflop_per_s": int | float},
}
# Read over: nothing is drawn of them.
TABLES = ("context_append", "context_update", "context_fork", "context_checkpoint",
          "context_draft", "head_map", "streaminnc_misaligned", "frame_encoder", "rounding",
          "chunk_products", "jitter", "pieces", "listen_overlap", "listen_overlap_mean",
          "listen_minute", "listen_endless", "machine", "matrix_vector", "matrix_columns",
          "decoder_prefill", "decoder_chunk", "decoder_endless", "segment_attention", "duplex_cuda",
          "watch", "watch_part")
# Parts of a Google Benchmark name that say how it was measured, not what.
REPETITION = r"(repeats|iterations|min_time|min_warmup_time):|real_time|process_time"
BIN_FIELDS = ("from", "to", "median_us", "p99_us", "p999_us", "max_us", "rss_bytes")

# Ways of a recompute_cuda record; one that failed is missing there.
RECOMPUTE_CUDA = {
    "eager_ms": "window recomputed, as StreamingLLM's comparison ran it (eager)",
    "eager_sdpa_ms": "the same with fused masked attention",
    "compiled_ms": "window recomputed, compiled, causal flash, a CUDA graph",
    "sink_window_ms": "sinks + window (sluice)",
}

# One colour per policy in every picture (Okabe and Ito's palette, safe for colour blindness).
POLICY_STYLES = {
    "full": ("full cache", "#000000", ":"),
    "window": ("window without sinks", "#D55E00", "--"),
    "recompute": ("window, recomputed", "#009E73", "-."),
    "sink-window": ("sinks + window", "#0072B2", "-"),
}
OTHER_COLOURS = ["#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#F0E442"]
ACCENT, SECOND, THIRD, FOURTH = "#0072B2", "#D55E00", "#009E73", "#CC79A7"


class PlotError(Exception):
    """A file that can't be read or a record that does not fit the schema."""


def kind_of(record):
    """What a record is: the programs on a GPU write `bench` instead of `kind`."""
    return record.get("kind", record.get("bench"))


def check_record(record, where):
    """Raises PlotError if a JSON-lines record lacks a field or has one of another type."""
    if not isinstance(record, dict):
        raise PlotError(f"{where}: expected an object, found {type(record).__name__}")
    kind = kind_of(record)
    if not isinstance(kind, str):
        raise PlotError(f"{where}: neither 'kind' nor 'bench' names the record: found {kind!r}")
    if kind in TABLES:
        return
    required = GPU if "kind" not in record and kind in GPU else REQUIRED
    if kind not in required:
        raise PlotError(f"{where}: field 'kind': expected {', '.join(REQUIRED)}, found {kind!r}")
    for field, kinds in required[kind].items():
        value = record.get(field)
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise PlotError(f"{where}: {kind}: field '{field}': found {value!r}")
    if required is not GPU and kind == "perplexity" and len(record["tokens"]) != len(record["ppl"]):
        raise PlotError(f"{where}: {len(record['tokens'])} tokens for {len(record['ppl'])} ppl")
    bins = record.get("bins", [])
    for part in bins:
        missing = [field for field in BIN_FIELDS
                   if not (isinstance(part, dict) and isinstance(part.get(field), int | float))]
        if missing:
            raise PlotError(f"{where}: endless: a bin without {', '.join(missing)}")
    # What a log scale can show; an average over no tokens or an overflow is a fault of the run.
    # (Which of PyTorch's ways failed is told by a null.)
    drawn = {"perplexity": record.get("ppl"), "ttft": [record.get("ms")],
             "recompute_ratio": [record.get("recompute_ms"), record.get("sink_window_ms")],
             "overlap": [record.get("r"), record.get("speedup_over_sequential_x1")],
             "switch": [record.get("snapshot_us_median"), record.get("copying_ms")],
             "policy": [record.get("perplexity"), record.get("cache_bytes")],
             "steps": record.get("slower_than_ms"),
             "passkey": [1 + record.get("digits_recalled", 0)],
             "versus": [record.get("ratio"), record.get("ratio_min"), record.get("ratio_max")],
             "curve": [record.get("tokens"), record.get("ms")],
             "streaminnc": [record.get("speedup"), record.get("work_ratio")],
             "endless": [part[field] for part in bins for field in BIN_FIELDS[2:]],
             "decode_attention": [record.get("us")],
             "torch": [1 if record.get("us") is None else record["us"]],
             "flashinfer": [1 if record.get("us") is None else record["us"]],
             "recompute_cuda": [record.get("entries")] + [
                 record[field] for field in RECOMPUTE_CUDA if record.get(field) is not None],
             "decoder_step": [record.get(field) for field in ("entries", "sessions", "ms")],
             "decoder_step_torch": [record.get("entries")] + [
                 record[field] for field in ("compiled_ms", "best_ms", "sluice_ms")
                 if record.get(field) is not None],
             "decoder_llama_cpp": [record.get("llama_cpp_ms"), record.get("sluice_ms", 1)],
             "prefill_attention": [record.get("window"), record.get("tflop_per_s")]}[kind]
    bad = [v for v in drawn if not (isinstance(v, int | float) and 0 < v < math.inf)]
    if bad or not drawn:
        raise PlotError(f"{where}: {kind}: expected positive numbers, found {bad[:1] or 'none'}")


def read_file(path):
    """(records, benchmark runs) of one file; one of the two lists is empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlotError(f"{path}: {error}") from error
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        whole = None  # JSON lines
    if isinstance(whole, dict) and "benchmarks" in whole:
        return [], [{"name": path.stem, **whole}]
    records = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise PlotError(f"{where}: not JSON: {error}") from error
        check_record(record, where)
        records.append(record)
    return records, []


def style(policy, others):
    """(label, colour, line style) of a policy; unknown ones get colours as they come."""
    if policy in POLICY_STYLES:
        return POLICY_STYLES[policy]
    if policy not in others:
        others[policy] = (policy, OTHER_COLOURS[len(others) % len(OTHER_COLOURS)], "-")
    return others[policy]


def thousands(value, _=None):
    return f"{value:,.0f}" if value >= 1 or value == 0 else f"{value:g}"


def short(value, _=None):
    """5 -> 5, 10000 -> 10 k, 1500000 -> 1.5 M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g} {letter}"
    return f"{value:g}"


def log_axis(axis, values):
    """Log scale whose ticks read 20, 50, 100, 200, ... instead of powers."""
    axis.set_yscale("log")
    decades = math.log10(max(values) / min(values)) if min(values) > 0 else 0.0
    ticks = (1.0,) if decades > 4 else (1.0, 2.0, 5.0)
    axis.yaxis.set_major_locator(LogLocator(base=10.0, subs=ticks))
    axis.yaxis.set_major_formatter(FuncFormatter(thousands))
    axis.yaxis.set_minor_formatter(NullFormatter())


def tidy(axis):
    axis.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def figure(columns=1, width=6.4, height=4.0):
    made, axes = plt.subplots(1, columns, figsize=(width * columns, height), squeeze=False)
    return made, list(axes[0])


def save(made, folder, name, records):
    """Writes NAME.png and NAME.svg with the origin of the numbers in small print."""
    notes = set()
    for record in records:
        meta = record.get("meta", {})
        note = ", ".join(str(meta[key]) for key in ("machine", "commit") if key in meta)
        if note:
            notes.add(note)
    made.tight_layout(rect=(0, 0.04 if notes else 0, 1, 1))
    if notes:
        made.text(0.01, 0.01, "; ".join(sorted(notes)), fontsize=7, color="#666666")
    for ending in ("png", "svg"):
        # A fixed date and salt: the same numbers give the same file.
        with matplotlib.rc_context({"svg.hashsalt": "sluice"}):
            made.savefig(folder / f"{name}.{ending}", dpi=150,
                         metadata={"Date": None} if ending == "svg" else {"Software": None})
    plt.close(made)
    print(f"{folder / name}.png, .svg")


def cache_size(record):
    return record["sinks"] + (record["window"] or 0)


def draw_perplexity(records, folder):
    """One panel per cache size; the full cache, having none, is drawn in each. A record of one point
    (recompute.jsonl) is no curve."""
    records = [record for record in records if len(record["tokens"]) > 1]
    if not records:
        return
    full = [record for record in records if record["policy"] == "full"]
    rest = [record for record in records if record["policy"] != "full"]
    sizes = sorted({cache_size(record) for record in rest}) or [0]
    made, axes = figure(len(sizes), width=4.6)
    values = [value for record in records for value in record["ppl"]]
    others = {}
    for axis, size in zip(axes, sizes):
        for record in full + [record for record in rest if cache_size(record) == size]:
            label, colour, line = style(record["policy"], others)
            if record["sinks"]:
                label += f" ({record['sinks']} + {record['window']})"
            axis.plot(record["tokens"], record["ppl"], line, color=colour, label=label,
                      linewidth=1.8)
        log_axis(axis, values)
        axis.set_ylim(min(values) / 1.3, max(values) * 1.6)
        axis.set_title(f"cache of {size:,} tokens" if size else "full cache", fontsize=10)
        axis.set_xlabel("tokens seen")
        axis.xaxis.set_major_formatter(FuncFormatter(short))
        axis.legend(fontsize=8, frameon=False)
        tidy(axis)
    axes[0].set_ylabel("perplexity so far (log scale)")
    save(made, folder, "perplexity", records)


def told_apart(records):
    """(name of the picture, words for its title) of each endless record: the model's, and where
    several are of one model, what they differ in: policy, cache, threads, commit, or at last a
    number, in their order."""
    words = [[] for _ in records]

    def names():
        found = []
        for record, more in zip(records, words):
            name = "_".join(["endless", str(record.get("model", "")), *more]).strip("_")
            found.append(re.sub(r"[^A-Za-z0-9_.-]+", "_", name) if len(records) > 1 else "endless")
        return found

    def meta(record, field):
        return f"{field} {record.get('meta', {}).get(field, 'unknown')}"

    for describe in (lambda record: record.get("policy") or "no policy",
                     lambda record: f"{record.get('sinks') or 0}+{record.get('window') or 0}",
                     lambda record: meta(record, "threads"),
                     lambda record: meta(record, "commit")):
        alike = collections.defaultdict(list)
        for index, name in enumerate(names()):
            alike[name].append(index)
        for same in alike.values():
            if len({describe(records[index]) for index in same}) > 1:
                for index in same:
                    words[index].append(describe(records[index]))
    taken = set()
    for index, name in enumerate(names()):
        number = 2
        while name in taken:
            words[index] = [word for word in words[index] if not word.startswith("run ")]
            words[index].append(f"run {number}")
            name = names()[index]
            number += 1
        taken.add(name)
    return list(zip(names(), words))


def draw_endless(records, folder):
    """Left: latency per part of the stream. Right: resident memory. A picture per record."""
    for record, (name, more) in zip(records, told_apart(records)):
        bins = record["bins"]
        middles = [(part["from"] + part["to"]) / 2 for part in bins]
        made, (left, right) = figure(2, width=4.8, height=3.6)
        lines = (("median_us", "median", ACCENT), ("p99_us", "p99", THIRD),
                 ("p999_us", "p99.9", SECOND))
        for field, label, colour in lines:
            left.plot(middles, [part[field] for part in bins], "o-", color=colour, label=label,
                      markersize=4, linewidth=1.6)
        values = [part[field] for part in bins for field, _, _ in lines]
        log_axis(left, values)
        left.set_ylim(min(values) / 2, max(values) * 2)
        left.set_ylabel("latency of a step in µs (log scale)")
        left.legend(fontsize=8, frameon=False, ncols=3, loc="upper center")
        memory = [part["rss_bytes"] / 2**20 for part in bins]
        right.plot(middles, memory, "o-", color=ACCENT, markersize=4, linewidth=1.6)
        right.set_ylim(0, max(memory) * 1.25)
        right.set_ylabel("resident memory in MiB")
        for axis in (left, right):
            axis.set_xlim(bins[0]["from"], bins[-1]["to"])
            axis.set_xlabel("tokens streamed (each point: a tenth)" if len(bins) == 10
                            else "tokens streamed")
            axis.xaxis.set_major_formatter(FuncFormatter(short))
            tidy(axis)
        words = [record.get("model"), record.get("policy")]
        if record.get("window"):
            words.append(f"{record.get('sinks', 0)} + {record['window']}")
        words += [word for word in more if word.replace("+", " + ") not in words]
        made.suptitle(", ".join(word for word in words if word), fontsize=10)
        save(made, folder, name, [record])


def draw_recompute_ratio(records, folder):
    """Pairs of bars per cache size on a log scale, with the ratio written above."""
    records = sorted(records, key=lambda record: record["window"])
    made, (axis,) = figure()
    places = range(len(records))
    fields = (("recompute_ms", "recompute", -0.2), ("sink_window_ms", "sink-window", 0.2))
    for field, policy, shift in fields:
        label, colour, _ = POLICY_STYLES[policy]
        axis.bar([place + shift for place in places], [record[field] for record in records],
                 width=0.38, color=colour, label=label)
    for place, record in zip(places, records):
        top = max(record["recompute_ms"], record["sink_window_ms"])
        ratio = record["recompute_ms"] / record["sink_window_ms"]
        axis.annotate(f"{ratio:.3g} x", (place, top), xytext=(0, 4), textcoords="offset points",
                      ha="center", fontsize=9)
    values = [record[field] for record in records for field, _, _ in fields]
    log_axis(axis, values)
    axis.set_ylim(min(values) / 2, max(values) * 4)
    axis.set_xticks(list(places), [f"{record['window']:,}" for record in records])
    axis.set_xlabel("cache size in tokens")
    axis.set_ylabel("ms per token (log scale)")
    axis.legend(fontsize=8, frameon=False, loc="upper left")
    tidy(axis)
    axis.grid(False, axis="x")
    save(made, folder, "recompute_ratio", records)


def draw_ttft(records, folder):
    """One line per (model, policy); repetitions become a median and a shaded range."""
    groups = collections.defaultdict(lambda: collections.defaultdict(list))
    for record in records:
        key = ", ".join(record[word] for word in ("model", "policy") if record.get(word))
        groups[key][record["prompt_tokens"]].append(record["ms"])
    made, (axis,) = figure()
    colours = [ACCENT, SECOND, THIRD, FOURTH, *OTHER_COLOURS]
    for index, (key, by_length) in enumerate(sorted(groups.items())):
        lengths, colour = sorted(by_length), colours[index % len(colours)]
        axis.plot(lengths, [statistics.median(by_length[n]) for n in lengths], "o-", color=colour,
                  label=key or "time to first token", markersize=4, linewidth=1.8)
        axis.fill_between(lengths, [min(by_length[n]) for n in lengths],
                          [max(by_length[n]) for n in lengths], color=colour, alpha=0.15, lw=0)
    log_axis(axis, [record["ms"] for record in records])
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(thousands))
    axis.set_xlabel("prompt length in tokens")
    axis.set_ylabel("time to first token in ms (log scale)")
    axis.legend(fontsize=8, frameon=False)
    tidy(axis)
    save(made, folder, "ttft", records)


def draw_overlap(records, folder):
    """Speed-up over the sequential loop by r, under the bound; one panel per model."""
    models = sorted({record.get("model", "") for record in records})
    made, axes = figure(len(models), width=5.2)
    for axis, model in zip(axes, models):
        chosen = [record for record in records if record.get("model", "") == model]
        rs = sorted({record["r"] for record in chosen})
        low, high = min(rs) / 1.5, max(rs) * 1.5
        curve = [low * (high / low) ** (step / 100) for step in range(101)]
        axis.plot(curve, [(1 + r) / max(1, r) for r in curve], "-", color="#999999",
                  label="bound (1 + r) / max(1, r)", linewidth=1.2)
        ways = sorted({(record["way"], record["threads_per_side"]) for record in chosen})
        colours = dict(zip([way for way in ways if way != ("sequential", 1)],
                           [ACCENT, SECOND, THIRD, FOURTH, *OTHER_COLOURS]))
        for way, colour in colours.items():
            points = sorted((record for record in chosen
                             if (record["way"], record["threads_per_side"]) == way),
                            key=lambda record: record["r"])
            values = [point["speedup_over_sequential_x1"] for point in points]
            spread = [[value - point.get("speedup_min", value) for value, point
                       in zip(values, points)],
                      [point.get("speedup_max", value) - value for value, point
                       in zip(values, points)]]
            spread = [[max(0.0, value) for value in side] for side in spread]
            threads = "1 + 1 threads" if way[0] == "duplex" else f"{way[1]} threads"
            axis.errorbar([point["r"] for point in points], values, yerr=spread, fmt="o-",
                          color=colour, label=f"{way[0]}, {threads}", markersize=4, linewidth=1.6,
                          capsize=2)
        axis.axhline(1.0, color="#000000", linewidth=0.8, linestyle=":")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(thousands))
        axis.set_title(model, fontsize=10)
        axis.set_xlabel("r = source work / target work")
        axis.legend(fontsize=7, frameon=False)
        tidy(axis)
    axes[0].set_ylabel("speed-up over sequential, 1 thread")
    save(made, folder, "overlap", records)


def draw_switch(records, folder):
    """Cost of a switch by source length, beside copying the caches together."""
    records = sorted(records, key=lambda record: record["source_tokens"])
    made, (axis,) = figure()
    lengths = [record["source_tokens"] for record in records]
    snapshot = [record["snapshot_us_median"] for record in records]
    copying = [record["copying_ms"] * 1e3 for record in records]
    axis.plot(lengths, copying, "o--", color=SECOND, label="copying the source's keys and values")
    axis.plot(lengths, snapshot, "o-", color=ACCENT, label="snapshot and segments of all layers")
    log_axis(axis, snapshot + copying)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(thousands))
    axis.set_xlabel("source tokens")
    axis.set_ylabel("µs per switch (log scale)")
    axis.legend(fontsize=8, frameon=False)
    tidy(axis)
    save(made, folder, "switch", records)


def draw_policies(records, folder):
    """Perplexity and memory of each policy, side by side; one colour a length and budget."""
    made, (left, right) = figure(2, width=5.6)
    names = list(dict.fromkeys(record["policy"] for record in records))[::-1]
    runs = sorted({(record["tokens"], record["budget"]) for record in records})
    height = 0.8 / len(runs)
    for index, run in enumerate(runs):
        chosen = {record["policy"]: record for record in records
                  if (record["tokens"], record["budget"]) == run}
        places = [row + (index - (len(runs) - 1) / 2) * height for row in range(len(names))]
        for axis, value in ((left, lambda r: r["perplexity"]),
                            (right, lambda r: r["cache_bytes"] / 1e6)):
            axis.barh(places, [value(chosen[name]) if name in chosen else 0 for name in names],
                      height, label=f"{thousands(run[0])} tokens, {thousands(run[1])} entries",
                      color=[ACCENT, SECOND, THIRD, FOURTH, *OTHER_COLOURS][index])
    best = min(record["perplexity"] for record in records)
    left.set_xlim(left=0.9 * best)
    left.set_xlabel("perplexity")
    right.set_xscale("log")
    right.set_xlabel("MB of keys and values (log scale)")
    for axis in (left, right):
        axis.set_yticks(range(len(names)), names)
        axis.legend(fontsize=8, frameon=False)
        tidy(axis)
    save(made, folder, "policies", records)


def draw_passkey(records, folder):
    """Digits recalled of five, by policy and depth; a panel for each length and budget."""
    runs = sorted({(record["tokens"], record["budget"]) for record in records})
    most = max(len({record["policy"] for record in records if
                    (record["tokens"], record["budget"]) == run}) for run in runs)
    made, axes = figure(columns=len(runs), width=5.4, height=0.8 + 0.4 * most)
    for axis, run in zip(axes, runs):
        chosen = [record for record in records if (record["tokens"], record["budget"]) == run]
        names = list(dict.fromkeys(record["policy"] for record in chosen))
        depths = sorted({round(100 * record["passkey_depth"]) for record in chosen})
        cells = {(record["policy"], round(100 * record["passkey_depth"])):
                 record["digits_recalled"] for record in chosen}
        axis.imshow([[cells.get((name, depth), 0) for depth in depths] for name in names],
                    cmap="Blues", vmin=0, vmax=7, aspect="auto")
        for row, name in enumerate(names):
            for column, depth in enumerate(depths):
                axis.text(column, row, cells.get((name, depth), ""), ha="center", va="center",
                          fontsize=9)
        axis.set_yticks(range(len(names)), names)
        axis.set_xticks(range(len(depths)), [f"{depth}%" for depth in depths])
        axis.set_xlabel("where in the text the number is said")
        axis.set_title(f"digits recalled of 5: {run[0]:,} tokens, {run[1]:,} entries", fontsize=10)
    save(made, folder, "passkey", records)


def draw_versus(records, folder):
    """How many times faster than llama.cpp, a row a task, a colour a weight type and thread count."""
    tasks = list(dict.fromkeys(record["task"] for record in records))[::-1]
    series = list(dict.fromkeys((record["weights"], record["threads"]) for record in records))
    made, (axis,) = figure(width=7.2, height=1.2 + 0.5 * len(tasks))
    height = 0.8 / len(series)
    for index, (weights, threads) in enumerate(series):
        for row, task in enumerate(tasks):
            for record in records:
                if (record["weights"], record["threads"], record["task"]) != (weights, threads, task):
                    continue
                ratio = record["ratio"]
                axis.barh(row + ((len(series) - 1) / 2 - index) * height, ratio, height,
                          xerr=[[max(0.0, ratio - record["ratio_min"])],
                                [max(0.0, record["ratio_max"] - ratio)]],
                          error_kw={"linewidth": 0.8}, color=f"C{index % 10}",
                          label=f"{weights}, {threads} threads" if row == 0 else None)
    axis.axvline(1.0, color="#000000", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(tasks)), tasks)
    axis.set_xlabel("times as fast as llama.cpp (median of rounds, range)")
    axis.legend(fontsize=8, frameon=False)
    tidy(axis)
    save(made, folder, "versus_llama_cpp", records)


def draw_steps(records, folder):
    """Left: how many steps take longer than a time. Right: steps one by one."""
    made, (left, right) = figure(2, width=4.8, height=3.6)
    several = len({record["weights"] for record in records}) > 1
    for index, record in enumerate(records):
        colour = (ACCENT, SECOND, THIRD, FOURTH)[index % 4]
        label = record["program"] + (f", {record['weights']}" if several else "")
        left.plot(record["slower_than_ms"], record["share_slower"], "-", color=colour,
                  linewidth=1.8, label=f"{label}, {record['steps']:,} steps")
        right.plot(record["trace_ms"], "-", color=colour, linewidth=0.8, label=label)
    left.set_yscale("log")
    left.set_xscale("log")
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter(FuncFormatter(thousands))
    left.xaxis.set_minor_formatter(NullFormatter())
    left.set_xlabel("a step takes at least this long, ms")
    left.set_ylabel("share of steps (log scale)")
    right.set_ylim(bottom=0)
    right.set_xlabel("step")
    right.set_ylabel("ms")
    for axis in (left, right):
        axis.legend(fontsize=8, frameon=False)
        tidy(axis)
    save(made, folder, "endless_versus_llama_cpp", records)


def draw_curves(records, folder):
    """Left: a step by the window. Right: reading by its length; the dotted lines grow linearly."""
    made, (window, reading) = figure(columns=2, width=5.2)
    colours = [ACCENT, SECOND, THIRD, FOURTH, *OTHER_COLOURS]
    for axis, task, scale in ((window, "window", 1.0), (reading, "stream", 1e-3)):
        chosen = [record for record in records if record["task"] == task]
        runs = collections.defaultdict(list)
        for record in chosen:
            key = (record["weights"], record.get("activations", "int8"), record["threads"])
            runs[key].append((record["tokens"], record["ms"] * scale))
        for colour, (key, points) in zip(colours, sorted(runs.items())):
            points.sort()
            exact = ", f32 activations" if key[1] == "f32" else ""
            axis.plot(*zip(*points), "o-", color=colour, linewidth=1.6, markersize=4,
                      label=f"{key[0]}{exact}, {key[2]} threads")
            (first, low), (last, high) = points[0], points[-1]
            axis.plot([first, last], [low, high], ":", color=colour, linewidth=1.0)
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_formatter(FuncFormatter(thousands))
        axis.legend(fontsize=8, frameon=False)
        tidy(axis)
    window.set_xlabel("keys in the window")
    window.set_ylabel("ms a step")
    reading.set_xlabel("tokens read through 4 sinks + 1,020 keys")
    reading.set_ylabel("s")
    save(made, folder, "curves", records)


def draw_streaminnc(records, folder):
    """Speed-up of reuse over the work that it removes, and what zero padding makes of the output."""
    made, (speed, deviation) = figure(columns=2, width=5.2)
    records = sorted(records, key=lambda record: record["work_ratio"])
    ratios = [record["work_ratio"] for record in records]
    speed.plot(ratios, ratios, color="#000000", linestyle=":", linewidth=1.2,
               label="window / hop: all work removed")
    if all("features_speedup" in record for record in records):
        speed.plot(ratios, [record["features_speedup"] for record in records], "s", color=SECOND,
                   markersize=4, label="the layers that reuse (measured)")
        speed.plot(ratios, [record["predicted_speedup"] for record in records], "--",
                   color="#000000", linewidth=1.0, label="with a head for each output (predicted)")
    speed.plot(ratios, [record["speedup"] for record in records], "o-", color=ACCENT,
               linewidth=1.8, markersize=4, label="the network (measured)")
    speed.set_xlabel("window / hop")
    speed.set_ylabel("times as fast as windows run anew")
    speed.legend(fontsize=8, frameon=False)
    overlap = [100 * (1 - record["hop"] / record["window"]) for record in records]
    deviation.plot(overlap, [100 * record["deviation_zero_padding"] for record in records], "o-",
                   color=SECOND, linewidth=1.8, markersize=4, label="windows padded with zeros")
    deviation.plot(overlap, [100 * record.get("deviation_signal_padding", 0.0)
                             for record in records], "o-", color=ACCENT, linewidth=1.8,
                   markersize=4, label="windows that see the signal beyond their edges")
    deviation.set_xlabel("overlap of consecutive windows in %")
    deviation.set_ylabel("RMS deviation, % of the range")
    deviation.set_ylim(bottom=-0.1)
    deviation.legend(fontsize=8, frameon=False)
    for axis in (speed, deviation):
        tidy(axis)
    save(made, folder, "streaminnc", records)


def draw_decode_attention_cuda(records, folder):
    """Microseconds a launch: ours as a decoder runs it, and the best way of each peer."""
    ours = {record["case"]: record["us"] for record in records
            if record["bench"] == "decode_attention" and record.get("default") and record["overlap"]
            and record.get("type", "bf16") == "bf16"}
    peers = {"torch": {}, "flashinfer": {}}
    for record in records:
        if record["bench"] in peers and record.get("us") and not record.get("rotates"):
            best = peers[record["bench"]]
            best[record["case"]] = min(record["us"], best.get(record["case"], math.inf))
    cases = [case for case in ours if any(case in best for best in peers.values())]
    if not cases:
        return
    rows = [(best, label, colour) for best, label, colour in (
        (peers["torch"], "PyTorch SDPA, its best way (attention alone)", SECOND),
        (peers["flashinfer"], "FlashInfer, its best way (attention alone)", THIRD)) if best]
    rows.append((ours, "sluice (rotation, append and eviction included)", ACCENT))
    made, (axis,) = figure(width=7.2)
    width = 0.76 / len(rows)
    for index, (values, label, colour) in enumerate(rows):
        shown = [place for place, case in enumerate(cases) if case in values]
        axis.bar([place + (index - (len(rows) - 1) / 2) * width for place in shown],
                 [values[cases[place]] for place in shown], width=width, color=colour, label=label)
    for place, case in enumerate(cases):
        theirs = min(best[case] for best in peers.values() if case in best)
        top = max(values[case] for values, _, _ in rows if case in values)
        axis.annotate(f"{theirs / ours[case]:.2f} x", (place, top), xytext=(0, 4),
                      textcoords="offset points", ha="center", fontsize=9)
    every = [values[case] for values, _, _ in rows for case in cases if case in values]
    log_axis(axis, every)
    axis.set_ylim(top=2 * max(every))
    axis.set_xticks(range(len(cases)), cases)
    axis.set_xlabel("keys (batch x keys); 32:8 heads of 128, bf16")
    axis.set_ylabel("us a launch (log scale)")
    axis.legend(fontsize=8, frameon=False, loc="upper left")
    tidy(axis)
    save(made, folder, "decode_attention_cuda", records)


def step_ratios(records):
    """{peer: {(model, entries): its time over sluice's of the same run}}; the least of several."""
    found = collections.defaultdict(dict)
    for record in records:
        if record["bench"] == "decoder_step_torch":
            ways = {"PyTorch, compiled": record.get("compiled_ms"),
                    "PyTorch, its best way": record.get("best_ms")}
        elif record["bench"] == "decoder_llama_cpp" and record["task"] == "step":
            ways = {f"llama.cpp, {record['type']}": record["llama_cpp_ms"]}
        else:
            continue
        for peer, ms in ways.items():
            if ms and record.get("sluice_ms"):
                case = record["model"], record["entries"]
                ratio = ms / record["sluice_ms"]
                found[peer][case] = min(ratio, found[peer].get(case, math.inf))
    return dict(found)


def draw_step_ratios(axis, peers):
    """Bars of step_ratios, in groups by case."""
    cases = sorted({case for ratios in peers.values() for case in ratios})
    width = 0.8 / len(peers)
    colours = (OTHER_COLOURS[3], SECOND, THIRD, FOURTH, *OTHER_COLOURS)
    for index, ((peer, ratios), colour) in enumerate(zip(peers.items(), colours)):
        shown = [place for place, case in enumerate(cases) if case in ratios]
        bars = axis.bar([place + (index - (len(peers) - 1) / 2) * width for place in shown],
                        [ratios[cases[place]] for place in shown], width=width, color=colour,
                        label=peer)
        axis.bar_label(bars, fmt="%.2f", fontsize=5)
    axis.axhline(1, color=ACCENT, linewidth=1.4, label="sluice, in the same run")
    axis.set_xticks(range(len(cases)), [f"{model}\n{entries:,}" for model, entries in cases],
                    fontsize=6)
    axis.set_ylim(top=1.3 * axis.get_ylim()[1])
    axis.set_xlabel("entries in the cache")
    axis.set_ylabel("times as long a token as sluice")
    axis.legend(fontsize=6, frameon=False, ncols=2)
    tidy(axis)


def draw_decoder_cuda(records, folder):
    """A token by the cache's size, above what its bytes need; tokens/s by sessions; peers' times."""
    peers = step_ratios(records)
    made, (single, many, *beside) = figure(columns=3 if peers else 2, width=5.2)
    for axis in beside:
        draw_step_ratios(axis, peers)
    steps = [record for record in records
             if record["bench"] == "decoder_step" and record["overlap"]
             and record.get("cache", "bf16") == "bf16"
             and record.get("few_rows", True)]
    styles = dict(zip(dict.fromkeys(record.get("type", "") for record in steps),
                      (("o", "-"), ("s", "--"), ("v", "--"), ("^", "-."), ("D", "-."), ("x", "-."))))
    for index, model in enumerate(dict.fromkeys(record["model"] for record in steps)):
        colour = [ACCENT, SECOND, THIRD, FOURTH][index % 4]
        for weights, (marker, line) in styles.items():
            rows = [record for record in steps
                    if record["model"] == model and record.get("type", "") == weights]
            alone = sorted((record["entries"], record["ms"], record["of_read_ceiling"])
                           for record in rows if record["sessions"] == 1)
            if alone:
                entries = [row[0] for row in alone]
                single.plot(entries, [row[1] for row in alone], line, marker=marker, color=colour,
                            linewidth=1.4, markersize=4, label=f"{model}, {weights}")
                if (marker, line) == ("o", "-"):
                    single.plot(entries, [row[1] * row[2] for row in alone], ":", color=colour,
                                linewidth=1.2, label="its bytes at the read ceiling")
            batch = sorted((record["sessions"], 1e3 * record["sessions"] / record["ms"])
                           for record in rows if record["entries"] == 1024)
            if len(batch) > 1:
                many.plot(*zip(*batch), line, marker=marker, color=colour, linewidth=1.8,
                          markersize=4, label=f"{model}, {weights}")
    for axis, name in ((single, "entries in the cache"), (many, "sessions of 1,024 entries")):
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_formatter(FuncFormatter(thousands))
        axis.yaxis.set_major_formatter(FuncFormatter(thousands))
        axis.set_xlabel(name)
        axis.legend(fontsize=6, frameon=False, ncols=2)
        tidy(axis)
    single.set_ylim(top=1.6 * max((record["ms"] for record in steps if record["sessions"] == 1),
                                  default=1))
    single.set_ylabel("ms a token")
    many.set_ylabel("tokens/s, all sessions")
    save(made, folder, "decoder_cuda", records)


def draw_prefill_attention_cuda(records, folder):
    """TFLOP/s over the pairs that are visible, by window: the best row of each kernel."""
    windows = sorted({record["window"] for record in records})
    kernels = sorted({record["kernel"] for record in records})
    made, (axis,) = figure(width=7.2)
    width = 0.8 / len(kernels)
    for index, kernel in enumerate(kernels):
        best = [max((record["tflop_per_s"] for record in records
                     if (record["kernel"], record["window"]) == (kernel, window)), default=0)
                for window in windows]
        bars = axis.bar([place + (index - (len(kernels) - 1) / 2) * width
                         for place in range(len(windows))], best, width=width,
                        label=f"sluice, {kernel}" if "Torch" not in kernel else kernel,
                        color=[ACCENT, SECOND, THIRD, FOURTH, *OTHER_COLOURS][index])
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
    axis.set_xticks(range(len(windows)), [f"{window:,}" for window in windows])
    axis.set_xlabel("window; 32 heads of 128, 32,768 tokens, 4 sinks")
    axis.set_ylabel("TFLOP/s")
    axis.set_ylim(top=1.3 * axis.get_ylim()[1])
    axis.legend(fontsize=8, frameon=False)
    tidy(axis)
    save(made, folder, "prefill_attention_cuda", records)


def draw_recompute_cuda(records, folder):
    """Left: a token by the cache's size, recomputed and not. Right: the ratios."""
    records = sorted(records, key=lambda record: record["entries"])
    made, (times, ratios) = figure(columns=2, width=5.2)
    every, shares = [], []
    for (field, label), colour in zip(RECOMPUTE_CUDA.items(), (THIRD, FOURTH, SECOND, ACCENT)):
        points = [(r["entries"], r[field]) for r in records if r.get(field) is not None]
        if points:
            times.plot(*zip(*points), "o-", color=colour, linewidth=1.8, markersize=4, label=label)
            every += [ms for _, ms in points]
        points = [(r["entries"], r[field] / r["sink_window_ms"]) for r in records
                  if field != "sink_window_ms" and r.get(field) and r.get("sink_window_ms")]
        if points:
            ratios.plot(*zip(*points), "o-", color=colour, linewidth=1.8, markersize=4)
            shares += [ratio for _, ratio in points]
            # The outer curves alone: where sizes are small, labels of all would lie on each other.
            above = colour == THIRD
            if above or colour == SECOND:
                for place in points:
                    ratios.annotate(f"{place[1]:.3g}", place, xytext=(0, 5 if above else -13),
                                    fontsize=8, textcoords="offset points", ha="center")
    log_axis(times, every)
    times.set_ylim(top=6 * max(every))
    if shares:
        log_axis(ratios, shares)
        ratios.set_ylim(bottom=0.6 * min(shares), top=2 * max(shares))
    for axis in (times, ratios):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(thousands))
        axis.set_xlabel("cache size in tokens")
        tidy(axis)
    times.set_ylabel("ms a token (log scale)")
    ratios.set_ylabel("times as long as with sinks + window (log scale)")
    times.legend(fontsize=7, frameon=False, loc="upper left")
    save(made, folder, "recompute_cuda", records)


def sweep(entry):
    """("BM_Attend/keys:*/chunk:1", "keys", 256) of a run named BM_Attend/keys:256/chunk:1: the
    first argument with a name is the sweep; None for a run without one."""
    parts = entry.get("run_name", entry["name"]).split("/")
    for index, part in enumerate(parts):
        match = re.fullmatch(r"([A-Za-z_]\w*):(\d+)", part)
        if match and not re.match(REPETITION, part):
            fixed = [p for p in parts[index + 1 :] if not re.match(REPETITION, p)]
            series = "/".join(parts[:index] + fixed)
            return series, match[1], int(match[2])
    return None


def draw_benchmark(run, folder):
    """Google Benchmark: one line per benchmark over its first named argument, real time."""
    micro = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6}
    by_axis = collections.defaultdict(lambda: collections.defaultdict(
        lambda: collections.defaultdict(list)))
    for entry in run["benchmarks"]:
        if entry.get("run_type", "iteration") != "iteration" or entry.get("error_occurred"):
            continue
        found = sweep(entry)
        if found:
            series, argument, value = found
            scale = micro[entry.get("time_unit", "ns")]
            by_axis[argument][series][value].append(entry["real_time"] * scale)
    context = run.get("context", {})
    machine = f"{context.get('num_cpus', '?')} CPUs at {context.get('mhz_per_cpu', '?')} MHz"
    meta = {"meta": {"machine": machine, **{k: v for k, v in context.items() if k == "commit"}}}
    for argument, groups in by_axis.items():
        made, (axis,) = figure(width=7.2, height=4.4)
        for index, (series, by_value) in enumerate(groups.items()):
            values = sorted(by_value)
            axis.plot(values, [statistics.median(by_value[v]) for v in values], "o-",
                      markersize=4, linewidth=1.6, label=series, color=f"C{index % 10}")
        every = [t for groups_of in groups.values() for ts in groups_of.values() for t in ts]
        log_axis(axis, every)
        if max(v for by_value in groups.values() for v in by_value) > 8:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(FuncFormatter(thousands))
        axis.set_xlabel(argument.replace("_", " "))
        axis.set_ylabel("real time in µs (log scale)")
        axis.legend(fontsize=7, frameon=False)
        tidy(axis)
        save(made, folder, f"{run['name']}_{argument}", [meta])


DRAW = {"perplexity": draw_perplexity, "endless": draw_endless,
        "recompute_ratio": draw_recompute_ratio, "ttft": draw_ttft, "overlap": draw_overlap,
        "switch": draw_switch, "policy": draw_policies, "passkey": draw_passkey,
        "versus": draw_versus, "steps": draw_steps, "curve": draw_curves,
        "streaminnc": draw_streaminnc, "decode_attention torch flashinfer": draw_decode_attention_cuda,
        "decoder_step decoder_step_torch decoder_llama_cpp": draw_decoder_cuda,
        "prefill_attention": draw_prefill_attention_cuda,
        "recompute_cuda": draw_recompute_cuda}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    default = pathlib.Path(__file__).resolve().parent / "results"
    parser.add_argument("files", type=pathlib.Path, nargs="+", metavar="FILE")
    parser.add_argument("--output", type=pathlib.Path, default=default, metavar="DIR",
                        help="folder for the pictures, made if missing (default: %(default)s)")
    parser.add_argument("--check", action="store_true",
                        help="only read the files; needs no matplotlib")
    options = parser.parse_args()
    if matplotlib is None and not options.check:
        print("plot: matplotlib is not installed", file=sys.stderr)
        return 1
    try:
        records, runs = [], []
        for path in options.files:
            found_records, found_runs = read_file(path)
            records += found_records
            runs += found_runs
        if not records and not runs:
            raise PlotError("the files hold no record")
        if options.check:
            return 0
        options.output.mkdir(parents=True, exist_ok=True)
        for kind, draw in DRAW.items():
            chosen = [record for record in records if kind_of(record) in kind.split()]
            if chosen:
                draw(chosen, options.output)
        for run in runs:
            draw_benchmark(run, options.output)
    except (PlotError, OSError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
