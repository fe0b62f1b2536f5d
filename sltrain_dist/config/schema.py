"""The configuration: one strict pydantic model per section.

Unknown keys, wrong types and out-of-range values are errors (:mod:`sltrain_dist.config.load` turns them
into one readable message). A field's docstring is its documentation: units, and why the default is what
it is. Rules that involve several fields live in :mod:`sltrain_dist.config.rules`. In every field that holds a path,
`~` and environment variables are expanded (:mod:`sltrain_dist.config.paths`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sltrain_dist.config.paths import expand

T = TypeVar("T")


class _Memory:
    """Marks fields that decide on the memory that a run takes."""


MEMORY = _Memory()
Memory = Annotated[T, MEMORY]
"""A field that the device memory of a run depends on, alone or with others; the planner looks at no other one."""

LARGEST_INT = 2**63 - 1
"""What fits into 64 bits."""

PositiveInt = Annotated[int, Field(gt=0, le=LARGEST_INT)]
CountOrZero = Annotated[int, Field(ge=0, le=LARGEST_INT)]
Seconds = Annotated[int, Field(gt=0, le=10_000_000)]
"""Up to four months: the system's timers take no time that is much longer."""

# Bounds far above what any machine could hold, so that a typing error is a message and not hours of work.
Amount = Annotated[int, Field(gt=0, le=2**24)]
Width = Annotated[int, Field(gt=0, le=2**22)]
Layers = Annotated[int, Field(gt=0, le=10_000)]
Processes = Annotated[int, Field(ge=0, le=4096)]

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
FloatOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
SupportKind = Literal["random", "stratified", "blocks"]


class Section(BaseModel):
    """What all sections share: no unknown keys, no type coercion, no change after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @field_validator("run_dir", "source", "tokenizer", "cache_dir", "resume", "mlflow_uri", check_fields=False)
    @classmethod
    def _expand_paths(cls, value: str | list[str] | None) -> str | list[str] | None:
        """Expands `~` and environment variables in every field that can hold a path."""
        if isinstance(value, list):
            return [expand(entry) for entry in value]
        return None if value is None else expand(value)


class ModelConfig(Section):
    """A LLaMA decoder."""

    vocab_size: Memory[Amount] = 32_000
    """Rows of the embedding and of the head. At least the tokenizer's size."""
    hidden_size: Memory[Width] = 512
    """Width of the residual stream."""
    intermediate_size: Memory[Width] = 1376
    """Width of the SwiGLU MLP."""
    num_layers: Memory[Layers] = 8
    """Decoder blocks."""
    num_heads: Memory[Width] = 8
    """Query heads; hidden_size / num_heads is the head dimension, and must be even for rotary embeddings."""
    num_kv_heads: Memory[Width | None] = None
    """Key and value heads (grouped-query attention). Null: as many as num_heads."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary embedding's frequencies."""
    norm_eps: PositiveFloat = 1e-6
    """Added to the mean square in RMSNorm."""
    tie_head: Memory[bool] = False
    """Whether lm_head shares the embedding's weight."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the embedding, the head and, with reparam.method=full, of every linear layer."""

    @property
    def kv_heads(self) -> int:
        """Key and value heads, with the default filled in."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


class ReparamConfig(Section):
    """How the linear layers of attention and MLP are parametrised."""

    method: Memory[Literal["sltrain", "full", "lowrank", "relora", "galore"]] = "sltrain"
    """sltrain: W = (alpha/rank)·BA + S. lowrank: without S. full: an ordinary dense weight. For `sltrain plan` only:
    relora (a frozen dense weight and factors, which are merged into it now and then) and galore (a dense weight whose
    gradient is projected to rank before the optimizer sees it)."""
    rank: Memory[Width] = 128
    """r, the inner size of B (m, r) and A (r, n)."""
    density: Memory[Annotated[float, Field(gt=0, le=1)]] = 0.03
    """δ, the share of W's entries that S holds (`sp_ratio` in the reference code)."""
    alpha: PositiveFloat = 32.0
    """Numerator of the low-rank factor's scale alpha/rank."""
    support: Memory[SupportKind] = "random"
    """How the positions of S are chosen. random: int(δ·m·n) of them, uniformly, as in the paper (2 bytes of
    index a value). stratified: ⌊δn + ½⌋ a row, each hashed into its own stretch of columns; stores no index.
    blocks: dense blocks between permuted inputs and runs of outputs, δn a row, rounded to a multiple of 8 where
    n ≥ 256; the fastest."""
    path: Memory[Literal["auto", "materialize", "factored"]] = "auto"
    """How W is applied. materialize: W is built, used and thrown away, in forward and again in backward.
    factored: W is never built; the low-rank and the sparse product are taken one by one and added. auto:
    the faster by a cost model, per layer shape and number of tokens (docs/operator.md)."""
    row_block_bytes: Memory[PositiveInt | None] = None
    """Most bytes of one layer's W, or of its dense gradient, that materialize forms at a time: bounds the
    transient memory for a little time. Null: all of it at once."""
    weight_bits: Memory[Literal[16, 8]] = 16
    """Bits of a value of B, A, V and the head. 16: their type is train.dtype. 8, which is experimental: int8 codes
    with a float32 scale a row (random's V: every 256 values), rounded stochastically by the update and dequantized
    layer by layer in forward and backward; with Adam and parallel.engine=ddp (docs/memory.md). Embedding and norms
    keep train.dtype."""


