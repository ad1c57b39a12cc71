"""The offline verifier: runs with nothing but cryptography, accepts what is whole, names the place of what is not."""

import asyncio
import base64
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audit import verify
from audit.transparency.checkpoint import Checkpoint, sign_checkpoint
from audit.transparency.entry import Entry
from audit.transparency.keyring import Keyring, load_keyring
from audit.transparency.log import request_erasure
from audit.transparency.merkle import leaf_hash, root_of
from tests.audit.conftest import ORIGIN, seeded
from tests.audit.world import START_NS, admitted, heartbeat, note, open_world, settled, violation

VERIFY = Path(verify.__file__)


def make_log(folder: Path, keyring: Keyring, *batches: list[Entry]) -> Path:
    """A published log in `folder`/log; each batch gets a checkpoint, kept as checkpoint-0, checkpoint-1 and so on."""

    async def scenario() -> None:
        async with open_world(f"sqlite+aiosqlite:///{folder / 'audit.db'}", keyring, folder / "log") as world:
            for i, batch in enumerate(batches):
                await world.land(*batch)
                shutil.copy(folder / "log" / "checkpoint", folder / f"checkpoint-{i}")

    asyncio.run(scenario())
    return folder / "log"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, keyring: Keyring) -> Path:
    """Six leaves: a request, a heartbeat, a note that is erased, and the receipt."""
    first = [admitted("req_1"), settled("req_1"), heartbeat("e", 10), note("erase me"), note("kept ü")]
    second = request_erasure([3], reason="asked", tenant_id="", now_ns=START_NS)
    return make_log(tmp_path_factory.mktemp("small"), keyring, first, second)


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "log"))


def failures(folder: Path, keyring: Keyring | None = None, since: Path | None = None) -> list[tuple[int, str]]:
    keys = keyring.log.vkeys() if keyring else []
    return verify.verify_log(str(folder), keys, str(since) if since else None).findings.failed


# ---------------------------------------------------------------- alone in the world


def test_it_runs_where_only_cryptography_can_be_imported(small: Path, tmp_path: Path, keyring: Keyring) -> None:
    only = tmp_path / "only"
    only.mkdir()
    for name in ("cryptography", "cffi", "_cffi_backend"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        origin = Path(spec.origin)
        target = origin.parent if origin.name == "__init__.py" else origin
        (only / target.name).symlink_to(target)
    script = tmp_path / "verify.py"  # the file alone, away from the project
    shutil.copy(VERIFY, script)
    prelude = (
        f"import sys, runpy; sys.path.append({str(only)!r}); sys.argv = sys.argv[1:]; "
        "import importlib.util as u; assert not any(map(u.find_spec, ['numpy', 'sqlalchemy', 'rfc8785', 'audit'])); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", "-S", "-c", prelude, str(script), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)

    whole = run("log", str(small), *(a for key in keyring.log.vkeys() for a in ("--key", key)))
    assert (whole.returncode, whole.stderr) == (0, "")
    assert "VERIFIED: 9 checks hold, 0 fail" in whole.stdout
    assert "5 openings match their commitments, 1 are erased with a receipt" in whole.stdout
    assert "not pinned" not in whole.stdout

    unpinned = run("log", str(small))
    assert unpinned.returncode == 0
    assert "is not pinned, it came with what it signs (trust on first use)" in unpinned.stdout

    broken = Path(shutil.copytree(small, tmp_path / "broken"))
    (broken / "tile" / "0" / "000.p" / "6").write_bytes(b"\0" * 192)
    failed = run("log", str(broken))
    assert failed.returncode == 1
    assert "FAIL  (4) tile/0/000.p/6: not the hashes of the level below" in failed.stdout

    assert run("log", str(tmp_path / "nowhere")).returncode == 2
    assert run("log").returncode == 2
    assert run("--help").returncode == 0


def test_the_steps_in_the_docstring_are_those_in_the_code() -> None:
    text = VERIFY.read_text("utf-8")
    docstring = text.split('"""')[1]
    numbers = [f"({i})" for i in range(1, 14)]
    assert all(number in docstring for number in numbers)
    assert all(f"# {number} " in text for number in numbers)
    assert "(14)" not in text


# ---------------------------------------------------------------- tampering


def all_files(folder: Path) -> list[Path]:
    # Partial tiles of the checkpoint before are kept for slow readers; nothing in this log refers to them any more.
    stale = {folder / "tile" / level / "000.p" / "5" for level in ("0", "entries")}
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path not in stale]


