#!/usr/bin/env bash
# Everything that only a GPU can tell: tests, speed and memory rows, the planner's predictions beside what is measured.
#
#     scripts/measure_gpu.sh                     start it again until it no longer ends with 75
#     scripts/measure_gpu.sh --seconds 1700      so many seconds in all (default 570, of one call)
#     scripts/measure_gpu.sh --least 5           begin a part with so many seconds left, rather than with its own least
#     scripts/measure_gpu.sh tests device        these parts alone
#     scripts/measure_gpu.sh --list              the parts, and how far they are
#     scripts/measure_gpu.sh --any-code          what other code has measured counts as done
#     OUT=/tmp/m scripts/measure_gpu.sh --seconds 560 --pack SOMEWHERE/m.tar.gz
#                                                all results in one file too, written anew after each part: where only
#                                                few files can be brought away. It is unpacked first where OUT is empty
#
# A part that is done is left out when this is started again with the same code, one that was cut goes on, one that
# failed is tried again once nothing else is left, and stops no other. Ends with 0 when all is done, with 75 when there
# is more to do, with 1 when only failures are left, with 2 without a CUDA device.
#
# PYTHON is what runs it (default: python, or python3), OUT where results go (default: benchmarks/measured/DEVICE), ROUNDS how often
# arms run in turn (default: 3), SOURCES a name of this code (default: a digest of it), COMMIT its commit where this is no
# checkout. To go on with what was measured elsewhere, copy it to OUT first. Paths are absolute, or of the repository.
# Nothing is downloaded.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$(command -v python || command -v python3 || echo python)}
BUDGET=570 LEAST_OF_ALL='' ANY_CODE='' LIST='' PACK='' WANTED=()
GRACE=10 # seconds from the end of a part's time until it is killed
while [ $# -gt 0 ]; do
    case $1 in
        --seconds) BUDGET=$2 && shift ;;
        --least) LEAST_OF_ALL=$2 && shift ;;
        --pack) PACK=$2 && shift ;;
        --any-code) ANY_CODE=yes ;;
        --list) LIST=yes ;;
        -*) echo "error: command line: $1: no such option; see the head of scripts/measure_gpu.sh" >&2 && exit 2 ;;
        *) WANTED+=("$1") ;;
    esac
    shift
done
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD:$PWD/tests/shared${PYTHONPATH:+:$PYTHONPATH}"

DEVICE=$("$PYTHON" scripts/measure_device.py --name) || exit 2
OUT=${OUT:-benchmarks/measured/$DEVICE}
SOURCES=${SOURCES:-$(find bigtrain recipes scripts tests -type f -not -name '*.pyc' | LC_ALL=C sort | tr '\n' '\0' |
    xargs -0 sha256sum | sha256sum | cut -c1-12)}
COMMIT=$(git rev-parse --short=12 HEAD 2>/dev/null || echo "${COMMIT:-unknown}")
export SOURCES COMMIT # every result says them

NAMES=()
declare -A MOST LEAST NEEDS COMMAND RESULTS

# part NAME MOST LEAST MODULES RESULTS COMMAND...: at most and at least so many seconds a call; RESULTS is a pattern of
# the files in OUT that it goes on from; {left} in the command stands for the seconds that it has.
part() {
    NAMES+=("$1")
    MOST[$1]=$2 LEAST[$1]=${LEAST_OF_ALL:-$3} NEEDS[$1]=$4 RESULTS[$1]=$5 COMMAND[$1]=$(printf '%q ' "${@:6}")
}

BASE='torch numpy pydantic yaml rich'

ARMS='hf hf-compile plain hf-deepspeed'
ROUNDS=${ROUNDS:-3}

speed() { # NAME MOST LEAST ROUNDS STEPS WORK ARM... OPTION...
    part "$1" "$2" "$3" "$BASE" "speed/$1.jsonl" "$PYTHON" scripts/bench_against.py --work "$6" --rounds "$4" \
        --steps "$5" --timeout 400 --output "$OUT/speed/$1.jsonl" --arms bigtrain "${@:7}"
}

