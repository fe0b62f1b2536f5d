"""Names of the files and directories in a run directory."""

CHECKPOINTS = "checkpoints"  # see checkpoint/manifest.py
CONFIG = "config.yaml"  # the resolved configuration
DRY_RUN = "dry_run"  # all that dry runs write
EXIT = "exit.json"  # how the run ended
INITIAL_WEIGHTS = "initial_weights"  # converted layers, while a run starts from another method's checkpoint
LOG = "log.txt"  # the lines of the console
METRICS = "metrics.jsonl"  # training and evaluation lines
MLFLOW_ARTIFACTS = "mlartifacts"  # without a tracking server
MLFLOW_DATABASE = "mlflow.db"  # without a tracking server
MLFLOW_RUN_ID = "mlflow_run_id"  # for resuming
SAMPLES = "samples.jsonl"  # continuations of eval.samples
STOP = "STOP"  # made by users, to stop the run
