"""Text for lines, pages and pictures."""

from pathlib import Path


def printable(text: object) -> str:
    """Text for a line, a page or a picture: what cannot be written, or would act on a terminal, as an escape sequence."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in str(text)
    )


def excerpt(text: object, limit: int = 120) -> str:
    """Text on one line of ASCII characters, cut at `limit` unless it is a path: names on a disk may be any bytes."""
    line = printable(str(text).encode("ascii", "backslashreplace").decode())
    return line if len(line) <= limit or isinstance(text, Path) else f"{line[:limit]}..."


def clock(seconds: float) -> str:
    """A duration as h:mm:ss, to the nearest second."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
