"""Scores what was read in a picture against what its caption claimed.

In the manner of GenEval (Ghosh et al., 2023): every claim is right or wrong by itself, and a picture is right when all
are.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from edgedit.converters.training.captions import Claims, GroupClaim
from edgedit.converters.training.scene_reader import FoundItem, FoundScene
from edgedit.converters.training.world import IMAGE_SIZE, PLACES, Relation

__all__ = ["ATTRIBUTES", "Score", "Tally", "holds", "is_at", "score_scene", "wilson_interval"]

ATTRIBUTES = ("count", "shape", "colour", "size", "place", "relation", "background")


@dataclass(frozen=True)
class Score:
    """Per attribute: how many claims there were and how many of them hold. An attribute not claimed is absent."""

    claimed: dict[str, int]
    right: dict[str, int]

    @property
    def all_right(self) -> bool:
        """Whether every claim holds."""
        return self.claimed == self.right

    @property
    def wrong(self) -> list[str]:
        """Names of the attributes of which at least one claim does not hold."""
        return sorted(name for name, count in self.claimed.items() if self.right[name] != count)


def is_at(item: FoundItem, place: str) -> bool:
    """Whether an object's centre is in the third of the picture, along each axis, that the place names."""
    column, row = PLACES[place]
    # The bounds lie in the middle of the strips that no named place reaches.
    low, high = 51 / 128 * IMAGE_SIZE, 77 / 128 * IMAGE_SIZE

    def third(value: float, names: tuple[str, str, str]) -> str:
        return names[0] if value < low else names[2] if value > high else names[1]

    return third(item.x, ("left", "centre", "right")) == column and third(item.y, ("top", "centre", "bottom")) == row


def holds(first: FoundItem, relation: Relation, second: FoundItem) -> bool:
    """Whether the larger part of the distance between two objects is along the relation's axis, in its direction."""
    dx, dy = first.x - second.x, first.y - second.y
    if relation in ("left of", "right of"):
        return abs(dx) > abs(dy) and (dx < 0) == (relation == "left of")
    return abs(dy) > abs(dx) and (dy < 0) == (relation == "above")


def _matches(item: FoundItem, claim: GroupClaim) -> dict[str, bool]:
    """Each claimed attribute of one object, and whether it holds."""
    result = {"shape": item.shape == claim.shape}
    if claim.colour is not None:
        result["colour"] = item.colour == claim.colour
    if claim.size is not None:
        result["size"] = item.size == claim.size
    if claim.place is not None:
        result["place"] = is_at(item, claim.place)
    return result


def score_scene(found: FoundScene, claims: Claims) -> Score:
    """Scores a read picture. Objects are matched to claims so that the most claims hold."""
    wanted = [(index, group) for index, group in enumerate(claims.groups) for _ in range(group.count)]
    items: list[FoundItem | None] = [*sorted(found.items, key=lambda item: -item.extent)[:6]]
    items += [None] * (len(wanted) - len(items))
    best: tuple[dict[str, int], dict[str, int]] | None = None
    for chosen in itertools.permutations(items, len(wanted)):
        claimed, right = {"count": 1}, {"count": int(len(found.items) == claims.count)}

        def note(name: str, hit: bool, claimed: dict[str, int] = claimed, right: dict[str, int] = right) -> None:
            claimed[name] = claimed.get(name, 0) + 1
            right[name] = right.get(name, 0) + int(hit)

        if claims.background is not None:
            note("background", found.background == claims.background)
        for item, (_, group) in zip(chosen, wanted, strict=True):
            if item is None:
                for name, value in (("colour", group.colour), ("size", group.size), ("place", group.place)):
                    if value is not None:
                        note(name, False)
                note("shape", False)
            else:
                for name, hit in _matches(item, group).items():
                    note(name, hit)
        for claim in claims.relations:
            firsts = [item for item, (index, _) in zip(chosen, wanted, strict=True) if index == claim.first]
            seconds = [item for item, (index, _) in zip(chosen, wanted, strict=True) if index == claim.second]
            pairs = [(a, b) for a in firsts for b in seconds]
            note("relation", all(a is not None and b is not None and holds(a, claim.relation, b) for a, b in pairs))
        if best is None or sum(right.values()) > sum(best[1].values()):
            best = (claimed, right)
    assert best is not None
    return Score(*best)


def wilson_interval(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927)."""
    if total == 0:
        return 0.0, 1.0
    share = right / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    reach = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    return max(0.0, centre - reach), min(1.0, centre + reach)


class Tally:
    """Scores of many pictures, summed per attribute."""

    def __init__(self) -> None:
        self.claimed: dict[str, int] = {}
        self.right: dict[str, int] = {}

    def add(self, score: Score) -> None:
        """Counts one picture."""
        for name, count in score.claimed.items():
            self.claimed[name] = self.claimed.get(name, 0) + count
            self.right[name] = self.right.get(name, 0) + score.right[name]
        self.claimed["all"] = self.claimed.get("all", 0) + 1
        self.right["all"] = self.right.get("all", 0) + int(score.all_right)

    def table(self) -> dict[str, dict[str, float]]:
        """Per attribute, and for "all": `right`, `total`, `share`, and the ends `low` and `high` of its interval."""
        rows = {}
        for name in (*ATTRIBUTES, "all"):
            if name in self.claimed:
                right, total = self.right[name], self.claimed[name]
                low, high = wilson_interval(right, total)
                rows[name] = {"right": right, "total": total, "share": right / total, "low": low, "high": high}
        return rows
