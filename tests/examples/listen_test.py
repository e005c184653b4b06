#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Runs listen as its users do: files, pipes, paces, JSON, time stamps, bad input, wrong flags.

    listen_test.py --listen PROGRAM [unittest arguments]

The model is a tiny random one, written here: its words mean nothing, but they follow from the audio.
"""

import argparse
import json
import math
import os
import pathlib
import pty
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest

import signals
import wave

PROGRAM = MODEL = FOLDER = None
RATE = 16000
WIDTH, LAYERS, HEADS, HEAD, WIDE, MELS = 32, 2, 2, 16, 64, 80
PIECES = ["<unk>", "<s>", "</s>"] + [f"p{chr(97 + i % 26)}" + ("\u2581" if i % 3 else "")
                                     for i in range(57)]


def gguf(numbers, pieces, tensors):
    """A GGUF file of version 3: uint32 and float32 keys, the pieces, float32 tensors."""
    text = lambda s: struct.pack("<Q", len(s.encode())) + s.encode()
    keys = [text("general.architecture") + struct.pack("<I", 8) + text("llama"),
            text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, len(pieces)) +
            b"".join(map(text, pieces))]
    for key, value in numbers.items():
        kind, code = (6, "f") if isinstance(value, float) else (4, "I")
        keys.append(text(key) + struct.pack("<I" + code, kind, value))
    infos, data = [], b""
    for name, (shape, values) in tensors.items():
        infos.append(text(name) + struct.pack("<I", len(shape)) +
                     b"".join(struct.pack("<Q", n) for n in reversed(shape)) +
                     struct.pack("<IQ", 0, len(data)))
        data += struct.pack(f"<{len(values)}f", *values)
        data += bytes(-len(data) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(keys)) + b"".join(keys + infos)
    return head + bytes(-len(head) % 32) + data


def tiny_model():
    draw = random.Random(4)
    tensors = {}

    def add(name, shape, gain, offset=0.0):
        fan = math.sqrt(shape[-1]) if len(shape) > 1 else 1
        tensors[name] = (shape, [offset + gain * draw.gauss(0, 1) / fan
                                 for _ in range(math.prod(shape))])

    add("token_embd.weight", (len(PIECES), WIDTH), math.sqrt(WIDTH))
    add("output_norm.weight", (WIDTH,), 0.2, 1)
    for layer in range(LAYERS):
        at = f"blk.{layer}."
        add(at + "attn_norm.weight", (WIDTH,), 0.2, 1)
        add(at + "ffn_norm.weight", (WIDTH,), 0.2, 1)
        for name in ("attn_q", "attn_k", "attn_v"):
            add(at + name + ".weight", (HEADS * HEAD, WIDTH), 1.4)
        add(at + "attn_output.weight", (WIDTH, HEADS * HEAD), 1.5)
        add(at + "ffn_gate.weight", (WIDE, WIDTH), 1)
        add(at + "ffn_up.weight", (WIDE, WIDTH), 1)
        add(at + "ffn_down.weight", (WIDTH, WIDE), 1)
    add("listen.mel_mean", (MELS,), 0.5, -5)
    add("listen.mel_std", (MELS,), 0.1, 2)
    for name, rows, cols, gain in (("conv1", WIDTH, 3 * MELS, 1.5), ("conv2", WIDTH, 3 * WIDTH, 2),
                                   ("proj", WIDTH, WIDTH, 2), ("ctc", len(PIECES) + 1, WIDTH, 2)):
        add(f"listen.{name}.weight", (rows, cols), gain)
        add(f"listen.{name}.bias", (rows,), 0.1)
    tensors["listen.ctc.bias"][1][-1] += 1  # pauses are blank
    return {
        "llama.embedding_length": WIDTH, "llama.feed_forward_length": WIDE,
        "llama.block_count": LAYERS, "llama.attention.head_count": HEADS,
        "llama.context_length": 4096, "llama.rope.dimension_count": HEAD,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "listen.version": 1,
        "listen.sample_rate": RATE, "listen.frame_length": 400, "listen.hop": 160,
        "listen.fft_size": 512, "listen.mel_low_hz": 20.0, "listen.mel_high_hz": 7600.0,
        "listen.log_floor": 1e-6, "listen.frame_window": 256, "listen.trained_delay": 4,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}, tensors


def sound(seconds, seed=1):
    """Tones that jump, with pauses, as 16-bit samples."""
    draw = random.Random(seed)
    samples, phase = [], 0.0
    while len(samples) < seconds * RATE:
        pitch, gain = draw.uniform(100, 3000), draw.choice([0.0, 0.1, 0.3, 0.5])
        for _ in range(draw.randrange(800, 6000)):
            phase += 2 * math.pi * pitch / RATE
            samples.append(round(32767 * gain * math.sin(phase)))
    return samples[: round(seconds * RATE)]


def pcm(samples):
    return struct.pack(f"<{len(samples)}h", *samples)


def wav(name, samples, rate=RATE, channels=1):
    path = FOLDER / name
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(pcm(samples))
    return path


def run(*arguments, stdin=b"", model=None):
    return subprocess.run([PROGRAM, "-m", str(model or MODEL), *map(str, arguments)], input=stdin,
                          capture_output=True, timeout=120, check=False)


def events(*arguments, stdin=b""):
    done = run("--json", *arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.decode().splitlines()]


def words(found):
    return [(e["utterance"], e["word"], e["text"], e["audio_ms"], e["spoken_ms"])
            for e in found if e["kind"] == "word"]


class Listen(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.samples = sound(9)
        cls.wav = wav("sound.wav", cls.samples)
        cls.words = words(events(cls.wav))

    def test_events_have_their_fields(self):
        found = events("--stats", self.wav)
        kinds = [e["kind"] for e in found]
        self.assertEqual(set(kinds), {"partial", "word", "endpoint", "end", "report"})
        self.assertEqual(kinds[-2:], ["end", "report"])
        self.assertGreater(kinds.count("word"), 10)
        text, number = [], 0
        for e in found[:-1]:
            self.assertGreaterEqual(e["wall_ms"], 0)
            self.assertLessEqual(e["audio_ms"], 9000)
            if e["kind"] == "word":
                self.assertEqual(e["word"], number)
                number += 1
                text.append(e["text"])
                self.assertNotIn("\u2581", e["text"])
                if e["spoken_ms"] is not None:
                    self.assertLessEqual(e["spoken_ms"], e["audio_ms"])
            if e["kind"] == "endpoint":
                self.assertEqual((e["words"], e["text"]), (number, " ".join(text)))
                text, number = [], 0
        self.assertEqual(found[-2]["audio_ms"], 9000)
        report = found[-1]
        self.assertEqual(report["words"], kinds.count("word"))
        self.assertEqual(report["utterances"], kinds.count("endpoint"))
        self.assertEqual(report["audio_ms"], 9000)
        self.assertAlmostEqual(report["real_time_factor"],
                               (report["source_busy_ms"] + report["target_busy_ms"]) / 9000, 9)
        self.assertEqual(report["setting"]["latency"], "1")

    def test_words_are_the_same_however_the_audio_comes(self):
        self.assertGreater(len(self.words), 10)
        for more in (["--sequential"], ["--packet-ms", "7"], ["--packet-ms", "1000"],
                     ["--source-threads", "2", "--target-threads", "2"], ["--speed", "20"]):
            self.assertEqual(words(events(*more, self.wav)), self.words, more)
        self.assertEqual(words(events("-", stdin=pcm(self.samples))), self.words)
        stereo = [s for sample in self.samples for s in (sample, sample)]
        self.assertEqual(words(events(wav("stereo.wav", stereo, channels=2))), self.words)
        self.assertEqual(words(events("-", "--channels", "2", stdin=pcm(stereo))), self.words)
        floats = struct.pack(f"<{len(self.samples)}f", *(s / 32768 for s in self.samples))
        self.assertEqual(words(events("-", "--encoding", "f32", stdin=floats)), self.words)

    def test_latency(self):
        later = words(events("--latency", "3", self.wav))
        whole = words(events("--latency", "all", self.wav))
        delayed = words(events("--latency", "400ms", self.wav))
        self.assertGreater(later[0][3], self.words[0][3])
        self.assertGreater(delayed[0][3], self.words[0][3])
        ends = {e["utterance"]: e["audio_ms"] for e in events("--latency", "all", self.wav)
                if e["kind"] == "endpoint"}
        self.assertTrue(all(word[3] == ends[word[0]] for word in whole))

    def test_plain_text_and_time_stamps(self):
        done = run(self.wav)
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        self.assertEqual(done.stdout.decode().split(), [word[2] for word in self.words])
        self.assertNotIn(b"\x1b", done.stdout)
        lines = [line.split() for line in run("-t", self.wav).stdout.decode().splitlines() if line]
        self.assertEqual([line[2] for line in lines], [word[2] for word in self.words])
        self.assertEqual([float(line[1]) for line in lines],
                         [float(f"{word[3] / 1000:.2f}") for word in self.words])

    def test_a_terminal_shows_what_is_not_final_dim(self):
        reader, terminal = pty.openpty()
        program = subprocess.Popen([PROGRAM, "-m", MODEL, "--latency", "3", str(self.wav)],
                                   stdout=terminal, stderr=subprocess.PIPE)
        os.close(terminal)
        shown = b""
        while True:
            try:
                part = os.read(reader, 65536)
            except OSError:  # the program has closed its side
                break
            if not part:
                break
            shown += part
        os.close(reader)
        self.assertEqual(program.wait(timeout=60), 0, program.stderr.read())
        program.stderr.close()
        self.assertIn(b"\x1b[2m", shown)
        # What stands at the end of each line, the escapes taken away, is the final text.
        lines = [line.split("\r")[-1].replace("\x1b[K", "") for line in
                 shown.decode().replace("\r\n", "\n").split("\n")]
        words_ = [word[2] for word in words(events("--latency", "3", self.wav))]
        self.assertEqual(" ".join(lines).split(), words_)

    def test_real_time_takes_its_time(self):
        path = wav("short.wav", self.samples[: RATE])
        begin = time.monotonic()
        found = events("--real-time", "--stats", path)
        self.assertGreater(time.monotonic() - begin, 0.97)
        self.assertEqual(found[-1]["packets"], 50)

    def test_a_deadline_is_counted_and_changes_nothing(self):
        path = wav("short.wav", self.samples[: 2 * RATE])
        found = events("--speed", "4", "--deadline", "5000", "--stats", path)
        self.assertEqual(words(found), words(events(path)))
        report = found[-1]
        self.assertEqual(report["deadlines"]["frames"], report["source_rows"])
        self.assertEqual(report["deadlines"]["misses"], 0)
        self.assertEqual(report["deadlines"]["deadline_ms"], 5000)
        self.assertEqual((report["put_off_rows"], report["dropped_rows"], report["dropped_ms"]),
                         (0, 0, 0))
        self.assertNotIn("deadlines", events("--speed", "20", "--stats", path)[-1])

    def test_work_is_shed_to_hold_a_deadline(self):
        # Nine seconds at once: nearly all of it is behind by the first millisecond.
        audio = pcm(self.samples)
        for shed in ("skip", "shorten"):
            found = events("--deadline", "1", "--shed", shed, "--stats", "-", stdin=audio)
            self.assertEqual(len(words(found)) > 5, True)
            self.assertGreater(found[-1]["put_off_rows"], 10)
            self.assertGreater(found[-1]["deadlines"]["misses"], 10)
        found = events("--deadline", "1", "--late", "drop-oldest", "--stats", "-", stdin=audio)
        report = found[-1]
        self.assertGreater(report["dropped_rows"], 10)
        self.assertAlmostEqual(report["dropped_ms"], 40 * report["dropped_rows"], delta=40)
        self.assertEqual(found[-2]["audio_ms"], 9000)  # the audio's clock goes on

    def interrupted(self, *arguments, stdin=subprocess.DEVNULL):
        """What is left on stdout and stderr when a signal ends it, which takes no longer than the
        work at hand."""
        with subprocess.Popen([PROGRAM, "-m", MODEL, *map(str, arguments)], stdin=stdin,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                signals.wait_until_caught(process, signal.SIGINT)
                time.sleep(0.5)  # for the wait, which is what the signal ends
                self.assertIsNone(process.poll())
                process.send_signal(signal.SIGINT)
                out, errors = process.communicate(timeout=20)
            finally:
                process.kill()
        self.assertEqual(process.returncode, 130, errors)
        return out, errors

    def test_a_signal_does_not_wait_for_audio(self):
        for more in (["--real-time", "--packet-ms", "10000"],  # the first is due after ten seconds
                     ["--speed", "0.01", "--packet-ms", "2000"]):
            self.interrupted(*more, wav("long.wav", 3 * self.samples))
        pipe = FOLDER / "silent.fifo"
        os.mkfifo(pipe)
        both = os.open(pipe, os.O_RDWR)  # somebody who might write
        whole = self.wav.read_bytes()
        self.interrupted(pipe)
        os.write(both, whole[: 44 + 32000])
        _, errors = self.interrupted("--json", pipe)
        self.assertEqual(errors, b"")  # that the audio is cut short is the signal's doing
        os.close(both)
        reader, writer = os.pipe()
        self.interrupted("-", stdin=reader)
        os.close(reader)
        os.close(writer)

    def test_a_signal_does_not_wait_for_a_reader(self):
        path = wav("long.wav", 60 * self.samples)
        for more in ([], ["--sequential"]):  # more events than a pipe holds
            with subprocess.Popen([PROGRAM, "-m", MODEL, "--json", *more, str(path)],
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
                self.assertEqual(signals.signal_unread(process, signal.SIGINT), 130)
                out, _ = process.communicate()
            self.assertGreater(len(out), 4096)

    def test_a_terminal_gives_no_sound(self):
        ours, terminal = pty.openpty()
        done = subprocess.run([PROGRAM, "-m", MODEL], stdin=terminal, capture_output=True,
                              timeout=60, check=False)
        os.close(terminal)
        os.close(ours)
        self.assertEqual(done.returncode, 2)
        self.assertIn(b"found a terminal", done.stderr)

    def test_stats_are_text_on_stderr(self):
        done = run("--stats", "--speed", "50", self.wav)
        for name in ("model", "audio", "latency", "first word", "overlap", "work", "memory"):
            self.assertIn(name, done.stderr.decode())

    def test_short_and_empty_audio_has_no_words(self):
        for samples in ([], [0], [0] * 399):
            self.assertEqual([e["kind"] for e in events(wav("none.wav", samples))], ["end"])
            self.assertEqual([e["kind"] for e in events("-", stdin=pcm(samples))], ["end"])
        self.assertEqual(run(wav("none.wav", [])).stdout, b"")

    def test_silence_has_no_words_and_is_no_utterance(self):
        # (A random model hears words in silence; the one that is shipped does not.)
        done = subprocess.run([PROGRAM, "--json", "--stats", str(wav("silence.wav", [0] * RATE))],
                              capture_output=True, timeout=120, check=True)
        found = [json.loads(line) for line in done.stdout.splitlines()]
        self.assertEqual([e["kind"] for e in found], ["end", "report"])
        self.assertEqual((found[-1]["words"], found[-1]["utterances"]), (0, 0))
        # Whichever limit is the shorter one.
        for more in (["--max-utterance-ms", "300"], ["--max-utterance-ms", "40", "-t"],
                     ["--max-utterance-ms", "300", "--endpoint-ms", "0"]):
            done = subprocess.run([PROGRAM, *more, str(FOLDER / "silence.wav")],
                                  capture_output=True, timeout=120, check=True)
            self.assertEqual(done.stdout, b"", more)

    def test_another_rate_is_resampled(self):
        # Not the same samples, so not the same words; the same length.
        found = events(wav("rate.wav", self.samples, rate=8000))
        self.assertAlmostEqual(found[-1]["audio_ms"], 18000, delta=20)

    @unittest.skipUnless(shutil.which("ffmpeg"), "ffmpeg makes the file")
    def test_flac_is_heard_like_wav(self):
        path = FOLDER / "sound.flac"
        subprocess.run(["ffmpeg", "-v", "error", "-y", "-i", self.wav, path], check=True)
        done = run("--json", path)
        if b"not a WAV file" in done.stderr:
            self.skipTest("built without libsndfile")
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        self.assertEqual(words(map(json.loads, done.stdout.splitlines())), self.words)

    def refused(self, done, *texts):
        self.assertEqual(done.returncode, 1, done.stderr.decode())
        for text in texts:
            self.assertIn(text, done.stderr.decode())
        self.assertEqual(len(done.stderr.decode().strip().splitlines()), 1)

    def test_bad_audio_is_an_error_after_what_was_heard(self):
        whole = self.wav.read_bytes()
        cut = FOLDER / "cut.wav"
        cut.write_bytes(whole[: len(whole) // 2])
        done = run(cut)
        self.refused(done, "cut.wav", "truncated")
        self.assertGreater(len(done.stdout.split()), 3)
        cut.write_bytes(whole[:30])
        self.refused(run(cut), "cut.wav")
        cut.write_bytes(b"no audio at all")
        self.refused(run(cut), "cut.wav")
        cut.write_bytes(b"")
        self.refused(run(cut), "cut.wav")
        floats = bytearray(struct.pack(f"<{RATE}f", *[0.0] * RATE))
        floats[400:404] = struct.pack("<f", math.nan)
        self.refused(run("-", "--encoding", "f32", stdin=bytes(floats)), "frame 100", "NaN")
        self.refused(run("-", stdin=pcm(self.samples[:900]) + b"x"), "truncated")
        self.refused(run(FOLDER / "absent.wav"), "absent.wav")
        self.refused(run(FOLDER), str(FOLDER))

    def test_bad_models_are_errors(self):
        self.refused(run(self.wav, model=FOLDER / "absent.gguf"), "absent.gguf")
        numbers, tensors = tiny_model()
        bad = FOLDER / "bad.gguf"
        bad.write_bytes(gguf(numbers, PIECES, tensors)[:-5000])
        self.refused(run(self.wav, model=bad), "bad.gguf")
        del tensors["listen.ctc.bias"]
        bad.write_bytes(gguf(numbers, PIECES, tensors))
        self.refused(run(self.wav, model=bad), "bad.gguf", "listen.ctc.bias")
        del numbers["listen.version"]
        bad.write_bytes(gguf(numbers, PIECES, tensors))
        self.refused(run(self.wav, model=bad), "not a listening model")

    def test_wrong_flags(self):
        for arguments in (["--latency", "0"], ["--latency", "1.5"], ["--latency", "x"],
                          ["--latency", "-3ms"], ["--encoding", "s12"], ["--rate", "1"],
                          ["--packet-ms", "0"], ["--real-time", "-"], ["--threads", "2"],
                          ["--endpoint-ms", "-1"], [self.wav, self.wav],
                          ["--deadline", "0", "-"], ["--deadline", "40", self.wav],
                          ["--shed", "skip", "-"], ["--late", "drop-oldest", "-"],
                          ["--deadline", "40", "--late", "coalesce", "-"],
                          ["--deadline", "40", "--shed", "some", "-"],
                          ["--activations", "float32"], ["--json", "-t", self.wav],
                          ["--plain", "--json", self.wav], ["--rate", "8000", self.wav],
                          ["--channels", "1", self.wav], ["--encoding", "s16", self.wav],
                          ["--model", "", self.wav]):
            done = run(*arguments)
            self.assertEqual(done.returncode, 2, arguments)
            self.assertEqual(done.stdout, b"")
            self.assertIn(b"listen --help", done.stderr)

    def test_help(self):
        done = run("--help")
        self.assertEqual(done.returncode, 0)
        for text in ("arecord", "--latency", "--real-time", "--timestamps", "--json", "--stats"):
            self.assertIn(text, done.stdout.decode())
        self.assertEqual(run("--version").returncode, 0)


def main():
    global PROGRAM, MODEL, FOLDER
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", required=True)
    options, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        FOLDER = pathlib.Path(folder)
        PROGRAM, MODEL = options.listen, FOLDER / "tiny.gguf"
        MODEL.write_bytes(gguf(tiny_model()[0], PIECES, tiny_model()[1]))
        unittest.main(argv=[sys.argv[0], *rest])


if __name__ == "__main__":
    main()
