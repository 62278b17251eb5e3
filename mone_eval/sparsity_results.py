"""Results of a sparsification study: results.json, thresholds.json, charts and a page.

    result = publish_results(study, folder, options, seconds, tasks=None)
    result["streams"][1]["nll_per_token"]          # {"value": 3.04, "low": 2.99, "high": 3.08}, 95 % over documents
    print(console_table(result))

`results.json` has all numbers, `index.html` shows them.
"""

import json
import logging
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mone_eval.documents import checksum
from mone_eval.intervals import paired_difference, score_text
from mone_eval.results import align, environment
from mone_eval.sparsity_page import write_page
from mone_eval.sparsity_study import Losses, Study, Text
from mone_eval.windows import sum_by_document

if TYPE_CHECKING:
    from mone_eval.sparsity_tasks import StreamedTasks  # needs lm_eval

logger = logging.getLogger(__name__)

FORMAT = "mone-sparsity-1"
REPORT_SECONDS = 5.0
NEAR_ZERO = (0.001, 0.01, 0.1)
"""Values of |act(gate)| below which the share of neurons is stated."""
BINS = range(-24, 9)
"""Powers of two between which |act(gate)| is counted; smaller values are in the first bin, larger ones in the last."""


def publish_results(
    study: Study, folder: Path, options: dict[str, Any], seconds: float, tasks: "StreamedTasks | None"
) -> dict[str, Any]:
    """Score all streams and write the files to a folder; returns the content of results.json."""
    losses_ST, reported = [], time.monotonic()
    for index in range(len(study.streams)):
        losses_ST.append(study.score(index))
        if time.monotonic() - reported >= REPORT_SECONDS:
            reported = time.monotonic()
            logger.info(f"scored {index + 1} of {len(study.streams)} streams")
    result = environment(options) | {"format": FORMAT, "seconds": round(seconds, 1)} | results_of(study, losses_ST)
    if tasks is not None:
        result |= tasks.results(result["streams"], [losses for _, losses in losses_ST])
    write_json(folder / "results.json", result)
    if study.thresholds:
        write_json(folder / "thresholds.json", thresholds_of(study, options["model"]))
    write_page(folder, result)
    return result


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def results_of(study: Study, losses_ST: list[list[Losses]]) -> dict[str, Any]:
    """The scores of all streams, the losses of each document, and the distribution of |act(gate)|.

    losses_ST: of each stream and text.
    """
    scored = study.texts[0]
    nll_SN, tokens_N = [], torch.empty(0)
    for losses, *_ in losses_ST:
        nll_N, tokens_N = sum_by_document(scored.in_batches, losses.nll_W, documents=len(scored.documents))
        nll_SN.append(nll_N.tolist())
    bytes_N = [document.num_bytes for document in scored.documents]
    streams = []
    for index, stream in enumerate(study.streams):
        score = score_text(nll_SN[index], tokens_N, bytes_N, seed=study.seed)
        difference = paired_difference(nll_SN[0], nll_SN[index], tokens_N, seed=study.seed)
        kept = study.share_kept(index, stream.part)
        streams.append(
            {"name": stream.name, **stream._asdict()}
            | {name: asdict(getattr(score, name)) for name in ("nll_per_token", "perplexity", "bits_per_byte")}
            | {"nll_above_all": asdict(difference), "kept": study.mean_kept(index, stream.part), "kept_by_layer": kept}
        )
    return {
        "model": describe(study),
        "text": describe_text(scored),
        "calibration_text": describe_text(study.calibration),
        "streams": streams,
        "documents": [
            {"name": document.name, "bytes": document.num_bytes, "tokens": int(tokens), "nll": list(nll)}
            for document, tokens, nll in zip(scored.documents, tokens_N, zip(*nll_SN, strict=True), strict=True)
        ],
        "gates": [
            {"layer": layer, "part": part} | distribution(counts_M)
            for (layer, part), counts_M in sorted(study.counts.items())
        ],
        "thresholds": thresholds_by_part(study),
    }


def describe(study: Study) -> dict[str, Any]:
    """Class and size of the model, and its experts."""
    model = study.model.model
    return {
        "class": type(model).__name__,
        "model_type": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "layers": len(study.model.layers),
        "experts": [
            {"layer": layer, "name": one.name, "part": one.part, "experts": one.experts, "neurons": one.neurons}
            for layer, experts in enumerate(study.experts)
            for one in experts
        ],
    }


def describe_text(text: Text) -> dict[str, Any]:
    """Size and checksum of a text."""
    return {
        "documents": len(text.documents),
        "tokens": text.tokens,
        "bytes": sum(document.num_bytes for document in text.documents),
        "window": max(map(len, text.windows)),
        "sha256": checksum(text.documents),
    }


def distribution(counts_M: torch.Tensor) -> dict[str, Any]:
    """Shares of neurons by |act(gate)|, from the counts of `mone_model.thresholds`."""
    values_M = (torch.arange(len(counts_M), dtype=torch.int32) << 15).view(torch.float32)
    # The counts of infinity and NaN are at the end.
    finite_M = torch.isfinite(values_M)
    total = int(counts_M.sum())
    exponent_M = torch.where(values_M > 0, values_M.log2().floor(), -math.inf).clamp(BINS.start, BINS.stop - 1)
    exponent_M = torch.where(finite_M, exponent_M, BINS.stop - 1).long() - BINS.start
    histogram = torch.zeros(len(BINS), dtype=torch.int64).index_add_(0, exponent_M, counts_M)
    return {
        "rows_times_neurons": total,
        "near_zero": {str(bound): int(counts_M[values_M < bound].sum()) / total for bound in NEAR_ZERO},
        "histogram": (histogram.double() / total).tolist(),
        "bins": [2.0**exponent for exponent in BINS],
    }


def thresholds_by_part(study: Study) -> dict[str, dict[str, dict[int, float]]]:
    """By part, ratio and layer: the thresholds of the streams that select by threshold."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for (index, layer), threshold in sorted(study.thresholds.items()):
        stream = study.streams[index]
        found.setdefault(stream.part, {}).setdefault(f"{stream.ratio:g}", {})[layer] = threshold
    return found


def thresholds_of(study: Study, model: str) -> dict[str, Any]:
    """The content of thresholds.json: for each part and ratio a list with one threshold per layer that has experts."""
    parts = {
        part: {
            "layers": list(next(iter(by_ratio.values()))),
            "ratios": {ratio: list(by_layer.values()) for ratio, by_layer in by_ratio.items()},
        }
        for part, by_ratio in thresholds_by_part(study).items()
    }
    about = {"model": model, "model_type": study.model.model.config.model_type, "criterion": "abs_gate", "per": study.per}
    return {"format": "mone-thresholds-1"} | about | {"parts": parts}


def console_table(result: dict[str, Any]) -> str:
    """One line for each stream."""
    rows = []
    for stream in result["streams"]:
        above, kept = stream["nll_above_all"], stream["kept"]
        interval = "" if above["low"] is None else f"[{above['low']:+.4f}, {above['high']:+.4f}]"
        rows.append(
            (
                stream["name"],
                "" if kept is None else f"{kept:.1%}",
                f"{stream['nll_per_token']['value']:.4f}",
                f"{stream['bits_per_byte']['value']:.4f}",
                f"{above['value']:+.4f}",
                interval,
            )
        )
    lines = align(("stream", "kept", "nats/token", "bits/byte", "above all neurons", "95 % interval"), rows)
    return "\n".join([lines, *result.get("largest_sparsity", {}).get("sentences", [])])
