"""The batch-shaping losses: a function, modules, and what makes the shards of all ranks one batch."""
