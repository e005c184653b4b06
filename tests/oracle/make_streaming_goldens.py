#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Records what the released code of two streaming systems computes, step by step.

    git clone https://github.com/EIT-NLP/StreamingLLM AUTHORS && git -C AUTHORS checkout 066d3b2
    python3 tests/oracle/make_streaming_goldens.py --authors AUTHORS [--output tests/data/streaming]

Group Position Encoding (StreamingLLM_GPE) and StreamingThinker keep a source and a target cache,
each with positions of its own, and alternate between READ (append source) and WRITE (generate).
Their code is neither copied nor changed: this script imports it from AUTHORS, runs its own
generation loop on tiny seeded weights and listens to it. A test can then replay the same steps and
compare every logit.

Run by hand, once for each part, with the versions that the authors pin (a part runs only where its
version of Transformers is installed; the recorded data were made with exactly these, on a CPU):

    StreamingLLM_GPE   pip install torch==2.4.0 transformers==4.44.0 "numpy<2" safetensors
    StreamingThinker   pip install torch==2.4.0 transformers==4.51.3 numpy==2.2.5 safetensors==0.5.3
                           tokenizers==0.21.1 huggingface-hub==0.30.2

How the loop is driven: a stub tokenizer (the "pieces" below), a logits processor that forces the
predicted tokens (or none, where greedy), a stopping criterion that ends a run after so many
predictions; hooks on the model's forward and on the cache's pop record. In StreamingThinker the
module generation/Stopping_criteria.py is imported but not in the repository; it is supplied from
StreamingLLM_GPE, and the sentence loop recorded here never calls it.

Per case (gpe_qwen2, gpe_llama3, thinker_qwen3):

    config.json, model.safetensors   an ordinary Qwen2 / Llama / Qwen3 checkpoint, float32
    schedule_N.json                  below
    logits_N.safetensors             "logits" [rows][vocab], float32: one row for every fed token

schedule_N.json: header, then the steps in the order in which they happened.

    k                 source units (after the prompt) that the first READ takes with the prompt
    phi               position of the first target token
    units             [[token, ...], ...] source units: the prompt, then what arrives
    prefix            target tokens that the first WRITE feeds at once
    separators        (StreamingThinker) predicting one of these ends a target unit
    pieces            (Group Position Encoding) text of every token, on which the word rule works
    greedy            true: predictions are the largest logits; false: they were forced
    greedy_margin     (if greedy) smallest difference of the two largest logits
    lags              (Group Position Encoding) source units read at the end of each target word
    float64_difference  largest difference of a logit to the check below
    mutations         {what was changed: largest change of a logit}: how far off a reader is that
                      gets this wrong
    steps             [{action, ...}]:
        read, write   one forward of "tokens" at "positions" (real numbers).
                      "sees_source", "sees_target": tokens of each group visible to the step's last
                      token besides the step's own; the step's own tokens see each other as "mask"
                      says: "causal", or "none" (all see all, in both directions). Source tokens
                      never see target tokens. "logits": [first row, end row) of logits_N.
                      "unit" (read): [first, end) of the source units read.
                      "predicted" (write): the token that was predicted next.
        drop          "predicted" is thrown away and the keys and values of the last fed target
                      token ("tokens", at "positions") are removed; "sees_target": target tokens
                      that remain. The token is fed again by the next write.

The check shares nothing with their code: all tokens that were fed in the course of a schedule (one
fed twice counts as two) go through the decoder at once, in float64, without any cache, under one
explicit mask [fed][fed] which this script derives from the rules alone. It must agree to 1e-4.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import pathlib
import shutil
import sys
import types

import torch
import transformers
from naive_decoder import NaiveDecoder, to_json
from safetensors.torch import save_file

COMMIT = "066d3b2"
MAX_DIFFERENCE = 1e-4
MIN_MUTATION = 100.0  # times float64_difference: a rule that changes less is not tested
MIN_MARGIN = 1e-2  # of greedy predictions: seeds are tried until it is reached

