#!/bin/sh
# SPDX-License-Identifier: MIT
#
# usage: sh cmake/demo.sh [OPTION...]
#        sh cmake/demo.sh listen [OPTION... | TEXT]
#
# listen: a synthesizer (espeak-ng or flite, if there is one; else a sample that is shipped) speaks TEXT,
# and the listening model writes it down meanwhile. OPTIONs are given to listen; `listen --help`.
#
# Without it:
# Streams text from a real language model on a fresh Debian 12: installs what is missing with apt,
# builds the example, gets the model, runs it. The text is on stdout, everything else on stderr.
# OPTIONs are given to stream_text after the demo's own and win over them; `--help` lists them.
# SLUICE_MODEL=FILE streams that model; SLUICE_NO_DOWNLOAD=1 downloads none.

set -eu
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname -- "$0")/lib.sh"
cd "$sluice_root"

# shellcheck disable=SC2086
need_packages $build_packages

if [ "${1:-}" = listen ]; then
  shift
  {
    configure release
    build release sluice_listen
  } >&2
  listen=build/examples/03_listen/listen
  case ${1:-} in
    --help | -h | --version) exec "$listen" "$@" ;;
  esac
  text='the small red bird sat on the table and nobody moved until it was gone'
  case ${1:--} in
    -*) ;;
    *)
      text=$1
      shift
      ;;
  esac
  spoken=build/examples/spoken.wav
  if command -v espeak-ng >/dev/null 2>&1; then
    say "espeak-ng says: $text"
    espeak-ng -v en-us -s 150 -w "$spoken" -- "$text"
  elif command -v flite >/dev/null 2>&1; then
    say "flite says: $text"
    flite -voice slt -t "$text" -o "$spoken"
  else
    say 'no synthesizer here (apt install espeak-ng): this is the sample that is shipped.'
    spoken=examples/03_listen/sample.wav
  fi
  # The speaker's voice is heard where there is a player and a sound card.
  if command -v aplay >/dev/null 2>&1 && [ -e /dev/snd ]; then aplay -q "$spoken" & fi
  say "$listen --real-time --stats $* $spoken"
  exec "$listen" --real-time --stats "$@" "$spoken"
fi

{
  configure release
  build release sluice_stream_text
} >&2

if [ -n "${SLUICE_MODEL:-}" ]; then
  model=$SLUICE_MODEL
elif ! model=$(sh cmake/get_model.sh); then
  model=build/examples/tiny_model.gguf
  say 'the real model cannot be had here.'
  say 'A tiny model with random weights streams instead: ITS TEXT IS NOISE.'
  build release sluice_make_tiny_model >&2
  build/examples/tiny_model/make_tiny_model "$model" >&2
fi

# The demo: the text outgrows the cache, sinks and window, after some 250 tokens and goes on. Options
# that bring their own input replace the prompt.
prompt=yes
for argument in "$@"; do
  case $argument in
    -f* | --file* | --chat | --conversation | --perplexity* | --load*) prompt=no ;;
  esac
done
[ "$prompt" = no ] || set -- --prompt 'Once upon a time, in a village by the sea,' "$@"
set -- --model "$model" --sinks 4 --window 252 -n 600 --ignore-eos --repeat-penalty 1.15 "$@"

say "build/examples/01_stream_text/stream_text $*"
exec build/examples/01_stream_text/stream_text "$@"
