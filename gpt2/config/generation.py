"""Options of generation and of the scripts that generate: sample, chat, compare."""

from dataclasses import dataclass

from gpt2.config.words import Kernels


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


class _Sampled:
    """For configs with fields of Sampling's names."""

    def sampling(self) -> Sampling:
        return Sampling(
            self.repetition_penalty, self.temperature, self.top_k, self.top_p, self.min_p
        )

    def __post_init__(self):
        self.sampling()  # checks the values
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")


@dataclass(frozen=True)
class SampleConfig(_Sampled):
    """Options of scripts/sample.py."""

    model: str  # a run folder, a checkpoint, a Hugging Face folder or name (gpt2, gpt2-medium, ...)
    prompt: tuple[str, ...] = ("\n",)  # one or more; they are generated as one batch
    # Instead of prompt: a UTF-8 file, one prompt a line, or with blank lines between prompts.
    prompt_file: str = ""
    template: str = "auto"  # chat template of a prompt; auto: the model's, if it has one; or none
    num_samples: int = 1  # of each prompt
    max_new_tokens: int = 200
    temperature: float = 0.8  # 0 takes the most likely token always
    top_k: int | None = None  # keep only this many of the most likely tokens
    top_p: float | None = None  # keep the most likely tokens that together reach this probability
    min_p: float | None = None  # keep tokens at least so many times as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: tokens that have occurred become less likely
    stop: tuple[str, ...] = ()  # end before any of these texts
    # Print each row's log probability to stderr: the model's own, before the options above.
    log_probabilities: bool = False
    seed: int | None = None  # the same seed gives the same text
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    kernels: Kernels = "auto"  # triton, torch; auto: triton where it runs


@dataclass(frozen=True)
class ChatConfig(_Sampled):
    """Options of scripts/chat.py."""

    model: str  # a run folder, a checkpoint, a Hugging Face folder or name
    system: str = ""  # what stands before the conversation
    template: str = "auto"  # auto: the one saved with the model; or the name of one
    max_new_tokens: int = 256  # of an answer
    temperature: float = 0.7  # 0 takes the most likely token always
    top_k: int | None = None  # keep only this many of the most likely tokens
    top_p: float | None = 0.95  # keep the most likely tokens that together reach this probability
    min_p: float | None = None  # keep tokens at least so many times as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: tokens that have occurred become less likely
    seed: int | None = None  # the same seed and questions give the same answers
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    kernels: Kernels = "auto"  # triton, torch; auto: triton where it runs


@dataclass(frozen=True)
class CompareConfig(_Sampled):
    """Options of scripts/compare.py."""

    models: tuple[str, ...]  # run folders, checkpoints, Hugging Face folders or names
    prompts: str = "prompts.txt"  # UTF-8: one prompt a line, or with blank lines between prompts
    out: str = "compare"  # writes OUT.md and OUT.html
    system: str = ""  # what stands before a prompt, for models with a chat template
    max_new_tokens: int = 128
    batch_size: int = 8  # prompts that are generated together
    temperature: float = 0.0  # 0 takes the most likely token always
    top_k: int | None = None  # keep only this many of the most likely tokens
    top_p: float | None = None  # keep the most likely tokens that together reach this probability
    min_p: float | None = None  # keep tokens at least so many times as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: tokens that have occurred become less likely
    seed: int = 0  # prompt number i has the seed SEED + i with every model
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    kernels: Kernels = "auto"  # triton, torch; auto: triton where it runs

    def __post_init__(self):
        super().__post_init__()
        if not self.models:
            raise ValueError("models: give at least one")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
