"""What is likely to be secret, by its name, and texts without it.

is_secret("WANDB_API_KEY")                   # True
masked("launch.environment.HF_TOKEN=hf_1")   # "launch.environment.HF_TOKEN=***"
found_secret("wandb login 0123abcd")         # "wandb login"; None: nothing in this line of bash is known to be secret

Names cannot tell all: a secret under a harmless name is found only where it is the value of a secret variable here.
"""

import os
import re

SECRET = re.compile(
    r"SECRET|PASSW|PASSPHRASE|PASSCODE|CREDENTIAL|COOKIE|_PWD|CONN(ECTION)?_?STR|DATABASE_URL"
    r"|(?<!_P)KEYS?\d*(_|$)|TOKENS?\d*(_|$)|(?<!BY)(?<!COM)PASS(_|$)"
    r"|(^|_)(AUTH|AUTHORI[SZ]ATION|BEARER|CREDS?|DSN|JWT|PAT|SAS)(_|$)"
)
"""In names of variables whose values are secret, in capitals. InfiniBand's PKEY is none."""
NO_SECRET = re.compile(r"_(FILE|PATH|DIR|SOCK)$")
"""At the end of names of variables that only say where one lies."""
LITERAL = r"""(?!["']?(?:`|\$(?!['"])))(?=["']?[^\s"'])"""
"""Before a value as it is, in place of one that the shell works out."""
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
"""Lines of bash that hold a secret without a name."""
NAMED = re.compile(r"""(?<![\w.])([A-Za-z_][\w.-]*)["']?\s*[=:]\s*""")
SHORTEST = 6
"""Letters of a secret that is looked for by its value: shorter ones stand in many texts by chance."""


def is_secret(name: str) -> bool:
    """Whether the value of a variable or an option of this name, of which the last part counts, is likely to be secret."""
    last = name.rpartition(".")[2].upper().replace("-", "_")
    return SECRET.search(last) is not None and NO_SECRET.search(last) is None


def masked(text: str) -> str:
    """The text without all that stands behind the first secret name and its = or colon."""
    for match in NAMED.finditer(text):
        if is_secret(match[1]):
            return text if match.end() == len(text) else f"{text[: match.end()]}***"
    return text


def found_secret(text: str) -> str | None:
    """What is secret in a line of bash or an option's value: the name it has there or in this process's environment."""
    names = (name for match in ASSIGNED.finditer(text) for name in match.groups() if name is not None)
    if name := next(filter(is_secret, names), None):
        return name
    if command := next((command for command, pattern in COMMANDS.items() if pattern.search(text)), None):
        return command
    here = os.environ.items()
    return next((name for name, value in here if len(value) >= SHORTEST and value in text and is_secret(name)), None)
