"""The run: data, engine, loop, checkpoints, metrics."""
