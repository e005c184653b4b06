#!/bin/sh
# SPDX-License-Identifier: MIT

usage() {
  cat <<'END'
usage: sh cmake/test_arm.sh [GOOGLETEST ARGUMENT...]

Builds the kernels' tests for 64-bit Arm with Debian's cross compiler and runs them under qemu: the
portable vectors, which are NEON registers there. Missing packages are installed with apt (through
sudo if need be). No part of cmake/test.sh: emulated tests take tens of minutes.

  sh cmake/test_arm.sh --gtest_filter='Simd*:Linear*'     # vectors and products alone

The build folder is build-arm; the programs in it are static and run on an Arm machine, too.
END
}

set -eu
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname -- "$0")/lib.sh"
cd "$sluice_root"

case ${1:-} in
  --help | -h)
    usage
    exit 0
    ;;
esac

need_packages cmake ninja-build libeigen3-dev googletest g++-aarch64-linux-gnu qemu-user

# cross_configure SOURCE BUILD [ARGUMENT...]
cross_configure() {
  arm_source=$1
  arm_build=$2
  shift 2
  CMAKE_GENERATOR="${CMAKE_GENERATOR:-Ninja}" cmake -S "$arm_source" -B "$arm_build" \
    -D CMAKE_SYSTEM_NAME=Linux -D CMAKE_SYSTEM_PROCESSOR=aarch64 \
    -D CMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
    -D CMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64 -D CMAKE_EXE_LINKER_FLAGS=-static \
    -D CMAKE_BUILD_TYPE=Release "$@"
}

jobs=$(build_jobs)
google_test=$sluice_root/build-arm/google_test

cross_configure /usr/src/googletest build-arm/google_test_build -D BUILD_GMOCK=OFF \
  -D CMAKE_C_COMPILER=aarch64-linux-gnu-gcc -D CMAKE_INSTALL_PREFIX="$google_test"
cmake --build build-arm/google_test_build --parallel "$jobs" --target install

cross_configure . build-arm/sluice -D GTest_ROOT="$google_test" -D SLUICE_NATIVE=OFF \
  -D SLUICE_IO=OFF -D SLUICE_AUDIO=OFF -D SLUICE_CUDA=OFF -D SLUICE_BENCH=OFF \
  -D SLUICE_EXAMPLES=OFF -D SLUICE_TESTS=ON -D SLUICE_WERROR=ON
cmake --build build-arm/sluice --parallel "$jobs" --target sluice_kernel_tests

failed=''
for program in build-arm/sluice/tests/sluice_test_*; do
  [ -x "$program" ] || continue
  say "=== ${program##*/} ==="
  qemu-aarch64 "$program" "$@" || failed="$failed ${program##*/}"
done
[ -z "$failed" ] || die "failed on Arm:$failed"
say 'the tests of the kernels pass on Arm'
