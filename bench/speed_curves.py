#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Cost as work grows, and how near it is to what the machine allows.

    python3 bench/speed_curves.py --model MODEL.gguf [--threads 2] [--activations int8]
                            [--windows 64 ... 16384] [--lengths 512 ... 16384] [--cached 1 1024 4096]
                            [--program build/bench/speed_bench] [--output bench/results]

Three tables: ms a step against the window (4 sinks among its keys), ms to read a text against its
length through 4 sinks + 1,020 keys, and single tokens behind a full cache. The machine's limits are
measured between the rows: a row's fraction is of the larger of those before and behind it.

  bytes / ms against the rate at which the same threads read memory, for single tokens
  products / ms against the rate of multiply-adds of the instruction that the weights' type uses

Nothing is asserted here. Writes OUTPUT/speed_curves_<weights>_t<threads>.jsonl (with f32
activations: ..._f32.jsonl), which plot.py draws.
"""

import argparse
import json
import pathlib
import re
import statistics
import subprocess


def rows(program, model, threads, activations, tasks):
    command = [program, model, str(threads)] + (["int8"] if activations == "int8" else []) + tasks
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def peak_name(weights, activations):
    """Which of the measured peaks the products of a file's weights could reach."""
    if activations != "int8":
        return "f32_gflop_per_s"
    return "bf16_gflop_per_s" if "bf16" in weights.lower() else "int8_gop_per_s"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--activations", choices=["f32", "int8"], default="int8")
    parser.add_argument("--windows", type=int, nargs="*",
                        default=[64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--lengths", type=int, nargs="*",
                        default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--cached", type=int, nargs="*", default=[1, 1024, 4096])
    parser.add_argument("--program", default="build/bench/speed_bench")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("bench/results"))
    arguments = parser.parse_args()

    tasks = ([f"window:{w}" for w in arguments.windows] +
             [f"decode:{n}" for n in arguments.cached] +
             [f"stream:{n}" for n in arguments.lengths])
    interleaved = ["limits"]
    for task in tasks:
        interleaved += [task, "limits"]
    found = rows(arguments.program, arguments.model, arguments.threads, arguments.activations,
                 interleaved)
    name = pathlib.Path(arguments.model).stem
    weights = re.sub(r"^.*\.|-only$", "", name)
    peak = peak_name(name, arguments.activations)
    print(f"| {name}, {arguments.threads} threads | ms: median, least | read, of the limit "
          "| products, of the peak |\n|---|---|---|---|")
    arguments.output.mkdir(parents=True, exist_ok=True)
    ending = "_f32.jsonl" if arguments.activations == "f32" else ".jsonl"
    path = arguments.output / f"speed_curves_{weights}_t{arguments.threads}{ending}"
    with open(path, "w", encoding="utf-8") as file:
        for i in range(1, len(found), 2):
            row, around = found[i], (found[i - 1], found[i + 1])
            task, number = row["task"].split(":")
            record = {"kind": "curve", "weights": weights, "activations": arguments.activations,
                      "threads": arguments.threads, "kernels": around[0]["kernels"], "task": task,
                      "tokens": int(number), "ms": statistics.median(row["ms"]),
                      "ms_least": min(row["ms"])}
            cells = ["", ""]
            for cell, (amount, rate, limit, unit) in enumerate((
                    ("bytes", "read_gb_per_s", "read_gb_per_s", "GB/s"),
                    ("products", "products_g_per_s", peak, "G/s"))):
                if row[amount]:
                    record[rate] = row[amount] / record["ms"] * 1e-6
                    record["limit"] = max(limits[limit] for limits in around)
                    cells[cell] = (f"{record[rate]:.0f} {unit}, "
                                   f"{record[rate] / record['limit']:.0%} of {record['limit']:.0f}")
            file.write(json.dumps(record) + "\n")
            print(f"| {row['task']} | {record['ms']:.2f}, {record['ms_least']:.2f} | {cells[0]} "
                  f"| {cells[1]} |")


if __name__ == "__main__":
    main()
