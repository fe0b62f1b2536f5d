"""SLTrain at scale: sparse plus low-rank pretraining of LLaMA models, sharded, resumable, planned."""

__version__ = "0.1.0"
