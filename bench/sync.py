"""Seconds of a weight sync to each generator: `flashgrpo bench sync [--model SHAPE] [--generators ...]`.

A sync casts all weights to the sampler's type, sends them a bucket at a time and has them loaded: on a GPU over CUDA
IPC or NCCL, on a CPU through shared memory, which costs at least two copies. `native` copies on the device. The first
sync, which compares checksums too, is not counted. Writes bench/results/sync_<device>.json.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.markdown import Markdown

from flashgrpo.bench.generate import opened, parser_for, random_model, recipe_for, require
from flashgrpo.bench.report import sync_table
from flashgrpo.bench.timing import console, machine, results_folder, slug, time_turns
from flashgrpo.grpo.run.world import open_world
from flashgrpo.model.files import write_text

GENERATORS = "native", "vllm", "vllm_server"


def measure(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Seconds of each, one generator after another: an engine that idles holds memory, and on a CPU threads."""
    found, spread, size = {}, {}, 0
    with open_world(recipe_for(model, "native", 64, [])) as world:
        for name in options.generators:
            generator, source = opened(recipe_for(model, name, 64, options.devices), world, 64)
            try:

                def sync(own: Any = generator, weights: Any = source) -> None:
                    own.load_weights(weights, 1)
                    if torch.cuda.is_available():  # native, it is only queued
                        torch.cuda.synchronize()

                timing = time_turns({name: sync}, torch.device("cpu"), rounds=-(-options.rounds // 2))[name]
            finally:
                generator.close()
            found[name], spread[name], size = timing.p50_ms / 1e3, timing.spread, source.num_bytes
        device = world.device
    return {"machine": machine(device), "model": options.model, "gb": size / 1e9, "seconds": found, "spread": spread}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser_for("sync", __doc__, "large", GENERATORS).parse_args(arguments)
    require(options.generators)
    with random_model(options.model) as model:
        found = measure(options, model)
    file = results_folder() / f"sync_{slug(found['machine']['device'])}.json"
    write_text(file, json.dumps(found, indent=1) + "\n")
    console().print(Markdown("\n".join(sync_table(found))), f"written to {file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