profile() { # NAME RECIPE ROWS
    local to="$OUT/profile/$1"
    part "$1" 300 60 "$BASE tokenizers" "profile/$1.*" bash -c '"${@:2}" >"$1.new" && mv "$1.new" "$1"' profile \
        "$to.json" "$PYTHON" -m bigtrain profile "$2" --time --json --html "$to.html" data.source=embedded \
        data.subset=null train.micro_batch_size="$3" train.global_batch_size="$3"
}

# Those that tell most come first: whether it is right, how fast it is, what others do beside it.
FIRST='tests/test_same_run.py tests/test_on_devices.py tests/test_steps_on_devices.py'
REST=$(grep -rlE 'mark\.gpu|ON_DEVICES' tests --include='test_*.py' | grep -vE 'test_(same_run|.*on_devices)\.py' |
    LC_ALL=C sort | tr '\n' ' ')
# shellcheck disable=SC2086
part tests 300 60 "$BASE pytest pytest_timeout hypothesis tokenizers transformers" 'tests/passed' "$PYTHON" -m pytest \
    -q -m gpu -p passed_before -p no:cacheprovider -o addopts=--import-mode=importlib -o timeout=120 \
    --continue-on-collection-errors --passed-before "$OUT/tests/passed" $FIRST $REST
speed ours-bert-large-512 200 60 1 15 bert-large-512
part memory 300 40 "$BASE" 'memory/rows.json' "$PYTHON" scripts/bench_memory.py cuda --output "$OUT/memory/rows.json"
speed ours-bert-large-128 200 60 1 15 bert-large-128
speed ours-gpt2-124m 200 60 1 15 gpt2-124m
speed ours-gpt2-xl 250 90 1 8 gpt2-xl
speed ours-llama-7b 400 150 1 5 llama-7b
speed bert-large-512-documents 580 100 "$ROUNDS" 15 bert-large-512 hf plain --mode documents --mean-length 256
speed bert-large-512-best 580 300 1 15 bert-large-512 --micro-batch best
# shellcheck disable=SC2086
{
    speed bert-large-512 580 100 "$ROUNDS" 15 bert-large-512 $ARMS
    speed bert-large-128 580 100 "$ROUNDS" 15 bert-large-128 $ARMS
    speed gpt2-124m 580 100 "$ROUNDS" 15 gpt2-124m $ARMS
}
profile profile-bert bert_large 64
profile profile-gpt gpt2_124m 32
part device 580 40 "$BASE" '*.json' "$PYTHON" scripts/measure_device.py --output "$OUT" --seconds '{left}'
# shellcheck disable=SC2086
{
    speed gpt2-xl 580 200 "$ROUNDS" 8 gpt2-xl $ARMS
    speed llama-7b 580 300 "$ROUNDS" 5 llama-7b $ARMS
}

for name in "${WANTED[@]}"; do
    [[ " ${NAMES[*]} " == *" $name "* ]] || { echo "error: command line: $name: none of ${NAMES[*]}" >&2 && exit 2; }
done
if [ -f "$PACK" ] && [ -z "$(ls -A "$OUT" 2>/dev/null)" ]; then
    { mkdir -p "$OUT" && tar -xzf "$PACK" -C "$OUT"; } || exit 2
fi
mkdir -p "$OUT/parts" "$OUT/logs" "$OUT/speed" "$OUT/tests" "$OUT/memory" "$OUT/profile" || exit 2

# One line a part in OUT/parts/NAME: state, exit code, seconds of all calls, digest of the sources, commit.
state_of() {
    local state code spent sources commit
    read -r state code spent sources commit 2>/dev/null <"$OUT/parts/$1" || state=missing
    if [ "$state" != missing ] && [ -z "$ANY_CODE" ] && [ "$sources" != "$SOURCES" ]; then
        state=outdated
    fi
    echo "$state"
}

field_of() { # NAME NUMBER
    [ -f "$OUT/parts/$1" ] && cut -d' ' -f"$2" "$OUT/parts/$1" || echo 0
}

