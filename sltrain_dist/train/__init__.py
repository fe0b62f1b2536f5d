"""The training loop, and everything that starts, builds, observes and ends a run."""

import sltrain_dist.runtime.launchers  # noqa: F401 (records the launchers before the slow import of torch)
