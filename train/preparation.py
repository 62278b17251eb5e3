"""Check a run before anything is built. Imports no torch; commands that plan or queue runs use it as well.

config, manifests, checkpoints = prepare_run(hydra_config, world_size)      # ValueError for invalid options or data
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from data_prep.shards import Manifest
from mone_common.checkpoint_folder import Checkpoint
from mone_common.console import UserError
from mone_common.run_folder import check_free
from train.config import RunConfig, load_config
from train.config_rules import PROCESSES, validate
from train.continuation import find_checkpoints
from train.sample_order import load_evaluated, load_manifests


def prepare_run(
    hydra_config: DictConfig, world_size: int, *, transformer_engine: bool | None = None, processes: str = PROCESSES
) -> tuple[RunConfig, list[Manifest], list[Checkpoint]]:
    """The checked config, the manifests of the data, and the checkpoints to choose from; ValueError for invalid options.

    transformer_engine: whether the run uses Transformer Engine's layers; None: decide for this machine.
    processes: the options that set the world size, as the user types them.
    Writes nothing, and is not a collective.
    """
    config = load_config(hydra_config)
    check_free(Path(config.run.dir))
    validate(config, world_size, transformer_engine=transformer_engine, processes=processes)
    manifests = load_manifests(config)
    load_evaluated(config, manifests)
    if config.model.vocab_size is None:
        config.model.vocab_size = manifests[0].vocab_size
    elif config.model.vocab_size < manifests[0].vocab_size:
        raise ValueError(f"model.vocab_size={config.model.vocab_size}: the data's tokenizer has {manifests[0].vocab_size}")
    checkpoints = find_checkpoints(config, manifests)
    if config.init.source is not None and not checkpoints:
        from train.initial_source import check_branch, check_source  # most runs need none of the importers

        if config.init.branch:
            check_branch(config, manifests)
        else:
            check_source(config)
    return config, manifests, checkpoints


@contextlib.contextmanager
def value_errors_as_user_errors() -> Iterator[None]:
    """Raise a ValueError of the block as a UserError with the same message."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error
