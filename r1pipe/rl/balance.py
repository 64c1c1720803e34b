"""Which rank trains on which samples: as many tokens on each, minibatch by minibatch.

Every rank samples its part of the problems, and completions differ in length by the problem; if it
trained on what it sampled, the ranks with short ones would wait for the others at each layer. So
samples change hands before the updates, whole: rollout, routes, advantage.
"""

from collections.abc import Sequence

from r1pipe.trainer.packing import Sample, assign
from r1pipe.utils import distributed


def share_out(
    samples: dict[int, Sample], costs: dict[int, float], minibatches: Sequence[Sequence[int]]
) -> dict[int, Sample]:
    """The samples that this rank is to train on, by their number among all ranks' samples.

    `samples` and `costs` are this rank's own, by number; `minibatches` holds every number once.
    Every rank must call it.
    """
    if distributed.alone():
        return samples
    all_costs = {n: cost for part in distributed.gather(costs) for n, cost in part.items()}
    parcels: list[dict[int, Sample]] = [{} for _ in range(distributed.world_size())]
    for numbers in minibatches:
        for number, rank in assign(numbers, all_costs, len(parcels)).items():
            if number in samples:
                parcels[rank][number] = samples[number]
    received = distributed.exchange(parcels)
    return dict(sorted(pair for parcel in received for pair in parcel.items()))
