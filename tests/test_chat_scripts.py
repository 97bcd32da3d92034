"""chat, compare and sample as a user runs them, on a byte model that was taught a few answers."""

import html
import io
import re
import sys
from pathlib import Path

import pytest
import torch

from gpt2.assistant import Assistant, Conversation, load_assistant
from gpt2.checkpoint import load_model, save_checkpoint
from gpt2.config import GPTConfig
from gpt2.data.chat import encode_chat, encode_prompt
from gpt2.model import GPT
from gpt2.tokenizer import ByteTokenizer, CharTokenizer

from . import test_scripts
from .test_scripts import one_line_error

script = test_scripts.script  # the fixture
TEMPLATE = "user_assistant"
LESSONS = {
    "hi": "Hello!", "who?": "A <b>small</b> | model.", "long": "z" * 200, "red": "\x1b[31mred",
}  # fmt: skip


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Path:
    """A checkpoint that answers LESSONS by heart; it was saved with its chat template."""
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    shape = dict(n_layer=1, n_head=4, n_embd=64, block_size=128, vocab_size=257)
    model = GPT(GPTConfig(**shape), "torch")
    idx, targets = torch.full((4, 129), tokenizer.eot), torch.full((4, 129), -100)
    for i, (question, answer) in enumerate(LESSONS.items()):
        turns = ("user", question), ("assistant", answer)
        messages = [{"role": role, "content": content} for role, content in turns]
        tokens, learnt = map(torch.tensor, encode_chat(messages, tokenizer, TEMPLATE))
        idx[i, : len(tokens)] = tokens[:129]
        targets[i, : len(tokens)] = tokens.where(learnt, -100)[:129]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        logits = model(idx[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    save = dict(tokenizer=tokenizer.to_dict(), train={}, chat_template=TEMPLATE)
    return save_checkpoint(tmp_path_factory.mktemp("taught"), 1, model, **save)


@pytest.fixture
def base(tmp_path) -> Path:
    """A checkpoint with random weights, without a chat template."""
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=64, vocab_size=257), "torch")
    return save_checkpoint(tmp_path / "base", 1, model, tokenizer={"name": "byte"}, train={})


@pytest.fixture
def chat(script, monkeypatch):
    """Runs chat.py with lines on its stdin; returns exit status, stdout and stderr."""

    def run(model, *options, lines: list[str]) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return script("chat", model, *options)

    return run


@pytest.fixture
def assistant(base) -> Assistant:
    return Assistant("base", ByteTokenizer(), TEMPLATE, lambda: load_model(base))


CPU = ("--device", "cpu")
GREEDY = (*CPU, "--temperature", "0")


def test_chat_answers_and_takes_commands(chat, taught):
    lines = [
        "hi", "/reset", "who?", "/temp 0.5", "/temp hot", "/top_p 2", "/nonsense", "/help", "",
        "<|user|> hi", "/system Be brief.", "/reset", "/quit", "hi",
    ]  # fmt: skip
    status, out, err = chat(taught, *GREEDY, lines=lines)
    assert (status, out) == (0, "Hello!\nA <b>small</b> | model.\n")
    for words in (
        "the conversation is forgotten", "temperature 0.5", "/temp needs a number, got 'hot'",
        "top_p must lie in (0, 1], got 2.0", "unknown command '/nonsense'", "/system TEXT",
        "marker '<|user|>'", "the conversation begins anew",
    ):  # fmt: skip
        assert words in err, words


def test_chat_says_where_an_answer_was_cut_and_that_it_drops_the_oldest_turns(chat, taught):
    status, out, err = chat(taught, *GREEDY, "--max_new_tokens", "5", lines=["hi", "é"])
    assert status == 0 and out.startswith("Hello\n")
    assert "(cut after 5 tokens (--max_new_tokens))" in err
    status, out, err = chat(taught, *GREEDY, lines=["long", "hi", "hi", "x" * 200, "hi"])
    assert status == 0 and "(cut: the context is full)" in err
    assert out.startswith("zzz") and out.endswith("\n")
    assert "the oldest turns do not fit the context any more and went: 1" in err
    assert "leaves no room in the model's context (block_size) of 128" in err


