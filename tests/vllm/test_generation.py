"""vLLM with the plugin generates the greedy tokens of transformers: MoNE models, and other families with fewer neurons."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from tests.vllm.models import VOCABULARY, WIDE, build_family, build_mone, greedy, sequences

Generate = Callable[..., tuple[list[dict[str, Any]], str]]
TOKENS = 24
PROMPTS = [sequences(1, length, seed=900 + length)[0].tolist() for length in (3, 5, 20, 60)]

VARIANTS: dict[str, dict[str, Any]] = {
    "a shared expert with a selection": {"shared_expert_intermediate_size": 48, "shared_expert_neuron_ratio": 0.5},
    "sigmoid router, bias, scale": {
        "scoring_func": "sigmoid", "use_expert_bias": True, "routed_scaling_factor": 1.5, "hidden_act": "relu2",
        "shared_expert_intermediate_size": 64,
    },
    "gelu, no norm of queries, tied": {
        "hidden_act": "gelu", "qk_layernorm": False, "tie_word_embeddings": True, "shared_expert_intermediate_size": 64,
        "shared_expert_neuron_ratio": 0.5,
    },
    "thresholds, norm over the projection": {
        "qk_layernorm_scope": "projection", "norm_topk_prob": False, "neuron_thresholds": [0.05, 0.1],
    },
    "relu, a plain shared expert": {"hidden_act": "relu", "shared_expert_intermediate_size": 32, "num_key_value_heads": 4},
    "all neurons": {"activation_ratio": 1.0, "hidden_act": "sigmoid"},
}  # fmt: skip
FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "granitemoe", "deepseek_v2")
RATIO = 0.5


def job(model: Path, **options: Any) -> dict[str, Any]:
    return {"model": str(model), "prompts": PROMPTS, "tokens": TOKENS, "options": options}


def job_of(family: str, model: Path, **options: Any) -> dict[str, Any]:
    """DeepSeek-V2 in vLLM without the plugin differs from transformers, but not at the first position: that is compared."""
    first_tokens = {"prompts": [[token] for token in range(VOCABULARY)], "tokens": 1} if family == "deepseek_v2" else {}
    return job(model, **options) | first_tokens


class Expected:
    """Jobs, and the tokens that transformers generates for each."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.tokens: dict[str, list[list[int]]] = {}

    def add(self, name: str, job: dict[str, Any], tokens: list[list[int]]) -> None:
        self.jobs[name], self.tokens[name] = job, tokens


def write_thresholds(path: Path, family: str, layers: list[int], thresholds: list[float]) -> None:
    """As mone-sparsify writes them."""
    part = {"layers": layers, "ratios": {f"{RATIO:g}": thresholds}}
    path.write_text(json.dumps({"model_type": family, "parts": {"routed": part}}))


def add_family(expected: Expected, folder: Path, family: str) -> None:
    """The K best and thresholds, in a model that was trained with all neurons."""
    from mone_eval.expert_hooks import HookedExperts, Rule, hook_experts

    model = build_family(family)
    model.save_pretrained(folder / family)
    routed = [one for one in hook_experts(model) if one.part == "routed"]

    def add(name: str, rule: Callable[[int, HookedExperts], Rule | None], **options: Any) -> None:
        for number, experts in enumerate(routed):
            experts.rule = rule(number, experts)
        its = job_of(family, folder / family, **options)
        expected.add(name, its, greedy(model, its["prompts"], its["tokens"]))

    def best(ratio: float) -> Callable[[int, HookedExperts], Rule]:
        return lambda _, experts: Rule(k=round(ratio * experts.neurons))

    path, thresholds = folder / f"{family}.json", [0.02 * (1 + number) for number in range(len(routed))]
    write_thresholds(path, family, [int(one.name.split(".")[2]) for one in routed], thresholds)
    by_file: dict[str, Any] = {"additional_config": {"mone": {"thresholds": str(path)}}}
    add(f"{family}, K best", best(RATIO), additional_config={"mone": {"ratio": RATIO}})
    add(f"{family}, thresholds", lambda number, _: Rule(threshold=thresholds[number]), **by_file)
    if family == "mixtral":
        add("hf-overrides", best(0.03), hf_overrides={"mone": {"ratio": 0.03}})
        add("without the option", lambda *_: None)
        # Few neurons are dropped, so that the tokens are those of all neurons, which many rows keep.
        add("all for many rows", lambda *_: None, additional_config={"mone": {"ratio": 0.75, "many_rows": "all"}})
        add("thresholds, tensor parallel", lambda n, _: Rule(threshold=thresholds[n]), **by_file, tensor_parallel_size=2)


