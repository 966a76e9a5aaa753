#!/usr/bin/env bash
# Install the wheel and nothing of torch into a clean environment for each Python and run the
# runtime's tests (everything not marked export) from a copy outside of the checkout, so that the
# wheel is what is tested.
# Usage: scripts/test-all-pythons.sh DIST_DIR BUNDLES_DIR VERSION...   (from the project's root)
set -euo pipefail

dist="$1" bundles="$2"
shift 2
root="$PWD"
export GWP_TEST_BUNDLES="$root/$bundles"
wheel="$(ls "$root/$dist"/gwp_edge-*.whl)"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

find_version() { # the interpreter of one version: pyenv's, one on PATH, or uv's
    local candidate
    for candidate in "$HOME/.pyenv/versions/$1".*/bin/python "python$1"; do
        if "$candidate" -c "import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" \
            >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    if command -v uv >/dev/null; then uv python find "$1" 2>/dev/null; fi
}

mkdir -p "$scratch/work"
cp -r "$root/tests" "$root/examples" "$root/docs" "$root/pyproject.toml" "$scratch/work/"
cp "$root/constraints.txt" "$scratch/"
# What a wheel is tested with comes from the dev extra, less the tools that only read sources.
cat >"$scratch/tools.txt" <<'TXT'
hypothesis
psutil
pytest
pytest-randomly
TXT

results=() failed=0
for version in "$@"; do
    printf '\n== Python %s\n' "$version"
    python="$(find_version "$version")"
    if [ -z "$python" ]; then
        echo "no Python $version here: install it (pyenv install $version, or uv python install $version)"
        results+=("Python $version: not found") failed=1
        continue
    fi
    env="$scratch/env-$version"
    "$python" -m venv "$env"
    pip=("$env/bin/python" -m pip --disable-pip-version-check install -qq -c "$scratch/constraints.txt")
    "${pip[@]}" "$wheel" -r "$scratch/tools.txt"
    for extra in sim piper realsense recorded; do
        # Not every vendor ships a wheel for every Python; the tests that need it then skip.
        "${pip[@]}" --only-binary :all: "$wheel[$extra]" 2>"$scratch/log" \
            || echo "no wheels for the extra $extra on Python $version: $(tail -n 1 "$scratch/log")"
    done
    cd "$scratch/work"
    "$env/bin/python" - <<'PY'
import importlib.util
import gwp_edge

assert "site-packages" in gwp_edge.__file__, gwp_edge.__file__
heavy = [name for name in ("torch", "onnx", "transformers") if importlib.util.find_spec(name)]
assert not heavy, f"the runtime's installation brought {heavy}"
PY
    status=0
    "$env/bin/python" -m pytest -q -m 'not export' -p no:cacheprovider tests || status=$?
    cd "$root"
    if [ "$status" -eq 0 ]; then
        results+=("Python $version: passed ($("$env/bin/python" -V 2>&1))")
    else
        results+=("Python $version: FAILED (pytest exit code $status)") failed=1
    fi
    rm -rf "$env"
done

printf '\n== Summary\n'
printf '%s\n' "${results[@]}"
exit "$failed"
