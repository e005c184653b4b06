#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Runs duplex_text_cuda beside duplex_text: the same sources with another backend tag.

    duplex_text_cuda_test.py --duplex-text PROGRAM --duplex-text-cuda PROGRAM
                             --make-tiny-model PROGRAM [unittest arguments]

Without a GPU the program must say so; what needs one is skipped then.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

TIMEOUT = 120
CPU = CUDA = MODEL = None
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 8
NO_DEVICE = "no GPU that the CUDA backend can use"
# Both rings go round several times.
SMALL = ("--groups", "source=sinks:4+window:24,target=sinks:2+window:16")


def run(program, *arguments, stdin=TEXT):
    command = [program, "-m", MODEL, *arguments]
    return subprocess.run([os.fspath(word) for word in command], input=stdin.encode(),
                          capture_output=True, timeout=TIMEOUT, check=False)


def events(result, *kinds):
    return [event for event in map(json.loads, result.stdout.splitlines())
            if event["kind"] in kinds]


def final_tokens(result):
    tokens = []
    for event in events(result, "token", "confirmed"):
        tokens += [event["token"]] if event["kind"] == "token" else event["tokens"]
    return tokens


def has_device():
    return NO_DEVICE not in run(CUDA, "--max-tokens", "1", stdin="x").stderr.decode()


class DuplexTextCudaTest(unittest.TestCase):
    def assertFails(self, result, status, *words):
        errors = result.stderr.decode()
        self.assertEqual(result.returncode, status, errors)
        self.assertEqual(result.stdout, b"")
        for word in words:
            self.assertIn(word, errors)

    def written(self, program, *arguments):
        result = run(program, "--json", "--ignore-eos", *arguments)
        self.assertEqual(result.returncode, 0, result.stderr.decode())
        return result

    def needs_device(self):
        if not has_device():
            self.skipTest("no CUDA device")

    def test_it_says_that_there_is_no_gpu(self):
        if has_device():
            self.skipTest("there is one")
        self.assertFails(run(CUDA), 1, "duplex_text: device: " + NO_DEVICE,
                         "expected an NVIDIA GPU of compute capability 8.0", "found ")

    def test_it_says_what_it_lacks(self):
        self.needs_device()
        for arguments, word in ((("--policy", "attention"), "newest_source_tokens"),
                                (("--layout", "interleaved"), "layout"),
                                (("--layout", "overlapped"), "layout")):
            with self.subTest(arguments):
                self.assertFails(run(CUDA, *arguments), 1, word, "found ")

    def test_in_turns_or_at_once_it_writes_the_same_tokens(self):
        self.needs_device()
        for arguments in ((), SMALL, (*SMALL, "--position", "in-text"),
                          (*SMALL, "--temp", "1", "--seed", "7"),
                          (*SMALL, "--policy", "local-agreement", "--longest", "6"),
                          (*SMALL, "--policy", "hold-n", "--n", "2"),
                          ("--policy", "batch", "--layout", "gap")):
            with self.subTest(arguments):
                at_once = self.written(CUDA, "--max-tokens", "60", *arguments)
                in_turns = self.written(CUDA, "--max-tokens", "60", "--sequential", *arguments)
                self.assertEqual(len(final_tokens(at_once)), 60)
                self.assertEqual(final_tokens(in_turns), final_tokens(at_once))

    def test_it_reads_and_writes_as_the_cpus(self):
        self.needs_device()
        for arguments in ((), SMALL):
            with self.subTest(arguments):
                found, expected = (self.written(program, "-k", "2", "--max-tokens", "40", *arguments)
                                   for program in (CUDA, CPU))
                # Rounding may part the texts, later.
                self.assertEqual(final_tokens(found)[:1], final_tokens(expected)[:1])
                figures = [events(result, "report")[0] for result in (found, expected)]
                for name in ("tokens_final", "ended", "unit_wait", "token_wait"):
                    self.assertEqual(figures[0][name], figures[1][name], name)
                self.assertEqual(figures[0]["setting"]["backend"], "cuda")
                self.assertEqual(figures[1]["setting"]["backend"], "cpu")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--duplex-text", required=True, type=pathlib.Path, metavar="PROGRAM")
    parser.add_argument("--duplex-text-cuda", required=True, type=pathlib.Path, metavar="PROGRAM")
    parser.add_argument("--make-tiny-model", required=True, type=pathlib.Path, metavar="PROGRAM")
    arguments, rest = parser.parse_known_args()
    global CPU, CUDA, MODEL
    CPU = arguments.duplex_text.resolve()
    CUDA = arguments.duplex_text_cuda.resolve()
    with tempfile.TemporaryDirectory() as folder:
        MODEL = pathlib.Path(folder) / "tiny.gguf"
        subprocess.run([arguments.make_tiny_model.resolve(), MODEL], check=True, timeout=TIMEOUT)
        program = unittest.main(argv=[sys.argv[0], *rest], exit=False, verbosity=1)
    return 0 if program.result.wasSuccessful() else 1


if __name__ == "__main__":
    sys.exit(main())
