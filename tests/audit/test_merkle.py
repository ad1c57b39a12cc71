"""The tree against the RFC's own recursive definition, known roots, and every wrong proof we can think of."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit import verify
from audit.transparency.merkle import (
    Frontier,
    ProofError,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    root_of,
    subtree_hash_of,
    verify_consistency,
    verify_inclusion,
)

# The eight leaves and the roots of their first n, as used by the tests of Certificate Transparency implementations.
CT_LEAVES = [
    bytes.fromhex(x)
    for x in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
CT_ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def naive_root(leaves: list[bytes]) -> bytes:
    """MTH of RFC 6962 section 2.1, word for word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return hashlib.sha256(b"\1" + naive_root(leaves[:k]) + naive_root(leaves[k:])).digest()


def tree(size: int) -> tuple[list[bytes], list[bytes]]:
    leaves = [b"leaf %d" % i for i in range(size)]
    return leaves, [leaf_hash(leaf) for leaf in leaves]


@pytest.mark.parametrize("size", range(9))
def test_known_roots(size: int) -> None:
    hashes = [leaf_hash(leaf) for leaf in CT_LEAVES[:size]]
    assert root_of(hashes).hex() == CT_ROOTS[size]
    assert verify._root(hashes).hex() == CT_ROOTS[size]


@given(st.integers(0, 600))
def test_roots_equal_the_definition(size: int) -> None:
    leaves, hashes = tree(size)
    assert root_of(hashes) == naive_root(leaves) == verify._root(hashes)


@given(st.integers(0, 300), st.integers(0, 300))
def test_a_frontier_goes_on_where_it_was_saved(first: int, more: int) -> None:
    leaves, hashes = tree(first + more)
    frontier = Frontier(0, [])
    for hashed in hashes[:first]:
        frontier.append(hashed)
    frontier = Frontier.load(first, frontier.dump())
    for hashed in hashes[first:]:
        frontier.append(hashed)
    assert frontier.root() == naive_root(leaves)


@pytest.mark.parametrize(("size", "blob"), [(1, b""), (3, b"x" * 32), (0, b"x" * 32), (1, b"x" * 31)])
def test_a_frontier_of_the_wrong_length_is_refused(size: int, blob: bytes) -> None:
    with pytest.raises(ValueError, match="frontier"):
        Frontier.load(size, blob)


@given(st.data())
def test_inclusion_proofs_hold_and_nothing_near_them_does(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 200))
    index = data.draw(st.integers(0, size - 1))
    _, hashes = tree(size)
    root = root_of(hashes)
    proof = inclusion_proof(index, size, subtree_hash_of(hashes))
    verify_inclusion(index, size, hashes[index], proof, root)

    wrong = data.draw(st.sampled_from(["flip", "drop", "extra", "index", "leaf", "root", "size"]))
    index_given, size_given, leaf, root_given = index, size, hashes[index], root
    if wrong == "flip":
        if not proof:
            return
        proof = flipped(data, proof)
    elif wrong == "drop":
        if not proof:
            return
        del proof[data.draw(st.integers(0, len(proof) - 1))]
    elif wrong == "extra":
        proof.insert(data.draw(st.integers(0, len(proof))), b"\7" * 32)
    elif wrong == "index":
        index_given = data.draw(st.integers(-1, size).filter(lambda i: i != index))
    elif wrong == "leaf":
        leaf = flipped(data, [leaf])[0]
    elif wrong == "root":
        root_given = flipped(data, [root])[0]
    elif wrong == "size":  # a size with another path shape: more or fewer levels
        size_given = size * 2 + 1
    with pytest.raises(ProofError):
        verify_inclusion(index_given, size_given, leaf, proof, root_given)


@given(st.data())
def test_consistency_proofs_hold_and_nothing_near_them_does(data: st.DataObject) -> None:
    new = data.draw(st.integers(1, 200))
    old = data.draw(st.integers(1, new))
    _, hashes = tree(new)
    old_root, new_root = root_of(hashes[:old]), root_of(hashes)
    proof = consistency_proof(old, new, subtree_hash_of(hashes))
    verify_consistency(old, new, old_root, new_root, proof)

    wrong = data.draw(st.sampled_from(["flip", "drop", "extra", "old_root", "new_root", "rewritten"]))
    if wrong in ("flip", "drop"):
        if not proof:
            return
        proof = flipped(data, proof) if wrong == "flip" else proof[:-1]
    elif wrong == "extra":
        proof = [*proof, b"\7" * 32]
    elif wrong == "old_root":
        old_root = flipped(data, [old_root])[0]
    elif wrong == "new_root":
        new_root = flipped(data, [new_root])[0]
    else:
        rewritten = list(hashes)
        rewritten[data.draw(st.integers(0, old - 1))] = b"\7" * 32
        new_root = root_of(rewritten)
        proof = consistency_proof(old, new, subtree_hash_of(rewritten))
    with pytest.raises(ProofError):
        verify_consistency(old, new, old_root, new_root, proof)


@pytest.mark.parametrize(("old", "new"), [(0, 1), (2, 1), (-1, 1)])
def test_no_consistency_without_an_older_tree(old: int, new: int) -> None:
    with pytest.raises(ValueError, match="no consistency"):
        consistency_proof(old, new, subtree_hash_of([]))
    with pytest.raises(ProofError):
        verify_consistency(old, new, b"", b"", [])


def flipped(data: st.DataObject, hashes: list[bytes]) -> list[bytes]:
    """One bit of one hash turned."""
    at, bit = data.draw(st.integers(0, len(hashes) - 1)), data.draw(st.integers(0, 255))
    changed = bytearray(hashes[at])
    changed[bit // 8] ^= 1 << bit % 8
    return [*hashes[:at], bytes(changed), *hashes[at + 1 :]]
