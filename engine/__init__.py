"""The engine room: sequences, blocks, scheduler, model runner, sampler, tokenizer, worker protocol."""
