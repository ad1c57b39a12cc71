"""transformers' code on our pages: a few families now, all of them under make test-all, and faults that must show."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.build import build, unobserved
from engine.config import WorkerConfig
from engine.errors import ConfigError
from engine.models import conformance, matrix, transformers_model
from engine.models.facts import Model
from engine.models.load import load_model
from engine.models.served import REFUSED, SERVED
from engine.models.transformers_model import TransformersModel
from engine.protocol import SamplingParams, Submit
from kernels.cpu.backend import NativeBackend
from kernels.products import Activated, Product
from kernels.torch_cpu import TorchBackend, TorchPlan
from tests.strategies.tiny_model import write_tiny_model

QUICK = ["deepseek_v3", "gemma2", "gemma3n_text", "gpt2", "gpt_oss", "llama4_text", "mistral", "phimoe", "roberta"]
QUICK_REFUSED = ["bart", "doge", "gptj", "lfm2"]

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own


class Faulty(TorchBackend):
    """Forgets rules of attention, or moves every row's blocks to the next row."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def attend(self, *args: Any, plan: TorchPlan, **rules: Any) -> Tensor:
        rules = {name: value for name, value in rules.items() if name != self.fault}
        out = super().attend(*args, plan=plan, **rules)
        if self.fault == "neighbour":  # the last token of each row sees what the next row's saw
            last = torch.tensor(
                [chunk.end - 1 for chunk in plan.attention.chunks] + plan.attention.decode_tokens.tolist()
            )
            out[last] = out[last.roll(1)].clone()
        return out


def load(model_type: str, folder: Path) -> tuple[Any, Model]:
    return conformance.write_tiny(model_type, folder), conformance.load_unlisted(folder, TorchBackend())


@pytest.mark.parametrize("model_type", QUICK)
def test_the_logits_are_those_of_transformers(model_type: str) -> None:
    result = conformance.check(model_type)
    assert result.reason == ""
    assert (result.architecture, result.route, result.features, result.isolation) == SERVED[model_type]


@pytest.mark.parametrize("model_type", QUICK_REFUSED)
def test_what_the_pages_cannot_hold_is_refused(model_type: str) -> None:
    result = conformance.check(model_type)
    assert (result.architecture, result.reason) == REFUSED[model_type]


@pytest.mark.parametrize(
    ("model_type", "fault"),
    [
        ("mistral", "window"),
        ("phimoe", "window"),
        ("gemma2", "soft_cap"),
        ("gpt_oss", "sinks"),
        ("gpt2", "neighbour"),
        ("deepseek_v3", "neighbour"),
    ],
)
def test_a_planted_fault_shows(model_type: str, fault: str, tmp_path: Path) -> None:
    theirs, model = load(model_type, tmp_path)
    assert conformance.compare(theirs, model) < conformance.TOLERANCE
    model.backend = Faulty(fault)
    assert conformance.compare(theirs, model) > 20 * conformance.TOLERANCE


class FaultyNative(NativeBackend):
    """As `Faulty`, of rules; or a product whose bits depend on how many rows there are."""

    fault = ""

    def attend(self, *args: Any, **rules: Any) -> Tensor:
        return super().attend(*args, **{name: value for name, value in rules.items() if name != self.fault})

    def gate_up(self, weight: Tensor, bias: Tensor | None = None) -> Product:
        return Activated(super().gate_up(weight, bias), self._in_company)

    def _in_company(self, out: Tensor) -> Tensor:
        return out * (1.0 + 1e-7 * len(out)) if self.fault == "company" else out


@pytest.mark.parametrize(
    ("model_type", "fault", "reason"),
    [
        ("mistral", "window", "differ from transformers' own on native kernels"),
        ("gemma2", "soft_cap", "differ from transformers' own on native kernels"),
        ("gpt_oss", "sinks", "differ from transformers' own on native kernels"),
        ("llama", "company", "its bits depend on the company"),
        ("qwen3", "company", "its bits depend on the company"),
    ],
)
def test_a_fault_of_the_native_kernels_shows(model_type: str, fault: str, reason: str) -> None:
    backend = FaultyNative()
    assert conformance.check(model_type, native=backend).reason == ""
    backend.fault = fault
    assert reason in conformance.check(model_type, native=backend).reason


