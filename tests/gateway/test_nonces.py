"""Every output carries its sequence's nonce: the last wall before the socket, whatever the worker has mixed up."""

import asyncio

import pytest

from engine.protocol import Incident
from tests.fakes.integer_worker import IntegerModel, Script
from tests.gateway.conftest import Stage
from tests.gateway.test_faults import errors_of, only_row, texts_of

LONG = IntegerModel(eos_every=1_000_003)  # never ends by itself


def test_sequences_have_nonces_of_their_own(stage: Stage, runner: asyncio.Runner) -> None:
    hall, worker = stage.make()
    for _ in range(2):
        assert runner.run(hall.chat(max_tokens=2, n=2)).status == 200
    nonces = [submit.nonce for submit in worker.submits]
    assert len(set(nonces)) == len(nonces) == 4
    assert all(0 < nonce < 2**63 for nonce in nonces)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("crossed_after", [0, 3])
def test_an_output_with_another_nonce_is_not_passed_on(
    stage: Stage, runner: asyncio.Runner, stream: bool, crossed_after: int
) -> None:
    """Somebody else's output with this sequence's id: nothing of it reaches the socket, and everybody hears of it."""
    hall, worker = stage.make()
    worker.model = LONG
    incidents: list[Incident] = []
    hall.services.engine.client()._on_incident = incidents.append
    worker.scripts.append(Script(crossed_after=crossed_after, delay_s=0.01))
    answer = runner.run(hall.chat(max_tokens=20, stream=stream))
    begun = stream and crossed_after > 0
    if begun:
        assert errors_of(answer) == ["isolation_violation"]
        assert len(texts_of(answer).split()) == crossed_after
    else:
        assert (answer.status, answer.json()["error"]["code"]) == (500, "isolation_violation")
    (incident,) = incidents
    assert (incident.kind, incident.domains) == ("crossed_output", [hall.accounts["acme"].tenant_id])
    row = only_row(hall, runner)
    assert incident.sequence_ids == [worker.submits[0].sequence_id]
    assert (row.finish_reason, row.num_completion_tokens) == ("isolation", crossed_after if begun else 0)
    assert runner.run(hall.chat(max_tokens=2)).status == 200
    runner.run(hall.check_books())
