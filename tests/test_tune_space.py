"""The search space: what it holds, its parameters, its order."""

from dataclasses import replace

import optuna
from tune_landscape import BEST, BLOCKS, ITERATIONS, SPEC, Landscape, problem

from lla_compile.plans import KernelConfig
from lla_compile.tuner.space import SearchSpace


def test_the_space_holds_the_default_and_goes_to_parameters_and_back():
    landscape = Landscape()
    odd = KernelConfig("eager", "fused", 48, 32, 32)
    landscape.default_config = lambda spec, device: odd
    space = SearchSpace.joint(SPEC, problem().device, {"eager": landscape})
    assert space.contains(odd) and space.contains(BEST)
    assert not space.contains(replace(odd, block_q=24)) and not space.contains(replace(BEST, num_warps=4))
    assert space.suggest(optuna.trial.FixedTrial(space.parameters(odd))) == odd
    parameters = space.parameters(odd)
    assert space.config(parameters) == odd
    assert space.config({k: v for k, v in parameters.items() if k != "backend"}) == odd  # there is only one
    assert space.config({k: v for k, v in parameters.items() if k != "eager.block_q"}) is None
    assert space.digest({"torch": "1"}) == space.digest({"torch": "1"}) != space.digest({"torch": "2"})


def test_a_search_opens_with_the_default_of_every_backend_and_the_alternatives():
    first, second = Landscape(), Landscape()
    default, other = KernelConfig("b", "fused", 64, 32, 32), KernelConfig("b", "split", 32, 32, 32)
    second.default_config = lambda spec, device: default
    second.alternatives = lambda spec, device: (other,)
    space = SearchSpace.joint(SPEC, problem().device, {"eager": first, "b": second})
    assert space.openings() == [space.default(), default, other]
    assert space.default().backend == "eager"


def test_the_nearest_configuration_of_a_space():
    space = SearchSpace.joint(SPEC, problem().device, {"eager": Landscape(extra_knobs={"num_splits": (1, 4, 16)})})
    inside = replace(BEST, num_splits=4)
    assert space.nearest(inside) == inside
    assert space.nearest(replace(inside, num_splits=64, block_q=48)) == replace(inside, num_splits=16)
    assert space.nearest(replace(inside, num_splits=2)).num_splits == 1
    for foreign in (BEST, replace(inside, num_warps=4), replace(inside, backend="b"), replace(inside, schedule="x")):
        assert space.nearest(foreign) is None


def test_schedules_with_few_feasible_configurations_are_seen_early():
    class Lopsided(Landscape):
        def infeasible(self, spec, config, device):
            return None if config.schedule == "split" or config.block_q == config.block_k == 16 else "too large"

    space = SearchSpace.joint(SPEC, problem().device, {"eager": Lopsided()})
    order = list(space.shuffled(0))
    assert [config.schedule for config in order].count("fused") == len(ITERATIONS)
    assert {config.schedule for config in order[:2]} == {"fused", "split"}
    assert len(set(order)) == len(order) == len(ITERATIONS) * (1 + len(BLOCKS) ** 2)


def test_the_order_of_a_space_is_random_complete_and_lazy():
    looked_at = []

    class Watched(Landscape):
        def infeasible(self, spec, config, device):
            looked_at.append(config)
            return super().infeasible(spec, config, device)

    landscapes = Watched("a", limit=64 * 64), Watched("b", extra_knobs={"kv_block_q": (16, None)})
    space = SearchSpace.joint(SPEC, problem().device, {x.name: x for x in landscapes})
    first, again, other = (list(space.shuffled(seed)) for seed in (0, 0, 1))
    assert first == again != other and set(first) == set(other)
    tiles = sum(q * k <= 64 * 64 for q in BLOCKS for k in BLOCKS)
    assert len(first) == len(set(first)) == 2 * 4 * tiles + 2 * 4 * 25 * 2
    assert len(looked_at) == 3 * (2 * 4 * 25 + 2 * 4 * 25 * 2)
    assert {config.backend for config in first[:20]} == {"a", "b"}
    looked_at.clear()
    order = space.shuffled(2)
    assert not looked_at
    assert next(order).block_q and len(looked_at) < 10