def test_every_edit_of_one_byte_is_rejected(copy: Path, keyring: Keyring) -> None:
    """All files but the long base64 of ML-DSA byte by byte, that one at every seventh; keys unpinned, so all count."""
    assert failures(copy) == []
    edits = 0
    for path in all_files(copy):
        whole = path.read_bytes()
        long_lines = path.name in ("checkpoint", "keys.json")
        for i in range(len(whole)):
            if (
                long_lines
                and i % 7
                and len(whole[:i].rpartition(b"\n")[2]) > 60
                and len(whole[i:].partition(b"\n")[0]) > 60
            ):
                continue
            edited = bytearray(whole)
            edited[i] ^= 1 << i % 8
            path.write_bytes(edited)
            assert failures(copy), f"{path.name}: byte {i} changed and nobody noticed"
            edits += 1
        path.write_bytes(whole)
    assert edits > 3_000


@pytest.mark.deep
@pytest.mark.timeout(1_800)
def test_every_edit_of_one_bit_is_rejected(copy: Path) -> None:
    for path in all_files(copy):
        whole = path.read_bytes()
        for i in range(len(whole) * 8):
            edited = bytearray(whole)
            edited[i // 8] ^= 1 << i % 8
            path.write_bytes(edited)
            assert failures(copy), f"{path.name}: bit {i} changed and nobody noticed"
        path.write_bytes(whole)


@given(data=st.data())
@settings(max_examples=60)
def test_any_cut_insertion_or_swap_in_a_file_is_rejected(small: Path, keyring: Keyring, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(all_files(small)))
    whole = path.read_bytes()
    i, j = sorted(data.draw(st.tuples(st.integers(0, len(whole)), st.integers(0, len(whole)))))
    kind = data.draw(st.sampled_from(["cut", "truncate", "insert", "double"]))
    edited = {
        "cut": whole[:i] + whole[j:],
        "truncate": whole[:i],
        "insert": whole[:i] + data.draw(st.binary(min_size=1, max_size=8)) + whole[i:],
        "double": whole[:j] + whole[i:j] + whole[j:],
    }[kind]
    if edited == whole or (path.name == "keys.json" and same_keys(edited, whole)):
        return
    try:
        path.write_bytes(edited)
        failed = failures(small)
        # A note may carry more signatures, by keys that the reader does not know; the log's own must still hold.
        assert failed or path.name == "checkpoint", f"{kind} {i}..{j} of {path.name}"
        if not failed:
            assert edited.startswith(whole.partition(b"\n\n")[0] + b"\n\n")
    finally:
        path.write_bytes(whole)


def same_keys(edited: bytes, whole: bytes) -> bool:
    """White space in keys.json, and keys that are lost but of no use for the log, are irrelevant."""
    try:
        return json.loads(edited)["log"] == json.loads(whole)["log"]  # type: ignore[no-any-return]
    except (ValueError, KeyError, TypeError):
        return False


def leaves_of(folder: Path, size: int = 6) -> list[bytes]:
    blob, leaves = (folder / "tile" / "entries" / "000.p" / str(size)).read_bytes(), []
    while blob:
        length = int.from_bytes(blob[:2], "big")
        leaves.append(blob[2 : 2 + length])
        blob = blob[2 + length :]
    return leaves


def rewrite(folder: Path, leaves: list[bytes], signer: Keyring | None = None) -> None:
    """What an attacker with the folder does: new entries and tiles; a checkpoint too, if they have a key."""
    shutil.rmtree(folder / "tile")
    size = len(leaves)
    for level, content in (
        ("entries", b"".join(len(x).to_bytes(2, "big") + x for x in leaves)),
        ("0", b"".join(map(leaf_hash, leaves))),
    ):
        path = folder / "tile" / level / "000.p" / str(size)
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    if signer is not None:
        head = Checkpoint(ORIGIN, size, root_of(map(leaf_hash, leaves)))
        (folder / "checkpoint").write_text(sign_checkpoint(head, signer.log, now_ns=START_NS), "utf-8")


EDITS: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "deleted": lambda x: x[:2] + x[3:],
    "truncated": lambda x: x[:-1],
    "reordered": lambda x: [x[1], x[0], *x[2:]],
    "doubled": lambda x: [*x, x[-1]],
    "replaced": lambda x: [x[0].replace(b'"at_ns":"1', b'"at_ns":"2'), *x[1:]],
    "emptied": lambda x: [],
}


