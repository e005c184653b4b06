# SPDX-License-Identifier: MIT
"""Log-mel front end and augmentation of batches of 16 kHz waveforms, on whatever device the samples are on.

Frames of 400 samples every 160, edge-snipped, periodic Hann window, zero-padded FFT of 512, power spectrum, 80 triangular filters on the HTK mel
scale from 20 to 7600 Hz with peak 1, ln(energy + LOG_FLOOR), then fixed means and deviations. Samples are in [-1, 1].
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

RATE = 16000
FRAME = 400
HOP = 160
FFT = 512
MELS = 80
MEL_LOW = 20.0
MEL_HIGH = 7600.0
LOG_FLOOR = 1e-6
SUBSAMPLING = 4  # mel frames per source frame


def mel_frames(samples: int) -> int:
    return 0 if samples < FRAME else (samples - FRAME) // HOP + 1


def source_frames(samples: int) -> int:
    """Source frames that are complete after so many samples: frame j needs mel frame 4j."""
    frames = mel_frames(samples)
    return 0 if frames == 0 else (frames - 1) // SUBSAMPLING + 1


def frame_end(frame: int) -> int:
    """The number of samples after which source frame `frame` is complete."""
    return HOP * SUBSAMPLING * frame + FRAME


def filters(warp: float = 1.0) -> np.ndarray:
    """[257, 80] triangular filters in float64; `warp` multiplies the frequencies of the filters (another length of the vocal tract)."""
    to_mel = lambda hertz: 2595.0 * np.log10(1.0 + hertz / 700.0)
    mels = np.linspace(to_mel(MEL_LOW), to_mel(MEL_HIGH), MELS + 2)
    if warp != 1.0:  # piecewise linear with fixed ends
        hertz = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
        mels = to_mel(np.interp(hertz, [0.0, 5500.0, MEL_HIGH], [0.0, 5500.0 * warp, MEL_HIGH]))
    bins = to_mel(np.arange(FFT // 2 + 1) * RATE / FFT)
    rise = (bins[:, None] - mels[None, :-2]) / (mels[1:-1] - mels[:-2])
    fall = (mels[None, 2:] - bins[:, None]) / (mels[2:] - mels[1:-1])
    return np.maximum(0.0, np.minimum(rise, fall))


@functools.lru_cache(maxsize=None)
def _filters(device: str, warps: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(np.stack([filters(w) for w in warps]), dtype=torch.float32, device=device)


def log_mel(samples: torch.Tensor, warps: torch.Tensor | None = None, steps: tuple[float, ...] = (1.0,)) -> torch.Tensor:
    """[B, samples] -> [B, frames, 80], not normalised; warps[b] indexes `steps`, the warp factors to choose from."""
    frames = samples.unfold(1, FRAME, HOP)
    window = torch.hann_window(FRAME, periodic=True, device=samples.device, dtype=samples.dtype)
    power = torch.fft.rfft(frames * window, n=FFT).abs().square()
    bank = _filters(str(samples.device), steps).to(samples.dtype)
    energy = power @ bank[0] if warps is None else torch.bmm(power, bank[warps])
    return torch.log(energy + LOG_FLOOR)


WARPS = tuple(float(w) for w in np.linspace(0.88, 1.12, 17))


def augment(wave: torch.Tensor, lengths: torch.Tensor, generator: torch.Generator, only_noise_db: float | None = None) -> torch.Tensor:
    """Noise, babble, echo, equalisation and gain on [B, L] speech placed in silence.

    Level: each row's speech is set to a random level of -38 to -12 dB; 60 % get coloured noise and 25 % babble of the batch's other rows at 5 to
    30 dB; 25 % an exponentially decaying echo; 40 % a smooth random equaliser. With only_noise_db: coloured noise at this ratio, no more.
    """
    batch, length = wave.shape
    device = wave.device
    uniform = lambda low, high: torch.rand(batch, 1, device=device, generator=generator) * (high - low) + low
    coin = lambda p: torch.rand(batch, 1, device=device, generator=generator) < p
    size = length  # circular: what an echo wraps round is below the noise floor
    frequency = torch.fft.rfftfreq(size, 1.0 / RATE, device=device)
    octave = torch.log2((frequency + 60.0) / 8060.0)  # -7 ... 0

    level = lambda x: (x.square().sum(1, keepdim=True) / lengths[:, None].clamp(min=1)).sqrt().clamp(min=1e-5)
    colour = uniform(0.0, 1.0)
    white = torch.randn(batch, size // 2 + 1, 2, device=device, generator=generator)
    noise = torch.fft.irfft(torch.view_as_complex(white) * torch.exp2(-colour * octave), n=size)[:, :length]
    noise = noise / noise.square().mean(1, keepdim=True).sqrt()
    if only_noise_db is not None:
        return wave + noise * level(wave) * 10.0 ** (-only_noise_db / 20.0)

    spectrum = torch.fft.rfft(wave, n=size)
    decay = 6.9 / uniform(0.08, 0.45) / RATE  # by 60 dB in 80 to 450 ms
    tail = torch.randn(batch, 8192, device=device, generator=generator) * torch.exp(-decay * torch.arange(8192, device=device))
    tail = tail / tail.square().sum(1, keepdim=True).sqrt() * uniform(0.1, 0.7) * coin(0.25)
    tail[:, 0] = 1.0
    phase = uniform(0.0, 2.0 * math.pi)
    curve = uniform(-6.0, 6.0) * torch.sin(octave * uniform(0.3, 1.6) + phase) + uniform(-1.5, 1.5) * octave
    roll = torch.where(coin(0.12), uniform(3200.0, 6000.0), torch.full((batch, 1), 1e5, device=device))
    gain = torch.pow(10.0, curve * coin(0.4) / 20.0) / (1.0 + (frequency / roll) ** 16)
    wave = torch.fft.irfft(spectrum * torch.fft.rfft(tail, n=size) * gain, n=size)[:, :length]
    wave = wave / level(wave)

    babble = sum(torch.roll(wave, (k, 7919 * k), (0, 1)) for k in (1, 2, 3)) / 1.7
    ratio = lambda: torch.pow(10.0, -uniform(5.0, 30.0) / 20.0)
    wave = wave + noise * ratio() * coin(0.6) + babble * ratio() * coin(0.25)
    return wave * torch.pow(10.0, uniform(-38.0, -12.0) / 20.0)


def mask_features(mel: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """SpecAugment on normalised features: two time masks of up to 10 frames and two frequency masks of up to 15 bins, set to 0."""
    batch, frames, bins = mel.shape
    device = mel.device
    keep = torch.ones(batch, frames, bins, dtype=torch.bool, device=device)
    for axis, size, widest in ((1, frames, 10), (1, frames, 10), (2, bins, 15), (2, bins, 15)):
        width = (torch.rand(batch, 1, device=device, generator=generator) * (widest + 1)).floor()
        start = (torch.rand(batch, 1, device=device, generator=generator) * (size - width)).floor()
        index = torch.arange(size, device=device)[None]
        hole = (index >= start) & (index < start + width)
        keep &= ~(hole[:, :, None] if axis == 1 else hole[:, None, :])
    return mel * keep
