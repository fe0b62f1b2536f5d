"""The configuration: one strict pydantic model per section.

Unknown keys, wrong types and out-of-range values are errors (:mod:`sltrain_dist.config.load` turns them
into one readable message). A field's docstring is its documentation, with units and the reason for the default.
Rules that involve several fields are in :mod:`sltrain_dist.config.rules`. In every field that holds a path,
`~` and environment variables are expanded (:mod:`sltrain_dist.config.paths`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from sltrain_dist.config.paths import expand

T = TypeVar("T")


class _Memory:
    """Marks fields that affect the memory of a run."""


MEMORY = _Memory()
Memory = Annotated[T, MEMORY]
"""A field that the device memory of a run depends on. The planner reads no other fields."""

LARGEST_INT = 2**63 - 1
"""Largest signed 64-bit integer."""

PositiveInt = Annotated[int, Field(gt=0, le=LARGEST_INT)]
CountOrZero = Annotated[int, Field(ge=0, le=LARGEST_INT)]
Seconds = Annotated[int, Field(gt=0, le=10_000_000)]
"""Up to four months; the operating system's timers do not accept much more."""

# Bounds far above what any machine could hold, so that a typing error fails at once and not after hours.
Amount = Annotated[int, Field(gt=0, le=2**24)]
Width = Annotated[int, Field(gt=0, le=2**22)]
Layers = Annotated[int, Field(gt=0, le=10_000)]
Processes = Annotated[int, Field(ge=0, le=4096)]

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
FloatOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
SupportKind = Literal["random", "stratified", "blocks"]
Method = Literal["sltrain", "full", "lowrank", "cola", "relora", "galore", "apollo", "apollo-mini"]
PROJECTED_METHODS: tuple[Method, ...] = ("galore", "apollo", "apollo-mini")
"""Methods whose weights are dense, and whose optimizer keeps the moments of a projected gradient."""


class Section(BaseModel):
    """Base of all sections, which refuse unknown keys and type coercion and are immutable after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @field_validator(
        "run_dir", "source", "tokenizer", "cache_dir", "resume", "init_from", "mlflow_uri", check_fields=False
    )
    @classmethod
    def _expand_paths(cls, value: str | list[str] | None) -> str | list[str] | None:
        """Expands `~` and environment variables in every field that can hold a path."""
        if isinstance(value, list):
            return [expand(entry) for entry in value]
        return None if value is None else expand(value)


class ModelConfig(Section):
    """A LLaMA decoder."""

    vocab_size: Memory[Amount] = 32_000
    """Rows of the embedding and of the head; at least the tokenizer's vocabulary size."""
    hidden_size: Memory[Width] = 512
    """Width of the residual stream."""
    intermediate_size: Memory[Width] = 1376
    """Width of the SwiGLU MLP."""
    num_layers: Memory[Layers] = 8
    """Number of decoder layers."""
    num_heads: Memory[Width] = 8
    """Number of query heads. The head dimension hidden_size / num_heads must be even for rotary embeddings."""
    num_kv_heads: Memory[Width | None] = None
    """Number of key and value heads (grouped-query attention). Null: as many as num_heads."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary embedding's frequencies."""
    norm_eps: PositiveFloat = 1e-6
    """Value added to the mean square in RMSNorm."""
    tie_head: Memory[bool] = False
    """Whether lm_head shares the embedding's weight."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the embedding, the head and every dense linear layer (reparam.method=full
    or reparam.dense_layers)."""

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, with the default resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


