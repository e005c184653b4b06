#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Checks that every C++ sample of README.md stands, line for line, in a program that is compiled,
and that every file that a page (*.md) links to exists.

    python3 tests/structure/check_readme.py [REPOSITORY]
"""

import pathlib
import re
import sys


def main():
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    text = (root / "README.md").read_text(encoding="utf-8")
    programs = {path: path.read_text(encoding="utf-8")
                for path in sorted((root / "examples").rglob("*.cpp"))}
    faults = []
    samples = re.findall(r"^```cpp\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    if not samples:
        faults.append("README.md has no C++ sample")
    for sample in samples:
        if not any(sample in program for program in programs.values()):
            faults.append("a sample of README.md is in no program under examples/:\n" + sample)
    pages = [root / "README.md"] + sorted(
        page for folder in ("bench", "cmake", "examples", "include", "tests")
        for page in (root / folder).rglob("*.md"))
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            if not (page.parent / target).exists():
                faults.append(f"{page.relative_to(root)} links to {target}, which does not exist")
    for fault in faults:
        print(fault, file=sys.stderr)
    if not faults:
        print(f"{len(samples)} samples are compiled, the links of {len(pages)} pages exist")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
