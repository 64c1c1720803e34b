"""Which rank trains on which samples: as many tokens on each, minibatch by minibatch.

Every rank samples its share of the problems, and completion lengths depend on the problem. Ranks
with short ones would wait for the others at every layer, so samples move between ranks before the
update, complete with routes and advantage.
"""

from collections.abc import Mapping, Sequence

from r1pipe.trainer.packing import Sample, assign
from r1pipe.utils import distributed


def share_out(
    samples: dict[int, Sample],
    costs: Mapping[int, float],
    minibatches: Sequence[Sequence[int]],
    team_size: int = 1,
) -> dict[int, Sample]:
    """The samples that this rank trains on, by their number among all ranks' samples.

    `samples` and `costs` are this rank's own, by number; `minibatches` holds every number once.
    `team_size` neighbouring ranks get the same samples. Every rank must call it.
    """
    if distributed.alone():
        return samples
    all_costs = {n: cost for part in distributed.gather(costs) for n, cost in part.items()}
    parcels: list[dict[int, Sample]] = [{} for _ in range(distributed.world_size())]
    for numbers in minibatches:
        for number, team in assign(numbers, all_costs, len(parcels) // team_size).items():
            if number in samples:
                for parcel in parcels[team * team_size : (team + 1) * team_size]:
                    parcel[number] = samples[number]
    received = distributed.exchange(parcels)
    return dict(sorted(pair for parcel in received for pair in parcel.items()))
