"""The OpenAI server with real clients: what a request gets does not depend on the others."""

import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.distributed.elastic.utils.distributed import get_free_port
from transformers import PreTrainedTokenizerFast

from tests.vllm.conftest import ENVIRONMENT
from tests.vllm.models import VOCABULARY, build_mone, greedy, sequences

CONTEXT = 256
CHUNK = 64
PROMPTS = [sequences(1, 3 + (37 * number) % 150, seed=500 + number)[0].tolist() for number in range(28)]
PROMPTS += [[*PROMPTS[25], 7 + number] for number in range(4)]  # they share a prefix
LENGTHS = [4 + (11 * number) % 40 for number in range(len(PROMPTS))]


class Server(NamedTuple):
    url: str
    model: str
    expected: list[str]
    """What transformers generates for each prompt."""


def words(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


def save_tokenizer(folder: Path) -> None:
    """One word for each token."""
    words = {f"w{token}": token for token in range(VOCABULARY)} | {"<unk>": VOCABULARY}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-5000:]
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-5000:])


@pytest.fixture(scope="module")
def server(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A trained MoNE model with a shared expert, served with prefix caching and chunked prefill."""
    folder = tmp_path_factory.mktemp("served")
    model = build_mone(shared_expert_intermediate_size=48, shared_expert_neuron_ratio=0.5)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    generated = [greedy(model, [prompt], length)[0] for prompt, length in zip(PROMPTS, LENGTHS, strict=True)]
    url, log = f"http://127.0.0.1:{(port := get_free_port())}", folder / "log.txt"
    options = ["--dtype=float32", "--enforce-eager", f"--max-model-len={CONTEXT}", f"--max-num-batched-tokens={CHUNK}"]
    options += ["--enable-prefix-caching", "--enable-chunked-prefill", "--max-num-seqs=16", f"--port={port}"]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, *options],
            env=os.environ | ENVIRONMENT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for(url, process, log)
            yield Server(url, str(folder), [words(tokens) for tokens in generated])
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def answers(server: Server, vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    requests = tmp_path_factory.mktemp("requests") / "requests.json"
    pairs = zip(PROMPTS, LENGTHS, strict=True)
    requests.write_text(json.dumps([{"prompt": words(prompt), "tokens": length} for prompt, length in pairs]))
    client = Path(__file__).parent / "client.py"
    done = subprocess.run(
        [vllm_python, client, server.url, server.model, requests], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def test_requests_alone_get_what_transformers_generates(server: Server, answers: dict[str, Any]) -> None:
    assert [text.split() for text in answers["alone"]] == [text.split() for text in server.expected]


def test_32_requests_at_once_get_what_they_get_alone(answers: dict[str, Any]) -> None:
    assert len(answers["together"]) == 32
    assert answers["together"] == answers["alone"]


def test_cancelled_requests_do_not_disturb_later_ones(answers: dict[str, Any]) -> None:
    assert answers["again"] == answers["alone"][:3]


def test_a_request_beyond_the_context_is_refused(answers: dict[str, Any]) -> None:
    assert "400" in answers["refused"]
    assert f"{CONTEXT}" in answers["refused"]


def test_the_prefix_cache_was_used(server: Server, answers: dict[str, Any]) -> None:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    (hits,) = [line for line in lines if line.startswith("vllm:prefix_cache_hits_total")]
    assert float(hits.rpartition(" ")[2]) > 0
