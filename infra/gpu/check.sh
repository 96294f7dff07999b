#!/usr/bin/env bash
# Check and measure everything that needs a GPU, in one command of at most eight minutes; see check.py beside it.
#
#   infra/gpu/check.sh [--out FOLDER] [--only SECTION ...] [--dry-run]
#
# PYTHON  the interpreter; default: that of the checkout's .venv, else python3. It needs torch.
# WHEELS  a folder of wheels from which packages that are missing are installed; default: the configured index.
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
python="${PYTHON:-}"
if [ -z "$python" ]; then
  python="$root/.venv/bin/python"
  [ -x "$python" ] || python=python3
fi
"$python" -c 'import torch' || { echo "$python has no torch: install it, or set PYTHON" >&2; exit 2; }
# a bare machine has torch and numpy; what the sections import besides goes into an environment that ends with them
missing=()
for name in beartype h5py jaxtyping numpy pytest pytest-timeout safetensors scipy; do
  "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('${name//-/_}') is None)" || missing+=("$name")
done
if [ "${#missing[@]}" -gt 0 ]; then
  packages="$(mktemp -d)"
  trap 'rm -rf "$packages"' EXIT
  from=()
  [ -z "${WHEELS:-}" ] || from=(--no-index --find-links "$WHEELS")
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$packages" \
    ${from[@]+"${from[@]}"} -c "$root/constraints.txt" "${missing[@]}" \
    || echo "not installed: ${missing[*]}; sections that need them are skipped" >&2
  export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" "$root/infra/gpu/check.py" "$@"
