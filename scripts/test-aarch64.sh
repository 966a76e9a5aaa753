#!/usr/bin/env bash
# Run the runtime's tests on an emulated aarch64 Debian: ARM kernels round differently.
# Needs root and a Debian or Ubuntu host. The file system is kept in build/aarch64 for the next run.
# Its packages are unpacked, not configured: Python, the C library and what the wheels link to.
# Usage: scripts/test-aarch64.sh PYTHON BUNDLES_DIR [pytest arguments]   (from the project's root)
#   PYTHON builds the wheel, with the cross compiler that is installed where it is missing
#   GWP_AARCH64_TESTS="tests/parity tests/contract"    only these files and folders; all where unset
set -euo pipefail

python="$1" bundles="$2"
shift 2
read -r -a tests <<<"${GWP_AARCH64_TESTS:-}"
for test in "${tests[@]}"; do
    # Before the minutes of set-up, not after them.
    [ -e "${test%%::*}" ] || { echo "test-aarch64: GWP_AARCH64_TESTS: no $test here" >&2; exit 1; }
done
root="$PWD/build/aarch64/root"
python_version=3.11 # of Debian 12
site="$root/usr/local/lib/python$python_version/dist-packages"

if [ "$(id -u)" -ne 0 ]; then
    echo "test-aarch64: needs root for chroot and mounts; run: sudo make test-aarch64" >&2
    exit 1
fi
if ! command -v debootstrap qemu-aarch64-static >/dev/null; then
    echo 'setup: installing debootstrap and qemu-user-static'
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends debootstrap qemu-user-static >/dev/null
fi
if ! command -v aarch64-linux-gnu-gcc >/dev/null; then
    echo 'setup: installing gcc-aarch64-linux-gnu'
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends gcc-aarch64-linux-gnu libc6-dev-arm64-cross >/dev/null
fi
"$python" scripts/build_wheel.py build/dist-aarch64 aarch64
wheel="$(ls "$PWD"/build/dist-aarch64/gwp_edge-*.whl)"

# The kernel starts aarch64 programs through qemu; F keeps qemu open, so the chroot needs no copy.
binfmt=/proc/sys/fs/binfmt_misc
[ -e "$binfmt/register" ] || mount -t binfmt_misc binfmt_misc "$binfmt"
if [ ! -e "$binfmt/qemu-aarch64" ]; then
    magic='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
    mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
    printf '%s' ":qemu-aarch64:M::$magic:$mask:$(command -v qemu-aarch64-static):F" >"$binfmt/register"
    trap 'echo -1 >"$binfmt/qemu-aarch64"' EXIT
fi

if [ ! -e "$root/.unpacked" ]; then
    echo 'test-aarch64: fetching Debian 12 for arm64'
    rm -rf "$root"
    mkdir -p "$root"
    debootstrap --arch=arm64 --variant=minbase --foreign \
        --include=python3,libstdc++6,libgomp1,iproute2 bookworm "$root" >"$root/../debootstrap.log" 2>&1 \
        || { tail -n 5 "$root/../debootstrap.log" >&2; exit 1; }
    for package in "$root"/var/cache/apt/archives/*.deb; do
        dpkg-deb --extract "$package" "$root"
    done
    ln -sf "python$python_version" "$root/usr/bin/python3"
    echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
    echo '127.0.0.1 localhost' >"$root/etc/hosts"
    touch "$root/.unpacked"
fi

# A clean environment, so that pip does not compare with what the host has installed.
pip_env="$root/../pip-env"
[ -x "$pip_env/bin/python" ] || "$(scripts/find-python.sh "python$python_version")" -m venv "$pip_env"
platforms=()
for minor in $(seq 36 -1 17); do platforms+=(--platform "manylinux_2_${minor}_aarch64"); done
echo 'test-aarch64: installing aarch64 wheels'
rm -rf "$site"
"$pip_env/bin/python" -m pip --disable-pip-version-check install -qq --target "$site" --no-compile \
    --only-binary :all: --implementation cp --python-version "$python_version" \
    "${platforms[@]}" --platform manylinux2014_aarch64 --platform linux_aarch64 -c constraints.txt \
    "$wheel[piper]" hypothesis psutil pytest pytest-randomly

rm -rf "$root/work"
mkdir -p "$root/work"
cp -r tests examples docs pyproject.toml "$bundles" "$root/work/"

# No /sys: the processor library inside ONNX Runtime ends in a segmentation fault when /sys lists the
# host's processors and /proc/cpuinfo describes x86 ones; without /sys it goes on with a warning.
# qemu-user has no SO_TIMESTAMPING, and is too slow for two arms at 200 Hz: not the CPU under test.
too_slow='not test_socketcan'
for name in two_arms_in_other_processes killed_main_process_leaves_arms whole_benchmark_measures trace_of_stories; do
    too_slow+=" and not test_$name"
done
# Mounts live in a namespace of their own and are gone when it ends, whatever happens.
# shellcheck disable=SC2016
GWP_ROOT="$root" GWP_BUNDLES="/work/$(basename "$bundles")" GWP_TOO_SLOW="$too_slow" unshare --mount --pid --fork bash -euc '
    mount -t proc proc "$GWP_ROOT/proc"
    mount -t tmpfs tmpfs "$GWP_ROOT/tmp"
    mount -t tmpfs -o mode=755 tmpfs "$GWP_ROOT/dev"
    for device in null zero full random urandom tty; do
        touch "$GWP_ROOT/dev/$device"
        mount --bind "/dev/$device" "$GWP_ROOT/dev/$device"
    done
    ln -s /proc/self/fd "$GWP_ROOT/dev/fd"
    mkdir "$GWP_ROOT/dev/shm"
    mount -t tmpfs tmpfs "$GWP_ROOT/dev/shm"
    mkdir "$GWP_ROOT/dev/pts"
    mount -t devpts -o newinstance,ptmxmode=0666 devpts "$GWP_ROOT/dev/pts"
    ln -s pts/ptmx "$GWP_ROOT/dev/ptmx"
    run() {
        chroot "$GWP_ROOT" /usr/bin/env -i HOME=/root PATH=/usr/bin:/bin:/usr/sbin:/sbin LANG=C.UTF-8 \
            GWP_TEST_BUNDLES="$GWP_BUNDLES" sh -c "cd /work && exec \"\$0\" \"\$@\"" "$@"
    }
    run python3 -c "import platform, onnxruntime, gwp_edge as g; print(
        platform.machine(), platform.python_version(), \"onnxruntime\", onnxruntime.__version__, g.__file__)"
    run python3 -m pytest -q -m "not export and not sim" -p no:cacheprovider \
        -k "$GWP_TOO_SLOW" "$@"
' test-aarch64 "${tests[@]}" "$@"
