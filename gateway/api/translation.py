"""From the wire's words to the engine's: messages to token ids, OpenAI's parameters to SamplingParams.

The engine never sees a tenant, a model name or a message; it gets token ids, a domain and a salt.
"""

import asyncio
import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from engine.errors import TokenizerError
from engine.protocol import Ready, SamplingParams, Submit
from engine.scheduling.tiers import TIERS
from engine.text.tokenizer import Tokenizer
from gateway.api import wire
from gateway.api.problems import InvalidRequestError, ModelNotFoundError
from gateway.api.structure import checked, grammar_of
from gateway.secrets import Secrets, cache_salt
from gateway.sequences import sequence_id
from gateway.settings import Settings

INLINE_CHARS_MAX = 8_192  # longer texts are tokenized in a thread: the event loop serves everybody
SEED_MASK = 2**63 - 1

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Work:
    """What one request asks of the engine, with every default filled in."""

    model: str
    prompt_token_ids: list[int]
    sampling: SamplingParams  # of the first answer; the others differ in their seed
    n: int  # answers
    echo: str  # what every answer's text begins with
    stream: bool
    include_usage: bool
    cache_salt: str  # the client's own, "" for none
    tier: str = "default"
    echo_offsets: tuple[int, ...] = ()  # where each prompt token begins in `echo`, if its log probability is told there
    prompt_logprobs: int = -1  # vLLM's field of that name, as SamplingParams has it
    cover: bool | None = None  # whether the stream hides its tokens' lengths; None: as the server does by itself

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def max_tokens(self) -> int:
        """The most tokens that all answers together may have."""
        return self.n * self.sampling.max_tokens

    def samplings(self, max_tokens: int) -> list[SamplingParams | None]:
        """The parameters of each answer when all of them together may have ``max_tokens``: an equal share each, one
        more for the first where it does not divide. None where nothing is left."""
        share, rest = divmod(min(max_tokens, self.max_tokens), self.n)
        shares = [share + (index < rest) for index in range(self.n)]
        return [
            msgspec.structs.replace(
                self.sampling,
                max_tokens=num,
                seed=_seed_of(self.sampling.seed, index),
                prompt_logprobs=-1 if index else self.sampling.prompt_logprobs,  # told once: it is the same prompt
            )
            if num
            else None
            for index, num in enumerate(shares)
        ]


@dataclass(frozen=True, slots=True)
class Echo:
    """What every answer begins with, and where each prompt token begins in it, where that is asked for."""

    text: str = ""
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Translator:
    """Turns parsed requests into Work. Raises InvalidRequestError or ModelNotFoundError."""

    tokenizer: Tokenizer
    settings: Settings
    entropy: Callable[[int], bytes]

    async def chat(self, request: wire.ChatRequest, ready: Ready) -> Work:
        self._check_model(request.model)
        messages = [
            {"role": "system" if message.role == "developer" else message.role, "content": wire.content_text(message)}
            for message in request.messages
        ]
        num_chars = sum(len(message["content"]) for message in messages)
        try:
            token_ids = await _off_loop(num_chars, lambda: self.tokenizer.encode_chat(messages))
        except TokenizerError as error:
            raise InvalidRequestError("the model's chat template refused these messages", "messages") from error
        grammar = await self._grammar(request)
        named = "max_completion_tokens" if request.max_completion_tokens is not None else "max_tokens"
        return self._work(request, token_ids, request.max_new_tokens, named, "messages", Echo(), grammar, ready)

    async def completion(self, request: wire.CompletionRequest, ready: Ready) -> Work:
        self._check_model(request.model)
        prompt = wire.prompt_of(request)
        offsets: list[int] = []
        if isinstance(prompt, str):
            token_ids, offsets = await _off_loop(len(prompt), lambda: self.tokenizer.encode_with_offsets(prompt))
        else:
            token_ids = prompt
            for index, token_id in enumerate(token_ids):
                if not 0 <= token_id < ready.vocab_size:
                    last = ready.vocab_size - 1
                    raise InvalidRequestError(f"prompt[{index}] is {token_id}, outside 0..{last}", "prompt")
        grammar, echo = await self._grammar(request), Echo()
        if request.echo:
            text = prompt if isinstance(prompt, str) else self.tokenizer.decode(token_ids)
            if request.logprobs is not None and not isinstance(prompt, str):
                offsets = await _off_loop(len(text), lambda: self.tokenizer.offsets_in_text(token_ids))
            echo = Echo(text, tuple(offsets) if request.logprobs is not None else ())
        return self._work(request, token_ids, request.max_tokens, "max_tokens", "prompt", echo, grammar, ready)

    def _check_model(self, model: str) -> None:
        if model != self.tokenizer.model_id:
            raise ModelNotFoundError(model)

    async def _grammar(self, request: wire.Common) -> str:
        """The form of the answer, known to compile; "" for any."""
        text, name = grammar_of(request)
        return await asyncio.to_thread(checked, text, name) if text else ""

    def _work(
        self,
        request: wire.ChatRequest | wire.CompletionRequest,
        token_ids: list[int],
        asked: int | None,
        asked_in: str,
        prompt_in: str,
        echo: Echo,
        grammar: str,
        ready: Ready,
    ) -> Work:
        max_tokens = _room(
            len(token_ids), asked, asked_in, prompt_in, ready.context_max, self.settings.max_tokens_default
        )
        asked_of_prompt = _count(request.prompt_logprobs)
        num_scores = max(asked_of_prompt, request.num_logprobs if echo.offsets else -1)
        seed = request.seed if request.seed is not None else int.from_bytes(self.entropy(8), "big")
        return Work(
            model=request.model,
            prompt_token_ids=token_ids,
            sampling=_sampling(request, max_tokens, seed & SEED_MASK, grammar, ready.vocab_size, num_scores),
            n=request.n or 1,
            echo=echo.text,
            stream=bool(request.stream),
            include_usage=request.include_usage,
            cache_salt=request.cache_salt or "",
            tier=request.tier,
            echo_offsets=echo.offsets,
            prompt_logprobs=asked_of_prompt,
            cover=request.cover,
        )


