"""Score over weights kept: every weight pruner on one encoder; the sweep of ``plans/weights_glue.yaml``.

python -m benchmarks.weights_glue MODEL DATA SQUAD --work DIR [--jobs 2]
"""

from benchmarks.planned import main

if __name__ == "__main__":
    main("weights_glue", __doc__, model="BERT-like encoder", data="folder of CoLA/ and MRPC/", squad="SQuAD v1.1")
