"""What a user writes down: adapter configurations, rank plans, recipes."""

from .adapter import ComCATConfig as ComCATConfig
from .ranks import RANKS_NAME as RANKS_NAME
from .ranks import RankPlan as RankPlan
