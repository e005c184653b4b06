#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Runs policies as its users do: tables, JSON, head maps, wrong flags.

    policies_test.py --policies PROGRAM --make-tiny-model PROGRAM [unittest arguments]

The model is the seeded tiny one: its likelihoods mean nothing, but they follow from the kept tokens.
"""

import argparse
import json
import math
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import unittest

PROGRAM = MODEL = FOLDER = None
NAMES = ["full", "window", "sink-window", "per-head", "snap-kv", "snap-kv-ranks", "h2o",
         "h2o-ranks", "q-filters", "sir-llm", "quest", "tidal-decode", "clusters", "lazy", "shards",
         "kivi"]
TEXT = ("It was a bright cold day in April, and the clocks were striking thirteen. "
        "Nobody had counted them before, and nobody would again.\n") * 12


def run(*arguments, stdin=TEXT):
    return subprocess.run([PROGRAM, "-m", MODEL, *map(str, arguments)], input=stdin.encode(),
                          capture_output=True, timeout=120, check=False)


def records(*arguments):
    done = run("--json", *arguments)
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.decode().splitlines()]


class Policies(unittest.TestCase):
    def test_every_policy_has_a_row(self):
        done = run("-n", 300, "-b", 32, "-c", 8)
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        rows = [line for line in done.stdout.decode().splitlines() if line.startswith("| ")]
        self.assertEqual([row.split("|")[1].strip() for row in rows], ["policy", *NAMES])

    def test_budgets_hold(self):
        by_name = {row["policy"]: row for row in records("-n", 300, "-b", 32, "-c", 8)}
        self.assertEqual(list(by_name), NAMES)
        for name, row in by_name.items():
            self.assertTrue(math.isfinite(row["perplexity"]) and row["perplexity"] > 1, name)
            keeps_all = name in ("full", "per-head", "quest", "tidal-decode", "clusters", "lazy",
                                 "kivi")
            self.assertEqual(row["entries"] > 32, keeps_all, name)
        self.assertLess(by_name["h2o"]["cache_bytes"], by_name["full"]["cache_bytes"] / 4)
        self.assertLess(by_name["per-head"]["cache_bytes"], by_name["full"]["cache_bytes"])
        # A window without sinks is another policy than one with them.
        self.assertNotEqual(by_name["window"]["perplexity"], by_name["sink-window"]["perplexity"])

    def test_a_budget_for_everything_is_the_full_cache(self):
        rows = records("-n", 100, "-b", 128, "-c", 8, "--policies", "full,window,snap-kv,h2o")
        for row in rows:
            self.assertAlmostEqual(row["perplexity"], rows[0]["perplexity"], delta=1e-3)

    def test_passkeys(self):
        rows = records("-n", 120, "-b", 32, "-c", 8, "-p", "sink-window,h2o", "--passkey", 3)
        asked = [row for row in rows if "digits_recalled" in row]
        self.assertEqual([row["policy"] for row in asked], ["sink-window"] * 3 + ["h2o"] * 3)
        for row in asked:
            self.assertIn(row["digits_recalled"], range(6))

    def test_an_interrupt_leaves_what_was_read(self):
        count = 400000
        path = FOLDER / "long.txt"
        path.write_text(TEXT * (count // len(TEXT) * 8))
        for pause in (1, 3, 6):  # for a few tokens, on a busy machine too
            with subprocess.Popen([PROGRAM, "-m", MODEL, "--json", "-f", path, "-n", str(count),
                                   "-b", "32", "-c", "8", "-p", "sink-window,window"],
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run_of_it:
                self.assertIn(b"sink-window (1 of 2)", run_of_it.stderr.readline())
                time.sleep(pause)
                run_of_it.send_signal(signal.SIGINT)
                out, errors = run_of_it.communicate(timeout=60)
            self.assertEqual(run_of_it.returncode, 130)
            rows = [json.loads(line) for line in out.decode().splitlines()]
            if rows and rows[0]["tokens"] >= 2:
                break
        [row] = rows
        self.assertTrue(row["interrupted"])
        self.assertTrue(2 <= row["tokens"] < count)
        self.assertIn("-p sink-window,window\n", errors.decode())

    def test_what_cannot_be_made_leaves_the_others(self):
        done = run("--json", "-n", 100, "-b", 16, "-c", 64, "-p", "window,full")
        self.assertEqual(done.returncode, 2)
        self.assertIn("window: config", done.stderr.decode())
        [row] = [json.loads(line) for line in done.stdout.decode().splitlines()]
        self.assertEqual(row["policy"], "full")

    def test_pass_keys_go_on_too(self):
        done = run("--json", "-n", 100, "-b", 16, "-c", 64, "-p", "window,full", "--passkey", 2)
        self.assertEqual(done.returncode, 2)
        self.assertIn("window, pass keys: config", done.stderr.decode())
        rows = [json.loads(line) for line in done.stdout.decode().splitlines()]
        self.assertEqual([row["policy"] for row in rows], ["full"] * 3)

    def test_head_maps(self):
        path = FOLDER / "map.json"
        path.write_text('{"sluice_head_map": 1, "layers": [{"full": true}]}')
        done = run("-p", "per-head", "--heads", path)
        self.assertEqual(done.returncode, 1)
        self.assertIn("layers", done.stderr.decode())
        done = run("-p", "per-head", "--heads", FOLDER / "absent.tsv")
        self.assertEqual(done.returncode, 1)
        self.assertIn("absent.tsv", done.stderr.decode())

    def test_wrong_flags(self):
        for arguments in (["-m", ""], ["-b", "4"], ["-p", "everything"], ["-n", "one"],
                          ["--sparsity", "2"]):
            done = run(*arguments)
            self.assertEqual(done.returncode, 2, arguments)
            self.assertEqual(done.stdout, b"")
            self.assertNotEqual(done.stderr, b"")
        self.assertEqual(run("-n", 20, stdin="").returncode, 1)

    def test_help(self):
        done = subprocess.run([PROGRAM, "--help"], capture_output=True, timeout=60, check=False)
        self.assertEqual(done.returncode, 0)
        for name in NAMES:
            self.assertIn(name, done.stdout.decode())


def main():
    global PROGRAM, MODEL, FOLDER
    parser = argparse.ArgumentParser()
    parser.add_argument("--policies", required=True)
    parser.add_argument("--make-tiny-model", required=True)
    options, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        FOLDER = pathlib.Path(folder)
        PROGRAM, MODEL = options.policies, str(FOLDER / "tiny.gguf")
        subprocess.run([options.make_tiny_model, MODEL], check=True, stdout=subprocess.DEVNULL)
        unittest.main(argv=[sys.argv[0], *rest])


if __name__ == "__main__":
    main()
