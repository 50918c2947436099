#!/usr/bin/env bash
# Prune a translation model while fairseq-train trains it, decode it, and cut the heads out: 6 of 24 heads stay.
#
#     bash examples/fairseq_translation.sh [FOLDER]
#
# The corpus is made here: sentences of made-up words, each translated word by word. Everything lies in FOLDER
# (default: fairseq-output). Needs fairseq's commands and head-pruning on the PATH: `PATH=.venv/bin:$PATH` after `make setup`.
set -euo pipefail
out="${1:-fairseq-output}"
mkdir -p "$out"
cd "$out"
plugin="$(head-pruning user-dir)"

python - <<'PYTHON'
import random

for split, pairs in (("train", 2000), ("valid", 20), ("test", 20)):
    draw = random.Random(split)
    with open(f"{split}.de", "w") as german, open(f"{split}.en", "w") as english:
        for _ in range(pairs):
            words = [draw.randrange(20) for _ in range(draw.randint(3, 7))]
            print(*(f"wort{word}" for word in words), file=german)
            print(*(f"word{word}" for word in words), file=english)
PYTHON

fairseq-preprocess --source-lang de --target-lang en --trainpref train --validpref valid --testpref test \
    --destdir data-bin --workers 1 &>preprocess.log

# The heads are chosen in the first tenth of the 150 updates, as training begins from nothing; the rest is for those that stay.
fairseq-train data-bin --user-dir "$plugin" --task translation_head_pruning \
    --arch transformer_iwslt_de_en --encoder-layers 2 --decoder-layers 2 \
    --encoder-embed-dim 32 --decoder-embed-dim 32 --encoder-ffn-embed-dim 64 --decoder-ffn-embed-dim 64 \
    --optimizer adam --lr 0.005 --lr-scheduler inverse_sqrt --warmup-updates 30 --dropout 0 \
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --max-tokens 800 --max-update 150 \
    --num-of-heads 6 --joint-pruning \
    --cpu --num-workers 0 --log-interval 50 --disable-validation --no-epoch-checkpoints --seed 1 &>train.log

# The mask is in the checkpoint: decoding needs no option of pruning.
fairseq-generate data-bin -s de -t en --user-dir "$plugin" --path checkpoints/checkpoint_last.pt \
    --batch-size 32 --beam 5 --cpu --num-workers 0 --required-batch-size-multiple 1 >generate.log 2>generate.err
tail -n 1 generate.log

head-pruning export checkpoints/checkpoint_last.pt small.pt --to compact
