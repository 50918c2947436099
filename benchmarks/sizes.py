"""Many sizes out of one training, beside a training for each; the sweep of ``plans/sizes.yaml``.

python -m benchmarks.sizes MODEL DATA --work DIR [--jobs 2]
"""

from benchmarks.planned import main

if __name__ == "__main__":
    main("sizes", __doc__, model="encoder of 72 heads", data="folder of SST-2/")
