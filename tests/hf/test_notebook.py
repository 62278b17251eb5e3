"""The code of docs/notebook.md runs, on a model with random weights."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.hf.checkpoints import build, model_of, save
from tests.hf.test_tokenizer import trained as trained


@pytest.mark.usefixtures("one_process")
def test_the_code_of_the_page_runs(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of(vocab_size=800, seq_length=256, activation_ratio=0.25)
    save(tmp_path / "runs/demo", build(model), model)
    shutil.copytree(trained, tmp_path / "runs/demo/tokenizer")
    (tmp_path / "data/demo/text").mkdir(parents=True)
    (tmp_path / "data/demo/text/factbook.jsonl").write_text('{"text": "The capital of the country."}\n')
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/notebook.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    printed = capsys.readouterr().out
    assert "MoneForCausalLM" in printed
    assert printed.count("largest gates of the first") == len(names["tokens"])
    assert printed.count("nats per token") == 5
    assert (tmp_path / "neurons.png").stat().st_size > 1000
