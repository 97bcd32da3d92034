"""How the next token is chosen from a model's logits."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """Options of gpt2.generate, applied in the order in which they stand below, as transformers
    does; temperature 0 needs none after it.
    """

    repetition_penalty: float = 1.0  # divides positive, multiplies negative logits of seen tokens
    temperature: float = 1.0  # divides the logits; 0 takes the most likely token always
    top_k: int | None = None  # keeps only this many of the most likely tokens, and their equals
    top_p: float | None = None  # keeps the most likely tokens that together reach this probability
    min_p: float | None = None  # keeps tokens at least so many times as likely as the likeliest

    def __post_init__(self):
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if value is not None and not 0.0 < value <= 1.0:
                raise ValueError(f"{name} must lie in (0, 1], got {value}")
