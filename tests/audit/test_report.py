"""The report: figures that an independent count confirms, a signature over them, and pages that say the same."""

import asyncio
import base64
import io
import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pypdf
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from audit import verify
from audit.reports import dsse, wording
from audit.reports.figures import COVERAGE_KINDS, OpenLeaf, Scope, count_figures
from audit.reports.report import Report, ReportError, build_report, plain, sign_report, write_report
from audit.reports.report_pdf import render_pdf, usd
from audit.transparency.entry import Entry
from audit.transparency.keyring import Keyring, load_keyring
from audit.transparency.log import request_erasure
from tests.audit.conftest import ORIGIN, seeded
from tests.audit.test_verify import make_log
from tests.audit.world import (
    SECOND_NS,
    START_NS,
    admitted,
    heartbeat,
    note,
    open_world,
    settled,
    violation,
    worker_started,
)

GAP_NS = 30 * SECOND_NS


def at(second: int) -> int:
    return START_NS + second * SECOND_NS


granted = {"transfer_id": "t", "memo": "m", "amount_nano_usd": 10**12, "credit_kind": "paid", "expires_ns": 0}


def refunded(amount: int, now_ns: int, tenant_id: str = "ten_a") -> Entry:
    body = {"transfer_id": "r", "request_id": "r", "reason": "", "amount_nano_usd": amount}
    return Entry("credit.refunded", tenant_id, now_ns, body)


def expired(amount: int, now_ns: int, tenant_id: str = "ten_a") -> Entry:
    body = {"transfer_id": "t", "credit_kind": "paid", "amount_nano_usd": amount, "expires_ns": now_ns}
    return Entry("credit.expired", tenant_id, now_ns, body)


def adjusted(direction: str, amount: int, now_ns: int, tenant_id: str = "ten_a") -> Entry:
    body = {"transfer_id": "a", "corrects_id": "", "reason": "", "direction": direction, "amount_nano_usd": amount}
    return Entry("credit.adjusted", tenant_id, now_ns, body)


def an_hour() -> list[Entry]:
    """Two tenants, a worker that is lost and comes back, one violation, ten silent minutes, and noise outside."""
    entries = [
        Entry("gateway.started", "", at(-100), {"version": "1"}),
        worker_started("e1", at(-90)),
        heartbeat("e1", 100, at(-10)),
        admitted("early", at(-5)),
        settled("early", at(5), amount=11),
    ]
    for i in range(40):
        tenant = f"ten_{'ab'[i % 2]}"
        entries += [
            admitted(f"r{i}", at(20 * i), tenant),
            settled(f"r{i}", at(20 * i + 1), tenant, amount=100 + i, outcome="captured" if i % 5 else "recovered"),
            heartbeat("e1", 100 + 10 * (i + 1), at(20 * i + 2)),
        ]
    entries += [
        violation("e1", at(790), "ten_b"),
        Entry("worker.lost", "", at(800), {"epoch": "e1", "reason": "killed"}),
        worker_started("e2", at(810)),
        heartbeat("e2", 7, at(815), num_violations=1),
        heartbeat("e2", 9, at(1415), num_violations=1),
        heartbeat("e2", 12, at(1425), num_violations=1, ok=False),
        admitted("open", at(1426)),
        settled("voided", at(1427), amount=0, outcome="voided"),
        Entry("credit.granted", "ten_a", at(1428), granted),
        refunded(77, at(1428)),
        expired(3, at(1428)),
        adjusted("give", 5, at(1428)),
        adjusted("take", 9, at(1428)),
        Entry("operator.login_failed", "", at(1429), {"name": ""}),
        Entry("gateway.stopped", "", at(1430), {"reason": "SIGTERM"}),
        note("after the period", at(4_000)),
    ]
    entries.insert(len(entries) - 3, admitted("voided", at(1426)))
    return sorted(entries, key=lambda e: e.at_ns)


