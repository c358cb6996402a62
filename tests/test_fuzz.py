"""Every key of the configuration gets invalid values; each is refused with a message or used, and none crashes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError, check, resolve_paths
from dreambooth_lab.data.planning import plan
from dreambooth_lab.run import run

NAN, INF, ABSURD = float("nan"), float("inf"), 10**12
VALUES = [
    "banana",
    None,
    -1,
    0,
    ABSURD,
    NAN,
    INF,
    -INF,
    "",
    True,
    0.5,
    [],
    {},
    [NAN],
    [None],
    ["a"],
    "${nowhere}",
    "${seed}",
    "${name}",
]
WORDS = ["model=sdxl", "prior=teacher", "prior.path=.", "dataset=folder", "dataset.path=.", "dataset.class_prompt=a dog",
         "dataset.instance_prompt=a sks dog",
         "eval.path=.", "webhook=raw", "webhook.receivers.raw.url=http://127.0.0.1:9", "rollout.enabled=true",
         "adapter.blocks=[{match: a, rank: 1, lr_ratio: 1}]"]  # fmt: skip


def leaves(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in map(str, node):
        child = node._get_node(name)
        if isinstance(child, DictConfig) and len(child):
            yield from leaves(child, f"{prefix}{name}.")
        else:
            yield prefix + name


@pytest.fixture(scope="module")
def good() -> DictConfig:
    cfg = lab.compose(*WORDS)
    check(cfg)
    return cfg


def groups(key: str) -> list[str]:
    """Groups that an error about a key may name: its own, and those whose keys refer to it."""
    readers = ["adapter", "optimizer", "sampling"] if key.startswith("model.recommended") else []
    return [key.split(".")[0], "dataset", *readers]


def judge(good: DictConfig, key: str, value: Any) -> str:
    """refused by types, refused by check, or accepted."""
    cfg = good.copy()
    try:
        OmegaConf.update(cfg, key, value, merge=False)
    except (OmegaConfBaseException, HydraException):
        return "refused by types"
    try:
        cfg = resolve_paths(cfg)
        check(cfg)
        plan(cfg, ".")
    except ConfigError as error:
        assert any(group in str(error) for group in groups(key)), f"{key}={value!r}: {error}"
        return "refused by check"
    return "accepted"


def holds_absurd(value: Any) -> bool:
    """An absurd number."""
    if isinstance(value, list):
        return any(map(holds_absurd, value))
    return isinstance(value, int | float) and (not math.isfinite(value) or value == ABSURD)


def fuzz(good: DictConfig, every: int) -> Counter[str]:
    """Every n-th pair of a leaf and a value."""
    counts: Counter[str] = Counter()
    wrong = []
    pairs = [(key, value) for key in leaves(good) for value in VALUES]
    for key, value in pairs[::every]:
        try:
            verdict = judge(good, key, value)
        except Exception as error:
            wrong.append(f"{key}={value!r}: {type(error).__name__}: {str(error).splitlines()[:1]}")
            continue
        counts[verdict] += 1
        cfg = good.copy()
        if verdict == "accepted":
            OmegaConf.update(cfg, key, value, merge=False)
            free = ".options." in key and value == ABSURD
            if not free and holds_absurd(OmegaConf.to_container(cfg, resolve=True) and OmegaConf.select(cfg, key)):
                wrong.append(f"{key}={value!r} is accepted")
    print(f"{len(pairs[::every])} pairs: {dict(counts)}")
    assert not wrong, "\n".join(wrong)
    return counts


def test_sampled_bad_values_are_refused_or_used(good):
    counts = fuzz(good, every=41)
    assert counts["refused by types"] and counts["refused by check"] and counts["accepted"]


def preflights(good: DictConfig, root: Path, every: int) -> Counter[str]:
    """Configurations that `check` accepts, up to the preflight."""
    counts: Counter[str] = Counter()
    wrong = []
    pairs = [(key, value) for key in leaves(good) for value in VALUES if judge(good, key, value) == "accepted"]
    for key, value in pairs[::every]:
        cfg = good.copy()
        OmegaConf.update(cfg, key, value, merge=False)
        cfg.preflight = "only"
        try:
            run(resolve_paths(cfg), root / f"{len(wrong)}_{sum(counts.values())}")
            counts["shown"] += 1
        except ConfigError:
            counts["refused"] += 1
        except Exception as error:
            wrong.append(f"{key}={value!r}: {type(error).__name__}: {str(error).splitlines()[:1]}")
    print(f"{len(pairs[::every])} preflights: {dict(counts)}")
    assert not wrong, "\n".join(wrong)
    return counts


@pytest.mark.slow
def test_accepted_values_reach_the_preflight_or_are_refused_there(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # cache=banana is a folder
    words = ["validation.num_images=1", "rollout.enabled=true", "adapter.blocks=[{match: a, rank: 1, lr_ratio: 1}]"]
    counts = preflights(lab.compose(*small, *words), tmp_path, every=1)
    assert counts["shown"] > 50


@pytest.mark.slow
def test_all_bad_values_of_all_keys_are_refused_or_used(good):
    counts = fuzz(good, every=1)
    assert sum(counts.values()) > 2000
