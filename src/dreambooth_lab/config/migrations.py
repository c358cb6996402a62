"""Migrations of earlier versions' configurations: one table of renamed, added and removed keys.

A saved configuration has the version that wrote it (`saved.py`). Reading it applies the steps of all later versions. A step
without anything to change does nothing, so the same table is used for the command line and experiment files, which have no
version.

To rename a key or a whole group, put a line into the last entry of `VERSIONS`: `Rename("ema.device", "ema.kept_on")`. Once a
version with that entry is released, begin a new entry instead.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

Tree = dict[str, Any]


class Rename(NamedTuple):
    """A key, or a group with all its keys, was renamed."""

    old: str
    new: str


class NewValue(NamedTuple):
    """A choice of a key, or an option of a group, was renamed."""

    key: str  # its current name
    old: str
    new: str


class Added(NamedTuple):
    """A new key, with the value that keeps the behaviour of older runs. A group is added key by key."""

    key: str
    value: Any


class Removed(NamedTuple):
    """A removed key."""

    key: str


Step = Rename | NewValue | Added | Removed

VERSIONS: tuple[tuple[Step, ...], ...] = (
    # 0 → 1: the first version that is recorded
    (
        Rename("model.usual", "model.recommended"),
        Rename("objective.low", "objective.min_time"),
        Rename("objective.high", "objective.max_time"),
        Rename("mask.floor", "mask.min_weight"),
        Rename("prior.share", "prior.class_fraction"),
        Rename("rollout.grid", "rollout.num_steps"),
        NewValue("rollout.kind", "walk", "model"),
        Rename("optimizer.on_longer", "optimizer.on_extend"),
        Added("search_metric", None),
        Added("race", 0),
        Added("trainer.num_nodes", 1),
        Added("trainer.strategy", "auto"),
        Added("trainer.max_epochs", None),
        Added("validation.superclass", "none"),
        Added("validation.superclass_share", 0.3),
        Added("validation.personal_guidance", None),
        Added("objective.uncertainty_lr", 0.01),
        Added("eval.leakage", False),
        Added("ema.lengths", []),
        Added("ema.snapshot_every_n_steps", 25),
        Added("eval.gallery", None),
        Added("objective.anchor", "none"),
        Added("objective.anchor_beta", 1000.0),
        Added("adapter.rank_schedule", "none"),
        Added("adapter.min_rank", None),
        Added("export.name", "kohya"),  # as the file for other programs was called
        Added("export.dtype", "float32"),
        Added("export.formats", ["diffusers", "comfyui", "peft"]),
    ),
)
VERSION = len(VERSIONS)


def migrate(tree: Tree, version: int = 0) -> Tree:
    """The same configuration with the current names and added keys.

    Args:
        tree: nested mappings from YAML; changed in place.
        version: of the configuration.
    """
    for step in _since(version):
        if isinstance(step, Added):
            _fill(tree, step)
        elif isinstance(step, Removed):
            _pop(tree, step.key)
        else:
            _change(tree, step)
    return tree


def migrate_file(tree: Tree, package: str = "") -> Tree:
    """The same for a partial file: no keys are added. Defaults lists, sweeps and `${…}` are migrated too.

    Args:
        package: the group of the file's keys; empty: the top level.
    """
    defaults, hydra = tree.pop("defaults", None), tree.get("hydra")
    whole = {package: tree} if package else tree
    for step in _since(0):
        if isinstance(step, Rename | NewValue):
            _change(whole, step)
    if package:
        (tree,) = whole.values() if len(whole) == 1 else ({**tree},)
    if isinstance(hydra, dict) and isinstance(params := (hydra.get("sweeper") or {}).get("params"), dict):
        hydra["sweeper"]["params"] = {migrate_word(str(key)): value for key, value in params.items()}
    if defaults is not None:
        tree = {"defaults": [_of_defaults(one) for one in defaults], **tree}
    return {key: _references(value) for key, value in tree.items()}


def migrate_word(word: str) -> str:
    """A command-line argument, `key=value` or `~key`, with the current names."""
    parts = re.fullmatch(r"(\+\+|\+|~)?([^=@]+)(@[^=]*)?(?:=(.*))?", word, re.DOTALL)
    if parts is None:
        return word
    sign, key, package, value = parts[1] or "", parts[2], parts[3] or "", parts[4]
    for step in _since(0):
        if isinstance(step, Rename) and (renamed := _renamed(key, step)):
            notice(key, renamed)
            key = renamed
        elif isinstance(step, NewValue) and (key, value) == (step.key, step.old):
            notice(f"{key}={value}", f"{key}={step.new}")
            value = step.new
    return f"{sign}{key}{package}" + ("" if value is None else f"={value}")


@cache
def notice(old: str, new: str) -> None:
    """Log once that a name has changed."""
    log.warning("%s was renamed to %s; the old name is still accepted", old, new)


def _since(version: int) -> Iterator[Step]:
    for steps in VERSIONS[version:]:
        yield from steps


def _renamed(key: str, step: Rename) -> str | None:
    """A key's name after a step; None if the step doesn't affect it."""
    return step.new + key[len(step.old) :] if key == step.old or key.startswith(f"{step.old}.") else None


def _change(tree: Tree, step: Rename | NewValue) -> None:
    if isinstance(step, NewValue):
        parent, _, name = step.key.rpartition(".")
        node = _at(tree, parent)
        if node is not None and str(node.get(name)) == step.old:
            node[name] = step.new
            notice(f"{step.key}={step.old}", f"{step.key}={step.new}")
        return
    found, value = _pop(tree, step.old)
    if found:
        _put(tree, step.new, value)
        notice(step.old, step.new)


def _fill(tree: Tree, step: Added) -> None:
    """Add the key if the group exists (exported configurations lack some) and the key does not."""
    parent, _, name = step.key.rpartition(".")
    node = _at(tree, parent)
    if node is not None:
        node.setdefault(name, deepcopy(step.value))


def _at(tree: Tree, key: str) -> Tree | None:
    """The mapping at a key; the tree itself for none."""
    node: Any = tree
    for name in key.split(".") if key else []:
        node = node.get(name) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else None


def _pop(tree: Tree, key: str) -> tuple[bool, Any]:
    parent, _, name = key.rpartition(".")
    node = _at(tree, parent)
    return (True, node.pop(name)) if node is not None and name in node else (False, None)


def _put(tree: Tree, key: str, value: Any) -> None:
    """Insert without overwriting: existing values are kept, and mappings are merged."""
    *parents, name = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    if isinstance(value, dict) and isinstance(tree.get(name), dict):
        for inner, one in value.items():
            _put(tree[name], inner, one)
        return
    tree.setdefault(name, value)


def _of_defaults(entry: Any) -> Any:
    """An entry of a defaults list: `override /group: option`."""
    if not isinstance(entry, dict):
        return entry
    ((words, option),) = entry.items()
    before, group = re.fullmatch(r"((?:override |optional )*/?)(.*)", str(words)).groups()  # type: ignore[union-attr]
    if not isinstance(option, str):
        return {f"{before}{migrate_word(group)}": option}
    migrated, _, option = migrate_word(f"{group}={option}").partition("=")
    return {f"{before}{migrated}": option}


def _references(value: Any) -> Any:
    """Rename the keys in `${…}`."""
    if isinstance(value, dict):
        return {key: _references(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_references(child) for child in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    return re.sub(r"(?<=\$\{)[\w.]+(?=[}])", lambda found: migrate_word(found[0]) if found[0][0] != "." else found[0], value)