class ReparamConfig(Section):
    """Parametrization of the linear layers of attention and MLP."""

    method: Memory[Method] = "sltrain"
    """sltrain: W = (alpha/rank)·BA + S. lowrank: without S. full: an ordinary dense weight. The others are published
    baselines (docs/recipes.md). cola: B·SiLU(A·x), with no scale. galore, apollo, apollo-mini: dense weights, whose
    gradient is projected to a low rank (apollo-mini: 1) for the optimizer states. relora: a frozen dense weight W plus
    (alpha/rank)·BA, which is merged into W at every restart."""
    dense_layers: Memory[Annotated[tuple[int, ...], Field(strict=False)]] = ()
    """Decoder layers whose linear layers stay dense, as with method=full, while method is sltrain, lowrank or cola.
    Counted from 0, or from the end with negative numbers: [0, -1] is the first and the last layer."""
    rank: Memory[Width] = 128
    """r, the inner dimension of B (m, r) and A (r, n)."""
    density: Memory[Annotated[float, Field(gt=0, le=1)]] = 0.03
    """δ, the fraction of W's entries that are in S (`sp_ratio` in the reference code)."""
    alpha: PositiveFloat = 32.0
    """Numerator of the scale alpha/rank of the low-rank product BA."""
    support: Memory[SupportKind] = "random"
    """How the positions of S are chosen. random: int(δ·m·n) positions, uniformly, as in the paper (2 bytes of index
    per value). stratified: ⌊δn + ½⌋ per row, each hashed into its own interval of columns; stores no index.
    blocks: dense blocks between windows of permuted inputs and runs of outputs, δn per row, rounded to a multiple of
    8 where n ≥ 256; the fastest."""
    support_seed: CountOrZero | None = None
    """Seed of the positions of S, and of the initial values of their layers. Null: that of the checkpoint that the run
    resumes or starts from, because the values of S belong to its positions; in any other run, `seed`."""
    path: Memory[Literal["auto", "materialize", "factored"]] = "auto"
    """How W is applied. materialize: W is built, used and freed, in the forward and again in the backward pass.
    factored: W is never built; the low-rank and the sparse product are computed separately and added. auto:
    the faster one according to a cost model, per layer shape and number of tokens (docs/operator.md)."""
    row_block_bytes: Memory[PositiveInt | None] = None
    """Largest part of one layer's W, or of its dense gradient, in bytes, that materialize builds at a time: limits
    transient memory at a small cost in time. Null: all of it at once."""
    weight_bits: Memory[Literal[16, 8]] = 16
    """Bits per value of B, A, V and the head. 16: their type is that of train.dtype. 8 (experimental): int8 codes with
    a float32 scale per row (for V of a random support: per 256 values), rounded stochastically by the update and
    dequantized layer by layer in the forward and backward pass. Needs Adam and parallel.engine=ddp (docs/memory.md).
    Embedding, norms and the weights of dense_layers keep the type of train.dtype."""
    restart_every: Memory[CountOrZero] = 0
    """Updates between restarts (arXiv 2505.22922; docs/recipes.md). A restart factors every product BA anew, so that B
    and A share its singular values evenly (B = U√Σ, A = √ΣVᵀ/scale), which leaves W as it is, and clears optimizer
    states. Needs low-rank factors: method=sltrain or lowrank. With relora, a restart adds the products BA to the frozen
    weights instead, draws A anew and sets B to 0; it needs restarts. 0: no restarts."""
    restart_warmup: CountOrZero = 0
    """Updates over which the learning rate comes back after a restart: the first has 0.001 of the schedule's rate, and
    this many updates later the rate is the schedule's again. Less than restart_every. 0: the rate does not change."""
    restart_states: Literal["all", "factors"] = "all"
    """Parameters whose optimizer states a restart clears, with Adam's count of updates for the bias correction. all:
    every parameter, as in the published code. factors: B and A, which are all that a restart changes; not with zero."""

    def method_of(self, layer: int, num_layers: int) -> Method:
        """Returns the method of decoder layer number `layer`: full for those of `dense_layers`."""
        return "full" if layer in self.dense_layers or layer - num_layers in self.dense_layers else self.method


