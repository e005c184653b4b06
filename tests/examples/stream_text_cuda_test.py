#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Runs stream_text_cuda beside stream_text: the same sources with another backend tag.

    stream_text_cuda_test.py --stream-text PROGRAM --stream-text-cuda PROGRAM
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
CPU = CUDA = MODEL = FOLDER = None
TEXT = ("It was a bright cold day in April, and the clocks were striking thirteen. " * 8)
NO_DEVICE = "no GPU that the CUDA backend can use"


def run(program, *arguments):
    command = [program, "-m", MODEL, "-t", "1", *arguments]
    return subprocess.run([os.fspath(word) for word in command], stdin=subprocess.DEVNULL,
                          capture_output=True, timeout=TIMEOUT, check=False)


def events(result, kind):
    return [event for event in map(json.loads, result.stdout.splitlines())
            if event["kind"] == kind]


def has_device():
    return NO_DEVICE not in run(CUDA, "-p", "x", "-n", "1").stderr.decode()


class StreamTextCudaTest(unittest.TestCase):
    def assertFails(self, result, status, *words):
        errors = result.stderr.decode()
        self.assertEqual(result.returncode, status, errors)
        self.assertEqual(result.stdout, b"")
        for word in words:
            self.assertIn(word, errors)

    def needs_device(self):
        if not has_device():
            self.skipTest("no CUDA device")

    def test_it_says_that_there_is_no_gpu(self):
        if has_device():
            self.skipTest("there is one")
        self.assertFails(run(CUDA, "-p", "Hello", "-n", "4"), 1, "stream_text: device: " + NO_DEVICE,
                         "expected an NVIDIA GPU of compute capability 8.0", "found ")

    def test_it_says_what_it_lacks(self):
        self.needs_device()
        for arguments, words in (
            (("--policy", "recompute"), ("cache.policy", "sink-window, window or full")),
            (("--policy", "h2o"), ("--policy", "h2o")),
            (("--kv-type", "f32"), ("--kv-type", "f32")),
            (("--kv-type", "q8_0"), ("--kv-type", "q8_0")),
            (("--keys", "raw"), ("cache.key_form", "rotated")),
        ):
            with self.subTest(arguments):
                self.assertFails(run(CUDA, "-p", "Hello", "-n", "4", *arguments), 1, *words)

    def test_the_same_perplexity(self):
        self.needs_device()
        text = FOLDER / "text.txt"
        text.write_text(TEXT, encoding="utf-8")
        options = ("--perplexity", text, "--sinks", "4", "--window", "60", "--format", "json")
        nll = {}
        for program in (CPU, CUDA):
            result = run(program, *options)
            self.assertEqual(result.returncode, 0, result.stderr.decode())
            nll[program] = events(result, "perplexity")[0]["nll_mean"]
        # Weights of 8 bits are widened to f16, chunks are rounded to it: 2^-12 of logits whose
        # spread is a few nats, in each of some ten products.
        self.assertAlmostEqual(nll[CUDA], nll[CPU], delta=0.02)

    def test_it_writes_for_as_long_as_it_is_asked(self):
        self.needs_device()
        options = ("-p", TEXT, "-n", "300", "--ignore-eos", "--sinks", "4", "--window", "60",
                   "--format", "json")
        texts = []
        for _ in range(2):
            result = run(CUDA, *options)
            self.assertEqual(result.returncode, 0, result.stderr.decode())
            texts.append([event["token"] for event in events(result, "token")])
        self.assertEqual(len(texts[0]), 300)
        self.assertEqual(texts[0], texts[1])

    def test_a_stream_goes_on_where_the_other_program_saved_it(self):
        self.needs_device()
        for kv_type, first, second in (("f16", CUDA, CPU), ("f16", CPU, CUDA), ("f16", CUDA, CUDA),
                                       ("int8", CUDA, CPU), ("int8", CPU, CUDA), ("fp8", CUDA, CUDA)):
            options = ("--temp", "0", "--ignore-eos", "--sinks", "4", "--window", "60",
                       "--kv-type", kv_type, "--format", "json")
            with self.subTest((kv_type, first.name, second.name)):
                state = FOLDER / "state"
                saved = run(first, "-p", TEXT, "-n", "70", "--save", state, *options)
                self.assertEqual(saved.returncode, 0, saved.stderr.decode())
                texts = []
                for program in (first, second):
                    result = run(program, "--load", state, "-n", "20", *options)
                    self.assertEqual(result.returncode, 0, result.stderr.decode())
                    texts.append([event["token"] for event in events(result, "token")])
                self.assertEqual(len(texts[1]), 20)
                if first == second:
                    self.assertEqual(texts[0], texts[1])
                else:  # rounding may choose another token; then the texts part
                    self.assertEqual(texts[0][:3], texts[1][:3])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stream-text", required=True, type=pathlib.Path, metavar="PROGRAM")
    parser.add_argument("--stream-text-cuda", required=True, type=pathlib.Path, metavar="PROGRAM")
    parser.add_argument("--make-tiny-model", required=True, type=pathlib.Path, metavar="PROGRAM")
    arguments, rest = parser.parse_known_args()
    global CPU, CUDA, MODEL, FOLDER
    CPU = arguments.stream_text.resolve()
    CUDA = arguments.stream_text_cuda.resolve()
    with tempfile.TemporaryDirectory() as folder:
        FOLDER = pathlib.Path(folder)
        MODEL = FOLDER / "tiny.gguf"
        subprocess.run([arguments.make_tiny_model.resolve(), MODEL], check=True, timeout=TIMEOUT)
        program = unittest.main(argv=[sys.argv[0], *rest], exit=False, verbosity=1)
    return 0 if program.result.wasSuccessful() else 1


if __name__ == "__main__":
    sys.exit(main())