is_wanted() {
    [ ${#WANTED[@]} = 0 ] || [[ " ${WANTED[*]} " == *" $1 "* ]]
}

lacking() { # MODULES: those that this Python has not
    "$PYTHON" -c 'import sys; from importlib.util import find_spec
print(*(name for name in sys.argv[1:] if find_spec(name) is None))' $1
}

keep() { # NAME STATE EXIT SECONDS
    echo "$2 $3 $4 $SOURCES $COMMIT" >"$OUT/parts/$1.new"
    mv "$OUT/parts/$1.new" "$OUT/parts/$1"
}

pack() { # all of OUT into one file, which is whole at any time
    [ -z "$PACK" ] && return
    { tar -czf "$PACK.new" -C "$OUT" . && mv "$PACK.new" "$PACK"; } || echo "error: $PACK: could not be written" >&2
}

set_aside() { # NAME: what other code has measured, which would be gone on from
    local aside file
    aside=$OUT/earlier/$(field_of "$1" 4)
    mkdir -p "$aside"
    for file in "$OUT"/${RESULTS[$1]} "$OUT/logs/$1.log"; do
        [ -f "$file" ] && mv "$file" "$aside/"
    done
    rm "$OUT/parts/$1"
}

run_part() { # NAME
    local name=$1 left=$((BUDGET - SECONDS)) begin=$SECONDS before limit lacks state code command
    [ "$(state_of "$name")" = outdated ] && set_aside "$name"
    before=$(field_of "$name" 3)
    limit=$((left < MOST[$name] ? left : MOST[$name]))
    lacks=$(lacking "${NEEDS[$name]}")
    if [ -n "$lacks" ]; then
        echo "lacks $lacks: not run by $PYTHON" | tee -a "$OUT/logs/$name.log"
        keep "$name" failed 127 "$before"
        return
    fi
    command=${COMMAND[$name]//\\\{left\\\}/$((limit - 2))}
    echo "== $name, at most $limit s: $command"
    keep "$name" cut 0 "$before" # what is so if all this is killed
    eval "timeout --kill-after=$GRACE $limit $command" 2>&1 | tee -a "$OUT/logs/$name.log"
    code=${PIPESTATUS[0]}
    case $code in 0) state=done ;; 75 | 124 | 137) state=cut ;; *) state=failed ;; esac
    keep "$name" "$state" "$code" $((before + SECONDS - begin))
    [ "$state" = cut ] && [ $((SECONDS - begin)) -lt "${LEAST[$name]}" ] && WAITING+=" $name"
    echo "== $name: $state, exit $code"
}

run_those() { # STATE...: once each wanted part in one of these states, while there is time; fails if there was none
    local name ran=1
    for name in "${NAMES[@]}"; do
        is_wanted "$name" && [[ " $* " == *" $(state_of "$name") "* ]] || continue
        [ $((BUDGET - SECONDS)) -ge "${LEAST[$name]}" ] && [[ " $WAITING " != *" $name "* ]] || continue
        ran=0
        run_part "$name"
        pack
    done
    return $ran
}

summary() {
    local name state rest
    printf '%-24s %-9s %5s %8s  %s\n' part state exit seconds missing
    for name in "${NAMES[@]}"; do
        is_wanted "$name" || continue
        state=$(state_of "$name") rest=''
        case $state in
            missing) rest='all of it' ;;
            outdated) rest='all of it: measured with other code' ;;
            cut) rest='the rest: start again to go on' ;;
            failed) rest="see $OUT/logs/$name.log: $(tail -n 1 "$OUT/logs/$name.log" 2>/dev/null | cut -c1-100)" ;;
        esac
        printf '%-24s %-9s %5s %8s  %s\n' "$name" "$state" "$(field_of "$name" 2)" "$(field_of "$name" 3)" "$rest"
    done
    echo "$DEVICE, commit $COMMIT, sources $SOURCES"
}

if [ -z "$LIST" ]; then
    FAILED='' WAITING='' # of this call: failed before it; ended at once with more to do
    for name in "${NAMES[@]}"; do
        [ "$(state_of "$name")" = failed ] && FAILED+=" $name"
    done
    while run_those missing outdated cut; do :; done
    for name in $FAILED; do
        is_wanted "$name" && [ $((BUDGET - SECONDS)) -ge "${LEAST[$name]}" ] && run_part "$name" && pack
    done
fi
summary | tee "$OUT/summary.txt"
pack
code=0
for name in "${NAMES[@]}"; do
    is_wanted "$name" || continue
    case $(state_of "$name") in
        done) ;;
        failed) [ $code = 75 ] || code=1 ;;
        *) code=75 ;;
    esac
done
exit $code
