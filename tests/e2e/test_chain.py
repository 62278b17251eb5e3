"""From raw text to samples with the commands of the README."""

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

WORDS = ["the", "a", "river", "mountain", "king", "city", "of", "in", "and", "sings", "sleeps", "under", "gold", "old"]


def write_corpus(path: Path) -> None:
    chooser = random.Random(0)
    with open(path, "w") as file:
        for _ in range(300):
            text = ". ".join(" ".join(chooser.choices(WORDS, k=8)) for _ in range(12))
            file.write(json.dumps({"text": text}) + "\n")


def test_from_raw_text_to_generated_text(command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.jsonl")

    def run(module: str, *args: str, processes: int = 1) -> str:
        done = command(module, *args, processes=processes)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("data_prep.tokenizer_training", "corpus.path=corpus.jsonl", "vocab_size=320", "output=tokenizer")
    run("data_prep.tokenize", "corpus.path=corpus.jsonl", "tokenizer=tokenizer", "output=shards", "validation_fraction=0.1")
    run("data_prep.verify", "path=shards")
    options = ["model.num_layers=2", "model.hidden_size=64", "model.moe_ffn_hidden_size=64", "model.seq_length=64"]
    options += ["model.shared_expert_ffn_hidden_size=64", "model.num_attention_heads=2", "data.blend=[{path: shards}]"]
    options += ["run.name=words", "training.global_batch_size=8", "optimizer.lr=1e-2", "optimizer.warmup_steps=2"]
    options += ["parallel.expert=2", "logging.wandb_mode=disabled"]
    trained = run("train.pretrain", *options, "training.steps=80", processes=2)
    assert "complete" in trained

    # A checkpoint does not depend on the layout: one process continues a run of two.
    continued = run("train.pretrain", *options, "training.steps=90", "parallel.expert=1")
    assert "resumed from runs/words/checkpoints/step-00000080" in continued
    records = [json.loads(line) for line in (tmp_path / "runs/words/metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["train/loss"] for record in records if "train/loss" in record}
    assert losses[90] < losses[10] - 0.3

    sampled = run("train.sample", "run=runs/words", 'prompts=["the river"]', "max_new_tokens=12", "temperature=0")
    written = sampled.split("...")[1].replace(".", " ").split()
    assert len(written) >= 3
    assert sum(word in WORDS for word in written) > len(written) / 2

    calibrated = run("train.calibrate", "run=runs/words", "sequences=20")
    thresholds = json.loads((tmp_path / "runs/words/thresholds.json").read_text())
    assert len(thresholds["thresholds"]) == 2
    assert abs(thresholds["loss"] - thresholds["loss_of_k_best"]) < 0.1
    assert "kept" in calibrated
    # A moved run still generates text.
    (tmp_path / "runs/words").rename(tmp_path / "words")
    (tmp_path / "shards").rename(tmp_path / "gone")
    again = run("train.sample", "run=words", 'prompts=["the river"]', "thresholds=words/thresholds.json")
    assert again.startswith("the river ...")
    assert not list((tmp_path / "runs").iterdir())
    (tmp_path / "words").rename(tmp_path / "runs/words")
    refused = command("train.sample", "run=runs/words", "thresholds=runs/words/config.yaml")
    assert refused.returncode == 2
    assert "error: thresholds=runs/words/config.yaml: is missing or not an output file of mone-calibrate" in refused.stderr
