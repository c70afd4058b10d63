"""Open a checkpoint, map it, hand out tiles."""
