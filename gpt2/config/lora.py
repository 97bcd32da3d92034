"""Options of LoRA."""

from dataclasses import dataclass

from gpt2.config.words import suggest

# The linear layers of a block, and the names by which one or two of them are meant. A name means
# the layers that end with it, as in peft: c_proj is both projections.
LORA_LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
LORA_TARGETS = ("c_attn", "c_proj", "c_fc", *LORA_LAYERS)


@dataclass(frozen=True)
class LoRAConfig:
    """The adapters of a model: y = W x + b + (alpha / rank) B A dropout(x) in each target."""

    rank: int = 8  # inner dimension of the update, A (rank, in) and B (out, rank)
    alpha: float = 16.0  # scale of the update, times 1 / rank
    dropout: float = 0.0  # on what A sees, in training
    targets: tuple[str, ...] = ("c_attn", "c_proj", "c_fc")  # the layers that get adapters

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"lora rank must be at least 1, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"lora alpha must be above 0, got {self.alpha}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"lora dropout must lie in [0, 1), got {self.dropout}")
        if not self.targets:
            raise ValueError(f"lora targets are empty: use some of {', '.join(LORA_TARGETS)}")
        for target in self.targets:
            if target not in LORA_TARGETS:
                raise ValueError(f"unknown lora target {target!r}: {suggest(target, LORA_TARGETS)}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def layers(self) -> tuple[str, ...]:
        """The linear layers of a block that are meant, in the block's order."""
        return tuple(
            layer for layer in LORA_LAYERS if any(layer.endswith(target) for target in self.targets)
        )


@dataclass(frozen=True)
class LoRAOptions:
    """The options that fine-tuning runs share; mixed into their configs."""

    lora_rank: int = 0  # rank of the adapters; 0: none, all weights are trained
    lora_alpha: float = 16.0  # the adapters' update is scaled by lora_alpha / lora_rank
    lora_dropout: float = 0.0  # on what the adapters see, in training
    # The layers that get adapters: some of c_attn, c_proj (both), c_fc, attn.c_proj, mlp.c_proj.
    lora_targets: tuple[str, ...] = ("c_attn", "c_proj", "c_fc")

    @property
    def lora(self) -> LoRAConfig | None:
        """The adapters that are asked for."""
        if self.lora_rank == 0:
            return None
        return LoRAConfig(self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_targets)

    def check_lora(self) -> None:
        """Raises ValueError for options that are out of range, or would be ignored."""
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must not be negative, got {self.lora_rank}")
        for name in ("lora_alpha", "lora_dropout", "lora_targets"):
            if not self.lora_rank and getattr(self, name) != getattr(LoRAOptions, name):
                raise ValueError(f"{name} goes with adapters: set lora_rank, for instance to 8")
        _ = self.lora  # has checks of its own
