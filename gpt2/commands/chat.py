"""A chat with a model in the terminal.

    gpt2-triton chat runs/alpaca
    gpt2-triton chat runs/alpaca --temperature 0 --system "You answer in one sentence."

The model should have been fine-tuned on conversations (`gpt2-triton sft`), whose template comes
with it. The answer is written as it is made; Ctrl-C stops it, Ctrl-D or /quit leaves, /help lists
the other commands. Where the conversation outgrows the model's context its oldest turns are
dropped. Questions may come from a pipe, one a line.
"""

import dataclasses
import sys

from gpt2.cli import parse, printable, starting
from gpt2.options import ChatConfig
from gpt2.text import RowTexts

HELP = """\
/reset         forget the conversation
/temp X        temperature; 0 takes the most likely token always
/top_p X       keep the most likely tokens that together reach probability X
/system TEXT   what stands before the conversation, which begins anew; none without TEXT
/help          this list
/quit          leave, as Ctrl-D; Ctrl-C only stops an answer"""


class Chat:
    def __init__(self, config: ChatConfig, conversation):
        self.config, self.conversation = config, conversation
        self.turns = 0  # asked so far; each has a seed of its own

    def command(self, line: str) -> bool:
        """Carries out a line that begins with /; False to leave. Raises ValueError."""
        name, _, value = line.partition(" ")
        match name:
            case "/quit" | "/exit":
                return False
            case "/help":
                note(HELP)
            case "/reset":
                self.conversation.messages.clear()
                note("the conversation is forgotten")
            case "/temp" | "/top_p":
                option = "temperature" if name == "/temp" else "top_p"
                try:
                    number = float(value)
                except ValueError:
                    raise ValueError(f"{name} needs a number, got {value!r}") from None
                self.config = dataclasses.replace(self.config, **{option: number})
                note(f"{option} {number}")
            case "/system":
                self.conversation.set_system(value.strip())
                self.conversation.messages.clear()
                note("the conversation begins anew")
            case _:
                raise ValueError(f"unknown command {name!r}: /help lists them")
        return True

    def ask(self, question: str) -> None:
        """Writes the answer as it grows; Ctrl-C stops it, and what there is of it counts."""
        config, assistant = self.config, self.conversation.assistant
        prompt, dropped = self.conversation.ask(question, config.max_new_tokens)
        if dropped:
            note(f"the oldest turns do not fit the context any more and went: {dropped}")
        room = assistant.block_size - len(prompt)
        show = lambda row, text: print(printable(text), end="", flush=True)  # noqa: E731
        texts = RowTexts(assistant.tokenizer, assistant.markers, show)
        seed = None if config.seed is None else config.seed + self.turns
        self.turns += 1
        try:
            [row] = assistant.complete(
                [prompt], max_new_tokens=min(config.max_new_tokens, room), sampling=config,
                stop=texts, seed=seed,
            )  # fmt: skip
            end = "" if row.reason == "stop" else "cut: the context is full"
            if end and room >= config.max_new_tokens:
                end = f"cut after {config.max_new_tokens} tokens (--max_new_tokens)"
        except KeyboardInterrupt:
            end = "stopped"
        texts.finish()
        print(flush=True)
        [answer] = texts.texts(1)
        self.conversation.answer(answer)
        for words in (end, "" if answer.strip() else "no answer; the question is forgotten"):
            if words:
                note(words)


def note(text: str) -> None:
    print(f"({text})" if "\n" not in text else text, file=sys.stderr, flush=True)


def read_line() -> str | None:
    """A line without the white space around it; None at the end of the input."""
    is_terminal = sys.stdin.isatty()
    while True:
        try:
            return input("> " if is_terminal else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            print()
            note("leave with /quit or Ctrl-D")
        except UnicodeDecodeError as error:
            words = f"the input is not UTF-8 text: {error.reason}"
            if not is_terminal:  # what stood in the same block is lost
                raise ValueError(words) from None
            note(words)


def main() -> None:
    with starting():
        config = parse(ChatConfig, __doc__)
        if sys.stdin is None:
            raise ValueError("chat reads its questions from standard input, which is closed")
        from gpt2.assistant import DEFAULT_TEMPLATE, Conversation, load_assistant
        from gpt2.generate import evaluating
    assistant = load_assistant(
        config.model, device=config.device, kernels=config.kernels, dtype=config.dtype,
        template=config.template,
    )  # fmt: skip
    if assistant.template is None:
        assistant.template = DEFAULT_TEMPLATE
        note(f"{config.model} was not trained on conversations: it is asked in the template "
             f"{DEFAULT_TEMPLATE!r}, and will hardly answer")  # fmt: skip
    if assistant.tokenizer.eot is None:
        raise ValueError(
            f"{config.model}: its {assistant.tokenizer.name} tokenizer has no end of text, which "
            "ends an answer: take a model with the gpt2 or the byte tokenizer"
        )
    chat = Chat(config, Conversation(assistant))
    chat.conversation.set_system(config.system)
    if sys.stdin.isatty():
        import readline  # noqa: F401, gives input() its line editing

        note(f"{config.model}, {assistant.template}; /help lists the commands")
    with evaluating(assistant.model, assistant.dtype):  # casts its weights before the first answer
        while (line := read_line()) is not None:
            try:
                if line.startswith("/"):
                    if not chat.command(line):
                        break
                elif line:
                    chat.ask(line)
            except ValueError as error:  # of this line only
                note(str(error))