async def report_of(world: Any, **changes: Any) -> Report:
    arguments: dict[str, Any] = {
        "signer": world.keyring,
        "now_ns": at(5_000),
        "heartbeat_gap_max_ns": GAP_NS,
        "tenant_names": {"ten_a": "acme", "ten_b": "globex"},
        "exclusions": ["Prefix caching is off."],
    } | changes
    async with world.database.read() as conn:
        return await build_report(conn, at(0), at(3_600), **arguments)


@pytest.fixture(scope="module")
def hour(tmp_path_factory: pytest.TempPathFactory, keyring: Keyring) -> tuple[Path, Report]:
    """The log folder of that hour, and its report."""
    folder = tmp_path_factory.mktemp("hour")
    make_log(folder, keyring, an_hour())

    async def scenario() -> Report:
        async with open_world(f"sqlite+aiosqlite:///{folder / 'audit.db'}", keyring, folder / "log") as world:
            return await report_of(world)

    return folder / "log", asyncio.run(scenario())


def test_the_figures_are_those_one_counts_by_hand(hour: tuple[Path, Report]) -> None:
    figures = hour[1].figures
    inside = [e for e in an_hour() if at(0) <= e.at_ns < at(3_600)]
    requests = [e.body for e in inside if e.kind == "request.settled"]
    assert figures.requests.num_settled == len(requests) == 42
    assert figures.requests.num_admitted == 42
    assert figures.requests.open == 1
    assert (figures.requests.captured, figures.requests.recovered, figures.requests.voided) == (33, 8, 1)
    assert figures.requests.num_prompt_tokens == 420
    assert figures.requests.num_completion_tokens == 294
    assert figures.money.charged_nano_usd == 11 + sum(100 + i for i in range(40))
    assert figures.money.granted_nano_usd == 10**12
    money = figures.money
    assert (money.refunded_nano_usd, money.adjusted_nano_usd, money.expired_nano_usd) == (77, -4, 3)
    assert sorted(t.refunded_nano_usd for t in figures.tenants) == [0, 77]
    assert [t.num_settled for t in sorted(figures.tenants, key=lambda t: t.num_settled)] == [20, 22]
    coverage = figures.coverage
    assert (coverage.num_epochs, coverage.num_heartbeats) == (2, 43)
    assert coverage.num_steps == (500 - 100) + 12
    assert coverage.num_slots_checked == 3 * coverage.num_steps
    assert [(g.from_ns, g.until_ns, g.reason) for g in coverage.gaps] == [
        (at(815), at(1415), "no_heartbeat"),
        (at(1415), at(1425), "self_test_failed"),
    ]
    assert coverage.blind_ns == 610 * SECOND_NS
    assert coverage.worker_up_ns == (800 + 620) * SECOND_NS
    assert coverage.isolation_modes == ["relaxed"]
    assert (figures.leaves.in_log, figures.leaves.in_period) == (len(an_hour()), len(inside))
    assert (figures.access.logins_failed, figures.access.logins) == (1, 0)
    assert [i.rule for i in figures.incidents] == ["foreign_block"]
    assert figures.verdict == "violations"


def test_the_result_says_what_happened_in_plain_words(hour: tuple[Path, Report]) -> None:
    result = hour[1].result
    assert "settled 42 requests for 2 tenants" in result
    assert "found 1 violation of isolation" in result
    assert "for that time this report is blind" in result
    assert "10 min 10 s of the 23 min 40 s" in result
    assert "relaxed mode" in result
    assert "not promised" in result
    assert all(control.status in ("supports", "not assessed") for control in hour[1].controls)
    assert not any("satisf" in str(part) for part in (result, hour[1].controls, wording.LIMITS))


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        ({"bitwise"}, "ran in bitwise mode: by its own statement"),
        ({"relaxed"}, " Isolation ran in relaxed mode"),
        ({"bitwise", "relaxed"}, "For a part of this period: isolation ran in relaxed mode"),
    ],
)
def test_the_words_on_bitwise_isolation_follow_the_log(modes: set[str], expected: str) -> None:
    words = wording._promised(frozenset(modes))
    assert expected in words
    assert ("bitwise mode" in words) == (modes == {"bitwise"})
    assert wording._promised(frozenset()) == ""


