#!/usr/bin/env bash
# The GLUE grid on one GPU inside a time budget, without a network, from what pack-glue.sh packed:
#
#     bash benchmarks/gpu/glue.sh [--budget SECONDS] [--jobs N] [--only REGEX] [--updates N] [--list] [--report]
#
# Environment: PACK (.gpu-glue), WORK (build/gpu-glue), OUT (benchmarks/results/gpu-glue), PYTHON (python3),
# DEVICE (cuda or cpu).
set -euo pipefail

STARTED=$(date +%s)
export STARTED

fail() {
    echo "error: $*" >&2
    exit 1
}

PACK=$(realpath -m "${PACK:-"$(dirname "${BASH_SOURCE[0]}")/../../.gpu-glue"}")
python=${PYTHON:-python3}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
WORK=$(realpath -m "${WORK:-build/gpu-glue}")
OUT=$(realpath -m "${OUT:-benchmarks/results/gpu-glue}")
DEVICE=${DEVICE:-cuda}
export PACK WORK OUT DEVICE PYTHONPATH=$PWD
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}

case " $* " in *" --report "* | *" --list "* | *" --help "* | *" -h "*)
    exec "$python" -W ignore -m benchmarks.gpu.glue "$@"
    ;;
esac
[[ -f $PACK/pack.json ]] || fail "there is no $PACK/pack.json; run benchmarks/gpu/pack-glue.sh where the model is."
missing=$("$python" -W ignore - <<'END'
import importlib.util

names = "torch numpy transformers accelerate safetensors sklearn scipy tqdm yaml".split()
missing = [name for name in names if importlib.util.find_spec(name) is None]
if "transformers" not in missing:
    from importlib.metadata import version

    found = version("transformers")
    missing += ["transformers 5 (it has %s)" % found] if int(found.split(".")[0]) < 5 else []
print(", ".join(missing))
END
) || fail "$python does not run; set PYTHON."
[[ -z $missing ]] || fail "$python lacks $missing; install that, or set PYTHON."
if [[ $DEVICE == cuda ]]; then
    "$python" -W ignore -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        fail "torch sees no GPU here; set DEVICE=cpu to try the script without one."
fi
exec "$python" -u -W ignore -m benchmarks.gpu.glue "$@"
