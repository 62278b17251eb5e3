"""Load a trained model, for sampling, calibration, evaluation and export.

    from mone_model import megatron                   # not NVIDIA's package `megatron`
    from train.trained_model import load_model, load_run_config, one_process

    megatron.prepare()
    config = load_run_config(Path("runs/demo"))
    with one_process(config):
        model = load_model(config)                    # the newest checkpoint, of a run with any layout
        logits_BSV = model(tokens_BS, position_ids_BS, None)

Importing this module imports neither torch nor Megatron-Core.
"""

import io
import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mone_common.checkpoint_folder import list_checkpoints
from mone_common.console import UserError
from mone_common.run_folder import CONFIG_FILE, read_file
from mone_common.run_records import read_published
from train.config import RunConfig

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from train.runtime import Runtime

logger = logging.getLogger(__name__)


def load_run_config(folder: Path) -> RunConfig:
    """The configuration in a run folder, with the layout changed to one process; UserError if there is none.

    The folder may have been moved.
    """
    path = folder / CONFIG_FILE
    try:
        text = read_file(path)
        if text is None:
            raise UserError(f"run={folder}: has no {CONFIG_FILE}; give the folder of a run, e.g. run=runs/demo")
        noted = OmegaConf.load(io.StringIO(text.decode()))
        if not noted:
            raise ValueError("it holds no options")
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), noted))
        assert isinstance(config, RunConfig)
    except UserError:
        raise
    except (ValueError, TypeError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"run={folder}: {path} is damaged, or of another version ({reason})") from error
    config.parallel = type(config.parallel)()
    cache = Path(config.data.index_cache)
    if cache.is_relative_to(config.run.dir):
        config.data.index_cache = str(folder / cache.relative_to(config.run.dir))
    config.run.dir = str(folder)
    return config


def one_process(config: RunConfig) -> AbstractContextManager["Runtime"]:
    """Context in which this process is a distributed job of one rank, with the seed of the run."""
    from train.runtime import distributed

    return distributed(config.parallel, seed=config.run.seed, timeout_minutes=config.run.timeout_minutes)


def load_model(config: RunConfig, *, step: int | None = None, trust: bool = False) -> "GPTModel":
    """The whole model with the weights of a checkpoint, in evaluation mode; call it within `one_process`.

    config: from `load_run_config`; with a schedule of the ratio, `config.model` becomes the model at the step of the
    checkpoint. step: of the checkpoint; None: the newest that can be loaded; those skipped are logged. trust: also load
    checkpoints that contain pickled code, which loading executes.

    Raises UserError if there is no such checkpoint, or it cannot be loaded.
    """
    from mone_model.megatron.gpt import build_gpt, set_active_neurons
    from train.checkpoint_integrity import load_newest

    folder = Path(config.run.dir)
    checkpoints = folder / "checkpoints"
    found, problems = list_checkpoints(checkpoints, run=read_published(folder).get("run"))
    asked = [checkpoint for checkpoint in found if step in (None, checkpoint.step)]
    if not asked:
        steps = [checkpoint.step for checkpoint in found]
        also = "".join(f"; {problem}" for problem in problems)
        raise UserError(f"step={step}: {checkpoints} holds checkpoints of steps {steps or 'none'}{also}")
    model = build_gpt(config.model, config.parallel, config.compute, seed=config.run.seed)
    checkpoint, loaded, more = load_newest(asked, lambda: {"model0": model.sharded_state_dict()}, trust=trust, whole=False)
    problems += [problem.replace("checkpoint.trust", "trust") for problem in more]
    if checkpoint is None:
        raise UserError("; ".join(problems))
    for problem in problems:
        logger.info("skipped %s", problem)
    model.load_state_dict(loaded["model0"])
    config.model = config.model.at_step(checkpoint.step)
    set_active_neurons([model], config.model)
    return model.eval()