class DataConfig(Section):
    """Training documents, and how they are turned into rows of tokens."""

    source: str | list[str] = "embedded"
    """Where documents come from: "embedded" (English prose of the installed Python packages), a file, a
    directory, a glob, a URL that fsspec understands, or a Hub dataset such as allenai/c4; or a list. Files are
    JSON lines (also compressed), Parquet or Arrow. From a directory, the files of data.split are read, as given by
    their names or by the manifest of `sltrain prepare-text`. Or a directory of token shards, made by
    `sltrain prepare-tokens`, which are read in the order of their text."""
    weights: list[PositiveFloat] | None = None
    """With a list of sources: the relative share of each source in the rows of every update. Each source repeats its
    documents independently. Part of the data order. Every stream reads one source, so streams must be large enough
    for the weights. Null: all documents have the same weight, and each occurs once per epoch."""
    subset: str | None = None
    """Configuration of a Hub dataset, such as en for allenai/c4."""
    split: str = "train"
    """Split of a Hub dataset, of a directory, or of the embedded corpus. Files and globs have no splits."""
    text_field: str = "text"
    """Key of the document's text in a JSON line, or its column in a Parquet or Arrow file."""
    max_document_bytes: PositiveInt = 32 << 20
    """Longest document: bytes of a JSON line, or of the text in Parquet and Arrow. Longer ones count as unusable and
    are never read into memory as a whole. Part of the data order. 32 MiB is more than any book, and less than a
    damaged file can contain as one line."""
    tokenizer: str = "embedded"
    """A SentencePiece model file, or "embedded": trained on the embedded corpus, with model.vocab_size pieces."""
    seq_len: Memory[Annotated[int, Field(ge=2, le=2**24)]] = 256
    """Tokens per row."""
    batching: Literal["pad", "pack"] = "pad"
    """pad: one document per row, truncated or padded, as in the paper. pack: documents are joined to fill rows."""
    truncate: Literal["text", "eos"] = "text"
    """With pad: the last token of a row whose document is too long. text: a token of the document. eos: the
    end-of-sequence token, as in the published code and therefore in the paper's presets. Part of the data order:
    training and evaluation rows differ in their last label."""
    reset_attention: Memory[bool] = False
    """With pack: whether attention and positions restart at the first token of every document, which is then not
    predicted, so that the documents of a row are independent. false: documents attend to those before them."""
    streams: Amount = 16
    """Number of virtual streams that the documents are distributed over. Part of the data order: changing it changes
    every batch. Best a multiple of the number of ranks; each stream keeps one file open."""
    shuffle_block: Amount = 1024
    """Number of documents that a stream reads and shuffles together."""
    workers: Processes = 1
    """Background processes per rank that read and tokenize. 0: the training process does it itself."""
    prefetch: Amount = 4
    """Number of updates whose rows each worker prepares ahead."""
    max_bad_fraction: Fraction = 0.01
    """The run stops (exit code 3) when more than this fraction of the documents read are unusable."""
    retries: CountOrZero = 8
    """Retries after a transient error of a remote file (time-out, lost connection, status 408, 429 or 5xx, truncated
    response) before the run stops (exit code 3). The count restarts after any progress."""
    retry_wait_s: FloatOrZero = 1.0
    """Mean seconds before the first retry. Doubles with each retry, up to a minute, with a random variation of up to
    a half. A longer Retry-After of the server takes precedence."""
    timeout_s: Annotated[float, Field(gt=0, le=10_000_000)] = 60.0
    """Seconds without data after which an http(s) connection counts as lost."""
    cache_dir: str | None = None
    """Directory of the embedded corpus. Null: $XDG_CACHE_HOME/sltrain_dist or ~/.cache/sltrain_dist."""


