"""`bulkhead audit kill-matrix` in a process of its own, so that the command stays free of torch. One JSON object on
standard output."""

import argparse
import json
import sys

from tests.faults.matrix import clean_steps, kill_matrix

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, required=True)
    parser.add_argument("--clean-steps", type=int, required=True)
    arguments = parser.parse_args()
    answer = kill_matrix(arguments.seeds) | clean_steps(arguments.clean_steps)
    sys.stdout.write(json.dumps(answer) + "\n")
