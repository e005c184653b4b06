#!/bin/sh
# SPDX-License-Identifier: MIT

usage() {
  cat <<'END'
usage: sh bench/cuda/run.sh [--build FOLDER] [--prebuilt] [--out FOLDER] [--limit SECONDS]
                            [--model FILE] [--llama-bench PROGRAM] [PART]...

Builds the CUDA backend, checks it and times it on the GPU at hand; needs nvcc, and what cmake/test.sh
needs.

  --build FOLDER         build folder (build-gpu)
  --prebuilt             the programs are there already: build nothing
  --out FOLDER           takes logs, and rows in files named as in bench/results (FOLDER of --build/run)
  --limit SECONDS        longest time of one program (300)
  --model FILE           a GGUF file of SmolLM2-135M-Instruct for `model` (SLUICE_MODEL)
  --llama-bench PROGRAM  llama.cpp's, built with -DGGML_CUDA=ON, for `llama`

Parts; without a list those up to `watch`, and the peers whose packages are there:
  check       the tests of the backend, eight shards side by side
  sanitize    compute-sanitizer: memcheck and racecheck of small cases of every kernel, side by side
  attention   decode attention; segments: over lists; prefill: chunks; columns: several vectors
  duplex      reading beside writing
  steps       a decoder's steps, all types of weights; sessions, chunks, reading: of decoders
  context     checkpoints, forks, drafts of sessions
  watch       a minute of video
  model       the real model's text on both sides (not without a file)
  endless     a million tokens (8 minutes; only when named)
  torch, flex, flashinfer, whole, recompute, llama
              peers beside them: attention by PyTorch and FlashInfer, prefill by flex_attention,
              whole steps, recomputed windows, llama.cpp's decoders
END
}

set -u
# shellcheck source-path=SCRIPTDIR source=../../cmake/lib.sh
. "$(dirname -- "$0")/../../cmake/lib.sh" || exit 1
sluice_root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
scripts=$sluice_root/bench/cuda

build=$sluice_root/build-gpu
out=''
prebuilt=0
limit=300
llama_bench=''
parts=''
known=' check sanitize attention segments prefill columns duplex steps sessions chunks reading context
  watch model endless torch flex flashinfer whole recompute llama '
while [ "$#" -gt 0 ]; do
  case $1 in
    --prebuilt) prebuilt=1 ;;
    --help | -h)
      usage
      exit 0
      ;;
    --build | --out | --limit | --model | --llama-bench)
      [ "$#" -ge 2 ] || die "$1 wants a value"
      case $1 in
        --build) build=$2 ;;
        --out) out=$2 ;;
        --limit) limit=$2 ;;
        --model) SLUICE_MODEL=$2 && export SLUICE_MODEL ;;
        --llama-bench) llama_bench=$2 ;;
      esac
      shift
      ;;
    *)
      case $known in
        *[[:space:]]"$1"[[:space:]]*) parts="$parts $1" ;;
        *)
          say "unknown part '$1'"
          usage >&2
          exit 2
          ;;
      esac
      ;;
  esac
  shift
done
out=${out:-$build/run}
mkdir -p "$out" || die "cannot make $out"
out=$(CDPATH='' cd -- "$out" && pwd)

if [ -z "$parts" ]; then
  parts='check sanitize attention segments prefill columns duplex steps sessions chunks reading
    context watch'
  [ -z "${SLUICE_MODEL:-}" ] || parts="$parts model"
  python3 -c 'import torch' 2>/dev/null && parts="$parts torch flex whole recompute"
  python3 -c 'import flashinfer' 2>/dev/null && parts="$parts flashinfer"
  [ -z "$llama_bench" ] || parts="$parts llama"
fi

# The toolkit's libraries may lie where the loader does not look.
for library in libcublasLt.so libcudart.so; do
  folder=$(find /usr/local/cuda/lib64 /usr/local/cuda/targets /opt /usr/lib /usr/local/lib \
    -name "$library.1[2-9]" -printf '%h\n' 2>/dev/null | head -1)
  [ -z "$folder" ] || LD_LIBRARY_PATH=$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
