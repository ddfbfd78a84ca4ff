"""The engine: runs of further training advanced together, as one batched computation."""
