"""Conclusions in words: one sentence per metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .stats import ALPHA, BY_IMAGE, BY_SEED, NOT_TOLD, UNPAIRED, Difference

PAIRS = {
    BY_SEED: "paired by seed, {n} pairs",
    UNPAIRED: "unpaired, {n} runs or more per arm",
    BY_IMAGE: "paired by image, {n} pairs",
}


class Part(NamedTuple):
    """The conclusion for one arm.

    Args:
        sure: whether there is a significant difference.
    """

    text: str
    sure: bool


def conclusion(metric: str, found: Sequence[Difference]) -> str:
    """One metric's differences from the reference, as one sentence."""
    return f"{lead(metric, found)} {'; '.join(part.text for part in parts(found)) or 'no other arm has this metric'}."


def lead(metric: str, found: Sequence[Difference]) -> str:
    return f"{metric}, compared with “{found[0].reference}”:" if found else f"{metric}:"


def parts(found: Sequence[Difference]) -> list[Part]:
    """One part per arm, significant differences first."""
    lines = [one for one in found if one.pairing != NOT_TOLD]
    if found and not lines:
        return [Part("no conclusion is possible, because one run per arm gives no interval", False)]
    made = [Part(_sure(one), True) if one.p_holm < ALPHA else Part(_unsure(one), False) for one in lines]
    made += [Part(f"no conclusion is possible for “{one.arm}”: it has only one run", False) for one in found if one not in lines]
    return sorted(made, key=lambda part: not part.sure)


def _sure(one: Difference) -> str:
    where = "higher" if one.mean > 0 else "lower"
    page = "" if one.p_page < ALPHA else ", but not significant with all comparisons of this page corrected together"
    of = " on these images (one training seed, so other seeds may differ)" if one.pairing == BY_IMAGE else ""
    return f"“{one.arm}” is {where}{of} by {abs(one.mean):.3g} ({_interval(one)}; {_p(one.p_holm)} after Holm{page})"


def _unsure(one: Difference) -> str:
    if one.low == one.high == 0:
        return f"“{one.arm}” is exactly equal in all {one.n} pairs"
    most = max(abs(one.low), abs(one.high))
    return (
        f"no significant difference for “{one.arm}”: {one.mean:+.3g} ({_interval(one)}; {_p(one.p_holm)} after Holm); "
        f"a difference of up to {most:.2g} remains possible"
    )


def _interval(one: Difference) -> str:
    return f"95 % interval {one.low:+.3g} to {one.high:+.3g}, {PAIRS[one.pairing].format(n=one.n)}"


def _p(p: float) -> str:
    return "p < .001" if p < 0.001 else "p = " + f"{p:.3f}".lstrip("0")
