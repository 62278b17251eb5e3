"""Scores a model on text and on tasks.

    mone-evaluate model=runs/demo text=data/demo/shards/wikipedia
    mone-evaluate model=models/olmoe text='data/*.jsonl' ratio=null window=4096 stride=2048
    mone-evaluate model=runs/demo 'tasks=[arc_easy,hellaswag]' task_data=data/tasks
    mone-evaluate 'compare=[a.json,b.json]' output=comparison.json

The model is a run, a checkpoint, or any causal language model in a Hugging Face folder. The command runs in one process.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from data_prep.corpora import CorpusConfig
from data_prep.errors import DataError
from mone_common.console import UserError, command, to_dataclass
from mone_eval.models import ModelChoice, check_model, choose_window
from mone_eval.results import environment, find_output, read_result, send_to_wandb, table, write_result

EXAMPLE = "mone-evaluate model=runs/demo text=data/demo/shards/wikipedia"


@dataclass
class EvaluateConfig:
    """Options of mone-evaluate."""

    model: str | None = None
    """Folder of a run, of a checkpoint, of an exported model, or of any Hugging Face causal language model."""
    text: Any = field(default=None, metadata={"kind": str | list[str] | None})
    """Text to score: files, folders or globs that `datasets` and mone-tokenize read, or folders of token shards."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness, such as arc_easy, hellaswag or mmlu; needs `pip install -e '.[eval]'`."""
    compare: list[str] = field(default_factory=list)
    """Two results of mone-evaluate, or two models to evaluate on `text`: the paired difference per document."""
    output: str | None = None
    """JSON file for the result; null: a new file in evaluations/ of the run or of the model."""
    step: int | None = None
    """Step of the checkpoint of a run; null: the newest."""
    ratio: float | None = None
    """Share of an expert's neurons to keep; null: as the model was trained. With a file of mone-sparsify: its ratio."""
    select: str | None = None
    """exact: keep the K best neurons; threshold: keep those that reach a threshold; null: as the model was saved."""
    thresholds: str | None = None
    """Output file of mone-calibrate or mone-sparsify, for select=threshold; null: thresholds.json of the run."""
    dtype: str = "auto"
    """auto (that of the weights), float32, bfloat16 or float16."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1."""
    trust: bool = False
    """Also load checkpoints that contain pickled code. Loading executes that code: use only with trusted checkpoints."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """How `text` is read; `corpus.path` is `text`, and `corpus.hub` reads a dataset of the hub instead."""
    split: str = "validation"
    """Split of token shards: validation or train."""
    max_documents: int | None = None
    """Largest number of documents; null: all."""
    max_bytes: int | None = None
    """Read no document after the one that reaches this many bytes of text; null: all."""
    window: int | None = None
    """Tokens that the model reads at a time; null: its context, 2048 at most."""
    stride: int | None = None
    """Distance between two windows; each token has at least window - stride tokens of context. null: half of the window."""
    begin: str = "auto"
    """auto: a beginning-of-document token comes before each document, and the first token is scored; none: it is not."""
    batch_size: int = 8
    """Full windows, or requests of tasks, that the model reads at the same time; does not change the result."""
    task_data: str | None = None
    """Folder of python -m mone_eval.fetch_task_data with the data of tasks; null: the Hugging Face hub."""
    num_fewshot: int | None = None
    """Solved examples before each question of a task; null: the number of the task."""
    limit: int | None = None
    """Only the first questions of each task, to try a command; null: all."""
    wandb: str = "disabled"
    """Also log the scores to W&B: disabled, offline or online."""
    wandb_project: str = "mone"
    """Project of W&B."""
    progress_seconds: float = 5.0
    """Seconds between progress lines."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("split", ("validation", "train")),
            ("begin", ("auto", "none")),
            ("wandb", ("disabled", "offline", "online")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)}: choose {' or '.join(allowed)}")
        for name in ("max_documents", "max_bytes", "window", "stride", "batch_size", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UserError(f"num_fewshot={self.num_fewshot}: must be at least 0")
        if self.window is not None and self.stride is not None and self.stride > self.window:
            raise UserError(f"stride={self.stride}: must be at most the window, {self.window}")
        if self.text is not None and (self.corpus.path or self.corpus.hub):
            raise UserError("give the text as text=PATH or as corpus.hub=ID, not both")
        if self.compare and len(self.compare) != 2:
            raise UserError(f"compare={self.compare}: name two results, like 'compare=[a.json,b.json]', or two models")
        if self.compare and (self.model or self.tasks):
            raise UserError("compare: compares two results or two models; leave model and tasks out")
        if not self.compare and not self.model:
            raise UserError(f"missing model: give it on the command line, like {EXAMPLE} (see --help)")
        if self.model and not (self.tasks or self.has_text):
            raise UserError(f"nothing to score: give text=PATH or 'tasks=[arc_easy]', like {EXAMPLE}")

    @property
    def has_text(self) -> bool:
        """Whether there is text to score."""
        return bool(self.text or self.corpus.path or self.corpus.hub)

    def choice(self, model: str) -> ModelChoice:
        """The model that these options choose in a folder; UserError."""
        names = [each.name for each in dataclasses.fields(ModelChoice) if each.name != "model"]
        return ModelChoice(model, **{name: getattr(self, name) for name in names})


ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)


