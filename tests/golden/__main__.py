"""Record the losses again, after a change to the mathematics that is intended to change them.

python -m tests.golden        # prints what differs from the record, then rewrites losses.json
"""

import json

from mone_model import megatron

megatron.prepare()  # before what imports Megatron-Core

from mone_model.config import ParallelConfig  # noqa: E402
from tests.golden.runs import RECORD, RUNS, differences, read_record, train  # noqa: E402
from train.runtime import distributed  # noqa: E402


def main() -> None:
    """Train all runs, print the differences and write the record."""
    with distributed(ParallelConfig(), seed=1, timeout_minutes=1):
        found = {name: train(model) for name, model in RUNS.items()}
    print(*differences(found, read_record()) or ["no differences"], sep="\n")
    lines = [f"{json.dumps(name)}: {json.dumps(run)}" for name, run in found.items()]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
