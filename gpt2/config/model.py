"""The shape of a model, and the shapes that have names."""

from dataclasses import dataclass

from gpt2.config.words import nearest_multiples


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model; saved with it."""

    n_layer: int
    n_head: int
    n_embd: int  # channels; a multiple of n_head
    block_size: int = 1024  # longest context, tokens
    vocab_size: int = 50257
    dropout: float = 0.0  # on the embeddings and on what each sublayer adds; 0 for pretraining
    bias: bool = True  # biases in linear layers and layer norms, as GPT-2 has them

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}; the nearest are "
                f"{nearest_multiples(self.n_embd, self.n_head)}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: whole tensor-core tiles and 16-byte rows of logits.

        50257 becomes 50304. The padding is zero, stays zero, and is never seen outside the model.
        """
        multiple = 128 if self.vocab_size > 1024 else 8
        return -(-self.vocab_size // multiple) * multiple


PRESETS: dict[str, GPTConfig] = {
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),  # 124M
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),  # 350M
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),  # 1558M
    # The depths and widths of Eldan and Li, TinyStories (2023); their names do not count
    # embeddings.
    "tinystories-1m": GPTConfig(n_layer=8, n_head=4, n_embd=64, block_size=512),
    "tinystories-8m": GPTConfig(n_layer=8, n_head=8, n_embd=256, block_size=512),
    "tinystories-28m": GPTConfig(n_layer=8, n_head=8, n_embd=512, block_size=512),
    "tinytiny": GPTConfig(n_layer=6, n_head=10, n_embd=640),  # 62M, half of gpt2
    # nanoGPT's CPU recipe for characters; vocab_size is that of tiny Shakespeare.
    "char": GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65, bias=False),
}
