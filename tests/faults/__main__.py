"""Kill training processes at random times, including during saves, and check that the final results do not change.

Each round starts the tiny model on two processes, kills -9 one of them or both, starts the same command again, and compares
loss, gradient norm, validation loss and tokens of every step with those of an undisturbed run, bitwise. Every other
round waits for a save and kills in it, half of these while it is written in the background. Exit code 1 if a round differs.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.jobs import UNDISTURBED, make_data, run_to_end
from tests.faults.rounds import HEADER, Outcome, draw, play


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="how many (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of victims and moments (default: 0)")
    parser.add_argument("--minutes", type=float, default=None, help="begin no round after these minutes (default: no limit)")
    parser.add_argument("--folder", type=Path, default=None, help="where the runs stay (default: a temporary folder)")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="mone-faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    make_data(folder)
    run_to_end(folder, UNDISTURBED)
    generator = random.Random(options.seed)
    outcomes: list[Outcome] = []
    print(HEADER, flush=True)
    for number in range(1, options.rounds + 1):
        hurt = draw(generator, number)
        if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
            print(f"stopped after {len(outcomes)} rounds: --minutes={options.minutes:g}")
            break
        outcomes.append(play(folder, f"round-{number}", hurt))
        print(outcomes[-1].row(number), flush=True)
    wrong = [outcome for outcome in outcomes if outcome.problem]
    print("", HEADER, *(outcome.row(number) for number, outcome in enumerate(outcomes, 1)), sep="\n")
    torn = sum(outcome.torn for outcome in outcomes)
    print(f"{len(outcomes) - len(wrong)} of {len(outcomes)} equal; {torn} kills left a checkpoint half-written")
    if options.folder is None and not wrong:
        shutil.rmtree(folder)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
