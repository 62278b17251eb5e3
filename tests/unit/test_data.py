"""The order of samples depends only on the seed and the number of the sample."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mone_common.checkpoint_folder import Checkpoint
from tests.tiny import facts_of, make_shards
from train.config import RunConfig, describe
from train.config_sections import SourceConfig
from train.continuation import check_continues
from train.data import RunData, load_data, micro_batches
from train.sample_order import describe_order, describe_reading, load_manifests, plan_order

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder / "a", name="a")
    make_shards(folder / "b", name="b", seed=1, documents=50)
    return folder


def load(
    folder: Path,
    *,
    steps: int = 20,
    seed: int = 1,
    data_seed: int | None = None,
    weights: tuple[float | None, float | None] = (0.75, 0.25),
) -> RunData:
    config = RunConfig()
    config.data.seed = data_seed
    config.run.seed, config.training.steps, config.training.global_batch_size = seed, steps, 8
    config.model.seq_length = 32
    config.data.blend = [
        SourceConfig(path=str(folder / name), weight=weight) for name, weight in zip("ab", weights, strict=True)
    ]
    config.data.index_cache = str(folder / "cache")
    manifests = load_manifests(config)
    return load_data(config, manifests, plan_order(config, manifests, None, 0), samples=steps * 8)


def samples(data: RunData, start: int, stop: int, *, data_size: int, micro_batch_size: int) -> list[list[int]]:
    """All ranks' samples in the order of the global batch."""
    ranks = [
        list(
            micro_batches(
                data.train,
                start=start,
                stop=stop,
                micro_batch_size=micro_batch_size,
                data_rank=rank,
                data_size=data_size,
            )
        )
        for rank in range(data_size)
    ]
    return [row.tolist() for pieces in zip(*ranks, strict=True) for piece in pieces for row in piece["tokens"]]


def test_every_world_size_and_micro_batch_size_sees_the_same_order(folder: Path) -> None:
    data = load(folder)
    expected = samples(data, 0, 64, data_size=1, micro_batch_size=1)
    assert len({tuple(row) for row in expected}) > 50
    assert samples(data, 0, 64, data_size=4, micro_batch_size=2) == expected
    assert samples(data, 24, 64, data_size=2, micro_batch_size=4) == expected[24:]


def test_neither_a_longer_run_nor_a_cached_index_changes_the_order(folder: Path) -> None:
    first = samples(load(folder, steps=10), 0, 80, data_size=1, micro_batch_size=8)
    # 100 steps read the smaller source more than once.
    longer = load(folder, steps=100)
    assert longer.train.index_in[longer.train.source_of == 1].max() >= longer.train.sources[1].size
    assert samples(longer, 0, 80, data_size=1, micro_batch_size=8) == first


def test_another_seed_and_another_epoch_give_another_order(folder: Path) -> None:
    first = samples(load(folder, seed=1), 0, 64, data_size=1, micro_batch_size=8)
    assert samples(load(folder, seed=2), 0, 64, data_size=1, micro_batch_size=8) != first
    source = load(folder, steps=100).train.sources[1]
    epochs = [[source[i]["tokens"].tolist() for i in range(e * source.size, (e + 1) * source.size)] for e in (0, 1)]
    assert epochs[0] != epochs[1]


def test_validation_does_not_depend_on_seeds(folder: Path) -> None:
    first, other = load(folder, seed=1), load(folder, seed=2, data_seed=3)
    assert list(first.validation) == list(other.validation) == ["a", "b"]
    for name, source in first.validation.items():
        assert source.size > 5
        for i in range(source.size):
            assert torch.equal(source[i]["tokens"], other.validation[name][i]["tokens"])


def test_data_seed_overrides_run_seed_for_the_order(folder: Path) -> None:
    first = samples(load(folder, seed=5), 0, 64, data_size=1, micro_batch_size=8)
    assert samples(load(folder, seed=1, data_seed=5), 0, 64, data_size=1, micro_batch_size=8) == first
    assert samples(load(folder, seed=5, data_seed=1), 0, 64, data_size=1, micro_batch_size=8) != first


