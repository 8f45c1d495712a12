"""Runs of the suite vbench side by side, as Markdown, with published models as anchors.

python eval/vbench/tabulate.py outputs/t2v/eval/vbench outputs/other/eval/vbench
"""

from __future__ import annotations

import argparse
import sys

from opensora.errors import OpensoraError
from opensora.evaluate.vbench.table import markdown


def main() -> int:
    """Print the table; what cannot be read is one line and an exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", help="outputs of the suite, with a scores.json each")
    parser.add_argument("--no-anchors", action="store_true", help="leave published models out")
    options = parser.parse_args()
    try:
        print(markdown(options.folders, anchors=not options.no_anchors), end="")
    except OpensoraError as error:
        print(f"tabulate: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
