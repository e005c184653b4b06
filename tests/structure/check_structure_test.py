#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Breaks each rule of check_structure.py once: a check that cannot fail checks nothing."""

import pathlib
import re
import tempfile
import unittest

import check_structure

IO_HEADERS = re.compile(r"/sluice/(io/.*|model/load[^/]*)\.hpp$")

SOUND = {
    "sluice.hpp": ["sluice/core/config.hpp", "sluice/core/view.hpp", "sluice/attention/attend.hpp"],
    "core/config.hpp": [],
    "core/view.hpp": ["cstdint"],
    "attention/attend.hpp": ["sluice/core/view.hpp", "sluice/backend/cpu/attend.hpp"],
    "backend/cpu/attend.hpp": ["Eigen/Core", "sluice/core/config.hpp"],
    "io/gguf.hpp": ["sluice/core/view.hpp"],
    "model/load.hpp": ["sluice/io/gguf.hpp", "sluice/attention/attend.hpp"],
}


class StructureTest(unittest.TestCase):
    def breaches(self, changes=None, code=None):
        """What the check says of SOUND with other include lists, and with code in some headers."""
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            for name, includes in {**SOUND, **(changes or {})}.items():
                path = root / "sluice" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                lines = ["// SPDX-License-Identifier: MIT", "#pragma once"]
                lines += [f"#include <{include}>" for include in includes]
                lines += [(code or {}).get(name, "")]
                path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            return check_structure.check(root, IO_HEADERS)[1]

    def assert_breach(self, expected, **broken):
        breaches = self.breaches(**broken)
        self.assertTrue(any(expected in breach for breach in breaches), breaches)

    def test_a_sound_tree_passes(self):
        self.assertEqual(self.breaches(), [])

    def test_includes_point_one_way(self):
        self.assert_breach(
            "core must not include sluice/attention/attend.hpp",
            changes={"core/view.hpp": ["sluice/attention/attend.hpp"]},
        )
        self.assert_breach(
            "io must not include sluice/attention/attend.hpp",
            changes={"io/gguf.hpp": ["sluice/attention/attend.hpp"]},
        )
        self.assert_breach(
            "backend/cpu must not include sluice/model/load.hpp",
            changes={"backend/cpu/attend.hpp": ["sluice/model/load.hpp"]},
        )

    def test_only_the_host_side_of_cuda_stands_on_top(self):
        reached = ["sluice/model/load.hpp"]
        self.assert_breach(
            "backend/cuda must not include sluice/model/load.hpp",
            changes={"backend/cuda/session.cuh": reached},
        )
        host = {"model/plan.hpp": [], "backend/cuda/session.hpp": ["sluice/model/plan.hpp"]}
        self.assertEqual(
            self.breaches(changes={"sluice.hpp": [*SOUND["sluice.hpp"], "sluice/model/plan.hpp"], **host}),
            [],
        )
        self.assert_breach(
            "attention must not include sluice/backend/cuda/session.hpp",
            changes={**host, "attention/attend.hpp": ["sluice/backend/cuda/session.hpp"]},
        )

    def test_a_backend_is_no_way_up(self):
        self.assert_breach(
            "attention reaches up to sluice/nn/norm.hpp",
            changes={"nn/norm.hpp": [], "backend/cpu/attend.hpp": ["sluice/nn/norm.hpp"]},
        )

    def test_circles(self):
        self.assert_breach(
            "in a circle",
            changes={"core/a.hpp": ["sluice/core/b.hpp"], "core/b.hpp": ["sluice/core/a.hpp"]},
        )
        backend = SOUND["backend/cpu/attend.hpp"] + ["sluice/attention/attend.hpp"]
        self.assertEqual(self.breaches(changes={"backend/cpu/attend.hpp": backend}), [])

    def test_missing_headers(self):
        self.assert_breach(
            "does not exist", changes={"core/view.hpp": ["sluice/core/gone.hpp"]}
        )

    def test_io_stays_optional(self):
        stream = {"stream/text.hpp": ["sluice/model/load.hpp"]}
        self.assert_breach("is not a header of sluice::io", changes=stream)
        umbrella = {"sluice.hpp": SOUND["sluice.hpp"] + ["sluice/model/load.hpp"]}
        self.assert_breach("sluice/sluice.hpp: reaches sluice/io/gguf.hpp", changes=umbrella)

    def test_the_umbrella_is_complete(self):
        self.assert_breach("does not list sluice/nn/norm.hpp", changes={"nn/norm.hpp": []})
        self.assert_breach(
            "does not reach sluice/backend/cpu/norm.hpp", changes={"backend/cpu/norm.hpp": []}
        )
        self.assert_breach(
            "first include must be", changes={"sluice.hpp": SOUND["sluice.hpp"][::-1]}
        )

    def test_nvcc_is_kept_out(self):
        self.assert_breach("reaches Eigen but not", changes={"backend/cpu/attend.hpp": ["Eigen/Core"]})
        self.assert_breach(
            "must not be compiled by nvcc",
            changes={"backend/cuda/attend.cuh": ["Eigen/Core", "sluice/core/config.hpp"]},
        )
        for code in ("cudaStream_t stream;", "#ifdef __CUDA_ARCH__\n#endif"):
            self.assert_breach("names CUDA", code={"core/view.hpp": code})
        self.assertEqual(self.breaches(code={"core/config.hpp": "#ifdef __CUDACC__\n#endif"}), [])

    def test_a_silent_library(self):
        for code in (
            'inline void f() { std::printf("x"); }',
            'inline void f() { fprintf(stderr, "x"); }',
            'inline void f() { std::cerr << "x"; }',
            "#include <iostream>",
            'inline void f() { puts ("x"); }',
        ):
            self.assert_breach("the library is silent", code={"core/view.hpp": code})
        for code in ("inline void f() { std::exit(1); }", "inline void f() { std::abort(); }"):
            self.assert_breach("ends the program", code={"core/view.hpp": code})
        self.assert_breach("using namespace", code={"core/view.hpp": "using namespace std;"})
        self.assert_breach("static at", code={"core/view.hpp": "static int state = 0;"})

    def test_words_in_comments_and_strings_are_free(self):
        code = (
            "// printf( and cuda\n/* std::cout\n exit( */\n"
            'inline const char* kText = "cudaMalloc exit(1) // \\" printf(";\n'
            'inline const char* kRaw = R"x(std::cerr ")x";\n'
            "inline constexpr int kBig = 1'000'000; static_assert(kBig > 0);\n"
            "inline void f(char* to) { std::snprintf(to, 1, \"\"); on_exit_event(); }"
        )
        self.assertEqual(self.breaches(code={"core/view.hpp": code}), [])

    def test_first_lines(self):
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            (root / "sluice").mkdir()
            (root / "sluice" / "sluice.hpp").write_text("int x;\n", encoding="utf-8")
            breaches = "\n".join(check_structure.check(root, IO_HEADERS)[1])
        self.assertIn("SPDX", breaches)
        self.assertIn("#pragma once", breaches)


if __name__ == "__main__":
    unittest.main()
