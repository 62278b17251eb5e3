"""Compares two models on the same documents.

    comparison = compare(read_result(a), read_result(b))
    comparison["differences"]["bits_per_byte"]        # {"value": -0.02, "low": -0.03, "high": -0.01}: b is better

Documents are paired, so the interval is narrower than those of the two models.
"""

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from mone_common.console import UserError
from mone_eval.intervals import paired_difference

COUNTED = ("sha256", "bytes")
"""What must be the same in both records of a document."""


def compare(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Second minus first, paired by document: bits per byte, and nats per token if both have the same tokens.

    first, second: records of mone-evaluate with `text`. Raises UserError if they are not on the same documents.
    """
    documents, others = (_documents(result, place) for result, place in ((first, "first"), (second, "second")))
    if [[each[name] for name in COUNTED] for each in documents] != [[each[name] for name in COUNTED] for each in others]:
        raise UserError(
            f"compare: the results are of different texts ({first['text']['name']}, {len(documents)} documents; "
            f"{second['text']['name']}, {len(others)}); evaluate both with the same text and limits"
        )
    nll_N, other_nll_N, bytes_N = (
        np.array([each[name] for each in its]) for its, name in ((documents, "nll"), (others, "nll"), (documents, "bytes"))
    )
    tokens_N, other_tokens_N = ([each["tokens"] for each in its] for its in (documents, others))
    differences = {"bits_per_byte": paired_difference(nll_N / math.log(2), other_nll_N / math.log(2), bytes_N)}
    if tokens_N == other_tokens_N:
        differences["nll_per_token"] = paired_difference(nll_N, other_nll_N, tokens_N)
    return {
        "first": first.get("model"),
        "second": second.get("model"),
        "documents": len(documents),
        "better_documents": int((other_nll_N < nll_N).sum()),
        "differences": {name: asdict(interval) for name, interval in differences.items()},
    }


def _documents(result: dict[str, Any], place: str) -> list[dict[str, Any]]:
    text = result.get("text")
    if not isinstance(text, dict) or not isinstance(text.get("documents"), list):
        raise UserError(f"compare: the {place} result has no scores of text; evaluate it with text=PATH")
    documents: list[dict[str, Any]] = text["documents"]
    return documents
