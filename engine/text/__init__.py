"""Between tokens and text: the tokenizer, whole characters, stop strings."""
