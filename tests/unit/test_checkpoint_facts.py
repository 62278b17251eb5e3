"""Facts in manifests of all versions are read, and invalid facts are reported."""

import json
from typing import Any

import pytest

from tests.tiny import facts_of
from train.checkpoint_facts import VERSION, CheckpointFacts

OPTIMIZER = {"lr": 0.1, "min_lr": 0.01, "warmup_steps": 1}


def test_facts_are_read_as_they_were_written() -> None:
    facts = facts_of(4, run="a run", wandb_id="an id", experts="loop", optimizer=OPTIMIZER, steps=9)
    written = json.loads(json.dumps(facts.to_dict()))
    assert written["version"] == VERSION
    assert CheckpointFacts.from_dict(written | {"format": "mone", "of a later version": 1}, step=4) == facts


def test_facts_of_the_first_version_are_read() -> None:
    later = {"version", "engine", "experts", "run", "optimizer", "steps", "wandb_id", "seed"}
    noted = {name: fact for name, fact in facts_of(4).to_dict().items() if name not in later}
    facts = CheckpointFacts.from_dict(noted, step=4)
    assert facts == facts_of(4, version=0)
    assert (facts.engine, facts.experts, facts.seed) == ("megatron", "auto", noted["order"]["seed"])
    assert (facts.run, facts.optimizer, facts.steps, facts.wandb_id) == (None, None, None, None)


def test_the_earlier_name_of_a_backend_is_read() -> None:
    assert CheckpointFacts.from_dict(facts_of(1).to_dict() | {"experts": "skip"}, step=1).experts == "sparse"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "new"}, "has an invalid value of version: new"),
        ({"seed": "1234"}, "has an invalid value of seed: 1234"),
        ({"samples": 3}, "has an invalid value of samples: 3"),
        ({"optimizer": OPTIMIZER, "steps": None}, "has an invalid value of optimizer"),
        ({"optimizer": OPTIMIZER | {"warmup_steps": 9}, "steps": 9}, "has an invalid value of optimizer"),
        ({"order": [], "seed": None}, "has an invalid value of order"),
    ],
)
def test_an_invalid_fact_is_reported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckpointFacts.from_dict(facts_of(4).to_dict() | changes, step=4)


def test_missing_facts_are_named() -> None:
    noted = facts_of(4).to_dict()
    del noted["order"], noted["guard"]
    with pytest.raises(ValueError, match="not a checkpoint of a run: its manifest lacks guard, order"):
        CheckpointFacts.from_dict(noted, step=4)
