"""A model with its tokenizer and chat template: what sample, chat and compare have in common."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from gpt2.checkpoint import (
    best_checkpoint,
    load_chat_template,
    load_model,
    load_tokenizer,
    read_checkpoint,
)
from gpt2.cli import complain
from gpt2.data.chat import Message, check_messages, encode_prompt, find_template
from gpt2.device import select_device
from gpt2.generate import Completion, complete
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer

DEFAULT_TEMPLATE = "user_assistant"


@dataclass
class Assistant:
    """template: the name of a chat template, or None: a prompt is text to be continued.

    The model is loaded when it is first used.
    """

    name: str
    tokenizer: Tokenizer
    template: str | None
    load: Callable[[], GPT]
    dtype: str = "auto"  # of matmuls, as in gpt2.device.execution

    @cached_property
    def model(self) -> GPT:
        return self.load()

    @property
    def block_size(self) -> int:
        return self.model.config.block_size

    @property
    def markers(self) -> tuple[str, ...]:
        """What no question and no answer may hold; whoever writes one has ended the turn."""
        return () if self.template is None else find_template(self.template).markers

    def complete(self, prompts: list[list[int]], **options) -> list[Completion]:
        """gpt2.generate.complete, up to an end of text."""
        stop_tokens = () if self.tokenizer.eot is None else (self.tokenizer.eot,)
        return complete(self.model, prompts, stop_tokens=stop_tokens, dtype=self.dtype, **options)

    def encode(self, prompt: str, system: str = "") -> list[int]:
        """A prompt as the template has a question, or as it is; needs no model."""
        if self.template is None:
            return self.tokenizer.encode(prompt, allow_special=True)
        messages = [*_system(system), {"role": "user", "content": prompt}]
        return encode_prompt(messages, self.tokenizer, self.template)

    def check_room(self, tokens: list[int], words: str) -> None:
        """Raises ValueError where a prompt leaves no room in the context."""
        if len(tokens) >= self.block_size:
            raise ValueError(
                f"{self.name}: {words} has {len(tokens)} tokens, which leaves no room in the "
                f"model's context (block_size) of {self.block_size}: shorten it"
            )


def load_assistant(
    name: str, *, device: str = "auto", kernels: str = "auto", template: str = "auto",
    dtype: str = "auto",
) -> Assistant:  # fmt: skip
    """template: "auto" takes the one that was saved with the model, "none" none.

    Raises OSError and ValueError as load_tokenizer does, and ValueError for an unknown template.
    """
    chosen = load_chat_template(name) if template == "auto" else template
    chosen = None if template == "none" else chosen
    if chosen is not None:
        find_template(chosen)
    best = best_checkpoint(name)
    if best is not None and best != (newest := read_checkpoint(name).path):
        complain(f"{newest}, the newest of {name}; the best by val loss is {best.name}")
    load = lambda: load_model(name, select_device(device), kernels)  # noqa: E731
    return Assistant(name, load_tokenizer(name), chosen, load, dtype)


@dataclass
class Conversation:
    """The turns of a chat, as many of the latest as fit the model's context."""

    assistant: Assistant  # with a template
    system: str = ""
    messages: list[Message] = field(default_factory=list)  # user and assistant in turn

    def ask(self, question: str, max_new_tokens: int) -> tuple[list[int], int]:
        """Adds a question; returns the prompt and how many of the oldest turns were dropped.

        They are dropped until max_new_tokens fit, or half of the context if that is less. Raises
        ValueError, and leaves the conversation as it was, for a question that is empty, holds a
        marker of the template, or leaves no room even alone.
        """
        answered = self.messages[: len(self.messages) // 2 * 2]  # without a question left open
        messages = [*answered, {"role": "user", "content": question}]
        assistant, size = self.assistant, self.assistant.block_size
        encode = lambda: encode_prompt(  # noqa: E731
            [*_system(self.system), *messages], assistant.tokenizer, assistant.template
        )
        while len(tokens := encode()) + min(max_new_tokens, size // 2) > size and messages[1:]:
            messages = messages[2:]
        assistant.check_room(tokens, "the question with template and system text")
        self.messages = messages
        return tokens, (len(answered) + 1 - len(messages)) // 2

    def answer(self, text: str) -> None:
        """Adds the answer up to a marker, if there is one; an empty one removes its question."""
        for marker in self.assistant.markers:
            text = text.partition(marker)[0]
        if text.strip():
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()

    def set_system(self, text: str) -> None:
        """Raises ValueError where it holds a marker of the template."""
        probe = [*_system(text), {"role": "user", "content": "?"}]
        check_messages(probe, self.assistant.template)
        self.system = text


def _system(text: str) -> list[Message]:
    return [{"role": "system", "content": text}] if text.strip() else []
