"""Runs in vLLM's interpreter: greedy tokens of several models, each in one process without servers.

python generate.py JOBS.json       # [{"model": folder, "prompts": [[1, 2], ...], "tokens": 8, "options": {...}}, ...]

Prints one line of JSON for each job: the tokens of each prompt, or the error; then the names of all loaded packages.
"""

import gc
import json
import os
import sys
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")}

COMMON = {
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    "max_num_seqs": 16,
}


def main() -> None:
    """Run all jobs."""
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    for job in jobs:
        llm = None
        try:
            llm = LLM(job["model"], **COMMON | job.get("options", {}))
            parameters = SamplingParams(max_tokens=job["tokens"], temperature=0, ignore_eos=True, detokenize=False)
            prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
            outputs = llm.generate(prompts, parameters, use_tqdm=False)
            result: dict[str, Any] = {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}
        except Exception as error:  # the tests read its message
            result = {"error": f"{type(error).__name__}: {error}"}
        print("RESULT", json.dumps(result), flush=True)
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()
    print("MODULES", json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), flush=True)


if __name__ == "__main__":
    main()
