"""The coordinator: claims pictures, hands them to workers, records what comes back, and outlives any of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from edgedit.apps.batch.index import entry_of
from edgedit.apps.batch.ledger import Ledger, Picture
from edgedit.apps.batch.owners import Owner
from edgedit.apps.batch.pool import Message, Pool
from edgedit.apps.batch.recipe_book import RecipeBook
from edgedit.apps.batch.reporter import Reporter
from edgedit.apps.batch.store import Store
from edgedit.errors import EdgeditError, InputError

__all__ = ["Coordinator", "RunOptions"]

#: Rounds of work that are claimed at a time.
ROUNDS = 4
#: Pictures that a worker denoises before it opens the decoder, where memory holds one component at a time.
LOW_RAM_CHUNK = 8
#: Workers in a row that may die without having told anything.
STILLBORN = 3
#: Prompts whose length is remembered.
REMEMBERED = 200_000

Prompt = tuple[str, bool]


@dataclass(frozen=True)
class RunOptions:
    """How a run goes about its work; nothing here changes a picture.

    Attributes:
        batch: pictures denoised together.
        retries: further attempts of a picture that failed.
        timeout: seconds that a picture may take.
        window: pictures whose prompts are encoded at a time, at least.
    """

    workers: int = 1
    batch: int = 1
    retries: int = 1
    fail_fast: bool = False
    timeout: float | None = None
    low_ram: bool = False
    window: int = 32


@dataclass
class _Hand:
    """A worker: what it was given, and what it has begun and when."""

    ready: bool = False
    encoding: list[Prompt] = field(default_factory=list)
    given: dict[int, Picture] = field(default_factory=dict)
    begun: dict[int, float] = field(default_factory=dict)
    timed_out: set[int] = field(default_factory=set)
    spoke: bool = False
    retired: bool = False


class Coordinator:
    """One run over a ledger.

    Args:
        stop: tells whether to finish what is under way and stop.
    """

    def __init__(
        self,
        ledger: Ledger,
        owner: Owner,
        pool: Pool,
        book: RecipeBook,
        options: RunOptions,
        reporter: Reporter,
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.ledger, self.owner, self.pool, self.book = ledger, owner, pool, book
        self.options, self.reporter = options, reporter
        self.store = Store(ledger.places)
        self.stopped = False
        self.failures = 0
        self.cut: dict[str, str] = {}
        self._stop = stop
        self._hands: dict[int, _Hand] = {}
        self._lengths: dict[Prompt, int] = {}
        self._to_encode: deque[Prompt] = deque()
        self._encoding_failed: set[Prompt] = set()
        self._waiting: list[Picture] = []
        self._queues: dict[tuple[int, ...], deque[Picture]] = {}
        self._alone: deque[Picture] = deque()
        self._suspects: set[int] = set()
        self._stillborn = 0
        self._warned = 0

    def run(self) -> None:
        """Draw until nothing is left to do, or until stopped. Raises EdgeditError for what no picture would survive."""
        for _ in range(self.options.workers):
            self._hire()
        while True:
            self.owner.beat()
            self.stopped = self.stopped or self._stop()
            if not self.stopped:
                self._claim()
            self._dispatch()
            if self._finished():
                break
            for message in self.pool.poll(0.2):
                self._hear(message)
            self._check_times()
        self._dismiss()

    def _finished(self) -> bool:
        if any(hand.given or hand.encoding for hand in self._hands.values()):
            return False
        if self.stopped:
            return True
        if self._queued() or self._waiting or self._alone or self.ledger.has_work():
            return False
        # Others' pictures come back here if those others die.
        return not self.ledger.anything_running()

    def _hire(self) -> None:
        self._hands[self.pool.start()] = _Hand()

    def _dismiss(self) -> None:
        """Let every worker end by itself, and kill those that do not."""
        for number in self._hands:
            self.pool.send(number, None)
        deadline = time.monotonic() + 10
        while self._hands and time.monotonic() < deadline:
            for message in self.pool.poll(0.2):
                if message.event == "died":
                    self._hands.pop(message.worker, None)
        self.pool.kill_all()

    # Claiming and handing out

    def _queued(self) -> int:
        return sum(map(len, self._queues.values()))

    def _claim(self) -> None:
        """Keep about two rounds of work at hand: more would be missed by processes that join."""
        round_ = max(1, len(self._hands)) * self.options.batch
        if self._queued() + len(self._waiting) + len(self._alone) >= 2 * round_:
            return
        window = self.ledger.claim(self.owner.number, max(self.options.window, ROUNDS * round_))
        known = set(self._to_encode).union(*(hand.encoding for hand in self._hands.values()))
        for picture in window:
            for prompt in self._prompts(picture):
                if prompt not in self._lengths and prompt not in self._encoding_failed and prompt not in known:
                    known.add(prompt)
                    self._to_encode.append(prompt)
        self._waiting += window

    def _prompts(self, picture: Picture) -> list[Prompt]:
        try:
            recipe = self.book.recipe(picture.spec)
        except EdgeditError:
            return []
        prompts = [(recipe.prompt, False)]
        if self.book.guidance.needs_negative(recipe.guidance_scale):
            prompts.append((recipe.negative_prompt, True))
        return prompts

    def _sort(self) -> None:
        """Pictures whose prompts are encoded go to the queue of those that can be drawn with them."""
        left = []
        for picture in self._waiting:
            prompts = self._prompts(picture)
            if any(prompt not in self._lengths and prompt not in self._encoding_failed for prompt in prompts):
                left.append(picture)
            elif picture.index in self._suspects or any(prompt not in self._lengths for prompt in prompts):
                self._alone.append(picture)
            else:
                key = (picture.group, *(self._lengths[prompt] for prompt in prompts))
                self._queues.setdefault(key, deque()).append(picture)
        self._waiting = left

    def _dispatch(self) -> None:
        self._sort()
        idle = [number for number, hand in self._hands.items() if hand.ready and not hand.retired]
        for position, number in enumerate(idle):
            if self.stopped:
                return
            hand = self._hands[number]
            if not self._suspects.isdisjoint(hand.given):
                # Nothing else may be under way where a suspect is drawn, or its fault could not be told.
                continue
            if self._to_encode:
                share = -(-len(self._to_encode) // (len(idle) - position))
                hand.encoding = [self._to_encode.popleft() for _ in range(share)]
                hand.ready = False
                self.pool.send(number, ("encode", hand.encoding))
            elif self._alone and not hand.given:
                self._give(number, [self._alone.popleft()])
            elif chunk := self._next_chunk():
                self._give(number, chunk)

    def _next_chunk(self) -> list[Picture]:
        size = self.options.batch
        if self.options.low_ram:
            size = -(-LOW_RAM_CHUNK // size) * size
        if not self._queues:
            return []
        full = next((key for key, queue in self._queues.items() if len(queue) >= size), None)
        key = full if full is not None else max(self._queues, key=lambda key: len(self._queues[key]))
        queue = self._queues[key]
        chunk = [queue.popleft() for _ in range(min(size, len(queue)))]
        if not queue:
            del self._queues[key]
        return chunk

    def _give(self, number: int, pictures: list[Picture]) -> None:
        hand = self._hands[number]
        hand.given.update({picture.index: picture for picture in pictures})
        hand.ready = False
        self.pool.send(number, ("draw", pictures, self.options.batch))

    # What workers tell

    def _hear(self, message: Message) -> None:
        hand = self._hands.get(message.worker)
        if hand is None:
            return
        facts = message.facts
        if message.event != "died":
            hand.spoke, self._stillborn = True, 0
        if message.event == "ready":
            hand.ready = True
            if "runtime" in facts:
                self._check_runtime(facts["runtime"])
        elif message.event == "encoded":
            self._encoded(hand, facts["prompts"])
        elif message.event == "start":
            hand.begun.update(dict.fromkeys(facts["indices"], time.monotonic()))
        elif message.event == "step":
            picture = hand.given.get(facts["indices"][0])
            if picture is not None:
                self.reporter.step(picture.id, facts["step"], facts["steps"])
        elif message.event == "done":
            self._done(hand, facts)
        elif message.event == "failed":
            self._failed(message.worker, hand, facts)
        elif message.event == "fatal":
            raise InputError(facts["message"])
        elif message.event == "died":
            self._died(message.worker, hand, facts["how"])

    def _check_runtime(self, runtime: dict[str, str]) -> None:
        known = self.ledger.meta.get("runtime")
        if known is None:
            self.ledger.set_meta(runtime=runtime)
        elif known != runtime and not self._warned:
            self._warned += 1
            self.reporter.warn(
                f"this batch was begun with {', '.join(known.values())} and goes on with "
                f"{', '.join(runtime.values())}; "
                "the bytes of its pictures may depend on that"
            )

    def _encoded(self, hand: _Hand, prompts: list[tuple[str, bool, int, str, tuple[str, ...]]]) -> None:
        if len(self._lengths) > REMEMBERED:
            self._lengths.clear()
        for text, negative, length, cut, _unknown in prompts:
            self._lengths[text, negative] = length
            if cut and not negative:
                self.cut[text] = cut
        self._encoding_failed.update(prompt for prompt in hand.encoding if prompt not in self._lengths)
        hand.encoding, hand.ready = [], True

    def _done(self, hand: _Hand, facts: dict[str, Any]) -> None:
        picture = hand.given.pop(facts["index"], None)
        hand.begun.pop(facts["index"], None)
        if picture is None:
            return
        if "data" in facts:
            self.store.save(picture.path, facts["data"])
        self.ledger.check_place()
        entry = entry_of(
            picture,
            sha256=facts["sha256"],
            size=facts["size"],
            seconds=facts["seconds"],
            recipe=facts["recipe"],
        )
        if picture.spec["prompt"] in self.cut:
            entry["cut"] = self.cut[picture.spec["prompt"]]
        if self.ledger.record_done(
            picture, sha256=facts["sha256"], size=facts["size"], seconds=facts["seconds"], entry=entry
        ):
            self.reporter.picture(entry)
        self.store.drop_latents(facts["latents"])

    def _failed(self, number: int, hand: _Hand, facts: dict[str, Any]) -> None:
        pictures = [hand.given.pop(index) for index in facts["indices"] if index in hand.given]
        for index in facts["indices"]:
            hand.begun.pop(index, None)
        if len(pictures) > 1:
            # One bad picture must not fail those that were drawn with it.
            self._suspect(pictures)
        else:
            for picture in pictures:
                self._count_failure(picture, facts["error"])
        if facts["memory"]:
            # What is left of a process that ran out of memory cannot be trusted to have much of it.
            hand.retired = True
            self.pool.send(number, None)

    def _suspect(self, pictures: list[Picture]) -> None:
        self._suspects.update(picture.index for picture in pictures)
        self._waiting += pictures

    def _count_failure(self, picture: Picture, error: str) -> None:
        final = picture.attempts >= self.options.retries
        self.ledger.record_failure(picture, error, final=final)
        self.reporter.failure(picture.id, picture.seed, error, final=final)
        if final:
            self.failures += 1
            self.stopped = self.stopped or self.options.fail_fast

    def _died(self, number: int, hand: _Hand, how: str) -> None:
        del self._hands[number]
        for prompt in hand.encoding:
            # Encoded again alone, in the worker that draws the picture; if it kills that one too, the picture failed.
            self._encoding_failed.add(prompt)
        begun = [picture for index, picture in hand.given.items() if index in hand.begun]
        rest = [picture for index, picture in hand.given.items() if index not in hand.begun]
        late = [picture for picture in begun if picture.index in hand.timed_out]
        for picture in late:
            self._count_failure(picture, f"took longer than {self.options.timeout:g} s")
        others = [picture for picture in begun if picture.index not in hand.timed_out]
        if late:
            self._waiting += others
            others = []
        # The machine may be to blame, or a picture drawn beside this one. Only who was alone, and suspect before, is.
        for picture in others:
            if picture.index in self._suspects:
                self._count_failure(picture, how)
        self._suspect([picture for picture in others if picture.index not in self._suspects])
        self._waiting += rest
        if not hand.spoke:
            self._stillborn += 1
            if self._stillborn >= STILLBORN:
                raise InputError(f"workers cannot start ({how}); try fewer --workers or more --memory")
        if not self.stopped:
            self._hire()

    def _check_times(self) -> None:
        if self.options.timeout is None:
            return
        now = time.monotonic()
        for number, hand in self._hands.items():
            late = {index for index, since in hand.begun.items() if now - since > self.options.timeout}
            if late and not hand.timed_out:
                hand.timed_out = late
                self.pool.kill(number)
