"""The evaluations' numbers, against transformers' GPT2LMHeadModel with the same random weights."""

import json
import lzma
import math
import os
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import gpt2
from gpt2.config import GPTConfig
from gpt2.data import TokenLoader, find_shards
from gpt2.evals.files import FILES, evenly, read_text
from gpt2.evals.hellaswag import Example, ending_losses, hellaswag_accuracy, read_hellaswag
from gpt2.evals.lambada import Passage, lambada, read_lambada, word_scores
from gpt2.evals.perplexity import detokenize, perplexity, validation_loss, windows
from gpt2.evals.scoring import Single, pack
from gpt2.hf import export_hf
from gpt2.model import GPT
from gpt2.tokenizer import ByteTokenizer, GPT2Tokenizer

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=48, vocab_size=257)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same random weights as transformers' model and as ours, with clear preferences; float64,
    so that the best of several does not depend on how a batch is rounded."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(1)
    ours = GPT(SMALL, "torch")
    for p in ours.parameters():
        p.data *= 8
    folder = tmp_path_factory.mktemp("hf") / "model"
    export_hf(ours, folder, None)
    return GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64).eval(), ours.double()


def their_losses(theirs, tokens: list[int], n_scored: int) -> torch.Tensor:
    """-log p of the last n_scored tokens of one row, by transformers."""
    with torch.no_grad():
        logits = theirs(torch.tensor([tokens[:-1]])).logits[0]
    losses = F.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")
    return losses[len(losses) - n_scored :]


def random_examples(n: int, seed: int = 0) -> list[Example]:
    draw = random.Random(seed)

    def row(low: int, high: int) -> list[int]:
        return [draw.randrange(256) for _ in range(draw.randint(low, high))]

    return [
        Example(
            row(1, 30), [row(1, 18) for _ in range(4)], draw.randrange(4),
            tuple(draw.randint(1, 90) for _ in range(4)), number=i,
        )
        for i in range(n)
    ]  # fmt: skip


