"""Seconds of a weight sync to each generator: `flashgrpo bench sync [--model SHAPE] [--generators ...]`.

A sync casts all weights to the sampler's type, sends them a bucket at a time and has them loaded:
on a GPU over CUDA IPC or NCCL, on a CPU through shared memory, which costs at least two copies.
`native` copies on the device. The first sync, which compares checksums too, is not counted. Writes
bench/results/sync_<device>.json.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from flashgrpo.bench.generate import opened, parser_for, random_model, recipe_for, require
from flashgrpo.bench.timing import Row, machine, markdown, publish, time_turns
from flashgrpo.grpo.run.world import open_world

GENERATORS = "native", "vllm", "vllm_server"


def time_syncs(options: argparse.Namespace, model: Path) -> Row:
    """Seconds of each, one generator after another: an engine that idles holds memory, and on a CPU threads."""
    found, spread, size = {}, {}, 0
    with open_world(recipe_for(model, "native", 64, [])) as world:
        where = machine(world.device)
        for name in options.generators:
            generator, source = opened(recipe_for(model, name, 64, options.devices), world, 64)
            try:
                sync = partial(generator.load_weights, source, 1)
                times = time_turns({name: sync}, world.device, rounds=-(-options.rounds // 2))[name]
            finally:
                generator.close()
            found[name], spread[name], size = times["p50_ms"] / 1e3, times["spread"], source.num_bytes
    return {"machine": where, "model": options.model, "gb": size / 1e9, "seconds": found, "spread": spread}


def table(found: Row) -> list[str]:
    """Of a results file."""
    cells = []
    for name, seconds in found["seconds"].items():
        rate, spread = f"{found['gb'] / seconds:.2f}", f"{found['spread'][name]:.0%}"
        cells.append([f"`{name}`", f"{found['gb']:.2f}", f"{seconds:.2f}", rate, spread])
    return markdown(["a weight sync", "GB:", "seconds:", "GB/s:", "spread:"], cells)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser_for("sync", __doc__, "large", GENERATORS).parse_args(arguments)
    require(options.generators)
    with random_model(options.model) as model:
        found = time_syncs(options, model)
    publish("sync_{device}.json", found, table(found))
    return 0
