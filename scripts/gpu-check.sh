#!/usr/bin/env bash
# Checks the CUDA side on a machine that has a GPU and CUDA but needs neither Rust nor a network.
#
#   scripts/gpu-check.sh build FILE   where Rust is: packs stripped test and example binaries
#   scripts/gpu-check.sh run FILE     where the GPU is: runs them and prints one summary table
#
# FILE is a .tar.xz of about 10 MB. Run both from the root of the repository; the tests read their
# data from there.
set -uo pipefail

usage() { sed -n '2,8p' "$0" | cut -c3-; exit 2; }
[ $# -eq 2 ] || usage
file=$2
tests="batch_norm_op batch_norm_edge batch_norm_layer models pytorch"

build() {
  set -e
  local dir messages
  dir=$(mktemp -d)
  messages=$(mktemp)
  trap "rm -rf '$dir' '$messages'" EXIT
  scripts/cuda-toolkit.sh cargo test --release --features cuda --tests --no-run \
    --message-format=json >"$messages"
  scripts/cuda-toolkit.sh cargo build --release --features cuda --example mnist_compare
  python3 - "$messages" <<'PY' | while read -r name path; do
import json, sys
for line in open(sys.argv[1]):
    message = json.loads(line)
    if message.get("executable") and message["target"]["kind"] == ["test"]:
        print(message["target"]["name"], message["executable"])
PY
    case " $tests " in *" $name "*) strip -o "$dir/$name" "$path" ;; esac
  done
  strip -o "$dir/mnist_compare" target/release/examples/mnist_compare
  # Each binary carries all of candle's kernels; the large dictionary packs them once.
  mkdir -p "$(dirname "$file")"
  tar -cf - -C "$dir" . | xz --lzma2=preset=3,dict=128MiB >"$file"
  ls -l "$file"
}

run() {
  local failed=0 summary="" start log status name dir
  dir=$(mktemp -d)
  trap "rm -rf '$dir'" EXIT
  tar -xJf "$file" -C "$dir" 2>/dev/null || python3 -m tarfile -e "$file" "$dir" || exit 1
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
  for name in $tests mnist_compare; do
    start=$SECONDS
    log=$(mktemp)
    if [ "$name" = mnist_compare ]; then
      "$dir/$name" --device cuda --data drawn --epochs 3 --quiet --target-acc 95 \
        --out "$dir/out" >"$log" 2>&1
    else
      "$dir/$name" --nocapture --test-threads 4 >"$log" 2>&1
    fi
    status=$?
    # A test binary that found no device has passed nothing on CUDA.
    if [ $status -ne 0 ]; then
      status="FAILED ($status)"
    elif grep -q "not run on CUDA" "$log"; then
      status="NO CUDA DEVICE"
    else
      status=passed
    fi
    [ "$status" = passed ] || { failed=1; tail -n 40 "$log"; }
    [ "$name" = mnist_compare ] && grep -E 'accuracy|time per epoch' "$log"
    summary+=$(printf '%-20s %-16s %4d s  %s' "$name" "$status" $((SECONDS - start)) \
      "$(grep -oE '[0-9]+ passed; [0-9]+ failed' "$log" | tail -n 1)")$'\n'
    rm -f "$log"
  done
  printf '\n%s' "$summary"
  return $failed
}

case $1 in
  build) build ;;
  run) run ;;
  *) usage ;;
esac
