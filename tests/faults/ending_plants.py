"""Plants in what an abort between two steps sends: nobody but the auditor looks at it before it leaves."""

from collections.abc import Callable
from typing import Any

import msgspec

from engine.protocol import TokenLogprob
from tests.faults.array_plants import Plant, wrap
from tests.faults.stage import Run, decode


def in_ending(change: Callable[[Any, Run], Any]) -> Plant:
    """In what an abort between two steps sends."""

    def plant(run: Run) -> None:
        def make(output: Any) -> Any:
            def faulty(sequence: Any, *arguments: Any) -> Any:
                right = output(sequence, *arguments)
                aborted = run.reached_step < 0 and right.finish_reason == "abort"
                wrong = change(right, run) if aborted else right
                if wrong != right:
                    run.reach()
                return wrong

            return faulty

        wrap(run.core, "_output", make)

    return plant


def others_text(output: Any, run: Run) -> Any:
    """What another sequence has said last."""
    others = [one for one in run.core._sequences.values() if one.num_completion_tokens]
    text = decode(others[0].token_ids[-1:]) if others else ""
    return msgspec.structs.replace(output, text=output.text + text)


def others_tokens(output: Any, run: Run) -> Any:
    others = [one for one in run.core._sequences.values() if one.num_completion_tokens]
    return msgspec.structs.replace(output, token_ids=tuple(others[0].token_ids[-1:])) if others else output


def others_logprobs(output: Any, run: Run) -> Any:
    told = TokenLogprob(1, -1.0)
    return msgspec.structs.replace(output, logprobs=(*output.logprobs, told))


def one_less(output: Any, run: Run) -> Any:
    counted = output.num_completion_tokens
    return msgspec.structs.replace(output, num_completion_tokens=counted - 1) if counted else output