class OptimConfig(Section):
    """Optimizer and learning-rate schedule."""

    name: Memory[Literal["adamw", "adam", "sgd", "adafactor"]] = "adamw"
    """adamw: AdamW. adam: Adam, whose weight decay is added to the gradient. adafactor: torch's Adafactor, which
    keeps one row and one column of a matrix's second moment, and uses lr as the maximum of its relative step; ddp
    only. sgd: plain stochastic gradient descent, for tests and comparisons."""
    lr: PositiveFloat = 3e-3
    """Peak learning rate."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay rate of Adam's first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay rate of Adam's second moment."""
    eps: PositiveFloat = 1e-8
    """Value added to the square root of Adam's second moment."""
    state_bits: Memory[Literal[32, 16, 8, 4]] = 16
    """Bits per value of Adam's two states (docs/memory.md). 16: the parameter's type, as in the paper's baseline.
    32: float32. 8 and 4: quantized in groups of 256 and 128 values; parameters of under 4096 values keep float32."""
    stochastic_rounding: Memory[bool] = False
    """Whether Adam rounds bf16 parameters stochastically (without bias) instead of to the nearest: updates of less
    than half a unit in the last place are not lost, at no cost in memory."""
    projection_every: PositiveInt = 200
    """galore, apollo, apollo-mini: updates between two new projections of the gradient."""
    projection_scale: PositiveFloat | None = None
    """Factor of the change of the projected matrices, `scale` of the published codes; apollo and apollo-mini use its
    square root. Null: that of the published pretraining, 0.25 with galore, 1 with apollo and 128 with apollo-mini."""
    master_weights: Memory[bool] = False
    """Whether Adam keeps and updates fp32 copies of bf16 parameters, at 4 bytes per parameter."""
    weight_decay: Memory[FloatOrZero] = 0.0
    """Weight decay: decoupled with adamw and adafactor, otherwise added to the gradient. Never applied to norms and
    embeddings."""
    factors: Memory[Literal["adam", "muon", "spectron"]] = "adam"
    """Optimizer of the matrices of attention and MLP; adamw or adam updates everything else (docs/recipes.md). adam:
    the same as everything else. muon: B, A and dense weights follow their orthogonalized momentum, one state instead of
    Adam's two. spectron: so do pairs of B and A, by a step that bounds the change of their product."""
    factors_lr_ratio: PositiveFloat = 1.0
    """muon, spectron: learning rate of these matrices as a multiple of optim.lr and its schedule."""
    factors_scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """muon, spectron: what the learning rate is multiplied by. match_rms_adamw: 0.2·√max(m, n), which makes a learning
    rate for AdamW suitable (arXiv 2502.16982). original: what the optimizer's authors use; √max(1, m/n) for an (m, n)
    matrix with muon, and 1 with spectron."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """muon, spectron: decay rate of the momentum, which is an average of the gradients."""
    newton_schulz: Memory[Literal["bf16", "fp32"]] = "bf16"
    """muon, spectron: type of the matrix products that orthogonalize. bf16 is faster. fp32 gives the same updates with
    any engine, to about 1e-6."""
    clip: FloatOrZero = 0.0
    """Maximum global gradient norm; gradients with a larger norm are scaled down to it. 0: no clipping."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Learning-rate schedule after the warm-up. cosine, linear: a decay over the rest of the run. wsd
    (warmup-stable-decay): the peak, and a decay at the end, so that the length of a run can be chosen late
    (docs/recipes.md)."""
    warmup_steps: CountOrZero = 0
    """Updates over which the learning rate rises linearly to its peak."""
    min_lr_ratio: Fraction = 0.1
    """Final learning rate as a fraction of the peak (all schedules but constant)."""
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    """wsd: length of the decay as a fraction of the run, in updates (train.steps) or tokens (train.tokens). A decay
    over the last fifth with the shape 1-sqrt reaches the loss of a cosine (arXiv 2405.18392)."""
    decay_type: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt"
    """wsd: shape of the decay from the peak to min_lr_ratio. 1-sqrt: one minus the root of the decay's elapsed part,
    which falls fast at first."""
    update: Memory[Literal["whole", "per_layer"]] = "whole"
    """whole: one optimizer step after the backward pass. per_layer: every parameter is updated during the backward
    pass, as soon as its gradient is complete, and the gradient is freed: gradients take the memory of a few
    parameters instead of all. Not supported with zero."""
    per_layer_accumulation: Literal["keep", "refuse"] = "keep"
    """With per-layer updates and gradient accumulation. keep: gradients are accumulated (sharded if the engine shards
    them) until the last micro-batch. The result equals update=whole and takes the memory of all gradients, which the
    start-up summary states. refuse: several micro-batches per update are an error."""
    clip_mode: Literal["previous_norm", "per_parameter", "two_pass"] = "previous_norm"
    """Clipping with per-layer updates, where parameters are updated before the global norm is known. previous_norm:
    gradients are scaled by the norm of the previous update, which checkpoints contain; the first update clips as
    per_parameter does. per_parameter: each parameter's gradient norm is limited to optim.clip. two_pass: a first
    backward pass computes the norm and a second one updates, which is exact but takes twice the forward and backward
    time, and allows one micro-batch per update only."""

    @property
    def stable_ratio(self) -> float:
        """wsd: share of the run after which the decay begins, if the warm-up has ended."""
        return 1.0 - self.decay_ratio

    @property
    def passes_twice(self) -> bool:
        """Whether an update runs a backward pass for the gradient norm before the one that updates."""
        return self.update == "per_layer" and self.clip > 0 and self.clip_mode == "two_pass"


class ParallelConfig(Section):
    """The distributed engine."""

    engine: Memory[Literal["ddp", "fsdp", "zero"]] = "ddp"
    """ddp: whole replicas (a single rank needs no process group). fsdp: PyTorch's FSDP2, where each decoder layer is
    gathered separately. zero: DeepSpeed ZeRO."""
    zero_stage: Memory[Literal[1, 2, 3]] = 2
    """ZeRO stage. 1: optimizer states are sharded. 2: gradients too. 3: parameters too."""
    shard: Memory[Literal["factors", "all"]] = "factors"
    """factors: only the parameters of the replaced linear layers are sharded; embeddings, head and norms are
    replicated on every rank, and their gradients are all-reduced once per update. all: those are sharded too."""
    accumulate: Memory[Literal["auto", "local", "sharded"]] = "auto"
    """How gradients are accumulated over micro-batches. local: whole on every rank, with one reduction per update.
    sharded: reduce-scattered at every micro-batch, with less memory and more traffic. auto: local for ddp and
    zero stage 1, sharded for fsdp and zero stages 2 and 3. Only fsdp supports both."""
    replicas: Memory[Amount] = 1
    """fsdp: number of groups of ranks that each hold all shards (hybrid sharding). Shards are gathered inside a group
    of world size / replicas ranks, such as the GPUs of one host, and gradients are all-reduced between groups."""
    reshard_after_forward: Memory[bool] = True
    """fsdp: whether a decoder layer's gathered weights are freed after its forward pass and gathered again for its
    backward pass. false: they are kept, for a third less traffic and the memory of all gathered layers."""
    prefetch_blocks: Memory[PositiveInt] = 1
    """Number of decoder layers whose weights are gathered ahead of the one that computes (fsdp, and zero stage 3)."""
    cpu_offload: Memory[bool] = False
    """Whether the optimizer states are in host memory and the optimizer step runs there; with fsdp also the sharded
    parameters and gradients. Not supported with ddp."""
    deepspeed: Memory[dict[str, Any]] = {}
    """zero: additional keys of DeepSpeed's configuration, nested as there. Keys that are derived from another setting
    of this configuration are refused."""
    timeout_s: Seconds = 1800
    """Seconds after which a collective that does not complete, or a data worker that sends nothing, ends the run."""

    @property
    def keeps_whole_gradients(self) -> bool:
        """Whether the engine by default keeps whole gradients between micro-batches."""
        return self.engine == "ddp" or (self.engine == "zero" and self.zero_stage == 1)

    @property
    def accumulates_locally(self) -> bool:
        """Whether whole gradients are accumulated locally, with one reduction per update."""
        return self.keeps_whole_gradients if self.accumulate == "auto" else self.accumulate == "local"


_LOSS_CHUNK_BYTES = 64 << 20
"""Default size of a loss chunk's float32 logits; larger chunks are not faster."""