class DataConfig(Section):
    """Training documents, and how they become rows of tokens."""

    source: str | list[str] = "embedded"
    """Where documents come from: "embedded" (English prose of the installed Python packages), a file, a
    directory, a glob, a URL that fsspec understands, or a Hub dataset such as allenai/c4; or a list. Files are
    JSON lines (also compressed), Parquet or Arrow. A directory means its files of data.split, by their names or by
    the manifest of `sltrain prepare-text`. Or one directory of token shards, made by
    `sltrain prepare-tokens`, read in the order of their text."""
    weights: list[PositiveFloat] | None = None
    """With a list as source: the share of every update's rows that comes from each of its entries, relative to
    the others'. Each repeats its own documents at its own pace. Part of the data order. Every stream reads one
    entry, so streams must be large enough for the weights. Null: all documents are equal, each once an epoch."""
    subset: str | None = None
    """Configuration of a Hub dataset, such as en for allenai/c4."""
    split: str = "train"
    """Split of a Hub dataset, of a directory, or of the embedded corpus. A file or a glob has none."""
    text_field: str = "text"
    """Key of the document's text in each JSON line, or column of a Parquet or Arrow file."""
    max_document_bytes: PositiveInt = 32 << 20
    """Longer documents (bytes of a JSON line; of the text in Parquet and Arrow) count as unusable, and are never held
    in memory whole. Part of the data order. 32 MiB: above any book, below what a damaged file can become."""
    tokenizer: str = "embedded"
    """A SentencePiece model file. "embedded": trained on the embedded corpus, with model.vocab_size pieces."""
    seq_len: Memory[Annotated[int, Field(ge=2, le=2**24)]] = 256
    """Tokens in a row."""
    batching: Literal["pad", "pack"] = "pad"
    """pad: one document a row, truncated and padded, as in the paper. pack: documents joined, rows filled."""
    truncate: Literal["text", "eos"] = "text"
    """With pad: what ends the row of a document that is longer than it. text: the document's text. eos: the
    end-of-sequence token in the row's last place, as in the published code and so in the paper's presets. Part of the
    data order: rows, and evaluation's too, differ in their last label."""
    reset_attention: Memory[bool] = False
    """With pack: whether attention and positions start anew at every document's first token, which then is not
    predicted, so that the documents of a row know nothing of each other. false: they attend to what comes before."""
    streams: Amount = 16
    """Virtual streams that the documents are dealt to. Part of the data order: changing it changes every
    batch. Best a multiple of the number of ranks; each stream keeps one file open."""
    shuffle_block: Amount = 1024
    """Documents that are read and permuted together inside a stream."""
    workers: Processes = 1
    """Background processes per rank that read and tokenize. 0: in the training process itself."""
    prefetch: Amount = 4
    """Updates' worth of rows that each worker prepares ahead."""
    max_bad_fraction: Fraction = 0.01
    """The run stops (exit code 3) when more than this share of the documents read are unusable."""
    retries: CountOrZero = 8
    """Attempts to go on reading a remote file after an error that may pass (time-out, cut connection, status 408,
    429 or 5xx, answer cut short), before the run stops (exit code 3). Counted anew after any progress."""
    retry_wait_s: FloatOrZero = 1.0
    """Mean seconds before the first of these attempts. Doubles with each, up to a minute; random by a half up or
    down. A server's Retry-After is honoured if it asks for more."""
    timeout_s: Annotated[float, Field(gt=0, le=10_000_000)] = 60.0
    """Seconds of silence after which an http(s) server counts as gone."""
    cache_dir: str | None = None
    """Where the embedded corpus is kept. Null: $XDG_CACHE_HOME/sltrain_dist or ~/.cache/sltrain_dist."""


