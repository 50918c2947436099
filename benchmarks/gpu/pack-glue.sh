#!/usr/bin/env bash
# Make the folder that glue.sh needs on a GPU machine without a network:
#
#     bash benchmarks/gpu/pack-glue.sh MODEL DATA [FOLDER]
#
# MODEL is a folder with a BERT-like encoder of 72 heads (the one of python -m prepare.demo_sentiment), DATA holds CoLA/,
# MRPC/, RTE/ and SST-2/ in GLUE's TSV layout. FOLDER (default .gpu-glue) gets the weights in float16 and the tasks as
# token ids.
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 1
}

[[ $# -ge 2 && $# -le 3 ]] || fail "give the model and the data: bash benchmarks/gpu/pack-glue.sh MODEL DATA [FOLDER]."
model=$(realpath -m "$1")
data=$(realpath -m "$2")
folder=$(realpath -m "${3:-"$(dirname "${BASH_SOURCE[0]}")/../../.gpu-glue"}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. benchmarks/gpu/size.sh
python=${PYTHON:-.venv/bin/python}
[[ -f $model/config.json ]] || fail "$model has no config.json; give the folder of an encoder with its tokenizer."
"$python" -c 'import datasets, transformers' 2>/dev/null ||
    fail "$python cannot import transformers and datasets; run make setup first, or set PYTHON."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

export HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 PYTHONPATH=$PWD
"$python" -W ignore -m benchmarks.gpu.glue_pack "$model" "$data" "$work/pack"
within_limit "$work/pack" "clean the working tree"
rm -rf "$folder"
mkdir -p "$(dirname "$folder")"
mv "$work/pack" "$folder"
echo "wrote $folder"
