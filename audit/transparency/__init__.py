"""The transparency log: entries, Merkle tree, signed checkpoints, publication."""
