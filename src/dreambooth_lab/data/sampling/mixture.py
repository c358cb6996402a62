"""The mixture: which images share a bucket, and how many rows each dataset contributes to it."""

from __future__ import annotations

from ..preparation.entry import Entry
from ..preparation.geometry import HW
from .schedule import Bucket, Group


def buckets(entries: list[Entry], share: float) -> list[Bucket]:
    """One bucket per shape, with one group per dataset; entries without weight are left out.

    Args:
        share: of the class rows, in buckets where class images have the shapes of the subject's photos.
    """
    together: dict[HW, dict[str, list[int]]] = {}
    for i, entry in enumerate(entries):
        if entry.weight > 0:
            together.setdefault(entry.shape, {}).setdefault(entry.spec.id, []).append(i)
    return [Bucket(shape, _groups(entries, together[shape], share)) for shape in sorted(together)]


def _groups(entries: list[Entry], sets: dict[str, list[int]], share: float) -> tuple[Group, ...]:
    """One group per dataset; if class images have the photos' shapes, they get the share `share` of a bucket's rows."""
    made = [Group(tuple(own), sum(entries[i].weight for i in own), entries[own[0]].spec.is_class) for own in sets.values()]
    sharing = [entries[group.entries[0]].spec.share_shapes for group in made]
    theirs = sum(group.rows for group in made if not group.is_class)
    together = sum(group.rows for group, shares in zip(made, sharing, strict=True) if shares)
    return tuple(
        group._replace(rows=theirs * share / (1 - share) * group.rows / together) if shares and theirs else group
        for group, shares in zip(made, sharing, strict=True)
    )
