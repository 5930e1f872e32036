#!/usr/bin/env bash
# What waits for a GPU, most important first, in at most 12 minutes: bash benchmarks/gpu.sh [FOLDER FOR THE JSON FILES]
# GPU_BENCHES chooses by name: GPU_BENCHES="sd15 tiny" bash benchmarks/gpu.sh compares with the textbook loop, which takes longer.
# GPU_OPTIONS are given to every command, after its own. To try the script without a GPU:
#   GPU_OPTIONS="--device cpu --model tiny --resolution 64 --num-images 4 --num-inference-steps 2" bash benchmarks/gpu.sh /tmp
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
folder="${1:-benchmarks}"
failed=0

bench() { # NAME SECONDS SCRIPT OPTIONS: a failure, or too many seconds, does not stop the others
    local name="$1" seconds="$2" script="$3"
    shift 3
    case " ${GPU_BENCHES:-sd15-exact sd15-checkpointing sd15-algorithms sdxl sd35} " in
        *" $name "*) ;;
        *) return ;;
    esac
    # shellcheck disable=SC2086 # several options
    timeout --kill-after=5 "$seconds" python3 "benchmarks/$script.py" --device cuda "$@" ${GPU_OPTIONS:-} \
        --json "$folder/gpu-$name.json" || {
        echo "$name failed or took more than $seconds s" >&2
        failed=1
    }
}

sd15=(--model sd15 --resolution 512 --num-images 16)
ppo=("${sd15[@]}" --algorithms ppo)
# Compiled, as a training is: the ratio deviation, and the memory of an update without and with checkpointing.
bench sd15-exact 180 algorithms "${ppo[@]}" --repeats 2
bench sd15-checkpointing 150 algorithms "${ppo[@]}" --repeats 1 --gradient-checkpointing
# Uncompiled, since every algorithm compiles several graphs, which would take most of the twelve minutes.
bench sd15-algorithms 150 algorithms "${sd15[@]}" --repeats 2 --no-compile
bench sdxl 110 algorithms --model sdxl --resolution 1024 --num-images 4 --num-inference-steps 10 --repeats 1 --no-compile
bench sd35 105 algorithms --model sd35 --resolution 1024 --num-images 4 --num-inference-steps 10 --repeats 1 --no-compile \
    --algorithms ppo matching
# By name only.
bench sd15 900 bench "${sd15[@]}" --num-inference-steps 50 --sample-batch-size 16 --micro-batch-size 16 --repeats 2
bench tiny 300 bench --model tiny
exit "$failed"