class OptimConfig(Section):
    """Optimizer and learning-rate schedule."""

    name: Memory[Literal["adamw", "adam", "sgd", "adafactor"]] = "adamw"
    """adamw: AdamW. adam: Adam, whose weight decay is a part of the gradient. adafactor: torch's Adafactor, which
    keeps a row and a column of a matrix's second moment, and takes lr as the most of its relative step; ddp only.
    sgd: plain stochastic gradient descent, for tests and comparisons."""
    lr: PositiveFloat = 3e-3
    """Peak learning rate."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of Adam's first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of Adam's second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of Adam's second moment."""
    state_bits: Memory[Literal[32, 16, 8, 4]] = 16
    """Bits of each of Adam's two states (docs/memory.md). 16: the parameter's type, as in the paper's baseline.
    32: float32. 8 and 4: quantized in blocks of 256 and 128 values, but float32 for parameters of under 4096."""
    stochastic_rounding: Memory[bool] = False
    """Whether Adam rounds bf16 parameters up or down at random, right in the mean, instead of to the nearest:
    updates of less than half a unit in the last place are not lost, at no cost in memory."""
    master_weights: Memory[bool] = False
    """Whether Adam keeps fp32 copies of bf16 parameters, and updates those: 4 bytes a parameter."""
    weight_decay: Memory[FloatOrZero] = 0.0
    """Weight decay: decoupled with adamw and adafactor, a part of the gradient with the others. Never applied to norms
    and embeddings."""
    clip: FloatOrZero = 0.0
    """Largest global gradient norm; gradients of a larger norm are scaled down to it. 0: no clipping."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: CountOrZero = 0
    """Updates over which the learning rate rises linearly to its peak."""
    min_lr_ratio: Fraction = 0.1
    """Final learning rate, as a share of the peak (cosine and linear)."""
    update: Memory[Literal["whole", "per_layer"]] = "whole"
    """whole: one step after the backward pass. per_layer: every parameter is updated as soon as its gradient
    is complete, during the backward pass, and its gradient freed: gradients take the memory of a few parameters
    instead of all. Not for zero."""
    per_layer_accumulation: Literal["keep", "refuse"] = "keep"
    """Per-layer updates with several micro-batches per update. keep: gradients are kept (sharded where the
    engine shards them) until the last one, which equals the whole update and takes the memory of all gradients;
    the summary says how much. refuse: an error."""
    clip_mode: Literal["previous_norm", "per_parameter", "two_pass"] = "previous_norm"
    """Per-layer updates with clipping: a parameter is updated before the global norm is known. previous_norm:
    gradients are scaled by the last update's norm, which a checkpoint holds; the very first update clips as
    per_parameter does. per_parameter: every parameter's own gradient norm is brought down to optim.clip.
    two_pass: a first backward pass takes the norm, a second one updates: exact, for twice the forward and
    backward time, and with one micro-batch per update only."""

    @property
    def passes_twice(self) -> bool:
        """Whether an update takes a backward pass for the gradient norm before the one that updates."""
        return self.update == "per_layer" and self.clip > 0 and self.clip_mode == "two_pass"


class ParallelConfig(Section):
    """The distributed engine."""

    engine: Memory[Literal["ddp", "fsdp", "zero"]] = "ddp"
    """ddp: whole replicas (one rank needs no process group). fsdp: PyTorch's FSDP2, every decoder block
    gathered on its own. zero: DeepSpeed ZeRO."""
    zero_stage: Memory[Literal[1, 2, 3]] = 2
    """ZeRO stage. 1: optimizer states are sharded. 2: gradients too. 3: parameters too."""
    shard: Memory[Literal["factors", "all"]] = "factors"
    """factors: only the replaced linear layers' parameters are sharded; embeddings, head and norms stay
    whole on every rank, and their gradients are all-reduced once per update. all: those are sharded too."""
    accumulate: Memory[Literal["auto", "local", "sharded"]] = "auto"
    """Where gradients wait between micro-batches. local: whole, with one reduction per update. sharded:
    reduce-scattered at every micro-batch, which takes less memory and more traffic. auto: local for ddp and
    zero stage 1, sharded for fsdp and zero stages 2 and 3. Only fsdp has both."""
    replicas: Memory[Amount] = 1
    """fsdp: groups of ranks that each hold all shards (hybrid sharding): shards are gathered inside a group
    of world size / replicas ranks, such as the GPUs of one host, and gradients all-reduced between groups."""
    reshard_after_forward: Memory[bool] = True
    """fsdp: whether a block's gathered weights are freed after its forward pass and gathered again for its
    backward pass. false: kept, for a third less traffic and the memory of all gathered blocks."""
    prefetch_blocks: Memory[PositiveInt] = 1
    """fsdp: blocks whose weights are gathered ahead of the one that computes."""
    cpu_offload: Memory[bool] = False
    """The optimizer states live in the host's memory, and the optimizer steps there; with fsdp the sharded
    parameters and gradients too. Not for ddp."""
    deepspeed: Memory[dict[str, Any]] = {}
    """zero: more keys of DeepSpeed's configuration, nested as there. A key that is made from another setting
    of this configuration is refused."""
    timeout_s: Seconds = 1800
    """Seconds after which a collective that got no answer, or a data worker that sends nothing, ends the run."""

    @property
    def keeps_whole_gradients(self) -> bool:
        """Whether the engine keeps gradients whole between two micro-batches, unless fsdp is told otherwise."""
        return self.engine == "ddp" or (self.engine == "zero" and self.zero_stage == 1)

    @property
    def accumulates_locally(self) -> bool:
        """Whether gradients wait whole for the update's last micro-batch, with one reduction per update."""
        return self.keeps_whole_gradients if self.accumulate == "auto" else self.accumulate == "local"


