"""Prune the heads of a trained translation model by their importance (Michel et al. 2019), without training.

    python -m fairseq_plugin.run_michel data-bin -s de -t en --restore-file checkpoints/checkpoint_last.pt \\
        --batch-size 32 --beam 5 --remove-bpe --num-of-heads 4 --exact-pruning

The architecture, the criterion and the dictionaries' sharing come from the checkpoint. Each round removes
``--num-of-heads`` heads and is scored by BLEU, or what ``--scoring`` says; the rounds go into ``michel_rounds.json``
in ``--save-dir``, the mask of each into ``michel_masks/``. A run that was stopped goes on after its last finished
round.
"""

from .michel.run import get_parser, main, run  # noqa: F401

if __name__ == "__main__":
    main()
