"""What sequences take of an engine, kept beside it with a clock that moves in launches and between steps and never
else: from the arrays of each launch and the pool's own counts, step by step, with fractions."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import count

from msgspec.structs import replace

from engine.batch import Batch
from engine.core import EngineCore
from engine.errors import BrokenOffError
from engine.protocol import OWN, Effort, TokenOutput
from engine.sampling.sampler import Picks
from engine.scheduling.break_off import GoOn, Newcomers
from engine.step_result import StepResult
from engine.timekeeper import Timekeeper


def lengths() -> Iterator[int]:
    """Of launches and pauses: no two alike, hardly any divisible."""
    return (997 + 31 * number + number % 7 for number in count())


@dataclass
class NaiveAccounts:
    """Watches ``core`` from now on; it must be new. ``ended``: what each sequence's last output said."""

    core: EngineCore
    make: Callable[[Callable[[], int]], Timekeeper] = Timekeeper
    now_ns: int = 0
    step_ns: int = 0
    ended: dict[str, Effort] = field(default_factory=dict)
    exact_ns: dict[str, Fraction] = field(default_factory=lambda: defaultdict(Fraction))
    num_steps: Counter[str] = field(default_factory=Counter)
    computed: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0, 0]))
    occupied_ns: Counter[str] = field(default_factory=Counter)  # by domain
    held_ns: Counter[str] = field(default_factory=Counter)  # by sequence, shared blocks counted for each
    alone_ns: Counter[str] = field(default_factory=Counter)  # and for nobody
    domains: dict[str, str] = field(default_factory=dict)
    num_broken_off: int = 0
    _lengths: Iterator[int] = field(default_factory=lengths)

    def __post_init__(self) -> None:
        core = self.core
        core.timekeeper = self.make(lambda: self.now_ns)
        self._execute, self._step, self._abort = core._runner.execute, core.step, core.abort
        core._runner.execute = self.execute  # type: ignore[method-assign]
        core.step = self.step  # type: ignore[method-assign]
        core.abort = self.abort  # type: ignore[method-assign]

    def step(self, newcomers: Newcomers | None = None) -> StepResult:
        self._pass()
        result = self._step(newcomers)
        self._hear(result.outputs)
        assert self.core.timekeeper.step_ns == self.step_ns
        return result

    def abort(self, sequence_id: str) -> TokenOutput | None:
        self._pass()
        output = self._abort(sequence_id)
        self._hear([output] if output is not None else [])
        return output

    def execute(self, batch: Batch, go_on: GoOn | None = None) -> Picks:
        evidence = batch.evidence
        names, ends = evidence.sequence_ids, evidence.kv_lens.tolist()
        sizes = (evidence.cu_seqlens[1:] - evidence.cu_seqlens[:-1]).tolist()
        spent_ns = self._pass()
        self.step_ns += spent_ns
        try:
            picks = self._execute(batch, go_on)
        except BrokenOffError:
            self.num_broken_off += 1
            cause = self.core.break_offs.cause
            assert cause is not None
            self.exact_ns[cause.sequence_id] += spent_ns
            self.num_steps[cause.sequence_id] += 1
            raise
        except RuntimeError:
            self._share(names, sizes, spent_ns)
            raise
        self._share(names, sizes, spent_ns)
        for name, size, end in zip(names, sizes, ends, strict=True):
            num_prompt = self.core._sequences[name].num_prompt_tokens
            self.computed[name].update(range(end - size))  # what it found in the cache, too
            for place in range(end - size, end):
                kind = 1 if place in self.computed[name] else 0 if place < num_prompt else 2
                self.tokens[name][kind] += 1
                self.computed[name].add(place)
        return picks

    def _share(self, names: tuple[str, ...], sizes: list[int], spent_ns: int) -> None:
        for name, size in zip(names, sizes, strict=True):
            self.exact_ns[name] += Fraction(spent_ns * size, sum(sizes))
            self.num_steps[name] += 1

    def _pass(self) -> int:
        """Some time, in which nothing changes hands."""
        spent_ns = next(self._lengths)
        self.now_ns += spent_ns
        for domain, num_blocks in self.core.pool.num_by_domain.items():
            self.occupied_ns[domain] += num_blocks * spent_ns
        for name, sequence in self.core._sequences.items():
            self.domains[name] = sequence.domain
            self.held_ns[name] += len(sequence.block_ids) * spent_ns
            references = [self.core.pool.blocks[block_id].num_references for block_id in sequence.block_ids]
            self.alone_ns[name] += references.count(1) * spent_ns
        return spent_ns

    def _hear(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            assert output.effort is not None
            assert output.sequence_id not in self.ended
            if output.finish_reason is not None:
                self.ended[output.sequence_id] = replace(output.effort)

    def check(self) -> None:
        """When all have ended."""
        keeper = self.core.timekeeper
        assert not self.core.has_work
        for name, effort in self.ended.items():
            off = effort.engine_ns - self.exact_ns.get(name, 0)
            assert abs(off) <= self.num_steps[name], (name, off)  # less than one in each step
            told = [effort.num_prefill_tokens, effort.num_recomputed_tokens, effort.num_decode_steps]
            assert told == self.tokens[name], name
            assert self.alone_ns[name] <= effort.block_ns <= self.held_ns[name], name
        clients = {name: effort for name, effort in self.ended.items() if not name.startswith(OWN)}
        # To the nanosecond.
        assert sum(one.engine_ns for one in clients.values()) + keeper.own_ns + keeper._owed_ns == self.step_ns
        for domain, occupied_ns in self.occupied_ns.items():
            told = [effort.block_ns for name, effort in self.ended.items() if self.domains.get(name) == domain]
            assert sum(told) == occupied_ns, domain
        assert not keeper._accounts
        assert not keeper._holders
