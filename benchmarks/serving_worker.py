"""Runs in vLLM's interpreter for benchmarks.serving: one contender, which is timed whenever a line arrives at its input.

python serving_worker.py '{"kind": "engine", "model": FOLDER, "options": {...}, "prompts": 4, "tokens": 64}'
python serving_worker.py '{"kind": "layer", "dtype": "float32", "width": 1024, "neurons": 1024, ...}'

Prints a line of JSON when it is ready, and one for each line at its input.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

Run = Callable[[], Any]


def build_engine(job: dict[str, Any]) -> Run:
    """Generation of so many tokens for each of some prompts; seconds."""
    from vllm import LLM, SamplingParams

    llm = LLM(job["model"], load_format="dummy", skip_tokenizer_init=True, max_num_seqs=16, **job["options"])
    generator = torch.Generator().manual_seed(0)
    prompts = [
        {"prompt_token_ids": torch.randint(3, 999, (8,), generator=generator).tolist()} for _ in range(job["prompts"])
    ]
    parameters = SamplingParams(max_tokens=job["tokens"], temperature=0, ignore_eos=True, detokenize=False)

    def run() -> float:
        start = time.perf_counter()
        llm.generate(prompts, parameters, use_tqdm=False)
        return time.perf_counter() - start

    return run


def build_layer(job: dict[str, Any]) -> Run:
    """Experts of a layer by vLLM's operator and by ours, in turns; by name and number of tokens, seconds of a layer."""
    from mone_model.expert_backends import Request, Weights
    from mone_model.hf.configuration_mone import top_k
    from mone_model.neuron_selection import TopK
    from mone_model.vllm.experts import make_served
    from mone_model.vllm.switch import fused_moe, pack

    dtype, generator = getattr(torch, job["dtype"]), torch.Generator().manual_seed(0)
    isa = "vec"
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
        isa = "amx"
    experts, neurons, width = job["experts"], job["neurons"], job["width"]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(width**-0.5).to(dtype)

    # Several layers, together larger than the caches.
    layers = [Weights(random(experts, 2, neurons, width), random(experts, neurons, width)) for _ in range(job["layers"])]
    packed = [pack(weights, isa) for weights in layers]
    contenders: dict[str, Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "vllm": lambda layer, x, ids, probs: fused_moe(*packed[layer], x, ids, probs, "silu", isa)
    }
    for ratio in job["ratios"]:
        kept = top_k(ratio, neurons)
        served = [make_served(weights, TopK(kept), kept, "silu") for weights in layers]
        both = [make_served(weights, TopK(kept), kept, "silu", stock_isa=isa) for weights in layers]

        request = Request(TopK(kept), "silu")
        contenders[f"decode {ratio:g}"] = functools.partial(decode, layers, request)
        contenders[f"switch, selecting {ratio:g}"] = lambda layer, *its, served=served: served[layer].compute(*its)
        contenders[f"switch, all {ratio:g}"] = lambda layer, *its, served=both: served[layer].compute(*its)

    other = torch.zeros(2**26)

    @torch.inference_mode()
    def run() -> dict[str, dict[int, float]]:
        seconds: dict[str, dict[int, float]] = {name: {} for name in contenders}
        for tokens in job["tokens"]:
            x = random(tokens, width)
            ids = torch.stack([torch.randperm(experts, generator=generator)[: job["topk"]] for _ in range(tokens)]).int()
            probs = torch.full(ids.shape, 1 / job["topk"])
            for name, compute in contenders.items():
                other.add_(1)  # the weights of the last contender leave the caches
                start = time.perf_counter()
                for layer in range(len(layers)):
                    compute(layer, x, ids, probs)
                seconds[name][tokens] = (time.perf_counter() - start) / len(layers)
        return seconds

    return run


def decode(
    layers: list[Any], request: Any, layer: int, x_TD: torch.Tensor, experts_Tk: torch.Tensor, probs_Tk: torch.Tensor
) -> torch.Tensor:
    """The experts of a layer by the kernel that skips dropped neurons."""
    from mone_model.expert_backends import BACKENDS, route

    return route(BACKENDS["decode"], layers[layer], x_TD, experts_Tk, probs_Tk, request)


def main() -> None:
    """Build the contender, then answer lines."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes to stderr
    job = json.loads(sys.argv[1])
    run = {"engine": build_engine, "layer": build_layer}[job["kind"]](job)
    run()
    print("{}", file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(run()), file=answers, flush=True)


if __name__ == "__main__":
    main()
