#!/usr/bin/env bash
# The GPU suite on a machine with a card: see README.md beside this file. What follows the command goes to pytest.
set -uo pipefail
cd "$(dirname "$0")/../.."
export OUT="${OUT:-$PWD/gpu-out}" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 PYTHONUNBUFFERED=1
mkdir -p "$OUT"
if [ "${SMALL:-}" != 1 ]; then
  site=$(mktemp -d)
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl || exit 3
  cp -r rlhf_recipes "$site" && cp -r recipes conf "$site/rlhf_recipes" || exit 3
  export PYTHONPATH="$site" PYTHONDONTWRITEBYTECODE=1
fi
python3 -m pytest tests/gpu -m gpu -p no:cacheprovider --durations=0 --junitxml="$OUT/gpu.xml" "$@" 2>&1 | tee "$OUT/log"
