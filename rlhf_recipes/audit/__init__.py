"""Audit of preference data and a reward model: what the signal captured, and where it cannot be trusted."""