# Tokens of the stub vocabulary. Group Position Encoding: 2 ends the turn, 3 to 8 are punctuation,
# then odd tokens begin with a space and even ones continue a word.
END = 2
PUNCTUATION = {3: ".", 4: ",", 5: ":", 6: ";", 7: "?", 8: "!"}
SEPARATORS = {3: "<SEP>", 4: "<EOQ>", 5: "<EOS>", 6: "<EOT>", 7: "<EOR>", 8: "<EOA>", 9: "<ignore>"}
SEP, EOQ, EOT, EOR, EOA = 3, 4, 6, 7, 8
FIRST_WORD = 10  # tokens below are never drawn at random

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

# units: tokens per source unit; predictions: forced tokens, or how many greedy ones.
CASES = {
    "gpe_qwen2": {
        "part": "StreamingLLM_GPE", "module": "models.Qwen2_5.qwen_streaming",
        "class": "Qwen2ForCausalLM_stream", "config_class": transformers.Qwen2Config,
        "config": dict(vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                       rms_norm_eps=1e-6, rope_theta=1000000.0, tie_word_embeddings=True,
                       use_sliding_window=False, bos_token_id=None, eos_token_id=None),
        "schedules": [
            # Words of two and of one token; a comma, which triggers a READ without a drop and then,
            # with the space that follows, a second one; two drops after the last unit was read.
            dict(k=2, phi=0, units=[5, 1, 2, 3, 1, 2], prefix=1,
                 predictions=[11, 12, 13, 15, 17, 17, 14, 16, 4, 19, 21, 23, 25, 25, 18, 27, 31, 22,
                              END, 24]),
            dict(k=1, phi=0.5, units=[4, 2, 1, 3, 1, 2, 1], prefix=3, predictions=22),
            # Everything is read before the first WRITE.
            dict(k=9, phi=128, units=[3, 1, 2, 2], prefix=3,
                 predictions=[33, 30, 35, 37, 39, 41, 34, 36, END]),
        ],
    },
    "gpe_llama3": {
        "part": "StreamingLLM_GPE", "module": "models.Llama3.llama_streaming",
        "class": "LlamaForCausalLM_stream", "config_class": transformers.LlamaConfig,
        "config": dict(vocab_size=128, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                       num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=512,
                       rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=LLAMA3_ROPE,
                       tie_word_embeddings=False, bos_token_id=None, eos_token_id=None),
        "schedules": [
            dict(k=3, phi=0, units=[6, 2, 1, 1, 3, 2], prefix=2,
                 predictions=[11, 13, 13, 12, 14, 15, 17, 16, 3, 19, 21, 23, 18, END]),
        ],
    },
    "thinker_qwen3": {
        "part": "StreamingThinker", "module": "Qwen3.qwen_streaming",
        "class": "Qwen3ForCausalLM_stream",
        "config_class": getattr(transformers, "Qwen3Config", None),
        "config": dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                       max_position_embeddings=512, rms_norm_eps=1e-6, rope_theta=1000000.0,
                       tie_word_embeddings=False, sliding_window=None, bos_token_id=None,
                       eos_token_id=None),
        "schedules": [
            # k = 0: the first unit is instruction and question together.
            dict(k=0, phi=0, units=[6, 3, 2, 4], prefix=3,
                 predictions=[20, 21, EOQ, 22, 23, 24, EOT, 25, EOT, 26, EOT, 27, EOR, 28, EOA]),
            # Separators at the very beginning and right after each other; real positions.
            dict(k=0, phi=0.5, units=[4, 1, 3, 2, 1], prefix=1,
                 predictions=[SEP, 30, 31, EOQ, EOT, 32, EOT, 33]),
        ],
    },
}
PINNED = {"StreamingLLM_GPE": "4.44.0", "StreamingThinker": "4.51.3"}


class StubTokenizer:
    """What their loops ask of a tokenizer: text of tokens, ids of the separators."""

    def __init__(self, vocab):
        self.pieces = ["<pad>", "<|im_start|>", "<|im_end|>"] + [
            PUNCTUATION.get(token) or (" w" if token % 2 else "x") + str(token)
            for token in range(3, vocab)]

    def decode(self, tokens):
        return "".join(self.pieces[int(token)] for token in tokens)

    def convert_tokens_to_ids(self, names):
        ids = {name: token for token, name in SEPARATORS.items()}
        return [ids[name] for name in names]


class Chooser(transformers.LogitsProcessor):
    def __init__(self, recorder):
        self.recorder = recorder

    def __call__(self, input_ids, scores):
        return self.recorder.choose(scores)


