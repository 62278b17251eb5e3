"""Points tasks of lm-evaluation-harness to local files.

    with reading_from("data/tasks", manager, ["arc_easy"]):
        manager.load(["arc_easy"])
    # reads data/tasks/allenai/ai2_arc/ARC-Easy/validation.arrow in place of the dataset of the Hugging Face hub

A folder has the name of the dataset on the hub and of its configuration (`default` if the task names none). It has one file
for each split, named by the split: arrow, parquet, json or jsonl. Prompts and metrics stay those of the task. If the split
that a task scores is missing, its other one is scored: test, else validation.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mone_common.console import UserError

FORMATS = {".arrow": "arrow", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}
"""Readers of `datasets` by the suffix of a file."""
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
"""Fields of a task that name a split."""
NO_CONFIGURATION = "default"
"""Folder of the only configuration of a dataset."""
FETCH = "python -m mone_eval.fetch_task_data output="


@contextmanager
def reading_from(folder: str, manager: Any, names: Sequence[str]) -> Iterator[None]:
    """Within the context, tasks among `names`, and those of their groups and tags, are loaded with data from `folder`.

    manager: a TaskManager, which is changed. Raises UserError if the folder or data of a task are missing.
    """
    if not Path(folder).is_dir():
        raise UserError(f"task_data={folder}: no such folder; fetch it with {FETCH}{folder}")
    from lm_eval.tasks import TaskManager

    leaves = list(dict.fromkeys(leaf for name in names for leaf in leaves_of(manager, name)))
    # A definition that includes another one must be a file.
    with tempfile.TemporaryDirectory() as written:
        for leaf in leaves:
            content = local_definition(manager.task_index[leaf], Path(folder))
            (Path(written) / f"{leaf}.yaml").write_text(yaml.safe_dump(content))
        local = TaskManager(include_path=written, include_defaults=False)
        manager.task_index.update({leaf: local.task_index[leaf] for leaf in leaves})
        yield


def local_definition(entry: Any, folder: Path) -> dict[str, Any]:
    """The official definition of a task, included, and the fields that change; UserError if there are no data.

    entry: of a task in the index of a TaskManager.
    """
    config = entry.cfg
    if entry.kind.name != "TASK" or "dataset_path" not in config or config.get("custom_dataset") is not None:
        raise UserError(f"tasks={entry.name}: reads its data in a way of its own; leave task_data out")
    place = folder / config["dataset_path"] / (config.get("dataset_name") or NO_CONFIGURATION)
    files = {path.stem: path for path in sorted(place.glob("*")) if path.suffix in FORMATS}
    splits = {field: config[field] for field in SPLITS if config.get(field) in files}
    if not {"validation_split", "test_split"} & splits.keys():
        wanted = " or ".join(f"{config[field]}.arrow" for field in ("test_split", "validation_split") if config.get(field))
        raise UserError(
            f"tasks={entry.name}: {place} has no {wanted}; fetch it with {FETCH}{folder}, put the file there (.arrow, "
            ".parquet, .jsonl), or leave task_data out"
        )
    used = {split: files[split] for split in splits.values()}
    if len(suffixes := {path.suffix for path in used.values()}) > 1:
        raise UserError(f"tasks={entry.name}: {place} has files of several formats ({', '.join(sorted(suffixes))}); use one")
    return {
        "include": str(entry.yaml_path),
        "task": entry.name,
        "dataset_path": FORMATS[suffixes.pop()],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path.absolute()) for split, path in used.items()}},
        **{field: splits.get(field) for field in SPLITS},
    }


def leaves_of(manager: Any, name: str) -> Iterator[str]:
    """The tasks of a task, tag or group, in order."""
    entry = manager.task_index[name]
    if entry.kind.name == "TAG":
        for tagged in sorted(entry.tags):
            yield from leaves_of(manager, tagged)
    elif entry.kind.name == "GROUP":
        for member in entry.cfg["task"]:
            inner = member if isinstance(member, str) else member.get("group", member.get("task"))
            if inner not in manager.task_index:
                raise UserError(f"tasks={name}: its part {inner} is defined inside of it; name single tasks with task_data")
            yield from leaves_of(manager, inner)
    else:
        yield name