# ---------------------------------------------------------------- two counts of one history


@st.composite
def histories(draw: st.DrawFn) -> list[Entry]:
    """Any order of what workers, requests and heartbeats can do, also orders that should not happen."""
    now, steps = -60, 0
    entries = []
    for number in range(draw(st.integers(0, 30))):
        now += draw(st.sampled_from([0, 1, 5, 29, 30, 31, 70]))
        steps += draw(st.integers(0, 9))
        entries.append(draw(happenings(at(now), steps, number)))
    return entries


def happenings(now_ns: int, steps: int, number: int) -> st.SearchStrategy[Entry]:
    epochs, now = st.sampled_from(["e1", "e2"]), st.just(now_ns)
    tenants, requests = st.sampled_from(["", "ten_a", "ten_b"]), st.integers(0, number).map(lambda n: f"r{n}")
    return st.one_of(
        st.builds(worker_started, epochs, now, st.sampled_from(["relaxed", "strict"])),
        epochs.map(lambda epoch: Entry("worker.lost", "", now_ns, {"epoch": epoch, "reason": ""})),
        st.just(Entry("gateway.stopped", "", now_ns, {"reason": ""})),
        st.just(Entry("gateway.started", "", now_ns, {"version": ""})),
        st.builds(heartbeat, epochs, st.just(steps), now, num_violations=st.integers(0, 1), ok=st.booleans()),
        st.builds(heartbeat, epochs, st.just(steps), now),
        st.builds(admitted, requests, now, tenants),
        st.builds(settled, requests, now, tenants, st.just(number)),
        st.builds(violation, epochs, now),
        st.builds(expired, st.just(number), now, tenants),
        st.builds(refunded, st.just(number), now, tenants),
        st.builds(adjusted, st.sampled_from(["give", "take"]), st.just(number), now, tenants),
    )


@example(entries=[worker_started("e1", at(0)), heartbeat("e1", 5, at(70), ok=False)], erased=set(), until=400)
@example(entries=[worker_started("e1", at(0)), heartbeat("e1", 0, at(5)), settled("r", at(6))], erased=set(), until=400)
@given(entries=histories(), erased=st.sets(st.integers(0, 29)), until=st.integers(1, 400))
def test_the_verifier_counts_the_same_by_its_own_rules(entries: list[Entry], erased: set[int], until: int) -> None:
    scope = Scope(at(0), at(until), GAP_NS)
    read = [
        OpenLeaf(i, e.kind, e.at_ns, e.tenant_id, None if i in erased else json.loads(e.canonical_body()))
        for i, e in enumerate(entries)
    ]
    period = [leaf for leaf in read if scope.since_ns <= leaf.at_ns < scope.until_ns]
    ours = count_figures(
        period,
        [leaf for leaf in read if leaf.kind in COVERAGE_KINDS and leaf.at_ns < scope.until_ns],
        frozenset(x.body["request_id"] for x in read if x.kind == "request.settled" and x.body is not None),
        num_leaves=len(read),
        last_entry_ns=max((leaf.at_ns for leaf in read), default=scope.since_ns),
        scope=scope,
    )
    leaves = [
        verify.Leaf(x.leaf_index, x.kind, 1, x.at_ns, x.tenant, "", None if x.body is None else dict(x.body))
        for x in read
    ]
    theirs = verify.count_figures(leaves, plain(asdict(scope)))
    assert plain(asdict(ours)) == theirs
    assert 0 <= ours.coverage.blind_ns <= max(0, ours.coverage.worker_up_ns)
    assert wording.result(ours, scope)
    assert wording.controls(ours)


# ---------------------------------------------------------------- signed, verified, tampered with


