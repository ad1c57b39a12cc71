"""The baseline that everybody has: transformers' own `generate` on one padded batch after another.

A batch runs until its longest answer is done. A job's latency ends with its own last token, as if it were streamed:
that is kinder than `generate`, which hands out nothing before the whole batch has ended.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.bench.timeline import Timeline
from engine.bench.workloads import Job


class StaticBatches:
    def __init__(self, model_dir: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
        self._model = model.eval()
        self.vocab_size = int(self._model.config.vocab_size)

    @torch.inference_mode()
    def run(self, jobs: Sequence[Job], *, concurrency: int, now: Callable[[], float]) -> tuple[list[Timeline], float]:
        """Every job from arrival to end, and the share of the batch's rows that had work, over all steps."""
        timelines: list[Timeline] = []
        arrivals_s = [now()] * min(concurrency, len(jobs))  # then each job arrives when its client's last one ended
        num_slots = num_used = 0
        for first in range(0, len(jobs), concurrency):
            batch = jobs[first : first + concurrency]
            times_s = self._batch(batch, now)
            num_slots += len(times_s) * concurrency
            num_used += sum(job.num_output_tokens for job in batch)
            for index, job in enumerate(batch):
                timelines.append(Timeline(arrivals_s[index], times_s[: job.num_output_tokens]))
                arrivals_s[index] = timelines[-1].token_times_s[-1]
        return timelines, num_used / num_slots

    def _batch(self, batch: Sequence[Job], now: Callable[[], float]) -> list[float]:
        """When each of the batch's tokens came."""
        width = max(len(job.prompt_token_ids) for job in batch)
        token_ids = torch.zeros((len(batch), width), dtype=torch.int64)
        mask = torch.zeros((len(batch), width), dtype=torch.int64)
        for index, job in enumerate(batch):  # padded on the left, so that all answers begin in one column
            token_ids[index, width - len(job.prompt_token_ids) :] = torch.tensor(job.prompt_token_ids)
            mask[index, width - len(job.prompt_token_ids) :] = 1
        times_s: list[float] = []
        num_tokens = max(job.num_output_tokens for job in batch)

        def tick(token_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            times_s.append(now())
            return torch.zeros(len(token_ids), dtype=torch.bool)

        self._model.generate(
            token_ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            stopping_criteria=[tick],
            pad_token_id=0,
        )
        return times_s