def _seed_of(seed: int, index: int) -> int:
    """Of answer ``index``: the first has the request's own, so that it is what n=1 gives."""
    if index == 0:
        return seed
    text = b"bulkhead/choice/v1\0%d\0%d" % (seed, index)
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") & SEED_MASK


def _sampling(
    request: wire.ChatRequest | wire.CompletionRequest,
    max_tokens: int,
    seed: int,
    grammar: str,
    vocab_size: int,
    prompt_logprobs: int,
) -> SamplingParams:
    """The request's parameters with every default filled in. Raises InvalidRequestError naming the field."""
    if request.min_tokens is not None and request.min_tokens > max_tokens:
        raise InvalidRequestError(
            f"min_tokens is {request.min_tokens}, but at most {max_tokens} tokens are generated", "min_tokens"
        )
    biases, stop_token_ids = request.biases, tuple(request.stop_token_ids or ())
    for name, token_ids in (("logit_bias", [token_id for token_id, _ in biases]), ("stop_token_ids", stop_token_ids)):
        for token_id in token_ids:
            if token_id >= vocab_size:
                raise InvalidRequestError(f"{name} names token {token_id}, outside 0..{vocab_size - 1}", name)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_given(request.temperature, 1.0),
        top_p=_given(request.top_p, 1.0),
        seed=seed,
        stop=request.stop_texts,
        ignore_eos=bool(request.ignore_eos),
        top_k=max(0, request.top_k or 0),
        min_p=_given(request.min_p, 0.0),
        repetition_penalty=_given(request.repetition_penalty, 1.0),
        presence_penalty=_given(request.presence_penalty, 0.0),
        frequency_penalty=_given(request.frequency_penalty, 0.0),
        logit_bias=biases,
        stop_token_ids=stop_token_ids,
        min_tokens=request.min_tokens or 0,
        include_stop=bool(request.include_stop_str_in_output),
        logprobs=request.num_logprobs,
        grammar=grammar,
        prompt_logprobs=prompt_logprobs,
    )


def _count(asked: int | None) -> int:
    return -1 if asked is None else asked


def _given(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _room(num_prompt: int, asked: int | None, asked_in: str, prompt_in: str, context_max: int, default: int) -> int:
    """How many tokens may be generated; refuses what cannot fit into the context, naming the field at fault."""
    if num_prompt == 0:
        raise InvalidRequestError(f"{prompt_in} holds no token", prompt_in)
    room = context_max - num_prompt
    if room < 1:
        raise InvalidRequestError(
            f"{prompt_in} has {num_prompt} tokens; the context holds {context_max} with at least one for the answer",
            prompt_in,
            "context_length_exceeded",
        )
    if asked is None:
        return min(default, room)
    if asked > room:
        raise InvalidRequestError(
            f"{asked_in} is {asked}, but {prompt_in} has {num_prompt} tokens and the context holds {context_max}",
            asked_in,
            "context_length_exceeded",
        )
    return asked


def submits_of(
    work: Work,
    *,
    max_tokens: int,
    request_id: str,
    tenant_id: str,
    weight: int,
    secrets: Secrets,
    entropy: Callable[[int], bytes],
) -> list[Submit | None]:
    """The engine's view: the tenant is only a domain and a salt. A client's own salt subdivides its tenant's.

    One an answer, with ``max_tokens`` for all; None for an answer that gets none.
    """
    salt = cache_salt(secrets, tenant_id)
    if work.cache_salt:
        salt = hmac.new(salt, b"bulkhead/client-salt/v1\0" + work.cache_salt.encode(), hashlib.sha256).digest()
    return [
        Submit(
            sequence_id=sequence_id(request_id, index),
            domain=tenant_id,
            cache_salt=salt,
            prompt_token_ids=work.prompt_token_ids,
            sampling=sampling,
            priority=TIERS[work.tier],
            weight=weight,
            nonce=int.from_bytes(entropy(8)) >> 1,
        )
        if sampling is not None
        else None
        for index, sampling in enumerate(work.samplings(max_tokens))
    ]


async def _off_loop(num_chars: int, encode: Callable[[], T]) -> T:
    return encode() if num_chars <= INLINE_CHARS_MAX else await asyncio.to_thread(encode)
