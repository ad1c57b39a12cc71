"""From a row of logits to one token, whoever else is in the batch."""
