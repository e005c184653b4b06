#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Runs duplex_bench, keeps its records and prints them as the README's tables.

    python3 bench/duplex.py [--program build/bench/duplex_bench] [--model MODEL.gguf] [--tiny TINY.gguf]
                            [--output bench/results] [--only overlap switch endless] [-- option=value ...]

Writes OUTPUT/duplex_NAME.jsonl for each experiment (bench/plot.py draws them); --table only prints
what files exist. What follows -- goes to duplex_bench (see its --help). The endless run uses the
tiny model too, where one is given. These are measurements: run them on a quiet machine.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

from experiments import commit, machine

EXPERIMENTS = ("overlap", "switch", "endless")


def run(options, experiment, model):
    """The records of one experiment."""
    environment = dict(os.environ)
    environment.pop("SLUICE_MODEL", None)
    if model is not None:
        environment["SLUICE_MODEL"] = str(model)
    done = subprocess.run([str(options.program), experiment, *options.arguments], check=True,
                          env=environment, stdout=subprocess.PIPE, text=True)
    meta = {"machine": machine(), "commit": commit(), "arguments": options.arguments}
    return [json.loads(line) | {"meta": meta} for line in done.stdout.splitlines()]


def table(rows):
    """Markdown; the first row is the head."""
    for number, row in enumerate(rows):
        print("| " + " | ".join(row) + " |")
        if number == 0:
            print("|---" * len(row) + "|")
    print()


def print_overlap(records):
    """One row for each m : k, ways side by side."""
    for model in sorted({record["model"] for record in records}):
        chosen = [record for record in records if record["model"] == model]
        print(f"**{model}**, {chosen[0]['units']} units\n")
        rows = [["source : target", "r", "bound", "source, ms", "target, ms", "sequential x1",
                 "sequential x2", "interleaved x2", "re-encoding x2", "duplex 1 + 1",
                 "speed-up (min to max)", "efficiency"]]
        pairs = dict.fromkeys((record["source_tokens_per_unit"], record["target_tokens_per_unit"])
                              for record in chosen)
        for pair in pairs:
            of = {(record["way"], record["threads_per_side"]): record for record in chosen
                  if (record["source_tokens_per_unit"],
                      record["target_tokens_per_unit"]) == pair}
            duplex, base = of["duplex", 1], of["sequential", 1]
            rows.append([f"{pair[0]} : {pair[1]}", f"{duplex['r']:.2f}", f"{duplex['bound']:.2f}",
                         f"{base['source_ms']:.0f}", f"{base['target_ms']:.0f}",
                         *(f"{of[way]['wall_ms']:.0f} ms" for way in
                           (("sequential", 1), ("sequential", 2), ("interleaved", 2),
                            ("re-encoding", 2), ("duplex", 1))),
                         f"{duplex['speedup_over_sequential_x1']:.2f} "
                         f"({duplex['speedup_min']:.2f} to {duplex['speedup_max']:.2f})",
                         f"{duplex['overlap_efficiency']:.2f}"])
        table(rows)


def print_switch(records):
    """One row for each source length."""
    table([["source tokens", "switch, median", "p99", "cache bytes moved", "copying instead",
            "the forward that follows"]] +
          [[f"{r['source_tokens']:,}", f"{r['snapshot_us_median']:.2f} us",
            f"{r['snapshot_us_p99']:.2f} us", f"{r['cache_bytes_moved']}",
            f"{r['copying_ms']:.1f} ms ({r['copying_bytes'] / 1e6:,.0f} MB)",
            f"{r['write_forward_ms']:.1f} ms"] for r in records])


def print_endless(records):
    """One row for each model."""
    rows = [["model", "source + target tokens", "median, second tenth", "last tenth",
             "p99.9 / median (worst tenth)", "resident memory"]]
    for record in records:
        second, last = record["bins"][1], record["bins"][-1]
        worst = max(b["p999_us"] / b["median_us"] for b in record["bins"])
        rows.append([record["model"], f"{record['source_tokens']:,} + {record['target_tokens']:,}",
                     f"{second['median_us']:.1f} us",
                     f"{last['median_us']:.1f} us "
                     f"({100 * (last['median_us'] / second['median_us'] - 1):+.1f}%)",
                     f"{worst:.1f}",
                     f"{last['rss_bytes'] / 1e6:.1f} MB, last "
                     f"{100 * (last['rss_bytes'] / second['rss_bytes'] - 1):+.2f}%"])
    table(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=pathlib.Path,
                        default=pathlib.Path("build/bench/duplex_bench"))
    parser.add_argument("--model", type=pathlib.Path,
                        help="a GGUF file (default: random weights of --geometry)")
    parser.add_argument("--tiny", type=pathlib.Path, help="a tiny model for a second endless run")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("bench/results"))
    parser.add_argument("--name", default="", help="added to the files' names")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--table", action="store_true", help="only print the tables")
    parser.add_argument("arguments", nargs="*", help="for duplex_bench, after --")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if not options.table:
        for experiment in options.only:
            records = run(options, experiment, options.model)
            if experiment == "endless" and options.tiny is not None:
                records += run(options, experiment, options.tiny)
            path = options.output / f"duplex_{experiment}{options.name}.jsonl"
            path.write_text("".join(json.dumps(record) + "\n" for record in records),
                            encoding="utf-8")
            print(f"wrote {path}", file=sys.stderr)
    printers = {"overlap": print_overlap, "switch": print_switch, "endless": print_endless}
    for experiment in options.only:
        for path in sorted(options.output.glob(f"duplex_{experiment}*.jsonl")):
            printers[experiment]([json.loads(line)
                                  for line in path.read_text(encoding="utf-8").splitlines()])


if __name__ == "__main__":
    main()
