"""How the published code uses memory (no torch): an emulation, to predict the paper's *measured* Figure 3.

It follows the code that the authors published with arXiv 2406.02214 (one GPU, bf16), and GaLore's (arXiv 2403.03507),
on which it builds: an eager LLaMA with unfused norms, attention without a fused kernel, all logits at once; W built
whole in both passes and a dense gradient for every layer; A·alpha/r kept as a tensor of its own from the forward to
the backward pass; int64 positions; torch's Adam with its multi-tensor step, or the 8-bit Adam of bitsandbytes. No
constant is fitted: each is a property of that code or of a library that it calls, named where it stands.
"""

from __future__ import annotations

from dataclasses import dataclass

from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError
from sltrain_dist.memory.result import Estimate, Phase, Point
from sltrain_dist.models.count import LinearShape, block_linears, count_parameters, model_flops_per_token
from sltrain_dist.optim.state_layout import QUANTIZED_FROM
from sltrain_dist.sparse_lowrank.layout import nonzeros

BF16, FP32, INT64 = 2, 4, 8

RELATIVE_ERROR = 0.1
"""Of the emulation; the four 7B bars of Figure 3 are within it (docs/planner_search.md)."""

ADAM8BIT_BLOCK = 2048
"""Values that share a float32 scale in bitsandbytes' block-wise optimizers before its version 0.45 (of 2024)."""

NORM_VALUE_BYTES = FP32 + BF16 + BF16
"""Kept by a norm for a value: its float32 copy (for the square), the bf16 input (for the product with the root), and
the normalized bf16 value (for the product with the weight). LlamaRMSNorm in eager mode."""

LOGIT_COPIES_FORWARD = 3
"""bf16 tensors of tokens × vocabulary at the end of the forward pass: logits, their shifted copy, log-softmax."""

LOGIT_COPIES_BACKWARD = 3
"""And at the start of the backward pass: log-softmax, its gradient, and the gradient of the shifted copy."""

SVD_COPIES = 2
"""float32 copies of a gradient beside U and V in GaLore's projector: `.float()`, and the column-major copy that
torch.linalg.svd makes because cuSOLVER overwrites its input. cuSOLVER's own workspace is not documented: left out."""


def reference_estimate(config: Config) -> Estimate:
    """What the published code takes for a configuration, on one GPU.

    Methods: full and galore (with or without 8-bit states, per layer or not) and sltrain. `train.micro_batch` and
    `data.seq_len` count; accumulation holds gradients only with whole updates, because its per-layer updates step at
    every micro-batch. Engine, supports and paths are settings of this code, and do not.

    Raises:
        ConfigError: The published code has no such setting.
    """
    _check(config)
    return Estimate(
        timeline=tuple(_Run(config).points()),
        reserved_bytes=0,  # the paper's figures are of allocated tensors
        parameters=count_parameters(config.model, config.reparam).total,
        flops_per_token=_flops_per_token(config),
        comm_bytes_per_update=0,
        relative_error=RELATIVE_ERROR,
        method="reference emulation",
    )


def _check(config: Config) -> None:
    refused = (
        ("reparam.method", config.reparam.method in ("lowrank", "relora"), "full, galore or sltrain"),
        ("reparam.support", config.reparam.method == "sltrain" and config.reparam.support != "random", "random"),
        ("train.dtype", config.train.dtype != "bf16", "bf16"),
        ("train.activation_checkpointing", config.train.activation_checkpointing != "none", "none"),
        ("optim.name", config.optim.name not in ("adam", "adamw"), "adam or adamw"),
        ("optim.state_bits", config.optim.state_bits not in (16, 8), "16 (torch's Adam) or 8 (bitsandbytes)"),
        ("optim.master_weights", config.optim.master_weights, "false"),
        ("optim.update", config.optim.update == "per_layer" and config.optim.state_bits != 8, "whole, or state_bits=8"),
        ("model.num_kv_heads", config.model.kv_heads != config.model.num_heads, "null"),
        ("model.tie_head", config.model.tie_head, "false"),
    )
    wrong = [f"{key}: the published code has no such setting; set {remedy}" for key, bad, remedy in refused if bad]
    if wrong:
        raise ConfigError("\n".join(f"--implementation reference: {line}" for line in wrong))


