#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Runs the command line tool as its users do: flags, pipes, signals, snapshots, damaged input.

    stream_text_test.py --stream-text PROGRAM --make-tiny-model PROGRAM [unittest arguments]

The model is the seeded tiny one. The one test that needs a real model takes it from the environment
variable SLUICE_MODEL or from the user's cache folder, and is skipped where there is none.
"""

import argparse
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import unittest

import signals

TIMEOUT = 120
PROGRAM = MAKE_MODEL = MODEL = FOLDER = None
GREEDY = ("--temp", "0", "--ignore-eos")
TEXT = ("It was a bright cold day in April, and the clocks were striking thirteen.\n"
        "She said: \u201cna\u00efve caf\u00e9s?\u201d \u2014 \u4f60\u597d\n\n"
        "  indented, 3.14159\t!\n")


def run(*arguments, model=True, stdin=b"", threads=1):
    """Runs the tool to its end; stdin is closed after `stdin`."""
    command = [PROGRAM, *(("-m", MODEL) if model else ()), "-t", str(threads), *arguments]
    return subprocess.run([os.fspath(word) for word in command], input=stdin, capture_output=True,
                          timeout=TIMEOUT, check=False)


def start(*arguments):
    command = [PROGRAM, "-m", MODEL, "-t", "1", *arguments]
    return subprocess.Popen([os.fspath(word) for word in command], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def events(result, kind):
    return [event for event in map(json.loads, result.stdout.splitlines())
            if event["kind"] == kind]


def tokens(result):
    return [event["token"] for event in events(result, "token")]


class StreamTextTest(unittest.TestCase):
    def assertFails(self, result, status, *words):
        """Exit status, one message on stderr that has `words`, nothing on stdout."""
        errors = result.stderr.decode()
        self.assertEqual(result.returncode, status, errors)
        self.assertEqual(result.stdout, b"")
        messages = [line for line in errors.splitlines() if line.startswith("stream_text: ")]
        self.assertEqual(len(messages), 1, errors)
        for word in words:
            self.assertIn(word, messages[0])

    def assertDone(self, result):
        self.assertEqual(result.returncode, 0, result.stderr.decode())
        return result

    # --- Flags -----------------------------------------------------------------------------------

    def test_help_shows_options_with_defaults(self):
        result = self.assertDone(run("--help", model=False))
        text = result.stdout.decode()
        self.assertEqual(result.stderr, b"")
        for expected in ("--sinks INT=4", "--window INT=1024", "=sink-window", "=in-cache",
                         "--temp FLOAT=0.8", "--top-k INT=40", "--predict", "INT=256",
                         "Exit status"):
            self.assertIn(expected, text)

    def test_version(self):
        self.assertRegex(self.assertDone(run("--version", model=False)).stdout.decode(),
                         r"^stream_text \(sluice \d+\.\d+\.\d+\)\n$")

    def test_wrong_flags_and_values_name_themselves(self):
        for arguments, words in (
                (["--no-such-flag"], ["--no-such-flag"]),
                (["--sinks", "-1"], ["--sinks", "-1"]),
                (["--sinks", "many"], ["--sinks", "many"]),
                (["--sinks", "99999999999999999999"], ["--sinks", "99999999999999999999"]),
                (["--window", "0"], ["--window", "'0'"]),
                (["--window", "12x"], ["--window", "12x"]),
                (["--policy", "sinks"], ["--policy", "sinks"]),
                (["--position", "nowhere"], ["--position", "nowhere"]),
                (["--kv-type", "f8"], ["--kv-type", "f8"]),
                (["-n", "-2"], ["--predict", "-2"]),
                (["--temp", "-0.1"], ["--temp", "-0.1"]),
                (["--temp", "nan"], ["--temp", "nan"]),
                (["--top-p", "1.5"], ["--top-p", "1.5"]),
                (["--repeat-penalty", "0"], ["--repeat-penalty", "0"]),
                (["-t", "0"], ["--threads", "0"]),
                (["--window", "8", "--chunk", "9"], ["--chunk", "8", "9"]),
                (["--policy", "full", "--capacity", "8", "-b", "9"], ["--chunk", "8", "9"]),
                (["--system", "x"], ["--system", "--chat"]),
                (["--chat"], ["--chat", "--prompt"]),
                (["-f", "x"], ["--file", "--prompt"]),
                (["--perplexity", "x"], ["--perplexity", "--prompt"]),
                (["--ppl-stride", "5"], ["--ppl-stride", "--perplexity"])):
            with self.subTest(arguments):
                self.assertFails(run("-p", "x", *arguments), 2, *words)
        self.assertFails(run("-p", "x", model=False), 2, "--model")

    def test_an_option_given_twice_counts_the_last_time(self):
        result = self.assertDone(run("-p", "x", "-n", "5", "-n", "2", "--ignore-eos",
                                     "--format", "json"))
        self.assertEqual(len(tokens(result)), 2)

    def test_options_without_effect_are_named(self):
        result = self.assertDone(run("-p", "x", "-n", "1", "--policy", "full", "--window", "9"))
        self.assertIn("--window has no effect", result.stderr.decode())

    def test_no_sinks_is_warned_about(self):
        def warned(*arguments):
            return b"warning" in self.assertDone(run("-p", "x", "-n", "1", *arguments)).stderr
        self.assertTrue(warned("--sinks", "0"))
        self.assertFalse(warned("--sinks", "1"))
        self.assertFalse(warned("--sinks", "0", "--policy", "full"))

    def test_a_cache_beyond_memory_is_refused_before_it_is_made(self):
        self.assertFails(run("-p", "x", "--sinks", str(1 << 30), "--window", str(1 << 30),
                             "--kv-type", "f32"), 1, "capacity", "memory", "MiB")

    # --- Input -----------------------------------------------------------------------------------

    def test_missing_and_damaged_models(self):
        self.assertFails(run("-p", "x", "-m", FOLDER / "none.gguf"), 1, "io", "none.gguf")
        whole = MODEL.read_bytes()
        for name, content in (("short.gguf", whole[:len(whole) // 2]), ("empty.gguf", b""),
                              ("other.gguf", b"GGUX" + whole[4:])):
            with self.subTest(name):
                (FOLDER / name).write_bytes(content)
                self.assertFails(run("-p", "x", "-m", FOLDER / name), 1, "format", name)
        self.assertFails(run("-p", "x", "-m", FOLDER), 1, "safetensors")

    def test_invalid_utf8_is_told_with_its_byte(self):
        self.assertFails(run("-p", b"ab\xff"), 1, "text", "byte 2")
        self.assertFails(run(stdin=b"word " * 14000 + b"\xc3("), 1, "text", "stdin", "byte 70000")
        for broken in (b"\xc3", b"\x80", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80",
                       b"\xf8\x88\x80\x80\x80"):
            with self.subTest(broken):
                self.assertFails(run(stdin=b"four" + broken), 1, "text", "byte 4")

    def test_missing_input_file(self):
        self.assertFails(run("-f", FOLDER / "none.txt"), 1, "io", "none.txt")

    def test_empty_input_starts_from_the_begin_token(self):
        result = self.assertDone(run("-n", "3", *GREEDY, "--format", "json"))
        self.assertEqual(len(tokens(result)), 3)
        self.assertEqual(events(result, "report")[0]["tokens_read"], 1)

    def test_prompt_file_and_stdin_are_the_same(self):
        (FOLDER / "prompt.txt").write_text(TEXT, encoding="utf-8")
        ways = [run("-p", TEXT, "-n", "20", *GREEDY),
                run("-f", FOLDER / "prompt.txt", "-n", "20", *GREEDY),
                run("-n", "20", *GREEDY, stdin=TEXT.encode()),
                run("-f", "-", "-n", "20", *GREEDY, stdin=TEXT.encode())]
        self.assertGreater(len(self.assertDone(ways[0]).stdout), 0)
        for way in ways[1:]:
            self.assertEqual(self.assertDone(way).stdout, ways[0].stdout)

    def test_text_that_arrives_in_bits_gives_the_same_tokens(self):
        """Sizes up to 7 cut words, line feeds and characters everywhere."""
        text = (TEXT * 8).encode()
        whole = self.score(stdin=text)
        for size in (1, 2, 3, 7):
            process = start("--perplexity", "--format", "json", "--window", "64")
            for begin in range(0, len(text), size):
                process.stdin.write(text[begin:begin + size])
                process.stdin.flush()
            output, errors = process.communicate(timeout=TIMEOUT)
            self.assertEqual(process.returncode, 0, errors.decode())
            part = json.loads(output)
            self.assertEqual(part["tokens"], whole["tokens"])
            # Other tokens would differ in the first digits; rounding of float32 sums does not.
            self.assertAlmostEqual(part["nll_mean"], whole["nll_mean"], delta=1e-4)

    # --- Writing ---------------------------------------------------------------------------------

    def test_stdout_has_the_text_alone(self):
        arguments = ("-p", "Hello", "-n", "60", "--ignore-eos", "--seed", "7")
        text = self.assertDone(run(*arguments)).stdout.decode()
        as_json = self.assertDone(run(*arguments, "--format", "json"))
        joined = "".join(event["text"] for event in map(json.loads, as_json.stdout.splitlines())
                         if event["kind"] in ("token", "text"))
        self.assertEqual(text, joined)
        self.assertGreater(len(text), 20)

    def test_json_lines(self):
        result = self.assertDone(run("-p", "Hello", "-n", "25", "--ignore-eos", "--format", "json",
                                     "--window", "9"))
        written = events(result, "token")
        self.assertEqual([event["index"] for event in written], list(range(25)))
        times = [event["time_ms"] for event in written]
        self.assertEqual(times, sorted(times))
        last = json.loads(result.stdout.splitlines()[-1])
        self.assertEqual((last["kind"], last["ended"], last["tokens_written"]),
                         ("report", "limit", 25))
        self.assertEqual(last["inter_token_ms"]["count"], 24)
        self.assertGreater(last["ttft_from_last_input_ms"]["p50"], 0)
        setting = last["setting"]
        self.assertEqual((setting["policy"], setting["sinks"], setting["window"],
                          setting["position"]), ("sink-window", 4, 9, "in-cache"))
        self.assertIn("--window 9", setting["command"])

    def test_the_memory_that_was_announced_is_the_memory_that_is_used(self):
        for arguments in ((), ("--kv-type", "f32"), ("--policy", "full", "--capacity", "77"),
                          # 64 slots: scales fill whole cache lines
                          ("--kv-type", "int8", "--policy", "full", "--capacity", "64"),
                          ("--window", "13", "--sinks", "3", "--chunk", "5")):
            with self.subTest(arguments):
                result = self.assertDone(run("-p", "x", "-n", "1", "--format", "json", *arguments))
                used = events(result, "report")[0]["cache_bytes"]
                self.assertIn(f"; {used / 1024:.1f} KiB, fixed", result.stderr.decode())

    def test_threads_do_not_change_the_text(self):
        for policy in ("sink-window", "window", "full", "recompute"):
            with self.subTest(policy):
                arguments = ("-p", TEXT, "-n", "80", "--policy", policy, "--window", "24",
                             "--capacity", "400", "--seed", "3", "--ignore-eos")
                one = self.assertDone(run(*arguments, threads=1))
                two = self.assertDone(run(*arguments, threads=2))
                self.assertEqual(one.stdout, two.stdout)
                self.assertGreater(len(one.stdout), 80)

    def test_every_cache_setting_writes(self):
        for arguments in (("--position", "in-text"), ("--keys", "raw"), ("--kv-type", "f32"),
                          ("--kv-type", "bf16"), ("--kv-type", "int8"), ("--kv-type", "fp8"),
                          ("--sinks", "0"), ("--chunk", "1"),
                          ("--window", "1"), ("--keys", "raw", "--policy", "window")):
            with self.subTest(arguments):
                result = self.assertDone(run("-p", TEXT, "-n", "40", "--window", "16", *GREEDY,
                                             "--format", "json", *arguments))
                self.assertEqual(len(tokens(result)), 40)

    def test_blocks_need_heads_that_they_divide(self):
        for kv_type in ("q8_0", "q4_0"):  # the tiny model's heads have 16 channels
            with self.subTest(kv_type):
                self.assertFails(run("-p", "x", "--kv-type", kv_type), 1, "head_dim",
                                 "a multiple of 32")

    def test_a_full_cache_says_so(self):
        result = run("-p", "x", "-n", "100", *GREEDY, "--policy", "full", "--capacity", "20")
        self.assertEqual(result.returncode, 1)
        self.assertIn("ended    cache full", result.stderr.decode())
        self.assertIn("holds 20 tokens", result.stderr.decode())

    def test_a_prompt_longer_than_a_full_cache(self):
        result = run("-p", TEXT, "--policy", "full", "--capacity", "20")
        self.assertFails(result, 1, "capacity", "20")

    # --- The surroundings ------------------------------------------------------------------------

    def test_signals_end_with_the_report(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(number):
                process = start("-p", "x", "-n", "-1", "--ignore-eos", "--window", "16")
                self.assertNotEqual(process.stdout.read(50), b"")  # it writes
                process.send_signal(number)
                _, errors = process.communicate(timeout=TIMEOUT)
                self.assertEqual(process.returncode, 128 + number)
                self.assertIn("ended    signal", errors.decode())
                self.assertIn("between  p50", errors.decode())

    def test_a_signal_while_waiting_for_input(self):
        process = start("--chat")
        while b"running" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT)
        self.assertEqual(process.returncode, 130)
        self.assertIn("ended    signal", errors.decode())

    def test_a_signal_while_a_pipe_is_opened(self):
        path = FOLDER / "nobody.fifo"
        os.mkfifo(path)
        process = start("-f", path)
        while b"running" not in process.stderr.readline():
            pass
        time.sleep(0.3)  # for the open that waits
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=TIMEOUT)
        self.assertEqual(process.returncode, 130)

    def test_a_signal_does_not_wait_for_a_reader(self):
        process = start("-p", "x", "-n", "-1", "--ignore-eos", "--window", "16", "--format", "json")
        self.assertEqual(signals.signal_unread(process, signal.SIGINT), 130)
        output, _ = process.communicate()
        self.assertGreater(len(output), 4096)

    def test_a_signal_while_scoring_gives_what_there_is(self):
        for pause in (0.5, 3, 20):  # for the tokens that have arrived, on a busy machine too
            process = start("--perplexity", "--format", "json", "--ppl-stride", "10")
            process.stdin.write(TEXT.encode())
            process.stdin.flush()
            while b"running" not in process.stderr.readline():
                pass
            time.sleep(pause)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=TIMEOUT)
            self.assertEqual(process.returncode, 130)
            found = json.loads(output)
            self.assertEqual(found["meta"]["ended"], "signal")
            if found["tokens"] and found["tokens"][-1] > 10:
                break
        else:
            self.fail("nothing was scored")

    def test_a_reader_that_leaves_ends_it_quietly(self):
        process = start("-p", "x", "-n", "-1", "--ignore-eos")
        self.assertEqual(len(process.stdout.read(10)), 10)
        process.stdout.close()
        errors = process.stderr.read().decode()
        self.assertEqual(process.wait(timeout=TIMEOUT), 0)
        self.assertNotIn("stream_text:", errors)
        process.stdin.close()
        process.stderr.close()

    @unittest.skipUnless(os.path.exists("/dev/full"), "no /dev/full")
    def test_a_full_disk_is_an_error(self):
        with open("/dev/full", "wb") as full:
            result = subprocess.run([PROGRAM, "-m", MODEL, "-p", "x", "-n", "5"], stdout=full,
                                    stderr=subprocess.PIPE, timeout=TIMEOUT, check=False)
        self.assertEqual(result.returncode, 1)
        self.assertIn(b"stream_text: io: write failed in stdout", result.stderr)

    # --- Snapshots -------------------------------------------------------------------------------

    def test_a_saved_stream_goes_on_as_if_it_had_not_stopped(self):
        snapshot = FOLDER / "stream.bin"
        for policy in ("sink-window", "window", "full", "recompute"):
            for sampling in (("--temp", "0"), ("--seed", "5", "--repeat-penalty", "1.2")):
                with self.subTest(policy=policy, sampling=sampling):
                    common = ("--policy", policy, "--window", "16", "--format", "json",
                              "--ignore-eos", *sampling)
                    whole = run("-p", "Hello there", "-n", "40", *common)
                    first = run("-p", "Hello there", "-n", "20", "--save", snapshot, *common)
                    second = run("--load", snapshot, "-n", "20", *common)
                    for result in (whole, first, second):
                        self.assertDone(result)
                    self.assertEqual(len(tokens(whole)), 40)
                    self.assertEqual(tokens(first) + tokens(second), tokens(whole))

    def test_policies_that_choose_are_saved_too(self):
        snapshot = FOLDER / "choosing.bin"
        text = "The clocks were striking thirteen, and nobody had counted them before. " * 4
        for policy in ("snap-kv", "h2o", "sir-llm", "quest", "tidal-decode", "light-transfer"):
            with self.subTest(policy=policy):
                common = ("--policy", policy, "--window", "64", "--capacity", "900", "--format",
                          "json", *GREEDY)
                whole = run("-p", text, "-n", "30", *common)
                first = run("-p", text, "-n", "14", "--save", snapshot, *common)
                second = run("--load", snapshot, "-n", "16", *common)
                for result in (whole, first, second):
                    self.assertDone(result)
                self.assertEqual(tokens(first) + tokens(second), tokens(whole))
                self.assertIn(policy.encode(), whole.stderr)
                self.assertFails(run("--load", snapshot, "-p", "x", *common, "--window", "72"), 1,
                                 "choosing.bin")
        self.assertFails(run("-p", text, "--perplexity", "--policy", "light-transfer"), 2,
                         "--policy", "light-transfer")

    def test_head_maps(self):
        path = FOLDER / "map.json"
        self.assertFails(run("-p", "x", "--policy", "per-head"), 2, "--heads")
        path.write_text('{"sluice_head_map": 1, "layers": [{"full": true}]}')
        self.assertFails(run("-p", "x", "--policy", "per-head", "--heads", path), 1, "map.json",
                         "layers")
        # Every layer full is the full cache; layers of a window let go of what it does not hold.
        layers = self.layers()
        text = "one two three four five six seven eight nine ten " * 6
        full = self.assertDone(run("-p", text, "-n", "20", "--policy", "full", *GREEDY))
        for entries, same in ((["{\"full\": true}"] * layers, True),
                              (["{\"sinks\": 1, \"window\": 8}"] * layers, False)):
            path.write_text('{"sluice_head_map": 1, "layers": [' + ",".join(entries) + "]}")
            mapped = self.assertDone(run("-p", text, "-n", "20", "--policy", "per-head", "--heads",
                                         path, *GREEDY))
            self.assertEqual(mapped.stdout == full.stdout, same)

    @staticmethod
    def layers():
        """Layers of the model, from the message of a map that has none."""
        path = FOLDER / "empty.json"
        path.write_text('{"sluice_head_map": 1, "layers": []}')
        error = run("-p", "x", "--policy", "per-head", "--heads", path).stderr.decode()
        return int(error.split(" entries")[0].split()[-1])

    def test_a_loaded_stream_reads_on(self):
        """Reading in two programs is reading in one."""
        snapshot = FOLDER / "read.bin"
        common = ("--window", "16", *GREEDY)
        whole = self.assertDone(run("-p", "one two three", "-n", "20", *common))
        self.assertDone(run("-p", "one two", "-n", "0", "--save", snapshot, *common))
        for second in (run("--load", snapshot, "-p", " three", "-n", "20", *common),
                       run("--load", snapshot, "-f", "-", "-n", "20", *common, stdin=b" three")):
            self.assertEqual(self.assertDone(second).stdout, whole.stdout)

    def test_what_is_written_at_the_end_is_checked_at_the_start(self):
        device = FOLDER / "device"  # as /dev/null, which a rename would do away with
        os.mkfifo(device)
        for option in ("--save", "--latency-log"):
            for path, words in ((device, ("device", "regular file", "a device or pipe")),
                                (FOLDER, ("regular file", "a folder")),
                                (FOLDER / "none" / "x", ("none", "No such file"))):
                with self.subTest(option=option, path=path):
                    self.assertFails(run("-p", "x", option, path), 1, "io", *words)
        self.assertTrue(device.is_fifo())

    def test_wrong_snapshots(self):
        snapshot = FOLDER / "wrong.bin"
        self.assertDone(run("-p", "x", "-n", "5", "--window", "16", "--save", snapshot))
        self.assertFails(run("--load", snapshot, "--window", "17"), 1, "wrong.bin", "window_size",
                         "17", "16")
        damaged = bytearray(snapshot.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        snapshot.write_bytes(damaged)
        self.assertFails(run("--load", snapshot, "--window", "16"), 1, "wrong.bin", "checksum")
        self.assertFails(run("--load", FOLDER / "none.bin"), 1, "io", "none.bin")
        self.assertFails(run("--load", MODEL), 1, "format", MODEL.name)

    # --- Perplexity ------------------------------------------------------------------------------

    def score(self, *arguments, stdin=(TEXT * 8).encode(), window="64"):
        result = self.assertDone(run("--perplexity", "--format", "json", "--window", window,
                                     *arguments, stdin=stdin))
        return json.loads(result.stdout)

    def test_perplexity_of_a_file_and_of_stdin(self):
        path = FOLDER / "score.txt"
        path.write_text(TEXT * 8, encoding="utf-8")
        result = self.assertDone(run("--perplexity", path, "--format", "json", "--window", "64"))
        from_file, from_stdin = json.loads(result.stdout), self.score()
        self.assertEqual(from_file["tokens"], from_stdin["tokens"])
        self.assertAlmostEqual(from_file["nll_mean"], from_stdin["nll_mean"], delta=1e-6)
        self.assertEqual(from_file["scored"], from_file["tokens"][-1] - 1)
        self.assertAlmostEqual(from_file["ppl"][-1], math.exp(from_file["nll_mean"]), places=9)
        text = self.assertDone(run("--perplexity", path, "--window", "64")).stdout.decode()
        self.assertRegex(text, r"^perplexity [\d.]+ over \d+ tokens, \d+ scored, [\d.]+ nats")

    def test_ways_to_read_do_not_change_the_score(self):
        """float32 keys, so that only rounding differs: 1e-4 nats is far above it, and far below
        what one wrong key does."""
        expected = self.score("--kv-type", "f32")
        for arguments in (("--token-wise",), ("--chunk", "5"), ("--chunk", "1"), ("--keys", "raw"),
                          ("-t", "2")):
            with self.subTest(arguments):
                found = self.score("--kv-type", "f32", *arguments)
                self.assertEqual(found["tokens"], expected["tokens"])
                self.assertAlmostEqual(found["nll_mean"], expected["nll_mean"], delta=1e-4)

    def test_policies_agree_while_nothing_has_left(self):
        expected = self.score("-n", "60", "--kv-type", "f32")
        self.assertEqual(expected["tokens"], [60])
        for arguments in (("--policy", "window"), ("--policy", "full"), ("--policy", "recompute"),
                          ("--sinks", "0"), ("--position", "in-text")):
            with self.subTest(arguments):
                found = self.score("-n", "60", "--kv-type", "f32", *arguments)
                self.assertAlmostEqual(found["nll_mean"], expected["nll_mean"], delta=1e-4)

    def test_points_and_subsets(self):
        points = self.score("--ppl-stride", "100")
        whole = points["tokens"][-1]
        self.assertEqual(points["tokens"], [*range(100, whole, 100), whole])
        some = self.score("--score-every", "7")
        self.assertEqual((some["score_every"], some["scored"]), (7, (whole - 1) // 7))
        recomputed = self.score("--policy", "recompute", "--score-every", "7", window="16")
        each = self.score("--policy", "recompute", window="16")
        self.assertEqual(recomputed["scored"], some["scored"])
        self.assertEqual(each["scored"], whole - 1)
        text = self.assertDone(run("--perplexity", "--ppl-stride", "100", "--score-every", "7",
                                   stdin=(TEXT * 8).encode())).stdout.decode().splitlines()
        self.assertEqual([line.count("\t") for line in text[:-1]], [2] * len(points["tokens"]))
        self.assertIn("every 7.", text[-1])

    def test_a_subset_of_a_recomputed_window_scores_the_same_tokens(self):
        """Scoring only the last token of a text is the difference of two whole scores."""
        def total(count, *arguments):
            found = self.score("--policy", "recompute", "-n", str(count), *arguments, window="16")
            return found["nll_mean"] * found["scored"]
        alone = total(61, "--score-every", "60")
        self.assertAlmostEqual(alone, total(61) - total(60), delta=1e-3)

    def test_a_full_cache_ends_the_score_with_what_it_has(self):
        result = run("--perplexity", "--format", "json", "--policy", "full", "--capacity", "50",
                     stdin=(TEXT * 8).encode())
        self.assertEqual(result.returncode, 1)
        self.assertEqual(json.loads(result.stdout)["tokens"], [50])
        self.assertIn("holds 50 tokens", result.stderr.decode())

    def test_nothing_to_score(self):
        self.assertFails(run("--perplexity"), 1, "nothing to score")
        self.assertFails(run("--perplexity", stdin=b"a"), 1, "nothing to score",
                         "at least two tokens", "found 1")
        self.assertFails(run("--perplexity", "--score-every", "1000", stdin=b"a b c"), 1,
                         "more tokens than --score-every 1000")

    # --- Dialogue --------------------------------------------------------------------------------

    def chat(self, text, *arguments):
        return self.assertDone(run("--chat", "-n", "12", "--window", "64", *GREEDY, *arguments,
                                   "--format", "json", stdin=text))

    def test_rounds_of_a_dialogue(self):
        result = self.chat(b"Hello\nHow are you?\nWell.")
        rounds = events(result, "round")
        self.assertEqual([r["round"] for r in rounds], [1, 2, 3])
        self.assertEqual([r["tokens_written"] for r in rounds], [12, 12, 12])
        report = events(result, "report")[0]
        self.assertEqual((report["turns"], report["ended"]), (3, "end of input"))
        self.assertEqual(report["tokens_read"], sum(r["tokens_read"] for r in rounds))
        # A later round starts with the end of the reply before: <|im_end|> and a line feed.
        same = events(self.chat(b"Hello\nHello\n"), "round")
        self.assertEqual(same[1]["tokens_read"], same[0]["tokens_read"] + 2)

    def test_reset_and_quit(self):
        once = tokens(self.chat(b"Hello\n"))
        self.assertEqual(len(once), 12)
        again = tokens(self.chat(b"Hello\n/reset\nHello\n/quit\nnot read\n"))
        self.assertEqual(again, once + once)
        self.assertEqual(events(self.chat(b"/quit\n"), "report")[0]["ended"], "quit")

    def test_the_system_message_is_read(self):
        plain = events(self.chat(b"Hello\n"), "round")[0]
        told = events(self.chat(b"Hello\n", "--system", "Be brief."), "round")[0]
        self.assertGreater(told["tokens_read"], plain["tokens_read"])

    def test_a_bad_line_does_not_end_a_dialogue(self):
        result = self.chat(b"Hello\n\xff\xfe\nHello\n")
        self.assertEqual(len(events(result, "round")), 2)
        self.assertIn(b"UTF-8", result.stderr)

    def test_a_saved_dialogue_goes_on(self):
        snapshot = FOLDER / "chat.bin"
        whole = tokens(self.chat(b"Hello\nGo on.\n"))
        first = tokens(self.chat(b"Hello\n", "--save", snapshot))
        second = tokens(self.chat(b"Go on.\n", "--load", snapshot))
        self.assertEqual(first + second, whole)

    def test_a_reply_comes_before_the_next_line(self):
        process = start("--chat", "-n", "3", "--ignore-eos", "--format", "json")
        for _ in range(2):
            process.stdin.write(b"Hello\n")
            process.stdin.flush()
            kinds = [json.loads(process.stdout.readline())["kind"] for _ in range(3)]
            self.assertEqual(kinds, ["token"] * 3)
            while json.loads(process.stdout.readline())["kind"] != "round":
                pass
        _, errors = process.communicate(timeout=TIMEOUT)
        self.assertEqual(process.returncode, 0, errors.decode())

    def test_many_rounds_in_the_same_memory(self):
        rounds = events(self.chat(b"Hello, how are you today?\n" * 120), "round")
        self.assertEqual(len(rounds), 120)
        memory = [r["resident_bytes"] for r in rounds]
        # After the first rounds, at most a few pages of the allocator's own.
        self.assertLess(max(memory[20:]) - memory[20], 256 * 1024)

    # --- Latency log -----------------------------------------------------------------------------

    def read_log(self, *arguments, stdin=b""):
        path = FOLDER / "log.json"
        self.assertDone(run("--window", "16", "--latency-log", path, *arguments, stdin=stdin))
        log = json.loads(path.read_text())
        self.assertEqual(log["kind"], "endless")
        bins = log["bins"]
        self.assertEqual(bins[0]["from"], 0)
        for left, right in zip(bins, bins[1:]):
            self.assertEqual(left["to"], right["from"])
        for part in bins:
            self.assertLess(0, part["median_us"])
            self.assertLessEqual(part["median_us"], part["p99_us"])
            self.assertLessEqual(part["p99_us"], part["p999_us"])
            self.assertLessEqual(part["p999_us"], part["max_us"])
            self.assertGreater(part["rss_bytes"], 1 << 20)
        return bins

    def test_latency_by_tenths(self):
        bins = self.read_log("-p", "x", "-n", "200", "--ignore-eos")
        self.assertEqual([part["to"] for part in bins], list(range(20, 201, 20)))
        bins = self.read_log("-p", "x", "-n", "103", "--ignore-eos", "--endless-bins", "4")
        self.assertEqual([part["to"] for part in bins], [26, 52, 78, 103])

    def test_latency_of_a_stream_of_unknown_length(self):
        text = (TEXT * 60).encode()
        count = self.score(stdin=text)["tokens"][-1]
        bins = self.read_log("--perplexity", "--token-wise", "--endless-bins", "5", stdin=text)
        self.assertEqual((len(bins), bins[-1]["to"]), (5, count))
        lengths = [part["to"] - part["from"] for part in bins]
        self.assertLess(max(lengths), 1.5 * min(lengths))

    # --- The models ------------------------------------------------------------------------------

    def test_the_tiny_model_depends_on_its_seed_alone(self):
        def made(*arguments):
            path = FOLDER / "made.gguf"
            subprocess.run([MAKE_MODEL, path, *arguments], check=True, timeout=TIMEOUT)
            return path.read_bytes()
        self.assertEqual(made(), MODEL.read_bytes())
        self.assertEqual(made("--seed", "0"), MODEL.read_bytes())
        self.assertNotEqual(made("--seed", "1"), MODEL.read_bytes())

    def test_the_tiny_model_cannot_be_written(self):
        def status(*arguments):
            return subprocess.run([MAKE_MODEL, *arguments], capture_output=True, timeout=TIMEOUT,
                                  check=False).returncode
        self.assertEqual(status(), 2)
        self.assertEqual(status("x", "--seed", "y"), 2)
        self.assertEqual(status(FOLDER / "no" / "such" / "folder.gguf"), 1)

    def test_a_real_model_knows_english(self):
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        model = os.environ.get("SLUICE_MODEL") or \
            cache / "sluice" / "SmolLM2-135M-Instruct.Q4_1.gguf"
        if not os.path.exists(model):
            self.skipTest(f"no model at {model}")
        english = (b"The history of the city is long. It was founded by merchants who came over "
                   b"the mountains, and for many years it was the largest market of the country.")
        found = json.loads(self.assertDone(run("-m", model, "--perplexity", "--format", "json",
                                               stdin=english, threads=2)).stdout)
        self.assertLess(found["ppl"][-1], 30)
        reply = self.assertDone(run("-m", model, "--chat", "-n", "24", "--temp", "0",
                                    stdin=b"What is the capital of France?\n", threads=2))
        self.assertIn(b"Paris", reply.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stream-text", required=True, type=pathlib.Path, metavar="PROGRAM")
    parser.add_argument("--make-tiny-model", required=True, type=pathlib.Path, metavar="PROGRAM")
    arguments, rest = parser.parse_known_args()
    global PROGRAM, MAKE_MODEL, MODEL, FOLDER
    PROGRAM = arguments.stream_text.resolve()
    MAKE_MODEL = arguments.make_tiny_model.resolve()
    with tempfile.TemporaryDirectory() as folder:
        FOLDER = pathlib.Path(folder)
        MODEL = FOLDER / "tiny.gguf"
        subprocess.run([MAKE_MODEL, MODEL], check=True, timeout=TIMEOUT)
        program = unittest.main(argv=[sys.argv[0], *rest], exit=False, verbosity=1)
    return 0 if program.result.wasSuccessful() else 1


if __name__ == "__main__":
    sys.exit(main())
