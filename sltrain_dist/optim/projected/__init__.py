"""Adam on gradients that are projected to a low rank: GaLore and APOLLO."""