done
export LD_LIBRARY_PATH

if [ "$prebuilt" -eq 0 ]; then
  if ! CMAKE_GENERATOR="${CMAKE_GENERATOR:-Ninja}" cmake -S "$sluice_root" -B "$build" \
    -D CMAKE_BUILD_TYPE=Release -D SLUICE_IO=ON \
    -D SLUICE_TESTS=ON -D SLUICE_BENCH=ON -D SLUICE_TEST_UNIT_FILES=8 >&2 ||
    ! cmake --build "$build" --parallel "$(build_jobs)" --target sluice_test_backend_cuda \
      sluice_cuda_decode_attention_bench sluice_cuda_segment_attention_bench \
      sluice_cuda_matrix_columns_bench sluice_cuda_decoder_bench sluice_cuda_duplex_bench \
      sluice_cuda_watch_bench sluice_context_bench_cuda >&2; then
    die 'it does not build'
  fi
fi
tests=$build/tests/sluice_test_backend_cuda
bench=$build/bench
nvidia-smi --query-gpu=name,driver_version,clocks.sm --format=csv,noheader >&2 || die 'no GPU'

summary=''
failed=0
# note NAME STATUS BEGIN
note() {
  result=ended
  if [ "$2" -ne 0 ]; then
    result="FAILED ($2)"
    failed=1
  fi
  summary="$summary
  $1: $result, $(($(date +%s) - $3)) s"
}

# rows FILE COMMAND...: what the command prints goes to the end of FILE and to stdout.
rows() {
  file=$out/$1
  shift
  timeout "$limit" "$@" > "$out/rows" 2>> "$out/errors.log"
  status=$?
  tee -a "$file" < "$out/rows"
  rm -f "$out/rows"
  return "$status"
}

check() {
  [ -x "$tests" ] || return 127
  status=0
  running=''
  for shard in 0 1 2 3 4 5 6 7; do
    GTEST_TOTAL_SHARDS=8 GTEST_SHARD_INDEX=$shard timeout "$limit" "$tests" \
      > "$out/check.$shard.log" 2>&1 &
    running="$running $!"
  done
  for one in $running; do
    wait "$one" || status=1
  done
  cat "$out"/check.?.log > "$out/check.log"
  rm -f "$out"/check.?.log
  say "tests: $(grep -c '^\[       OK' "$out/check.log") passed," \
    "$(grep -c '^\[  SKIPPED \] .* ms)$' "$out/check.log") skipped," \
    "$(grep -c '^\[  FAILED  \] .* ms)$' "$out/check.log") failed; $out/check.log"
  grep -B 20 '^\[  FAILED  \] .* ms)$' "$out/check.log" >&2
  return "$status"
}