def write_lines(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_hellaswag_equals_transformers_example_for_example(pair):
    theirs, ours = pair
    same_length = random_examples(6, seed=3)
    same_length = [
        replace(e, context=(e.context * 20)[:20], number=40 + e.number) for e in same_length
    ]
    examples = [*random_examples(40), *same_length]
    expected = torch.tensor(
        [[their_losses(theirs, e.context + x, len(x)).sum() for x in e.endings] for e in examples]
    )
    lengths = torch.tensor([[len(x) for x in e.endings] for e in examples])
    for part in (slice(40), slice(40, None)):  # the latter share all but one token of their context
        with torch.inference_mode():
            losses, counts = ending_losses(ours, examples[part])
        assert_close(losses, expected[part].float(), rtol=1e-5, atol=1e-4)
        assert counts.equal(lengths[part].float())
    labels, samples = torch.tensor([e.label for e in examples]), {}
    characters = torch.tensor([e.characters for e in examples])
    hits = torch.stack(
        [x.argmin(1) == labels for x in (expected, expected / lengths, expected / characters)], 1
    ).double()
    found = hellaswag_accuracy(ours, examples, Single(), tokens_per_batch=300, samples=samples)
    means = dict(
        zip(("acc", "acc_norm", "acc_norm_characters"), hits.mean(0).tolist(), strict=True)
    )
    assert found == means | {"examples": 46, "cut": 0} and len({*means.values()}) == 3
    rows = torch.tensor([samples[i] for i in range(46)])
    assert_close(rows, torch.cat([hits, expected], 1).float(), rtol=1e-5, atol=1e-4)


def test_both_formats_of_both_tasks_and_the_space_before_the_ending(tmp_path):
    path, t = tmp_path / "a.jsonl", GPT2Tokenizer()
    original = {
        "ind": 24, "activity_label": "Roof", "ctx_a": "A man sits on a roof.", "ctx_b": "he",
        "ctx": "A man sits on a roof. he", "split": "val", "label": 3,
        "endings": ["wraps skis.", "rips tiles off.", "holds a cube.", "pulls up roofing."],
    }  # fmt: skip
    without_ctx = {k: v for k, v in original.items() if k != "ctx"}
    write_lines(path, [original, without_ctx, {**original, "label": "3", "query": "Roof: A man"}])
    examples = read_hellaswag(path, t, 1024)
    endings = [t.encode(f" {ending}") for ending in original["endings"]]
    assert examples == [
        Example(t.encode("A man sits on a roof. he"), endings, 3, (11, 15, 13, 17), number=i)
        for i in range(3)
    ]
    lzma.open(tmp_path / "a.jsonl.xz", "w").write(path.read_bytes())
    assert read_hellaswag(tmp_path / "a.jsonl.xz", t, 1024) == examples
    rows = {"text": "He said\nno to Shane"}, {"context": "He said\nno to", "continuation": "Shane"}
    write_lines(path, rows)
    first, second = read_lambada(path, t, 1024)
    assert replace(first, number=1) == second and t.decode(first.word) == " Shane"
    [cut, _] = read_lambada(path, ByteTokenizer(), 9)
    assert cut.cut and bytes(cut.context) == b"o to" and bytes(cut.word) == b" Shane"


def test_a_long_context_loses_its_beginning_and_is_counted(tmp_path, pair):
    row = {"ctx": "c" * 45 + "tail", "endings": ["a", "bb", "ccc", "dddd"], "label": 1}
    write_lines(tmp_path / "a.jsonl", [row, {**row, "ctx": "short"}])
    examples = read_hellaswag(tmp_path / "a.jsonl", ByteTokenizer(), 48)
    assert [e.cut for e in examples] == [True, False]
    assert bytes(examples[0].context) == b"c" * 40 + b"tail"  # 44 + 5 of " dddd" - 1 = 48
    assert hellaswag_accuracy(pair[1], examples, Single())["cut"] == 1


@pytest.mark.parametrize("training", [True, False])
def test_poll_ends_it_and_the_training_mode_stays(pair, training):
    _, ours = pair
    asked = []
    ours.train(training)
    ask = lambda n, **options: hellaswag_accuracy(ours, random_examples(n), Single(), **options)  # noqa: E731
    assert ask(3)["examples"] == 3 and ours.training is training
    poll = lambda: asked.append(1) or len(asked) == 3  # noqa: E731
    assert ask(40, tokens_per_batch=300, poll=poll) is None and len(asked) == 3
    assert ours.training is training
    with pytest.raises(ZeroDivisionError):
        ask(3, poll=lambda: 1 / 0)
    assert ours.training is training
    assert all(p.requires_grad and not p.is_inference() for p in ours.parameters())
    with pytest.raises(ValueError, match="at least one example"):
        ask(0)


def test_autocast_reaches_the_cache():
    model, examples = GPT(SMALL, "torch"), random_examples(30, seed=7)
    with torch.inference_mode():
        exact, _ = ending_losses(model, examples)
        with torch.autocast("cpu", torch.bfloat16):
            rough, _ = ending_losses(model, examples)
    assert_close(rough, exact, rtol=5e-2, atol=1.0)
    assert not rough.equal(exact)


def test_a_model_of_nan_has_no_score_and_one_that_diverged_an_infinite_one(counting):
    """argmin and argmax of NaN are an index, which would be right by chance."""
    model = GPT(replace(SMALL, vocab_size=1200), "torch")
    model.transformer.wte.weight.data.mul_(1e5)
    data = TokenLoader(find_shards(counting, "val"), 16, shuffle=False)
    word = lambda: lambada(model, [Passage([1, 2, 3], [4, 5, 6])], Single())  # noqa: E731
    text = lambda: perplexity(model, ByteTokenizer(), "abc def", Single())  # noqa: E731
    assert word()["perplexity"] == text()["word_perplexity"] == math.inf
    assert validation_loss(model, data, Single())["perplexity"] == math.inf
    model.transformer.ln_f.weight.data[3] = math.nan
    found = hellaswag_accuracy(model, random_examples(8), Single()) | word() | text()
    for key in ("acc", "acc_norm", "acc_norm_characters", "perplexity", "token_perplexity"):
        assert math.isnan(found[key])


def test_windows_score_each_token_once_with_enough_before_it():
    for n, block_size, stride in [(2, 8, 4), (8, 8, 4), (9, 8, 8), (100, 8, 3), (65, 16, 1)]:
        scored = []
        for begin, end, n_scored in windows(n, block_size, stride):
            assert 1 < end - begin <= block_size + 1 and 0 < n_scored <= block_size
            scored += range(end - n_scored, end)
            assert begin == 0 or end - n_scored - begin >= block_size - stride
        assert scored == list(range(1, n))
    assert windows(1, 8, 4) == []
    for stride in (0, 9):
        with pytest.raises(ValueError, match=f"block_size\\) of 8, got {stride}"):
            windows(100, 8, stride)


@pytest.mark.parametrize("stride", [None, 48, 7])
def test_perplexity_equals_transformers(pair, stride):
    theirs, ours = pair
    text = "It was the best of times ,\nit was the worst of times .\n" * 5
    tokens = [ByteTokenizer.eot, *text.encode()]
    total = 0.0
    for begin, end, n_scored in windows(len(tokens), 48, stride or 24):
        total += their_losses(theirs, tokens[begin:end], n_scored).sum().item()
    options = dict(stride=stride, tokens_per_batch=200)
    result = perplexity(ours, ByteTokenizer(), text, Single(), **options)
    n = len(text)
    assert (result["tokens"], result["words"], result["lines"], result["bytes"]) == (n, 70, 10, n)
    assert result["loss"] == pytest.approx(total / n)
    assert result["token_perplexity"] == pytest.approx(math.exp(total / n), rel=1e-4)
    assert result["word_perplexity"] == pytest.approx(math.exp(total / 70), rel=1e-4)
    with_ends = pytest.approx(math.exp(total / 80), rel=1e-4)
    assert result["word_perplexity_with_line_ends"] == with_ends
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / n)
    with pytest.raises(ValueError, match="too short"):
        perplexity(ours, ByteTokenizer(), "", Single())
    one = perplexity(ours, ByteTokenizer(), "a", Single())
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
        if i % 2:  # what the model likes best, some with another last token
            idx = torch.tensor([context])
            word = theirs.generate(idx, max_new_tokens=4, do_sample=False, eos_token_id=None)
            word = word[0, len(context) :].tolist()
            word[-1] = (word[-1] + (i % 4 == 3)) % 256
        passages.append(Passage(context, word))
    expected = [their_losses(theirs, p.context + p.word, len(p.word)).sum() for p in passages]
    with torch.inference_mode():
        losses, hits = word_scores(ours, passages)
    assert_close(losses, torch.stack(expected).float(), rtol=1e-5, atol=1e-4)
    assert hits.tolist() == [i % 4 == 1 for i in range(40)]
    result = lambada(ours, passages, Single(), tokens_per_batch=200)
    assert (result["acc"], result["examples"], result["cut"]) == (0.25, 40, 0)
    assert result["perplexity"] == pytest.approx(math.exp(sum(expected) / 40), rel=1e-4)


