# SPDX-License-Identifier: MIT
"""Speech synthesizers behind one call: words in, samples and the end of every word out.

espeak-ng and flite run inside the process through their C interfaces, festival as a child that works through a list of sentences, and the neural
voices through their Python packages (these give no word times: their utterances train the whole-input case only). `speak` returns samples at 16 kHz
and the end of each word in samples, or None for the ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import subprocess
import tempfile
import wave

import numpy as np

RATE = 16000

# Never trained on; every one is a TEST voice.
HELD_OUT = {
    "espeak_accents": {"en-gb-scotland", "en-029"},
    "espeak_variants": {"m7", "f5"},
    "flite": {"rms"},
    "festival": {"ked_diphone"},
}


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Band-limited change to 16 kHz through one Fourier transform of the whole utterance."""
    if rate == RATE:
        return samples.astype(np.float32)
    divisor = np.gcd(rate, RATE)
    unit = rate // divisor
    padded = np.zeros(-(-(len(samples) + 256) // unit) * unit, np.float32)
    padded[: len(samples)] = samples
    size = len(padded) // unit * (RATE // divisor)
    spectrum = np.fft.rfft(padded)
    kept = np.zeros(size // 2 + 1, spectrum.dtype)
    count = min(len(spectrum), len(kept))
    kept[:count] = spectrum[:count]
    out = np.fft.irfft(kept, n=size) * (size / len(padded))
    return out[: int(len(samples) * RATE / rate)].astype(np.float32)


def trim(samples: np.ndarray, ends: list[int] | None, keep: int = 1200) -> tuple[np.ndarray, list[int] | None]:
    """Cuts silence (60 dB under the peak) at both ends down to `keep` samples."""
    loud = np.flatnonzero(np.abs(samples) > np.abs(samples).max() * 1e-3)
    if len(loud) == 0:
        return samples[:0], ends
    first, last = max(0, loud[0] - keep), min(len(samples), loud[-1] + keep)
    if ends is not None:
        ends = [int(min(max(end - first, 1), last - first)) for end in ends]
    return samples[first:last], ends


def punctuate(words: list[str], rng: random.Random, pauses: float = 0.12) -> str:
    """The words as a sentence for a synthesizer; in a share of the sentences commas make inner pauses."""
    words = ["I" if word == "i" else word for word in words]
    if rng.random() < pauses and len(words) > 2:
        for _ in range(rng.randint(1, 2)):
            at = rng.randrange(len(words) - 1)
            words[at] = words[at].rstrip(",") + ","
    return " ".join(words) + rng.choice([".", ".", "?", "!", ""])


class OneByOne:
    """An engine that speaks inside the process, a sentence at a time."""

    GROUP = 12

    def speak_all(self, choice: dict, sentences: list[list[str]], rng: random.Random) -> list:
        self.use(choice)
        return [self.speak(words, rng) for words in sentences]


class Espeak(OneByOne):
    """espeak-ng: word onsets from its events; a word ends where the next one or a pause begins."""

    class Event(ctypes.Structure):
        _fields_ = [
            ("type", ctypes.c_int), ("id", ctypes.c_uint), ("text_position", ctypes.c_int), ("length", ctypes.c_int),
            ("audio_position", ctypes.c_int), ("sample", ctypes.c_int), ("user", ctypes.c_void_p), ("value", ctypes.c_char * 8),
        ]

    ACCENTS = ["en-us", "en-us", "en-us", "en", "en", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-us-nyc", "en-gb-scotland", "en-029"]

    def __init__(self, data: str | None = None, library: str = "libespeak-ng.so.1"):
        self.lib = ctypes.CDLL(library)
        self.rate = self.lib.espeak_Initialize(2, 0, data.encode() if data else None, 0)
        if self.rate <= 0:
            raise OSError("espeak-ng did not start")
        self.chunks: list[np.ndarray] = []
        self.events: list[tuple[int, int, int]] = []
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(self.Event))
        self._callback = callback(self._receive)
        self.lib.espeak_SetSynthCallback(self._callback)
        folder = os.path.join(data or "/usr/lib/x86_64-linux-gnu", "espeak-ng-data", "voices", "!v")
        odd = {"whisper", "whisperf", "fast", "iven2", "iven3", "iven4", "Demonic", "Tweaky", "UniRobot", "RicishayMax", "antonio"}
        self.variants = sorted(name for name in os.listdir(folder) if name not in odd)

    def _receive(self, samples, count, events) -> int:
        if samples and count > 0:
            self.chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while events[i].type != 0:
            self.events.append((events[i].type, events[i].text_position, events[i].audio_position))
            i += 1
        return 0

    def choose(self, rng: random.Random, test: bool) -> dict:
        held_accents, held_variants = HELD_OUT["espeak_accents"], HELD_OUT["espeak_variants"]
        if test:
            voice = rng.choice(sorted(held_accents)) + "+" + rng.choice(sorted(held_variants))
        else:
            accent = rng.choice([a for a in self.ACCENTS if a not in held_accents])
            variant = rng.choice([""] * 8 + [v for v in self.variants if v not in held_variants])
            voice = accent + ("+" + variant if variant else "")
        return {"voice": voice, "rate": rng.randint(120, 235), "pitch": rng.randint(15, 85), "range": rng.randint(20, 80)}

    def use(self, choice: dict) -> None:
        if self.lib.espeak_SetVoiceByName(choice["voice"].encode()) != 0:
            choice["voice"] = choice["voice"].split("+")[0]  # a variant that this build cannot load
            if self.lib.espeak_SetVoiceByName(choice["voice"].encode()) != 0:
                raise ValueError("no voice " + choice["voice"])
        for parameter, key in ((1, "rate"), (3, "pitch"), (4, "range")):
            self.lib.espeak_SetParameter(parameter, choice[key], 0)

    def speak(self, words: list[str], rng: random.Random) -> tuple[np.ndarray, list[int] | None]:
        text = punctuate(words, rng)
        self.chunks, self.events = [], []
        raw = text.encode()
        self.lib.espeak_Synth(raw, len(raw) + 1, 0, 1, 0, 1, None, None)
        samples = np.concatenate(self.chunks).astype(np.float32) / 32768.0
        starts, at = [], 0
        for word in text.split():
            starts.append(at)
            at += len(word) + 1
        onset: dict[int, int] = {}
        marks, newest = [], 0  # every time at which something begins or a clause ends
        for kind, position, when in self.events:
            if kind == 1 and position > newest:  # a repeated position is a spurious event
                newest = position
                index = max(i for i, start in enumerate(starts) if start <= position - 1)
                onset.setdefault(index, when)
                marks.append(when)
            elif kind == 5:
                marks.append(when)
        total = 1000.0 * len(samples) / self.rate
        marks = sorted(marks) + [total]
        ends: list[float] = [0.0] * len(words)
        known = sorted(onset)
        if not known or known[0] != 0:
            return resample(samples, self.rate), None
        for here, following in zip(known, known[1:] + [len(words)]):
            begin = onset[here]
            end = next((mark for mark in marks if mark > begin), total)
            letters = np.cumsum([len(words[i]) for i in range(here, following)])  # words that share one event
            for offset, part in enumerate(letters / letters[-1]):
                ends[here + offset] = begin + (end - begin) * part
        return resample(samples, self.rate), [int(end * RATE / 1000) for end in ends]


class Flite(OneByOne):
    """flite's voices: word ends from the segments of its utterance structure."""

    NAMES = {"kal": "cmu_us_kal", "kal16": "cmu_us_kal16", "awb": "cmu_us_awb", "slt": "cmu_us_slt", "rms": "cmu_us_rms"}
    SHARES = {"kal": 1, "kal16": 2, "awb": 3, "slt": 4}

    class Wave(ctypes.Structure):
        _fields_ = [("type", ctypes.c_char_p), ("rate", ctypes.c_int), ("count", ctypes.c_int), ("channels", ctypes.c_int),
                    ("samples", ctypes.POINTER(ctypes.c_short))]

    class Voice(ctypes.Structure):
        _fields_ = [("name", ctypes.c_char_p), ("features", ctypes.c_void_p)]

    def __init__(self):
        self.lib = lib = ctypes.CDLL("libflite.so.1", ctypes.RTLD_GLOBAL)
        for name, result, arguments in (
            ("flite_synth_text", ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_void_p]),
            ("utt_wave", ctypes.POINTER(self.Wave), [ctypes.c_void_p]),
            ("utt_relation", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]),
            ("relation_head", ctypes.c_void_p, [ctypes.c_void_p]),
            ("item_next", ctypes.c_void_p, [ctypes.c_void_p]),
            ("ffeature_float", ctypes.c_float, [ctypes.c_void_p, ctypes.c_char_p]),
            ("delete_utterance", None, [ctypes.c_void_p]),
            ("flite_feat_set_float", None, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_float]),
        ):
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
        lib.flite_init()
        for name in ("libflite_usenglish.so.1", "libflite_cmulex.so.1"):
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
        self.voices: dict[str, ctypes.POINTER] = {}

    def choose(self, rng: random.Random, test: bool) -> dict:
        names = list(self.SHARES)
        voice = rng.choice(sorted(HELD_OUT["flite"])) if test else rng.choices(names, [self.SHARES[n] for n in names])[0]
        return {"voice": voice, "stretch": rng.uniform(0.75, 1.35), "pitch": rng.uniform(75, 200), "spread": rng.uniform(8, 35)}

    def use(self, choice: dict) -> None:
        name = choice["voice"]
        if name not in self.voices:
            library = ctypes.CDLL(f"libflite_{self.NAMES[name]}.so.1", ctypes.RTLD_GLOBAL)
            register = getattr(library, "register_" + self.NAMES[name])
            register.restype, register.argtypes = ctypes.POINTER(self.Voice), [ctypes.c_char_p]
            self.voices[name] = register(None)
        self.voice = self.voices[name]
        bag = self.voice.contents.features
        self.lib.flite_feat_set_float(bag, b"duration_stretch", choice["stretch"])
        if name.startswith("kal"):
            self.lib.flite_feat_set_float(bag, b"int_f0_target_mean", choice["pitch"])
            self.lib.flite_feat_set_float(bag, b"int_f0_target_stddev", choice["spread"])

    def speak(self, words: list[str], rng: random.Random) -> tuple[np.ndarray, list[int] | None]:
        utterance = self.lib.flite_synth_text(punctuate(words, rng).encode(), self.voice)
        sound = self.lib.utt_wave(utterance).contents
        samples = np.ctypeslib.as_array(sound.samples, (sound.count,)).astype(np.float32) / 32768.0
        rate = sound.rate
        ends, item = [], self.lib.relation_head(self.lib.utt_relation(utterance, b"Token"))
        while item:
            ends.append(int(RATE * self.lib.ffeature_float(item, b"daughtern.R:SylStructure.daughtern.daughtern.R:Segment.end")))
            item = self.lib.item_next(item)
        self.lib.delete_utterance(utterance)
        good = len(ends) == len(words) and all(a < b for a, b in zip([0] + ends, ends))
        return resample(samples, rate), ends if good else None