_LOSS_CHUNK_BYTES = 64 << 20
"""Of a chunk's float32 logits, where the configuration leaves it to us; larger ones are no faster."""


class Precision(NamedTuple):
    """Types of a run's values, by torch's names for them.

    Attributes:
        parameter: Of parameters and gradients, and of optimizer states with `optim.state_bits: 16`.
        product: Of what matrix products take; fsdp gathers the weights of decoder layers in it.
    """

    parameter: Literal["bfloat16", "float32"]
    product: Literal["bfloat16", "float32"]

    @property
    def is_mixed(self) -> bool:
        """Whether products take another type than that of the parameters."""
        return self.parameter != self.product

    @property
    def parameter_bytes(self) -> int:
        """Bytes of a value of a parameter."""
        return 2 if self.parameter == "bfloat16" else 4

    @property
    def product_bytes(self) -> int:
        """Bytes of a value in a matrix product."""
        return 2 if self.product == "bfloat16" else 4


PRECISIONS = {
    "bf16": Precision("bfloat16", "bfloat16"),
    "fp32": Precision("float32", "float32"),
    "mixed": Precision("float32", "bfloat16"),
}
"""By what `train.dtype` says."""


class TrainConfig(Section):
    """The training loop."""

    steps: PositiveInt | None = None
    """Updates to make. Exactly one of steps and tokens must be set."""
    tokens: PositiveInt | None = None
    """Non-padding tokens to train on; the run ends with the first update that reaches them."""
    micro_batch: Memory[Amount] = 8
    """Sequences per rank and forward pass."""
    global_batch: Memory[Amount] = 512
    """Sequences per update, over all ranks and micro-batches."""
    dtype: Memory[Literal["bf16", "fp32", "mixed"]] = "bf16"
    """Types, under every engine. bf16 and fp32: of parameters, gradients, activations and optimizer states;
    bf16, with no fp32 copies, is the paper's. mixed: parameters, gradients and states in fp32, matrix products
    in bf16 (autocast; fsdp gathers the weights in bf16, too, and reduces gradients in fp32)."""
    activation_checkpointing: Memory[Literal["none", "full", "selective"]] = "none"
    """Activations that are not kept but computed again in the backward pass. full: all inside every decoder
    block. selective: as checkpoint_policy says."""
    checkpoint_policy: Memory[Literal["blocks", "attention", "ops"]] = "blocks"
    """With activation_checkpointing=selective. blocks: every checkpoint_every-th block as a whole.
    attention: in every block all but the output of attention itself, whose cost grows with the square of
    seq_len. ops: in every block all but the outputs of attention and of the linear layers, so that no matrix
    product is computed twice; between none and attention in memory, and little slower than none."""
    checkpoint_every: Memory[Annotated[int, Field(ge=2)]] = 2
    """With checkpoint_policy=blocks: one in so many blocks is computed again."""
    loss_chunk_tokens: Memory[CountOrZero | None] = None
    """Tokens whose logits exist at a time: head and loss are computed in chunks of so many, each with its
    gradients. Null: as many as 64 MiB of float32 logits hold (524 at a vocabulary of 32,000). 0: all at once,
    as plain modules do, which keeps a few times tokens x vocabulary."""
    compile: bool = False
    """Whether torch.compile compiles the decoder blocks, each on its own, inside of the engine."""
    sanity_checks: bool = False
    """Checks after every update, at some cost, that replicas are in sync, gradients freed, the learning rate
    as scheduled, and supports unchanged."""
    dry_run: bool = False
    """Build everything, make one update on made-up data, report the peak memory and stop."""

    @property
    def precision(self) -> Precision:
        """What `dtype` means."""
        return PRECISIONS[self.dtype]

    def is_recomputed(self, index: int) -> bool:
        """Whether activations of decoder layer number `index` are computed again, all or all but some outputs."""
        if self.activation_checkpointing == "selective" and self.checkpoint_policy == "blocks":
            return index % self.checkpoint_every == 0
        return self.activation_checkpointing != "none"

    @property
    def keeps_attention(self) -> bool:
        """Whether decoder layers that are computed again keep attention's output."""
        return self.activation_checkpointing == "selective" and self.checkpoint_policy in ("attention", "ops")

    @property
    def keeps_products(self) -> bool:
        """Whether decoder layers that are computed again keep the outputs of their linear layers, too."""
        return self.activation_checkpointing == "selective" and self.checkpoint_policy == "ops"

    def chunk_tokens(self, vocab_size: int) -> int:
        """Tokens whose logits exist at a time in the loss; 0 for all of a micro-batch."""
        chosen = self.loss_chunk_tokens
        return chosen if chosen is not None else max(1, _LOSS_CHUNK_BYTES // (4 * vocab_size))


class EvalConfig(Section):
    """Evaluation during training: mean loss over a fixed set of tokens."""

    source: Memory[str | list[str] | None] = None
    """Evaluation documents, in the notation of data.source. Null: no evaluation."""
    subset: str | None = None
    """Configuration of a Hub dataset."""
    split: str = "validation"
    """Split of a Hub dataset, of a directory, or of the embedded corpus. A file or a glob has none."""
    every: CountOrZero = 1000
    """Updates between evaluations. 0: only before the first and after the last update."""
    tokens: PositiveInt = 10_000_000
    """Non-padding tokens to evaluate on, in the order of the files; fewer if the source ends before."""
    micro_batch: Memory[Amount | None] = None
    """Sequences per rank and forward pass. Null: train.micro_batch."""


class CheckpointConfig(Section):
    """Saving and resuming."""

    every: CountOrZero = 1000
    """Updates between checkpoints. 0: only at the end."""
    keep: PositiveInt = 3
    """Newest checkpoints to keep; older ones are deleted after a newer one is complete."""
    keep_every: CountOrZero = 0
    """Updates between checkpoints that are kept for good, beside the newest: one is saved after every multiple of
    it. 0: none, so that a run whose loss went up unnoticed has only checkpoints of that."""
    resume: str = "auto"
    """auto: go on from the newest complete checkpoint in run_dir, if there is one. never: start anew, and
    refuse a run_dir that already holds checkpoints. Else: the path of a checkpoint, or of a run_dir (its
    newest). One of run_dir's own: the run goes back to it, and later ones are set aside. One of another
    run: this run begins from it, and when started again goes on from its own."""


class TrackingConfig(Section):
    """Progress, metrics and experiment tracking."""

    log_every: PositiveInt = 10
    """Updates between lines of metrics.jsonl and of the log."""
    progress: Literal["auto", "bar", "lines"] = "auto"
    """bar: a live progress bar. lines: plain lines. auto: a bar on a terminal."""
    mlflow: bool = True
    """Whether to track with MLflow. A failing tracker is reported once and never stops training."""
    mlflow_uri: str | None = None
    """MLflow tracking server. Null: $MLFLOW_TRACKING_URI, or without it the SQLite file run_dir/mlflow.db."""
    experiment: str | None = None
    """MLflow experiment. Null: $MLFLOW_EXPERIMENT_NAME or $MLFLOW_EXPERIMENT_ID, or without them sltrain."""
    run_name: str | None = None
    """MLflow run name. Null: the name of run_dir."""


class Config(Section):
    """A whole run."""

    preset: str | None = None
    """Name of a preset whose values stand for what this configuration does not say (see config/presets.py)."""
    run_dir: str = "runs/default"
    """Directory of everything that the run writes. Read-write for every rank."""
    seed: CountOrZero = 0
    """Seed of initialisation, supports and data order."""
    model: ModelConfig = ModelConfig()
    reparam: ReparamConfig = ReparamConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def eval_micro_batch(self) -> int:
        """Sequences per rank and forward pass in evaluation."""
        return self.eval.micro_batch or self.train.micro_batch
