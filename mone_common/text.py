"""Formatting of text for output."""

from pathlib import Path


def printable(text: object) -> str:
    """The text with unprintable characters, such as terminal control characters, as escape sequences."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in str(text)
    )


def excerpt(text: object, limit: int = 120) -> str:
    """The text on one line in ASCII, cut at `limit` unless it is a path. File names may contain any bytes."""
    line = printable(str(text).encode("ascii", "backslashreplace").decode())
    return line if len(line) <= limit or isinstance(text, Path) else f"{line[:limit]}..."


def clock(seconds: float) -> str:
    """A duration as h:mm:ss, to the nearest second."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
