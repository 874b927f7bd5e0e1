"""Is one system better than another? Welch and paired t-tests, in nats per token.

The Student-t tail is computed with the regularised incomplete beta function, so nothing beyond the
standard library is needed. All tests are one-sided: the claim is that A's loss is lower than B's by
more than a margin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

RECORD_MARGIN_NATS = 0.005  # what a record must beat the one before it by
RECORD_P = 0.01
MAX_SEEDS = 1000


class TestResult(NamedTuple):
    """Outcome of one test; `gain` is mean(B) - mean(A), positive when A is better."""

    gain: float
    standard_error: float
    t: float
    degrees: float
    p: float


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function I_x(a, b) for a, b > 0 and 0 <= x <= 1.

    Source: the continued fraction of Abramowitz and Stegun 26.5.8, evaluated by Lentz's method.
    """
    if not 0.0 <= x <= 1.0:
        raise ValueError(f"x is {x}, outside 0..1")
    if x in (0.0, 1.0):
        return x
    if x > (a + 1.0) / (a + b + 2.0):  # the fraction converges fast on the other side only
        return 1.0 - incomplete_beta(b, a, 1.0 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    log_front += a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) * _beta_fraction(a, b, x) / a


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Value of the continued fraction of I_x(a, b), to a relative 1e-15."""
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1.0)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    value = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1.0 + term * d
            c = 1.0 + term / c
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = c if abs(c) > tiny else tiny
            value *= d * c
        if abs(d * c - 1.0) < 1e-15:
            break
    return value


def student_tail(t: float, degrees: float) -> float:
    """P(T > t) of Student's distribution; `degrees` may be fractional and must be positive."""
    if not degrees > 0:
        raise ValueError(f"degrees of freedom are {degrees}, they must be positive")
    if math.isinf(t):
        return 0.0 if t > 0 else 1.0
    half = 0.5 * incomplete_beta(0.5 * degrees, 0.5, degrees / (degrees + t * t))
    return half if t >= 0 else 1.0 - half


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return math.fsum(values) / len(values)


def variance(values: Sequence[float]) -> float:
    """Unbiased sample variance (n - 1); needs two values."""
    middle = mean(values)
    return math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1)


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation (n - 1)."""
    return math.sqrt(variance(values))


def pooled_deviation(groups: Sequence[Sequence[float]]) -> float | None:
    """Standard deviation within groups of equal spread; None where no group has two values."""
    several = [group for group in groups if len(group) > 1]
    squares = math.fsum((len(group) - 1) * variance(group) for group in several)
    degrees = sum(len(group) - 1 for group in several)
    return math.sqrt(squares / degrees) if degrees else None


def welch(a: Sequence[float], b: Sequence[float], margin: float = 0.0) -> TestResult | None:
    """Welch's test of "A is lower than B by more than `margin`"; None with under two a side."""
    if min(len(a), len(b)) < 2:
        return None
    part_a, part_b = variance(a) / len(a), variance(b) / len(b)
    gain, total = mean(b) - mean(a), part_a + part_b
    error = math.sqrt(total)
    if total == 0.0:
        return _without_noise(gain, margin, float(len(a) + len(b) - 2))
    degrees = total**2 / (part_a**2 / (len(a) - 1) + part_b**2 / (len(b) - 1))
    t = (gain - margin) / error
    return TestResult(gain, error, t, degrees, student_tail(t, degrees))


def paired(a: Sequence[float], b: Sequence[float], margin: float = 0.0) -> TestResult | None:
    """Paired test over equal seeds in equal order; None with under two pairs.

    Raises: ValueError if the sides differ in length.
    """
    if len(a) != len(b):
        raise ValueError(f"paired test of {len(a)} against {len(b)} values")
    if len(a) < 2:
        return None
    gains = [right - left for left, right in zip(a, b, strict=True)]
    error = math.sqrt(variance(gains) / len(gains))
    if error == 0.0:
        return _without_noise(mean(gains), margin, float(len(gains) - 1))
    t = (mean(gains) - margin) / error
    return TestResult(mean(gains), error, t, len(gains) - 1.0, student_tail(t, len(gains) - 1.0))


def _without_noise(gain: float, margin: float, degrees: float) -> TestResult:
    """Result when no value varies: certain one way or the other, undecided at equality."""
    over = gain - margin
    t = math.copysign(math.inf, over) if over else 0.0
    return TestResult(gain, 0.0, t, degrees, student_tail(t, degrees))


def seeds_needed(
    a: Sequence[float], b: Sequence[float], margin: float, level: float = RECORD_P
) -> int | None:
    """Seeds that A needs in all for p < `level`, if its mean and spread stay as they are.

    B keeps its values. None when no number up to 1,000 suffices (the gain is within the margin, or
    B's own noise hides it). With one value, A is taken to spread like B.
    """
    if len(b) < 2 or not a:
        return None
    spread_a = variance(a) if len(a) > 1 else variance(b)
    part_b, over = variance(b) / len(b), mean(b) - mean(a) - margin
    if over <= 0:
        return None
    for count in range(max(2, len(a)), MAX_SEEDS + 1):
        part_a = spread_a / count
        total = part_a + part_b
        if total == 0.0:
            return count
        degrees = total**2 / (part_a**2 / (count - 1) + part_b**2 / (len(b) - 1))
        if student_tail(over / math.sqrt(total), degrees) < level:
            return count
    return None


def pairs_needed(gains: Sequence[float], margin: float, level: float = RECORD_P) -> int | None:
    """Pairs of equal seeds needed in all for p < `level`, if mean and spread of the gains stay.

    None with under two pairs, or when no number up to 1,000 suffices.
    """
    if len(gains) < 2 or mean(gains) <= margin:
        return None
    over, spread = mean(gains) - margin, variance(gains)
    for count in range(len(gains), MAX_SEEDS + 1):
        if spread == 0.0 or student_tail(over / math.sqrt(spread / count), count - 1.0) < level:
            return count
    return None
