"""Micro-batches without padding."""

import torch

from r1pipe.trainer.packing import Sample, Support, cut_batches

CPU = torch.device("cpu")


def test_parts_hold_every_sample_within_the_budget(samples: list[Sample]) -> None:
    parts = cut_batches(samples, 200)
    assert sorted(id(s) for part in parts for s in part) == sorted(map(id, samples))
    assert all(sum(s.num_tokens for s in part) <= 200 or len(part) == 1 for part in parts)
    assert len(parts) > 3


def test_support_remembers_what_was_left() -> None:
    keep = torch.rand(9, 30) > 0.7
    parts = Support.of(keep).split([2, 3, 4])
    assert torch.equal(Support.join(parts, CPU).mask(30), keep)
    assert torch.equal(parts[1].mask(30), keep[2:5])