def test_validation_loss_is_the_mean_over_every_window_once(counting):
    ours = GPT(replace(SMALL, vocab_size=1200), "torch")
    data = TokenLoader(find_shards(counting, "val"), 16, shuffle=False)
    assert data.n_windows == 12
    x = torch.arange(1000, 1000 + 12 * 16).view(12, 16)
    with torch.no_grad():
        expected = F.cross_entropy(ours(x).flatten(0, 1), x.flatten() + 1).item()
    result = validation_loss(ours, data, Single(), tokens_per_batch=5 * 16)
    assert result["loss"] == pytest.approx(expected, rel=1e-6) and result["tokens"] == 192
    assert validation_loss(ours, data, Single(), limit=7, tokens_per_batch=80)["tokens"] == 112


def test_batches_keep_their_budget():
    ends = [3, 9, 1, 20, 5] * 10
    examples = [Example([1] * (p + 1), [[1] * e] * 4, 0, (e,) * 4) for p, e in enumerate(ends)]
    batches = pack(examples[::-1], 600)
    assert [example for batch in batches for example in batch] == examples
    for batch in batches:
        first = len(batch[0].context) - 1
        longest = max(len(e.context) + len(e.endings[0]) for e in batch)
        assert len(batch) * (first + 4 * (longest - first)) <= 600
        assert len(batch[-1].context) - 1 - first < 8
    assert len(batches) < 15
    assert pack([Passage([1] * 99, [1])] * 2, 10) == [[Passage([1] * 99, [1])]] * 2
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
    path = next((shared_data / "hellaswag").glob(f"{FILES['hellaswag'][1][0]}*"))
    examples = read_hellaswag(path, GPT2Tokenizer(), model.config.block_size)
    result = hellaswag_accuracy(model, examples, Single(torch.device(device)))
    assert result["examples"] == 10_042
    assert 100 * result["acc_norm"] == pytest.approx(29.45, abs=0.1)