@dataclass(frozen=True)
class _Activations:
    """Bytes that autograd keeps, by kind, of one block and of what follows the last block."""

    block: dict[str, int]
    head: dict[str, int]


class _Run:
    """One update of the published code, moment by moment."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.tokens = config.train.micro_batch * config.data.seq_len
        self.linears = block_linears(config.model)
        self.per_layer = config.optim.update == "per_layer"
        self.parameters = self._parameters()
        self.lasting = {**self.parameters, **self._states()}
        self.kept = self._activations()

    def points(self) -> list[Point]:
        """In the order of time."""
        config, h, vocab = self.config, self.config.model.hidden_size, self.config.model.vocab_size
        layers, logits = config.model.num_layers, BF16 * self.tokens * vocab
        head = BF16 * vocab * h
        trained = sum(size for name, size in self.parameters.items() if name != "index")
        in_blocks = trained - 2 * head - BF16 * h
        accumulates = not self.per_layer and config.train.global_batch > config.train.micro_batch
        waiting = trained if accumulates else 0

        points = [
            Point("init", "model and states are there", self.lasting),
            self._point(
                "forward",
                "loss",
                blocks=layers,
                gradients=waiting,
                temporaries={"logits": (LOGIT_COPIES_FORWARD - 1) * logits},
            ),
            self._point(
                "backward",
                "loss",
                blocks=layers,
                gradients=waiting,
                temporaries={"logits": (LOGIT_COPIES_BACKWARD - 1) * logits},
            ),
            self._point("backward", "lm_head", blocks=layers, gradients=waiting + head, temporaries={"logits": logits}),
        ]
        widest = self.linears[-1]  # down_proj, which comes first in the backward pass: all of its block is kept still
        for block in reversed(range(layers)):
            done = 0 if self.per_layer or accumulates else head + in_blocks * (layers - 1 - block) // layers
            gradients, temporaries = self._layer_backward(widest)
            points.append(
                self._point(
                    "backward",
                    f"block {block}, {widest.name}",
                    blocks=block + 1,
                    gradients=waiting + done + gradients,
                    temporaries=temporaries,
                )
            )
        done = 0 if self.per_layer or accumulates else trained - head
        points.append(self._point("backward", "embed_tokens", gradients=waiting + done + head))
        if not self.per_layer:
            points.append(
                self._point("update", "gradient norm", gradients=trained, temporaries={"gradient copy": head})
            )
            points.append(self._point("update", "step", gradients=trained, temporaries=self._step(trained)))
        return points

    def _point(
        self,
        phase: Phase,
        where: str,
        *,
        blocks: int = 0,
        gradients: int = 0,
        temporaries: dict[str, int] | None = None,
    ) -> Point:
        """The lasting bytes, activations of the first `blocks` blocks (all: of the head too), and what is given."""
        components = {**self.lasting, "gradients": gradients, **self._batch()}
        for kind, size in self.kept.block.items():
            components[f"activations.{kind}"] = blocks * size
        if blocks == self.config.model.num_layers:
            for kind, size in self.kept.head.items():
                components[f"activations.{kind}"] = components.get(f"activations.{kind}", 0) + size
        for kind, size in (temporaries or {}).items():
            components[f"temporaries.{kind}"] = size
        return Point(phase, where, {name: size for name, size in components.items() if size})

    def _parameters(self) -> dict[str, int]:
        counted = count_parameters(self.config.model, self.config.reparam)
        return {
            "factors": BF16 * counted.factors,
            "sparse_values": BF16 * counted.sparse,
            "index": INT64 * counted.sparse,  # torch.randperm's type
            "dense": BF16 * (counted.remainder + counted.dense),
        }

    def _states(self) -> dict[str, int]:
        """Adam's two moments, of projected gradients with GaLore, and its projectors in the parameters' type."""
        model, reparam = self.config.model, self.config.reparam
        whole = [model.vocab_size * model.hidden_size] * 2 + [model.hidden_size] * (2 * model.num_layers + 1)
        in_block, projector = [], 0
        for linear in self.linears:
            m, n, r = linear.m, linear.n, reparam.rank
            if reparam.method == "galore":
                in_block.append(r * max(m, n))
                projector += r * min(m, n)
            elif reparam.method == "full":
                in_block.append(m * n)
            else:
                in_block += [m * r, r * n, nonzeros(m, n, reparam.density)]
        moments = sum(map(self._moments, whole)) + model.num_layers * sum(map(self._moments, in_block))
        return {"states": moments, "states.projectors": BF16 * model.num_layers * projector}

    def _moments(self, count: int) -> int:
        """Both moments of a parameter; with 8 bits those of small ones stay float32, a rule that we took over."""
        if self.config.optim.state_bits == 16:
            return 2 * BF16 * count
        if count < QUANTIZED_FROM:
            return 2 * FP32 * count
        return 2 * (count + FP32 * -(-count // ADAM8BIT_BLOCK))

    def _activations(self) -> _Activations:
        model, tokens = self.config.model, self.tokens
        h, f, d = model.hidden_size, model.intermediate_size, model.head_dim
        norm = (NORM_VALUE_BYTES * h + FP32) * tokens  # with the root of each token's mean square
        # Attention without a fused kernel keeps scaled q and k, v, the weights of all pairs, and the rotation's
        # cosine and sine, which every block gathers for itself; o_proj its input.
        pairs = model.num_heads * tokens * self.config.data.seq_len
        block = {
            "norms": 2 * norm,
            "attention": BF16 * (4 * tokens * h + pairs + 2 * tokens * d),
            "mlp": BF16 * 4 * tokens * f,  # gate, silu(gate), up, and the input of down_proj
            "linear inputs": BF16 * 2 * tokens * h,  # one for q, k and v, one for gate and up
        }
        if self.config.reparam.method == "sltrain":
            block["scaled factors"] = BF16 * sum(self.config.reparam.rank * linear.n for linear in self.linears)
        head = {"norms": norm, "linear inputs": BF16 * tokens * h, "logits": BF16 * tokens * model.vocab_size}
        return _Activations(block, head)

    def _layer_backward(self, linear: LinearShape) -> tuple[int, dict[str, int]]:
        """(bytes of a layer's gradients, its temporaries) at their most."""
        m, n, reparam = linear.m, linear.n, self.config.reparam
        weight, k = BF16 * m * n, min(m, n)
        flowing = BF16 * self.tokens * (2 * m + n)  # of the residual stream, the output and the input
        if reparam.method == "sltrain":
            gradients = BF16 * (reparam.rank * (m + n) + nonzeros(m, n, reparam.density))
            return gradients, {"rebuilt weight": weight, "dense gradient": weight, "flowing gradients": flowing}
        temporaries = {"flowing gradients": flowing}
        if reparam.method == "galore" and self.per_layer:
            temporaries["svd"] = self._svd(m, n, k)
        return weight, temporaries

    def _step(self, trained: int) -> dict[str, int]:
        """Temporaries of a whole update."""
        if self.config.reparam.method == "galore":  # parameter by parameter
            widest = max(self.linears, key=lambda linear: linear.m * linear.n)
            return {"svd": self._svd(widest.m, widest.n, min(widest.m, widest.n))}
        if self.config.optim.state_bits == 8:
            return {}  # one kernel, in place
        # torch.optim.Adam's default on CUDA: _foreach_sqrt makes the roots of all second moments at once.
        return {"optimizer": trained}

    @staticmethod
    def _svd(m: int, n: int, k: int) -> int:
        return FP32 * (SVD_COPIES * m * n + k * (m + n))

    def _batch(self) -> dict[str, int]:
        """Token ids, labels and padding mask in int64, and the causal mask, which is built and not used."""
        return {"batch": 3 * INT64 * self.tokens + BF16 * self.tokens * self.config.data.seq_len}


def _flops_per_token(config: Config) -> int:
    """Those of the dense model; for sltrain W built twice, dB and dA; for GaLore the projections, without its SVD."""
    model, reparam = config.model, config.reparam
    dense = model_flops_per_token(model, config.data.seq_len)
    products = {"full": 0, "galore": 2, "sltrain": 4}[reparam.method]  # of 2·m·n·r each, in every pass
    extra = products * 2 * reparam.rank * model.num_layers * sum(s.m * s.n for s in block_linears(model))
    return dense + extra // (config.train.micro_batch * config.data.seq_len)
