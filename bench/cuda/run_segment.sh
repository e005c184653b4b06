#!/bin/sh
# SPDX-License-Identifier: MIT
# Checks segment attention, chunk attention and duplex on a GPU, then times them.
#
# usage: run_segment.sh FOLDER OUT [check] [segments] [prefill] [duplex] [torch] [sanitize] [sass]
#   FOLDER  holds the executables: *_test, segment_attention_bench, duplex_bench; and this folder's
#           prefill_attention_torch.py
#   OUT     takes logs and segment_cuda.jsonl
# Without a list of parts all of them run. Timings are skipped after a failed check unless
# SLUICE_TIME_ANYWAY is set.
set -u
folder=$1
out=$2
shift 2
parts=${*:-sass check sanitize prefill segments duplex torch}
wants() { case " $parts " in *" $1 "*) true ;; *) false ;; esac; }
mkdir -p "$out"
failed=0
cublas=$(find /usr/local/cuda/lib64 /usr/local/cuda/targets /opt /usr/lib -name 'libcublasLt.so.13' \
  -printf '%h\n' 2>/dev/null | head -1)
export LD_LIBRARY_PATH="$cublas:${LD_LIBRARY_PATH:-}"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader

if wants sass; then
  for name in decoder_test segment_attention_test; do
    (timeout 100 cuobjdump -arch sm_90a -sass "$folder/$name" 2>&1 | gzip > "$out/$name.sass.gz") &
  done
fi
if wants check; then
  shards=4
  running=
  for test in segment_attention_test segment_attention_codes_test decoder_test duplex_test; do
    shard=0
    while [ $shard -lt $shards ]; do
      GTEST_TOTAL_SHARDS=$shards GTEST_SHARD_INDEX=$shard timeout 70 "$folder/$test" \
        > "$out/$test.$shard.log" 2>&1 &
      running="$running $!:$test.$shard"
      shard=$((shard + 1))
    done
  done
  for one in $running; do
    if ! wait "${one%%:*}"; then
      failed=1
      echo "FAILED ${one#*:}"
      grep -v '^\[ *\(RUN\|OK\)' "$out/${one#*:}.log" | head -30
    fi
  done
  cat "$out"/*_test.*.log > "$out/checks.log"
  rm -f "$out"/*_test.*.log
  grep -c '^\[ *OK' "$out/checks.log" | sed 's/^/tests passed: /'
fi
if wants sanitize; then
  for test in segment_attention_test segment_attention_codes_test; do
    timeout 60 compute-sanitizer --tool memcheck --error-exitcode 9 "$folder/$test" \
      --gtest_filter='*Small*' > "$out/$test.memcheck.log" 2>&1 || failed=1
    tail -2 "$out/$test.memcheck.log"
  done
fi
if [ $failed -ne 0 ] && [ -z "${SLUICE_TIME_ANYWAY:-}" ]; then
  exit 1
fi
rows="$out/segment_cuda.jsonl"
: > "$rows"
if wants prefill; then
  timeout 40 "$folder/segment_attention_bench" --case prefill | tee -a "$rows"
fi
if wants segments; then
  timeout 60 "$folder/segment_attention_bench" --case segments | tee -a "$rows"
fi
if wants duplex; then
  timeout 60 "$folder/duplex_bench" | tee -a "$rows"
fi
if wants torch; then
  timeout 90 python3 "$folder/prefill_attention_torch.py" 2> "$out/torch.log" | tee -a "$rows"
fi
wait
exit $failed
