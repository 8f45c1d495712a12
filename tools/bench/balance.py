"""How evenly the ranks of a step are loaded, as JSON: the largest load over the mean one.

    python tools/bench/balance.py [--ranks 8 16 32 64 --steps 300 --width 1152]

Buckets are those of Open-Sora 1.2's first stage (2 to 16 s at 144p, 240p, 256px and 360p, and
pictures), with as many clips in each, and a budget of tokens for each rank. Loads are the FLOPs of
an STDiT's training step, rehearsed. `steps` is a step of one bucket, dealt by count; the others
are steps that mix clips: `count` cuts them into slices of equally many, `tokens` and `cost` give
the largest clip to the rank with least to do. `work` is the part of the ranks' time that they
work, over all steps. Nothing is trained: this is what the plans say.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from opensora import config as configs
from opensora.data.balance import deal
from opensora.data.mixing import Cost, MixedPlan
from opensora.data.plan import Plan
from opensora.data.sources import tokens
from opensora.data.synthetic import SyntheticAssigner, SyntheticSourceConfig
from opensora.train.config import TrainConfig
from opensora.train.cost import clip_cost

STRIDE, PATCH = (4, 8, 8), (1, 2, 2)
LENGTHS = (1, 49, 101, 205, 409)
RESOLUTIONS = ("144p", "240p", "256px", "360p")


def data(budget: int) -> dict[str, object]:
    table = {name: dict.fromkeys(LENGTHS, 1.0) for name in RESOLUTIONS}
    shapes = {"resolutions": table, "aspect_ratios": ["16:9", "1:1", "9:16"]}
    buckets = {**shapes, "token_budget": budget}
    return {"kind": "synthetic", "buckets": buckets, "num_samples": 60_000}


def cost_of(width: int, depth: int) -> Cost:
    model = {"kind": "stdit", "width": width, "depth": depth, "num_heads": max(1, width // 72)}
    text = {"text_channels": 64, "pooled_channels": 64}
    task = {"kind": "text_to_video", "model": {**model, **text}, "vae": {"kind": "causal"}}
    task["text"] = {"kind": "words", "channels": 64}
    tree = {"output": "unused", "steps": 1, "task": task, "data": data(10**6)}
    tree["precision"] = "bf16"
    return clip_cost(configs.validate(TrainConfig, tree, where="tools/bench/balance.py"))


def slices(costs: np.ndarray, ranks: int) -> list[float]:
    edges = [rank * len(costs) // ranks for rank in range(ranks + 1)]
    return [float(costs[a:b].sum()) for a, b in pairwise(edges)]


def dealt(costs: np.ndarray, by: np.ndarray, ranks: int) -> list[float]:
    shares = deal(by, np.ones(len(by), np.int64), ranks)
    return [float(costs[share].sum()) for share in shares]


def loads(ranks: int, steps: int, budget: int, cost: Cost) -> Iterator[dict[str, list[float]]]:
    """For every step the loads of the ranks, by the way of dealing."""
    config = configs.validate(SyntheticSourceConfig, data(budget * ranks), where="here")
    assigner = SyntheticAssigner(config, stride=STRIDE, patch=PATCH)
    plan, mixed = Plan(assigner, seed=0), MixedPlan(assigner, seed=0, cost=cost)
    costs = np.array([cost(bucket) for bucket in plan.buckets])
    sizes = np.array([tokens(bucket) for bucket in plan.buckets])
    for step in range(steps):
        alike, clips = plan.batch(step), mixed.batch(step).buckets
        yield {
            "steps": slices(np.full(len(alike.rows), cost(alike.bucket)), ranks),
            "count": slices(costs[clips], ranks),
            "tokens": dealt(costs[clips], sizes[clips], ranks),
            "cost": dealt(costs[clips], costs[clips], ranks),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--budget", type=int, default=100_000, help="tokens a rank and step")
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--depth", type=int, default=2)
    options = parser.parse_args()
    cost = cost_of(options.width, options.depth)
    for ranks in options.ranks:
        found = list(loads(ranks, options.steps, options.budget, cost))
        line: dict[str, object] = {"ranks": ranks}
        for way in found[0]:
            table = np.array([step[way] for step in found])
            ratio = table.max(1) / table.mean(1)
            line[way] = {
                "mean": round(float(ratio.mean()), 3),
                "p95": round(float(np.quantile(ratio, 0.95)), 3),
                "work": round(float(table.mean(1).sum() / table.max(1).sum()), 3),
            }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
