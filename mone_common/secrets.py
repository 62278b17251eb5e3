"""Detect values that are likely secret by their names, and mask them in text.

is_secret("WANDB_API_KEY")                   # True
masked("launch.environment.HF_TOKEN=hf_1")   # "launch.environment.HF_TOKEN=***"
found_secret("wandb login 0123abcd")         # "wandb login"; None: found nothing in this line of bash

A secret with a harmless name is found only if it is the value of a variable with a secret name in this environment.
"""

import os
import re

SECRET = re.compile(
    r"SECRET|PASSW|PASSPHRASE|PASSCODE|CREDENTIAL|COOKIE|_PWD|CONN(ECTION)?_?STR|DATABASE_URL"
    r"|(?<!_P)KEYS?\d*(_|$)|TOKENS?\d*(_|$)|(?<!BY)(?<!COM)PASS(_|$)"
    r"|(^|_)(AUTH|AUTHORI[SZ]ATION|BEARER|CREDS?|DSN|JWT|PAT|SAS)(_|$)"
)
"""Matches upper-case names of variables with secret values. InfiniBand's PKEY is not secret."""
NO_SECRET = re.compile(r"_(FILE|PATH|DIR|SOCK)$")
"""Matches names of variables that hold only the location of a secret."""
LITERAL = r"""(?!["']?(?:`|\$(?!['"])))(?=["']?[^\s"'])"""
"""Matches before a literal value, but not before one that the shell expands."""
ASSIGNED = re.compile(
    rf"""(?<![\w$])([A-Za-z_]\w*)={LITERAL}"""  # NAME=value
    rf"""|\bsetenv\s+(\w+)\s+{LITERAL}"""
    rf"""|(?<!\S)--?([A-Za-z][\w-]*)(?:\s+(?!-)|=){LITERAL}"""  # --name value
    r"""|(?<![\w${-])([A-Za-z][\w-]*):\s*(?!(?:[A-Z][a-z]+\s+)?["']*(?:`|\$(?!['"])))(?=["']?[^\s"'])"""  # a header
)
COMMANDS = {
    "wandb login": re.compile(rf"\bwandb\s+login\s+(?:-\S+\s+)*(?!-){LITERAL}"),
    "curl --user": re.compile(rf"""\bcurl\b.*\s(?:-u|--user)[\s=]*["']?[^\s:"']*:{LITERAL}"""),
    "a password": re.compile(r"://[^/\s:@]*:[^/\s@]+@"),  # within an address
}
"""Lines of bash with a secret that has no name."""
NAMED = re.compile(r"""(?<![\w.])([A-Za-z_][\w.-]*)["']?\s*[=:]\s*""")
SHORTEST = 6
"""Minimum length of a secret that is searched for by value; shorter values occur by chance."""


def is_secret(name: str) -> bool:
    """Whether a variable or option of this name likely has a secret value. Only the last part of a dotted name counts."""
    last = name.rpartition(".")[2].upper().replace("-", "_")
    return SECRET.search(last) is not None and NO_SECRET.search(last) is None


def masked(text: str) -> str:
    """The text with everything after the first secret name and its = or colon replaced by ***."""
    for match in NAMED.finditer(text):
        if is_secret(match[1]):
            return text if match.end() == len(text) else f"{text[: match.end()]}***"
    return text


def found_secret(text: str) -> str | None:
    """The name of a secret in a line of bash or an option's value, from the text or the environment, or None."""
    names = (name for match in ASSIGNED.finditer(text) for name in match.groups() if name is not None)
    if name := next(filter(is_secret, names), None):
        return name
    if command := next((command for command, pattern in COMMANDS.items() if pattern.search(text)), None):
        return command
    here = os.environ.items()
    return next((name for name, value in here if len(value) >= SHORTEST and value in text and is_secret(name)), None)