# Speaks a text into NAME.wav and writes the end of each token (the latest of its words' ends) to NAME.ends.
SPEAK_TO = """
(define (speak_to text name)
  (let ((utt (utt.synth (eval (list 'Utterance 'Text text)))) (fd (fopen (string-append name ".ends") "w")))
    (utt.save.wave utt (string-append name ".wav") 'riff)
    (mapcar
      (lambda (tok)
        (if (null (item.parent tok))
          (let ((end 0))
            (mapcar (lambda (word) (if (> (item.feat word "word_end") end) (set! end (item.feat word "word_end")))) (item.daughters tok))
            (format fd "%f\\n" end))))
      (utt.relation.items utt 'Token))
    (fclose fd)))
"""


class Festival:
    """festival: one child for a list of sentences; word ends from its Token relation."""

    GROUP = 40
    SHARES = {"kal_diphone": 3, "cmu_us_slt_arctic_hts": 1}

    def __init__(self, root: str | None = None):
        self.root = root

    def choose(self, rng: random.Random, test: bool) -> dict:
        names = list(self.SHARES)
        voice = rng.choice(sorted(HELD_OUT["festival"])) if test else rng.choices(names, [self.SHARES[n] for n in names])[0]
        return {"voice": voice, "stretch": rng.uniform(0.8, 1.3), "pitch": rng.uniform(80, 190), "spread": rng.uniform(8, 30)}

    def speak_all(self, choice: dict, sentences: list[list[str]], rng: random.Random) -> list[tuple[np.ndarray, list[int] | None] | None]:
        results: list[tuple[np.ndarray, list[int] | None] | None] = []
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            lines = [f"(voice_{choice['voice']})", f"(Parameter.set 'Duration_Stretch {choice['stretch']:.3f})"]
            if choice["voice"].endswith("diphone"):
                lines.append(f"(set! int_lr_params '((target_f0_mean {choice['pitch']:.1f}) (target_f0_std {choice['spread']:.1f}) "
                             "(model_f0_mean 170) (model_f0_std 34)))")
            lines.append(SPEAK_TO)
            for index, words in enumerate(sentences):
                lines.append(f'(speak_to "{punctuate(words, rng)}" "{folder}/{index}")')
            with open(f"{folder}/all.scm", "w", encoding="ascii") as file:
                file.write("\n".join(lines) + "\n")
            command = ["festival"] + (["--libdir", self.root] if self.root else []) + ["-b", f"{folder}/all.scm"]
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300, check=False)
            for index, words in enumerate(sentences):
                try:
                    with wave.open(f"{folder}/{index}.wav") as file:
                        rate = file.getframerate()
                        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768.0
                    ends = [int(RATE * float(line)) for line in open(f"{folder}/{index}.ends", encoding="ascii")]
                    good = len(ends) == len(words) and all(a < b for a, b in zip([0] + ends, ends))
                    results.append((resample(samples, rate), ends if good else None))
                except (OSError, EOFError, ValueError, wave.Error):
                    results.append(None)
        return results


