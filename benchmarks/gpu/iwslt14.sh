#!/usr/bin/env bash
# The published IWSLT'14 recipe on one GPU inside a time budget, without a network, from what pack.sh packed:
#
#     bash benchmarks/gpu/iwslt14.sh [--budget SECONDS] [--jobs N] [--updates N] [CELL ...] [-- FAIRSEQ-TRAIN FLAGS]
#
# Environment: PACK (.gpu), WORK (build/gpu-iwslt14), OUT (benchmarks/results/gpu-iwslt14), PYTHON (python3),
# DEVICE (cuda or cpu), FROM_SOURCE (1: build fairseq even if its wheel loads).
set -euo pipefail

STARTED=$(date +%s)
export STARTED

fail() {
    echo "error: $*" >&2
    exit 1
}

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
pack=${PACK:-.gpu}
python=${PYTHON:-python3}
WORK=$(realpath -m "${WORK:-build/gpu-iwslt14}")
OUT=$(realpath -m "${OUT:-benchmarks/results/gpu-iwslt14}")
DEVICE=${DEVICE:-cuda}
export WORK OUT DEVICE
site=$WORK/site
[[ -d $pack/wheels && -f $pack/data-bin.tar.xz ]] ||
    fail "there is no $pack/; run benchmarks/gpu/pack.sh where there is a package registry."

install() { # install FOLDER WHEEL...
    local into=$1
    shift
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
        --upgrade --target "$into" "$@"
}

loads() { # whether fairseq's compiled parts load
    "$python" -W ignore >"$WORK/load.log" 2>&1 \
        -c 'import fairseq.data.data_utils_fast, fairseq.data.token_block_utils_fast, fairseq.libbleu'
}

stand_in() { # stand_in MODULE SUBMODULE: fairseq imports two large packages that translation never calls
    mkdir -p "$site/$1"
    printf 'def __getattr__(name):\n    if name.startswith("__"):\n        raise AttributeError(name)\n' |
        tee "$site/$1/__init__.py" >"$site/$1/$2.py"
}

export PYTHONPATH=$PWD:$site
mkdir -p "$WORK" "$OUT"
# What lies in WORK from an earlier call is used again if it came from the same pack.
packed=$(cd "$pack" && ls wheels ./*.tar.gz)
if [[ ! -f $WORK/.installed || $(<"$WORK/.installed") != "$packed" ]]; then
    rm -rf "$site"
    install "$site" "$pack"/wheels/*.whl
    "$python" -W ignore -c 'import sklearn.metrics' 2>/dev/null || stand_in sklearn metrics
    "$python" -W ignore -c 'import scipy.stats' 2>/dev/null || stand_in scipy stats
    if [[ -n ${FROM_SOURCE:-} ]] || ! loads; then
        echo "fairseq: build from source"
        rm -rf "$site"/fairseq "$site"/fairseq_cli "$site"/fairseq_fixed-*
        install "$WORK/build-tools" "$pack"/build-wheels/*.whl
        # Without CUDA_HOME: fairseq's own CUDA kernels are for other models.
        env -u CUDA_HOME PYTHONPATH="$WORK/build-tools:$site" MAX_JOBS="$(nproc)" "$python" -m pip install --quiet \
            --disable-pip-version-check --no-index --no-deps --no-build-isolation --no-compile --no-cache-dir \
            --upgrade --target "$site" "$pack"/fairseq_fixed-*.tar.gz >"$WORK/build.log" 2>&1 ||
            { tail -20 "$WORK/build.log" >&2; fail "fairseq does not build here; see the lines above."; }
        loads || { tail -5 "$WORK/load.log" >&2; fail "fairseq does not load here; see the lines above."; }
    fi
    echo "$packed" >"$WORK/.installed"
fi
packed=$(cksum <"$pack/data-bin.tar.xz")
if [[ ! -f $WORK/.unpacked || $(<"$WORK/.unpacked") != "$packed" ]]; then
    rm -rf "$WORK/data-bin" "$WORK/checkpoints"
    "$python" -W ignore -m tarfile -e "$pack/data-bin.tar.xz" "$WORK"
    echo "$packed" >"$WORK/.unpacked"
fi
echo "installed and unpacked in $(($(date +%s) - STARTED)) s"
exec "$python" -u -W ignore -m benchmarks.gpu.iwslt14 "$@"
