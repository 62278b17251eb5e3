"""Hydra's configuration files. This is a package so that Hydra finds them wherever it is installed."""
