"""Print the tests that no stage ran, and fail if one has no reason in the table.

    python .ci/skipped.py FOLDER

FOLDER has the files that tests/outcomes.py has written, of every run of the tests in every stage.
"""

import json
import re
import sys
from pathlib import Path

# What a test says when it is skipped, as a pattern; and why it is right that no stage runs it.
ALLOWED = {
    r"(SimpleITK|av|catboost|jax|onnxruntime|torch) is not installed": "large, and in no extra",
    r"(executorlib|mpi4py|mpiexec) is not installed: .*": "an engine of clusters, in no extra",
    r"not installed, so not checked: .*": "a summary: each row of the table has its own test",
    r"(crun|docker|fish|podman|runc) is not installed": "a program that few machines have",
    r".*(controller|freezer|control groups).*": "the machine has control groups of one version",
    r"needs version 1's .*|version 2 lets .*": "the same",
    r".*quota (above|here).*": "the machine has a quota of its own",
    r".*needs? root.*|.*only root .*|.* by root only": "no root here",
    r"root makes .*|takes root .*|becomes .* user": "the same",
    r".*(user namespaces|name ?spaces cannot|(network|container) can.* be made).*": "a sandbox",
    r".*a compiler to build .*|no compiler .*": "the machine has no compiler",
    r"no interpreter that every user may start": "the Pythons are in a folder of one user",
    r"unknown numbers of (system )?calls": "another kind of processor",
    r".*one CPU.*|.*two CPUs.*|.*stays idle|other programs use .*": "few CPUs, or busy ones",
    r"where one worker fits .*": "the same",
    r"not enough memory is free": "a small machine",
    r"this interpreter comes without test\..*": "no Python here has its own test suite",
}


def main(folder: str) -> int:
    """Compare the runs; return the exit code."""
    runs = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    ran = {test for run in runs for test in run["ran"]}
    skipped = {
        test: why for run in runs for test, why in run["skipped"].items() if test not in ran
    }
    wrong = 0
    for test, said in sorted(skipped.items()):
        right = next((why for form, why in ALLOWED.items() if re.fullmatch(form, said)), None)
        wrong += right is None
        print(f"{test}: {said} ({right or 'NO REASON in .ci/skipped.py'})")
    print(
        f"{len(ran)} tests and files ran, {len(skipped)} never, {wrong} of them without a reason"
    )
    return int(wrong > 0 or not ran)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
