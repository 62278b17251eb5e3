"""The model in transformers: configuration, classes, weight map, checkpoints, export."""
