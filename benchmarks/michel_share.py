"""The mask of the heads and units that the loss of a model feels most, the same share of both.

    python -m benchmarks.michel_share SHARE --output_dir DIR --prune_units both ...

The other flags are those of ``hf_plugin.run_michel``; the mask is ``DIR/masks.safetensors``.
"""

import argparse
import sys
from pathlib import Path

from head_pruning import HeadMask, HeadPruningError, full_mask
from head_pruning.files import MASKS_FILE
from head_pruning.surgery.per_unit import of_each_kind
from hf_plugin.command_line.michel import parse_michel
from hf_plugin.glue.michel import MichelRun


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("share", type=float, help="of the heads and of the units, to keep")
    options, others = parser.parse_known_args()
    try:
        arguments = parse_michel(others)
        run = MichelRun(arguments)
        mask = HeadMask(
            run.unit_map, of_each_kind(run.unit_map, run.importance(full_mask(run.unit_map)), options.share)
        )
        mask.save(Path(arguments.output_dir) / MASKS_FILE)
    except HeadPruningError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
