"""What an update takes: recorded from the training code, and played again for any number of layers and ranks."""
