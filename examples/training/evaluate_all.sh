#!/bin/bash
# SPDX-License-Identifier: MIT
# Exports the group layout and evaluates all four layouts side by side on the test columns that train_all.sh synthesised.
#
#     bash evaluate_all.sh TEXT WORK OUT
set -u
text=$1 work=$2 out=$3
here=$(cd "$(dirname "$0")" && pwd)
gpus=$(nvidia-smi -L | wc -l)
export OMP_NUM_THREADS=4
python3 "$here/export.py" "$work/out/group.pt" --pieces "$text/pieces.json" --output "$out/listen-en.gguf"
columns=()
for column in held_out_voices train_voices random_words open_text; do columns+=(--column "$column=$work/test/$column"); done
columns+=(--column "noisy_10db=$work/test/held_out_voices@10")
index=0
for layout in group interleaved reencode batch; do
  model=$work/out/$layout.pt
  [ $layout = group ] && [ -e "$out/listen-en.gguf" ] && model=$out/listen-en.gguf
  CUDA_VISIBLE_DEVICES=$((index % gpus)) python3 "$here/evaluate.py" --$layout "$model" --pieces "$text/pieces.json" "${columns[@]}" \
    --json "$work/out/$layout.json" >"$work/logs/$layout.eval" 2>&1 &
  index=$((index + 1))
done
wait
cat "$work"/logs/*.eval