class Precision(NamedTuple):
    """Data types of a run, by torch's names.

    Attributes:
        parameter: Type of parameters and gradients, and of optimizer states with `optim.state_bits: 16`.
        product: Type of the inputs of matrix products, in which fsdp gathers the weights of decoder layers.
    """

    parameter: Literal["bfloat16", "float32"]
    product: Literal["bfloat16", "float32"]

    @property
    def is_mixed(self) -> bool:
        """Whether matrix products use another type than the parameters."""
        return self.parameter != self.product

    @property
    def parameter_bytes(self) -> int:
        """Bytes per value of a parameter."""
        return 2 if self.parameter == "bfloat16" else 4

    @property
    def product_bytes(self) -> int:
        """Bytes per value in a matrix product."""
        return 2 if self.product == "bfloat16" else 4


PRECISIONS = {
    "bf16": Precision("bfloat16", "bfloat16"),
    "fp32": Precision("float32", "float32"),
    "mixed": Precision("float32", "bfloat16"),
}
"""Precision by value of `train.dtype`."""


def _off(value: object) -> object:
    """Returns off for false: YAML reads the bare word off as false."""
    return "off" if value is False else value


class TrainConfig(Section):
    """The training loop."""

    steps: PositiveInt | None = None
    """Number of updates. Exactly one of steps and tokens must be set."""
    tokens: PositiveInt | None = None
    """Number of non-padding tokens to train on; the run ends with the update that reaches it."""
    micro_batch: Memory[Amount] = 8
    """Sequences per rank and micro-batch."""
    global_batch: Memory[Amount] = 512
    """Sequences per update, over all ranks and micro-batches."""
    dtype: Memory[Literal["bf16", "fp32", "mixed"]] = "bf16"
    """Data types, the same under every engine. bf16, fp32: the type of parameters, gradients, activations and
    optimizer states; the paper uses bf16 without fp32 copies. mixed: parameters, gradients and states in fp32, matrix
    products in bf16 (autocast; fsdp also gathers the weights in bf16, and reduces gradients in fp32)."""
    activation_checkpointing: Memory[Literal["none", "full", "selective"]] = "none"
    """Which activations are recomputed in the backward pass instead of kept. full: all inside every decoder layer.
    selective: those that checkpoint_policy selects."""
    checkpoint_policy: Memory[Literal["blocks", "attention", "ops"]] = "blocks"
    """With activation_checkpointing=selective, what is recomputed. blocks: every checkpoint_every-th decoder layer.
    attention: in every decoder layer, all but the output of attention itself, whose cost grows with the square of
    seq_len. ops: in every decoder layer, all but the outputs of attention and of the linear layers, so that no
    matrix product is computed twice; between none and attention in memory, and little slower than none."""
    checkpoint_every: Memory[Annotated[int, Field(ge=2)]] = 2
    """With checkpoint_policy=blocks: one in this many decoder layers is recomputed."""
    loss_chunk_tokens: Memory[CountOrZero | None] = None
    """Tokens per chunk in which head and loss are computed, forward and backward, so that only one chunk's logits
    exist at a time. Null: as many as fit in 64 MiB of float32 logits (524 at a vocabulary of 32,000). 0: all at
    once, as plain modules do, which keeps several tensors of tokens x vocabulary."""
    compile: bool = False
    """Whether each decoder layer is compiled separately with torch.compile, before the engine wraps it."""
    spike: Annotated[Literal["off", "skip", "rewind"], BeforeValidator(_off)] = "off"
    """What happens after a spike: an update whose loss or gradient norm is not finite, or lies more than
    spike_threshold spreads above the median of the last spike_window updates. off: a value that is not finite ends the
    run, others are not noticed. skip: the update is not made, and counts as one; not with optim.update=per_layer, where
    it is made before its norm is known. rewind: the run goes back to its newest checkpoint at a multiple of
    checkpoint.every, and goes on with the data behind the spike; before the first such checkpoint, it skips."""
    spike_window: Annotated[int, Field(ge=16)] = 128
    """Updates whose losses and gradient norms say what is usual; until there are as many, only values that are not
    finite are spikes. Skipped updates are not among them."""
    spike_threshold: Annotated[float, Field(gt=0)] = 8.0
    """Spreads above the median from which a value is a spike. A spread is 1.4826 times the median absolute deviation,
    which for normal values is their standard deviation, and at least 1 % of the median."""
    spike_limit: CountOrZero = 8
    """Most spikes in a row, without an update beyond the furthest so far; one more ends the run (exit code 4)."""
    sanity_checks: bool = False
    """Whether to check after every update, at some cost, that replicas are in sync, gradients are freed, the learning
    rate is as scheduled, and the supports are unchanged."""
    dry_run: bool = False
    """Whether to only build everything, make one update on random data, report the peak memory and stop."""

    @property
    def precision(self) -> Precision:
        """The data types that `dtype` stands for."""
        return PRECISIONS[self.dtype]

    def is_recomputed(self, index: int) -> bool:
        """Whether decoder layer number `index` recomputes its activations, all or all but some outputs."""
        if self.activation_checkpointing == "selective" and self.checkpoint_policy == "blocks":
            return index % self.checkpoint_every == 0
        return self.activation_checkpointing != "none"

    @property
    def keeps_attention(self) -> bool:
        """Whether recomputed decoder layers keep the output of attention."""
        return self.activation_checkpointing == "selective" and self.checkpoint_policy in ("attention", "ops")

    @property
    def keeps_products(self) -> bool:
        """Whether recomputed decoder layers also keep the outputs of their linear layers."""
        return self.activation_checkpointing == "selective" and self.checkpoint_policy == "ops"

    def chunk_tokens(self, vocab_size: int) -> int:
        """Tokens per chunk of the loss; 0 for the whole micro-batch at once."""
        chosen = self.loss_chunk_tokens
        return chosen if chosen is not None else max(1, _LOSS_CHUNK_BYTES // (4 * vocab_size))


class EvalConfig(Section):
    """Evaluation during training: mean loss over a fixed set of tokens."""

    source: Memory[str | list[str] | None] = None
    """Evaluation documents, written as in data.source. Null: no evaluation."""
    subset: str | None = None
    """Configuration of a Hub dataset."""
    split: str = "validation"
    """Split of a Hub dataset, of a directory, or of the embedded corpus. Files and globs have no splits."""
    every: CountOrZero = 1000
    """Updates between evaluations. 0: only before the first and after the last update."""
    tokens: PositiveInt = 10_000_000
    """Non-padding tokens to evaluate on, in the order of the files; fewer if the source has fewer."""
    micro_batch: Memory[Amount | None] = None
    """Sequences per rank and forward pass. Null: the value of train.micro_batch."""
    samples: list[str] = []
    """Prompts that are continued at every evaluation, always by the most probable token, for a person to read: in the
    log, in samples.jsonl, and as a file of the MLflow run. Losses do not change."""
    sample_tokens: PositiveInt = 32
    """Most tokens of such a continuation; also limited by data.seq_len, which prompt and continuation must fit into.
    Each token takes a forward pass over the prompts, of which eval.micro_batch are continued together."""


class CheckpointConfig(Section):
    """Saving of checkpoints, and resuming from them."""

    every: CountOrZero = 1000
    """Updates between checkpoints. 0: only one at the end."""
    keep: PositiveInt = 3
    """Number of newest checkpoints to keep; older ones are deleted once a newer one is complete."""
    keep_every: CountOrZero = 0
    """Updates between checkpoints that are never deleted, in addition to the newest: one is saved at every multiple.
    0: none, so that a run that diverges unnoticed may have no checkpoint from before."""
    resume: str = "auto"
    """auto: resume from the newest complete checkpoint in run_dir, if there is one. never: start from scratch, and
    refuse a run_dir that has checkpoints. Otherwise the path of a checkpoint, or of a run_dir (its newest one). With
    a checkpoint of this run_dir, the run goes back to it and later ones are set aside. With one of another run, this
    run starts from it, and later restarts resume from its own checkpoints."""
    init_from: str | None = None
    """A checkpoint, or a run_dir (its newest one), whose weights a new run starts from, with a new optimizer, schedule,
    data order and step count. Between methods, the linear layers are converted (not to or from cola). A run
    that resumes ignores it. Null: random initial values."""


class TrackingConfig(Section):
    """Progress, metrics and experiment tracking."""

    log_every: PositiveInt = 10
    """Updates between two lines of metrics.jsonl and of the log."""
    progress: Literal["auto", "bar", "lines"] = "auto"
    """bar: a live progress bar. lines: plain lines. auto: a bar on a terminal, otherwise lines."""
    mlflow: bool = True
    """Whether to track with MLflow. A tracker that fails is reported once and never stops training."""
    mlflow_uri: str | None = None
    """URI of the MLflow tracking server. Null: $MLFLOW_TRACKING_URI, or if unset the SQLite file run_dir/mlflow.db."""
    experiment: str | None = None
    """MLflow experiment. Null: $MLFLOW_EXPERIMENT_NAME or $MLFLOW_EXPERIMENT_ID, or if unset, sltrain."""
    run_name: str | None = None
    """MLflow run name. Null: the name of run_dir."""
    mlflow_parent: str | None = None
    """Id of the MLflow run that this one is shown under, as the runs of `sltrain study` are. Null: none."""


class Config(Section):
    """The configuration of a run."""

    preset: str | None = None
    """Name of a preset whose values replace the defaults (see config/presets.py)."""
    run_dir: str = "runs/default"
    """Directory of everything that the run writes. Every rank needs read and write access."""
    seed: CountOrZero = 0
    """Seed of the initialization, the supports and the data order."""
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
    def support_seed(self) -> int:
        """Seed of the positions of S, with the default of a new run resolved."""
        return self.seed if self.reparam.support_seed is None else self.reparam.support_seed

    def with_supports_of(self, before: Config) -> Config:
        """Returns this configuration with the support seed of an earlier run, unless it names one itself.

        Without supports in one of the two runs, it is returned unchanged.
        """
        methods = {self.reparam.method, before.reparam.method}
        if methods != {"sltrain"} or self.reparam.support_seed is not None or before.support_seed == self.seed:
            return self
        reparam = self.reparam.model_copy(update={"support_seed": before.support_seed})
        return self.model_copy(update={"reparam": reparam})

    @property
    def eval_micro_batch(self) -> int:
        """Sequences per rank and forward pass in evaluation."""
        return self.eval.micro_batch or self.train.micro_batch
