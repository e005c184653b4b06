#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Extracts Jane Austen's six novels (public domain) as plain text, for long-stream benchmarks.

    python3 bench/austen.py --output DIR [--package FILE.deb]

The text comes from Debian's package r-cran-janeaustenr. Without --package it is downloaded with
`apt-get download` into a temporary folder; nothing is installed and R is not needed. One file
NAME.txt per novel is written, UTF-8, with the package's own line breaks (lines of about 70
characters, an empty line between paragraphs), ending in one newline. Sizes and SHA-256 sums are
printed; a sum that differs from the recorded one (package version 1.0.0-1) gives a warning on
stderr, because perplexities are then not comparable with recorded ones. Standard library only.

The package holds an R "lazy-load" database: Rdata.rdx is an index (gzip, R serialisation) of
{name: (offset, length)} into Rdata.rdb, where each chunk is a 4-byte big-endian length of the
plain data followed by a zlib stream; plain data is R's binary XDR serialisation.

Exit status: 0 written (warnings possible), 1 failed (the reason on stderr), 2 wrong usage.
"""

import argparse
import gzip
import hashlib
import pathlib
import struct
import subprocess
import sys
import tempfile
import zlib

PACKAGE = "r-cran-janeaustenr"
DATA_FOLDER = "usr/lib/R/site-library/janeaustenr/data"

# SHA-256 of the written files with package version 1.0.0-1 (Debian 12).
EXPECTED_SHA256 = {
    "emma": "7c67b5985c6d0de1efaeb5d342d52cb82c38083c40e2295129e30e87ee690ebe",
    "mansfieldpark": "98bc90519cdf4ef663ad7de2734bb529435ef24f7abbde6bb1a50898871dafe9",
    "northangerabbey": "51f91bbe0517db8e65cff009b097ce0a1836124c4e0532ac19e6c0cad982abed",
    "persuasion": "8061549557aebd2fd6e353d18d9197cb707029112bd52d4d8b174583a925848a",
    "prideprejudice": "dfc684d4f857fa938268f9ab9c5567b64bd0691251eca959644adeabe6287a4d",
    "sensesensibility": "105e1651fe93bed7130078578efd31e0c557d68667ba672ddc876f735b30fe09",
}

MAX_OBJECT_BYTES = 64 << 20  # a novel is below 1 MB; a larger claim is a damaged file


class AustenError(Exception):
    """Anything that stops the extraction."""


class PackageError(AustenError):
    """The package could not be had or unpacked."""


class FormatError(AustenError):
    """A file of the package is not what its type promises."""


class XdrReader:
    """Reads what the novels and their index need of R's binary XDR serialisation.

    Vectors become lists (with None for NA in character and integer vectors), pair lists become
    dicts by tag. A vector's `names` attribute turns it into a dict. Other R types are refused.
    """

    SYMBOL, PAIRLIST, CHARACTER, LOGICAL, INTEGER, REAL = 1, 2, 9, 10, 13, 14
    STRINGS, LIST, NULL, REFERENCE = 16, 19, 254, 255
    HAS_ATTRIBUTES, HAS_TAG = 0x200, 0x400
    LATIN1 = 0x4  # encoding mark of a string; otherwise ASCII or UTF-8
    MAX_DEPTH = 32

    def __init__(self, data, where):
        self.data = data
        self.where = where
        self.at = 0
        self.references = []

    def fail(self, what):
        raise FormatError(f"{self.where}: at byte {self.at}: {what}")

    def take(self, count):
        if count < 0 or count > len(self.data) - self.at:
            self.fail(f"{count} bytes expected, {len(self.data) - self.at} left")
        piece = self.data[self.at : self.at + count]
        self.at += count
        return piece

    def integer(self):
        return struct.unpack(">i", self.take(4))[0]

    def length(self, item_bytes):
        count = self.integer()
        if count < 0 or count * item_bytes > len(self.data) - self.at:
            self.fail(f"a vector of {count} items in the {len(self.data) - self.at} bytes left")
        return count

    def read(self):
        if self.take(2) != b"X\n":
            self.fail("not R's binary XDR serialisation (should begin with 'X' and a newline)")
        version = self.integer()
        if version not in (2, 3):
            self.fail(f"serialisation version {version}, expected 2 or 3")
        self.take(8)  # the writing R's version, the oldest R that can read it
        if version == 3:
            self.take(self.length(1))  # name of the native encoding
        value = self.item(0)
        if self.at != len(self.data):
            self.fail(f"{len(self.data) - self.at} bytes after the end")
        return value

    def item(self, depth):
        if depth > self.MAX_DEPTH:
            self.fail("nested too deeply")
        flags = self.integer()
        kind, levels = flags & 0xFF, (flags >> 12) & 0xFFFF
        if kind == self.NULL:
            return None
        if kind == self.CHARACTER:
            return self.characters(levels)
        if kind == self.SYMBOL:
            name = self.item(depth + 1)
            if not isinstance(name, str):
                self.fail("a symbol without a name")
            self.references.append(name)
            return name
        if kind == self.REFERENCE:
            index = (flags >> 8) or self.integer()
            if not 1 <= index <= len(self.references):
                self.fail(f"reference {index} of {len(self.references)}")
            return self.references[index - 1]
        if kind == self.PAIRLIST:
            return self.pairlist(flags, depth)
        if kind in (self.LOGICAL, self.INTEGER):
            count = self.length(4)
            values = struct.unpack(f">{count}i", self.take(4 * count))
            value = [None if v == -(1 << 31) else v for v in values]
        elif kind == self.REAL:
            count = self.length(8)
            value = list(struct.unpack(f">{count}d", self.take(8 * count)))
        elif kind in (self.STRINGS, self.LIST):
            value = [self.item(depth + 1) for _ in range(self.length(4))]
        else:
            self.fail(f"R type {kind} is not supported")
        attributes = self.item(depth + 1) if flags & self.HAS_ATTRIBUTES else {}
        names = attributes.get("names") if isinstance(attributes, dict) else None
        if names is None:
            return value
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            self.fail("names are not a character vector")
        if len(names) != len(value):
            self.fail(f"{len(names)} names for {len(value)} items")
        return dict(zip(names, value))

    def pairlist(self, flags, depth):
        pairs = {}
        while True:
            if flags & self.HAS_ATTRIBUTES:
                self.item(depth + 1)
            tag = self.item(depth + 1) if flags & self.HAS_TAG else len(pairs)
            if not isinstance(tag, str | int):
                self.fail("a tag of a pair list is not a symbol")
            pairs[tag] = self.item(depth + 1)
            flags = self.integer()
            if flags & 0xFF == self.NULL:
                return pairs
            if flags & 0xFF != self.PAIRLIST:
                self.fail(f"R type {flags & 0xFF} inside a pair list")

    def characters(self, levels):
        count = self.integer()
        if count == -1:
            return None
        raw = self.take(count)
        encoding = "latin-1" if levels & self.LATIN1 else "utf-8"
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError as error:
            self.fail(f"a string is not valid {encoding}: {error}")


def inflate(raw, where, opener):
    """Decompresses `raw` with `opener`, turning every damage into a FormatError."""
    try:
        return opener(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise FormatError(f"{where}: damaged compressed data: {error}") from error


def read_database(folder):
    """All objects of the lazy-load database Rdata.{rdx,rdb} in `folder`, by name."""
    index_path, data_path = folder / "Rdata.rdx", folder / "Rdata.rdb"
    try:
        index_bytes, data = index_path.read_bytes(), data_path.read_bytes()
    except OSError as error:
        raise PackageError(f"{error.filename}: {error.strerror}; is this {PACKAGE}?") from error
    index = XdrReader(inflate(index_bytes, index_path, gzip.decompress), index_path).read()
    if not isinstance(index, dict) or not isinstance(index.get("variables"), dict):
        raise FormatError(f"{index_path}: field 'variables': expected a named list")
    if index.get("compressed") != [1]:
        found = index.get("compressed")
        raise FormatError(f"{index_path}: field 'compressed': expected 1 (zlib), found {found}")
    objects = {}
    for name, span in index["variables"].items():
        where = f"{data_path}: object '{name}'"
        if not (isinstance(span, list) and [type(v) for v in span] == [int, int]):
            raise FormatError(f"{where}: expected (offset, length), found {span}")
        offset, length = span
        if offset < 0 or length < 4 or offset + length > len(data):
            raise FormatError(f"{where}: bytes {offset} + {length} of a file of {len(data)}")
        chunk = data[offset : offset + length]
        plain_length = struct.unpack(">I", chunk[:4])[0]
        if plain_length > MAX_OBJECT_BYTES:
            raise FormatError(f"{where}: {plain_length} bytes, at most {MAX_OBJECT_BYTES} expected")
        # One byte more than promised is enough to see that the promise is broken.
        limit = plain_length + 1
        plain = inflate(chunk[4:], where, lambda raw: zlib.decompressobj().decompress(raw, limit))
        if len(plain) != plain_length:
            raise FormatError(f"{where}: expected {plain_length} bytes, found {len(plain)}")
        objects[name] = XdrReader(plain, where).read()
    return objects


def run(command, folder):
    """Runs a system command; its failure is a PackageError that carries what it said."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        raise PackageError(f"{command[0]}: {error.strerror}; is this Debian?") from error
    if done.returncode != 0:
        hint = "; run 'apt-get update' first?" if command[0] == "apt-get" else ""
        raise PackageError(f"'{' '.join(command)}' failed{hint}\n{done.stderr.strip()}")


