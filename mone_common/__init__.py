"""Helpers that all other packages use. The name is unlikely to collide with a user's file, unlike `train` or `configs`."""
