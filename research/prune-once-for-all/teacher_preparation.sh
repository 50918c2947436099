#!/usr/bin/env bash
# Prepare a teacher: train BERT-base on English Wikipedia for 100 000 updates of 256 segment pairs.
#
# To use several GPUs, or one whose memory a batch of 256 does not fit:
#   PYTHON="torchrun --nproc_per_node 8" ./teacher_preparation.sh --per_device_train_batch_size 32
#   ./teacher_preparation.sh --per_device_train_batch_size 32 --gradient_accumulation_steps 8 --bf16
# Flags are added to those of the training. A run that was stopped goes on where it was.
set -euo pipefail

repo="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
python="${PYTHON:-}"
if [[ -z "$python" ]]; then
    python="$repo/.venv/bin/python"
    [[ -x "$python" ]] || python=python3
fi
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"
model="${MODEL:-bert-base-uncased}"
data="${DATA:-/tmp/wikipedia-segment-pairs}"

# CORPUS: a folder of text, parquet or JSON lines in the place of Wikipedia.
"${python%% *}" -m prepare.wikipedia --data_dir "$data" --tokenizer "$model" ${CORPUS:+--corpus "$CORPUS"}

$python -m hf_plugin.run_pretraining \
    --model_name_or_path "$model" \
    --data_dir "$data" \
    --do_train \
    --do_eval \
    --mlm_probability 0.15 \
    --max_steps 100000 \
    --per_device_train_batch_size 256 \
    --learning_rate 5e-5 \
    --lr_scheduler_type linear \
    --warmup_ratio 0.01 \
    --weight_decay 0.01 \
    --save_steps 1000 \
    --save_total_limit 2 \
    --output_dir "${TEACHER:-/tmp/bert-base-uncased-teacher-preparation}" \
    "$@"