def novels(package, folder):
    """{name: text} of the novels in the .deb `package` (None: download it into `folder`)."""
    if package is None:
        run(["apt-get", "download", PACKAGE], folder)
        found = sorted(folder.glob(f"{PACKAGE}_*.deb"))
        if not found:
            raise PackageError(f"apt-get download {PACKAGE} left no file")
        package = found[-1]
    elif not package.is_file():
        raise PackageError(f"{package}: no such file")
    run(["dpkg-deb", "-x", str(package.resolve()), "unpacked"], folder)
    texts = {}
    for name, lines in read_database(folder / "unpacked" / DATA_FOLDER).items():
        if not isinstance(lines, list) or not all(isinstance(line, str | None) for line in lines):
            raise FormatError(f"object '{name}': expected a character vector")
        if not name.isidentifier():  # it becomes a file name
            raise FormatError(f"object '{name}': not a plain name")
        texts[name] = "\n".join(line or "" for line in lines) + "\n"
    return texts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--output", type=pathlib.Path, required=True, metavar="DIR",
                        help="folder for the .txt files, made if missing")
    parser.add_argument("--package", type=pathlib.Path, metavar="FILE.deb",
                        help=f"a copy of {PACKAGE} (default: apt-get download)")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="sluice-austen-") as folder:
            texts = novels(options.package, pathlib.Path(folder))
        options.output.mkdir(parents=True, exist_ok=True)
        for name, text in sorted(texts.items()):
            raw = text.encode("utf-8")
            (options.output / f"{name}.txt").write_bytes(raw)
            digest = hashlib.sha256(raw).hexdigest()
            print(f"{name}.txt  {len(raw)} bytes  {text.count(chr(10))} lines  sha256 {digest}")
            if digest != EXPECTED_SHA256.get(name):
                expected = EXPECTED_SHA256.get(name, "none recorded")
                print(f"austen: warning: {name}.txt differs from the recorded text "
                      f"(expected sha256 {expected}, found {digest}): "
                      "perplexities on it are not comparable with recorded ones", file=sys.stderr)
        for name in sorted(EXPECTED_SHA256.keys() - texts.keys()):
            print(f"austen: warning: the package has no '{name}'", file=sys.stderr)
    except (AustenError, OSError) as error:
        print(f"austen: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