def test_ctrl_c_stops_the_answer_and_not_the_program(chat, taught, monkeypatch):
    real, asked = Assistant.complete, []

    def interrupted(self, prompts, *, stop, **options):
        asked.append(prompts)

        def press(row, tokens):
            found = stop(row, tokens)
            if len(asked) == 1 and len(tokens) == 3:
                raise KeyboardInterrupt
            return found

        return real(self, prompts, stop=press, **options)

    monkeypatch.setattr(Assistant, "complete", interrupted)
    status, out, err = chat(taught, *GREEDY, lines=["hi", "/reset", "hi"])
    assert status == 0 and out == "Hel\nHello!\n" and "(stopped)" in err


def test_chat_with_a_model_that_has_no_template(chat, base, tmp_path):
    status, out, err = chat(base, *CPU, "--seed", "1", lines=["hi"])
    assert status == 0 and "was not trained on conversations" in err and "user_assistant" in err
    again = chat(base, *CPU, "--seed", "1", lines=["hi"])
    assert (status, out) == again[:2]
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=64, vocab_size=3), "torch")
    chars = save_checkpoint(
        tmp_path / "chars", 1, model, tokenizer=CharTokenizer("abc").to_dict(), train={}
    )
    status, _, err = chat(chars, *CPU, lines=[])
    assert status == 1 and "char tokenizer has no end of text" in err
    assert "unknown chat template" in one_line_error(chat(base, "--template", "chatml", lines=[]))


def test_conversation_keeps_the_latest_turns_that_fit(assistant):
    talk = Conversation(assistant, system="s")
    everything = []
    for i in range(6):
        question = {"role": "user", "content": f"{i}"}
        prompt, dropped = talk.ask(question["content"], 10)
        everything.append(question)
        system = {"role": "system", "content": "s"}
        kept = everything[-len(talk.messages) :]
        assert talk.messages == kept and kept[0]["role"] == "user"
        assert prompt == encode_prompt([system, *kept], ByteTokenizer(), TEMPLATE)
        assert len(prompt) + 10 <= 64
        if len(kept) < len(everything):  # one turn more would not have fitted
            more = [system, *everything[-len(kept) - 2 :]]
            assert len(encode_prompt(more, ByteTokenizer(), TEMPLATE)) + 10 > 64
        talk.answer("a")
        everything.append({"role": "assistant", "content": "a"})
    assert len(talk.messages) < len(everything)
    before = list(talk.messages)
    for bad, message in (("", "empty"), ("<|user|>", "marker"), ("x" * 60, "leaves no room")):
        with pytest.raises(ValueError, match=message):
            talk.ask(bad, 10)
        assert talk.messages == before


@pytest.mark.parametrize(
    "answer, kept",
    [
        ("yes<|user|>\nand", "yes"), ("yes <|endoftext|> no <|user|>", "yes "), (" ", None),
        ("<|assistant|>", None), ("a <|us", "a <|us"),
    ],
)  # fmt: skip
def test_no_answer_makes_the_conversation_unusable(assistant, answer, kept):
    talk = Conversation(assistant)
    talk.ask("q", 10)
    talk.answer(answer)
    assert [m["content"] for m in talk.messages] == ([] if kept is None else ["q", kept])
    talk.ask("r", 1)
    talk.ask("q", 1)  # in its place
    assert talk.messages[-1]["content"] == "q" and len(talk.messages) == (1 if kept is None else 3)