def test_the_documented_table_is_the_measured_one() -> None:
    assert matrix.table() in (matrix.ROOT / "docs/models.md").read_text()
    assert set(SERVED) | set(REFUSED) == set(conformance.model_types())
    assert len(SERVED) >= 100


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss", "llama4_text"])
def test_a_folder_loads_in_bfloat16_and_calls_itself_relaxed(model_type: str, tmp_path: Path) -> None:
    conformance.write_tiny(model_type, tmp_path)
    model = load_model(tmp_path, dtype="bfloat16")
    assert isinstance(model, TransformersModel)
    assert model.dtype == torch.bfloat16
    assert not model.is_exact()
    assert model.config.vocab_size == 96
    assert model.config.context_max == {"llama4_text": 64}.get(model_type, 128)  # its attention's first chunk


def test_the_worker_serves_such_a_folder_and_says_relaxed(tmp_path: Path) -> None:
    theirs = write_tiny_model(tmp_path / "model", "gemma2", sliding_window=8)
    config = WorkerConfig(
        model_dir=tmp_path / "model",
        socket_path=tmp_path / "s",
        journal_dir=tmp_path,
        dtype="float32",
        block_size=4,
        num_blocks=40,
        num_threads=1,
        prefix_cache=True,
    )
    core, ready = build(config, unobserved)
    assert (ready.isolation, ready.context_max, ready.vocab_size) == ("relaxed", 4096, 320)
    prompts = {"a": [5, 9, 40, 7, 300, 11, 12, 13, 14, 15, 16], "b": [9, 8], "c": [5, 9, 40, 7, 300, 11, 12, 13, 14]}
    answers: dict[str, list[int]] = {name: [] for name in prompts}
    for name, prompt in prompts.items():
        assert (
            core.add(Submit(name, "d", b"", prompt, SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)))
            is None
        )
    while core.has_work:
        result = core.step()
        assert result.failure == ""
        for output in result.outputs:
            answers[output.sequence_id] += output.token_ids
    for name, prompt in prompts.items():
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(int(theirs(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        assert answers[name] == tokens[len(prompt) :]


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [8.0] * 4,
    "original_max_position_embeddings": 32,
}


def test_angles_that_follow_the_longest_neighbour_are_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conformance.write_tiny("phi3", tmp_path, {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32})
    assert load_model(tmp_path, dtype="float32").config.context_max == 32
    monkeypatch.setattr(transformers_model, "context_max", lambda text: text.max_position_embeddings)
    with pytest.raises(ConfigError, match="reach each other outside of attention"):
        load_model(tmp_path, dtype="float32")


def test_a_rule_that_was_never_shown_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conformance.write_tiny("gemma2", tmp_path)
    monkeypatch.setitem(SERVED, "gemma2", ("Gemma2ForCausalLM", "transformers", ("window",)))
    with pytest.raises(ConfigError, match="its soft cap was never shown"):
        load_model(tmp_path, dtype="float32")
    monkeypatch.delitem(SERVED, "gemma2")
    with pytest.raises(ConfigError, match="nobody has shown"):
        load_model(tmp_path, dtype="float32")


@pytest.mark.deep
def test_the_whole_matrix_is_as_recorded() -> None:
    for model_type in conformance.model_types():
        result = conformance.check(model_type)
        if result.passed:
            assert (result.architecture, result.route, result.features, result.isolation) == SERVED.get(model_type), (
                model_type
            )
        else:
            assert (result.architecture, result.reason) == REFUSED.get(model_type), model_type


@pytest.mark.deep
@pytest.mark.parametrize("model_type", sorted(SERVED))
def test_every_rule_of_attention_matters_in_every_family(model_type: str, tmp_path: Path) -> None:
    theirs, model = load(model_type, tmp_path)
    for fault in (*SERVED[model_type][2], "neighbour"):
        model.backend = Faulty(fault)
        assert conformance.compare(theirs, model) > 20 * conformance.TOLERANCE, fault
    load_model(tmp_path, dtype="bfloat16")
