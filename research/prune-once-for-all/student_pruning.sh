#!/usr/bin/env bash
# Prune a student to 90 % while it learns from the teacher that it starts as (teacher_preparation.sh makes it).
#
# For 85 %: ./student_pruning.sh --target_sparsity 0.85 --output_dir /tmp/bert-base-uncased-sparse-85-pruneofa
# To use several GPUs, or one whose memory a batch of 256 does not fit, see teacher_preparation.sh.
# Flags are added to those below. A run that was stopped goes on where it was, zeros included.
set -euo pipefail

repo="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
python="${PYTHON:-}"
if [[ -z "$python" ]]; then
    python="$repo/.venv/bin/python"
    [[ -x "$python" ]] || python=python3
fi
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"
teacher="${TEACHER:-/tmp/bert-base-uncased-teacher-preparation}"

# All projections but those of the heads that are dropped afterwards, the pooler among them; no embeddings, no biases.
$python -m hf_plugin.run_pretraining \
    --model_name_or_path "$teacher" \
    --data_dir "${DATA:-/tmp/wikipedia-segment-pairs}" \
    --do_train \
    --do_eval \
    --mlm_probability 0.15 \
    --distill logits \
    --teacher_path "$teacher" \
    --distill_task 0.5 \
    --distill_logits 0.5 \
    --distill_temperature 2.0 \
    --pruner_name gradual_magnitude \
    --target_sparsity 0.9 \
    --initial_sparsity 0.0 \
    --begin_pruning_step 0 \
    --end_pruning_step 80000 \
    --policy_begin_step 0 \
    --policy_end_step 50000 \
    --pruning_frequency 1000 \
    --lr_rewind \
    --weights_include '\.weight$' \
    --weights_exclude '^cls\.' \
    --prune_biases False \
    --max_steps 100000 \
    --per_device_train_batch_size 256 \
    --learning_rate 5e-5 \
    --lr_scheduler_type linear \
    --warmup_ratio 0.01 \
    --weight_decay 0.01 \
    --save_steps 1000 \
    --save_total_limit 2 \
    --output_dir "${STUDENT:-/tmp/bert-base-uncased-sparse-90-pruneofa}" \
    "$@"
