"""Names of prefixes: no two different contents have one encoding, and every part counts."""

from hypothesis import given
from hypothesis import strategies as st

from engine.cache.prefix_key import Part, block_key, encode, root_key

PARTS = st.lists(st.tuples(st.sampled_from(Part), st.binary(max_size=12)), max_size=5)
ROOTS = st.fixed_dictionaries(
    {"domain": st.text(max_size=6), "cache_salt": st.binary(max_size=6), "model_digest": st.text(max_size=6)}
)
TOKENS = st.lists(st.integers(0, 2**31), max_size=6)


def parse(data: bytes) -> list[tuple[Part, bytes]]:
    """The inverse; that it exists is what injective means."""
    parts = []
    while data:
        length = int.from_bytes(data[1:9], "big")
        parts.append((Part(data[:1]), data[9 : 9 + length]))
        data = data[9 + length :]
    return parts


@given(PARTS)
def test_what_was_encoded_can_be_read_back(parts: list[tuple[Part, bytes]]) -> None:
    assert parse(encode(parts)) == parts


@given(data=st.binary(max_size=12), first=st.integers(0, 12), second=st.integers(0, 12))
def test_bytes_never_move_from_one_part_to_the_next(data: bytes, first: int, second: int) -> None:
    def cut(at: int) -> bytes:
        return encode([(Part.DOMAIN, data[:at]), (Part.CACHE_SALT, data[at:])])

    assert (cut(first) == cut(second)) == (data[:first] == data[:second])


@given(PARTS, st.binary(max_size=30))
def test_no_content_passes_for_parts(parts: list[tuple[Part, bytes]], content: bytes) -> None:
    assert encode([(Part.TOKENS, encode(parts) + content)]) != encode(parts)


@given(ROOTS, ROOTS)
def test_domain_salt_and_model_are_all_in_the_root(first: dict[str, str], second: dict[str, str]) -> None:
    assert (root_key(**first) == root_key(**second)) == (first == second)  # type: ignore[arg-type]


@given(TOKENS, TOKENS, st.binary(max_size=4), st.binary(max_size=4))
def test_a_block_is_named_by_its_parent_and_its_tokens(a: list[int], b: list[int], p: bytes, q: bytes) -> None:
    assert (block_key(p, a) == block_key(q, b)) == ((p, a) == (q, b))


def test_names_stay_what_they_are() -> None:
    root = root_key(domain="tenant", cache_salt=b"salt", model_digest="digest")
    assert root.hex() == "2d9150dd57cd119b3ebd1e7d9a729d661b1ca19b3f357f996071d2fa8faac3fa"
    assert block_key(root, [1, 2, 3]).hex() == "15bbd53b60f05c0fd94700985927ddf8d8cf3c892106f187f4df13ac9d7f7e12"
