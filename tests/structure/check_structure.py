#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Holds the headers to the architecture: who may include whom, what no header may do.

usage: check_structure.py [--io-headers REGEX] INCLUDE_FOLDER

Every breach is one line on stdout, "<header>: <rule>"; the exit status is 1 if there is any.
"""

import argparse
import pathlib
import re
import sys

# Dependencies point left: a header reaches only its own topic and the topics before it.
TOPICS = ["core", "position", "cache", "attention", "nn", "model", "stream"]
# What a backend's kernels may use. Topics reach back into backend/cpu from their public headers.
BACKEND_USES = {"core", "position", "cache", "attention", "nn", "backend/cpu"}
UMBRELLA = "sluice/sluice.hpp"
# The one header that asks the compiler what it is, and so may say CUDA.
CONFIG = "sluice/core/config.hpp"

FORBIDDEN = [
    (re.compile(r"\b(?:v?f|v?d|v)?printf\s*\("), "prints: the library is silent"),
    (re.compile(r"\b(?:puts|putchar|perror)\s*\("), "prints: the library is silent"),
    (re.compile(r"\bstd::w?(?:cout|cerr|clog)\b"), "prints: the library is silent"),
    (re.compile(r"#\s*include\s*<iostream>"), "includes <iostream>: the library is silent"),
    (re.compile(r"\b(?:_|_E|quick_)?exit\s*\("), "ends the program: errors are thrown"),
    (re.compile(r"\b(?:abort|terminate)\s*\("), "ends the program: errors are thrown"),
    (re.compile(r"^using namespace\b", re.M), "using namespace in a header"),
    (re.compile(r"^static\s(?!_assert)", re.M), "static at namespace scope: a copy in every unit"),
]

TOKEN = re.compile(
    r'//[^\n]*|/\*.*?\*/|R"(?P<mark>[^()\s\\]{0,16})\(.*?\)(?P=mark)"'
    r"|\"(?:\\.|[^\"\\\n])*\"|(?<![0-9A-Za-z_])'(?:\\.|[^'\\\n])+'",
    re.S,
)
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:<([^>\n]+)>|"([^"\n]+)")', re.M)


def without(text, strings):
    """`text` less its comments, and less what strings hold where `strings` says so."""

    def replace(match):
        token = match.group()
        if token.startswith("/"):
            return " "
        return '""' if strings else token

    return TOKEN.sub(replace, text)


class Header:
    def __init__(self, root, path):
        self.name = path.relative_to(root).as_posix()
        self.text = path.read_text(encoding="utf-8")
        self.includes = [a or b for a, b in INCLUDE.findall(without(self.text, strings=False))]
        self.code = without(self.text, strings=True)
        folders = self.name.split("/")[1:-1]
        self.topic = "/".join(folders[:2] if folders[:1] == ["backend"] else folders[:1])


def reach(headers, name, through_backends=True):
    """Every header of ours that `name` includes, directly or not, and every foreign one."""
    seen, pending = set(), [name]
    while pending:
        header = headers[pending.pop()]
        for included in header.includes:
            if not through_backends and header.topic in TOPICS and "/backend/" in included:
                continue
            if included not in seen:
                seen.add(included)
                if included in headers:
                    pending.append(included)
    return seen


def check_direct(header, headers, breaches):
    for included in header.includes:
        if not included.startswith("sluice/"):
            continue
        if included not in headers:
            breaches.append(f"{header.name}: includes {included}, which does not exist")
            continue
        target = headers[included].topic
        if header.topic == target or included == CONFIG:
            continue
        if header.topic == "":
            allowed = target in TOPICS or target == "backend/cuda"
        elif header.topic == "io":
            allowed = target == "core"
        elif header.topic == "backend/cpu":
            allowed = target in BACKEND_USES
        elif header.topic == "backend/cuda":
            # What the host compiler reads of it stands on top of the topics, as programs do.
            host = header.name.endswith(".hpp")
            allowed = target in (TOPICS if host else BACKEND_USES - {"backend/cpu"})
        elif header.topic == "core":
            allowed = False
        else:
            # Which of these may reach io is checked over the whole reach.
            allowed = target in ("io", "backend/cpu") or (
                target in TOPICS and TOPICS.index(target) < TOPICS.index(header.topic)
            )
        if not allowed:
            where = header.topic or "the umbrella"
            breaches.append(f"{header.name}: {where} must not include {included}")


def check_reach(header, headers, io_headers, breaches):
    reached = reach(headers, header.name)
    ours = {name for name in reached if name in headers}

    # A topic's public header ends by including its fast specialisation, which includes it in turn
    # so as to compile alone. No other circle is meant.
    if header.name in reach(headers, header.name, through_backends=False):
        breaches.append(f"{header.name}: includes itself in a circle")
    if header.topic in TOPICS:
        # Through a backend, too, a topic must not see what stands above it.
        above = TOPICS[TOPICS.index(header.topic) + 1 :]
        for name in sorted(ours):
            if headers[name].topic in above:
                breaches.append(f"{header.name}: {header.topic} reaches up to {name}")

    reaches_io = sorted(name for name in ours if headers[name].topic == "io")
    if reaches_io and not io_headers.search("/" + header.name):
        breaches.append(f"{header.name}: reaches {reaches_io[0]} but is not a header of sluice::io")

    eigen = any(name.startswith(("Eigen/", "unsupported/Eigen/")) for name in reached)
    if eigen and header.name.endswith(".cuh"):
        breaches.append(f"{header.name}: reaches Eigen, which must not be compiled by nvcc")
    if eigen and CONFIG not in reached:
        breaches.append(f"{header.name}: reaches Eigen but not {CONFIG}, which keeps nvcc out")


def check_text(header, breaches):
    if not header.text.startswith("// SPDX-License-Identifier: MIT\n"):
        breaches.append(f"{header.name}: the first line must be the SPDX line")
    if "#pragma once" not in header.text:
        breaches.append(f"{header.name}: no #pragma once")
    for pattern, rule in FORBIDDEN:
        match = pattern.search(header.code)
        if match:
            breaches.append(f"{header.name}: {rule} ({match.group().strip()})")
    cuda_free = header.topic != "backend/cuda" and not header.name.endswith(".cuh")
    if cuda_free and header.name != CONFIG:
        match = re.search(r"\w*cuda\w*", header.code, re.I)
        if match:
            breaches.append(f"{header.name}: names CUDA outside backend/cuda ({match.group()})")


def check_umbrella(headers, io_headers, breaches):
    """It lists every header of a topic that needs Eigen alone, itself rather than by way of others.

    Backend headers are reached through the topics: one that is not is unknown to every user.
    """
    listed = headers[UMBRELLA].includes
    reached = reach(headers, UMBRELLA)
    for name, header in sorted(headers.items()):
        if not name.endswith(".hpp") or io_headers.search("/" + name):
            continue
        if header.topic in TOPICS and "/detail/" not in name and name not in listed:
            breaches.append(f"{UMBRELLA}: does not list {name}")
        if (header.topic == "backend/cpu" or "/detail/" in name) and name not in reached:
            breaches.append(f"{UMBRELLA}: does not reach {name}")
    if listed[:1] != [CONFIG]:
        breaches.append(f"{UMBRELLA}: the first include must be {CONFIG}, which keeps nvcc out")


def check(root, io_headers):
    paths = sorted(p for p in (root / "sluice").rglob("*") if p.suffix in (".hpp", ".cuh"))
    headers = {header.name: header for header in (Header(root, path) for path in paths)}
    breaches = []
    for header in headers.values():
        check_direct(header, headers, breaches)
        check_reach(header, headers, io_headers, breaches)
        check_text(header, breaches)
    if UMBRELLA in headers:
        check_umbrella(headers, io_headers, breaches)
    else:
        breaches.append(f"{UMBRELLA}: is missing")
    return len(headers), breaches


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--io-headers", default=r"/sluice/io/", type=re.compile, metavar="REGEX")
    parser.add_argument("include_folder", type=pathlib.Path)
    arguments = parser.parse_args()

    count, breaches = check(arguments.include_folder, arguments.io_headers)
    for breach in breaches:
        print(breach)
    print(f"{count} headers, {len(breaches)} breaches")
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
