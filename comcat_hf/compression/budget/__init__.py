"""Ranks under a budget: what each choice saves and costs, and which are taken."""