def test_compare_writes_both_tables(script, taught, base, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hi\n<i>\nwho?\nred\n[x](javascript:0)\n")
    out = tmp_path / "deep" / "table"
    options = (*CPU, "--max_new_tokens", 30, "--batch_size", 2)
    status, printed, err = script(
        "compare", "--models", taught, base, "--prompts", prompts, "--out", out, *options
    )
    assert status == 0, err
    assert f"{taught}: 5 prompts, template user_assistant" in printed
    page = out.with_suffix(".html").read_text(encoding="utf-8")
    rows = [
        [html.unescape(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)]
        for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    ]
    prompts = ["prompt", "hi", "<i>", "who?", "red", "[x](javascript:0)"]
    assert [row[0] for row in rows] == prompts and [len(row) for row in rows] == [3] * 6
    assert rows[1][1] == "Hello!" and rows[3][1] == LESSONS["who?"]
    assert rows[4][1] == r"\x1b[31mred" and "\x1b" not in page
    assert rows[1][2].endswith("[cut after 30 tokens]")
    assert not re.search(r"<(i|b|a|script)\b|\b(src|href)=", page)  # needs no other file
    lines = out.with_suffix(".md").read_text(encoding="utf-8").split("\n")
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 7 and all(line.count("|") == 4 for line in table)
    assert "A &lt;b&gt;small&lt;/b&gt; &#124; model." in table[4] and "greedy" in lines[0]


def test_compare_with_seeds_does_not_depend_on_the_batch(script, base, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nbb\nccc\n")
    options = ("--models", base, "--prompts", prompts, *CPU, "--temperature", 1, "--seed", 7)
    pages = []
    for size in (1, 3):
        out = tmp_path / str(size)
        assert script("compare", *options, "--out", out, "--batch_size", size)[0] == 0
        pages.append(out.with_suffix(".html").read_text())
    assert pages[0] == pages[1] and "seed 7" in pages[0]


def test_compare_says_what_is_wrong_before_it_generates(script, base, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    monkeypatch.setattr(Assistant, "complete", lambda *_, **__: pytest.fail("generates"))
    for content, message in (
        (None, "prompts.txt: No such file"), (b"caf\xe9\n", "not UTF-8 text, byte 3 is 0xe9"),
        (b"short\n" + b"long " * 20, "the longest prompt has 100 tokens, which leaves no room"),
    ):  # fmt: skip
        if content is not None:
            prompts.write_bytes(content)
        result = script("compare", "--models", base, "--prompts", prompts, *CPU)
        assert message in one_line_error(result)
    missing = script("compare", "--models", base, tmp_path / "nowhere", "--prompts", prompts, *CPU)
    assert "nowhere" in one_line_error(missing)
    (tmp_path / "out.html").mkdir()
    prompts.write_text("short")
    words = "--prompts", prompts, "--out", tmp_path / "out", *CPU
    assert "out.html: a folder" in one_line_error(script("compare", "--models", base, *words))


def test_without_a_template_none_is_read(base, monkeypatch):
    refuse = lambda name: pytest.fail("reads the folder's template")  # noqa: E731
    monkeypatch.setattr("gpt2.assistant.load_chat_template", refuse)
    assert load_assistant(base, template="none").template is None


def test_sample_uses_the_template_stops_and_reports(script, taught, base, tmp_path):
    status, out, err = script("sample", taught, "--prompt", "hi", "red", "\x1b]0;", *GREEDY)
    assert status == 0, err
    assert out.startswith(f"hi\nHello!\n{'-' * 40}\nred\n\\x1b[31mred\n{'-' * 40}\n\\x1b]0;\n")
    assert re.fullmatch(r"\d+ tokens, [\d,.]+ tokens/s\n", err)
    status, out, err = script(
        "sample", taught, "--prompt", "hi", "--num_samples", 2, "--stop", "o!", "ll",
        "--log_probabilities", "True", *GREEDY,
    )  # fmt: skip
    assert status == 0, err
    assert out == f"hi\nHe\n{'-' * 40}\nhi\nHe\n"
    said = r"row \d: 4 tokens, log probability -0\.\d\d, -0\.\d{3} a token"
    assert len(re.findall(said, err)) == 2
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hi\nthere\n\nwho?\n")
    status, out, err = script("sample", base, "--prompt_file", prompts, *CPU, "--min_p", "0.1")
    assert status == 0 and out.startswith("hi\nthere")
    prompts.write_bytes(b"\xff")
    assert "not UTF-8" in one_line_error(script("sample", base, "--prompt_file", prompts))
