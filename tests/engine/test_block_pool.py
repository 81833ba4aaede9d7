"""The block pool against a plain model of it, and the chain of hashes."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from schedules import make_adapter, make_request

from fusionserve.engine.block_pool import BlockPool, chain_hashes

pytestmark = pytest.mark.no_kernels

NUM_BLOCKS = 6


def test_allocate_takes_all_or_nothing() -> None:
    pool = BlockPool(4, 16)
    held = pool.allocate(3)
    assert held is not None and len(set(held)) == 3
    assert pool.allocate(2) is None
    assert (pool.num_free, pool.num_used) == (1, 3)
    assert pool.allocate(0) == []
    pool.check_integrity(3)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_num_blocks_for_rounds_up(num_tokens: int, num_blocks: int) -> None:
    assert BlockPool(4, 16).num_blocks_for(num_tokens) == num_blocks


def test_freed_block_is_found_until_it_is_handed_out_again() -> None:
    pool = BlockPool(2, 4)
    (block,) = pool.allocate(1) or []
    pool.publish(block, b"content")
    pool.free([block])
    assert pool.find([b"content"]) == [block]
    pool.allocate(2)
    assert pool.find([b"content"]) == []


def test_least_recently_freed_content_goes_first_and_prefixes_outlive_continuations() -> None:
    pool = BlockPool(4, 4)
    old, new = pool.allocate(2) or [], pool.allocate(2) or []
    for block in (*old, *new):
        pool.publish(block, b"%d" % block)
    pool.free(old)
    pool.free(new)
    assert pool.allocate(3) == [old[1], old[0], new[1]]
    assert pool.find([b"%d" % new[0]]) == [new[0]]


def test_find_stops_at_the_first_gap() -> None:
    pool = BlockPool(3, 4)
    first, _, third = pool.allocate(3) or []
    pool.publish(first, b"1")
    pool.publish(third, b"3")
    assert pool.find([b"1", b"2", b"3"]) == [first]


def test_first_block_of_a_content_stays_the_one_found() -> None:
    pool = BlockPool(2, 4)
    first, second = pool.allocate(2) or []
    pool.publish(first, b"x")
    pool.publish(second, b"x")
    assert pool.find([b"x"]) == [first]
    pool.check_integrity(2)


def test_withdrawn_content_is_not_found_and_its_block_stays_held() -> None:
    pool = BlockPool(2, 4)
    first, second = pool.allocate(2) or []
    pool.publish(first, b"1")
    pool.publish(second, b"2")
    pool.free([second])
    pool.withdraw([b"2", b"unknown", b"1"])
    assert (pool.find([b"1"]), pool.find([b"2"]), pool.num_free) == ([], [], 1)
    pool.publish(first, b"1")
    assert pool.find([b"1"]) == [first]
    pool.check_integrity(1)


def test_freeing_twice_is_a_bug_that_is_noticed() -> None:
    pool = BlockPool(2, 4)
    blocks = pool.allocate(1) or []
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed more often"):
        pool.free(blocks)


class BlockPoolMachine(RuleBasedStateMachine):
    """Any order of operations by well-behaved callers leaves the pool equal to a list of counters and a dict."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, 4)
        self.references = [0] * NUM_BLOCKS
        self.content: dict[bytes, int] = {}

    @rule(target=held, num_blocks=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, num_blocks: int) -> object:
        blocks = self.pool.allocate(num_blocks)
        if num_blocks > self.references.count(0):
            assert blocks is None
            return multiple()
        assert blocks is not None and len(set(blocks)) == num_blocks
        for block in blocks:
            assert self.references[block] == 0
            self.references[block] = 1
        self.content = {key: block for key, block in self.content.items() if block not in blocks}
        return multiple(blocks)

    @rule(blocks=consumes(held))
    def free(self, blocks: list[int]) -> None:
        self.pool.free(blocks)
        for block in blocks:
            self.references[block] -= 1

    @rule(blocks=held, key=st.integers(0, 5))
    def publish(self, blocks: list[int], key: int) -> None:
        for offset, block in enumerate(blocks):
            content = b"%d" % (key + offset)
            self.pool.publish(block, content)
            if content not in self.content and block not in self.content.values():
                self.content[content] = block

    @rule(target=held, keys=st.lists(st.integers(0, 7), max_size=4))
    def find_and_reference(self, keys: list[int]) -> list[int]:
        hashes = [b"%d" % key for key in keys]
        expected = []
        for content in hashes:
            if content not in self.content:
                break
            expected.append(self.content[content])
        found = self.pool.find(hashes)
        assert found == expected
        self.pool.reference(found)
        for block in found:
            self.references[block] += 1
        return found

    @rule(keys=st.lists(st.integers(0, 7), max_size=4))
    def withdraw(self, keys: list[int]) -> None:
        self.pool.withdraw([b"%d" % key for key in keys])
        self.content = {content: block for content, block in self.content.items() if int(content) not in keys}

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.pool.check_integrity(sum(self.references))
        assert self.pool.num_free == self.references.count(0)
        assert self.pool.num_used == NUM_BLOCKS - self.references.count(0)


TestBlockPoolMachine = BlockPoolMachine.TestCase
TestBlockPoolMachine.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)


def test_chain_hashes_cover_full_blocks_and_everything_before() -> None:
    tokens = list(range(11))
    hashes = chain_hashes(b"seed", tokens, 4)
    assert len(hashes) == 2
    assert chain_hashes(b"seed", tokens[:8], 4) == hashes
    assert chain_hashes(hashes[0], tokens[4:], 4) == hashes[1:], "a chain can be continued"
    changed = chain_hashes(b"seed", [99, *tokens[1:]], 4)
    assert changed[0] != hashes[0] and changed[1] != hashes[1]
    late = chain_hashes(b"seed", [*tokens[:7], 99], 4)
    assert late[0] == hashes[0] and late[1] != hashes[1]


def test_chain_hashes_do_not_run_numbers_together() -> None:
    assert chain_hashes(b"", [1, 23], 2) != chain_hashes(b"", [12, 3], 2)
    assert chain_hashes(b"1", [2], 1) != chain_hashes(b"", [12], 1)


def test_cache_seed_separates_whatever_shapes_the_cache() -> None:
    one, other = make_adapter(), make_adapter()
    requests = [
        make_request(),
        make_request(cache_salt="tenant"),
        make_request(cache_salt="tenant2"),
        make_request(adapters=(one,)),
        make_request(adapters=(other,)),
        make_request(adapters=(one,), scales=(0.5,)),
        make_request(adapters=(one,), cache_salt="tenant"),
        make_request(adapters=(one, other)),
        make_request(adapters=(one, other), scales=(0.25, 0.75)),
        make_request(adapters=(one, other), scales=(0.75, 0.25)),
    ]
    seeds = [request.generation.cache_seed for request in requests]
    assert len(set(seeds)) == len(seeds)


def test_cache_seed_is_that_of_the_sum_whatever_the_order() -> None:
    one, other = make_adapter(), make_adapter()
    there = make_request(adapters=(one, other), scales=(0.25, 0.75)).generation.cache_seed
    back = make_request(adapters=(other, one), scales=(0.75, 0.25)).generation.cache_seed
    assert there == back
