"""What moves between ranks: layouts, home blocks, transports, their cost. Knows no attention maths."""

from .blocks import HomePlan, RankPlan, home_plan, rank_plan
from .comm import CommGroup, Traffic
from .layout import SequenceLayout

__all__ = ["CommGroup", "HomePlan", "RankPlan", "SequenceLayout", "Traffic", "home_plan", "rank_plan"]
