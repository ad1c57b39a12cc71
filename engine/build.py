"""From settings to an engine that is ready to step: tokenizer, kernels, model, cache, core."""

import os
import time
from collections.abc import Callable

import torch

from engine.config import WorkerConfig
from engine.core import EngineCore
from engine.errors import ConfigError
from engine.events import NullObserver, Observer, Watched
from engine.model_runner import ModelRunner
from engine.models.facts import Model
from engine.models.load import check_vocabulary
from engine.models.weights import model_digest
from engine.protocol import PROTOCOL_VERSION, Ready
from engine.sampling.matcher import Matchers
from engine.scheduling.order import POLICIES
from engine.text.tokenizer import Tokenizer
from engine.worker_log import log
from kernels.choice import choose

MakeObserver = Callable[[Watched], Observer]


def unobserved(watched: Watched) -> Observer:
    return NullObserver()


def isolation_of(model: Model) -> tuple[str, str]:
    """What is promised of this model on its kernels, and why. Tries the model's products."""
    if not model.backend.exact:
        return "relaxed", f"{model.backend.name} promises nothing about the order of sums"
    if not model.is_exact():
        return "relaxed", "matrix products of this model depend on their company in the last bits"
    return "bitwise", "every row has an order of sums of its own, and the model's products kept it when they were tried"


def build(config: WorkerConfig, make_observer: MakeObserver, epoch: str = "") -> tuple[EngineCore, Ready]:
    """Load everything; ``make_observer`` is called with what it may look at, once that is there.

    Raises ConfigError, or KernelError, with one clear line.
    """
    if config.scheduling not in POLICIES:
        raise ConfigError(f"scheduling must be one of {', '.join(POLICIES)}, not {config.scheduling!r}")
    if not config.model_dir.is_dir():
        raise ConfigError(f"there is no model folder at {config.model_dir}")
    torch.set_num_threads(config.effective_num_threads)
    tokenizer = Tokenizer.load(config.model_dir)
    backend = choose(config.kernels, config.effective_num_threads, log)
    runner = ModelRunner.load(
        config.model_dir,
        dtype=config.dtype,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        num_blocks=config.num_blocks,
        kv_cache_bytes=config.kv_cache_bytes,
        kv_cache_dtype=config.kv_cache_dtype,
        graph_sizes=config.graph_sizes,
        backend=backend,
        log=log,
    )
    isolation, reason = isolation_of(runner.model)
    if isolation == "bitwise":
        torch.set_num_threads(1)  # the kernels have threads of their own; torch's would spin on their cores in between
    elif runner.model.backend.exact:
        log(f"{reason}: isolation is relaxed")
    model = runner.model.config
    check_vocabulary(tokenizer.vocab_size, model.vocab_size)
    digest = model_digest(config.model_dir)
    memory, exact = runner.cache.words(), isolation == "bitwise"
    watched = Watched(
        runner.num_blocks,
        config.block_size,
        config.model_dir,
        memory,
        runner.cache.digester(),
        exact,
        runner.head_facts,
    )
    core = EngineCore(
        runner,
        decode=tokenizer.decode,
        eos_token_ids=tokenizer.eos_token_ids,
        context_max=model.context_max,
        vocab_size=model.vocab_size,
        max_batched_tokens=config.max_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        max_waiting=config.max_waiting,
        observer=make_observer(watched),
        scheduling=config.scheduling,
        wait_max_tokens=config.wait_max_tokens,
        max_prompt_tokens=config.max_prompt_tokens,
        break_off_percent=config.break_off_percent,
        prefix_cache=config.prefix_cache,
        cache_floor_percent=config.cache_floor_percent,
        cache_ceiling_percent=config.cache_ceiling_percent,
        model_digest=digest,
        matchers=Matchers(config.model_dir, model.vocab_size, tokenizer.eos_token_ids),
        clock_ns=time.perf_counter_ns,
    )
    ready = Ready(
        protocol_version=PROTOCOL_VERSION,
        epoch=epoch,
        pid=os.getpid(),
        model_id=tokenizer.model_id,
        model_digest=digest,
        context_max=model.context_max,
        vocab_size=model.vocab_size,
        block_size=config.block_size,
        num_blocks=runner.num_blocks,
        dtype=config.dtype,
        device=runner.model.backend.device.type,
        kernels=runner.model.backend.name,
        isolation=isolation,
    )
    return core, ready