@pytest.mark.parametrize("edit", EDITS)
def test_leaves_cannot_be_changed_without_the_key(copy: Path, keyring: Keyring, edit: str) -> None:
    rewrite(copy, EDITS[edit](leaves_of(copy)))
    assert [number for number, _ in failures(copy, keyring)] in ([3], [4])


@pytest.mark.parametrize("edit", EDITS)
def test_the_key_owner_cannot_rewrite_what_someone_remembers(
    copy: Path, small: Path, keyring: Keyring, edit: str
) -> None:
    shutil.rmtree(copy / "openings")
    rewrite(copy, EDITS[edit](leaves_of(copy)), keyring)
    remembered = small.parent / "checkpoint-1"
    found = failures(copy, keyring, remembered)
    if edit == "doubled":  # a leaf more is what logs do
        assert found == []
        return
    assert [number for number, _ in found] == [7]
    assert "history was rewritten" in found[0][1] or "cut back" in found[0][1]
    assert failures(copy, keyring) == []  # without memory there is nothing to hold against it, and the output says so
    assert any("rewritten" in x for x in verify.verify_log(str(copy), keyring.log.vkeys()).findings.not_proven)


def test_an_earlier_checkpoint_is_a_prefix(small: Path, keyring: Keyring) -> None:
    assert failures(small, keyring, small.parent / "checkpoint-0") == []
    with pytest.raises(verify.Unusable, match="No such file"):
        failures(small, keyring, small.parent / "nothing")


def test_a_forger_with_keys_of_their_own_is_seen_by_who_pinned_a_key(
    copy: Path, keyring: Keyring, tmp_path: Path
) -> None:
    forger = load_keyring(tmp_path / "forger", origin=ORIGIN, entropy=seeded(66))
    rewrite(copy, leaves_of(copy), forger)
    (copy / "keys.json").write_text(json.dumps(forger.public()))
    trusting = verify.verify_log(str(copy))
    assert trusting.findings.ok
    assert any("not pinned" in text for text in trusting.findings.not_proven)
    assert [number for number, _ in failures(copy, keyring)] == [2]

    elsewhere = load_keyring(tmp_path / "elsewhere", origin="other.example/log", entropy=seeded(67))
    head = Checkpoint("other.example/log", 6, root_of(map(leaf_hash, leaves_of(copy))))
    (copy / "checkpoint").write_text(sign_checkpoint(head, elsewhere.log, now_ns=START_NS), "utf-8")
    (copy / "keys.json").write_text(json.dumps(elsewhere.public()))
    assert [number for number, _ in failures(copy, keyring)] == [2]  # the pinned key of another log counts for nothing


def openings(folder: Path) -> list[str]:
    return (folder / "openings" / "000.jsonl").read_text("utf-8").splitlines(keepends=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[1:], "opening is missing and no receipt"),
        (lambda x: [x[1], x[0], *x[2:]], "out of order"),
        (lambda x: [x[0], x[0], *x[1:]], "out of order"),
        (lambda x: [swap(x[0], x[1]), swap(x[1], x[0]), *x[2:]], "does not open the commitment of leaf 0"),
        (lambda x: [x[0].replace('"hold_nano_usd":"1000"', '"hold_nano_usd":"9000"'), *x[1:]], "does not open"),
        (lambda x: [x[0].replace('{"body"', '{ "body"'), *x[1:]], "canonical"),
        (lambda x: x[:-1], "no receipt says that it was erased"),
        (lambda x: ["[]\n", *x], "not an opening"),
    ],
)
def test_openings_cannot_be_changed(
    copy: Path, keyring: Keyring, change: Callable[[list[str]], list[str]], message: str
) -> None:
    changed = change(openings(copy))
    (copy / "openings" / "000.jsonl").write_text("".join(changed), "utf-8")
    ((number, text),) = failures(copy, keyring)
    assert number == 6
    assert message in text


def swap(line: str, other: str) -> str:
    """The content of one opening under the index of another."""
    return verify.canonical({**json.loads(other), "index": json.loads(line)["index"]}).decode() + "\n"


