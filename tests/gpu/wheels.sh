#!/usr/bin/env bash
# Fill .whl/ for run.sh: what a machine with torch 2.11, pandas, pyarrow, scipy and matplotlib lacks, for Python 3.12,
# and TRL 1.12, the last with a PPO trainer, to compare with.
set -euo pipefail
cd "$(dirname "$0")/../.."
names="accelerate bitsandbytes datasets dill fsspec gguf huggingface_hub hydra-core krippendorff multiprocess omegaconf
  peft safetensors tokenizers transformers trl xxhash httpcore2 httpx2 truststore"
wanted=()
for name in $names; do wanted+=("$(grep -iE "^$name==" constraints.txt || echo "$name")"); done
platforms=()
for glibc in 39 35 34 31 28 27 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
fetch() {
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 "$@"
}
rm -rf .whl
fetch -d .whl "${wanted[@]}"
fetch -d .whl/anchor trl==1.12.0
python3 -m pip wheel -q --no-deps -w .whl "$(grep '^antlr4-python3-runtime==' constraints.txt)"
# bitsandbytes carries a library for every CUDA and ROCm: CUDA 13's and the CPU's are kept.
python3 - <<'P'
import os
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

(whole,) = Path(".whl").glob("bitsandbytes-*.whl")
small = whole.with_suffix(".small")
with ZipFile(whole) as old, ZipFile(small, "w", ZIP_DEFLATED) as new:
    for name in old.namelist():
        if not name.endswith(".so") or "cuda130" in name or "_cpu" in name:
            new.writestr(name, old.read(name))
os.replace(small, whole)
P
du -sh .whl
test "$(du -sm .whl | cut -f1)" -lt 64 || { echo "error: .whl: over 64 MiB. Leave something out." >&2; exit 2; }
