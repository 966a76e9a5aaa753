#!/usr/bin/env bash
# Prepare a Jetson for gwp-edge: does what is safe and can be undone, prints the rest.
# Not yet run on hardware. docs/jetson.md explains every step.
#
#   scripts/jetson-setup.sh          show what would be done, change nothing
#   scripts/jetson-setup.sh --apply  do the safe parts (asks for sudo)
set -euo pipefail

apply=0
case "${1:-}" in
    --apply) apply=1 ;;
    "") ;;
    *) echo "usage: $0 [--apply]" >&2; exit 2 ;;
esac

venv="${GWP_VENV:-$HOME/gwp-edge-venv}"
limits=/etc/security/limits.d/99-gwp-edge.conf
rules=/etc/udev/rules.d/99-gwp-edge-can.rules
here="$(cd "$(dirname "$0")/.." && pwd)"

say() { printf '%s\n' "$*"; }
# Print a command, and run it where --apply was given.
do_it() {
    say "  \$ $*"
    if ((apply)); then "$@"; fi
}
# Write a file as root, unless it says the same already.
put_file() {
    local path="$1" text="$2"
    if [[ -f "$path" && "$(cat "$path")" == "$text" ]]; then
        say "  $path: as it should be"
        return
    fi
    say "  $path:"
    sed 's/^/    /' <<<"$text"
    if ((apply)); then sudo tee "$path" >/dev/null <<<"$text"; fi
}

if [[ ! -f /etc/nv_tegra_release ]]; then
    say "this is not a Jetson (no /etc/nv_tegra_release)" >&2
    if ((apply)); then exit 1; fi
fi

say "1. packages"
do_it sudo apt-get update
do_it sudo apt-get install -y python3-venv python3-dev gcc libc6-dev python3-libnvinfer \
    libnvinfer-dev libnvonnxparsers-dev can-utils iproute2 libusb-1.0-0

say "2. virtual environment that sees the system's TensorRT: $venv"
if [[ -x "$venv/bin/python" ]]; then
    say "  it is there"
else
    do_it python3 -m venv --system-site-packages "$venv"
fi
# The versions that the tests ran with; what they name beside these packages is not installed.
do_it "$venv/bin/python" -m pip install -c "$here/constraints.txt" \
    "$here[sim]" pyrealsense2 "piper-sdk>=0.6.2,<0.7" "python-can>=4.3,<5"
# PyCUDA is compiled against the CUDA of this JetPack, so nvcc must be found.
# Before 2025.1.2 it does not build on JetPack 7's CUDA 13 (PyCUDA's issue 485).
if PATH="/usr/local/cuda/bin:$PATH" command -v nvcc >/dev/null; then
    do_it env PATH="/usr/local/cuda/bin:$PATH" "$venv/bin/python" -m pip install "pycuda>=2025.1.2"
else
    say "  PyCUDA is left out: a flashed board has no CUDA compiler (nvcc). Get it, some GB, and run"
    say "  this script again (docs/jetson.md, packages):"
    say "  \$ sudo apt-get install nvidia-jetpack        # on Thor nvidia-cuda-dev is enough"
fi
say "  what the hardware tests (make hil) need beside it"
do_it "$venv/bin/python" -m pip install -c "$here/constraints.txt" pytest hypothesis

say "3. real-time permission and locked memory for the group of this user"
user="$(id -un)"
put_file "$limits" "$user - rtprio 80
$user - memlock unlimited"

say "4. CAN by USB path, never by the order of plugging in"
say "  the adapters that are here, as udev knows them:"
for net in /sys/class/net/can*; do
    [[ -e "$net" ]] || continue
    say "    $(basename "$net")  $(udevadm info -q property -p "$net" | grep -E '^ID_PATH=' || true)"
done
say "  write $rules with one line for each arm, then unplug and plug in:"
say '    SUBSYSTEM=="net", ACTION=="add", ENV{ID_PATH}=="PATH-FROM-ABOVE", NAME="can_left"'
if ! modinfo gs_usb >/dev/null 2>&1; then
    say "  this kernel has no gs_usb: build the module (docs/jetson.md, CAN adapter)"
fi

say "5. cameras: rules of librealsense, of the release that pyrealsense2 has"
say "  \$ release=\$($venv/bin/pip show pyrealsense2 | sed -n 's/^Version: \([0-9]*\.[0-9]*\.[0-9]*\).*/\1/p')"
say "  \$ curl -fLO https://raw.githubusercontent.com/realsenseai/librealsense/v\$release/config/99-realsense-libusb.rules"
say "  read them, then"
say "  \$ sudo install -m 644 99-realsense-libusb.rules /etc/udev/rules.d/"
say "  \$ sudo udevadm control --reload-rules && sudo udevadm trigger"

say "6. not done here, as it changes how the machine runs or may restart it:"
say "  \$ sudo nvpmodel -q; sudo nvpmodel -m ID      power mode; the default costs up to 4x"
say "  \$ sudo jetson_clocks                          hold the clocks; after each start"
say "  \$ sudo ip link set can_left type can bitrate 1000000 restart-ms 100"
say "  \$ sudo ip link set can_left txqueuelen 64 up"
say "  or for good, for each arm (docs/jetson.md, CAN adapter):"
say "  \$ sudo install -m 644 $here/scripts/gwp-can@.service /etc/systemd/system/"
say "  \$ sudo systemctl daemon-reload && sudo systemctl enable --now gwp-can@can_left.service"
say "  swap on NVMe, if a build is refused for memory (docs/jetson.md, swap)"

say "7. check: $venv/bin/gwp-edge doctor"
if ((apply)); then say "log out and in, so that the limits of step 3 hold"; fi
