"""The training loop and what surrounds it."""

import sltrain_dist.runtime.launchers  # noqa: F401 (sees them before torch is imported, which takes seconds)
