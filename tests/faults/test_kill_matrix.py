"""The kill matrix: which planted faults the run-time auditor catches, and that it is silent otherwise."""

from pathlib import Path

import pytest

import gateway
from gateway.commands.audit import checkout
from gateway.commands.session import CommandError
from tests.faults.catalogue import FAULTS, Fault
from tests.faults.known_faults import BUILT, KNOWN, NONE, PLANTED, TESTED
from tests.faults.matrix import clean_steps, planted_as, row_of

AFTER_RELEASE = {"K12", "K14"}  # found when the answer is run again: docs/isolation.md says why
NUM_LOADS = 8


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.fault_id)
def test_a_planted_fault(fault: Fault) -> None:
    row = row_of(fault, NUM_LOADS, enough=1)
    assert row["reached"]
    assert row["detected"]
    assert row["step_of_detection"] >= 0
    assert row["loads_missed"] == 0
    released = row["loads_detected_after_harm"], row["loads_with_a_wrong_byte_released"]
    assert released == (0, 0) or fault.fault_id in AFTER_RELEASE


def test_every_known_fault_is_planted_or_says_why_not() -> None:
    assert [*KNOWN] == [f"F{number:02}" for number in range(1, 89)]
    for name, (_, text) in KNOWN.items():
        assert bool(planted_as(name)) == (text == PLANTED), name
        assert text == PLANTED or text.startswith((BUILT, NONE, TESTED)), name
    assert {fault.known for fault in FAULTS} <= {*KNOWN}
    assert len({fault.fault_id for fault in FAULTS}) == len(FAULTS)


def test_the_clean_engine_raises_no_alarm() -> None:
    found = clean_steps(1_000)
    assert found["false_alarms"] == found["clean_runs_wrong"] == 0


@pytest.mark.deep
@pytest.mark.timeout(7_200)  # 40 minutes on one core
def test_the_clean_engine_raises_no_alarm_in_a_million_steps() -> None:
    assert clean_steps(1_000_000)["false_alarms"] == 0


def test_the_command_runs_from_a_checkout_and_says_so_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (checkout() / "tests" / "faults" / "__main__.py").is_file()
    monkeypatch.setattr(gateway, "__file__", str(tmp_path / "gateway" / "__init__.py"))
    with pytest.raises(CommandError, match="get the source of this version"):
        checkout()
