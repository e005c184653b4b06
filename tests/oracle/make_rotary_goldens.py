#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Records the inverse frequencies and attention factors that Hugging Face Transformers computes.

    python3 tests/oracle/make_rotary_goldens.py > tests/data/rotary/goldens.txt

Needs torch and transformers; the recorded file was made with the versions named in its first lines.
The released code works in float32. It is run twice: as released, and with torch's float types
replaced by float64, so that a test can hold the formulas to 1e-12 and the released numbers to
float32 rounding.

Format, whitespace-separated, `#` starts a comment line:
    case NAME HEAD_DIM ROTARY_DIM THETA SCALING OPTION...
    attention_factor VALUE
    pairs COUNT, then COUNT lines: frequency in float64, frequency as released
OPTION lists by SCALING: none: -; linear, ntk: factor; llama3: factor low_freq_factor
high_freq_factor original_context; yarn: factor original_context beta_fast beta_slow
attention_factor (0: derived) truncate (0 or 1).
"""

import warnings
from unittest import mock

import torch
import transformers
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

NTK_CONTEXT = 1024


def released(rope_type, config, seq_len):
    """The inverse frequencies and the attention factor, as the library computes them."""
    if rope_type == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[rope_type](config, None, seq_len)


def record(name, head_dim, rotary_dim, theta, scaling, options):
    rope = {
        "rope_type": scaling,
        "rope_theta": theta,
        "partial_rotary_factor": rotary_dim / head_dim,
    }
    seq_len = None
    if scaling == "none":
        rope["rope_type"] = "default"
        del rope["partial_rotary_factor"]
        assert rotary_dim == head_dim  # Llama's default rule ignores partial rotation
    elif scaling == "linear":
        rope["factor"] = options[0]
    elif scaling == "ntk":
        # The released rule is the dynamic one: with factor 1 its base grows by
        # (seq_len / context)^(R / (R - 2)).
        rope["rope_type"] = "dynamic"
        rope["factor"] = 1.0
        seq_len = int(options[0] * NTK_CONTEXT)
    elif scaling == "llama3":
        names = (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
        rope.update(zip(names, options))
    elif scaling == "yarn":
        names = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
        rope.update(zip(names, options))
        if options[4]:
            rope["attention_factor"] = options[4]
        rope["truncate"] = bool(options[5])
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=NTK_CONTEXT,
        rope_parameters=rope,
    )
    rope_type = rope["rope_type"]
    # partial_rotary_factor is a quotient: make sure that it gives back the width asked for.
    assert int(head_dim * rope.get("partial_rotary_factor", 1.0)) == rotary_dim
    single, factor = released(rope_type, config, seq_len)
    with mock.patch.object(torch, "float", torch.float64), mock.patch.object(
        torch, "float32", torch.float64
    ):
        double, _ = released(rope_type, config, seq_len)
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    assert len(single) == len(double) == rotary_dim // 2

    listed = " ".join(f"{value:.17g}" for value in options) or "-"
    print(f"case {name} {head_dim} {rotary_dim} {theta:.17g} {scaling} {listed}")
    print(f"attention_factor {float(factor):.17g}")
    print(f"pairs {len(single)}")
    for high, low in zip(double.tolist(), single.tolist()):
        print(f"{high:.17g} {low:.9g}")


def main():
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print("# made by tests/oracle/make_rotary_goldens.py, which describes the format")
    print(f"# transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}")
    record("smollm2", 64, 64, 100000.0, "none", [])
    record("llama2", 128, 128, 10000.0, "none", [])
    record("linear", 128, 128, 10000.0, "linear", [4.0])
    record("linear_partial", 80, 20, 10000.0, "linear", [2.5])
    record("ntk", 128, 128, 10000.0, "ntk", [4.0])
    record("ntk_partial", 64, 16, 500000.0, "ntk", [2.5])
    record("llama3.1", 128, 128, 500000.0, "llama3", [8.0, 1.0, 4.0, 8192])
    record("llama3.2", 64, 64, 500000.0, "llama3", [32.0, 1.0, 4.0, 8192])
    record("llama3_other", 96, 96, 10000.0, "llama3", [3.0, 2.0, 16.0, 1000])
    record("gpt_oss", 64, 64, 150000.0, "yarn", [32.0, 4096, 32.0, 1.0, 0.0, 0])
    record("qwen2.5", 128, 128, 1000000.0, "yarn", [4.0, 32768, 32.0, 1.0, 0.0, 1])
    record("yarn_llama2", 128, 128, 10000.0, "yarn", [16.0, 4096, 32.0, 1.0, 0.0, 1])
    record("yarn_factor_given", 128, 128, 10000.0, "yarn", [40.0, 4096, 32.0, 1.0, 0.75, 1])
    record("yarn_betas", 64, 32, 10000.0, "yarn", [2.0, 2048, 8.0, 2.0, 0.0, 0])
    record("yarn_step", 8, 8, 10000.0, "yarn", [4.0, 4, 32.0, 1.0, 0.0, 1])


if __name__ == "__main__":
    main()
