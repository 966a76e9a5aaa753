#!/usr/bin/env bash
# Install the Debian or Ubuntu packages that set-up and tests need and that are missing.
# Says what it installs and why; uses sudo only when not root; otherwise prints the command.
set -euo pipefail

packages=() reasons=()
need() { packages+=("$1"); reasons+=("  $1: $2"); }
missing() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" != installed ]; }

if [ -n "${SKIP_SYSTEM_PACKAGES:-}" ]; then
    echo 'setup: system packages left to you (SKIP_SYSTEM_PACKAGES is set)'
    exit 0
fi
if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    echo 'setup: this is no Debian or Ubuntu. Install a C compiler, libusb 1.0, EGL and OpenGL (Mesa), and Chromium' \
        'in your own way, then: make SKIP_SYSTEM_PACKAGES=1 ...' >&2
    exit 1
fi

if ! python="$(scripts/find-python.sh '' 2>/dev/null)"; then
    need python3-venv 'virtual environments'
    need python3-dev "the PiPER driver's part in C"
elif ! [ -e "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]; then
    need python3-dev "the PiPER driver's part in C"
fi
command -v "${CC:-cc}" >/dev/null || need gcc 'the same'
missing libc6-dev && need libc6-dev 'the same'
missing libusb-1.0-0 && need libusb-1.0-0 'pyrealsense2 loads it'
for library in libegl1 libegl-mesa0 libgl1 libglx-mesa0; do
    missing "$library" && need "$library" 'headless rendering of the simulated robot'
done
if ! command -v chromium chromium-browser google-chrome >/dev/null; then
    need chromium 'tests that open the latency report in a browser'
fi
if [ ${#packages[@]} -eq 0 ]; then
    exit 0
fi

echo 'setup: these system packages are missing and will be installed:'
printf '%s\n' "${reasons[@]}"
install="apt-get install -y --no-install-recommends ${packages[*]}"
as_root=()
if [ "$(id -u)" -ne 0 ]; then
    as_root=(sudo)
    [ -t 0 ] || as_root=(sudo -n)
fi
if ! { "${as_root[@]}" apt-get update -qq && "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    $install -qq >/dev/null; }; then
    echo "setup: could not install them here. Run this, then make again:" >&2
    echo "  sudo apt-get update && sudo $install" >&2
    exit 1
fi
