"""Customize adapters: what they add to attention, run as one kernel call, merged and taken away."""
