#!/usr/bin/env bash
# Everything that only a GPU can tell: GPU tests, memory and speed beside their prediction, speed rows.
#
#     OUT=some/folder scripts/measure_gpu.sh
#
# Each part has its own time and goes on after another one failed; it ends with 1 if any did. Run it again to go on.
# OUT is where results go (default: benchmarks/measured), PYTHON what runs them (default: python).
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/measured}
PYTHON=${PYTHON:-python}
mkdir -p "$OUT"
failed=0

part() { # seconds, name, command...
    local seconds=$1 name=$2
    shift 2
    echo "== $name: $*"
    timeout "$seconds" "$@" 2>&1 | tee "$OUT/$name.log"
    local code=${PIPESTATUS[0]}
    echo "== $name: exit $code"
    [ "$code" = 0 ] || failed=1
}

part 600 tests "$PYTHON" -m pytest -q -m gpu -n0 tests
part 600 memory_and_speed "$PYTHON" scripts/measure_device.py --output "$OUT"
part 120 memory_predicted "$PYTHON" scripts/bench_memory.py cuda
part 600 step_gpt "$PYTHON" scripts/bench_step.py recipes/gpt2_124m.yaml data.source=embedded train.micro_batch_size=16 \
    train.global_batch_size=16 --steps 20 --rounds 2 --output "$OUT/step_gpt.json"
part 600 step_bert "$PYTHON" scripts/bench_step.py recipes/bert_large.yaml data.source=embedded train.micro_batch_size=32 \
    train.global_batch_size=32 --steps 20 --rounds 2 --output "$OUT/step_bert.json"
exit "$failed"
