"""Students that their teacher chooses: units and prices (units), the knapsack (solving), errors (scoring), the rest
(choice, chart), and the student for `config.keep` (keep)."""

from flaxkd.choosing.choice import Choice, choose
from flaxkd.choosing.keep import ensure, settled

__all__ = ["Choice", "choose", "ensure", "settled"]
