"""How large the gates' gradients are, by temperature: ``python -m benchmarks.gate_norms LOG``.

LOG is the log of a DSP training with ``--gate-clip-norm 0 --log-format simple --log-interval 1``.
"""

import re
import sys
from pathlib import Path

import numpy as np

from head_pruning.report import text_table

BANDS = ((1.0, 0.03), (0.03, 0.01), (0.01, 0.003), (0.003, 0.001), (0.001, 1e-9))


def main() -> None:
    """Command line."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit("error: give the log of a training with --gate-clip-norm 0 --log-interval 1.")
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    found = re.findall(r"train_inner.*?temperature=([^,]+), gate_norm=([^,]+)", text)
    values = np.array(found, dtype=float).reshape(-1, 2)
    rows = []
    for high, low in BANDS:
        norms = values[(values[:, 0] > low) & (values[:, 0] <= high), 1]
        if norms.size:
            quantiles = (f"{value:.2g}" for value in (np.median(norms), np.quantile(norms, 0.9), norms.max()))
            rows.append((f"{high:g} to {low:g}", norms.size, *quantiles, f"{100 * (norms > 1).mean():.0f} %"))
    print(text_table(("temperature", "updates", "median", "9 of 10 below", "largest", "above 1"), rows))


if __name__ == "__main__":
    main()
