"""KV blocks: a fixed number of ids with reference counts, and a content-addressed prefix cache over full ones.

A block with no references keeps its content until it is handed out again, least recently freed first; until then a
request with the same prefix may take it back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

BlockHash = bytes


def chain_hashes(parent: bytes, token_ids: Sequence[int], block_size: int) -> list[BlockHash]:
    """Hashes of the full blocks of `token_ids`: h_i = H(h_(i-1) | tokens of block i), so each covers all before it.

    h_-1 is `parent`: the last hash before these tokens, or at the start whatever else shapes the keys and values.
    """
    hashes = []
    for begin in range(0, len(token_ids) - block_size + 1, block_size):
        block = ",".join(map(str, token_ids[begin : begin + block_size]))
        parent = blake2b(parent + b"|" + block.encode(), digest_size=16).digest()
        hashes.append(parent)
    return hashes


class BlockPool:
    """Hands out block ids. Callers hold references; `free` gives them back."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._num_references = [0] * num_blocks
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._block_of: dict[BlockHash, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks nobody references; their cached content may still be found."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks referenced by at least one request."""
        return self.num_blocks - len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks needed to hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Takes `num_blocks` blocks with one reference each and forgets their content; None if too few are free."""
        if num_blocks > len(self._free):
            return None
        blocks = [self._free.popitem(last=False)[0] for _ in range(num_blocks)]
        for block in blocks:
            self._forget_content(block)
            self._num_references[block] = 1
        return blocks

    def find(self, hashes: Sequence[BlockHash]) -> list[int]:
        """The longest run of cached blocks for `hashes`, without referencing them."""
        blocks = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def reference(self, blocks: Sequence[int]) -> None:
        """Adds one reference to each block found."""
        for block in blocks:
            self._free.pop(block, None)
            self._num_references[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Drops one reference to each block, the last one first, so that a prefix outlives its continuation."""
        for block in reversed(blocks):
            self._num_references[block] -= 1
            assert self._num_references[block] >= 0, f"block {block} is freed more often than referenced"
            if self._num_references[block] == 0:
                self._free[block] = None

    def publish(self, block: int, block_hash: BlockHash) -> None:
        """Makes the content of a full, computed block findable. The first block of a content stays the one found."""
        if block_hash not in self._block_of and self._hash_of[block] is None:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def withdraw(self, hashes: Iterable[BlockHash]) -> None:
        """Makes contents unfindable, whoever holds their blocks."""
        for block_hash in hashes:
            if block_hash in self._block_of:
                self._forget_content(self._block_of[block_hash])

    def check_integrity(self, num_references: int | None = None) -> None:
        """Asserts that free and referenced blocks partition the pool, and that there are `num_references` if given."""
        for block, references in enumerate(self._num_references):
            assert (references == 0) == (block in self._free), f"block {block} is neither free nor referenced"
        for block_hash, block in self._block_of.items():
            assert self._hash_of[block] == block_hash, "the prefix cache points at another content"
        if num_references is not None:
            assert sum(self._num_references) == num_references, "references do not add up"

    def _forget_content(self, block: int) -> None:
        block_hash = self._hash_of[block]
        if block_hash is not None:
            del self._block_of[block_hash]
            self._hash_of[block] = None
