# SPDX-License-Identifier: MIT
"""Writes a trained checkpoint as the GGUF file that sluice's load_listen_model() reads, and reads such a file back.

    python3 export.py group.pt --pieces pieces.json --output listen-en.gguf
    python3 export.py --untrained OUT.gguf            # a tiny seeded file of the same form, for tests

Matrices whose columns are a multiple of 32 become Q8_0, everything else F32. Needs numpy, torch and gguf.
"""

from __future__ import annotations

import argparse
import os
import sys

import gguf
import numpy as np
import torch

import features
import model as listening
from pieces import LETTERS, MARK, SPECIAL, Pieces

TRAINED_DELAY = 4


def tensors(state: dict[str, torch.Tensor], layers: int) -> dict[str, np.ndarray]:
    """The checkpoint's weights under the file's names."""
    get = lambda name: state[name].float().cpu().numpy()
    out = {"token_embd.weight": get("embedding"), "output_norm.weight": get("final_norm")}
    for i in range(layers):
        part = lambda name: get(f"layers.{i}.{name}")
        q, k, v = np.split(part("qkv"), 3)
        gate, up = np.split(part("gate_up"), 2)
        weights = {"attn_norm": part("attn_norm"), "attn_q": q, "attn_k": k, "attn_v": v, "attn_output": part("out"), "ffn_norm": part("ffn_norm"),
                   "ffn_gate": gate, "ffn_up": up, "ffn_down": part("down")}
        out.update({f"blk.{i}.{name}.weight": value for name, value in weights.items()})
    out.update({"listen.mel_mean": get("mel_mean"), "listen.mel_std": get("mel_std")})
    for name in ("conv1", "conv2", "proj", "ctc"):
        out[f"listen.{name}.weight"], out[f"listen.{name}.bias"] = get(name + ".weight"), get(name + ".bias")
    return out


def write(path: str, state: dict[str, torch.Tensor], sizes: listening.Sizes, pieces: list[str], name: str) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_context_length(4096)
    writer.add_embedding_length(sizes.width)
    writer.add_block_count(sizes.layers)
    writer.add_feed_forward_length(sizes.feed_forward)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.heads)
    writer.add_layer_norm_rms_eps(listening.NORM_EPS)
    writer.add_rope_dimension_count(sizes.head)
    writer.add_rope_freq_base(listening.ROPE_BASE)
    writer.add_vocab_size(len(pieces))
    writer.add_token_list(pieces)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in (("version", 1), ("sample_rate", features.RATE), ("frame_length", features.FRAME), ("hop", features.HOP),
                       ("fft_size", features.FFT), ("frame_window", listening.WINDOW), ("trained_delay", TRAINED_DELAY)):
        writer.add_uint32("listen." + key, value)
    for key, value in (("mel_low_hz", features.MEL_LOW), ("mel_high_hz", features.MEL_HIGH), ("log_floor", features.LOG_FLOOR)):
        writer.add_float32("listen." + key, value)
    kind = gguf.GGMLQuantizationType.Q8_0
    for tensor, value in tensors(state, sizes.layers).items():
        value = np.ascontiguousarray(value, np.float32)
        if value.ndim == 2 and value.shape[1] % 32 == 0:
            writer.add_tensor(tensor, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path: str) -> tuple[listening.Listener, Pieces]:
    """The model with the file's weights in float32 (dequantised) and its pieces."""
    reader = gguf.GGUFReader(path)
    value = lambda key: reader.fields[key].contents()
    pieces = Pieces(list(value("tokenizer.ggml.tokens")))
    sizes = listening.Sizes(value("llama.embedding_length"), value("llama.block_count"), value("llama.attention.head_count"),
                            value("llama.feed_forward_length"), len(pieces))
    found = {}
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        found[tensor.name] = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape))
    state = {"embedding": found["token_embd.weight"], "final_norm": found["output_norm.weight"], "mel_mean": found["listen.mel_mean"],
             "mel_std": found["listen.mel_std"]}
    for i in range(sizes.layers):
        part = lambda name: found[f"blk.{i}.{name}.weight"]
        state.update({
            f"layers.{i}.attn_norm": part("attn_norm"), f"layers.{i}.ffn_norm": part("ffn_norm"), f"layers.{i}.out": part("attn_output"),
            f"layers.{i}.down": part("ffn_down"), f"layers.{i}.qkv": torch.cat((part("attn_q"), part("attn_k"), part("attn_v"))),
            f"layers.{i}.gate_up": torch.cat((part("ffn_gate"), part("ffn_up"))),
        })
    for name in ("conv1", "conv2", "proj", "ctc"):
        state[name + ".weight"], state[name + ".bias"] = found[f"listen.{name}.weight"], found[f"listen.{name}.bias"]
    model = listening.Listener(sizes)
    model.load_state_dict(state)
    return model.eval(), pieces


def untrained() -> tuple[dict, listening.Sizes, list[str]]:
    torch.manual_seed(7)
    pieces = SPECIAL + list(LETTERS) + [letter + MARK for letter in LETTERS] + ["th", "he" + MARK, "in"]
    sizes = listening.Sizes(width=32, layers=2, heads=2, feed_forward=64, pieces=len(pieces))
    model = listening.Listener(sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)  # so that outputs differ clearly from frame to frame
        model.mel_mean.fill_(-4.0)
        model.mel_std.fill_(3.0)
    return model.state_dict(), sizes, pieces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="LAYOUT.pt of train.py")
    parser.add_argument("--pieces", help="pieces.json of prepare_text.py")
    parser.add_argument("--output")
    parser.add_argument("--name", default="listen-en")
    parser.add_argument("--untrained", metavar="OUT", help="write the tiny file and stop")
    args = parser.parse_args()
    if args.untrained:
        write(args.untrained, *untrained(), "untrained")
        return
    if not (args.checkpoint and args.pieces and args.output):
        parser.error("give a checkpoint, --pieces and --output")
    saved = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
    write(args.output, saved["state"], listening.Sizes(**saved["sizes"]), Pieces.load(args.pieces).pieces, args.name)
    print(f"{args.output}: {os.path.getsize(args.output) / 1e6:.2f} MB, {saved['note']}", file=sys.stderr)


if __name__ == "__main__":
    main()
