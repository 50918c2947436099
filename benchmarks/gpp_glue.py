"""Score of encoders that lost heads and feed-forward units together; the sweep of ``plans/gpp_glue.yaml``.

python -m benchmarks.gpp_glue MODEL DATA --work DIR [--jobs 2]
"""

from benchmarks.planned import main

if __name__ == "__main__":
    main("gpp_glue", __doc__, model="BERT-like encoder", data="folder of CoLA/, MRPC/, SST-2/ and MNLI/")
