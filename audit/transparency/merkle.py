"""The Merkle tree of RFC 6962 and RFC 9162: hashes, roots, inclusion and consistency proofs.

Theory in four lines. MTH(D) of n leaves splits at k, the largest power of two below n; so every tree is a left-to-right
row of perfect subtrees, one per set bit of n. A Frontier keeps the roots of that row: appending a leaf is adding one
to a binary number, where each carry hashes two equal subtrees into one. It costs O(1) amortised and O(log n) memory,
and the tree's root is the row folded from the right.

    n = 7:   [0..4) [4..6) [6..7)      root = H(a, H(b, c))

Proof verification follows RFC 9162 sections 2.1.3.2 and 2.1.4.2 to the letter.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()

SubtreeHash = Callable[[int, int], bytes]  # (begin, end) -> MTH(D[begin:end])


class ProofError(ValueError):
    """The proof does not prove what it is presented for."""


def leaf_hash(leaf: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


@dataclass(slots=True)
class Frontier:
    """The perfect subtrees of the first `size` leaves, left to right, and so the root of any log in O(log n) memory."""

    size: int
    hashes: list[bytes]

    @classmethod
    def load(cls, size: int, blob: bytes) -> "Frontier":
        hashes = [blob[i : i + HASH_BYTES] for i in range(0, len(blob), HASH_BYTES)]
        if len(blob) % HASH_BYTES or len(hashes) != size.bit_count():
            raise ValueError(f"a frontier of {size} leaves has {size.bit_count()} hashes, not {len(blob)} bytes")
        return cls(size, hashes)

    def dump(self) -> bytes:
        return b"".join(self.hashes)

    def append(self, hashed_leaf: bytes) -> None:
        carry, bits = hashed_leaf, self.size
        while bits & 1:
            carry = node_hash(self.hashes.pop(), carry)
            bits >>= 1
        self.hashes.append(carry)
        self.size += 1

    def root(self) -> bytes:
        if not self.hashes:
            return EMPTY_ROOT
        root = self.hashes[-1]
        for left in reversed(self.hashes[:-1]):
            root = node_hash(left, root)
        return root


def root_of(leaf_hashes: Iterable[bytes]) -> bytes:
    """MTH over hashes that are already leaf (or perfect subtree) hashes."""
    frontier = Frontier(0, [])
    for hashed in leaf_hashes:
        frontier.append(hashed)
    return frontier.root()


def subtree_hash_of(leaf_hashes: Sequence[bytes]) -> SubtreeHash:
    """A SubtreeHash over hashes in memory."""
    return lambda begin, end: root_of(leaf_hashes[begin:end])


def inclusion_proof(index: int, size: int, subtree: SubtreeHash) -> list[bytes]:
    """PATH(index, D[size]) of RFC 9162 section 2.1.3.1, from the leaf upwards."""
    if not 0 <= index < size:
        raise ValueError(f"no leaf {index} in a tree of {size}")
    begin, end, path = 0, size, []
    while end - begin > 1:
        middle = begin + _split(end - begin)
        if index < middle:
            path.append(subtree(middle, end))
            end = middle
        else:
            path.append(subtree(begin, middle))
            begin = middle
    return path[::-1]


def verify_inclusion(index: int, size: int, hashed_leaf: bytes, proof: Sequence[bytes], root: bytes) -> None:
    """RFC 9162 section 2.1.3.2. Raises ProofError unless the leaf is at `index` of the tree with this root."""
    if not 0 <= index < size:
        raise ProofError(f"no leaf {index} in a tree of {size}")
    fn, sn, r = index, size - 1, hashed_leaf
    for p in proof:
        if sn == 0:
            raise ProofError("the inclusion proof is too long")
        if fn & 1 or fn == sn:
            r = node_hash(p, r)
            while not fn & 1 and fn:
                fn >>= 1
                sn >>= 1
        else:
            r = node_hash(r, p)
        fn >>= 1
        sn >>= 1
    if sn or r != root:
        raise ProofError(f"leaf {index} is not in the tree of {size} leaves with this root")


def consistency_proof(old_size: int, new_size: int, subtree: SubtreeHash) -> list[bytes]:
    """PROOF(old_size, D[new_size]) of RFC 9162 section 2.1.4.1. Empty when the sizes are equal."""
    if not 0 < old_size <= new_size:
        raise ValueError(f"no consistency proof from {old_size} to {new_size} leaves")
    begin, end, whole, path = 0, new_size, True, []
    while old_size != end:
        middle = begin + _split(end - begin)
        if old_size <= middle:
            path.append(subtree(middle, end))
            end = middle
        else:
            path.append(subtree(begin, middle))
            begin, whole = middle, False
    if not whole:
        path.append(subtree(begin, end))
    return path[::-1]


def verify_consistency(old_size: int, new_size: int, old_root: bytes, new_root: bytes, proof: Sequence[bytes]) -> None:
    """RFC 9162 section 2.1.4.2. Raises ProofError unless the old tree is a prefix of the new one."""
    if not 0 < old_size <= new_size:
        raise ProofError(f"no consistency from {old_size} to {new_size} leaves")
    if old_size == new_size:
        if proof or old_root != new_root:
            raise ProofError("two trees of one size must have one root and an empty proof")
        return
    path = [old_root, *proof] if old_size.bit_count() == 1 else list(proof)
    if not path:
        raise ProofError("the consistency proof is empty")
    fn, sn = old_size - 1, new_size - 1
    while fn & 1:
        fn >>= 1
        sn >>= 1
    fr = sr = path[0]
    for c in path[1:]:
        if sn == 0:
            raise ProofError("the consistency proof is too long")
        if fn & 1 or fn == sn:
            fr, sr = node_hash(c, fr), node_hash(c, sr)
            while not fn & 1 and fn:
                fn >>= 1
                sn >>= 1
        else:
            sr = node_hash(sr, c)
        fn >>= 1
        sn >>= 1
    if sn or fr != old_root or sr != new_root:
        raise ProofError(f"the tree of {new_size} leaves does not extend the tree of {old_size}")


def _split(size: int) -> int:
    """The largest power of two below `size` (size > 1)."""
    return 1 << ((size - 1).bit_length() - 1)
