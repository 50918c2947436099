"""Score of sparse students: SPD, its parts, pruning with and without a teacher; the sweep of ``plans/spd_glue.yaml``.

python -m benchmarks.spd_glue MODEL DATA --work DIR [--jobs 2]
"""

from benchmarks.planned import main

if __name__ == "__main__":
    main("spd_glue", __doc__, model="BERT-like encoder", data="folder of CoLA/, MRPC/, SST-2/ and MNLI/")