def written(hour: tuple[Path, Report], keyring: Keyring, folder: Path) -> Path:
    return write_report(hour[1], folder, "report", signer=keyring).dsse_path


def keys_of(keyring: Keyring) -> list[str]:
    return [text for texts in keyring.public().values() for text in texts]


def failed(path: Path, log: Path | None, keyring: Keyring | None) -> list[tuple[int, str]]:
    return verify.verify_report(str(path), str(log) if log else None, keys_of(keyring) if keyring else []).failed


def test_a_report_verifies_and_every_figure_is_counted_again(
    hour: tuple[Path, Report], keyring: Keyring, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(hour, keyring, tmp_path)
    pinned = [part for key in keys_of(keyring) for part in ("--key", key)]
    assert verify.main(["report", str(path), "--log", str(hour[0]), *pinned]) == 0
    output = capsys.readouterr().out
    assert re.search(r"\(13\) \d\d figures counted again from the log, all equal", output)
    assert "not pinned" not in output
    assert "VERIFIED: 4 checks hold" in output

    assert verify.main(["report", str(path)]) == 0
    output = capsys.readouterr().out
    assert "every figure in the report: pass --log" in output
    assert "is not pinned" in output
    assert verify.main(["report", str(tmp_path / "nothing.json")]) == 2


def test_a_report_still_verifies_when_the_log_has_grown(keyring: Keyring, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_world(f"sqlite+aiosqlite:///{tmp_path / 'audit.db'}", keyring, tmp_path / "log") as world:
            await world.land(*an_hour())
            path = write_report(await report_of(world), tmp_path, "report", signer=keyring).dsse_path
            await world.land(*(note(str(i), at(100)) for i in range(300)))
            assert failed(path, world.folder, keyring) == []
            await world.land(*request_erasure([6], reason="asked", tenant_id="", now_ns=at(6_000)))
            findings = verify.verify_report(str(path), str(world.folder), keys_of(keyring))
            assert findings.ok
            assert any("1 leaves were erased after the report" in text for text in findings.not_proven)

    asyncio.run(scenario())


def test_a_report_of_another_log_is_refused(hour: tuple[Path, Report], keyring: Keyring, tmp_path: Path) -> None:
    path = written(hour, keyring, tmp_path)
    other = make_log(tmp_path, keyring, [*an_hour()[:-1], note("another end")])
    ((number, text),) = failed(path, other, keyring)
    assert number == 12
    assert "history was rewritten" in text


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [p for key, item in value.items() for p in paths_of(item, (*path, key))]
    if isinstance(value, list):
        return [p for i, item in enumerate(value) for p in paths_of(item, (*path, i))]
    return [path]


def resigned(statement: dict[str, Any], keyring: Keyring, path: Path) -> Path:
    payload = json.dumps(statement, sort_keys=True).encode()
    path.write_bytes(dsse.sign_envelope(payload, keyring.report))
    return path


def test_any_wrong_figure_is_found_even_when_the_issuer_signs_it(
    hour: tuple[Path, Report], keyring: Keyring, tmp_path: Path
) -> None:
    statement = hour[1].statement()
    places = paths_of(statement["predicate"]["figures"])
    assert len(places) > 60
    for place in places:
        changed = json.loads(json.dumps(statement))
        holder = changed["predicate"]["figures"]
        for key in place[:-1]:
            holder = holder[key]
        value = holder[place[-1]]
        holder[place[-1]] = value + 1 if isinstance(value, int) else value + "1"
        ((number, text),) = failed(resigned(changed, keyring, tmp_path / "r.json"), hour[0], keyring)
        assert number == 13
        assert str(place[-1] if isinstance(place[-1], str) else place[-2]) in text
        assert "the report says" in text


@pytest.mark.parametrize(
    ("change", "number"),
    [
        (lambda s: s["subject"][0]["digest"].update(sha256="0" * 64), 11),
        (lambda s: s["subject"][0].update(name="other@1"), 11),
        (lambda s: s["predicate"]["log"].update(num_leaves=1), 11),
        (lambda s: s["predicate"]["log"].update(checkpoint="none"), 11),
        (lambda s: s["predicate"]["scope"].update(until_ns=str(at(100))), 13),
        (lambda s: s["predicate"]["scope"].update(heartbeat_gap_max_ns=str(10**15)), 13),
        (lambda s: s["predicate"]["scope"].pop("since_ns"), 13),
        (lambda s: s["predicate"].pop("figures"), 10),
        (lambda s: s.update(predicateType="https://example.com/other"), 10),
        (lambda s: s["predicate"].update(keys={"log": ["garbage"]}), 10),
        (lambda s: s["predicate"].update(figures=1.5), 10),
    ],
)
def test_a_statement_that_does_not_fit_is_refused_by_number(
    hour: tuple[Path, Report], keyring: Keyring, tmp_path: Path, change: Callable[[dict[str, Any]], None], number: int
) -> None:
    statement = json.loads(json.dumps(hour[1].statement()))
    change(statement)
    assert failed(resigned(statement, keyring, tmp_path / "r.json"), hour[0], keyring)[0][0] == number


OLD_HEARTBEAT = {"epoch", "num_steps", "num_slots_checked", "num_violations", "num_self_tests", "last_self_test_ok"}
SAMPLED = ("num_slots_read", "num_sequences", "num_replays", "num_replays_differing", "num_canaries")


def test_reports_of_older_versions_still_verify(hour: tuple[Path, Report], keyring: Keyring, tmp_path: Path) -> None:
    """Version 2 told nothing of sampled checks, version 1 nothing of refunds either."""
    statement = json.loads(json.dumps(hour[1].statement()))
    figures = statement["predicate"]["figures"]
    path = tmp_path / "r.json"
    statement["predicateType"] = statement["predicateType"].removesuffix("3") + "2"
    assert failed(resigned(statement, keyring, path), hour[0], keyring)[0][0] == 13  # it had no such figures
    for name in (*SAMPLED, "slots_per_step", "replay_percents"):
        del figures["coverage"][name]
    assert failed(resigned(statement, keyring, path), hour[0], keyring) == []
    assert render_pdf(path.read_bytes(), file_name="r.json")
    statement["predicateType"] = statement["predicateType"].removesuffix("2") + "1"
    assert failed(resigned(statement, keyring, path), hour[0], keyring)[0][0] == 13
    for row in (figures["money"], *figures["tenants"]):
        del row["refunded_nano_usd"], row["adjusted_nano_usd"], row["expired_nano_usd"]
    assert failed(resigned(statement, keyring, path), hour[0], keyring) == []
    assert render_pdf(path.read_bytes(), file_name="r.json")


def test_heartbeats_of_the_first_version_count_as_before() -> None:
    """Old logs stay: what they do not tell is nothing, and their rates are not made up."""
    scope = Scope(0, 1_000, 100)
    new = heartbeat("e1", 20, 20).body
    old = {name: value for name, value in heartbeat("e1", 10, 10).body.items() if name in OLD_HEARTBEAT}
    leaves = [OpenLeaf(0, "audit.heartbeat", 10, "", old), OpenLeaf(1, "audit.heartbeat", 20, "", new)]
    for shown, rates in ((leaves[:1], []), (leaves, [5])):
        ours = count_figures(
            shown, shown, frozenset(), num_leaves=len(shown), last_entry_ns=10 * len(shown), scope=scope
        )
        theirs = verify.count_figures(
            [verify.Leaf(x.leaf_index, x.kind, 1, x.at_ns, "", "", dict(x.body or {})) for x in shown],
            plain(asdict(scope)),
        )
        assert plain(asdict(ours)) == theirs
        assert ours.coverage.replay_percents == rates
        assert ours.coverage.num_steps == 10 * len(shown)
    assert ours.coverage.num_replays == 4


def test_what_was_run_again_is_said_as_one_in_so_many() -> None:
    scope = Scope(0, 1_000, 100)

    def result(**counts: int) -> str:
        beat = heartbeat("e1", 100, 20)
        leaf = OpenLeaf(0, "audit.heartbeat", 20, "", {**beat.body, **counts})
        return wording.result(
            count_figures([leaf], [leaf], frozenset(), num_leaves=1, last_entry_ns=20, scope=scope), scope
        )

    assert "1,000 answers, 20 were run again alone and compared bit by bit, 1 in 50: 0 differences" in result(
        num_sequences=1_000, num_replays=20
    )
    assert "1 answer, 1 was run again alone and compared bit by bit, 1 in 1: 1 difference." in result(
        num_sequences=1, num_replays=1, num_replays_differing=1, num_violations=1
    )
    assert "None of its 7 answers was run again alone." in result(num_sequences=7, num_replays=0)
    assert "again" not in result(num_sequences=0, num_replays=0)


def test_reports_need_the_report_keys(hour: tuple[Path, Report], keyring: Keyring, tmp_path: Path) -> None:
    forger = load_keyring(tmp_path / "forger", origin=ORIGIN, entropy=seeded(66))
    path = tmp_path / "r.json"
    path.write_bytes(sign_report(replace(hour[1], keys=forger.public()), forger)[0])
    assert [number for number, _ in failed(path, hour[0], keyring)] == [10]
    payload = json.dumps(hour[1].statement()).encode()
    path.write_bytes(dsse.sign_envelope(payload, keyring.log))  # the log's keys are for checkpoints only
    assert [number for number, _ in failed(path, hour[0], keyring)] == [10]
    envelope = json.loads(sign_report(hour[1], keyring)[0])
    for i in range(2):  # both signatures are needed
        path.write_text(json.dumps({**envelope, "signatures": envelope["signatures"][i : i + 1]}))
        assert [number for number, _ in failed(path, hour[0], keyring)] == [10]


def test_every_edit_of_one_byte_in_the_envelope_is_rejected(
    hour: tuple[Path, Report], keyring: Keyring, tmp_path: Path
) -> None:
    """Every byte of the frame, every 11th of the long base64 texts."""
    path = written(hour, keyring, tmp_path)
    whole = path.read_bytes()
    edits = 0
    for i in range(len(whole)):
        near = whole[max(0, i - 60) : i + 60]
        if i % 11 and not re.search(rb'[ "{}\[\]:,\n]', near):
            continue
        edited = bytearray(whole)
        edited[i] ^= 1 << i % 8
        path.write_bytes(edited)
        if not failed(path, None, keyring):
            assert json.loads(edited) == json.loads(whole), f"byte {i} changed and nobody noticed"
        edits += 1
    assert edits > 1_500


@given(data=st.data())
@settings(max_examples=30)
def test_any_change_of_the_signed_payload_is_rejected(
    hour: tuple[Path, Report], keyring: Keyring, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    envelope = json.loads(sign_report(hour[1], keyring)[0])
    payload = bytearray(base64.b64decode(envelope["payload"]))
    at_byte = data.draw(st.integers(0, len(payload) - 1))
    payload[at_byte] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "payload.json"
    path.write_text(json.dumps({**envelope, "payload": base64.b64encode(payload).decode()}))
    assert [number for number, _ in failed(path, None, keyring)] == [10]


# ---------------------------------------------------------------- pages


def test_the_pdf_repeats_byte_for_byte_and_shows_the_figures(
    hour: tuple[Path, Report], keyring: Keyring, tmp_path: Path
) -> None:
    report = write_report(hour[1], tmp_path, "report", signer=keyring)
    pdf = report.pdf_path.read_bytes()
    assert render_pdf(report.dsse_path.read_bytes(), file_name="report.dsse.json") == pdf
    pages = [page.extract_text() for page in pypdf.PdfReader(io.BytesIO(pdf)).pages]
    text = re.sub(r"\s+", " ", " ".join(pages)).replace("\u200b", "")
    figures = hour[1].figures
    for expected in (
        "Isolation report",
        "Violations found",
        "settled 42 requests for 2 tenants",
        "acme",
        "globex",
        f"{figures.requests.num_prompt_tokens:,}",
        usd(figures.money.charged_nano_usd),
        usd(figures.money.refunded_nano_usd),
        "foreign_block",
        "The auditor sent no heartbeat",
        "The auditor's self test failed",
        "10 min 10 s",
        "relaxed",
        "Prefix caching is off.",
        "No trusted execution environment",
        "python verify.py report report.dsse.json --log LOG_FOLDER --key KEYS",
        f"Page 1 of {len(pages)}",
    ):
        assert expected.replace("'", "’") in text.replace("'", "’"), expected
    assert report.statement_sha256 in text.replace(" ", "")


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        ("clean", "No violation found"),
        ("clean_with_gaps", "No violation found, with blind time"),
        ("not_assessed", "Not assessed: answers without counted steps"),
        ("blind", "Blind: not audited"),
        ("no_activity", "No activity"),
    ],
)
def test_every_verdict_has_its_page(hour: tuple[Path, Report], keyring: Keyring, verdict: Any, words: str) -> None:
    figures = replace(hour[1].figures, verdict=verdict, incidents=[], tenants=[])
    report = replace(hour[1], figures=figures, result=wording.result(figures, hour[1].scope))
    pdf = render_pdf(sign_report(report, keyring)[0], file_name="x")
    text = pypdf.PdfReader(io.BytesIO(pdf)).pages[0].extract_text()
    assert words in re.sub(r"\s+", " ", text)


def test_answers_without_a_counted_step_are_never_called_clean(keyring: Keyring, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_world(f"sqlite+aiosqlite:///{tmp_path / 'audit.db'}", keyring, tmp_path / "log") as world:
            await world.land(
                worker_started("e1", at(1)),
                heartbeat("e1", 0, at(5)),
                admitted("r", at(6)),
                settled("r", at(7)),
                Entry("worker.lost", "", at(8), {"epoch": "e1", "reason": "killed"}),
            )
            report = await report_of(world)
            assert report.figures.verdict == "not_assessed"
            assert "no violation" not in report.result
            assert "says nothing about isolation" in report.result
            await world.land(worker_started("e2", at(10)), heartbeat("e2", 1, at(11)))
            assert (await report_of(world)).figures.verdict == "clean"

    asyncio.run(scenario())


def test_an_empty_period_and_an_empty_log_are_refused(keyring: Keyring, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_world(f"sqlite+aiosqlite:///{tmp_path / 'audit.db'}", keyring, tmp_path / "log") as world:
            with pytest.raises(ReportError, match="no checkpoint"):
                await report_of(world)
            await world.land(note("x", at(10)))
            report = await report_of(world)
            assert report.figures.verdict == "no_activity"
            assert "there was nothing to check" in report.result
            assert "says nothing about that time" in report.result
            with pytest.raises(ReportError, match="period is empty"):
                async with world.database.read() as conn:
                    await build_report(
                        conn, 5, 5, signer=keyring, now_ns=1, heartbeat_gap_max_ns=1, tenant_names={}, exclusions=[]
                    )

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("nano", "text"),
    [
        (0, "$0.00"),
        (5 * 10**9, "$5.00"),
        (123_456, "$0.000123456"),
        (1_500_000_000_000, "$1,500.00"),
        (-250_000_000, "-$0.25"),
    ],
)
def test_money_is_shown_exactly(nano: int, text: str) -> None:
    assert usd(nano) == text


def test_durations_never_round_down() -> None:
    assert [wording.seconds(x) for x in (0, 1, 61 * SECOND_NS, 3600 * SECOND_NS + 1)] == [
        "0 s",
        "1 s",
        "1 min 1 s",
        "1 h 1 s",
    ]
