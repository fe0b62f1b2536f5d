"""The memory of an update, recorded from the training code and played for any number of layers and ranks."""