class Stopper(transformers.StoppingCriteria):
    def __init__(self, recorder):
        self.recorder = recorder

    def __call__(self, input_ids, scores, **_):
        return torch.tensor([self.recorder.predicted >= self.recorder.count])


class Recorder:
    """Listens to one run of their loop, and chooses what is predicted."""

    def __init__(self, model, predictions):
        self.model = model
        self.forced = None if isinstance(predictions, int) else list(predictions)
        self.count = predictions if self.forced is None else len(self.forced)
        self.steps, self.rows, self.margin, self.predicted = [], [], float("inf"), 0

    def choose(self, scores):
        best = scores[0].topk(2)
        token = int(best.indices[0])
        if self.forced is None:
            self.margin = min(self.margin, float(best.values[0] - best.values[1]))
        else:
            token = self.forced[self.predicted]
            scores = torch.full_like(scores, float("-inf"))
            scores[0, token] = 0.0
        self.predicted += 1
        self.steps[-1]["predicted"] = token
        return scores

    def before(self, _module, _arguments, keywords):
        source = self.model.source_key_values.get_seq_length()
        target = self.model.past_key_values.get_seq_length() - source
        read = keywords["ReadAction"]
        if read:  # what is visible is what is in the cache that the step is given
            visible = keywords["source_key_values"].get_seq_length(), 0
            if keywords["source_key_values"] is not self.model.source_key_values:
                raise SystemExit("a READ does not use the source cache")
        else:
            visible = source, target
        tokens = keywords["input_ids"][0].tolist()
        positions = keywords["position_ids"][0].tolist()
        first = sum(len(rows) for rows in self.rows)
        self.steps.append({
            "action": "read" if read else "write", "tokens": tokens, "positions": positions,
            "sees_source": visible[0], "sees_target": visible[1],
            "mask": "causal" if read else "none", "logits": [first, first + len(tokens)]})

    def after(self, _module, _arguments, output):
        self.rows.append(output.logits[0].float().clone())

    def drop(self):
        last = next(step for step in reversed(self.steps) if step["action"] == "write")
        self.steps.append({
            "action": "drop", "tokens": last["tokens"][-1:], "positions": last["positions"][-1:],
            "sees_target": last["sees_target"] + len(last["tokens"]) - 1,
            "predicted": last["predicted"]})


def import_authors(authors, case):
    """(their model class, their module of the generation loop)"""
    part = authors / case["part"]
    if not (part / "generation" / "generate.py").is_file():
        raise SystemExit(f"{authors} holds no checkout of EIT-NLP/StreamingLLM")
    sys.path.insert(0, str(part))
    if case["part"] == "StreamingThinker":
        criteria = authors / "StreamingLLM_GPE" / "generation" / "Stopping_criteria.py"
        name = "generation.Stopping_criteria"
        spec = importlib.util.spec_from_file_location(name, criteria)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    module = importlib.import_module(case["module"])
    return getattr(module, case["class"]), importlib.import_module("generation.generate")


def run_loop(model, generate, case, plan, units, prefix):
    """Their generation loop, once. Returns (Recorder, what it calls wait_lagging)."""
    recorder = Recorder(model, plan["predictions"])
    source = torch.tensor([list(itertools.chain(*units))])
    arguments = dict(
        inputs=source, attention_mask=torch.ones_like(source), generate_mode="streaming",
        tokenizer=StubTokenizer(case["config"]["vocab_size"]), end_Instruct="<|im_end|>",
        pe_cache_length=plan["phi"], assistant_token=torch.tensor(prefix),
        _lengths=[{"source_seg_len": [len(unit) for unit in units],
                   "source_token_len": source.shape[1]}],
        max_new_tokens=100, do_sample=False,
        logits_processor=transformers.LogitsProcessorList([Chooser(recorder)]),
        stopping_criteria=transformers.StoppingCriteriaList([Stopper(recorder)]))
    pop = generate.DynamicCache.pop

    @functools.wraps(pop)
    def recorded_pop(cache):
        recorder.drop()
        return pop(cache)

    generate.DynamicCache.pop = recorded_pop
    hooks = [model.register_forward_pre_hook(recorder.before, with_kwargs=True),
             model.register_forward_hook(recorder.after)]
    try:
        with torch.no_grad():
            if case["part"] == "StreamingThinker":  # as their evaluation calls it
                _, lags = model.streaming_generate(**arguments, split_mode="sentence", wait_k=1)
            else:
                _, lags = model.generate(**arguments, split_mode="word", wait_k=plan["k"],
                                         _lengths_index=torch.tensor([0]))
    finally:
        generate.DynamicCache.pop = pop
        for hook in hooks:
            hook.remove()
    return recorder, lags


