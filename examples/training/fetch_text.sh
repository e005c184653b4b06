#!/bin/sh
# SPDX-License-Identifier: MIT
# Fills a folder with the texts and word lists that prepare_text.py reads. Debian packages are downloaded and unpacked, not installed:
#
#     sh fetch_text.sh FOLDER [PYTHON]
#
# PYTHON (default python3) must have the package wordfreq. Sources and their licences are listed in ../03_listen/MODEL_CARD.md.
set -eu
out=$1
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${2:-python3}
here=$(cd "$(dirname "$0")" && pwd)
rm -rf "$out/packages"
mkdir -p "$out/packages" "$out/unpacked"
(cd "$out/packages" && apt-get download bible-kjv bible-kjv-text fortunes fortunes-min dict-devil wordnet-base wamerican wamerican-large r-cran-janeaustenr)
for file in "$out"/packages/*.deb; do dpkg -x "$file" "$out/unpacked"; done

# The King James Bible, through its reader (which looks for its data next to it)
(cd "$out/unpacked/usr/lib" && ../bin/bible -f gen1:1-rev22:21 </dev/null) | grep -E '^[0-9A-Za-z]+:[0-9]+ ' | sed 's/^[^ ]* *//' >"$out/bible.txt"

python3 "$here/../../bench/austen.py" --output "$out" --package "$out"/packages/r-cran-janeaustenr*.deb
for name in computers cookie definitions education food fortunes humorists kids law linux literature love magic medicine miscellaneous news \
  people pets platitudes politics riddles science songs-poems sports startrek wisdom work; do
  [ -e "$out/unpacked/usr/share/games/fortunes/$name" ] && cp "$out/unpacked/usr/share/games/fortunes/$name" "$out/$name.fortune"
done
zcat -f "$out"/unpacked/usr/share/dictd/devil.dict* 2>/dev/null >"$out/devil.txt" || true
"$python" - "$out" <<'PYTHON'
import glob, re, sys
out = sys.argv[1]
glosses = []
for path in sorted(glob.glob(out + "/unpacked/usr/share/wordnet/data.*")):
    for line in open(path, encoding="latin-1"):
        if "|" in line and not line.startswith(" "):
            glosses += re.sub('"', "", line.split("|", 1)[1]).split(";")
open(out + "/wordnet.txt", "w", encoding="utf-8").write("\n\n".join(gloss.strip() + "." for gloss in glosses))
for name, source in (("american", "american-english"), ("american-large", "american-english-large")):
    text = open(f"{out}/unpacked/usr/share/dict/{source}", encoding="utf-8").read()
    open(f"{out}/{name}.words", "w", encoding="utf-8").write(text)
import wordfreq
with open(out + "/wordfreq.freq", "w", encoding="utf-8") as file:
    for word in wordfreq.top_n_list("en", 40000):
        if re.fullmatch("[a-z]+('[a-z]+)?", word):
            file.write(f"{word}\t{wordfreq.word_frequency(word, 'en')}\n")
PYTHON
rm -r "$out/packages"
wc -c "$out"/*.txt
