"""Pruned once, in pretraining, beside pruned in each fine-tuning; the sweep of ``plans/prune_once.yaml``.

    python -m benchmarks.prune_once MODEL DATA SQUAD --work DIR [--jobs 1]

The segment pairs of the paragraphs of SQuAD's training file are made first, in ``DIR/pairs``.
"""

from benchmarks.planned import call, parser, run


def main() -> None:
    """Command line."""
    made = parser(__doc__, model="BERT-like encoder", data="folder of CoLA/, MRPC/ and SST-2/", squad="SQuAD v1.1")
    options = made.parse_args()
    given = {name: getattr(options, name).resolve() for name in ("model", "data", "squad")}
    pairs = options.work.resolve() / "pairs"
    if not options.dry_run:
        call("-m", "benchmarks.squad_pairs", given["model"], given["squad"] / "train-v1.1.json", pairs)
    run("prune_once", {**given, "pairs": pairs}, options)


if __name__ == "__main__":
    main()
