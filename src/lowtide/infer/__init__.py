"""Generate text and evaluate, with the same blocks that training uses."""
