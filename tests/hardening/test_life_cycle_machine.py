"""Random lives of a server: whatever is loaded, reloaded, unloaded, evicted, cancelled or shut down meanwhile, every
stream gets the tokens that its request gets alone, and nothing is left behind.

The model is a few dictionaries: which content each name stands for, what is loaded and pinned, which streams are open.
`LIFE_CYCLE_RUNS=2000 pytest tests/hardening/test_life_cycle_machine.py` is the run that docs/reliability.md quotes.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from life_cycle import (
    FUSION,
    MAX_TOKENS,
    MEMBERS,
    NAMES,
    NUM_CONTENTS,
    PROMPTS,
    SAMPLINGS,
    Stream,
    Wish,
    World,
)
from served_adapters import check_at_rest, until

from fusionserve.adapter_status import AdapterState, AdapterStatus
from fusionserve.engine.engine import Engine
from fusionserve.errors import (
    AbortedError,
    AlreadyExistsError,
    ArtifactError,
    CapacityError,
    DeadlineError,
    FusionServeError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)

NUM_RUNS = int(os.environ.get("LIFE_CYCLE_RUNS", "30"))
MAX_OPEN = 8
FIRST = 0  # the content that a name has by itself

names = st.sampled_from(NAMES)
contents = st.integers(0, NUM_CONTENTS - 1)


@dataclass
class Loaded:
    """What a name stands for."""

    content: int
    pinned: bool


class LifeCycle(RuleBasedStateMachine):
    """`loaded` may have been evicted by the engine; then the name still stands for the same content.

    What is drawn must not depend on how fast the engine is: rules that do not apply do nothing.
    """

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.engine = self.world.engine
        self.loaded: dict[str, Loaded] = {}
        self.fusion_is_loaded = False
        self.streams: list[Stream] = []
        self.unloads: list[asyncio.Task[AdapterStatus]] = []
        self.num_requests = 0
        self.versions = {
            status.name: status.version for status in self.world.run(self.engine.list_adapters())
        }

    @initialize(may_shut_down=st.sampled_from([False] * 9 + [True]))
    def begin(self, may_shut_down: bool) -> None:
        self.may_shut_down = may_shut_down

    # Loading and unloading

    @rule(name=names, content=contents, pin=st.sampled_from((None, False, True)), replace=st.booleans())
    def load(self, name: str, content: int, pin: bool | None, replace: bool) -> None:
        was = self.status(name)
        path = self.world.files.path(name, content)
        try:
            now = self.world.run(self.engine.load_adapter(name, path, pin=pin, replace=replace))
        except AlreadyExistsError:
            assert not replace and was.state is AdapterState.READY
        except CapacityError:
            assert self.num_kept() + 1 > 3 or self.is_in_use(name), "there was room"
        else:
            assert replace or was.state is not AdapterState.READY
            before = self.loaded.get(name)
            was_pinned = was.state is AdapterState.READY and before is not None and before.pinned
            self.loaded[name] = Loaded(content, was_pinned if pin is None else pin)
            assert now.digest == self.world.digests[name, content]
            assert now.version > self.versions.get(name, 0)
            self.versions[name] = now.version

    @rule(name=names, force=st.booleans())
    def unload(self, name: str, force: bool) -> None:
        """Its end is awaited at the end of the run: without force it takes as long as the streams on the name."""
        is_held = self.fusion_is_loaded and name in MEMBERS
        task = self.world.run(self.begin_unload(name, force))
        if not task.done():
            assert not is_held
        elif (error := task.exception()) is not None:
            if isinstance(error, PreconditionError):
                assert is_held
            else:
                assert isinstance(error, NotFoundError), error
                assert not self.is_pinned(name)
            return
        self.unloads.append(task)
        self.loaded.pop(name, None)

    async def begin_unload(self, name: str, force: bool) -> asyncio.Task[AdapterStatus]:
        task = asyncio.create_task(self.engine.unload_adapter(name, force=force))
        await asyncio.wait([task], timeout=0.003)
        return task

    @rule(replace=st.booleans())
    def load_fusion(self, replace: bool) -> None:
        try:
            self.world.run(self.engine.load_fusion(FUSION, None, pin=False, replace=replace))
        except AlreadyExistsError:
            assert self.fusion_is_loaded and not replace
        except ArtifactError as error:
            assert error.reason == "MEMBER_DIGEST_MISMATCH"
            assert any(self.content_of(member) != FIRST for member in MEMBERS)
        except CapacityError:
            assert self.num_kept() + len(MEMBERS) > 3, "there was room"
        else:
            self.note_fusion()

    @rule(force=st.booleans())
    def unload_fusion(self, force: bool) -> None:
        if not self.fusion_is_loaded:
            return
        users = [stream for stream in self.streams if stream.wish.kind == "fusion" and not stream.is_over]
        if not users or force:
            self.world.run(self.engine.unload_fusion(FUSION, force=force))
            self.fusion_is_loaded = False

    # Requests

    @rule(
        kind=st.sampled_from(["base", "lora", "lora", "blend", "fusion"]),
        chosen=st.lists(names, min_size=2, max_size=2, unique=True),
        prompt=st.integers(0, len(PROMPTS) - 1),
        sampling=st.integers(0, len(SAMPLINGS) - 1),
        num_tokens=st.integers(1, MAX_TOKENS),
        deadline_in_s=st.sampled_from([None] * 6 + [0.0, 0.002, 0.02]),
    )
    def start(
        self,
        kind: str,
        chosen: list[str],
        prompt: int,
        sampling: int,
        num_tokens: int,
        deadline_in_s: float | None,
    ) -> None:
        if len(self.streams) >= MAX_OPEN:
            return
        used = {"base": [], "lora": chosen[:1], "blend": chosen, "fusion": list(MEMBERS)}[kind]
        of_fusion = kind == "fusion" and self.fusion_is_loaded
        asked = tuple((name, FIRST if of_fusion else self.content_of(name)) for name in used)
        wish = Wish(kind, asked, prompt, sampling, num_tokens, deadline_in_s)
        self.num_requests += 1
        request_id = f"request-{self.num_requests}"
        events = self.engine.generate(wish.params(request_id, lambda name, content: name))
        stream = Stream(wish, request_id, events)
        self.world.run(stream.read())
        self.check_end(stream)
        if stream.error is None:
            assert stream.digests == tuple(self.world.digests[one] for one in asked)
            for name, content in asked:
                self.loaded.setdefault(name, Loaded(content, False))
            if kind == "fusion":
                self.note_fusion()
        else:
            self.world.run(self.finish_loads())  # a load goes on when the request that began it has failed
            self.fusion_is_loaded = self.world.run(self.has_fusion())
        if not stream.is_over:
            self.streams.append(stream)

    @rule(which=st.integers(0, MAX_OPEN - 1), num_events=st.integers(1, 6))
    def read(self, which: int, num_events: int) -> None:
        if not self.streams:
            return
        stream = self.streams[which % len(self.streams)]
        for _ in range(num_events):
            if not stream.is_over:
                self.world.run(stream.read())
        self.settle(stream)

    @rule(which=st.integers(0, MAX_OPEN - 1))
    def cancel(self, which: int) -> None:
        if not self.streams:
            return
        stream = self.streams[which % len(self.streams)]
        self.streams.remove(stream)
        self.engine.runner.allow(0)
        num_steps = self.engine.runner.num_steps
        seen = self.world.run_paused(self.cancel_and_look(stream))
        self.world.run(until(lambda: bool(seen)))
        is_there, steps = seen[0]
        assert not is_there and steps <= num_steps + 1, "it is gone within the step at hand"

    @rule()
    def shut_down(self) -> None:
        if not self.may_shut_down or self.num_requests < 6:
            return
        self.world.run(self.engine.drain(0))
        for stream in list(self.streams):
            while not stream.is_over:
                self.world.run(stream.read())
            self.settle(stream)
        self.world.run(self.finish_unloads())
        if self.world.run(self.has_fusion()):
            self.world.run(self.engine.unload_fusion(FUSION, force=False))
        self.world.run(check_at_rest(self.engine))
        self.world.close_engine()
        self.engine = self.world.engine
        self.loaded, self.fusion_is_loaded, self.versions = {}, False, {}
        self.may_shut_down = False

    # What must hold at any time

    @invariant()
    def what_is_needed_is_loaded(self) -> None:
        if not hasattr(self, "may_shut_down"):
            return
        self.engine.engine.scheduler.ledger.check_integrity()
        if self.fusion_is_loaded:  # an idle one goes where an adapter needs the room of its members
            self.fusion_is_loaded = self.world.run(self.has_fusion())
        statuses = {status.name: status for status in self.world.run(self.engine.list_adapters())}
        for name in NAMES:
            status = statuses[name]
            if self.is_pinned(name):
                assert status.state is AdapterState.READY, f"{name} was evicted"
            if (
                self.fusion_is_loaded and name in MEMBERS
            ):  # of a replaced member the fusion keeps the old version
                assert status.state in (AdapterState.READY, AdapterState.DRAINING), f"{name} was evicted"
            if status.state is AdapterState.READY:
                assert status.digest == self.world.digests[name, self.content_of(name)]

    def teardown(self) -> None:
        try:
            self.end()
        except BaseException:
            self.world.close_engine()  # the next life must not begin with what is left of this one
            raise

    def end(self) -> None:
        for stream in list(self.streams):
            while not stream.is_over:
                self.world.run(stream.read())
            self.settle(stream)
        self.world.run(self.finish_unloads())
        if self.world.run(self.has_fusion()):
            self.world.run(self.engine.unload_fusion(FUSION, force=False))
        for status in self.world.run(self.engine.list_adapters()):
            with suppress(NotFoundError):  # an evicted one that came from elsewhere is forgotten, too
                self.world.run(self.engine.unload_adapter(status.name, force=False))
        self.world.run(check_at_rest(self.engine))
        assert self.engine.registry.used_bytes == 0

    # The model's own view

    def content_of(self, name: str) -> int:
        return self.loaded[name].content if name in self.loaded else FIRST

    def is_pinned(self, name: str) -> bool:
        return name in self.loaded and self.loaded[name].pinned

    def is_in_use(self, name: str) -> bool:
        return any(
            name in dict(stream.wish.contents) for stream in self.streams if not stream.is_over
        ) or any(not task.done() for task in self.unloads)

    def num_kept(self) -> int:
        """An upper bound of the versions that cannot be evicted: streams may hold old ones of a name each."""
        held = {(name, content) for stream in self.streams for name, content in stream.wish.contents}
        held |= {(name, entry.content) for name, entry in self.loaded.items() if entry.pinned}
        if self.fusion_is_loaded:
            held |= {(member, FIRST) for member in MEMBERS}
        draining = sum(entry.num_leases > 0 for entry in self.engine.registry._draining)
        return len(held) + draining

    def note_fusion(self) -> None:
        self.fusion_is_loaded = True
        for member in MEMBERS:
            self.loaded.setdefault(member, Loaded(FIRST, False))

    def status(self, name: str) -> AdapterStatus:
        return self.world.run(self.engine.get_adapter(name))

    async def has_fusion(self) -> bool:
        return (await self.engine.get_fusion(FUSION)).state is AdapterState.READY

    def settle(self, stream: Stream) -> None:
        """A stream that is over leaves the model."""
        if stream.is_over:
            self.streams.remove(stream)
            self.check_end(stream)

    def check_end(self, stream: Stream) -> None:
        expected = self.world.expected(stream.wish) if stream.error is None or stream.tokens else ()
        assert tuple(stream.tokens) == expected[: len(stream.tokens)], "other tokens than alone"
        if not stream.is_over:
            return
        if stream.error is None:
            assert len(stream.tokens) == stream.wish.num_tokens
        else:
            self.check_error(stream, stream.error)

    def check_error(self, stream: Stream, error: FusionServeError) -> None:
        if isinstance(error, DeadlineError):
            assert stream.wish.deadline_in_s is not None
        elif isinstance(error, AbortedError):
            assert error.reason in ("ADAPTER_UNLOADED", "FUSION_UNLOADED")
        elif isinstance(error, ArtifactError):
            assert error.reason == "MEMBER_DIGEST_MISMATCH" and stream.wish.kind == "fusion"
            assert any(content != FIRST for _, content in stream.wish.contents)
        elif isinstance(error, CapacityError):
            assert error.reason in ("ADAPTER_HOST_FULL", "QUEUE_FULL"), error.reason
        else:
            assert isinstance(error, UnavailableError) and self.may_shut_down, repr(error)

    async def cancel_and_look(self, stream: Stream) -> list[tuple[bool, int]]:
        """Cancels; the engine, once it has taken that in, notes whether the request is there, and its steps so far."""
        seen: list[tuple[bool, int]] = []

        def look(engine: Engine) -> None:
            is_there = any(generation.request_id == stream.request_id for generation in engine._generations)
            seen.append((is_there, self.engine.runner.num_steps))

        await stream.events.aclose()
        self.engine._thread.post(look)
        return seen

    async def finish_loads(self) -> None:
        await until(lambda: not (self.engine._store._loads or self.engine._fusions._loads))

    async def finish_unloads(self) -> None:
        for task in self.unloads:
            status = await task
            assert status.state in (AdapterState.AVAILABLE, AdapterState.DRAINING)
        self.unloads.clear()


@pytest.fixture(scope="module", params=[None, 2], ids=["copied in the step", "copied beside it"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("world"), request.param)
    yield made
    made.close()


def test_every_life_is_right(world: World) -> None:
    LifeCycle.world = world
    run_state_machine_as_test(
        LifeCycle,
        settings=settings(
            max_examples=NUM_RUNS,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