@pytest.fixture(scope="module")
def expected(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """All models, on disk, and what transformers generates."""
    folder, expected = tmp_path_factory.mktemp("models"), Expected()
    for name, options in VARIANTS.items():
        model = build_mone(**options)
        model.save_pretrained(folder / name)
        expected.add(name, job(folder / name), greedy(model, PROMPTS, TOKENS))
    first = next(iter(VARIANTS))
    layouts: dict[str, dict[str, Any]] = {
        "tensor parallel": {"tensor_parallel_size": 2},
        "expert parallel": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
        "compiled": {"enforce_eager": False},
        "bf16": {"dtype": "bfloat16"},
    }
    for name, layout in layouts.items():
        expected.add(name, job(folder / first, **layout), expected.tokens[first])
    for family in FAMILIES:
        add_family(expected, folder, family)
    return expected


@pytest.fixture(scope="module")
def found(expected: Expected, generate: Generate) -> tuple[dict[str, Any], str]:
    """The results by the name of the job, and all that vLLM printed."""
    results, output = generate(list(expected.jobs.values()), VLLM_LOGGING_LEVEL="INFO")
    return dict(zip(expected.jobs, results, strict=True)), output


NAMES = [
    *VARIANTS, "tensor parallel", "expert parallel", "compiled", "bf16",
    *(f"{family}, {rule}" for family in FAMILIES for rule in ("K best", "thresholds")),
    "hf-overrides", "without the option", "all for many rows", "thresholds, tensor parallel",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_transformers(name: str, expected: Expected, found: tuple[dict[str, Any], str]) -> None:
    result = found[0][name]
    assert result.get("tokens") == expected.tokens[name], result


def test_pruning_matters(expected: Expected) -> None:
    """The comparison above would not notice otherwise that neurons are kept."""
    dense = expected.tokens["without the option"]
    assert expected.tokens["hf-overrides"] != dense


def test_the_process_imports_nothing_that_trains(found: tuple[dict[str, Any], str]) -> None:
    (line,) = [line for line in found[1].splitlines() if line.startswith("MODULES ")]
    modules = set(json.loads(line.removeprefix("MODULES ")))
    assert "mone_model" in modules
    assert modules & {"megatron", "deepspeed", "wandb", "hydra", "omegaconf", "train", "data_prep", "launch"} == set()


def test_the_switch_is_logged(found: tuple[dict[str, Any], str]) -> None:
    assert "mone: about 16 of 64 neurons for each row; " in found[1]


def test_without_a_compiler_the_tokens_are_the_same(expected: Expected, generate: Generate, tmp_path: Path) -> None:
    name = next(iter(VARIANTS))
    (result,), output = generate([expected.jobs[name]], CXX="/missing/g++", XDG_CACHE_HOME=str(tmp_path))
    assert result.get("tokens") == expected.tokens[name], result
    assert output.count("CPU kernels: not built") == 1


def test_bad_input_is_refused_before_weights_are_loaded(expected: Expected, generate: Generate, tmp_path: Path) -> None:
    mixtral = Path(expected.jobs["hf-overrides"]["model"])
    trained = Path(expected.jobs[next(iter(VARIANTS))]["model"])
    write_thresholds(tmp_path / "olmoe.json", "olmoe", [0, 1], [0.1] * 2)
    write_thresholds(tmp_path / "four.json", "mixtral", [0, 1, 2, 3], [0.1] * 4)
    llama = tmp_path / "llama"
    LlamaConfig(architectures=["LlamaForCausalLM"], **WIDE, num_attention_heads=4, intermediate_size=64).save_pretrained(
        llama
    )
    fp8, ranks = {"quantization": "fp8", "dtype": "bfloat16"}, {"tensor_parallel_size": 2}
    other, more = ({"thresholds": str(tmp_path / name)} for name in ("olmoe.json", "four.json"))
    cases: list[tuple[Path, dict[str, Any], dict[str, Any], str]] = [
        (mixtral, {"ratio": 1.5}, {}, "mone.ratio=1.5: must be in (0, 1]"),
        (mixtral, {"share": 0.5}, {}, "mone.share=0.5: is not an option; known are ratio, thresholds, many_rows, quantized"),
        (mixtral, other, {}, "of a model of the type olmoe, this one is mixtral"),
        (mixtral, more, {}, "0 to 3 (4), the experts of this model are in 0 to 1 (2)"),
        (mixtral, {"thresholds": "missing.json"}, {}, "thresholds=missing.json: is missing or not an output file"),
        (mixtral, {"ratio": 0.5}, fp8, "cannot select neurons of quantized experts; mone.quantized=dense lets"),
        (mixtral, {"ratio": 0.5, "many_rows": "all"}, ranks, "mone.many_rows=all: the K best of neurons on several ranks"),
        (trained, {}, fp8, "cannot select neurons of quantized experts, with which this model was trained"),
        (trained, {"many_rows": "all"}, {}, "mone.many_rows=all: this model was trained with selection"),
        (llama, {"ratio": 0.5}, {}, "model_type=llama: the option mone works for mone, qwen3_moe"),
    ]
    results, output = generate(
        [job(model, additional_config={"mone": asked}, load_format="dummy", **its) for model, asked, its, _ in cases]
    )
    for (_, _, its, message), result in zip(cases, results, strict=True):
        assert "error" in result
        # With several ranks, vLLM prints the error of a rank.
        assert message in (output if its is ranks else result["error"]), result
    assert "Loading weights took" not in output
