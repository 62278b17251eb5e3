"""Pages of the site that are made of other files: the root's README, CONTRIBUTING and CHANGELOG, and the API reference.

mkdocs calls `on_files` and `on_page_markdown` (mkdocs.yml, `hooks`).
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
FROM_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the root, and their pages."""
API = (
    "mone_model",
    "mone_model.hf",
    "mone_model.vllm",
    "mone_model.megatron",
    "mone_eval",
    "train",
    "data_prep",
    "launch",
    "mone_common",
)
"""Packages of the API reference, one page each."""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/."""
    for source, page in FROM_ROOT.items():
        text = (ROOT / source).read_text().replace("](docs/", "](")
        for other, target in FROM_ROOT.items():
            text = text.replace(f"]({other}", f"]({target}")
        files.append(File.generated(config, page, content=text))
    for package in API:
        files.append(File.generated(config, f"api/{package}.md", content=reference(package)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links to files of the root lead to their pages."""
    for source, page in FROM_ROOT.items():
        markdown = markdown.replace(f"](../{source}", f"]({page}")
    return markdown


def reference(package: str) -> str:
    """The page of a package: its own docstring, then all its modules, those of packages with a page of their own aside."""
    folder = ROOT / package.replace(".", "/")
    names = []
    for path in sorted(folder.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if not any(other != package and f"{name}.".startswith(f"{other}.") and other.startswith(package) for other in API):
            names.append(name)
    return "\n\n".join([f"# `{package}`", *(f"::: {name}" for name in names)])
