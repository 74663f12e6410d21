"""Configurations, one file a run. They import each other as `configs`; an installation has them as `flaxkd.configs`."""

import sys

sys.modules.setdefault("configs", sys.modules[__name__])
