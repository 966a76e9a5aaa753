#!/usr/bin/env bash
# Print the command of a Python that gwp-edge supports (3.10 to 3.13, able to make virtual
# environments). With an argument: check that one. Fails with one line that says what to do.
set -euo pipefail

usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
        >/dev/null 2>&1
}

if [ $# -gt 0 ] && [ -n "$1" ]; then
    usable "$1" && { echo "$1"; exit 0; }
    echo "setup: $1 is not a Python 3.10 to 3.13 with venv; name another with make PYTHON=..." >&2
    exit 1
fi
# The system's own python3 first: on a Jetson only that one sees the system's TensorRT.
for candidate in python3 python3.12 python3.11 python3.13 python3.10; do
    usable "$candidate" && { echo "$candidate"; exit 0; }
done
# make asks before the system packages are there; the set-up step asks again and reports.
[ $# -gt 0 ] || exit 0
echo "setup: no Python 3.10 to 3.13 with venv found; on Debian and Ubuntu:" \
    "apt-get install python3 python3-venv, elsewhere: make PYTHON=/path/to/python3.11" >&2
exit 1
