#!/usr/bin/env bash
# Export the reference checkpoints into DIR, for machines that have no torch: the tests there read
# them through GWP_TEST_BUNDLES (tests/parity/test_given_bundles.py).
# Usage: scripts/make-test-bundles.sh GWP_EDGE DIR
set -euo pipefail

gwp_edge="$1"
out="$2"
mkdir -p "$out"
bundle() { # NAME FAMILY [FLAG...]
    local name="$1" family="$2"
    shift 2
    rm -rf "${out:?}/$name.gwp"
    echo "bundle: $name"
    "$gwp_edge" export "tests/data/reference/$family/checkpoint" --out "$out/$name.gwp" "$@" >/dev/null
}
bundle gwp05-exact gwp05 --timesteps exact
bundle gwp0-exact gwp0 --timesteps exact
bundle gwp05-fp16 gwp05 --precision fp16
calibrated=(--calibration tests/data/dataset --samples 8 --observer minmax --no-smoothing --no-budget)
bundle gwp05-int8 gwp05 --precision int8 "${calibrated[@]}"
bundle gwp0-int8 gwp0 --precision int8 "${calibrated[@]}"
bundle gwp05-fp8 gwp05 --precision fp8 "${calibrated[@]}"
# TensorRT takes whole int4 blocks only, so here the target decides which layers have them.
bundle gwp05-w4 gwp05 --precision w4 --target orin "${calibrated[@]}"
bundle gwp0-w8 gwp0 --precision w8 --no-budget
