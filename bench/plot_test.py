#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What plot.py decides before it draws; needs no matplotlib.

    plot_test.py [unittest arguments]
"""

import pathlib
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import plot  # noqa: E402


def endless(model="tiny.gguf", policy="sink-window", window=508, threads=1, commit="aaa"):
    meta = {key: value for key, value in (("threads", threads), ("commit", commit)) if value}
    return {"kind": "endless", "model": model, "policy": policy, "sinks": 4, "window": window,
            "bins": [], "meta": meta}


def names(*records):
    return [name for name, _ in plot.told_apart(records)]


class Endless(unittest.TestCase):
    def test_one_needs_no_name(self):
        self.assertEqual(names(endless()), ["endless"])

    def test_models_are_enough_where_they_differ(self):
        self.assertEqual(names(endless(), endless("b c", window=9)),
                         ["endless_tiny.gguf", "endless_b_c"])

    def test_what_differs_tells_records_of_one_model_apart(self):
        self.assertEqual(names(endless(), endless(window=252), endless("other")),
                         ["endless_tiny.gguf_4_508", "endless_tiny.gguf_4_252", "endless_other"])
        self.assertEqual(names(endless(), endless(threads=2)),
                         ["endless_tiny.gguf_threads_1", "endless_tiny.gguf_threads_2"])
        self.assertEqual(names(endless(), endless(commit="bbb"), endless(commit="bbb", threads=2)),
                         ["endless_tiny.gguf_threads_1_commit_aaa",
                          "endless_tiny.gguf_threads_1_commit_bbb",
                          "endless_tiny.gguf_threads_2"])
        self.assertEqual(names(endless(policy="window"), endless(policy=None)),
                         ["endless_tiny.gguf_window", "endless_tiny.gguf_no_policy"])

    def test_repetitions_are_numbered(self):
        self.assertEqual(names(endless(), endless(), endless()),
                         ["endless_tiny.gguf", "endless_tiny.gguf_run_2",
                          "endless_tiny.gguf_run_3"])

    def test_no_name_is_given_twice(self):
        # Names of files that only letters outside of them would tell apart, and one that is taken.
        found = names(endless("a b"), endless("a_b"), endless("a?b"), endless("a b run 2"),
                      endless(""), endless("", commit=None, threads=None))
        self.assertEqual(len(set(found)), len(found), found)


def torch_step(**fields):
    return {"bench": "decoder_step_torch", "model": "m", "entries": 256, **fields}


class StepRatios(unittest.TestCase):
    def test_a_time_over_that_of_its_own_run(self):
        rows = [torch_step(compiled_ms=6.0, best_ms=5.0, sluice_ms=4.0),
                {"bench": "decoder_llama_cpp", "task": "step", "model": "m", "type": "q8_0",
                 "entries": 1024, "llama_cpp_ms": 9.0, "sluice_ms": 3.0}]
        self.assertEqual(plot.step_ratios(rows), {
            "PyTorch, compiled": {("m", 256): 1.5}, "PyTorch, its best way": {("m", 256): 1.25},
            "llama.cpp, q8_0": {("m", 1024): 3.0}})

    def test_of_several_runs_the_least(self):
        rows = [torch_step(best_ms=5.0, sluice_ms=4.0), torch_step(best_ms=4.4, sluice_ms=4.0),
                torch_step(best_ms=4.8, sluice_ms=4.0)]
        self.assertEqual(plot.step_ratios(rows), {"PyTorch, its best way": {("m", 256): 1.1}})

    def test_what_has_no_ratio_is_left_out(self):
        rows = [torch_step(best_ms=5.0), torch_step(sluice_ms=4.0, errors={"tuned": "no"}),
                {"bench": "decoder_step", "model": "m", "entries": 256, "ms": 4.0},
                {"bench": "decoder_llama_cpp", "task": "prefill", "model": "m", "type": "q8_0",
                 "prompt": 4096, "llama_cpp_ms": 9.0, "sluice_ms": 3.0}]
        self.assertEqual(plot.step_ratios(rows), {})


if __name__ == "__main__":
    unittest.main()
