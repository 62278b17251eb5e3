"""Pretrain a Mixture of Neuron Experts language model.

    torchrun --nproc-per-node 2 --no-python mone-pretrain experiment=demo
    mone-pretrain --help

The command composes and checks the configuration, then trains.
"""

import atexit
import os
import sys
from pathlib import Path

from omegaconf import DictConfig

from mone_common.console import ReportedError, UserError, command
from mone_common.output import unblock_output
from mone_model import megatron
from mone_model.megatron import versions
from train.launcher import check_launcher, ending_with_launcher, rank_and_world_size, remove_empty_logs
from train.meeting import Meeting
from train.preparation import prepare_run, value_errors_as_user_errors
from train.run_notes import note_failure, take_run_folder, write_status
from train.run_tokenizer import compare_tokenizers, keep_tokenizer


@command("pretrain", launched=True)
def main(hydra_config: DictConfig) -> None:
    """Run the composed configuration. Exit codes: docs/faults.md."""
    unblock_output()
    versions.check_version()
    check_launcher()
    atexit.register(remove_empty_logs)
    rank, world_size = rank_and_world_size()
    if "RANK" not in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS", "1") not in ("", "0", "1"):
        raise UserError("several Slurm tasks and no RANK: let srun start one torchrun on each node, not one process each")
    meeting = Meeting(rank, world_size)
    with ending_with_launcher():
        with meeting.together("checks"), value_errors_as_user_errors():
            config, manifests, checkpoints = prepare_run(hydra_config, world_size)
        with meeting.together("run folder"), value_errors_as_user_errors():
            lock = take_run_folder(config) if rank == 0 else None  # noqa: F841  until this process ends
            if rank == 0:
                keep_tokenizer(Path(config.run.dir), manifests[0], begun=bool(checkpoints))
                if config.init.source is not None and not checkpoints:
                    compare_tokenizers(Path(config.init.source), manifests[0])
        # All ranks write checkpoints there, and read those of others after a resume.
        meeting.check_shared({"run.dir": Path(config.run.dir)})
    megatron.prepare()
    from train.training_run import train_run  # imports Megatron-Core

    if rank == 0:
        write_status(config, "running")
    try:
        train_run(config, manifests, checkpoints, meeting)
    except Exception as error:
        code = error.exit_code if isinstance(error, ReportedError) else 1
        if meeting.report(error):
            note_failure(config, f"{type(error).__name__}: {error}", code)
        if isinstance(error, ReportedError):
            sys.exit(code)
        raise


if __name__ == "__main__":
    main()
