#!/usr/bin/env bash
# Runs the CUDA kernels on the CPU (emulator/README.md): the tests of the emulator as they are, then
# with the kernels under gcc's address, undefined-behaviour and thread sanitizers. No GPU is needed;
# the headers of a CUDA toolkit come from scripts/cuda-toolkit.sh. Prints one line for each step.
#
#   scripts/emulate-kernels.sh           all steps
#   scripts/emulate-kernels.sh thread    one of plain, address, undefined, thread
set -euo pipefail
cd "$(dirname "$0")/.."
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# step NAME COMMAND...
step() {
  local start=$SECONDS
  if "${@:2}" >"$log" 2>&1; then
    printf '%-10s ok (%ds, %d tests)\n' "$1" $((SECONDS - start)) "$(grep -c '^test .* ok$' "$log")"
  else
    printf '%-10s FAILED (%ds)\n' "$1" $((SECONDS - start))
    tail -n 60 "$log"
    exit 1
  fi
}

# Each sanitizer has its own target directory, so that none is compiled again for another.
sanitized() {
  KERNEL_SANITIZER=$1 CARGO_TARGET_DIR=target/emulator-$1 \
    scripts/cuda-toolkit.sh cargo test --locked -p kernel-emulator --tests "${@:2}"
}

for name in "${@:-plain address undefined thread}"; do
  for name in $name; do
    case $name in
      plain) step plain scripts/cuda-toolkit.sh cargo test --locked -p kernel-emulator ;;
      # One at a time: fibres cost the thread sanitizer a lot of memory.
      thread) step thread sanitized thread -- --test-threads=1 ;;
      address | undefined) step "$name" sanitized "$name" ;;
      *) sed -n '2,8p' "$0" | cut -c3-; exit 2 ;;
    esac
  done
done
