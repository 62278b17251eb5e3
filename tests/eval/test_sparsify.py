"""`mone-sparsify`: against whole models of transformers, killed and continued, its files and its errors."""

import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from mone_eval import evaluate, sparsify
from mone_eval.expert_hooks import Rule, hook_experts
from mone_eval.sparsity_tasks import largest_sparsity
from mone_eval.tasks import prepare_tasks
from mone_eval.text import beginning_of
from mone_model.hf import load
from tests.eval.test_expert_hooks import best, change_activation
from tests.eval.test_tasks import data as data
from tests.eval.tiny_models import VOCABULARY, build
from tests.hf.checkpoints import build as build_gpt
from tests.hf.checkpoints import model_of, save
from tests.hf.test_tokenizer import trained as trained

ROOT = Path(__file__).parent.parent.parent
Call = Callable[..., tuple[int, str, str]]
RATIOS = [0.5, 0.25]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the licence."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=["<s>"])
    trained.train([str(ROOT / "LICENSE")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="<s>")


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and a text of 60 documents."""
    folder = tmp_path_factory.mktemp("sparsify")
    for family in ("qwen3_moe", "deepseek_v2", "llama"):
        build(family).save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    words = (ROOT / "LICENSE").read_text().split()
    texts = [" ".join(words[20 * i : 20 * i + 10 + i]) for i in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture
def call(folder: Path, call_main: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Run the command on a model of `folder`, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(model: str, *arguments: str) -> tuple[int, str, str]:
        given = {argument.partition("=")[0] for argument in arguments}
        defaults = {"text": str(folder / "text.jsonl"), "output": "study", "ratios": json.dumps(RATIOS), "window": "64"}
        return call_main(
            sparsify.main, f"model={folder / model}", *arguments,
            *(f"{name}={value}" for name, value in defaults.items() if name not in given),
        )  # fmt: skip

    return run


def keep_best(active: torch.Tensor, *, ratio: float) -> torch.Tensor:
    return best(active, int(ratio * active.size(-1)))


def read(name: str = "study/results.json") -> dict[str, Any]:
    result: dict[str, Any] = json.loads(Path(name).read_text())
    return result


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {stream["name"]: stream for stream in result["streams"]}


@torch.no_grad()
def losses(model: Any, tokenizer: Any, texts: list[str], window: int) -> list[float]:
    """Summed negative log-likelihood of each text, window by window, by transformers."""
    found = []
    for text in texts:
        tokens = torch.tensor([beginning_of(tokenizer), *tokenizer(text, add_special_tokens=False).input_ids])
        nll = 0.0
        for start in range(0, len(tokens) - 1, window):
            part = tokens[start : start + window + 1]
            nll += float(cross_entropy(model(part[None, :-1]).logits[0].double(), part[1:], reduction="sum"))
        found.append(nll)
    return found


@pytest.mark.parametrize(("model", "part"), [("qwen3_moe", "routed"), ("llama", "dense")])
def test_losses_equal_those_of_whole_models(folder: Path, call: Call, model: str, part: str) -> None:
    code, output, errors = call(model, "select=[exact]", "controls=[abs_gate_up]", "batch_tokens=200")
    assert code == 0, errors
    result = read()
    tokenizer = AutoTokenizer.from_pretrained(folder / model)
    every = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    scored = [every[int(document["name"].rpartition(":")[2]) - 1] for document in result["documents"]]
    assert 40 <= len(scored) == result["text"]["documents"] <= 50
    for column, stream in enumerate(result["streams"]):
        if stream["criterion"] != "abs_gate":
            continue
        whole = AutoModelForCausalLM.from_pretrained(folder / model, dtype=torch.float32).eval()
        change_activation(whole, functools.partial(keep_best, ratio=stream["ratio"]))
        expected = losses(whole, tokenizer, scored, window=64)
        found = [document["nll"][column] for document in result["documents"]]
        assert found == pytest.approx(expected, rel=1e-5)
        tokens, size = sum(document["tokens"] for document in result["documents"]), sum(len(t.encode()) for t in scored)
        assert stream["nll_per_token"]["value"] == pytest.approx(sum(expected) / tokens, rel=1e-6)
        assert stream["bits_per_byte"]["value"] == pytest.approx(sum(expected) / size / math.log(2), rel=1e-6)
        assert f"{stream['nll_per_token']['value']:.4f}" in output
    assert [stream["name"] for stream in result["streams"]] == [
        "all",
        *(f"{part} {criterion} exact {ratio:g}" for ratio in RATIOS for criterion in ("abs_gate", "abs_gate_up")),
    ]


def test_evaluation_at_a_ratio_or_with_thresholds_equals_the_study(folder: Path, call: Call, call_main: Call) -> None:
    assert call("deepseek_v2")[0] == 0
    studied = {document["name"]: document["nll"] for document in read()["documents"]}
    names = list(by_name(read()))
    thresholds = ["select=threshold", "thresholds=study/thresholds.json"]
    for stream, options in (
        ("all", []),
        ("routed abs_gate exact 0.25", ["ratio=0.25"]),
        ("routed abs_gate threshold 0.25", [*thresholds, "ratio=0.25"]),
    ):
        shared = [f"model={folder / 'deepseek_v2'}", f"text={folder / 'text.jsonl'}", "window=64", "stride=64"]
        code, _, errors = call_main(evaluate.main, *shared, *options, f"output={len(options)}.json")
        assert code == 0, errors
        found = {document["name"]: document["nll"] for document in read(f"{len(options)}.json")["text"]["documents"]}
        assert studied.keys() < found.keys()
        column = names.index(stream)
        assert [nll[column] for nll in studied.values()] == pytest.approx([found[name] for name in studied], rel=1e-5), (
            stream
        )
    code, _, errors = call_main(evaluate.main, *shared, *thresholds, "output=none.json")
    assert code == 2
    assert "has thresholds for the ratios 0.5, 0.25; choose one of them" in errors


def test_thresholds_keep_the_share_on_other_documents(folder: Path, call: Call) -> None:
    assert call("deepseek_v2", "parts=[routed,shared]")[0] == 0
    result, thresholds = read(), read("study/thresholds.json")
    for name, stream in by_name(result).items():
        if stream["select"] in ("exact", "threshold"):
            tolerance = 0.03 if stream["select"] == "threshold" else 1e-9
            assert stream["kept"] == pytest.approx(stream["ratio"], abs=tolerance), name
            assert list(stream["kept_by_layer"]) == ["1", "2", "3"], "the first layer is dense"
    assert thresholds["parts"]["routed"]["layers"] == [1, 2, 3]
    for part in ("routed", "shared"):
        half, quarter = (thresholds["parts"][part]["ratios"][ratio] for ratio in ("0.5", "0.25"))
        assert all(0 < low < high for low, high in zip(half, quarter, strict=True))
    for gate in result["gates"]:
        assert sum(gate["histogram"]) == pytest.approx(1)
        assert 0 < gate["near_zero"]["0.01"] < gate["near_zero"]["0.1"] < 1
    assert result["text"]["sha256"] != result["calibration_text"]["sha256"]


def test_one_threshold_for_the_whole_model(folder: Path, call: Call) -> None:
    assert call("qwen3_moe", "per=model", "select=[threshold]")[0] == 0
    for values in read("study/thresholds.json")["parts"]["routed"]["ratios"].values():
        assert len(values) == 4
        assert len(set(values)) == 1
    kept = by_name(read())["routed abs_gate threshold 0.5"]
    assert kept["kept"] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("batch_tokens", [1, 1000])
def test_the_size_of_a_batch_changes_nothing(folder: Path, call: Call, batch_tokens: int) -> None:
    arguments = ("select=[exact]", "max_tokens=500")
    assert call("llama", *arguments, f"batch_tokens={batch_tokens}")[0] == 0
    assert call("llama", *arguments, "batch_tokens=128", "output=other")[0] == 0
    for one, other in zip(read()["documents"], read("other/results.json")["documents"], strict=True):
        assert one["nll"] == pytest.approx(other["nll"], rel=1e-5)


def test_a_killed_study_continues(folder: Path, call: Call) -> None:
    arguments = ["controls=[random,static]", "save_minutes=0"]
    assert call("qwen3_moe", *arguments, "output=whole")[0] == 0
    shared = [f"model={folder / 'qwen3_moe'}", f"text={folder / 'text.jsonl'}", "output=study", "window=64",
              f"ratios={json.dumps(RATIOS)}"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "mone_eval.sparsify", *shared, *arguments], env=environment)
    state = Path(".unfinished-study/state.pt")
    while not state.exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path("study").exists()
    code, _, errors = call("qwen3_moe", *arguments)
    assert code == 0
    assert re.search(r"continuing after layer [1-4] of 4", errors), errors
    # The killed process may have had another number of threads.
    for one, other in zip(read()["documents"], read("whole/results.json")["documents"], strict=True):
        assert one["nll"] == pytest.approx(other["nll"], rel=1e-6)
    kept = [[stream["kept_by_layer"] for stream in result["streams"]] for result in (read(), read("whole/results.json"))]
    assert kept[0] == kept[1]
    assert not list(Path().glob(".unfinished*"))
    assert sorted(path.name for path in Path("study").iterdir()) == [
        "charts",
        "index.html",
        "results.json",
        "thresholds.json",
    ]


def test_an_output_that_cannot_be_written_is_named(folder: Path, call: Call) -> None:
    Path("file").write_text("")
    code, _, errors = call("llama", "output=file/study", "max_tokens=200")
    assert code == 2
    assert errors.startswith("error: output=file/study: cannot be written (")


def test_the_plan_is_printed_before_anything_is_loaded(folder: Path, call: Call) -> None:
    code, output, _ = call("deepseek_v2", "--plan")
    assert code == 0
    assert call("deepseek_v2", "plan=true")[0] == 0
    assert re.search(r"5 streams of [\d,]+ tokens.*\nmemory: at most .* GB.*\ndisk: .* 4 layers.*\ntime: at least", output)
    assert not Path("study").exists()
    assert not list(Path().glob(".unfinished*"))


def test_tasks_are_scored_as_lm_eval_scores_them(folder: Path, call: Call, data: Path) -> None:
    names = ["arc_easy", "winogrande", "lambada_openai"]
    code, output, errors = call(
        "qwen3_moe", f"tasks={json.dumps(names)}", f"task_data={data}", "max_tokens=200", "ratios=[0.25]"
    )
    assert code == 0, errors
    assert "it/s" not in errors
    prepared = prepare_tasks(names, task_data=str(data))
    tokenizer = AutoTokenizer.from_pretrained(folder / "qwen3_moe")
    whole = AutoModelForCausalLM.from_pretrained(folder / "qwen3_moe", dtype=torch.float32).eval()
    hooked = hook_experts(whole)
    found = read()["tasks"]["scores"]
    assert list(found) == ["all", "routed abs_gate exact 0.25", "routed abs_gate threshold 0.25"]
    for name, rule in (("all", None), ("routed abs_gate exact 0.25", Rule(k=8))):
        for one in hooked:
            one.reset(rule)
        expected = prepared.run(whole, tokenizer, batch_size=4)["results"]
        for task in names:
            for metric, its in expected[task]["metrics"].items():
                assert found[name][task]["metrics"][metric]["value"] == pytest.approx(its["value"], rel=1e-5), (
                    name,
                    task,
                    metric,
                )
    assert "Of the tasks of arXiv 2605.08575, arc_challenge, hellaswag, truthfulqa_mc2 were not scored" in output


def test_the_largest_sparsity_ends_where_the_score_first_falls() -> None:
    streams: list[dict[str, Any]] = [{"name": "all", "select": "all", "part": "", "criterion": "abs_gate", "kept": None}]
    means = {"all": 0.5}
    for kept, mean in ((0.75, 0.49), (0.5, 0.48), (0.25, 0.47), (0.1, 0.48)):
        name = f"routed abs_gate exact {kept}"
        streams.append({"name": name, "select": "exact", "part": "routed", "criterion": "abs_gate", "kept": kept})
        means[name] = mean
    found = largest_sparsity(streams, means, ["arc_easy"])
    assert found["by_part_and_selection"] == {"routed exact": 0.5}, (
        "0.47 is below 0.475; what is above it again does not count"
    )


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium: apt-get install chromium")
def test_the_page_opens_in_a_browser(folder: Path, call: Call) -> None:
    assert call("deepseek_v2", "parts=[routed,shared]", "controls=[random]")[0] == 0
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --dump-dom"
    page = Path("study/index.html").read_text()
    script = """<script>addEventListener("load", () => {
      const broken = [...document.images].filter(image => image.naturalWidth < 800).length;
      document.body.dataset.found = `${document.images.length} ${broken} ${document.body.scrollWidth <= innerWidth}`; });
    </script>"""
    Path("page.html").write_text(page + script)
    browser = [
        "chromium",
        *flags.split(),
        f"--user-data-dir={Path('browser').absolute()}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    done = subprocess.run([*browser, f"file://{Path('page.html').absolute()}"], capture_output=True, text=True, timeout=120)
    assert 'data-found="8 0 true"' in done.stdout
    assert not re.search(r'(src|href)="(?!data:)', page), "the page has no external files"
    assert "Keeping the neurons of routed experts with the largest |act(gate)|" in page


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["ratios=[0.5,1.5]"], r"ratios=\[0.5, 1.5\]: 1.5 must be above 0 and at most 1"),
        (["ratios=[0]"], r"0 must be above 0"),
        (["select=[best]"], "select=best: choose from exact, threshold"),
        (["controls=[gate]"], "controls=gate: choose from abs_gate_up, preactivation, random, static"),
        (["parts=[shared]"], "the model has no shared experts; it has routed"),
        (["text=nothing.jsonl"], "text=nothing.jsonl"),
        (["text=one.txt"], "has 1 documents of 2 tokens or more; needs at least two"),
        (["model=nothing"], "model=nothing: no such folder"),
        (["model=opt"], "model=opt: OPTForCausalLM has no gated experts and no gated layers"),
        (["model=gpt2"], "GPT2LMHeadModel has no list of layers"),
        (["model=bare"], "model=bare: has no tokenizer"),
        (["model=truncated"], "model=truncated: transformers cannot load it"),
        (["output=here"], "output=here: exists"),
        (["model=foreign"], r"its tokenizer has token \d+, its embedding 64 rows; not its tokenizer"),
        (["device=cuda:7"], "device=cuda:7: cannot be used here"),
        (["calibration_share=1"], "calibration_share=1.0: must be above 0 and below 1"),
        ([], None),
    ],
)  # fmt: skip
def test_bad_input_is_named_in_one_line(
    folder: Path, call: Call, tokenizer: PreTrainedTokenizerFast, arguments: list[str], error: str | None
) -> None:
    Path("here").mkdir()
    Path("one.txt").write_text("One paragraph only.")
    if arguments == ["model=gpt2"]:
        GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=VOCABULARY)).save_pretrained("gpt2")
        tokenizer.save_pretrained("gpt2")
    if arguments == ["model=foreign"]:
        build("llama", vocab_size=64).save_pretrained("foreign")
        tokenizer.save_pretrained("foreign")
    if arguments == ["model=opt"]:
        shape = {
            "num_hidden_layers": 1,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "ffn_dim": 16,
            "word_embed_proj_dim": 16,
        }
        OPTForCausalLM(OPTConfig(**shape, vocab_size=VOCABULARY)).save_pretrained("opt")
        tokenizer.save_pretrained("opt")
    shutil.copytree(folder / "qwen3_moe", "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(folder / "qwen3_moe", "truncated")
    os.truncate("truncated/model.safetensors", 5000)
    model = next((argument.partition("=")[2] for argument in arguments if argument.startswith("model=")), None)
    others = [argument for argument in arguments if not argument.startswith("model=")]
    code, output, errors = call(str(Path(model).absolute()) if model else "qwen3_moe", *others, "max_tokens=200")
    if error is None:
        assert code == 0, errors
        return
    assert code == 2
    assert re.search(error.replace("model=", "model=.*"), errors), errors
    assert len(errors.strip().splitlines()) == 1
    assert not output
    assert not Path("study").exists()


@pytest.mark.usefixtures("one_process")
def test_a_run_of_this_project_is_studied_as_trained_too(
    trained: Path, folder: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    shape = model_of(vocab_size=800, seq_length=64, activation_ratio=0.25)
    save(tmp_path / "run", build_gpt(shape), shape)
    shutil.copytree(trained, tmp_path / "run/tokenizer")
    code, _, errors = call(str(tmp_path / "run"), "ratios=[0.25]", "select=[exact]")
    assert code == 0, errors
    streams = by_name(read())
    assert list(streams) == ["all", "trained", "routed abs_gate exact 0.25"]
    assert streams["trained"]["kept"] == 0.25
    assert streams["trained"]["nll_per_token"] == streams["routed abs_gate exact 0.25"]["nll_per_token"]
    model, tokenizer = load(tmp_path / "run")
    every = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    scored = [every[int(document["name"].rpartition(":")[2]) - 1] for document in read()["documents"]]
    found = [document["nll"][1] for document in read()["documents"]]
    # An untrained model that selects is chaotic: roundings of 1e-7 grow.
    assert found == pytest.approx(losses(model, tokenizer, scored, window=64), rel=1e-3)