class MaskedDecoder(NaiveDecoder):
    """All tokens at once, any mask, any positions, no cache."""

    def forward_masked(self, tokens, positions, mask):
        """mask: bool [tokens][tokens], True where row sees column. Returns logits."""
        config, dim = self.config, self.head_dim
        x = self.weights["model.embed_tokens.weight"][tokens]
        for index in range(config.num_hidden_layers):
            layer = f"model.layers.{index}."
            y = self.norm(x, layer + "input_layernorm")
            q, k, v = (self.linear(y, f"{layer}self_attn.{name}_proj").view(len(tokens), -1, dim)
                       for name in "qkv")
            if layer + "self_attn.q_norm.weight" in self.weights:
                q = self.norm(q, layer + "self_attn.q_norm")
                k = self.norm(k, layer + "self_attn.k_norm")
            q, k = self.rotate(q, positions, index), self.rotate(k, positions, index)
            heads = []
            for head in range(q.shape[1]):
                kv = head * k.shape[1] // q.shape[1]
                scores = (q[:, head] @ k[:, kv].T * self.sm_scale).masked_fill(~mask, -torch.inf)
                heads.append(torch.softmax(scores, dim=-1) @ v[:, kv])
            x = x + self.linear(torch.cat(heads, dim=-1), layer + "self_attn.o_proj")
            x = x + self.feed_forward(self.norm(x, layer + "post_attention_layernorm"), index)
        x = self.norm(x, "model.norm")
        tied = config.tie_word_embeddings
        return x @ self.weights["model.embed_tokens.weight" if tied else "lm_head.weight"].T


def layout(steps, plan, units, prefix, *, prefix_causal=False, source_sees_target=False,
           keep_dropped=False, batch_positions=False, late_read=False):
    """(tokens, positions, mask, problems) of everything that `steps` feed, from the rules alone.

    Only the order of the actions and the predicted tokens are taken from `steps`; the rest is
    worked out and compared with what was recorded. The keywords break one rule each."""
    arriving = list(itertools.chain(*units))
    offset = len(arriving) if batch_positions else plan["phi"]
    tokens, positions, visible, problems = [], [], [], []
    source, target = [], []  # rows whose keys and values are in each group's cache
    pending, read_units, to_feed, last_read = list(prefix), 0, None, []

    def expect(step, key, value):
        if step[key] != value:
            problems.append(f"{step['action']}: {key} {step[key]}, expected {value}")

    for step in steps:
        if step["action"] == "drop":
            expect(step, "predicted", to_feed)
            to_feed, last = tokens[target[-1]], target[-1]
            if not keep_dropped:
                target.pop()
            expect(step, "tokens", [tokens[last]])
            if not (keep_dropped or batch_positions):
                expect(step, "sees_target", len(target))
                expect(step, "positions", [positions[last]])
            continue
        first = len(tokens)
        if step["action"] == "read":
            end = plan["k"] + 1 if read_units == 0 else read_units + 1
            fed = list(itertools.chain(*units[read_units:end]))
            step["unit"] = [read_units, min(end, len(units))]
            read_units = min(end, len(units))
            rows = range(first, first + len(fed))
            start = len(source)
            before = source + (target if source_sees_target else [])
            causal, group = True, source
        else:
            fed = pending or [to_feed]
            causal = prefix_causal or not pending
            rows = range(first, first + len(fed))
            start = offset + len(target)
            before = source + target
            if late_read and target:
                before = [row for row in before if row not in last_read]
            group, pending, to_feed, last_read = target, [], step["predicted"], []
        expect(step, "tokens", fed)
        if not (keep_dropped or batch_positions or source_sees_target):
            expect(step, "positions", [start + i for i in range(len(fed))])
            expect(step, "sees_source", len(source))
            expect(step, "sees_target", 0 if group is source else len(target))
        for i, row in enumerate(rows):
            own = rows[: i + 1] if causal else rows
            visible.append(before + list(own))
            tokens.append(fed[i])
            positions.append(float(start + i))
        group.extend(rows)
        if group is source:
            last_read = rows
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for row, seen in enumerate(visible):
        mask[row, seen] = True
    return tokens, positions, mask, problems


