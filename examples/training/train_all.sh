#!/bin/bash
# SPDX-License-Identifier: MIT
# Synthesises the speech, trains the four layouts side by side (one process each, spread over the GPUs there are) and waits for the first steps.
#
#     bash train_all.sh TEXT WORK SYNTHESIS_SECONDS UNTIL
#
# TEXT: folder of prepare_text.py. WORK: where shards, checkpoints and logs go (a RAM disk pays). UNTIL: seconds since the epoch at which training
# ends. Options for the synthesizers come in $VOICE_OPTIONS (JSON, see synthesise.py --options). evaluate_all.sh comes after it.
set -u
text=$1 work=$2 seconds=$3 until=$4
here=$(cd "$(dirname "$0")" && pwd)
options=${VOICE_OPTIONS:-"{}"}
cores=$(nproc)
gpus=$(nvidia-smi -L | wc -l)
mkdir -p "$work/logs" "$work/out"

index=0
for layout in group interleaved reencode batch; do
  CUDA_VISIBLE_DEVICES=$((index % gpus)) TORCHINDUCTOR_CACHE_DIR=$work/compiled/$layout OMP_NUM_THREADS=4 \
    setsid nohup python3 "$here/train.py" --data "$work/train" --pieces "$text/pieces.json" --out "$work/out" --layout $layout --until "$until" \
    >"$work/logs/$layout.log" 2>&1 &
  index=$((index + 1))
done

export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
speak() { LD_LIBRARY_PATH=${VOICE_LIBRARIES:-} python3 "$here/synthesise.py" --pieces "$text/pieces.json" --options "$options" "$@"; }
shares=espeak=0.45,flite=0.27,festival=0.16,hibari=0.12
held_out=espeak=0.4,flite=0.3,festival=0.3
few=$((cores > 16 ? 8 : 2))
(
  speak --sentences "$text/test_train_voices.tsv" --out "$work/test/train_voices" --workers $few --no-join --engines $shares --seed 99
  for column in held_out_voices random_words open_text; do
    speak --sentences "$text/test_$column.tsv" --out "$work/test/$column" --workers $few --no-join --test --engines $held_out --seed 98
  done
) >"$work/logs/tests.log" 2>&1 &
speak --sentences "$text/train.tsv" --out "$work/train" --workers $((cores - 4)) --seconds "$seconds" --engines $shares 2>&1 | tail -40
