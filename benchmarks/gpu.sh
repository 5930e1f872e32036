#!/usr/bin/env bash
# The bench of all models on a GPU, some twenty minutes: bash benchmarks/gpu.sh [FOLDER FOR THE JSON FILES]
# A name or more as GPU_BENCHES choose: GPU_BENCHES="sd15 tiny" bash benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
folder="${1:-benchmarks}"
failed=0

bench() {
    local name="$1"
    shift
    case " ${GPU_BENCHES:-sd15 sd15-exact sd15-checkpointing tiny sdxl} " in
        *" $name "*) python3 benchmarks/bench.py --device cuda "$@" --json "$folder/gpu-$name.json" || failed=1 ;;
    esac
}

sd15=(--model sd15 --resolution 512 --num-images 16 --num-inference-steps 50)
sixteen=(--sample-batch-size 16 --micro-batch-size 16)
bench sd15 "${sd15[@]}" "${sixteen[@]}" --repeats 2
bench sd15-exact "${sd15[@]}" "${sixteen[@]}" --ours-alone
bench sd15-checkpointing "${sd15[@]}" --ours-alone --gradient-checkpointing
bench tiny --model tiny
bench sdxl --model sdxl --resolution 1024 --num-images 4 --num-inference-steps 10 --repeats 1
exit "$failed"