@command("evaluate")
def main(hydra_config: DictConfig) -> None:
    """Evaluate, print the scores, and write them to a file."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: mone-evaluate runs in one process; start it without torchrun"
        )
    options = to_dataclass(hydra_config, EvaluateConfig)
    files = [Path(each) for each in options.compare if each.endswith(".json")]
    if len(files) == 1:
        raise UserError(f"compare={options.compare}: name two results (.json) or two models, not one of each")
    models = [options.model] if options.model else [] if files else options.compare
    choices = [options.choice(model) for model in models]
    for choice in choices:
        choose_window(check_model(choice.model, step=choice.step), options.window, options.stride)
        choice.thresholds_L()
    output = find_output(options.output, home=_home(models[0]) if options.model else None)
    result = environment(dataclasses.asdict(options))
    if files:
        from mone_eval.comparison import compare

        result["comparison"] = compare(read_result(files[0]), read_result(files[1]))
    else:
        result |= evaluate(options, choices)
    write_result(output, result)
    print(table(result))
    print(f"written: {output}")
    if options.wandb != "disabled":
        send_to_wandb(result, mode=options.wandb, project=options.wandb_project, folder=output.parent)


def evaluate(options: EvaluateConfig, choices: list[ModelChoice]) -> dict[str, Any]:
    """What the record says of one model; of two, their comparison and both records.

    Everything that can be wrong with the options is found before a model is loaded.
    """
    import transformers

    from mone_eval.comparison import compare
    from mone_eval.models import describe, open_model

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    prepared_tasks = None
    if options.tasks:
        from mone_eval.tasks import prepare_tasks

        prepared_tasks = prepare_tasks(options.tasks, task_data=options.task_data)
    texts = read_text_option(options) if options.has_text else None
    records = []
    for choice in choices:
        model, tokenizer = open_model(choice)
        record: dict[str, Any] = {"model": {"path": choice.model, "select": choice.select} | describe(model)}
        if texts is not None:
            record["text"] = score_texts(options, texts, model, tokenizer)
        if prepared_tasks is not None:
            record["tasks"] = prepared_tasks.run(
                model, tokenizer, batch_size=options.batch_size, num_fewshot=options.num_fewshot, limit=options.limit
            )
        records.append(record)
    if len(records) == 1:
        return records[0]
    return {"comparison": compare(*records), "compared": records}


def read_text_option(options: EvaluateConfig) -> list[Any]:
    """The texts that the options name; UserError if there are none."""
    from mone_eval.documents import limit, read_texts

    corpus = dataclasses.replace(options.corpus, path=options.text or options.corpus.path)
    try:
        every = read_texts(corpus, split=options.split)  # type: ignore[arg-type]
        texts = list(limit(every, max_documents=options.max_documents, max_bytes=options.max_bytes))
    except DataError as error:
        raise UserError(str(error).replace("corpus.path=", "text=")) from error
    if not texts:
        raise UserError(f"text={corpus.path or corpus.hub}: has no text to score; give another file, or another split")
    return texts


def score_texts(options: EvaluateConfig, texts: list[Any], model: Any, tokenizer: Any) -> dict[str, Any]:
    """The record of a model's scores on texts."""
    from mone_eval.documents import checksum, encode
    from mone_eval.intervals import score_text
    from mone_eval.models import check_tokens, context_of
    from mone_eval.text import beginning_of, score_documents

    window, stride = choose_window(context_of(model.config), options.window, options.stride)
    begin = beginning_of(tokenizer) if options.begin == "auto" else None
    documents = list(encode(texts, tokenizer))
    check_tokens(documents, model, str(options.model))
    scores = score_documents(
        model,
        documents,
        window=window,
        stride=stride,
        begin=begin,
        batch_size=options.batch_size,
        progress_seconds=options.progress_seconds,
    )
    bytes_N = [document.num_bytes for document in documents]
    nll_N, tokens_N = scores.nll_N.tolist(), scores.tokens_N.tolist()
    names = options.text or options.corpus.path or options.corpus.hub
    return {
        "name": ", ".join(names) if isinstance(names, list) else names,
        "sha256": checksum(documents),
        "num_documents": len(documents),
        "num_bytes": sum(bytes_N),
        "num_tokens": sum(tokens_N),
        "window": window,
        "stride": stride,
        "begin": begin,
        **dataclasses.asdict(score_text(nll_N, tokens_N, bytes_N)),
        "seconds": scores.seconds,
        "tokens_per_second": scores.tokens_per_second,
        "read_tokens_per_second": scores.read_tokens / max(scores.seconds, 1e-9),
        "documents": [
            {"name": document.name, "sha256": document.sha256, "bytes": size, "tokens": tokens, "nll": nll}
            for document, size, tokens, nll in zip(documents, bytes_N, tokens_N, nll_N, strict=True)
        ],
    }


def _home(model: str) -> Path:
    """The folder for the results of a model: that of its run, or its own."""
    from mone_model.hf.imported_model import list_saved

    folder = Path(model)
    return folder if (folder / "config.json").is_file() else list_saved(folder)[0][-1].path.parent.parent


if __name__ == "__main__":
    main()