def test_epochs_of_each_source_are_printed_with_a_warning_for_many(folder: Path) -> None:
    few = load(folder, steps=20)
    for source, number in zip(few.reading, (120, 40), strict=True):
        assert source.read == number * 32
        assert source.epochs == pytest.approx(source.read / source.tokens, rel=0.05)
    assert "warning" not in describe_reading(few.reading)
    text = describe_reading(load(folder, steps=200).reading)
    assert re.search(r"^data +a +75.0% of the blend: 0.04M of 0.01M tokens, 3.\d\d epochs$", text, re.MULTILINE)
    assert re.search(r"^warning: this run reads b \d.\d times\. Beyond 4 epochs", text, re.MULTILINE)


def test_blend_weights_hold_throughout_the_run(folder: Path) -> None:
    blend = load(folder, steps=50).train
    for count in (40, 200, 400):
        assert (blend.source_of[:count] == 0).mean() == pytest.approx(0.75, abs=0.03)
    by_tokens = load(folder, weights=(None, None)).train
    manifests = load_manifests(config_of(folder))
    share = manifests[0].tokens("train") / sum(manifest.tokens("train") for manifest in manifests)
    assert (by_tokens.source_of == 0).mean() == pytest.approx(share, abs=0.01)


def config_of(folder: Path) -> RunConfig:
    config = RunConfig()
    config.model.seq_length = 32
    config.data.blend = [SourceConfig(path=str(folder / name)) for name in "ab"]
    return config


def blended(folder: Path, weights: dict[str, float]) -> RunConfig:
    config = config_of(folder)
    config.data.blend = [SourceConfig(path=str(folder / name), weight=weight) for name, weight in weights.items()]
    config.data.index_cache = str(folder / "cache")
    return config


WEIGHTS = st.dictionaries(st.sampled_from("ab"), st.sampled_from([0.2, 1.0, 3.0]), min_size=1)


@given(blends=st.lists(st.tuples(WEIGHTS, st.integers(1, 40)), min_size=1, max_size=5))
@settings(max_examples=15, deadline=None)
def test_changes_of_the_blend_repeat_and_lose_no_sample(folder: Path, blends: list[tuple[dict[str, float], int]]) -> None:
    order, total = None, 0
    seen: dict[str, list[int]] = {"a": [], "b": []}
    for weights, count in blends:
        config = blended(folder, weights)
        manifests = load_manifests(config)
        order = plan_order(config, manifests, order, total)
        blend = load_data(config, manifests, order, samples=total + count).train
        for i in range(total - order["start"], total - order["start"] + count):
            seen[manifests[blend.source_of[i]].name].append(int(blend.index_in[i]))
        total += count
        order = json.loads(json.dumps(order))
    for numbers in seen.values():
        assert numbers == list(range(len(numbers)))
    assert sum(map(len, seen.values())) == total


def test_a_changed_blend_is_reported_and_an_invalid_one_refused(folder: Path, tmp_path: Path) -> None:
    config = blended(folder, {"a": 3.0, "b": 1.0})
    manifests = load_manifests(config)
    before = plan_order(config, manifests, None, 0)
    assert plan_order(config, manifests, before, 80) is before
    assert describe_order(before, before) is None
    config.data.blend[0].weight = 1.0
    after = plan_order(config, manifests, before, 80)
    assert describe_order(after, before) == (
        "data.blend changed: from sample 80 on, a from its sample 60, b from its sample 20"
    )
    config.run.seed += 1
    with pytest.raises(ValueError, match=r"run.seed=1235 \(saved: 1234\)"):
        plan_order(config, manifests, before, 80)
    config.data.seed = 7
    with pytest.raises(ValueError, match=r"data.seed=7 \(saved: 1234\)"):
        plan_order(config, manifests, before, 80)
    config.data.seed = 1234
    assert plan_order(config, manifests, after, 80) is after
    config.data.blend[0].path = str(make_shards(tmp_path / "a", name="a", seed=9))
    with pytest.raises(ValueError, match="source a has other content"):
        plan_order(config, load_manifests(config), before, 80)


