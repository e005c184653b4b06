# SPDX-License-Identifier: MIT
# shellcheck shell=sh
#
# What test.sh, demo.sh and get_model.sh share. POSIX sh; read with `.` from a script in cmake/.
# POSIX sh has no local variables: those of functions here begin with lib_.

# Used by the scripts that read this file.
# shellcheck disable=SC2034
sluice_root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

# Reports go to stderr: stdout belongs to what a script was asked for.
say() {
  printf 'sluice: %s\n' "$*" >&2
}

die() {
  say "$*"
  exit 1
}

# Packages that every build needs, and those of the tests and benchmarks (ffmpeg: videos are read
# through it).
build_packages='g++ cmake ninja-build libeigen3-dev nlohmann-json3-dev libpcre2-dev
  libutf8proc-dev libcli11-dev'
# shellcheck disable=SC2034
test_packages="$build_packages libsndfile1-dev libdnnl-dev libgtest-dev libbenchmark-dev
  python3 ffmpeg"

# need_packages PACKAGE...: installs the Debian packages that are missing, and says which.
need_packages() {
  if ! command -v dpkg-query >/dev/null 2>&1; then
    say "not a Debian system; these must be installed, under whatever name: $*"
    return 0
  fi
  lib_missing=''
  for lib_package in "$@"; do
    lib_state=$(dpkg-query -W -f='${db:Status-Status}' "$lib_package" 2>/dev/null) || lib_state=''
    [ "$lib_state" = installed ] || lib_missing="$lib_missing $lib_package"
  done
  [ -n "$lib_missing" ] || return 0

  lib_as_root=''
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null 2>&1 ||
      die "missing packages; as root, run: apt-get install$lib_missing"
    lib_as_root=sudo
  fi
  say "installing with apt-get:$lib_missing"
  # One name a word, from here on.
  # shellcheck disable=SC2086
  {
    $lib_as_root apt-get update -qq >&2 || say 'apt-get update failed; trying with the lists at hand'
    $lib_as_root env DEBIAN_FRONTEND=noninteractive \
      apt-get install -y -qq --no-install-recommends $lib_missing >&2 ||
      die "apt-get could not install:$lib_missing"
  }
}

# build_jobs: how many compilers to run: one a core, as far as memory goes (2 GB each).
build_jobs() {
  lib_jobs=$(getconf _NPROCESSORS_ONLN 2>/dev/null) || lib_jobs=1
  if [ -r /proc/meminfo ]; then
    lib_by_memory=$(awk '/^MemAvailable:/ { print int($2 / 2000000) }' /proc/meminfo)
    [ "${lib_by_memory:-1}" -ge 1 ] || lib_by_memory=1
    [ "$lib_jobs" -le "$lib_by_memory" ] || lib_jobs=$lib_by_memory
  fi
  printf '%s\n' "$lib_jobs"
}

# configure PRESET [ARGUMENT...]: a new build folder uses Ninja, an old one stays with what it has.
configure() {
  CMAKE_GENERATOR="${CMAKE_GENERATOR:-Ninja}" cmake --preset "$@"
}

# build PRESET [TARGET...]
build() {
  lib_preset=$1
  shift
  if [ "$#" -gt 0 ]; then
    cmake --build --preset "$lib_preset" --parallel "$(build_jobs)" --target "$@"
  else
    cmake --build --preset "$lib_preset" --parallel "$(build_jobs)"
  fi
}
