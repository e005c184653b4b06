# SPDX-License-Identifier: MIT
"""Word error rate, average lagging (AL) and length-adaptive average lagging (LAAL)."""

from __future__ import annotations


def word_errors(reference: list[str], hypothesis: list[str]) -> int:
    row = list(range(len(hypothesis) + 1))
    for i, word in enumerate(reference, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(hypothesis, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


def lagging(delays: list[float], source: float, reference: int) -> tuple[float, float]:
    """AL and LAAL of delays d_i (source read when word i was written), source length X in the same unit, reference length in words."""
    if not delays:
        raise ValueError("no words")
    if delays[0] > source:
        return delays[0], delays[0]

    def mean(length: int) -> float:
        gamma, total, count = length / source, 0.0, 0
        for i, delay in enumerate(delays):
            total, count = total + delay - i / gamma, count + 1
            if delay >= source:
                break
        return total / count

    return mean(reference), mean(max(reference, len(delays)))
