"""The evaluations' numbers, against transformers' GPT2LMHeadModel with random weights."""

import json
import lzma
import math
import os
import random
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import gpt2
from gpt2.config import GPTConfig
from gpt2.data import TokenLoader, find_shards
from gpt2.evals.files import FILES, read_text
from gpt2.evals.hellaswag import Example, ending_losses, hellaswag_accuracy, read_hellaswag
from gpt2.evals.lambada import Passage, lambada, read_lambada, word_scores
from gpt2.evals.loss import validation_loss
from gpt2.evals.perplexity import detokenize, perplexity, window_losses, windows
from gpt2.evals.scoring import Single, evenly, pack
from gpt2.model import GPT
from gpt2.tokenizer import ByteTokenizer, GPT2Tokenizer

from .test_hf import save, theirs_like

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=48, vocab_size=257)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same random weights as transformers' model and as ours."""
    torch.manual_seed(1)
    theirs = theirs_like(SMALL).eval()
    folder = tmp_path_factory.mktemp("hf")
    save(theirs, folder)
    return theirs, gpt2.load_model(folder, kernels="torch")


def their_losses(theirs, tokens: list[int], n_scored: int) -> torch.Tensor:
    """-log p of the last n_scored tokens of one row, by transformers."""
    with torch.no_grad():
        logits = theirs(torch.tensor([tokens[:-1]])).logits[0].double()
    losses = F.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")
    return losses[len(losses) - n_scored :]


def random_examples(n: int, seed: int = 0) -> list[Example]:
    draw = random.Random(seed)

    def row(low: int, high: int) -> list[int]:
        return [draw.randrange(256) for _ in range(draw.randint(low, high))]

    return [
        Example(row(1, 30), [row(1, 18) for _ in range(4)], draw.randrange(4)) for _ in range(n)
    ]


@dataclass
class OneOf:
    """A rank of several in this process: sums are collected, to be added up by the test."""

    rank: int
    world_size: int
    sums: list
    device: torch.device = torch.device("cpu")

    def sum(self, value):
        self.sums.append(value.clone())
        return value


def test_hellaswag_equals_transformers_example_for_example(pair):
    theirs, ours = pair
    examples = random_examples(40)
    expected = torch.tensor(
        [[their_losses(theirs, e.context + x, len(x)).sum() for x in e.endings] for e in examples]
    )
    lengths = torch.tensor([[len(x) for x in e.endings] for e in examples])
    labels = torch.tensor([e.label for e in examples])
    for share in (True, False):
        with torch.inference_mode():
            losses, counts = ending_losses(ours, examples, share)
        assert_close(losses.double(), expected.double(), rtol=1e-5, atol=1e-5)
        assert counts.equal(lengths.float())
        result = hellaswag_accuracy(
            ours, examples, Single(), share_context=share, tokens_per_batch=300
        )
        assert result == {
            "acc": (expected.argmin(1) == labels).double().mean().item(),
            "acc_norm": ((expected / lengths).argmin(1) == labels).double().mean().item(),
            "examples": 40, "cut": 0,
        }  # fmt: skip


def test_contexts_of_one_length_share_all_but_their_last_token(pair):
    theirs, ours = pair
    examples = [replace(e, context=(e.context * 20)[:20]) for e in random_examples(6, seed=3)]
    with torch.inference_mode():
        losses, _ = ending_losses(ours, examples)
    for e, row in zip(examples, losses, strict=True):
        expected = [their_losses(theirs, e.context + x, len(x)).sum().item() for x in e.endings]
        assert row.tolist() == pytest.approx(expected, rel=1e-5)


