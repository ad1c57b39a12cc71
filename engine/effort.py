"""The account of one sequence: what it has taken of the engine so far (engine/timekeeper.py writes the times)."""

from dataclasses import dataclass, field

from engine.protocol import Effort


@dataclass(slots=True, eq=False)
class Account:
    """``effort`` is what leaves, as it stands; the rest is what its next entry needs."""

    effort: Effort = field(default_factory=Effort)
    is_own: bool = False  # of a sequence that no client has asked for
    num_blocks: int = 0  # that count for it now
    _since_ns: int = 0  # up to then effort.block_ns is complete

    def hold(self, change: int, now_ns: int) -> None:
        """So many blocks more count for it from now on."""
        self.effort.block_ns += self.num_blocks * (now_ns - self._since_ns)
        self._since_ns = now_ns
        self.num_blocks += change

    def compute(self, first: int, end: int, known: int, num_prompt: int) -> None:
        """Its tokens first..end were computed, those before ``known`` not for the first time."""
        new = max(first, known)
        num_prefill = max(0, min(end, num_prompt) - new)
        num_new = max(0, end - new)
        effort = self.effort
        effort.num_prefill_tokens += num_prefill
        effort.num_decode_steps += num_new - num_prefill
        effort.num_recomputed_tokens += end - first - num_new
