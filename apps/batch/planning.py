"""Jobs checked against a model: every line becomes planned pictures or a mistake, before anything is drawn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgedit.apps.batch.job_files import read_jobs
from edgedit.apps.batch.jobs import Job, Mistake, MistakeError, parse_job, seed_of
from edgedit.apps.batch.naming import NameTemplate, path_key
from edgedit.apps.batch.recipe_book import RecipeBook
from edgedit.bundle import Bundle
from edgedit.errors import InputError
from edgedit.recipes import Recipe

__all__ = ["PlannedJob", "PlannedPicture", "Shard", "canonical", "plan"]

#: Longest path below the output folder, in bytes of UTF-8, and longest part of one.
LONGEST_PATH, LONGEST_PART = 900, 250
#: Sets of settings whose group is looked up by what the job says.
MOST_GIVEN = 4096
#: Names in the output folder that the batch itself writes.
_OWN_NAMES = ("index.jsonl", "index.parquet", "report.html")


@dataclass(frozen=True)
class Shard:
    """Part `number` (from 1) of `count` of the jobs: every `count`-th of them."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "2/8". Raises InputError."""
        number, slash, count = text.partition("/")
        if slash and number.strip().isdecimal() and count.strip().isdecimal() and 1 <= int(number) <= int(count):
            return cls(int(number), int(count))
        raise InputError(f"--shard {text!r} is not NUMBER/COUNT; write 1/8 for the first of eight")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


@dataclass(frozen=True, slots=True)
class PlannedPicture:
    """One picture. `index` counts all pictures of the job file, those of other shards too."""

    index: int
    seed: int
    path: str


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """A valid job.

    Attributes:
        number: counts the lines of the file that are not blank from 0.
        spec: what the pictures depend on, as canonical JSON.
        group: equal for jobs that differ in prompts and seeds only, so that their pictures can be drawn together.
    """

    number: int
    line: int
    id: str
    spec: str
    group: int
    pictures: tuple[PlannedPicture, ...]


def canonical(value: object) -> str:
    """`value` as JSON, the same text for the same value."""
    return _ENCODER.encode(value)


_ENCODER = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"))


class _Planner:
    """Names and numbers given so far. A 64-bit hash stands for each id and path: a million of either take 0.1 GB."""

    def __init__(self, bundle: Bundle, template: NameTemplate, *, force_size: bool) -> None:
        self.book = RecipeBook(bundle, force_size=force_size)
        self.template, self.several = template, template.for_several_seeds()
        self.ids: dict[int, int] = {}
        self.paths: dict[int, int] = {}
        self.groups: dict[tuple[object, ...], int] = {}
        self.given: dict[tuple[object, ...], int] = {}
        self.jobs = self.pictures = 0

    def add(self, line: int, job: Job) -> PlannedJob:
        recipe = self.book.check(job)
        identity = job.id if job.id is not None else f"{line:08d}"
        key = hash(path_key(identity))
        if key in self.ids:
            raise MistakeError("id", f"{identity!r} is already that of line {self.ids[key]}; ids must differ")
        seeds = job.seeds or (seed_of(identity, job.prompt),)
        template = self.several if len(seeds) > 1 else self.template
        pictures = tuple(
            PlannedPicture(index, seed, template.path(identity=identity, index=index, seed=seed, prompt=job.prompt))
            for index, seed in enumerate(seeds, self.pictures)
        )
        taken: dict[int, int] = {}
        for picture in pictures:
            _check_path(picture.path)
            place = hash(path_key(picture.path))
            if place in self.paths or place in taken:
                other = self.paths.get(place, line)
                raise MistakeError("id", f"its picture would be {picture.path}, and so would that of line {other}")
            taken[place] = line
        self.ids[key] = line
        self.paths.update(taken)
        group = self._group(job, recipe)
        planned = PlannedJob(self.jobs, line, identity, canonical(job.spec()), group, pictures)
        self.jobs += 1
        self.pictures += len(pictures)
        return planned

    def _group(self, job: Job, recipe: Recipe) -> int:
        given = (job.settings, job.image is None, job.latents is None)
        group = self.given.get(given)
        if group is None:
            settings = (
                *(recipe.width, recipe.height, recipe.steps, recipe.sampler, recipe.sigmas, recipe.guidance_scale),
                *(recipe.guidance_interval, recipe.rng, recipe.strength, recipe.step_cache, job.latents is not None),
                recipe.attention_scale,
            )
            group = self.groups.setdefault(settings, len(self.groups))
            if len(self.given) < MOST_GIVEN:
                self.given[given] = group
        return group

    def skip(self) -> None:
        """A line that cannot be used keeps a number, so that nothing else is renamed when it is mended later."""
        self.jobs += 1
        self.pictures += 1


def _check_path(path: str) -> None:
    if path.lower() in _OWN_NAMES:
        raise MistakeError("id", f"its picture would be {path}, a name that the batch uses itself")
    if len(path) > LONGEST_PART // 4 and (
        len(path.encode()) > LONGEST_PATH or any(len(part.encode()) > LONGEST_PART for part in path.split("/"))
    ):
        raise MistakeError("id", "makes the picture's path too long")


def plan(
    path: Path,
    kind: str,
    bundle: Bundle,
    template: NameTemplate,
    *,
    folder: Path,
    shard: Shard | None = None,
    force_size: bool = False,
) -> Iterator[PlannedJob | Mistake]:
    """Every line of a job file as a planned job (those of other shards are checked and left out) or a mistake.

    Args:
        folder: what paths in the jobs are relative to.
        force_size: take sizes that the model was not made for.
    """
    planner = _Planner(bundle, template, force_size=force_size)
    for line, fields in read_jobs(path, kind):
        try:
            if isinstance(fields, Mistake):
                raise MistakeError(fields.field, fields.reason)
            job = planner.add(line, parse_job(fields, folder))
        except MistakeError as error:
            planner.skip()
            yield Mistake(line, error.field, error.reason)
            continue
        if shard is None or job.number % shard.count == shard.number - 1:
            yield job
