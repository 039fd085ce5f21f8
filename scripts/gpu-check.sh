#!/usr/bin/env bash
# Checks the CUDA side on a machine that has a GPU and CUDA but needs neither Rust nor a network.
#
#   scripts/gpu-check.sh build FILE       where Rust is: packs test binaries, PTX and launch plans
#   scripts/gpu-check.sh run FILE [OUT]   where the GPU is: runs all, prints one summary table last
#
# FILE is a .tar.xz of about 14 MB. Run both from the root of the repository; the tests read their
# data from there. `run` goes through these steps, or those in STEPS:
#
#   tests        the tests and a short training
#   sanitizers   compute-sanitizer over the kernels on small shapes, where it is installed
#   bench        scripts/gpu_bench.py with BENCH_ARGS, where PYTHON (python3) has PyTorch
#
# Logs, tables and raw numbers are in OUT (target/gpu).
set -uo pipefail

usage() { sed -n '2,14p' "$0" | cut -c3-; exit 2; }
[ $# -eq 2 ] || { [ $# -eq 3 ] && [ "$1" = run ]; } || usage
file=$2
out=${3:-target/gpu}
tests="batch_norm_op batch_norm_edge batch_norm_layer models pytorch"
tools="memcheck racecheck initcheck"
# All layouts, with ends that are no whole vectors, and slices that one block cannot hold.
small_shapes="5,3 37,65 6,5,15,15 9,6,7,7 2,3,511 3,36,3 4,1,128,128 3,2,211,211"

build() {
  set -e
  local dir messages cargo_flags="--release --features cuda"
  dir=$(mktemp -d)
  messages=$(mktemp)
  trap "rm -rf '$dir' '$messages'" EXIT
  scripts/cuda-toolkit.sh cargo test $cargo_flags --tests --no-run --message-format=json >"$messages"
  scripts/cuda-toolkit.sh cargo build $cargo_flags --example mnist_compare
  python3 - "$messages" <<'PY' | while read -r name path; do
import json, sys
for line in open(sys.argv[1]):
    message = json.loads(line)
    if message.get("executable") and message["target"]["kind"] == ["test"]:
        print(message["target"]["name"], message["executable"])
    if message["reason"] == "build-script-executed" and "candle-batch-norm" in message["package_id"]:
        print("ptx", message["out_dir"])
PY
    case " $tests " in *" $name "*) strip -o "$dir/$name" "$path" ;; esac
    [ "$name" != ptx ] || { mkdir -p "$dir/ptx" && cp "$path"/*.ptx "$dir/ptx"; }
  done
  strip -o "$dir/mnist_compare" "${CARGO_TARGET_DIR:-target}/release/examples/mnist_compare"
  # Without the feature, for a program that is linked with CUDA does not start here.
  local plans="cargo run --quiet --example launch_plans -- --json --dtypes f32 f16 bf16"
  $plans >"$dir/plans.json"
  $plans f64 --shapes $small_shapes >"$dir/small.json"
  python3 scripts/gpu_bench.py --dry-run --all-plans --ptx "$dir/ptx" \
    --plans "$dir/plans.json" --check-plans "$dir/small.json" | tail -n 1
  # Each binary carries all of candle's kernels; the large dictionary packs them once.
  mkdir -p "$(dirname "$file")"
  tar -cf - -C "$dir" . | xz --lzma2=preset=3,dict=128MiB >"$file"
  ls -l "$file"
}

failed=0 summary=""

# report NAME STATUS SECONDS DETAILS: a line of the summary. Whatever is not there has not failed.
report() {
  summary+=$(printf '%-20s %-16s %4d s  %s' "$@")$'\n'
  case $2 in passed | absent) ;; *) failed=1 ;; esac
}

run_tests() {
  local start log status name
  for name in $tests mnist_compare; do
    start=$SECONDS
    log=$out/$name.log
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
    [ "$status" = passed ] || tail -n 40 "$log"
    [ "$name" = mnist_compare ] && grep -E 'accuracy|time per epoch' "$log"
    report "$name" "$status" $((SECONDS - start)) \
      "$(grep -oE '[0-9]+ passed; [0-9]+ failed' "$log" | tail -n 1)"
  done
}

has_torch() { "$python" -c 'import torch' 2>/dev/null; }

run_sanitizers() {
  local start log status tool sanitizer flags check
  sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer 2>/dev/null)
  if [ -z "$sanitizer" ] || ! has_torch; then
    report sanitizers absent 0 "$([ -n "$sanitizer" ] && echo no PyTorch || echo no compute-sanitizer)"
    return
  fi
  for tool in $tools; do
    start=$SECONDS
    log=$out/$tool.log
    case $tool in
      # Errors of the API are seen without it, and PyTorch expects some.
      memcheck) flags="--kernel-regex kns=bn_ --report-api-errors no" check="" ;;
      # It would lose sight of what other kernels write, if it looked at ours only.
      initcheck) flags="" check="--bare" ;;
      *) flags="--kernel-regex kns=bn_" check="" ;;
    esac
    # Each tensor gets memory of its own, so that an access beside it is seen.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 99 $flags \
      "$python" scripts/gpu_bench.py --ptx "$dir/ptx" --check-plans "$dir/small.json" --check-only \
      --no-eager --all-plans --offsets 100 --seconds 200 --dtypes "${SANITIZER_DTYPES:-f32,bf16}" $check \
      --out "$out/$tool" >"$log" 2>&1
    status=$?
    # What initcheck says of PyTorch's own kernels is not ours.
    if [ "$tool" = initcheck ] && [ $status -eq 99 ] && ! grep -q '^=====.*bn_' "$log"; then
      status=0
    fi
    if [ $status -eq 0 ]; then
      status=passed
    else
      status="FAILED ($status)"
      tail -n 40 "$log"
    fi
    report "$tool" "$status" $((SECONDS - start)) "$(grep -E '(ERROR|RACECHECK) SUMMARY' "$log" | cut -c11-)"
  done
}

run_bench() {
  local start=$SECONDS status log=$out/bench.log
  if ! has_torch; then
    report gpu_bench absent 0 "no PyTorch"
    return
  fi
  "$python" scripts/gpu_bench.py --ptx "$dir/ptx" --plans "$dir/plans.json" \
    --check-plans "$dir/small.json" --all-plans --out "$out" ${BENCH_ARGS:-} \
    2>"$out/bench.err" | tee "$log"
  status=$?
  [ $status -eq 0 ] && status=passed || { status="FAILED ($status)"; tail -n 20 "$out/bench.err"; }
  report gpu_bench "$status" $((SECONDS - start)) "$(grep 'checks of ours' "$log")"
}

run() {
  dir=$(mktemp -d)
  python=${PYTHON:-python3}
  trap "rm -rf '$dir'" EXIT
  mkdir -p "$out"
  tar -xJf "$file" -C "$dir" 2>/dev/null || python3 -m tarfile -e "$file" "$dir" || exit 1
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
  for step in ${STEPS:-tests sanitizers bench}; do
    case $step in
      tests | sanitizers | bench) "run_$step" ;;
      *) usage ;;
    esac
  done
  printf '\n%s' "$summary"
  return $failed
}

case $1 in
  build) build ;;
  run) run ;;
  *) usage ;;
esac
