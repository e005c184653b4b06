#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Runs duplex_text as its users do: text that arrives slowly, every policy and layout, flags,
signals, a terminal.

    duplex_text_test.py --duplex-text PROGRAM --make-tiny-model PROGRAM [unittest arguments]

The model is the seeded tiny one: its text is noise, its tokens are the same on every machine.
"""

import argparse
import fcntl
import json
import math
import os
import pathlib
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import unittest

import signals

TIMEOUT = 60
PROGRAM = MAKE_MODEL = MODEL = FOLDER = None
POLICIES = ("wait-k", "separator", "local-agreement", "hold-n", "attention", "speak", "batch")
LAYOUTS = ("group", "decoupled", "gap", "batch", "interleaved", "overlapped")
TEXT = ("It was a bright cold day in April. The clocks were striking thirteen!\n"
        "\u201cNa\u00efve caf\u00e9s?\u201d \u4f60\u597d\u3002\n\n"
        "  indented, 3.14159\t!\nThe end")
SAMPLED = ("--temp", "1", "--seed", "7")
FIGURES = {
    "ttft_from_first_unit_ms", "ttft_from_last_unit_ms", "unit_wait", "token_wait",
    "inter_token_ms", "unit_to_token_ms", "units_fed", "source_tokens", "units_read",
    "tokens_written", "tokens_retracted", "target_forwards", "source_busy_ms", "target_busy_ms",
    "wall_ms", "work_ratio", "al", "laal"}


def command(*arguments, model=True):
    return [os.fspath(word) for word in (PROGRAM, *(("-m", MODEL) if model else ()), *arguments)]


def run(*arguments, model=True, stdin=TEXT.encode(), env=None):
    """Runs the program to its end; stdin is closed after `stdin`."""
    return subprocess.run(command(*arguments, model=model), input=stdin, capture_output=True,
                          timeout=TIMEOUT, check=False, env=env)


def start(*arguments, **more):
    """A test that reads lines and then calls communicate() wants bufsize=0: communicate() reads the
    pipe itself, without what a buffered readline() has already taken from it."""
    return subprocess.Popen(command(*arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **more)


def strict(line):
    """JSON has no NaN; Python would read it."""
    def refuse(word):
        raise ValueError(word)
    return json.loads(line, parse_constant=refuse)


def events(output, *kinds):
    found = [strict(line) for line in output.decode().splitlines()]
    return [event for event in found if event["kind"] in kinds] if kinds else found


def final_tokens(output):
    tokens = []
    for event in events(output, "token", "confirmed"):
        tokens += [event["token"]] if event["kind"] == "token" else event["tokens"]
    return tokens


class DuplexTextTest(unittest.TestCase):
    def assertFails(self, result, status, *words):
        """Exit status and one message on stderr that has `words`."""
        errors = result.stderr.decode()
        self.assertEqual(result.returncode, status, errors)
        messages = [line for line in errors.splitlines() if line.startswith("duplex_text: ")]
        self.assertEqual(len(messages), 1, errors)
        for word in words:
            self.assertIn(word, messages[0])

    def assertDone(self, result):
        self.assertEqual(result.returncode, 0, result.stderr.decode())
        return result

    def done(self, *arguments, **more):
        return self.assertDone(run(*arguments, **more)).stdout

    # --- Flags -----------------------------------------------------------------------------------

    def test_help_mentions_every_option_and_what_to_expect(self):
        result = self.assertDone(run("--help", model=False))
        text = result.stdout.decode()
        self.assertEqual(result.stderr, b"")
        for option in ("--model", "--source-threads", "--target-threads", "--sequential", "--file",
                       "--wpm", "--unit", "--max-unit", "--prompt", "--policy", "--k", "--first",
                       "--separator", "--n", "--longest", "--alpha", "--newest", "--layer",
                       "--threshold", "--silence", "--layout", "--phi", "--gap", "--source-tokens",
                       "--groups", "--position", "--max-tokens", "--stop-at-end-token",
                       "--ignore-eos", "--temp", "--top-k", "--top-p", "--min-p",
                       "--repeat-penalty", "--repeat-last-n", "--seed", "--json", "--report",
                       "--plain", "--reference-words", "--version"):
            self.assertRegex(text, rf"(?m)(^|[\s,]){re.escape(option)}\b", option)
        for word in (*POLICIES, *LAYOUTS, "SmolLM2", "not trained", "Exit status",
                     "source=sinks:4+window:1024"):
            self.assertIn(word, text)

    def test_version(self):
        self.assertRegex(self.done("--version", model=False).decode(),
                         r"^duplex_text \(sluice \d+\.\d+\.\d+\)\n$")

    def test_wrong_flags_and_values_name_themselves(self):
        for arguments, words in (
                (["--no-such-flag"], ["--no-such-flag"]),
                (["--policy", "wait"], ["--policy", "wait"]),
                (["--layout", "gpe"], ["--layout", "gpe"]),
                (["--unit", "page"], ["--unit", "page"]),
                (["-k", "0"], ["--k", "'0'"]),
                (["--first", "0"], ["--first", "'0'"]),
                (["--n", "-1"], ["--n", "-1"]),
                (["--longest", "0"], ["--longest", "'0'"]),
                (["--longest", "5000"], ["--longest", "5000"]),
                (["--alpha", "0"], ["--alpha", "'0'"]),
                (["--alpha", "1.1"], ["--alpha", "1.1"]),
                (["--newest", "0"], ["--newest", "'0'"]),
                (["--threshold", "2"], ["--threshold", "'2'"]),
                (["--phi", "nan"], ["--phi", "nan"]),
                (["--phi", "x"], ["--phi", "'x'"]),
                (["--gap", "-1"], ["--gap", "-1"]),
                (["--wpm", "-1"], ["--wpm", "-1"]),
                (["--wpm", "fast"], ["--wpm", "fast"]),
                (["--max-unit", "0"], ["--max-unit", "'0'"]),
                (["-n", "-2"], ["--max-tokens", "-2"]),
                (["-n", "0"], ["--max-tokens", "'0'"]),
                (["--temp", "-1"], ["--temp", "-1"]),
                (["--top-p", "2"], ["--top-p", "'2'"]),
                (["--source-threads", "0"], ["--source-threads", "'0'"]),
                (["--target-threads", "x"], ["--target-threads", "'x'"]),
                (["--position", "nowhere"], ["--position", "nowhere"]),
                (["--json", "--plain"], ["--plain", "--json"]),
                (["--stop-at-end-token", "--ignore-eos"], ["--stop-at-end-token", "--ignore-eos"]),
                (["--layout", "overlapped", "--position", "in-cache"], ["--position", "in-text"]),
                (["--layout", "batch"], ["--source-tokens", "stdin"]),
                (["--policy", "separator", "--separator", "no token has this"],
                 ["--separator", "no token has this"]),
                (["--policy", "speak", "--silence", "several tokens"],
                 ["--silence", "1 token"]),
                (["--policy", "attention", "--layer", "2"], ["layer", "-2 to 1", "found 2"]),
                (["--policy", "attention", "--layer", "-3"], ["layer", "-2 to 1", "found -3"]),
                (["--model", ""], ["--model", "''"])):
            with self.subTest(arguments):
                result = run(*arguments)
                self.assertFails(result, 2, *words)
                self.assertEqual(result.stdout, b"")

    def test_wrong_groups_say_what_was_expected(self):
        for value, words in (
                ("", ["source=", "''"]), ("source", ["source=", "'source'"]),
                ("middle=full:9", ["source=", "middle=full:9"]),
                ("source=full", ["full:N", "'full'"]), ("source=full:0", ["full:0"]),
                ("source=full:x", ["full:x"]), ("source=full:9x", ["full:9x"]),
                ("source=full:99999999999999999999", ["full:9999"]),
                ("source=sinks:4", ["window:N", "sinks:4"]), ("source=window:-1", ["window:-1"]),
                ("source=full:9+window:9", ["full:9+window:9"]),
                ("source=window:9+window:9", ["window:9+window:9"]),
                ("source=full:9,source=full:9", ["source", "twice"]),
                ("source=full:9,", ["source=", "''"]), ("target=ring:5", ["ring:5"])):
            with self.subTest(value):
                self.assertFails(run("--groups", value), 2, "--groups", *words)
        self.assertFails(run("--prompt", "x", "--groups", "target=window:1"), 2, "--groups target",
                         "at least")
        self.assertFails(run("--groups", f"source=sinks:{1 << 30}+window:{1 << 30}"), 1,
                         "capacity", "memory", "--groups")

    def test_options_without_effect_are_named(self):
        for arguments, option in ((["--policy", "batch", "-k", "2"], "--k"),
                                  (["--n", "2"], "--n"), (["--alpha", "0.5"], "--alpha"),
                                  (["--layout", "gap", "--phi", "1"], "--phi"),
                                  (["--gap", "1"], "--gap")):
            with self.subTest(option):
                result = self.assertDone(run("-n", "1", *arguments))
                self.assertIn(f"{option} has no effect with", result.stderr.decode())
        result = self.assertDone(run("-n", "1", "--layout", "interleaved"))
        self.assertIn("--sequential is implied", result.stderr.decode())

    def test_missing_files(self):
        self.assertFails(run("-m", FOLDER / "none.gguf"), 1, "io", "none.gguf")
        self.assertFails(run("-f", FOLDER / "none.txt"), 1, "io", "none.txt")

    def test_without_any_model_the_tiny_one_is_used(self):
        env = {**os.environ, "XDG_CACHE_HOME": os.fspath(FOLDER / "nothing"), "SLUICE_MODEL": ""}
        result = self.assertDone(run("--json", "-n", "9", model=False, env=env))
        self.assertIn("tiny one", result.stderr.decode())
        self.assertEqual(final_tokens(result.stdout), final_tokens(self.done("--json", "-n", "9")))
        env["SLUICE_MODEL"] = os.fspath(MODEL)
        result = self.assertDone(run("--json", "-n", "9", model=False, env=env))
        self.assertEqual(events(result.stdout, "report")[0]["setting"]["model"], str(MODEL))

    # --- Policies and layouts --------------------------------------------------------------------

    def test_every_policy_and_layout_gives_the_same_tokens_in_turns(self):
        written = {}
        for policy in POLICIES:
            for layout in LAYOUTS:
                with self.subTest(policy=policy, layout=layout):
                    arguments = ("--json", "-n", "40", "--policy", policy, "--layout", layout,
                                 "--prompt", "Go on", "--threshold", "0.01", *SAMPLED,
                                 *(("--source-tokens", "200") if layout == "batch" else ()))
                    first = self.done(*arguments)
                    turns = self.done(*arguments, "--sequential")
                    written[policy, layout] = final_tokens(first)
                    self.assertEqual(final_tokens(turns), written[policy, layout])
                    self.assertEqual(
                        [(e["kind"], e.get("count"), e["units_read"], e["tokens_read"])
                         for e in events(first, "token", "provisional", "confirmed", "retracted")],
                        [(e["kind"], e.get("count"), e["units_read"], e["tokens_read"])
                         for e in events(turns, "token", "provisional", "confirmed", "retracted")])
                    setting = events(first, "report")[0]["setting"]
                    self.assertEqual((setting["policy"]["name"], setting["layout"]),
                                     (policy, layout))
        self.assertEqual(written["wait-k", "group"], written["wait-k", "decoupled"])
        self.assertNotEqual(written["wait-k", "group"], written["wait-k", "gap"])
        # Nothing is written while a batch is read: arrival order is the batch's order.
        self.assertGreater(len(set(map(tuple, written.values()))), 8)

    def test_threads_do_not_change_the_tokens(self):
        arguments = ("--json", "-n", "60", "--ignore-eos", "-k", "2", *SAMPLED)
        expected = final_tokens(self.done(*arguments))
        self.assertEqual(len(expected), 60)
        for more in (("--source-threads", "2"), ("--target-threads", "2"), ("--shared-threads", "2"),
                     ("--sequential",)):
            self.assertEqual(final_tokens(self.done(*arguments, *more)), expected)
        self.assertNotEqual(final_tokens(self.done(*arguments, "--seed", "8")), expected)

    def test_a_batch_in_arrival_order_is_the_batch_layout(self):
        path = FOLDER / "batch.txt"
        path.write_text(TEXT, encoding="utf-8")
        arguments = ("-f", path, "--json", "-n", "40", "--policy", "batch", "--ignore-eos",
                     "--position", "in-text", "--prompt", "Go on")
        batch = self.done(*arguments, "--layout", "batch")
        self.assertEqual(final_tokens(batch),
                         final_tokens(self.done(*arguments, "--layout", "interleaved")))
        self.assertEqual(len(final_tokens(batch)), 40)
        report = events(batch, "report")[0]
        self.assertEqual(report["setting"]["layout_source_tokens"], report["source_tokens"])
        self.assertEqual(report["unit_wait"], report["units_fed"])
        self.assertEqual(report["al"], report["source_units"])

    def test_a_source_longer_than_the_batch_layout_was_told(self):
        self.assertFails(run("--layout", "batch", "--source-tokens", "5"), 1, "--source-tokens")

    def test_phi_moves_the_target(self):
        def tokens(phi):
            return final_tokens(self.done("--json", "-n", "30", "--phi", phi, "--ignore-eos"))
        self.assertEqual(tokens("0"), final_tokens(self.done("--json", "-n", "30",
                                                             "--ignore-eos")))
        self.assertNotEqual(tokens("0.5"), tokens("512"))

    def test_wait_k_waits_for_k_units(self):
        for k in (1, 3, 5):
            output = self.done("--json", "-n", "20", "-k", str(k), "--ignore-eos")
            self.assertEqual(events(output, "token")[0]["units_read"], k)
            self.assertEqual(events(output, "report")[0]["unit_wait"], k)
            with_prompt = self.done("--json", "-n", "20", "-k", str(k), "--ignore-eos",
                                    "--prompt", "Go on")
            self.assertEqual(events(with_prompt, "token")[0]["units_read"], k + 1)

    def test_hypotheses_add_up(self):
        """Provisional tokens are confirmed or retracted; what stays is the text."""
        for policy in ("local-agreement", "hold-n"):
            with self.subTest(policy):
                output = self.done("--json", "-n", "60", "--policy", policy, "--unit", "line",
                                   "--longest", "8", "--n", "3", "--ignore-eos")
                provisional, finals, text = [], [], ""
                for event in events(output):
                    if event["kind"] in ("token", "confirmed", "end"):
                        text += event["text"]
                    if event["kind"] == "provisional":
                        self.assertEqual(event["index"], len(finals) + len(provisional))
                        provisional.append(event["token"])
                    elif event["kind"] == "confirmed":
                        count = event["count"]
                        self.assertEqual(event["tokens"], provisional[:count])
                        finals += provisional[:count]
                        del provisional[:count]
                    elif event["kind"] == "retracted":
                        del provisional[len(provisional) - event["count"]:]
                        self.assertEqual(event["index"], len(finals) + len(provisional))
                    elif event["kind"] == "token":
                        self.assertEqual(provisional, [])
                        self.assertEqual(event["index"], len(finals))
                        finals.append(event["token"])
                report = events(output, "report")[0]
                self.assertEqual(len(finals), report["tokens_final"])
                self.assertGreater(report["tokens_retracted"], 0)
                self.assertEqual(text, self.done("-n", "60", "--policy", policy, "--unit", "line",
                                                 "--longest", "8", "--n", "3",
                                                 "--ignore-eos").decode())

    # --- The source ------------------------------------------------------------------------------

    def units(self, kind, text, *arguments):
        output = self.done("--json", "-n", "1", "--policy", "batch", "--unit", kind, *arguments,
                           stdin=text if isinstance(text, bytes) else text.encode())
        return [event["text"] for event in events(output, "fed")]

    def test_units(self):
        self.assertEqual(self.units("word", "One two,\n three\t"), ["One", " two,", "\n three"])
        self.assertEqual(self.units("line", "a b\n\n c\nd"), ["a b\n", "\n c\n", "d"])
        self.assertEqual(self.units("sentence", "Pi is 3.14. \u201cYes!\u201d He\nleft\n\nNo end"),
                         ["Pi is 3.14.", " \u201cYes!\u201d", " He\nleft\n\n", "No end"])
        self.assertEqual(self.units("sentence", "\u4f60\u597d\u3002\u597d\uff01"),
                         ["\u4f60\u597d\u3002", "\u597d\uff01"])
        for kind in ("word", "line", "sentence"):
            self.assertEqual("".join(self.units(kind, TEXT)), TEXT)

    def test_long_units_come_in_pieces(self):
        output = self.done("--json", "-n", "1", "--policy", "batch", "--max-unit", "4",
                           stdin=b"abcdefghijklmnop q")
        fed = events(output, "fed")
        self.assertEqual("".join(event["text"] for event in fed), "abcdefghijklmnop q")
        self.assertLessEqual(max(event["tokens"] for event in fed), 4)
        whole = events(self.done("--json", "-n", "1", "--policy", "batch",
                                 stdin=b"abcdefghijklmnop q"), "report")[0]
        self.assertEqual(sum(event["tokens"] for event in fed), whole["source_tokens"])

    def test_a_source_longer_than_the_queue_loses_nothing(self):
        text = b"word " * 20000
        output = self.done("--json", "-n", "1", "--policy", "batch", "--max-unit", "8",
                           "--groups", "source=window:64", stdin=text)
        report = events(output, "report")[0]
        self.assertEqual((report["units_fed"], report["units_read"]), (20000, 20000))

    def test_the_prompt_opens_and_closes_the_source(self):
        output = self.done("--json", "-n", "3", "--policy", "batch", "--prompt", "Go on",
                           stdin=b"one two")
        fed = events(output, "fed")
        self.assertEqual([event["part"] for event in fed], ["prompt", "source", "source",
                                                            "closing"])
        self.assertEqual([event["unit"] for event in fed], [0, 1, 2, 3])
        self.assertEqual(fed[0]["text"], "Go on")
        self.assertEqual(events(output, "report")[0]["source_units"], 2)

    def test_words_per_minute(self):
        path = FOLDER / "paced.txt"
        path.write_text("one two three four five six", encoding="utf-8")
        # It begins to write before the source has arrived. Where a busy machine kept it from that
        # for all of a fast source, a slower one is tried.
        for wpm in (1200, 240, 60):
            output = self.done("-f", path, "--wpm", str(wpm), "--json", "-k", "1", "-n", "400",
                               "--ignore-eos")
            times = [event["time_ms"] for event in events(output, "fed")]
            self.assertEqual(len(times), 6)
            for i, elapsed in enumerate(times):
                self.assertGreaterEqual(elapsed, 60000 / wpm * (i + 1))
            if events(output, "token")[0]["time_ms"] < times[-1]:
                break
        else:
            self.fail("nothing was written before the source had arrived")
        self.assertLess(events(output, "report")[0]["ttft_from_last_unit_ms"], 0)

    def test_lines_that_arrive_slowly_are_answered_while_they_arrive(self):
        for more in ((), ("--sequential",), ("--layout", "overlapped")):
            with self.subTest(more):
                process = start("--json", "--unit", "line", "-k", "1", "-n", "2000",
                                "--ignore-eos", *more, bufsize=0)
                seen = []
                for i in range(3):
                    process.stdin.write(f"Line number {i}.\n".encode())
                    process.stdin.flush()
                    # At least one token follows each line before the next is there.
                    while not seen or seen[-1]["kind"] != "token" or \
                            seen[-1]["units_read"] != i + 1:
                        seen.append(strict(process.stdout.readline()))
                rest, errors = process.communicate(timeout=TIMEOUT)
                self.assertEqual(process.returncode, 0, errors.decode())
                order = [event["kind"] for event in seen]
                self.assertEqual(order.count("fed"), 3)
                self.assertLess(order.index("token"), len(order) - 1 - order[::-1].index("fed"))
                report = events(rest, "report")[0]
                self.assertLess(report["ttft_from_last_unit_ms"], 0)
                self.assertEqual(report["units_read"], 3)

    def test_bits_of_input_give_the_same_units(self):
        text = TEXT.encode()
        expected = final_tokens(self.done("--json", "-n", "40", "--ignore-eos"))
        for size in (1, 3):
            process = start("--json", "-n", "40", "--ignore-eos")
            for begin in range(0, len(text), size):
                try:
                    process.stdin.write(text[begin:begin + size])
                    process.stdin.flush()
                except BrokenPipeError:
                    break  # it had all that it needed
            output, errors = process.communicate(timeout=TIMEOUT)
            self.assertEqual(process.returncode, 0, errors.decode())
            self.assertEqual(final_tokens(output), expected)

    def test_empty_input(self):
        for text in (b"", b" \n\n\t "):
            for more in ((), ("--sequential",), ("--prompt", "Go on"), ("--policy", "hold-n"),
                         ("--policy", "batch"), ("--layout", "overlapped"),
                         ("--policy", "attention")):
                with self.subTest(text=text, more=more):
                    output = self.done("--json", "-n", "5", "--ignore-eos", *more, stdin=text)
                    self.assertEqual(len(final_tokens(output)), 5)
                    report = events(output, "report")[0]
                    self.assertEqual(report["source_units"], 0)
                    if "--prompt" not in more:
                        self.assertIsNone(report["ttft_from_first_unit_ms"])

    def test_invalid_utf8_is_told_with_its_byte(self):
        self.assertFails(run(stdin=b"ab\xff"), 1, "text", "stdin", "byte 2")
        self.assertFails(run("--unit", "line", stdin=b"four\n\xc3(\n"), 1, "text", "byte 5")
        for broken in (b"\xc3", b"\x80", b"\xe0\x80\x80", b"\xed\xa0\x80"):
            with self.subTest(broken):
                self.assertFails(run("--sequential", stdin=b"four" + broken), 1, "byte 4")
        path = FOLDER / "broken.txt"
        path.write_bytes(b"word \xfe")
        self.assertFails(run("-f", path), 1, "broken.txt", "byte 5")

    # --- Memory ----------------------------------------------------------------------------------

    def test_groups_keep_what_they_are_told(self):
        arguments = ("--json", "-n", "120", "--ignore-eos", "-k", "1")
        output = self.done(*arguments, "--groups", "source=sinks:2+window:16,target=window:12",
                           "--max-unit", "8", stdin=TEXT.encode() * 4)
        report = events(output, "report")[0]
        self.assertEqual(report["setting"]["groups"], "source=sinks:2+window:16,target=window:12")
        self.assertEqual(len(final_tokens(output)), 120)
        larger = events(self.done(*arguments), "report")[0]
        self.assertLess(report["cache_bytes"], larger["cache_bytes"])
        for position in ("in-cache", "in-text"):
            again = [final_tokens(self.done(*arguments, "--position", position, "--groups",
                                            "source=sinks:2+window:16,target=sinks:4+window:12",
                                            "--max-unit", "8", *more, stdin=TEXT.encode() * 4))
                     for more in ((), ("--sequential",))]
            self.assertEqual(*again)

    def test_the_memory_that_was_announced_is_the_memory_that_is_used(self):
        for groups in ("source=full:300,target=full:200", "source=window:9,target=sinks:1+window:8"):
            result = self.assertDone(run("--json", "-n", "1", "--groups", groups, "--max-unit",
                                         "8"))
            used = events(result.stdout, "report")[0]["cache_bytes"]
            self.assertIn(f"; {used / 1024:.1f} KiB, fixed", result.stderr.decode())

    def test_full_caches_say_so(self):
        result = run("-n", "-1", "--ignore-eos", "--groups", "target=full:20")
        self.assertFails(result, 1, "target", "20", "--groups")
        self.assertIn("ended    target-full", result.stderr.decode())
        self.assertFails(run("--groups", "source=full:20", "--max-unit", "8"), 1, "source", "20",
                         "--groups")

    # --- Output ----------------------------------------------------------------------------------

    def test_json_events(self):
        output = self.done("--json", "-n", "25", "--ignore-eos", "-k", "2")
        found = events(output)
        self.assertEqual([event["kind"] for event in found[-2:]], ["end", "report"])
        self.assertEqual({event["kind"] for event in found},
                         {"fed", "read", "token", "end", "report"})
        written = [event for event in found if event["kind"] == "token"]
        self.assertEqual([event["index"] for event in written], list(range(25)))
        times = [event["time_ms"] for event in written]
        self.assertEqual(times, sorted(times))
        # What a token has seen was told before it, and was fed before that.
        fed = read = 0
        for event in found:
            if event["kind"] == "fed":
                fed = event["unit"] + 1
            elif event["kind"] == "read":
                self.assertGreater(event["units_read"], read)
                read = event["units_read"]
                self.assertLessEqual(read, fed)
            elif event["kind"] == "token":
                self.assertEqual(event["units_read"], read)
        report = found[-1]
        self.assertLessEqual(FIGURES, set(report))
        self.assertEqual((report["ended"], report["tokens_written"], report["tokens_final"]),
                         ("token-limit", 25, 25))
        self.assertEqual(report["inter_token_ms"]["count"], 24)
        self.assertGreater(report["source_busy_ms"], 0)
        self.assertGreater(report["target_forwards"], 24)
        self.assertTrue(math.isfinite(report["laal"]))
        self.assertIn("-k 2", report["setting"]["command"])

    def test_lag_is_that_of_the_words(self):
        """AL recomputed from the events: words of the target, delays without the prompt."""
        output = self.done("--json", "-n", "80", "--ignore-eos", "-k", "1", "--prompt", "Go on",
                           "--reference-words", "11", *SAMPLED)
        report = events(output, "report")[0]
        # Tokens of the tiny model: 3 control tokens, 256 bytes, merges; _ is a space.
        merges = ("_t he in re _the on er _a en ou it nd _s or _w at es _o is _b ing ed _and _h "
                  "_to ll _of ar le").split()
        starts = {3 + byte for byte in b" \n\t"}
        starts |= {259 + i for i, merge in enumerate(merges) if merge[0] == "_"}
        units = report["source_units"]
        delays, open_delay = [], None
        for event in events(output, "token"):
            if event["token"] in starts and open_delay is not None:
                delays.append(open_delay)
            open_delay = min(max(event["units_read"] - 1, 0), units)
        delays.append(open_delay)
        self.assertEqual(report["words_final"], len(delays))
        for name, length in (("al", 11), ("laal", max(11, len(delays)))):
            summed = []
            for t, delay in enumerate(delays):
                summed.append(delay - t * units / length)
                if delay == units:
                    break
            self.assertAlmostEqual(report[name], sum(summed) / len(summed), places=9)

    def test_stdout_has_the_text_alone(self):
        arguments = ("-n", "60", "--ignore-eos", *SAMPLED)
        plain = self.assertDone(run(*arguments))
        joined = "".join(event["text"] for event in events(self.done(*arguments, "--json"),
                                                            "token", "end"))
        self.assertEqual(plain.stdout.decode(), joined)
        errors = plain.stderr.decode()
        self.assertIn("source    cold\n", errors)  # the echo of a unit
        self.assertIn("ended    token-limit", errors)
        self.assertNotIn("between", errors)
        self.assertNotIn("\x1b", errors)

    def test_report(self):
        errors = self.assertDone(run("-n", "20", "--report")).stderr.decode()
        for name in ("first", "waited", "between", "answer", "lag", "source", "target", "overlap",
                     "memory"):
            self.assertRegex(errors, rf"(?m)^{name} +\S")
        self.assertNotIn("nan", errors)
        errors = self.assertDone(run("-n", "1", "--report", stdin=b"")).stderr.decode()
        self.assertNotIn("nan", errors)

    def test_end_tokens(self):
        """Greedy noise that ends: at once, after the source, or never."""
        for seed in range(40):
            arguments = ("--json", "-n", "300", "--temp", "3", "--seed", str(seed), "-k", "1")
            early = self.done(*arguments, "--stop-at-end-token")
            report = events(early, "report")[0]
            if report["ended"] == "end-token" and report["units_read"] < report["units_fed"]:
                break
        else:
            self.fail("no seed ends early")
        late = events(self.done(*arguments), "report")[0]
        self.assertEqual(late["units_read"], late["units_fed"])
        never = events(self.done(*arguments, "--ignore-eos"), "report")[0]
        self.assertEqual((never["ended"], never["tokens_final"]), ("token-limit", 300))

    # --- The surroundings ------------------------------------------------------------------------

    def test_signals_end_with_the_report(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            for more in ((), ("--sequential",)):
                with self.subTest(number=number, more=more):
                    process = start("-n", "-1", "--ignore-eos", "-k", "1", *more)
                    process.stdin.write(b"one two three ")
                    process.stdin.flush()
                    self.assertNotEqual(process.stdout.read(1), b"")  # it writes
                    process.send_signal(number)
                    _, errors = process.communicate(timeout=TIMEOUT)
                    self.assertEqual(process.returncode, 128 + number)
                    self.assertIn("ended    signal", errors.decode())
                    self.assertIn("overlap", errors.decode())

    def test_a_signal_while_waiting_for_input(self):
        for more in ((), ("--sequential",), ("--policy", "hold-n")):
            with self.subTest(more):
                process = start("--json", *more, bufsize=0)
                process.stdin.write(b"one two ")
                process.stdin.flush()
                for _ in range(2):
                    process.stdout.readline()
                process.send_signal(signal.SIGINT)
                # stdin stays open: the reading thread must end all the same.
                process.wait(timeout=TIMEOUT)
                output, errors = process.communicate(timeout=TIMEOUT)
                self.assertEqual(process.returncode, 130, errors.decode())
                report = events(output)[-1]
                self.assertEqual((report["kind"], report["ended"]), ("report", "signal"))

    def test_a_signal_does_not_wait_for_a_reader(self):
        path = FOLDER / "endless.txt"
        path.write_text("one two three " * 20000)
        for more in ((), ("--sequential",)):
            with self.subTest(more):
                process = start("-f", path, "-n", "-1", "--ignore-eos", "--json", *more)
                self.assertEqual(signals.signal_unread(process, signal.SIGINT), 130)
                output, _ = process.communicate()
                self.assertGreater(len(output), 4096)

    def test_a_target_that_ends_does_not_wait_for_the_source(self):
        process = start("-n", "3", "--ignore-eos", "-k", "1")
        process.stdin.write(b"one two three four five ")
        process.stdin.flush()
        self.assertEqual(process.wait(timeout=TIMEOUT), 0)
        process.communicate(timeout=TIMEOUT)

    def test_a_reader_that_leaves_ends_it_quietly(self):
        process = start("-n", "-1", "--ignore-eos")
        process.stdin.write(TEXT.encode())
        process.stdin.close()
        self.assertEqual(len(process.stdout.read(10)), 10)
        process.stdout.close()
        errors = process.stderr.read().decode()
        self.assertEqual(process.wait(timeout=TIMEOUT), 0)
        self.assertNotIn("duplex_text:", errors)
        process.stderr.close()

    @unittest.skipUnless(os.path.exists("/dev/full"), "no /dev/full")
    def test_a_full_disk_is_an_error(self):
        for more in ((), ("--json",)):
            with open("/dev/full", "wb") as full:
                result = subprocess.run(command("-n", "50", "--ignore-eos", *more), stdout=full,
                                        input=TEXT.encode(), stderr=subprocess.PIPE,
                                        timeout=TIMEOUT, check=False)
            self.assertEqual(result.returncode, 1)
            self.assertIn(b"duplex_text: io: write failed in stdout", result.stderr)

    def on_terminal(self, *arguments, typed=None, size=None):
        """What a terminal gets, of `size` (rows, columns) if given; the source is `typed` there, or a
        pipe with TEXT."""
        pid, terminal = pty.fork()
        if pid == 0:
            if size is not None:
                fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
            if typed is None:
                reading, writing = os.pipe()
                os.write(writing, TEXT.encode())
                os.close(writing)
                os.dup2(reading, 0)
            os.execve(PROGRAM, command(*arguments), {**os.environ, "TERM": "xterm"})
        output, deadline = b"", time.monotonic() + TIMEOUT
        waiting, last_typed = list(typed or ()), time.monotonic()
        while time.monotonic() < deadline:
            ready, _, _ = select.select([terminal], [], [], 0.1)
            if ready:
                try:
                    data = os.read(terminal, 65536)
                except OSError:
                    break
                if not data:
                    break
                output += data
            # When it is silent, or in time: slow as this may be, it may never find it so.
            silent = not ready or time.monotonic() - last_typed > 2
            if waiting and silent and b"\x1b[?1049h" in output:
                os.write(terminal, waiting.pop(0))
                last_typed = time.monotonic()
        os.close(terminal)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output

    def test_panes_on_a_terminal(self):
        text = self.done("-n", "30", "--ignore-eos").decode()
        for arguments, typed in (((), None), ((), [b"one two\n", b"three\n", b"\x04"]),
                                 (("--policy", "hold-n", "--longest", "6"), None)):
            with self.subTest(arguments=arguments, typed=typed):
                status, output = self.on_terminal("-n", "30", "--ignore-eos", *arguments,
                                                  typed=typed)
                self.assertEqual(status, 0, output)
                self.assertEqual(output.count(b"\x1b[?1049h"), 1)
                self.assertEqual(output.count(b"\x1b[?1049l"), 1)
                panes, rest = output.split(b"\x1b[?1049l")
                self.assertIn(b"source: ", panes)
                self.assertIn(b"target: ", panes)
                self.assertIn(b"ended    token-limit", rest)
                self.assertNotIn(b"\x1b", rest)
        self.assertGreater(len(text), 5)

    def test_terminals_of_any_size(self):
        for size in ((1, 1), (2, 300), (60000, 60000)):
            with self.subTest(size):
                status, output = self.on_terminal("-n", "10", "--ignore-eos", size=size)
                self.assertEqual(status, 0)
                self.assertIn(b"\x1b[?1049l", output)
                self.assertLess(len(output), 20_000_000)

    def test_a_signal_gives_the_terminal_back(self):
        status, output = self.on_terminal("-n", "-1", "--ignore-eos", typed=[b"a b c d\n", b"\x03"])
        self.assertEqual(status, 130)
        self.assertIn(b"\x1b[?1049l", output)
        self.assertIn(b"ended    signal", output)

    def test_plain_on_a_terminal(self):
        status, output = self.on_terminal("-n", "20", "--ignore-eos", "--plain")
        self.assertEqual(status, 0)
        self.assertNotIn(b"\x1b[?1049h", output)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--duplex-text", required=True, type=pathlib.Path, metavar="PROGRAM")
    parser.add_argument("--make-tiny-model", required=True, type=pathlib.Path, metavar="PROGRAM")
    arguments, rest = parser.parse_known_args()
    global PROGRAM, MAKE_MODEL, MODEL, FOLDER
    PROGRAM = arguments.duplex_text.resolve()
    MAKE_MODEL = arguments.make_tiny_model.resolve()
    with tempfile.TemporaryDirectory() as folder:
        FOLDER = pathlib.Path(folder)
        MODEL = FOLDER / "tiny.gguf"
        subprocess.run([MAKE_MODEL, MODEL], check=True, timeout=TIMEOUT)
        program = unittest.main(argv=[sys.argv[0], *rest], exit=False, verbosity=1)
    return 0 if program.result.wasSuccessful() else 1


if __name__ == "__main__":
    sys.exit(main())
