"""Score over heads kept on GLUE: every method on one pretrained encoder; the sweep of ``plans/glue.yaml``.

python -m benchmarks.glue MODEL DATA --work DIR [--jobs 2]
"""

from benchmarks.planned import main

if __name__ == "__main__":
    main("glue", __doc__, model="encoder of 72 heads", data="folder of CoLA/, MRPC/, SST-2/ and MNLI/")
