#!/usr/bin/env bash
# A CUDA toolkit for a machine without one: enough to build with `--features cuda`, not to run on a GPU.
#
#   scripts/cuda-toolkit.sh cargo clippy --features cuda    runs a command with the toolkit
#   eval "$(scripts/cuda-toolkit.sh)"                       sets the environment of this shell
#
# An installed toolkit (nvcc in $CUDA_HOME/bin or on the PATH) is used as it is. Otherwise nvcc and
# the libraries come as Python packages into target/cuda-toolkit, once; needs python3 with pip, gcc
# and cargo. What only a driver or a very large package would bring (libcuda, libcublas) is replaced
# by stubs to link against: they have the right names and symbols, and every call fails. A binary
# linked this way runs where the real libraries are.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
toolkit=$root/target/cuda-toolkit
packages=(
  nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88
  nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
  nvidia-curand==10.4.0.35 nvidia-cuda-nvrtc==13.0.88
  nvidia-cuda-nvdisasm==13.2.51 # for scripts/check-kernels.py; there is no 13.0
)
stamp="${packages[*]} stubs-1"

say() { echo "cuda-toolkit: $*" >&2; }
need() {
  command -v "$1" >/dev/null || { say "needs $1, which is not on the PATH"; exit 1; }
}

# Shared libraries whose functions all return $4, named after the declarations in cudarc's bindings:
# stub NAME SONAME BINDINGS STATUS
stub() {
  grep -ohE '^ +fn [a-zA-Z0-9_]+' "$3" | awk '{print $2}' | sort -u |
    sed "s/.*/int &(void) { return $4; }/" >"$toolkit/lib/$1.c"
  gcc -shared -fPIC -w -fno-builtin -Wl,-soname,"$2" -o "$toolkit/lib/lib$1.so" "$toolkit/lib/$1.c"
  ln -sf "lib$1.so" "$toolkit/lib/$2"
}

install() {
  need python3; need gcc; need cargo
  say "downloading nvcc and libraries into target/cuda-toolkit"
  rm -rf "$toolkit"
  mkdir -p "$toolkit/lib"
  # By its own path: a version manager's wrapper of python3 does more after an install, and may fail.
  local python
  python=$(python3 -c 'import sys; print(sys.executable)')
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --root-user-action=ignore \
    --target "$toolkit/python" "${packages[@]}" </dev/null >&2
  local cu=$toolkit/python/nvidia/cu13 name cudarc
  for name in curand:10 nvrtc:13 cudart:13; do # real ones, which lack their unversioned names
    ln -s "$cu/lib/lib${name%:*}.so.${name#*:}" "$toolkit/lib/lib${name%:*}.so"
  done
  cudarc=$(cd "$root" && cargo metadata --format-version 1 --locked --features cuda </dev/null |
    python3 -c 'import json, os, sys
packages = json.load(sys.stdin)["packages"]
print(next(os.path.dirname(p["manifest_path"]) for p in packages if p["name"] == "cudarc"))')
  stub cuda libcuda.so.1 "$cudarc/src/driver/sys/mod.rs" 100 # CUDA_ERROR_NO_DEVICE
  stub cublas libcublas.so.13 "$cudarc/src/cublas/sys/mod.rs" 1 # CUBLAS_STATUS_NOT_INITIALIZED
  stub cublasLt libcublasLt.so.13 "$cudarc/src/cublaslt/sys/mod.rs" 1
  echo "$stamp" >"$toolkit/stamp"
}

if [ -n "${CUDA_HOME:-}" ] && [ -x "$CUDA_HOME/bin/nvcc" ]; then
  home=$CUDA_HOME
elif command -v nvcc >/dev/null; then
  home=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
else
  [ "$(cat "$toolkit/stamp" 2>/dev/null)" = "$stamp" ] || install
  home=$toolkit/python/nvidia/cu13
  export LIBRARY_PATH=$toolkit/lib${LIBRARY_PATH:+:$LIBRARY_PATH}
fi
export CUDA_HOME=$home CUDA_PATH=$home PATH=$home/bin:$PATH
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-80} # or candle asks nvidia-smi, which is not there

if [ $# -gt 0 ]; then
  exec "$@"
fi
for variable in CUDA_HOME CUDA_PATH PATH CUDA_COMPUTE_CAP LIBRARY_PATH; do
  [ -z "${!variable:-}" ] || printf 'export %s=%q\n' "$variable" "${!variable}"
done
