from dataclasses import dataclass

import numpy as np

from flashgrpo.grpo.packing import Group, _split


@dataclass(frozen=True)
class PackPlan:
    packs: list[list[list[Group]]]
    costs: np.ndarray


def plan_packs(groups, token_budget, num_ranks, flops):
    pieces = [p for g in groups if g.completions for p in _split(g, token_budget)]
    n = -(-sum(p.num_tokens for p in pieces) // (token_budget * num_ranks)) if pieces else 0
    while True:
        bins = [[] for _ in range(n * num_ranks)]
        room = [token_budget] * len(bins)
        ok = True
        for p in sorted(pieces, key=lambda p: -p.num_tokens):
            best = max(range(len(bins)), key=lambda i: room[i])
            if room[best] < p.num_tokens:
                ok = False
                break
            bins[best].append(p)
            room[best] -= p.num_tokens
        if ok:
            break
        n += 1
    packs = [[bins[m * num_ranks + r] for m in range(n)] for r in range(num_ranks)]
    costs = np.array([[float(sum(g.num_tokens for g in b)) for b in r] for r in packs]).reshape(num_ranks, n)
    return PackPlan(packs, costs * flops.per_token)
