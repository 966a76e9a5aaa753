"""What reaches a process of a run from outside before its own code runs: nothing."""

import subprocess
import sys

from gwp_edge.child_process import FROM_OUTSIDE

MAIN = """
import multiprocessing, signal

from gwp_edge.child_process import start_shielded


def tell():
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    print(*sorted(int(number) for number in blocked), flush=True)


if __name__ == "__main__":
    for _ in range(2):
        child = multiprocessing.get_context("spawn").Process(target=tell)
        start_shielded(child)
        child.join()
"""


def test_even_the_first_process_of_a_program_is_shielded(tmp_path):
    """The start of Python's resource tracker, which comes with it, unblocked SIGINT and SIGTERM."""
    program = tmp_path / "main.py"
    program.write_text(MAIN)
    told = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, check=True, timeout=60
    )
    wanted = " ".join(str(int(number)) for number in sorted(FROM_OUTSIDE))
    assert told.stdout.splitlines() == [wanted, wanted]