def initialise(model, seed):
    """Weights that make every feature visible: matrices of standard deviation 0.25, norm weights
    0.7 to 1.3, biases of standard deviation 0.4. Returns {name: tensor} of a checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, weight in sorted(model.named_parameters()):
        weight = torch.empty(weight.shape)
        if "norm" in name:
            weight.uniform_(0.7, 1.3, generator=generator)
        elif name.endswith("bias"):
            weight.normal_(0.0, 0.4, generator=generator)
        else:
            weight.normal_(0.0, 0.25, generator=generator)
        weights[name] = weight
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return weights


def write_checkpoint(folder, case, config, weights):
    written = json.loads(config.to_json_string(use_diff=False))
    # As a released checkpoint of the family has it, without the common base class's defaults.
    base = transformers.PretrainedConfig().to_dict()
    kept = {key: value for key, value in written.items()
            if key in case["config"] or key not in base}
    kept.update(architectures=[case["class"].removesuffix("_stream")], torch_dtype="float32",
                model_type=config.model_type, transformers_version=transformers.__version__)
    for key in [key for key in kept if key.startswith("_")]:
        del kept[key]
    text = json.dumps(dict(sorted(kept.items())), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def naive_config(config):
    """What NaiveDecoder wants to know, in the newer naming of the rotary parameters."""
    names = ("model_type", "hidden_size", "num_attention_heads", "num_key_value_heads",
             "num_hidden_layers", "rms_norm_eps", "tie_word_embeddings")
    scaling = getattr(config, "rope_scaling", None) or {"rope_type": "default"}
    head_dim = getattr(config, "head_dim", None)
    return types.SimpleNamespace(
        **{name: getattr(config, name) for name in names}, head_dim=head_dim,
        rope_parameters={"rope_theta": config.rope_theta, **scaling})


def draw(generator, count, vocab):
    return torch.randint(FIRST_WORD, vocab, (count,), generator=generator).tolist()


def largest(difference):
    return float(difference.abs().max())


def write_schedule(path, record):
    """One line per entry and per step."""
    lines = []
    for key, value in record.items():
        if key in ("steps", "units"):
            rows = ",\n".join("    " + to_json(item) for item in value)
            lines.append(f"  {json.dumps(key)}: [\n{rows}\n  ]")
        else:
            lines.append(f"  {json.dumps(key)}: {to_json(value)}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def record_schedule(model, generate, case, plan, number, seed):
    """(record, logits) of one schedule, or None if this seed's greedy run is of no use."""
    vocab = case["config"]["vocab_size"]
    generator = torch.Generator().manual_seed(1000 * seed + number)
    units = [draw(generator, length, vocab) for length in plan["units"]]
    prefix = draw(generator, plan["prefix"], vocab)
    recorder, lags = run_loop(model, generate, case, plan, units, prefix)
    steps, logits = recorder.steps, torch.cat(recorder.rows)
    greedy = recorder.forced is None
    reads, drops = (sum(step["action"] == action for step in steps) for action in ("read", "drop"))
    if greedy:
        read_all = reads >= len(units) - plan["k"]
        predicted = {step["predicted"] for step in steps if step["action"] == "write"}
        several = any(a["action"] == b["action"] == "write" for a, b in itertools.pairwise(
            steps[2:]))
        if recorder.margin < MIN_MARGIN or not read_all or not several or len(predicted) < 10:
            return None

    decoder = MaskedDecoder(naive_config(model.config), model.state_dict(), torch.float64)
    tokens, positions, mask, problems = layout(steps, plan, units, prefix)
    if problems:
        raise SystemExit("their loop does not follow the rules:\n  " + "\n  ".join(problems))
    exact = decoder.forward_masked(tokens, positions, mask)
    difference = largest(exact - logits)
    if not difference <= MAX_DIFFERENCE:
        raise SystemExit(f"their logits differ from the float64 check by {difference:.3g}")

    broken = {"target positions continue the source's": dict(batch_positions=True)}
    if reads > 1:
        broken["a source token sees the target"] = dict(source_sees_target=True)
        broken["the write after a read does not see it"] = dict(late_read=True)
    if plan["prefix"] > 1:
        broken["the prefix is fed causally"] = dict(prefix_causal=True)
    if drops:
        broken["a dropped token's keys are kept"] = dict(keep_dropped=True)
    mutations = {}
    for what, change in broken.items():
        *changed, _ = layout(steps, plan, units, prefix, **change)
        mutations[what] = largest(decoder.forward_masked(*changed) - exact)
    if plan["phi"]:
        shifted = [p if step["action"] == "read" else p - plan["phi"] for step in steps
                   if step["action"] != "drop" for p in step["positions"]]
        mutations["phi 0"] = largest(decoder.forward_masked(tokens, shifted, mask) - exact)
    for what, change in mutations.items():
        if change < MIN_MUTATION * difference:
            raise SystemExit(f"'{what}' changes the logits by {change:.3g} only")

    record = {
        "case": None, "authors": f"EIT-NLP/StreamingLLM {COMMIT}, {case['part']}",
        "generator": f"torch {torch.__version__.split('+')[0]}, "
                     f"transformers {transformers.__version__}",
        "seed": seed, "k": plan["k"], "phi": plan["phi"], "vocab": vocab, "rows": len(logits),
        "prefix": prefix, "greedy": greedy}
    if greedy:
        record["greedy_margin"] = recorder.margin
    if case["part"] == "StreamingThinker":
        record["separators"] = sorted(SEPARATORS)
    else:
        record.update(lags=lags, pieces=StubTokenizer(vocab).pieces)
    record.update(float64_difference=difference, mutations=mutations, units=units, steps=steps)
    return record, logits.contiguous()


