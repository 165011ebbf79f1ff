"""One update is the same on any number of ranks, micro-batches and copies of the model, to the last bits of fp32."""

import dataclasses
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import ranks
from flashgrpo.grpo.learn.learner import Learner, packed_loss
from flashgrpo.grpo.learn.packing import Completion, Group, build_batch
from flashgrpo.grpo.recipe.load import Recipe, build_recipe
from flashgrpo.grpo.run.policy import open_sharded_model
from flashgrpo.grpo.run.world import World, open_world
from flashgrpo.grpo.sampling import gather_groups
from flashgrpo.grpo.types import Rollout, ScoredGroup, Scores
from flashgrpo.model.sharding import full_tensors
from runs import changed

pytestmark = pytest.mark.xdist_group("ranks")
GROUP_SIZE, DENOMINATOR = 8, 250.0
LR, EPS = 1e-3, 1e-8  # AdamW's
Layout = list[list[list[Group]]]  # [rank][micro_batch]


Update = tuple[dict[str, np.ndarray], dict[str, np.ndarray], float]  # gradients, new weights, gradient norm


def updates(recipe: Recipe, layouts: list[Layout], rewards: np.ndarray) -> list[Update]:
    """One update of the model at recipe.model.path for each layout."""
    torch.set_num_threads(1)
    with open_world(recipe) as world:
        return [_update(recipe, world, layout[world.rank], rewards) for layout in layouts]


def _update(recipe: Recipe, world, packs: list[list[Group]], rewards: np.ndarray) -> Update:
    reshard = recipe.train.reshard_after_forward
    model = open_sharded_model(recipe.model, world.device, world.mesh, reshard_after_forward=reshard)
    learner = Learner(model, recipe.train, 1)
    gradients = {}

    def record(*_) -> None:
        own = {name: p.grad for name, p in learner.params.items()}
        gradients.update({name: g.clone().numpy() for name, g in full_tensors(own, model.config)})

    def loss_of(batch):
        return packed_loss(
            model,
            batch,
            recipe.loss,
            denominator=DENOMINATOR,
            rewards=torch.from_numpy(rewards).float(),
            sequence_ids=batch.sequence_ids,
        )

    learner.optimizer.register_step_pre_hook(record)
    _, norm = learner.update([build_batch(pack) for pack in packs], loss_of)
    weights = {name: w.clone().numpy() for name, w in full_tensors(learner.params, model.config)}
    return gradients, weights, norm.item()


def random_groups(rng: np.random.Generator, num_groups: int) -> list[Group]:
    return [
        Group(
            rng.integers(2, 90, rng.integers(1, 9)).tolist(),
            [Completion(rng.integers(2, 90, rng.integers(1, 12)), i * GROUP_SIZE + j) for j in range(GROUP_SIZE)],
        )
        for i in range(num_groups)
    ]


