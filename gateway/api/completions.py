"""POST /v1/completions: one prompt as text or token ids."""

from dataclasses import dataclass

from gateway.api.generation_route import GenerationRoute
from gateway.api.logprobs import completion_logprobs, echoed_logprobs
from gateway.api.settlement import Settler
from gateway.api.shapes import Choice, Frame, Json, Logprobs, usage_json
from gateway.api.translation import Translator
from gateway.api.wire import CompletionRequest, parse_completion
from gateway.services import Services
from tenancy.usage.meter import Usage


def completions_route(
    services: Services, settler: Settler, translator: Translator
) -> GenerationRoute[CompletionRequest]:
    return GenerationRoute(
        services,
        settler,
        id_prefix="cmpl-",
        parse=parse_completion,
        translate=translator.completion,
        shape=CompletionShape,
    )


@dataclass(frozen=True, slots=True)
class CompletionShape:
    """Chunks and whole answers are the same object, `text_completion`. An echo is the beginning of every answer's
    text."""

    frame: Frame

    def opening(self, prompt: Logprobs) -> list[Json]:
        echo, told = self.frame.work.echo, self._echoed(prompt)
        return [self._chunk(index, echo, told, None) for index in range(self.frame.work.n)] if echo or told else []

    def delta(self, index: int, text: str, logprobs: Logprobs) -> list[Json]:
        return [self._chunk(index, text, self._logprobs(logprobs), None)]

    def closing(self, index: int, finish_reason: str) -> list[Json]:
        return [self._chunk(index, "", None, finish_reason)]

    def usage_chunk(self, usage: Usage) -> Json:
        return self.frame.whole("text_completion", []) | {"usage": usage_json(usage)}

    def whole(self, choices: list[Choice], prompt: Logprobs, usage: Usage) -> Json:
        echoed, prompt_field = self._echoed(prompt), self.frame.vllm_prompt_logprobs(prompt)
        told = []
        for index, choice in enumerate(choices):
            logprobs = self._logprobs(choice.logprobs)
            if echoed is not None and logprobs is not None:
                logprobs = {name: echoed[name] + values for name, values in logprobs.items()}
            text = self.frame.work.echo + choice.text
            told.append(_choice(index, text, logprobs, choice.finish_reason) | prompt_field)
        return self.frame.whole("text_completion", told) | {"usage": usage_json(usage)}

    def _logprobs(self, logprobs: Logprobs) -> Json | None:
        frame = self.frame
        return completion_logprobs(logprobs, frame.token_bytes, len(frame.work.echo)) if frame.tells_logprobs else None

    def _echoed(self, prompt: Logprobs) -> Json | None:
        work = self.frame.work
        if not work.echo_offsets:
            return None
        num_top = work.sampling.logprobs
        return echoed_logprobs(work.prompt_token_ids, prompt, num_top, self.frame.token_bytes, work.echo_offsets)

    def _chunk(self, index: int, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
        return self.frame.chunk("text_completion", [_choice(index, text, logprobs, finish_reason)])


def _choice(index: int, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