def make(name, case, authors, output):
    model_class, generate = import_authors(authors, case)
    folder = output / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = case["config_class"](**case["config"])
    config._attn_implementation = "eager"
    seed = 1
    write_checkpoint(folder, case, config, initialise(model_class(config), seed))
    loaded = case["config_class"].from_pretrained(folder)
    loaded._attn_implementation = "eager"
    model = model_class.from_pretrained(folder, config=loaded).eval()
    for number, plan in enumerate(case["schedules"]):
        for tried in range(1, 1000):
            made = record_schedule(model, generate, case, plan, number, tried)
            if made:
                break
        else:
            raise SystemExit(f"{name}: no seed gives a usable greedy run")
        record, logits = made
        record["case"] = f"{name}, schedule {number}"
        write_schedule(folder / f"schedule_{number}.json", record)
        path = folder / f"logits_{number}.safetensors"
        save_file({"logits": logits}, path)
        path.chmod(0o644)
        counts = {action: sum(step["action"] == action for step in record["steps"])
                  for action in ("read", "write", "drop")}
        print(f"{name} {number}: seed {record['seed']}, {counts}, {len(logits)} rows, logits "
              f"{float(logits.min()):.2f} to {float(logits.max()):.2f}, float64_difference "
              f"{record['float64_difference']:.2e}, smallest mutation "
              f"{min(record['mutations'].values()):.3f}"
              + (f", margin {record['greedy_margin']:.3f}" if record["greedy"] else ""))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", maxsplit=1)[0],
        epilog="The parts need different versions of Transformers: "
               + ", ".join(f"{part} {version}" for part, version in PINNED.items())
               + ". A run makes the cases whose version is installed.")
    default = pathlib.Path(__file__).resolve().parents[1] / "data" / "streaming"
    parser.add_argument("--authors", type=pathlib.Path, required=True, metavar="DIR",
                        help=f"a checkout of EIT-NLP/StreamingLLM, commit {COMMIT}")
    parser.add_argument("--output", type=pathlib.Path, default=default, metavar="DIR",
                        help="folder of the cases (default: tests/data/streaming)")
    parser.add_argument("--only", choices=sorted(CASES),
                        help="this case, with whatever version of Transformers is installed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    sys.dont_write_bytecode = True
    installed = transformers.__version__
    chosen = [name for name, case in CASES.items() if options.only == name
              or not options.only and PINNED[case["part"]] == installed]
    if not chosen:
        parser.error(f"Transformers {installed} is installed; see --help for what is needed")
    for name in chosen:
        make(name, CASES[name], options.authors.resolve(), options.output)


if __name__ == "__main__":
    main()
