from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.settings import PREFIX, Settings, SettingsError, load_settings


def test_defaults_need_no_environment() -> None:
    assert load_settings({"PATH": "/bin"}) == Settings()


def test_all_errors_are_reported_together() -> None:
    environ = {"BULKHEAD_PORT": "99999", "BULKHEAD_BLOCK_SIZE": "many", "BULKHEAD_PROT": "1"}
    with pytest.raises(SettingsError) as caught:
        load_settings(environ)
    assert all(name in str(caught.value) for name in environ)


@given(st.text(alphabet="ABCDEFGHIJKLMNOPQRSTUVWXYZ_", min_size=1, max_size=20))
def test_unknown_names_are_refused(name: str) -> None:
    known = {f.name.upper() for f in fields(Settings)}
    if name in known or name == "TEST_PROFILE":
        return
    with pytest.raises(SettingsError, match="no such setting"):
        load_settings({PREFIX + name: "1"})


@pytest.mark.parametrize("name", ["BODY_BYTES_MAX", "HOLD_TTL_S", "MAX_NUM_SEQS", "BLOCK_SIZE"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "", "inf"])
def test_limits_cannot_be_switched_off(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name):
        load_settings({PREFIX + name: value})
