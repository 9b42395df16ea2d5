"""What a user writes down: adapter configurations (`adapter.py`, which imports PEFT), rank plans, recipes."""

from .ranks import RANKS_NAME as RANKS_NAME
from .ranks import RankPlan as RankPlan