# Small cases, since a tool slows a kernel down by ten to a thousand times; racecheck does not come
# through whole sessions.
sanitizer_cases() {
  cat <<'END'
racecheck CudaDecoder.Small
racecheck CudaDuplex.Small
racecheck QuantisedVector.RandomShapesAgainstFloat64
racecheck ChunkAttention.Small*:ChunkCodes.Small
racecheck MatrixColumns.SmallShapesOfEveryEpilogueAndCount
racecheck QuantisedColumns.AVectorDoesNotDependOnTheOthers
racecheck SegmentAttention*.Small
racecheck DecodeAttention/*.Small
memcheck CudaDecoder.Small:CudaDecoder.AReplayedStepIsTheSameBitsAsLaunches:CudaDuplex.Small
memcheck CudaSessionFork.*:CudaSessionCheckpoint.Expires*
memcheck CudaSessionDraft.KeepsTheBranchThatWasRight:CudaSessionDraft.OfManyRightGuesses
memcheck ChunkAttention.FewTokens:ChunkAttention.Small*:*Codes.Small
memcheck MatrixColumns.*
memcheck QuantisedColumns.InputsOfAnySize:QuantisedColumns.AVector*:QuantisedColumns.WideVectors
memcheck QuantisedVector.*:MatrixVector.*
memcheck *Attention*.Small:DecodeIdle.*:DecodeFull.*
END
}

sanitize() {
  [ -x "$tests" ] || return 127
  sanitizer_cases > "$out/cases"
  # shellcheck disable=SC2016
  tests=$tests out=$out limit=$limit xargs -P "$(getconf _NPROCESSORS_ONLN)" -d '\n' -n 1 sh -c '
    tool=${1%% *}
    filter=${1#* }
    log=$out/$(printf %s "$1" | tr -c "A-Za-z0-9" _).log
    timeout -s INT -k 5 "$limit" compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$tests" --gtest_filter="$filter" > "$log" 2>&1
    status=$?
    printf "sluice: %s: exit %s, %s tests passed, %s\n" "$1" "$status" \
      "$(grep -c "^\[       OK" "$log")" "$(grep "SUMMARY" "$log" | tail -1)" >&2
    exit "$status"' sh < "$out/cases"
  status=$?
  rm -f "$out/cases"
  return "$status"
}

few_weights='--weights bf16 --weights q8_0 --weights q4_0'
weights="$few_weights --weights q6_k --weights q4_1 --weights q4_k"
decoder=$bench/cuda_decoder_bench
budget=$((limit * 3 / 4)) # what has begun by then ends within the limit
for part in $parts; do
  say "=== $part ==="
  begin=$(date +%s)
  # The types of weights are several words.
  # shellcheck disable=SC2086
  case $part in
    check) check ;;
    sanitize) sanitize ;;
    attention) rows decode_attention_cuda.jsonl "$bench/cuda_decode_attention_bench" ;;
    segments) rows segment_cuda.jsonl "$bench/cuda_segment_attention_bench" --case segments ;;
    prefill) rows segment_cuda.jsonl "$bench/cuda_segment_attention_bench" --case prefill ;;
    columns) rows matrix_columns_cuda.jsonl "$bench/cuda_matrix_columns_bench" ;;
    duplex) rows segment_cuda.jsonl "$bench/cuda_duplex_bench" ;;
    steps) rows decoder_cuda.jsonl "$decoder" --case step $weights ;;
    sessions) rows decoder_cuda.jsonl "$decoder" --case sessions $few_weights ;;
    chunks) rows decoder_cuda.jsonl "$decoder" --case chunks $few_weights ;;
    reading) rows decoder_cuda.jsonl "$decoder" --case prefill $few_weights ;;
    endless) rows decoder_cuda.jsonl "$decoder" --case endless ;;
    context)
      rows session_cuda.jsonl "$bench/context_bench_cuda" checkpoint draft threads=1 &&
        rows session_cuda.jsonl "$bench/context_bench_cuda" checkpoint draft big=1 threads=1
      ;;
    watch) rows watch_cuda.jsonl "$bench/cuda_watch_bench" --seconds 60 ;;
    model)
      timeout "$limit" "$tests" --gtest_filter='RealModel.*' > "$out/model.log" 2>&1
      status=$?
      cat "$out/model.log" >&2
      (exit "$status")
      ;;
    torch) rows decode_attention_cuda.jsonl python3 "$scripts/decode_attention_torch.py" ;;
    flex) rows segment_cuda.jsonl python3 "$scripts/prefill_attention_torch.py" ;;
    flashinfer)
      rows decode_attention_cuda.jsonl python3 "$scripts/decode_attention_flashinfer.py"
      ;;
    whole)
      rows decoder_peers_cuda.jsonl python3 "$scripts/decoder_step_torch.py" --sluice "$decoder" \
        --budget "$budget"
      ;;
    recompute)
      rows recompute_cuda.jsonl python3 "$scripts/recompute_torch.py" --sluice "$decoder" \
        --budget "$budget"
      ;;
    llama)
      rows decoder_peers_cuda.jsonl python3 "$scripts/decoder_llama_cpp.py" --sluice "$decoder" \
        --llama-bench "$llama_bench" --budget "$budget"
      ;;
  esac
  note "$part" $? "$begin"
done

say "summary:$summary
  rows and logs: $out"
exit "$failed"
