"""Hydra configuration files of the project, found by name as a package."""
