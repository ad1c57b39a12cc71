"""What a model does outside of attention, tried before it is served: four tokens a pass, attention giving zeros.

Then a token may depend on nothing but itself and its position. Convolutions, recurrent state, angles that follow the
batch's longest sequence or experts that share out a capacity would show here, whatever they are called.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.paged import Call, Pages, Unfit

LEAK_MAX = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of the largest number: more than rounding in other company
OBSERVED = [0, 3]  # the first and the last token are the same in both passes, those between them are not


@dataclass(frozen=True, slots=True)
class Probed:
    calls: list[Call]
    vocab_size: int


Run = Callable[[Tensor, Tensor, Tensor], Tensor]  # token ids, positions, wanted -> logits


@torch.inference_mode()
def probe(run: Run, pages: Pages, context_max: int, dtype: torch.dtype) -> Probed:
    """Raises Unfit where tokens reach each other outside of attention, or positions have no effect."""
    last, leak_max = context_max - 1, LEAK_MAX[dtype]
    calls, alone, logits = _pass(run, pages, [5, 7, 9, 6], [1, 2, 3, 4])
    _, company, _ = _pass(run, pages, [5, 11, 12, 6], [1, last, last - 1, 4])
    _, moved, _ = _pass(run, pages, [5, 7, 9, 6], [2, 3, 4, 5])
    for index, (first, second) in enumerate(zip(alone, company, strict=True)):
        if _differ(first[OBSERVED], second[OBSERVED], leak_max):
            where = f"before its attention call {index}" if index < len(calls) else "after its last attention call"
            raise Unfit(f"its tokens reach each other outside of attention ({where})")
    if not any(_differ(first, second, leak_max) for first, second in zip(alone, moved, strict=True)):
        raise Unfit("it takes no positions: packed sequences would run into each other")
    return Probed(calls, logits.shape[-1])


def _pass(
    run: Run, pages: Pages, token_ids: list[int], positions: list[int]
) -> tuple[list[Call], list[Tensor], Tensor]:
    """The calls, what each token brings to them and its logits, and the logits."""
    with pages.probe() as probed:
        logits = run(torch.tensor(token_ids), torch.tensor(positions), torch.arange(len(token_ids)))
    if not probed:
        raise Unfit("its attention does not go through transformers' attention interface")
    return [call for call, _ in probed], [*(brought for _, brought in probed), logits], logits


def _differ(first: Tensor, second: Tensor, leak_max: float) -> bool:
    return bool((first - second).abs().max() > leak_max * first.abs().max().clamp_min(1e-6))