def write_lines(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_both_hellaswag_formats_and_the_space_before_the_ending(tmp_path):
    original = {
        "ind": 24, "activity_label": "Roof", "ctx_a": "A man sits on a roof.", "ctx_b": "he",
        "ctx": "A man sits on a roof. he", "split": "val", "label": 3,
        "endings": ["wraps skis.", "rips tiles off.", "holds a cube.", "pulls up roofing."],
    }  # fmt: skip
    without_ctx = {k: v for k, v in original.items() if k != "ctx"}
    as_text = {**original, "label": "3", "query": "Roof: A man sits on a roof. he"}
    write_lines(tmp_path / "a.jsonl", [original, without_ctx, as_text])
    t = GPT2Tokenizer()
    examples = read_hellaswag(tmp_path / "a.jsonl", t, 1024)
    assert examples == [examples[0]] * 3
    assert examples[0].context == t.encode("A man sits on a roof. he")
    assert examples[0].endings[0] == t.encode(" wraps skis.") and examples[0].label == 3
    assert examples[0].endings[0][0] == t.encode("and wraps")[1]  # " wraps", one token
    lzma.open(tmp_path / "a.jsonl.xz", "w").write((tmp_path / "a.jsonl").read_bytes())
    assert read_hellaswag(tmp_path / "a.jsonl.xz", t, 1024) == examples


def test_a_long_context_loses_its_beginning_and_is_counted(tmp_path, pair):
    theirs, ours = pair
    row = {"ctx": "c" * 45 + "tail", "endings": ["a", "bb", "ccc", "dddd"], "label": 1}
    write_lines(tmp_path / "a.jsonl", [row, {**row, "ctx": "short"}])
    examples = read_hellaswag(tmp_path / "a.jsonl", ByteTokenizer(), 48)
    assert [e.cut for e in examples] == [True, False]
    assert bytes(examples[0].context) == b"c" * 40 + b"tail"  # 44 + 5 of " dddd" - 1 = 48
    assert hellaswag_accuracy(ours, examples, Single())["cut"] == 1
    losses, _ = ending_losses(ours, examples[:1])
    expected = [
        their_losses(theirs, examples[0].context + x, len(x)).sum().item()
        for x in examples[0].endings
    ]
    assert losses[0].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("world_size", [2, 3, 16])
def test_ranks_count_each_example_once(pair, world_size):
    """More ranks than batches too: the spare ones run along and count nothing."""
    _, ours = pair
    examples, sums = random_examples(60, seed=5), []
    for rank in range(world_size):
        group = OneOf(rank, world_size, sums)
        hellaswag_accuracy(ours, examples, group, tokens_per_batch=500)
    alone = hellaswag_accuracy(ours, examples, Single(), tokens_per_batch=500)
    hits = sum(sums).tolist()
    assert hits == [round(alone["acc"] * 60), round(alone["acc_norm"] * 60)]


def test_poll_ends_it_and_the_training_mode_stays(pair):
    _, ours = pair
    asked = []
    for training in (True, False):
        ours.train(training)
        assert hellaswag_accuracy(ours, random_examples(3), Single())["examples"] == 3
        assert ours.training is training
        asked.clear()
        result = hellaswag_accuracy(
            ours, random_examples(40), Single(), tokens_per_batch=300,
            poll=lambda: asked.append(1) or len(asked) == 3,
        )  # fmt: skip
        assert result is None and len(asked) == 3 and ours.training is training
        with pytest.raises(ZeroDivisionError):
            hellaswag_accuracy(ours, random_examples(3), Single(), poll=lambda: 1 / 0)
        assert ours.training is training
    assert all(p.requires_grad and not p.is_inference() for p in ours.parameters())


def test_autocast_reaches_the_cache(pair):
    _, ours = pair
    examples = random_examples(30, seed=7)
    with torch.inference_mode():
        exact, _ = ending_losses(ours, examples)
        with torch.autocast("cpu", torch.bfloat16):
            shared, _ = ending_losses(ours, examples)
            plain, _ = ending_losses(ours, examples, share_context=False)
    assert_close(shared, exact, rtol=2e-2, atol=0.1)
    assert_close(shared, plain, rtol=1e-2, atol=0.1)
    assert not shared.equal(exact)


def test_windows_score_each_token_once_with_enough_before_it():
    for n, block_size, stride in [(2, 8, 4), (8, 8, 4), (9, 8, 8), (100, 8, 3), (65, 16, 1)]:
        scored = []
        for w in windows(n, block_size, stride):
            assert 1 < w.end - w.begin <= block_size + 1 and 0 < w.n_scored <= block_size
            first = w.end - w.n_scored
            scored += range(first, w.end)
            assert w.begin == 0 or first - w.begin >= block_size - stride
        assert scored == list(range(1, n))
    assert windows(1, 8, 4) == []
    for stride in (0, 9):
        with pytest.raises(ValueError, match=f"block_size\\) of 8, got {stride}"):
            windows(100, 8, stride)


@pytest.mark.parametrize("stride", [None, 48, 7])
def test_perplexity_equals_transformers_window_for_window(pair, stride):
    theirs, ours = pair
    text = "It was the best of times ,\nit was the worst of times .\n" * 5
    tokens = [ByteTokenizer.eot, *text.encode()]
    total, found = 0.0, windows(len(tokens), 48, stride or 24)
    for w in found:
        expected = their_losses(theirs, tokens[w.begin : w.end], w.n_scored)
        [mine] = window_losses(ours, tokens, [w]).double()
        assert_close(mine, expected, rtol=1e-5, atol=1e-5)
        total += expected.sum().item()
    result = perplexity(ours, ByteTokenizer(), text, Single(), stride=stride, tokens_per_batch=200)
    n = len(text)
    assert (result["tokens"], result["words"], result["lines"], result["bytes"]) == (n, 70, 10, n)
    assert result["loss"] == pytest.approx(total / n)
    assert result["token_perplexity"] == pytest.approx(math.exp(total / n))
    assert result["word_perplexity"] == pytest.approx(math.exp(total / 70))
    assert result["word_perplexity_with_line_ends"] == pytest.approx(math.exp(total / 80))
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / n)
    sums = []
    for rank in range(2):
        perplexity(
            ours, ByteTokenizer(), text, OneOf(rank, 2, sums), stride=stride, tokens_per_batch=200
        )
    assert sum(sums).item() == pytest.approx(total)


