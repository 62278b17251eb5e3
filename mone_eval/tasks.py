"""Runs tasks of lm-evaluation-harness: its own task definitions, prompts, metrics and model class.

    prepared = prepare_tasks(["arc_easy", "mmlu"], task_data="data/tasks")       # UserError: not installed, unknown, no data
    record = prepared.run(model, tokenizer, batch_size=8)
    record["results"]["arc_easy"]["metrics"]["acc"]                              # {"value": 0.61, "stderr": 0.02}

`gold_bits_per_byte` is added to tasks of which the right answer has a log-likelihood: its bits, divided by the bytes of the
answer with the space before it, averaged over the questions. It tells models apart where their accuracy is at chance.
"""

import contextlib
import difflib
import importlib.util
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

from mone_common.console import UserError

INSTALL = "pip install --constraint constraints.txt --constraint constraints-eval.txt --editable '.[eval]'"
RESAMPLES = 1000
"""For standard errors of metrics that are no means over questions; lm-evaluation-harness's 100,000 take minutes."""
SHOWN = 3
"""Largest number of similar names in an error."""


def prepare_tasks(names: Sequence[str], *, task_data: str | None) -> "PreparedTasks":
    """Find the tasks and read their data, before a model is loaded.

    names: tasks, groups or tags of lm-evaluation-harness, or patterns such as mmlu_*. task_data: folder with their data;
    None: the Hugging Face hub. Raises UserError if lm-evaluation-harness is not installed, a name is unknown, or data are
    missing.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"tasks={','.join(names)}: needs lm-evaluation-harness; install it with: {INSTALL}")
    import datasets

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    from mone_eval.task_data import reading_from

    manager = new_manager()
    known = set(manager.all_tasks)
    chosen: list[str] = []
    for name in names:
        found = [name] if name in known else manager.match_tasks([name])
        if not found:
            close = difflib.get_close_matches(name, manager.all_tasks, SHOWN)
            hint = f"did you mean {', '.join(close)}?" if close else "see `lm_eval ls tasks` for the names"
            raise UserError(f"tasks={name}: lm-evaluation-harness has no such task; {hint}")
        chosen += found
    chosen = list(dict.fromkeys(chosen))
    with contextlib.nullcontext() if task_data is None else reading_from(task_data, manager, chosen):
        built = [each for name in chosen for each in _load(manager, name)]
    return PreparedTasks(list(names), built, manager)


def _load(manager: Any, name: str) -> list[Any]:
    """A group, or the tasks of a name, with their data."""
    try:
        with warnings.catch_warnings(action="ignore"):
            loaded = manager.load([name])
    except Exception as error:  # the readers of datasets raise different types of errors
        first = next(iter(str(error).splitlines()), "") or type(error).__name__
        how = "fetch it with python -m mone_eval.fetch_task_data output=data/tasks, and set task_data=data/tasks"
        raise UserError(f"tasks={name}: its data cannot be read ({first}); {how}") from error
    groups = loaded.get("groups", {})
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def new_manager() -> Any:
    """The tasks that lm-evaluation-harness defines; takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


class PreparedTasks:
    """Tasks with their data."""

    def __init__(self, names: list[str], built: list[Any], manager: Any) -> None:
        self.names, self._built, self._manager = names, built, manager

    def run(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int,
        num_fewshot: int | None = None,
        limit: int | None = None,
    ) -> dict[str, Any]:
        """The record of a model's scores.

        num_fewshot: solved examples before each question; None: the number of the task. limit: only the first questions.
        """
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
        return self.run_with(lm, num_fewshot=num_fewshot, limit=limit)

    def run_with(self, lm: Any, *, num_fewshot: int | None = None, limit: int | None = None) -> dict[str, Any]:
        """Like `run`, with a model class of lm-evaluation-harness."""
        from lm_eval import simple_evaluate

        began = time.monotonic()
        try:
            with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(sys.stderr):
                found = simple_evaluate(
                    model=lm,
                    tasks=self._built,
                    num_fewshot=num_fewshot,
                    limit=limit,
                    task_manager=self._manager,
                    bootstrap_iters=RESAMPLES,
                )
        except AssertionError as error:
            if str(error):
                raise
            raise UserError(
                f"tasks={','.join(self.names)}: an answer has more tokens than the context of the model, {lm.max_length}"
            ) from error
        seconds = time.monotonic() - began
        tasks = self._manager.load(self._built)["tasks"]
        bits = {
            name: [each for sample in samples if (each := gold_bits_per_byte(tasks[name], sample)) is not None]
            for name, samples in found["samples"].items()
        }
        within = found.get("group_subtasks", {})
        inside = {child for children in within.values() for child in children}
        results = {}
        for name, values in found["results"].items():
            leaves = list(_leaves(name, within))
            metrics = read_metrics(values)
            if every := [each for leaf in leaves for each in bits.get(leaf, [])]:
                stderr = statistics.stdev(every) / math.sqrt(len(every)) if len(every) > 1 else None
                metrics["gold_bits_per_byte"] = {"value": statistics.fmean(every), "stderr": stderr}
            results[name] = {
                "metrics": metrics,
                "questions": sum(found["n-samples"][leaf]["effective"] for leaf in leaves if leaf in found["n-samples"]),
                "num_fewshot": found["n-shot"].get(name),
                "version": found["versions"].get(name),
                "split": _split(tasks[name]) if name in tasks else None,
                # Of a group, such as mmlu, its parts are shown, but not their 57 tasks.
                "shown": name in within or name not in inside,
            }
        return {"names": self.names, "limit": limit, "seconds": seconds, "results": results}


def read_metrics(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """lm-evaluation-harness's `acc,none` and `acc_stderr,none` as {"acc": {"value": 0.5, "stderr": 0.1}}."""
    metrics = {}
    for key, value in values.items():
        name, _, filter = key.partition(",")
        if not filter or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{name}_stderr,{filter}")
        shown = name if filter == "none" else f"{name} ({filter})"
        metrics[shown] = {"value": float(value), "stderr": error if isinstance(error, float) else None}
    return metrics


def gold_bits_per_byte(task: Any, sample: dict[str, Any]) -> float | None:
    """Bits of the right answer of a question divided by its bytes; None for tasks without such a number.

    If several answers are right, the most probable one counts.
    """
    output_type = task.get_config("output_type")
    if output_type == "loglikelihood":
        gold = [0]
    elif output_type == "multiple_choice":
        doc = sample["doc"]
        answer = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        choices = task.doc_to_choice(doc)
        answers = answer if isinstance(answer, list) else [answer]
        gold = [choices.index(each) if isinstance(each, str) else each for each in answers]
    else:
        return None
    found = []
    for number in gold:
        loglikelihood, (_, continuation) = sample["resps"][number][0][0], sample["arguments"][number]
        found.append(-loglikelihood / math.log(2) / len(continuation.encode()))
    return min(found)


def _leaves(name: str, within: dict[str, list[str]]) -> Any:
    if name in within:
        for child in within[name]:
            yield from _leaves(child, within)
    else:
        yield name


def _split(task: Any) -> str | None:
    """The split that the questions come from."""
    return task.config.test_split if task.has_test_docs() else task.config.validation_split
