"""One dimension by VBench's own package, in a process and an environment of its own.

Run as source text by `upstream.run`, because that package pins versions this one cannot share.
It imports nothing of opensora. The protocol was read in VBench.evaluate and VBenchI2V.evaluate of
Vchitect/VBench: the dimension's weights, then compute_<dimension>(full_info.json, device, weights).
"""

import importlib
import json
import sys


def plain(value):
    """numpy's and torch's numbers as JSON knows them."""
    return value.item() if hasattr(value, "item") else str(value)


def main(package, module, dimension, full_info, device, output):
    torch = importlib.import_module("torch")
    tools = importlib.import_module(package + ".utils")
    weights = tools.init_submodules([dimension])[dimension]
    compute = getattr(importlib.import_module(module + "." + dimension), "compute_" + dimension)
    overall, videos = compute(full_info, torch.device(device), weights)
    with open(output, "w", encoding="utf-8") as file:
        json.dump([float(overall), videos], file, default=plain)


if __name__ == "__main__":
    main(*sys.argv[1:])
