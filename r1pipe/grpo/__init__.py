"""Reinforcement learning: GRPO (Shao et al. 2024, arXiv:2402.03300) and its descendants."""
