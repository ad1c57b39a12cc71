"""The auditor's own sequences: what it wants to be run, as the engine takes it, and what comes of it.

Two kinds. A replay is a finished sequence of a tenant, or a canary, run again while the engine has nothing else to do
(audit/runtime/replay.py). It has a domain of its own for each tenant and a new salt each time: it must never find
blocks that the first run has left, since a hit would repeat what went wrong there, and it must not be counted, limited
or punished as the tenant's. A canary is a synthetic request that runs beside real ones (audit/runtime/canary.py).

Both rank below everything else, and what they say goes nowhere: the engine gives it to its observer only.
"""

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from msgspec.structs import replace

from audit.runtime.canary import Canaries
from audit.runtime.released_tokens import Output
from audit.runtime.replay import BYTES_MAX, COMPLETE, OWN, Record, Replays
from engine.events import EngineEvent, Violation
from engine.protocol import SamplingParams, Submit
from engine.scheduling.tiers import TIERS

REPLAY = OWN + "replay/"  # the runs are numbered; their domains are named after the tenants'
CANARY_DOMAIN = OWN + "canary"
CANARY = SamplingParams(24, temperature=0.0, logprobs=2)
PARAMETERS_BYTES = 400  # of sampling parameters, about
BIAS_BYTES = 120  # of each token that they name

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnRunSettings:
    """How much of its own the auditor may run. The defaults run nothing."""

    replay_percent: int = 0  # of finished sequences
    replay_bytes_max: int = BYTES_MAX
    canary_interval_s: int = 0  # between two canaries; 0: none


NOTHING = OwnRunSettings()


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to run a sequence again."""

    prompt: "array[int]"
    sampling: SamplingParams

    @property
    def num_bytes(self) -> int:
        sampling = self.sampling
        named = BIAS_BYTES * len(sampling.named_token_ids) + sum(map(len, (sampling.grammar, *sampling.stop)))
        return len(self.prompt) * self.prompt.itemsize + PARAMETERS_BYTES + named


def recipe_of(token_ids: Sequence[int], sampling: SamplingParams) -> tuple[int, Recipe]:
    """With its bytes in memory."""
    recipe = Recipe(array("i", token_ids), sampling)
    return recipe.num_bytes, recipe


def canary_prompt(marker: str) -> str:
    """What a model that continues texts continues with the marker."""
    return f"The secret word is {marker}. Say it again: the secret word is {marker}. Once more: the secret word is"


class OwnRuns:
    """``exact``: an answer does not depend on its company; where that is not so, nothing is run again. ``encode`` None:
    no canaries."""

    def __init__(
        self,
        settings: OwnRunSettings,
        *,
        exact: bool = True,
        encode: Encode | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        percent = settings.replay_percent if exact else 0
        self.replays = Replays(percent, settings.replay_bytes_max, seed)
        self.canaries = Canaries(settings.canary_interval_s if encode is not None else 0, seed)
        self._percent = percent
        self._salt = seed.to_bytes(16, "little")
        self._encode = encode
        self._clock = clock
        self._num_replays = 0
        self._domains: dict[str, str] = {}  # of the sequences that are alive, or ended since outputs were last heard
        self._ended: set[str] = set()

    def on_event(self, event: EngineEvent) -> None:
        if event.kind == "begin":
            self._domains[event.sequence_id] = event.domain
            self._ended.discard(event.sequence_id)
            self._draw(event)
        elif event.kind == "end":
            self._ended.add(event.sequence_id)  # its last output may still be on its way

    def _draw(self, event: EngineEvent) -> None:
        is_canary = event.domain == CANARY_DOMAIN
        if event.sampling is not None and self._percent and (is_canary or not event.sequence_id.startswith(OWN)):
            recipe = partial(recipe_of, event.token_ids, event.sampling)
            self.replays.begins(event.sequence_id, event.domain, recipe, always=is_canary)

    def next(self, *, idle: bool) -> Submit | None:
        """What to run now: alone where the engine is idle, in company otherwise."""
        self._clean()
        if not idle:
            return self._canary()
        name = f"{REPLAY}{self._num_replays + 1}"
        record = self.replays.next(name)
        if record is None:
            return None
        self._num_replays += 1
        salt = self._salt + self._num_replays.to_bytes(8, "little")
        recipe: Recipe = record.recipe
        sampling, domain = self._again(record, recipe.sampling), f"{REPLAY}{record.domain}"
        return Submit(name, domain, salt, recipe.prompt.tolist(), sampling, priority=TIERS["batch"])

    def forget_domain(self, domain: str) -> list[str]:
        """A tenant has left: its answers are not kept. Returns the domain of its replays."""
        self.replays.forget_domain(domain)
        return [f"{REPLAY}{domain}"]

    def hear(self, step: int, outputs: Sequence[Output], distrusted: frozenset[str]) -> list[Violation]:
        """All outputs of a step, those of ``distrusted`` sequences among them, which will not leave."""
        found: list[Violation] = []
        for name, rule, detail in self.canaries.search(outputs):
            domains = (self._domains[name],) if name in self._domains else ()
            found.append((rule, (name,), domains, -1, f"step {step}: {detail}"))
        distrusted |= {name for violation in found for name in violation[1]}
        for output in outputs:
            if output.sequence_id in distrusted:
                self.replays.forget(output.sequence_id)
                self.canaries.forget(output.sequence_id)
                continue
            self.replays.sends(output)
            difference = self.replays.hears(output)
            if difference is not None:
                record = difference.record
                detail = f"step {step}: {difference.detail}"
                found.append(("replay_differs", (record.sequence_id,), (record.domain,), -1, detail))
        self._clean()
        return found

    def counters(self) -> dict[str, int]:
        replays, canaries = self.replays, self.canaries
        return {
            "replay_percent": self._percent,
            "num_sequences": replays.num_sequences,
            "num_replays": replays.num_compared,
            "num_replays_differing": replays.num_differing,
            "num_replay_bits_differing": replays.num_differing_bits,
            "num_replays_broken_off": replays.num_broken_off,
            "num_replays_dropped": replays.num_dropped,
            "replays_waiting": replays.num_waiting,
            "replay_bytes": replays.num_bytes,
            "num_canaries": canaries.num_canaries,
            "num_canaries_recited": canaries.num_recited,
            "num_canaries_compared": replays.num_canaries_compared,
            "num_canary_leaks": canaries.num_leaks,
        }

    def _clean(self) -> None:
        """Forget those who are over, also where no last output of theirs was heard."""
        for name in self._ended:
            self._domains.pop(name, None)
            self.canaries.forget(name)
            self.replays.forget(name)
        self._ended.clear()

    def _canary(self) -> Submit | None:
        now_s = self._clock()
        if self._encode is None or not self.canaries.due(now_s):
            return None
        name, marker = self.canaries.begin(now_s)
        prompt = self._encode(canary_prompt(marker))
        salt = self._salt + name.encode()
        return Submit(name, CANARY_DOMAIN, salt, prompt, CANARY, priority=TIERS["batch"])

    @staticmethod
    def _again(record: Record, sampling: SamplingParams) -> SamplingParams:
        """The same; of one that was aborted, as far as it came."""
        if record.said.ending in COMPLETE:
            return sampling
        return replace(sampling, max_tokens=max(1, record.num_tokens))
