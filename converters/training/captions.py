"""Captions of scenes, and beside each caption the claims that it makes.

What a caption leaves out is free: a scorer checks the claims only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgedit.converters.training.world import Item, Relation, Scene, place_of, relation_of

__all__ = ["Claims", "GroupClaim", "RelationClaim", "caption", "vocabulary"]


@dataclass(frozen=True)
class GroupClaim:
    """`count` objects of one kind; None stands for an attribute that the caption does not name."""

    count: int
    shape: str
    colour: str | None
    size: str | None
    place: str | None


@dataclass(frozen=True)
class RelationClaim:
    """Every object of group `first` lies `relation` every object of group `second` (indices into `Claims.groups`)."""

    first: int
    relation: Relation
    second: int


@dataclass(frozen=True)
class Claims:
    """All that a caption says."""

    groups: tuple[GroupClaim, ...]
    relations: tuple[RelationClaim, ...]
    background: str | None

    @property
    def count(self) -> int:
        """Number of objects in the picture."""
        return sum(group.count for group in self.groups)


_SIZE_WORDS = {
    "small": ("small", "small", "small", "little", "tiny"),
    "medium": ("medium", "medium", "medium-sized"),
    "large": ("large", "large", "big"),
}
_RELATION_WORDS: dict[Relation, tuple[str, ...]] = {
    "left of": ("to the left of", "left of", "on the left of", "to the left side of"),
    "right of": ("to the right of", "right of", "on the right of", "to the right side of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under", "beneath"),
}
_NUMBERS = {2: ("two", "two", "2"), 3: ("three", "three", "3")}
_BACKGROUND_AFTER = (
    " on a {} background",
    " on a {} background",
    " on a {} background",
    ", {} background",
    " against a {} background",
    " on {}",
)
_BACKGROUND_BEFORE = ("on a {} background, ", "{} background, ")
_OPENINGS = ("a picture of ", "an image of ", "a drawing of ", "there is ", "draw ")


def _one(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _place_words(rng: np.random.Generator, place: str) -> str:
    middle = _one(rng, ("centre", "center", "middle"))
    if place == "centre":
        return f"in the {middle}"
    if " " not in place:
        return _one(rng, ("on", "at") if place in ("left", "right") else ("at", "at")) + f" the {place}"
    row, column = place.split()
    high = {"top": "upper", "bottom": "lower"}[row]
    return _one(
        rng, (f"in the {row} left corner", f"at the {row} left", f"in the {high} left corner", f"in the {row} left")
    ).replace("left", column)


def _plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def _grey(rng: np.random.Generator, colour: str) -> str:
    return _one(rng, ("grey", "gray")) if colour == "grey" else colour


def _noun_phrase(rng: np.random.Generator, group: GroupClaim) -> str:
    words = [] if group.size is None else [_one(rng, _SIZE_WORDS[group.size])]
    words += [] if group.colour is None else [group.colour]
    words += [group.shape if group.count == 1 else _plural(group.shape)]
    if group.count > 1:
        return " ".join([_one(rng, _NUMBERS[group.count]), *words])
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def _groups(scene: Scene) -> list[list[Item]]:
    kinds: dict[tuple[str, str, str], list[Item]] = {}
    for item in scene.items:
        kinds.setdefault((item.shape, item.colour, item.size), []).append(item)
    return list(kinds.values())


def _common_relation(first: list[Item], second: list[Item]) -> Relation | None:
    found = {relation_of(a, b) for a in first for b in second}
    return found.pop() if len(found) == 1 else None


def caption(scene: Scene, rng: np.random.Generator, *, complete: bool = False) -> tuple[str, Claims]:
    """A caption of the scene in one of many phrasings, and the claims that it makes.

    Args:
        scene: what is in the picture.
        rng: chooses the phrasing and what is left out.
        complete: name every colour, the background, and a place or a relation wherever one is clear; sizes stay
            optional.
    """
    groups = _groups(scene)
    groups = [groups[int(i)] for i in rng.permutation(len(groups))]
    name_sizes = rng.random() < 0.45
    name_colours = complete or rng.random() > 0.07
    claims = [
        GroupClaim(
            count=len(group),
            shape=group[0].shape,
            colour=group[0].colour if name_colours else None,
            size=group[0].size if name_sizes and rng.random() < 0.9 else None,
            place=None,
        )
        for group in groups
    ]
    arranged = complete or rng.random() < 0.85
    text, groups_said, relations = _arrangement(rng, groups, claims, arranged=arranged)
    said = complete or rng.random() > (0.4 if scene.background == "white" else 0.08)
    background = scene.background if said else None
    if background is not None:
        name = _grey(rng, background)
        if rng.random() < 0.2:
            before = _one(rng, _BACKGROUND_BEFORE).format(name)
            text = before.replace("a orange", "an orange") + text
        else:
            text += _one(rng, _BACKGROUND_AFTER).format(name).replace("a orange", "an orange")
    elif rng.random() < 0.1:
        text = _one(rng, _OPENINGS) + text
    if rng.random() < 0.1:
        text += "."
    return text, Claims(tuple(groups_said), tuple(relations), background)


def _arrangement(
    rng: np.random.Generator, groups: list[list[Item]], claims: list[GroupClaim], *, arranged: bool
) -> tuple[str, list[GroupClaim], list[RelationClaim]]:
    phrases = [_noun_phrase(rng, claim) for claim in claims]
    places = [place_of(group[0]) if len(group) == 1 else None for group in groups]

    def placed(index: int) -> str:
        place = places[index]
        if place is None:
            return phrases[index]
        claim = claims[index]
        claims[index] = GroupClaim(claim.count, claim.shape, claim.colour, claim.size, place)
        return f"{phrases[index]} {_place_words(rng, place)}"

    if len(groups) == 1:
        if arranged and rng.random() < 0.12 and places[0] is not None:
            text = placed(0)
            words = text.removeprefix(phrases[0]).strip()
            return f"{words}, {phrases[0]}", claims, []
        return (placed(0) if arranged else phrases[0]), claims, []
    if len(groups) == 2:
        relation = _common_relation(groups[0], groups[1])
        both_placed = None not in places
        if arranged and relation is not None and not (both_placed and rng.random() < 0.4):
            return (
                f"{phrases[0]} {_one(rng, _RELATION_WORDS[relation])} {phrases[1]}",
                claims,
                [RelationClaim(0, relation, 1)],
            )
        if arranged and both_placed:
            return f"{placed(0)} and {placed(1)}", claims, []
        return f"{phrases[0]} and {phrases[1]}", claims, []
    listing = f"{phrases[0]}, {phrases[1]} and {phrases[2]}"
    if not arranged:
        return listing, claims, []
    pairs = [_common_relation(groups[i], groups[i + 1]) for i in range(2)]
    if pairs[0] is not None and pairs[0] == pairs[1]:
        ending = {
            "left of": "from left to right",
            "right of": "from right to left",
            "above": "from top to bottom",
            "below": "from bottom to top",
        }[pairs[0]]
        return f"{listing}, {ending}", claims, [RelationClaim(0, pairs[0], 1), RelationClaim(1, pairs[0], 2)]
    for first, second, third in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        relation = _common_relation(groups[first], groups[second])
        if relation is None:
            continue
        text = f"{phrases[first]} {_one(rng, _RELATION_WORDS[relation])} {phrases[second]} and {phrases[third]}"
        # "A above B and C" would read as "above both", so a comma parts the third.
        text = text.replace(f"{phrases[second]} and", f"{phrases[second]}, and")
        return text, claims, [RelationClaim(first, relation, second)]
    return listing, claims, []


def vocabulary() -> list[str]:
    """Every word and mark that captions are made of, sorted."""
    text = """
        a an the of on at in to from and with side corner background against picture image drawing draw there is are
        left right top bottom upper lower centre center middle above over below under beneath
        one two three 1 2 3 small little tiny medium sized large big huge
        circle square triangle star heart ring cross diamond
        circles squares triangles stars hearts rings crosses diamonds
        red orange yellow green cyan blue purple pink white black grey gray colour color coloured colored
        , . - : ; ! ?
    """
    return sorted(set(text.split()))
