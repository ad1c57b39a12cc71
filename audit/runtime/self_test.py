"""The auditor proves that it is awake: synthetic violations must be flagged, and clean steps and answers must not."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from audit.runtime.block_ledger import FREE, NOBODY, SEALED, WRITING, BlockLedger, Happening
from audit.runtime.cache_bytes import CacheBytes
from audit.runtime.canary import Canaries
from audit.runtime.head_witness import HeadWitness
from audit.runtime.launch import KernelArrays, Logprob, array_problems
from audit.runtime.released_tokens import Output, output_problems
from audit.runtime.replay import Replays
from audit.runtime.sampling_rows import SampledRow, SamplingFacts
from audit.runtime.sequence_ledger import AuditedSequence
from audit.runtime.step_arrays import StepArrays


class Named(Protocol):
    @property
    def kind(self) -> str: ...


class Verdict(Protocol):
    @property
    def violations(self) -> Sequence[Named]: ...


def passes(real: BlockLedger, check: Callable[[BlockLedger, StepArrays], Verdict]) -> bool:
    """Two synthetic sequences in two domains; one reads its own block, then the other's, then a real tenant's; then the
    other is given the first one's published block as if it were its own."""
    ledger, size = real.copy(), real.block_size
    live = np.nonzero((real.state == WRITING) | (real.state == SEALED))[0]
    mine, other = [i for i in range(3) if not (len(live) and i == live[0])][:2] if len(real.state) > 2 else (0, 1)
    tokens = tuple(range(size + 1))
    facts = {name: SamplingFacts(name.encode()) for name in "ab"}

    def event(kind: str, block_id: int, name: str) -> str:
        generation = int(ledger.generation[block_id]) + (kind == "allocate")
        owner = f"self-test/{name}"
        problem = ledger.apply(Happening(kind, block_id, generation, owner, owner, tokens, b"", facts[name]))
        return problem[0] if problem else ""

    for block_id, name in ((mine, "a"), (other, "b")):
        ledger.state[block_id], ledger.residue[block_id] = FREE, NOBODY
        ledger.holders[block_id], ledger.published[block_id] = frozenset(), None
        if event("begin", block_id, name) or event("allocate", block_id, name):
            return False

    def rules(table: list[int], kv_len: int, slot: int, state: str = "") -> set[str]:
        sampled = SampledRow(0, 0, kv_len, 0, f"self-test/{state}", facts.get(state, facts["a"]), size + 1, tokens)
        step = StepArrays(
            ["self-test/a"],
            ["self-test/a"],
            np.array([kv_len - 1]),
            np.array([0, 1]),
            np.array([kv_len]),
            np.array([table]),
            np.array([slot]),
            [sampled] if state else None,
        )
        return {violation.kind for violation in check(ledger, step).violations}

    clean = rules([mine], 1, mine * size)
    foreign_read = rules([other, mine], size + 1, mine * size)
    foreign_write = rules([other], 1, other * size)
    real_read = (
        rules([int(live[0]), mine], size + 1, mine * size) if len(live) and len(real.state) > 2 else {"foreign_block"}
    )
    ledger.filled[mine] = size
    ledger.state[other], ledger.filled[other] = WRITING, 0
    ledger.sequences["self-test/a"].blocks.append(other)
    ledger.domain[other] = ledger.domain[mine]
    own_state = rules([mine, other], size + 1, other * size, "a")
    foreign_state = rules([mine, other], size + 1, other * size, "b")
    ledger.sequences["self-test/a"].blocks.remove(other)
    content = _sees_content()
    published = event("seal", mine, "a") == event("publish", mine, "a") == ""
    foreign_share = event("share", mine, "b")
    return (
        not clean
        and "foreign_block" in foreign_read
        and {"foreign_block", "foreign_write"} <= foreign_write
        and "foreign_block" in real_read
        and not own_state
        and {"foreign_sampling_state", "foreign_parameters"} <= foreign_state
        and content
        and published
        and foreign_share == "foreign_share"
    )


def _sees_content() -> bool:
    """Foreign text, a foreign log probability, other arrays and changed bytes, each beside a right one."""

    def rules(text: str, logprob: float) -> set[str]:
        sequence = AuditedSequence("self-test/a", "self-test/a", b"", [1])
        sequence.samples(2, b"yes")
        sequence.launched(0, 1)
        sequence.pending_logprobs.append(Logprob(2, -1.0))
        output = Output("self-test/a", (2,), 1, 0, 1, False, text, [Logprob(2, logprob)], (), "length")
        names = {"self-test/a": sequence}
        return {rule for _, rule, _ in output_problems(names, [output], ["self-test/a"], knows_text=True)}

    numbers = np.array([0, 1])
    approved = KernelArrays(*(numbers,) * len(KernelArrays._fields)).copy()
    memory = np.ones((1, 2, 1, 1), np.uint64)
    read, slots, generations = CacheBytes([memory], 2, 1, 0), np.array([0, 1]), np.array([1, 1])
    read.note(slots, generations)
    unchanged = read.changed(slots, generations)
    memory[0, 1] = 2
    return (
        rules("yes", -1.0) == set()
        and rules("no", -1.0) == {"foreign_text"}
        and rules("yes", -2.0) == {"foreign_logprobs"}
        and not array_problems(approved, approved.copy())
        and bool(array_problems(approved, approved.copy()._replace(kv_lens=numbers + 1)))
        and not unchanged.any()
        and read.changed(slots, generations).tolist() == [False, True]
        and not read.is_zero(0, 1)
        and _sees_logits()
        and _sees_what_differs()
    )


def _sees_logits() -> bool:
    """Two rows' logits that changed places, beside those that did not."""
    witness = HeadWitness(np.array([[1, 2], [3, -1]], np.float32), is_bfloat16=True, scale=2.0)
    hidden, tokens = np.array([[1, 1], [0, 5]], np.float32), np.array([0, 1])
    logits = np.array([6, -10], np.float32)
    return not witness.disagrees(hidden, tokens, logits).any() and bool(
        witness.disagrees(hidden, tokens, logits[::-1]).all()
    )


def _sees_what_differs() -> bool:
    """Another token, and another last bit, when an answer is run again; a canary's marker in another's text."""

    def differs(token_id: int, logprob: float) -> bool:
        replays = Replays(100)
        replays.begins("self-test/a", "self-test/a", lambda: (0, None))
        for name, one in (("self-test/a", Logprob(2, -1.0)), ("self-test/b", Logprob(token_id, logprob))):
            output = Output(name, (one.token_id,), 1, 0, 1, False, "", [one], (), "length")
            replays.sends(output)
            found = replays.hears(output)
            replays.next("self-test/b")
        return found is not None

    canaries = Canaries(1.0)
    _, marker = canaries.begin(0.0)
    halves = [Output("self-test/a", (), 1, 0, 0, False, text) for text in (marker[:5], marker[5:])]
    return (
        not differs(2, -1.0)
        and differs(3, -1.0)
        and differs(2, math.nextafter(-1.0, 0.0))
        and [len(canaries.search([half])) for half in halves] == [0, 1]
    )
