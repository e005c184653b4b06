#!/bin/sh
# SPDX-License-Identifier: MIT

usage() {
  cat <<'END'
usage: sh cmake/test.sh [--quick]

Builds sluice and runs every test, on a fresh Debian 12 too: missing packages are installed with
apt (through sudo if need be), and the default model is fetched into the user's cache.

  1. release    everything but the fuzzers: tests, consumers, benchmarks, examples; -O3
                -march=native, what has no part in the speed with less
  2. portable   the kernels' tests without -march=native, and under each instruction set of a
                program that holds several
  3. sanitizers the tests and fuzzers under AddressSanitizer and UndefinedBehaviorSanitizer
  4. threads    the tests that share data between threads under ThreadSanitizer

  --quick   only step 1, with the fuzzers
  --help    this text

SLUICE_MODEL=FILE      use this model file instead of fetching one
SLUICE_NO_DOWNLOAD=1   fetch nothing: tests with the real model are skipped where it is absent

The build folders are build, build-portable, build-asan and build-tsan.
END
}

set -eu
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname -- "$0")/lib.sh"
cd "$sluice_root"

quick=0
for argument in "$@"; do
  case $argument in
    --quick) quick=1 ;;
    --help | -h)
      usage
      exit 0
      ;;
    *)
      say "unknown argument '$argument'"
      usage >&2
      exit 2
      ;;
  esac
done

# shellcheck disable=SC2086
need_packages $test_packages

if [ -n "${SLUICE_MODEL:-}" ]; then
  model_note=$SLUICE_MODEL
elif SLUICE_MODEL=$(sh cmake/get_model.sh); then
  export SLUICE_MODEL
  model_note=$SLUICE_MODEL
else
  unset SLUICE_MODEL
  model_note='absent: the tests with the real model were skipped'
fi

# The model's tests compare numbers that a sanitizer does not change, and would take minutes under it.
without_model() {
  with_fixed_addresses env -u SLUICE_MODEL XDG_CACHE_HOME="$sluice_root/build/no-cache" "$@"
}

# ThreadSanitizer of GCC 12 cannot start where the kernel spreads addresses widely.
with_fixed_addresses() {
  machine=$(uname -m)
  if setarch "$machine" -R true 2>/dev/null; then
    setarch "$machine" -R "$@"
  else
    "$@"
  fi
}

jobs=$(build_jobs)

# part NAME COMMAND...: one part of a stage; its time, and whether it failed, go into the summary.
part() {
  part_name=$1
  part_begin=$(date +%s)
  shift
  if "$@"; then
    parts="$parts, $part_name $(($(date +%s) - part_begin)) s"
  else
    parts="$parts, $part_name FAILED"
    return 1
  fi
}

# Several files of tests are one translation unit: what they share is compiled once for all of them.
# In `portable` each is one, so that an include that a test forgets is missed there.
in_units='-DSLUICE_TEST_UNIT_FILES=8'

# The sanitizers run the fuzzers: beside them, a release build would add nothing.
release() {
  fuzzers=OFF
  [ "$quick" -eq 0 ] || fuzzers=ON
  part configure configure release -D SLUICE_IO=ON -D SLUICE_AUDIO=ON -D SLUICE_TESTS=ON \
    -D SLUICE_BENCH=ON -D SLUICE_EXAMPLES=ON -D SLUICE_WERROR=ON -D SLUICE_FUZZERS=$fuzzers \
    "$in_units" &&
    part build build release &&
    part tests ctest --preset release --parallel "$jobs"
}

portable() {
  part configure configure portable -D SLUICE_IO=ON -D SLUICE_AUDIO=ON -D SLUICE_TESTS=ON \
    -D SLUICE_BENCH=OFF -D SLUICE_EXAMPLES=OFF -D SLUICE_WERROR=ON &&
    part build build portable sluice_kernel_tests &&
    part tests ctest --preset portable --parallel "$jobs" --label-regex '^kernels$'
}

sanitizers() {
  part configure configure asan -D SLUICE_IO=ON -D SLUICE_AUDIO=ON -D SLUICE_TESTS=ON "$in_units" &&
    part build build asan &&
    part tests without_model env UBSAN_OPTIONS=print_stacktrace=1 \
      ctest --preset asan --parallel "$jobs"
}

threads() {
  part configure configure tsan -D SLUICE_IO=ON -D SLUICE_AUDIO=ON -D SLUICE_TESTS=ON "$in_units" &&
    part build build tsan &&
    part tests without_model ctest --preset tsan --parallel "$jobs"
}

summary=''
failed=0

# stage NAME: runs the function NAME unless an earlier stage failed, and notes how it went.
stage() {
  if [ "$failed" -ne 0 ]; then
    summary="$summary
  $1: not run"
    return 0
  fi
  say "=== $1 ==="
  begin=$(date +%s)
  parts=''
  if "$1"; then
    result=passed
  else
    result=FAILED
    failed=1
  fi
  summary="$summary
  $1: $result ($(($(date +%s) - begin)) s:${parts#,})"
}

stage release
if [ "$quick" -eq 0 ]; then
  stage portable
  stage sanitizers
  stage threads
fi

printf '\nsluice tests:%s\n  model: %s\n' "$summary" "$model_note"
[ "$failed" -eq 0 ] || printf '  what failed is told above this summary\n'
exit "$failed"