def test_a_resumed_run_keeps_both_seeds(folder: Path) -> None:
    config = blended(folder, {"a": 3.0, "b": 1.0})
    config.run.seed, config.data.seed, config.model.vocab_size = 5, 6, 64
    manifests = load_manifests(config)
    facts = facts_of(
        8,
        model=describe(config)["model"],
        precision=config.compute.precision,
        order=plan_order(config, manifests, None, 0),
        seed=5,
    ).to_dict()
    checkpoint = Checkpoint(folder / "step-1", 1, facts, {})
    assert check_continues(config, manifests, checkpoint)[1:] == (1, 8)
    config.run.seed = 7
    with pytest.raises(ValueError, match=r"run.seed=7 \(saved: 5\)"):
        check_continues(config, manifests, checkpoint)
    config.run.seed, config.data.seed = 5, None
    with pytest.raises(ValueError, match=r"run.seed=5 \(saved: 6\): it decides the order of samples"):
        check_continues(config, manifests, checkpoint)
    # A checkpoint of an earlier version, which had one seed for both.
    del facts["seed"]
    checkpoint = Checkpoint(folder / "step-1", 1, facts, {})
    config.run.seed, config.data.seed = 6, None
    assert check_continues(config, manifests, checkpoint)[1:] == (1, 8)
    config.data.seed = 6
    assert check_continues(config, manifests, checkpoint)[1:] == (1, 8)


def test_a_shard_that_changes_during_a_run_is_detected(folder: Path, tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "c", name="c")
    config = config_of(folder)
    config.data.blend = [SourceConfig(path=str(shards))]
    config.data.index_cache = str(tmp_path / "cache")
    manifests = load_manifests(config)
    data = load_data(config, manifests, plan_order(config, manifests, None, 0), samples=8)
    assert data.changed_file() is None
    path = shards / "train-00000.bin"
    path.write_bytes(path.read_bytes()[::-1])
    assert data.changed_file() == path


def test_labels_are_the_next_tokens(folder: Path) -> None:
    sample = load(folder).train[3]
    assert sample["tokens"].shape == (32,)
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    assert torch.equal(sample["position_ids"], torch.arange(32))
    assert sample["loss_mask"].tolist() == [1.0] * 32
    assert 0 in sample["tokens"][:-1]  # the end of a document: the next one's tokens follow


def test_a_partial_last_batch_is_filled_with_masked_samples(folder: Path) -> None:
    data = load(folder)
    batches = [
        list(micro_batches(data.train, start=0, stop=5, micro_batch_size=2, data_rank=rank, data_size=2)) for rank in (0, 1)
    ]
    assert [len(of_rank) for of_rank in batches] == [2, 2]
    counted = sum(batch["loss_mask"].sum().item() for of_rank in batches for batch in of_rank)
    assert counted == 5 * 32


def test_invalid_sources_are_refused(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder)
    config.data.blend[1].path = str(folder / "missing")
    with pytest.raises(ValueError, match="missing"):
        load_manifests(config)

    twin = make_shards(tmp_path / "twin", name="a")
    config.data.blend[1].path = str(twin)
    with pytest.raises(ValueError, match="same name"):
        load_manifests(config)

    damaged = make_shards(tmp_path / "damaged", name="c")
    with open(damaged / "train-00000.bin", "r+b") as file:
        file.truncate(100)
    config.data.blend[1].path = str(damaged)
    with pytest.raises(ValueError, match=r"train-00000.bin"):
        load_manifests(config)

    config.data.blend[1].path = str(make_shards(tmp_path / "tiny", name="t", documents=5))
    config.model.seq_length = 1000
    with pytest.raises(ValueError, match=r"no shard of .*tiny holds a sequence of model.seq_length=1000"):
        load_manifests(config)
    config.model.seq_length = 32

    for number, (at, value, message) in enumerate(
        [
            (0, b"JUNK", "not an index of Megatron-Core"),
            (9, b"\x07", "index of version 7"),
            (17, b"\x04", "token type has code 4, that of the manifest's uint16 is 8"),
            (18, b"\xc7", "199 documents, the manifest says 200"),
            (26, b"\xff", "255 bounds of documents, 200 documents have 201"),
        ]
    ):
        damaged = make_shards(tmp_path / f"damaged {number}", name="c")
        with open(damaged / "train-00000.idx", "r+b") as file:
            file.seek(at)
            file.write(value)
        config.data.blend[1].path = str(damaged)
        with pytest.raises(ValueError, match=f"train-00000.idx: {message}.*mone-verify"):
            load_manifests(config)

    manifest = make_shards(tmp_path / "other", name="d") / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tokenizer_sha256": "none"', '"tokenizer_sha256": "other"'))
    config.data.blend[1].path = str(manifest.parent)
    with pytest.raises(ValueError, match="another tokenizer"):
        load_manifests(config)