def test_without_openings_nothing_is_said_about_content(copy: Path, keyring: Keyring) -> None:
    shutil.rmtree(copy / "openings")
    findings = verify.verify_log(str(copy), keyring.log.vkeys()).findings
    assert findings.ok
    assert any("any content" in text for text in findings.not_proven)


# ---------------------------------------------------------------- what the log must not say


@pytest.mark.parametrize(
    ("entries", "number", "message"),
    [
        ([admitted("r"), settled("r"), settled("r")], 8, "leaf 2 (request r): settled twice, first at leaf 1"),
        ([settled("r")], 8, "leaf 0 (request r): settled but never admitted"),
        ([settled("r"), admitted("r")], 8, "never admitted"),
        ([admitted("r"), admitted("r")], 8, "leaf 1 (request r): admitted twice"),
        ([admitted("r", hold=499), settled("r")], 8, "charges 500 nano-USD, above its hold of 499"),
        ([admitted("r"), settled("r", tenant_id="ten_b")], 8, "another tenant"),
        ([admitted("r"), settled("r", outcome="voided")], 8, "voided, but 500 nano-USD are charged"),
        ([admitted("r"), settled("r", outcome="expired")], 8, "expired, but 500"),
        ([admitted("r"), settled("r", num_cached_tokens=11)], 8, "more cached than prompt"),
        ([heartbeat("e", 10), heartbeat("e", 9)], 9, "leaf 1: num_steps of epoch e fell since leaf 0"),
    ],
)
def test_contradictions_in_the_entries_are_found(
    tmp_path: Path, keyring: Keyring, entries: list[Entry], number: int, message: str
) -> None:
    ((found, text),) = failures(make_log(tmp_path, keyring, entries), keyring)
    assert found == number
    assert message in text


def test_violations_are_noted_but_are_no_failure(
    tmp_path: Path, keyring: Keyring, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_log(tmp_path, keyring, [violation("e"), heartbeat("e", 5, num_violations=1)])
    assert verify.main(["log", str(folder)]) == 0
    assert "ISOLATION VIOLATIONS: 1 logged, 1 counted by the auditor" in capsys.readouterr().out


def test_an_unknown_kind_or_version_is_a_failure(copy: Path, keyring: Keyring) -> None:
    for old, new in ((b'"audit.heartbeat"', b'"audit.headbeats"'), (b'"v":1', b'"v":2')):
        leaves = [leaf.replace(old, new) for leaf in leaves_of(copy)]
        rewrite(copy, leaves, keyring)
        ((number, text),) = failures(copy, keyring)
        assert number == 5
        assert "is unknown to this verifier" in text
        rewrite(copy, [leaf.replace(new, old) for leaf in leaves], keyring)


def test_a_body_that_does_not_fit_its_kind_is_a_failure(copy: Path, keyring: Keyring) -> None:
    """Signed, hashed and opened rightly, and still not an entry: made as a broken writer would."""
    nonce, body = b"\5" * 32, b'{"reason":7}'
    commitment = verify.hmac.new(nonce, b"bulkhead/commitment/v1\0" + body, hashlib.sha256).hexdigest()
    leaf = {"at_ns": "1", "commitment": commitment, "kind": "gateway.stopped", "tenant": "", "v": 1}
    rewrite(copy, [verify.canonical(leaf)], keyring)
    line = b'{"body":%b,"index":0,"nonce":"%b"}\n' % (body, nonce.hex().encode())
    (copy / "openings" / "000.jsonl").write_bytes(line)
    ((number, text),) = failures(copy, keyring)
    assert number == 6
    assert "leaf 0 (gateway.stopped): reason has the wrong type" in text


def test_a_growing_log_can_be_read_while_it_is_published(tmp_path: Path, keyring: Keyring) -> None:
    """A reader with the checkpoint before finds its tiles still there."""
    folder = make_log(tmp_path, keyring, [note("a")] * 255, [note("b")])
    shutil.copy(tmp_path / "checkpoint-0", folder / "checkpoint")
    found = failures(folder, keyring)
    assert found == []


def test_signature_lines_of_witnesses_are_ignored(copy: Path, keyring: Keyring) -> None:
    line = "— witness.example/w1 " + base64.b64encode(b"\1\2\3\4" + b"s" * 72).decode() + "\n"
    with (copy / "checkpoint").open("a", encoding="utf-8") as file:
        file.write(line)
    assert failures(copy, keyring) == []
