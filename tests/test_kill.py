"""`nmke run` killed and started again; kill_run.py alone does it at every call that changes a file."""

import re
import subprocess
import sys
from pathlib import Path


def test_a_run_that_was_killed_ends_with_the_same_bits():
    script = Path(__file__).with_name("kill_run.py")
    command = [sys.executable, str(script), "--edits", "2", "--moments", "1", "--first", "2", "--last", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told = re.search(r"killed at 1 moments, (\d+) calls and (\d+) times while taking up, always the same bits", done.stdout)
    assert int(told[1]) >= 6 and int(told[2]) >= 4
