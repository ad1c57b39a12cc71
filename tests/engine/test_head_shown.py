"""What the runner shows of its head is what its head did: the auditor's witness is silent on every kernel, type and
shape of head, and loud where logits, tokens or hidden states are not their row's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from audit.runtime.head_weight import mapped
from audit.runtime.head_witness import HeadWitness
from engine.batch import Batch
from engine.core import EngineCore
from engine.model_runner import ModelRunner
from engine.models.load import load_model
from engine.protocol import SamplingParams, Submit
from engine.sampling.sampler import Picks
from engine.scheduling.break_off import GoOn
from gateway.audit_observer import AuditObserver
from kernels.choice import choose
from tests.kernels.native import isas
from tests.strategies.tiny_model import write_tiny_model

HEADS: dict[str, dict[str, Any]] = {
    "own": {},
    "tied": {"tie_word_embeddings": True},
    "scaled": {"model_type": "granite", "logits_scaling": 3.0, "tie_word_embeddings": True},
}
SAMPLINGS = [
    SamplingParams(6, temperature=0.0, ignore_eos=True),
    SamplingParams(6, temperature=1.0, seed=1, top_k=5, ignore_eos=True, prompt_logprobs=1),
    SamplingParams(6, temperature=1.0, seed=2, top_p=0.9, ignore_eos=True, frequency_penalty=0.5, logprobs=2),
    SamplingParams(6, temperature=0.0, ignore_eos=True, logit_bias=((7, 30.0),), prompt_logprobs=0),
]
PROMPT_LENGTHS = [1, 5, 17, 40]


@pytest.fixture(scope="module", params=HEADS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp(request.param)
    write_tiny_model(made, **HEADS[request.param])
    return made


class Crossing(ModelRunner):
    """From step 3 on, once: ``cross`` is given logits [S + P, V], or is done to what was picked."""

    cross: Callable[[Tensor], None] | None = None
    after: Callable[[Picks], None] | None = None
    num_launches = 0

    def launch(self, batch: Batch, go_on: GoOn | None = None) -> Tensor:
        logits = super().launch(batch, go_on)
        self.num_launches += 1
        if self.cross is not None and self.num_launches == 3:
            with torch.inference_mode():
                self.cross(logits)
        return logits

    def execute(self, batch: Batch, go_on: GoOn | None = None) -> Picks:
        picks = super().execute(batch, go_on)
        if self.after is not None and self.num_launches == 3:
            self.after(picks)
        return picks


def start(folder: Path, dtype: str, kernels: str) -> tuple[EngineCore, Crossing, AuditObserver]:
    model = load_model(folder, dtype=dtype, backend=choose(kernels, 1, lambda line: None))
    runner = Crossing(model, block_size=4, max_num_seqs=4, num_blocks=64)
    facts = runner.head_facts
    assert facts is not None
    head = HeadWitness(mapped(folder, facts.tensor), is_bfloat16=facts.is_bfloat16, scale=facts.scale)
    observer = AuditObserver(runner.num_blocks, runner.block_size, memory=runner.cache.words(), head=head)
    core = EngineCore(
        runner,
        decode=lambda ids: "x" * len(ids),
        eos_token_ids=frozenset(),
        context_max=64,
        vocab_size=320,
        max_batched_tokens=64,
        max_num_seqs=4,
        max_waiting=4,
        observer=observer,
    )
    for index, (length, sampling) in enumerate(zip(PROMPT_LENGTHS, SAMPLINGS, strict=True)):
        prompt = [(7 * place + 11 * index) % 300 + 3 for place in range(length)]
        assert core.add(Submit(f"s{index}", f"domain {index}", b"", prompt, sampling)) is None
    return core, runner, observer


def finished(core: EngineCore) -> dict[str, set[str]]:
    """By kind of incident, whom it names."""
    found: dict[str, set[str]] = {}
    while core.has_work:
        result = core.step()
        assert result.failure == ""
        for one in result.incidents:
            found.setdefault(one.kind, set()).update(one.sequence_ids)
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kernels", ["torch", *isas()])
def test_no_head_is_doubted(folder: Path, dtype: str, kernels: str) -> None:
    core, _, observer = start(folder, dtype, kernels)
    assert finished(core) == {}
    scored = sum(length - 1 for length, one in zip(PROMPT_LENGTHS, SAMPLINGS, strict=True) if one.prompt_logprobs >= 0)
    assert observer.counters()["num_logits_witnessed"] == 4 * 6 + scored


def swap_rows(logits: Tensor) -> None:
    logits[[0, 1]] = logits[[1, 0]]


def swap_tokens(picks: Picks) -> None:
    assert picks.token_ids[0] != picks.token_ids[1]
    picks.token_ids[[0, 1]] = picks.token_ids[[1, 0]]


def swap_what_is_shown(picks: Picks) -> None:
    assert picks.head is not None
    picks.head.hidden[[0, 1]] = picks.head.hidden[[1, 0]]


def nothing_shown(picks: Picks) -> None:
    object.__setattr__(picks, "head", None)


def test_logits_that_change_places_are_seen_in_their_step(folder: Path) -> None:
    core, runner, _ = start(folder, "bfloat16", "auto")
    runner.cross = swap_rows
    assert finished(core)["foreign_logits"] == {"s0", "s1"}


@pytest.mark.parametrize("change", [swap_tokens, swap_what_is_shown])
def test_tokens_or_states_that_change_places_are_seen(folder: Path, change: Callable[[Picks], None]) -> None:
    core, runner, _ = start(folder, "bfloat16", "auto")
    runner.after = change
    assert finished(core)["foreign_logits"] == {"s0", "s1"}


def test_a_launch_that_shows_no_head_is_not_trusted(folder: Path) -> None:
    core, runner, _ = start(folder, "bfloat16", "auto")
    runner.after = nothing_shown
    assert finished(core)["foreign_logits"] == {"s0", "s1", "s2", "s3"}


def test_prompts_that_are_scored_from_others_logits_are_seen(folder: Path) -> None:
    """The places behind the rows that sample: the first step scores two prompts."""
    core, runner, _ = start(folder, "bfloat16", "auto")
    runner.num_launches = 2

    def swap_scored(logits: Tensor) -> None:
        logits[4:] = torch.flip(logits[4:], [0])

    runner.cross = swap_scored
    assert finished(core)["foreign_logits"] == {"s1", "s3"}


def test_hidden_states_are_not_copied_and_not_changed_by_the_head(folder: Path) -> None:
    core, runner, _ = start(folder, "float32", "auto")
    shown: list[Any] = []
    runner.after = lambda picks: shown.append(picks.head)
    finished(core)
    assert shown[0].hidden.shape == (4, 48)
    assert shown[0].hidden.base is not None
    assert np.isfinite(shown[0].logits).all()