def test_perplexity_of_too_little_text(pair):
    with pytest.raises(ValueError, match="too short"):
        perplexity(pair[1], ByteTokenizer(), "", Single())
    one = perplexity(pair[1], ByteTokenizer(), "a", Single())
    assert one["tokens"] == one["bytes"] == one["words"] == 1


def test_detokenize_joins_what_wikitext_splits():
    given = (
        " = = Early life = = \n He won 1 @,@ 234 @.@ 5 km / h ( about $ 30 @-@ odd ) in 1999 – "
        "2001 ; \" no one 's \" , they don 't \n"
    )
    assert detokenize(given) == (
        " == Early life == \n He won 1,234.5 km/h (about $30-odd) in 1999–2001; "
        "\"no one's\", they don't \n"
    )
    assert detokenize("nothing to do here – really") == "nothing to do here – really"


def test_lambada_equals_transformers_passage_for_passage(pair):
    theirs, ours = pair
    draw, passages = random.Random(2), []
    for i in range(40):
        context = [draw.randrange(256) for _ in range(draw.randint(1, 40))]
        word = [draw.randrange(256) for _ in range(draw.randint(1, 5))]
        if i % 2:  # what greedy generation gives, some with another last token
            with torch.no_grad():
                greedy = theirs.generate(
                    torch.tensor([context]), max_new_tokens=4, do_sample=False,
                    attention_mask=torch.ones(1, len(context)),
                )  # fmt: skip
            word = greedy[0, len(context) :].tolist()
            word[-1] = (word[-1] + (i % 4 == 3)) % 256
        passages.append(Passage(context, word))
    expected = [their_losses(theirs, p.context + p.word, len(p.word)).sum() for p in passages]
    with torch.inference_mode():
        losses, hits = word_scores(ours, passages)
    assert_close(losses.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert hits.tolist() == [i % 4 == 1 for i in range(40)]
    result = lambada(ours, passages, Single(), tokens_per_batch=200)
    assert result["acc"] == 0.25 and result["examples"] == 40 and result["cut"] == 0
    assert result["perplexity"] == pytest.approx(math.exp(sum(expected) / 40))


def test_both_lambada_formats(tmp_path):
    write_lines(
        tmp_path / "a.jsonl",
        [{"text": "He said\nno to Shane"}, {"context": "He said\nno to", "continuation": "Shane"}],
    )
    first, second = read_lambada(tmp_path / "a.jsonl", GPT2Tokenizer(), 1024)
    assert first == second and GPT2Tokenizer().decode(first.word) == " Shane"
    [cut, _] = read_lambada(tmp_path / "a.jsonl", ByteTokenizer(), 9)
    assert cut.cut and bytes(cut.context) == b"o to" and bytes(cut.word) == b" Shane"


def test_validation_loss_is_the_mean_over_every_window_once(pair, counting):
    theirs, _ = pair
    config = replace(SMALL, vocab_size=1200)
    ours = GPT(config, "torch")
    data = TokenLoader(find_shards(counting, "val"), 16, shuffle=False)
    assert data.n_windows == 12
    x = torch.arange(1000, 1000 + 12 * 16).view(12, 16)
    with torch.no_grad():
        expected = F.cross_entropy(ours(x).flatten(0, 1), x.flatten() + 1).item()
    result = validation_loss(ours, data, Single(), tokens_per_batch=5 * 16)
    assert result["loss"] == pytest.approx(expected, rel=1e-6) and result["tokens"] == 192
    sums = []
    for rank in range(2):
        validation_loss(ours, data, OneOf(rank, 2, sums), tokens_per_batch=5 * 16)
    assert sum(sums).tolist() == pytest.approx([expected * 192, 192])
    assert validation_loss(ours, data, Single(), limit=7, tokens_per_batch=80)["tokens"] == 112


def test_batches_keep_their_budget():
    sizes = [(p, 4, p + 1 + e) for p, e in zip(range(50), [3, 9, 1, 20, 5] * 10, strict=True)]
    batches = pack(sizes, 600)
    assert [i for batch in batches for i in batch] == list(range(50))
    for batch in batches:
        first, longest = sizes[batch[0]][0], max(sizes[i][2] for i in batch)
        assert len(batch) * (first + 4 * (longest - first)) <= 600
        assert sizes[batch[-1]][0] - first < 8
    assert len(batches) < 15 and pack([(0, 1, 99)] * 2, 10) == [[0], [1]]
    assert evenly(range(10), 4) == [0, 2, 5, 7] and evenly([1, 2], 9) == [1, 2]


def test_the_real_files_are_read_whole(shared_data):
    t = GPT2Tokenizer()
    examples = read_hellaswag(shared_data / "hellaswag" / "hellaswag_val.jsonl.xz", t, 1024)
    assert len(examples) == 10_042 and not any(e.cut for e in examples)
    assert t.decode(examples[0].context) == "A man is sitting on a roof. he"
    passages = read_lambada(shared_data / "lambada" / "lambada_openai.jsonl.xz", t, 1024)
    assert len(passages) == 5_153 and t.decode(passages[1].word) == " Shane"
    text = read_text(shared_data / "wikitext2" / "wiki.test.raw")
    assert (len(text.split()), text.count("\n")) == (241_211, 4_358)
    # Fewer tokens, and at most a few characters that are not spaces or marks fewer.
    assert len(t.encode(detokenize(text))) < 0.97 * len(t.encode(text))
    assert detokenize(text).replace(" ", "") == text.replace(" ", "").replace(
        "@-@", "-").replace("@,@", ",").replace("@.@", ".")  # fmt: skip


@pytest.mark.slow
def test_hellaswag_of_openais_gpt2(shared_data):
    folder = os.environ.get("GPT2_OPENAI_WEIGHTS", "")
    if not folder:
        pytest.skip("set GPT2_OPENAI_WEIGHTS to a Hugging Face folder of OpenAI's GPT-2 124M")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = gpt2.load_model(folder, device)
    path = next((shared_data / "hellaswag").glob(f"{FILES['hellaswag'].names[0]}*"))
    examples = read_hellaswag(path, GPT2Tokenizer(), model.config.block_size)
    result = hellaswag_accuracy(model, examples, Single(torch.device(device)))
    assert result["examples"] == 10_042
    assert 100 * result["acc_norm"] == pytest.approx(29.45, abs=0.1)
