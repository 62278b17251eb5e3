"""Scores of tasks of lm-evaluation-harness for every stream of a study, in the same pass over the weights.

    prepared = prepare_tasks(["arc_easy"], task_data="data/tasks")
    tasks = StreamedTasks(prepared, model, tokenizer, limit=None, batch_tokens=4096)
    study = Study(model, hooked, streams, [scored, tasks.text], calibration)
    ...
    result |= tasks.results(result["streams"], losses)          # of `tasks.text`, one for each stream

lm-evaluation-harness asks for the log-likelihoods of all answers at once. They are collected, scored as text and given back,
so that its own prompts and metrics count. Tasks that generate text cannot be scored this way.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from mone_common.console import UserError
from mone_eval.documents import Document
from mone_eval.layerwise import LayerwiseModel
from mone_eval.sparsity_study import Losses, Text
from mone_eval.tasks import PreparedTasks
from mone_eval.windows import Window

PAPER = ("arc_challenge", "arc_easy", "hellaswag", "winogrande", "truthfulqa_mc2")
"""Tasks whose mean score arXiv 2605.08575 requires to stay above 95 % of that of the dense model."""
KEPT_SCORE = 0.95
METRICS = ("acc_norm", "acc")
"""The score of a task: the first of these that it has."""

Request = tuple[tuple[int, ...], tuple[int, ...]]
"""Tokens of a context and of an answer."""


class _AnsweredLM(HFLM):
    """Encodes requests as lm-evaluation-harness does; collects them, or answers them from a table."""

    def __init__(self, model: Any, tokenizer: Any, answers: dict[Request, tuple[float, bool]] | None = None) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal")
        self.asked: dict[Request, None] = {}
        self._answers = answers

    def _loglikelihood_tokens(self, requests: Any, *_: Any, **__: Any) -> list[tuple[float, bool]]:
        keys = [(tuple(context), tuple(answer)) for _, context, answer in requests]
        self.asked |= dict.fromkeys(keys)
        return [(0.0, False) if self._answers is None else self._answers[key] for key in keys]

    def loglikelihood_rolling(self, *_: Any, **__: Any) -> Any:
        raise UserError("tasks: a task that scores whole documents; give the documents as text")

    def generate_until(self, *_: Any, **__: Any) -> Any:
        raise UserError("tasks: a task that generates text cannot be studied; leave it out")


class StreamedTasks:
    """The answers of tasks as a text, and their scores."""

    def __init__(
        self, prepared: PreparedTasks, model: LayerwiseModel, tokenizer: Any, *, limit: int | None, batch_tokens: int
    ) -> None:
        self._prepared, self._model, self._tokenizer, self._limit = prepared, model.model, tokenizer, limit
        lm = _AnsweredLM(self._model, tokenizer)
        self._run(lm)
        self._requests = list(lm.asked)
        documents, windows = [], []
        for number, (context, answer) in enumerate(self._requests):
            if len(answer) > lm.max_length:
                raise UserError(
                    f"tasks={','.join(prepared.names)}: an answer has {len(answer)} tokens, more than the context of the "
                    f"model, {lm.max_length}"
                )
            # As HFLM does: the context is cut at its beginning.
            tokens = (context + answer)[-(lm.max_length + 1) :]
            documents.append(Document(f"request:{number + 1}", torch.tensor(tokens), 0, ""))
            windows.append(Window(number, 0, len(tokens) - 1, len(tokens) - len(answer)))
        self.text = Text(documents, windows, None).split(batch_tokens)

    def _run(self, lm: _AnsweredLM) -> dict[str, Any]:
        # lm-evaluation-harness draws progress bars for work that takes no time here, and prints what it does.
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            results: dict[str, Any] = self._prepared.run_with(lm, limit=self._limit)["results"]
        return results

    def results(self, streams: Sequence[dict[str, Any]], losses: Sequence[Losses]) -> dict[str, Any]:
        """The scores of each stream, their means, and the largest sparsity that keeps 95 % of the dense mean.

        streams: of results.json. losses: of `text`, for each stream.
        """
        scores: dict[str, dict[str, Any]] = {}
        for stream, its in zip(streams, losses, strict=True):
            answers = {
                self._requests[window.document]: (-nll, greedy)
                for window, nll, greedy in zip(self.text.in_batches, its.nll_W.tolist(), its.greedy_W.tolist(), strict=True)
            }
            lm = _AnsweredLM(self._model, self._tokenizer, answers)
            scores[stream["name"]] = self._run(lm)
        means = {name: mean_score(results) for name, results in scores.items()}
        names = self._prepared.names
        return {
            "tasks": {"names": names, "limit": self._limit, "scores": scores, "mean": means},
            "largest_sparsity": largest_sparsity(streams, means, names),
        }


def mean_score(results: dict[str, Any]) -> float:
    """The mean over tasks of accuracy, normalised by the length of the answers where the task does so."""
    found = [
        next(its["metrics"][metric]["value"] for metric in METRICS if metric in its["metrics"])
        for its in results.values()
        if its["shown"] and any(metric in its["metrics"] for metric in METRICS)
    ]
    return sum(found) / len(found)


def largest_sparsity(streams: Sequence[dict[str, Any]], means: dict[str, float], names: Sequence[str]) -> dict[str, Any]:
    """For each part and way to select, the largest sparsity up to which the mean score stays above 95 % of the dense one."""
    dense = means["all"]
    found: dict[str, float] = {}
    for stream in sorted(streams, key=lambda stream: -(stream["kept"] or 0)):
        if stream["criterion"] != "abs_gate" or stream["select"] not in ("exact", "threshold"):
            continue
        name = f"{stream['part']} {stream['select']}"
        found.setdefault(name, 0.0)
        fell = any(
            means[other["name"]] < KEPT_SCORE * dense
            for other in streams
            if (other["part"], other["select"], other["criterion"]) == (stream["part"], stream["select"], "abs_gate")
            and other["kept"] >= stream["kept"]
        )
        if not fell:
            found[name] = 1 - stream["kept"]
    missing = [name for name in PAPER if name not in names]
    sentences = [
        f"{name}: the mean of {', '.join(names)} stays above 95 % of {dense:.3f} up to a sparsity of {sparsity:.0%}."
        for name, sparsity in found.items()
    ]
    if missing:
        sentences.append(f"Of the tasks of arXiv 2605.08575, {', '.join(missing)} were not scored.")
    return {"by_part_and_selection": found, "dense": dense, "missing": missing, "sentences": sentences}