def dealt_out(groups: list[Group], size: int, num_micro_batches: int, shared_prefix: bool = True) -> Layout:
    """Every group is split over all ranks and micro-batches."""
    places = [(number % size, number // size % num_micro_batches) for number in range(GROUP_SIZE)]
    layout = laid_out(groups, [places] * len(groups), size, num_micro_batches)
    if shared_prefix:
        return layout
    return [[[Group(g.prompt_ids, [c]) for g in pack for c in g.completions] for pack in rank] for rank in layout]


def laid_out(groups: list[Group], places: list[list[tuple[int, int]]], size: int, num_micro_batches: int) -> Layout:
    """Completion j of group i in places[i][j], a rank and a micro-batch."""
    layout: Layout = [[[] for _ in range(num_micro_batches)] for _ in range(size)]
    for group, own in zip(groups, places, strict=True):
        for rank, micro_batch in sorted(set(own)):
            part = [c for c, place in zip(group.completions, own, strict=True) if place == (rank, micro_batch)]
            layout[rank][micro_batch].append(Group(group.prompt_ids, part))
    return layout


def before_step(update: Update) -> dict[str, np.ndarray]:
    """Weights without AdamW's first step, -LR g / (|g| + EPS), which amplifies the rounding of g by up to LR / EPS."""
    return {name: update[1][name] + LR * g / (np.abs(g) + EPS) for name, g in update[0].items()}


def assert_equal(found: Update, wanted: Update, summed: float = 0.0) -> None:
    """Each tensor relative to its norm: gradients, and weights before their step. `summed`, the gradient norms of parts
    that may cancel, adds their rounding: 2 eps of it."""
    rounding = 2 * float(np.finfo(np.float32).eps) * summed
    gradients, weights = (found[0], wanted[0], rounding), (before_step(found), before_step(wanted), 0.0)
    for kind, (ours, theirs, extra) in {"gradient": gradients, "weight": weights}.items():
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            off, norm = np.linalg.norm(ours[name] - tensor), np.linalg.norm(tensor)
            assert off <= 1e-6 * norm + extra, f"{kind} of {name}: {off:.2e}, norm {norm:.2e}, summed {summed:.2e}"
    assert found[2] == pytest.approx(wanted[2], abs=1e-6 * wanted[2] + rounding)


GROUPS, REWARDS = random_groups(np.random.default_rng(0), 6), np.random.default_rng(1).standard_normal((6, GROUP_SIZE))


@pytest.fixture(scope="module")
def recipes(model_path, make_model) -> dict[str, Recipe]:
    """By whether the head is the embedding."""
    made = {}
    for name, path in {"tied": model_path, "untied": make_model(tie_word_embeddings=False)}.items():
        values = {
            "model": {"path": str(path)},
            "data": {"path": "unread"},
            "rewards": {"functions": ["format"]},
            "loss": {"preset": "dapo", "entropy_coef": 0.01},
            "train": {"steps": 1, "lr": LR, "grad_clip": 1e9},
            "run": {"output": "unwritten", "device": "cpu"},
        }
        made[name] = build_recipe(Recipe, values)
    return made


@pytest.fixture(scope="module")
def wanted(recipes) -> dict[str, Update]:
    """The update on one rank in one micro-batch, with which those in several agree."""
    found = {}
    for name, recipe in recipes.items():
        layouts = [[[GROUPS]], dealt_out(GROUPS, 1, 5), dealt_out(GROUPS, 1, 1, False)]
        ((found[name], *others),) = ranks.run(updates, 1, recipe, layouts, REWARDS)
        for update in others:
            assert_equal(update, found[name])
    return found


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_an_update_is_the_same_on_any_layout(recipes, wanted, head):
    layouts = [dealt_out(GROUPS, 4, n, shared) for n in (1, 5) for shared in (True, False)]
    for rank in ranks.run(updates, 4, recipes[head], layouts, REWARDS):
        for update in rank:
            assert_equal(update, wanted[head])


@pytest.mark.parametrize(
    ("head", "section", "values"),
    [
        ("untied", "train", {"shard_ranks": 2}),
        ("tied", "train", {"reshard_after_forward": False}),
        ("untied", "model", {"activation_checkpointing": "full"}),
        ("tied", "model", {"activation_checkpointing": "selective"}),
    ],
)
def test_copies_and_memory_savings_change_nothing(recipes, wanted, head, section, values):
    recipe = changed(recipes[head], section, **values)
    for rank in ranks.run(updates, 4, recipe, [dealt_out(GROUPS, 4, 2)], REWARDS):
        assert_equal(rank[0], wanted[head])


@pytest.mark.parametrize("shard_ranks", [0, 2])
def test_the_same_layout_gives_equal_bits(recipes, shard_ranks):
    recipe, layout = changed(recipes["tied"], "train", shard_ranks=shard_ranks), dealt_out(GROUPS, 4, 3)
    first, again = (ranks.run(updates, 4, recipe, [layout], REWARDS) for _ in range(2))
    for (one,), (other,) in zip(first, [*again[1:], again[0]], strict=True):  # and on every rank
        for ours, theirs in zip(one[:2], other[:2], strict=True):
            assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
        assert one[2] == other[2]


@pytest.mark.parametrize(("head", "shard_ranks"), [("untied", 0), ("tied", 1)])
def test_ranks_without_work_take_part(recipes, wanted, head, shard_ranks):
    """Empty micro-batches, on all ranks but one and at the end of the last."""
    recipe = changed(recipes[head], "train", shard_ranks=shard_ranks)
    for rank in ranks.run(updates, 2, recipe, [[[[], []], [GROUPS, []]]], REWARDS):
        assert_equal(rank[0], wanted[head])


@st.composite
def random_layouts(draw):
    size, num_micro_batches = draw(st.sampled_from([2, 4])), draw(st.integers(1, 4))
    num_groups = draw(st.integers(1, 5))
    groups = random_groups(np.random.default_rng(draw(st.integers(0, 2**32))), num_groups)
    place = st.tuples(st.integers(0, size - 1), st.integers(0, num_micro_batches - 1))
    places = draw(
        st.lists(st.lists(place, min_size=GROUP_SIZE, max_size=GROUP_SIZE), min_size=num_groups, max_size=num_groups)
    )
    return groups, laid_out(groups, places, size, num_micro_batches)


NEAR_EPS = random_groups(np.random.default_rng(445), 1)  # an element of a gradient is 1.1e-8
CANCELLING = [Group([5], [Completion(np.array([7]), number) for number in range(GROUP_SIZE)])]  # advantages sum to 0


@settings(max_examples=int(os.environ.get("EXAMPLES", "50")) // 16, deadline=None)
@given(drawn=random_layouts(), seed=st.integers(0, 100))
@example(drawn=(NEAR_EPS, laid_out(NEAR_EPS, [[(0, int(number == 4)) for number in range(GROUP_SIZE)]], 2, 2)), seed=2)
@example(drawn=(CANCELLING, dealt_out(CANCELLING, 2, 2)), seed=2)
def test_any_rollouts_on_any_layout(recipes, drawn, seed):
    groups, layout = drawn
    rewards = np.random.default_rng(seed).standard_normal((len(groups), GROUP_SIZE))
    alone: list[Layout] = [[[[Group(group.prompt_ids, [c])]]] for group in groups for c in group.completions]
    ((expected, *parts),) = ranks.run(updates, 1, recipes["tied"], [[[groups]], *alone], rewards)
    for rank in ranks.run(updates, len(layout), recipes["tied"], [layout], rewards):
        assert_equal(rank[0], expected, summed=sum(norm for _, _, norm in parts))


def gathered(recipe: Recipe, with_sets: bool) -> tuple[list[ScoredGroup], list[ScoredGroup], int, dict[str, int]]:
    """This rank's groups, all ranks', this rank's tokens, and the bytes that it has sent of them by their kind."""
    sent = {"arrays": 0, "pickled": 0}

    class CountingWorld(World):
        def gather(self, value):
            sent["pickled"] += len(pickle.dumps(value))
            return super().gather(value)

        def gather_array(self, values):
            sent["arrays"] += values.nbytes
            return super().gather_array(values)

    with open_world(recipe) as world:
        own = [scored_group(number, with_sets) for number in range(world.rank, 9, world.size)]
        counting = CountingWorld(world.rank, world.size, world.device, world.mesh)
        everyones = gather_groups(own, counting)
    tokens = sum(len(rollout.completion_ids) for group in own for rollout in group.rollouts)
    return own, everyones, tokens, sent


def scored_group(number: int, with_sets: bool) -> ScoredGroup:
    rng = np.random.default_rng(number)
    prompt, rollouts = rng.integers(0, 152_000, 40).tolist(), []
    for length in rng.integers(1, 4000, GROUP_SIZE):
        ids, logprobs = rng.integers(0, 152_000, length), -rng.random(length, np.float32)
        rollout = Rollout(prompt, ids, logprobs, "stop", number, ((3, int(length)),), reflections=number)
        if with_sets:
            counts = rng.integers(0, 4, length, np.int32)
            kept_ids = rng.integers(0, 152_000, counts.sum(), np.int32)
            rollout = dataclasses.replace(rollout, kept_counts=counts, kept_ids=kept_ids)
        rollouts.append(rollout)
    return ScoredGroup(rollouts, Scores(rng.random(GROUP_SIZE), {"accuracy": [1.0] * GROUP_SIZE}))


@pytest.mark.parametrize("with_sets", [False, True])
def test_completions_travel_between_ranks_in_8_bytes_a_token(recipe, with_sets):
    """As int32 and fp32, with 4 more for the size of a kept set, and for each of its ids; what is pickled of them does
    not grow with their length. Ranks may have unequal shares.
    """
    told = ranks.run(gathered, 2, recipe, with_sets)
    for own, everyones, tokens, sent in told:
        if with_sets:
            tokens += tokens / 2
            rollouts = [rollout for group in own for rollout in group.rollouts]
            tokens += sum(len(rollout.kept_ids) for rollout in rollouts) / 2
        assert sent["arrays"] == 8 * tokens
        assert sent["pickled"] < 250 * GROUP_SIZE * len(own)
        wanted = [scored_group(number, with_sets) for number in (0, 2, 4, 6, 8, 1, 3, 5, 7)]
        for group, other in zip(everyones, wanted, strict=True):
            assert np.array_equal(group.scores.rewards, other.scores.rewards)
            for rollout, sampled in zip(group.rollouts, other.rollouts, strict=True):
                for name, value in vars(sampled).items():
                    found = getattr(rollout, name)
                    assert np.array_equal(found, value) if isinstance(value, np.ndarray) else found == value
                    assert getattr(found, "dtype", None) == getattr(value, "dtype", None)
