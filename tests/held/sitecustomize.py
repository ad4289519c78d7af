"""Of a process that `start_recipe(holds=...)` starts, and of its children: who would write a path with these words in
it first leaves a file `held` in the current folder, and waits until that is gone, or until it is interrupted."""

import os
import sys
import time

HOLDS = os.environ.get("RLHF_TEST_HOLDS")
WRITING = os.O_WRONLY | os.O_RDWR
held = []


def hold(event, args):
    if event == "open" and not held and HOLDS in str(args[0]) and (args[2] or 0) & WRITING:
        held.append(args[0])
        open("held", "w").close()
        while os.path.exists("held"):
            time.sleep(0.01)


if HOLDS:
    sys.addaudithook(hold)