class Hibari(OneByOne):
    """The neural voice `heart` of the package hibari-tts (American female); scaled pitch and British pronunciation make variants of it. Word ends
    from the durations that its network predicts, one for each phoneme."""

    DURATIONS = "/CumSum_output_0"  # of the package's network, version 0.2.1: frames up to the end of each phoneme

    def __init__(self):
        import hibari
        import onnx
        import onnxruntime
        from hibari import dsp
        from hibari.g2p import G2P

        self.synthesise = dsp.synth
        self.rate = dsp.SR
        network = onnx.load(os.path.join(os.path.dirname(hibari.__file__), "assets", "hibari.onnx"))
        network.graph.output.append(onnx.helper.make_empty_tensor_value_info(self.DURATIONS))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(network.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.front = hibari.Hibari
        with open(os.path.join(os.path.dirname(hibari.__file__), "assets", "vocab.json"), encoding="utf-8") as file:
            self.vocabulary = json.load(file)
        self.spoken = {False: G2P(british=False), True: G2P(british=True)}

    def choose(self, rng: random.Random, test: bool) -> dict:
        if test:
            raise ValueError("this engine has no held-out voice")
        return {"voice": "heart", "british": rng.random() < 0.4, "pitch": rng.choice([1.0, rng.uniform(0.5, 1.25)]), "rate": rng.uniform(0.75, 1.35),
                "seed": rng.getrandbits(30)}

    def use(self, choice: dict) -> None:
        self.choice = choice

    def speak(self, words: list[str], rng: random.Random) -> tuple[np.ndarray, list[int] | None]:
        choice = self.choice
        phonemes = self.spoken[choice["british"]](punctuate(words, rng))
        kept = [c for c in phonemes if c in self.vocabulary]
        ids = [0, *(self.vocabulary[c] for c in kept), 0]
        feeds = {"ids": np.asarray([ids], np.int64), "speed": np.asarray([choice["rate"]], np.float32)}
        *parts, durations = self.session.run(None, feeds)
        low, theta, noise, level, phase, pitch = (part[0] for part in parts)
        samples = self.synthesise(low, theta, noise, level, phase, pitch * np.float32(choice["pitch"]), np.random.default_rng(choice["seed"]))
        frames = np.asarray(durations).reshape(-1)
        closes = [i for i, c in enumerate(kept) if c == " "] + [len(kept)]  # index of the phoneme after each word, without the leading pad
        if len(closes) != len(words) or len(frames) != len(ids):
            return resample(samples, self.rate), None
        scale = len(samples) / max(1, frames[-1]) * RATE / self.rate
        ends = []
        for close in closes:
            last = close - 1
            while last > 0 and kept[last] in ",.?!;: ":
                last -= 1
            ends.append(int(frames[last + 1] * scale))
        good = all(a < b for a, b in zip([0] + ends, ends))
        return resample(samples, self.rate), ends if good else None


ENGINES = {"espeak": Espeak, "flite": Flite, "festival": Festival, "hibari": Hibari}
