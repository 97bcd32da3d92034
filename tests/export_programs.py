"""Exports in llama.cpp, `transformers serve` and lm-eval. test_export.py (slow) installs them and
runs this file; where they are: pytest -o addopts= -o filterwarnings= tests/export_programs.py
llama-server, which no package of Python's has, is tried where PATH has it."""

import json
import lzma
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import httpx
import openai
import pytest
import torch
from llama_cpp import Llama

import gpt2
from gpt2.data.chat import encode_prompt
from gpt2.evals.scoring import Single
from gpt2.evals.suite import evaluate
from gpt2.options import EvaluateConfig
from tests.test_export import CHARS, HOSTILE, TOKENIZERS, make_run, run_export

QUESTIONS = ["Why?", "Name a color.", "Is 2+2 = 4? \n", "Who\n\nare you?"]
ROOT = Path(__file__).parent.parent
HUGGING_FACE = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
# Unless told, it cuts a stream off when another request comes.
LLAMA_PYTHON = ["llama_cpp.server", "--n_ctx", "256", "--interrupt_requests", "false"]
# What answers by OpenAI's protocol: the command, to which the port is added, of a model.
SERVERS = {
    "transformers serve": [sys.executable, "-c", HUGGING_FACE, "serve"],
    "llama_cpp.server": [sys.executable, "-m", *LLAMA_PYTHON, "--model"],
    "llama-server": ["llama-server", "-c", "1024", "-np", "4", "-m"],
}


def ask(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


def answer(model, tokenizer, prompt: list[int], n: int = 8) -> str:
    stop = () if tokenizer.eot is None else (tokenizer.eot,)
    [tokens] = gpt2.generate(model, [prompt], max_new_tokens=n, temperature=0, stop_tokens=stop)
    return tokenizer.decode(tokens)


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize(
    "name, template",
    [("gpt2", "user_assistant"), ("gpt2", "alpaca_2"), ("byte", "alpaca_2"), ("char", None)],
)
def test_llama_cpp_computes_the_same(tmp_path, name, template, dtype, capsys):
    run, tokenizer = make_run(tmp_path, name, template, block_size=256), TOKENIZERS[name]
    out = run_export(run, tmp_path / "out.gguf", format="gguf", dtype=dtype, verify=True)
    assert "logits in llama.cpp within" in capsys.readouterr().out
    model = gpt2.load_model(run, kernels="torch").eval()
    llama = Llama(str(out), n_ctx=256, n_batch=256, logits_all=True, verbose=False)
    pick = random.Random(0)
    letters = [chr(c) for c in [*range(0x600), *range(0x2000, 0x2070), *range(0x1F300, 0x1F360)]]
    letters = list(CHARS) if name == "char" else letters
    texts = [t for t in HOSTILE if "<|" not in t]
    texts += ["".join(pick.choices(letters + [" "] * n, k=50)) for n in (0, 50, 500) * 100]
    for text in texts:
        text = "".join(c for c in text if name != "char" or c in CHARS)
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text)
    # Greedy, with llama.cpp's choices likely for us too: q8_0 and its rounding may part near ties.
    prompt, far = tokenizer.encode("Once "), {"f32": 0.05, "f16": 0.05, "q8_0": 0.5}[dtype]
    tokens = []
    for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
        tokens.append(token)
        if len(tokens) == 60:
            break
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
    logits = logits[:, : tokenizer.vocab_size]
    assert (logits.amax(-1) - logits[range(60), tokens]).max() < far
    if template and dtype == "f32":
        for question in QUESTIONS:
            options = dict(max_tokens=8, temperature=0, repeat_penalty=1.0)
            found = llama.create_chat_completion(ask(question), **options)
            prompt = encode_prompt(ask(question), tokenizer, template)
            assert found["usage"]["prompt_tokens"] == len(prompt)
            content = found["choices"][0]["message"]["content"]
            # llama-cpp-python drops bytes that are no text.
            assert content == answer(model, tokenizer, prompt).replace("\ufffd", "")
    llama.close()


@pytest.mark.parametrize("program", SERVERS)
@pytest.mark.parametrize("name, template", [("gpt2", "alpaca_2"), ("byte", "user_assistant")])
def test_servers_answer_several_clients(tmp_path, program, name, template, free_port):
    command = SERVERS[program]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{program} is not installed")
    run, tokenizer = make_run(tmp_path, name, template, block_size=256), TOKENIZERS[name]
    model, gguf = gpt2.load_model(run, kernels="torch"), program != "transformers serve"
    out = run_export(
        run, tmp_path / ("out.gguf" if gguf else "out"), format="gguf" if gguf else "hf"
    )
    command = [*command, str(out), "--port", str(free_port), "--host", "127.0.0.1"]
    server = subprocess.Popen(command)
    try:
        url, deadline = f"http://127.0.0.1:{free_port}", time.monotonic() + 120
        while True:
            try:
                if httpx.get(f"{url}/health").status_code != 503:  # llama-server's, while it loads
                    break
            except httpx.TransportError:
                pass
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.5)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)
        # An eighth token would be half a character, to which llama-cpp-python adds the other half.
        n = 7
        options = dict(model=str(out), max_tokens=n, temperature=0)
        if program == "llama_cpp.server":  # it has 1.1 unless a request says otherwise
            options["extra_body"] = {"repeat_penalty": 1.0}

        def wanted(prompt: list[int]) -> str:
            return without_bytes(answer(model, tokenizer, prompt, n))

        def without_bytes(text: str) -> str:  # that are no text: streams and llama.cpp drop some
            return text.replace("\ufffd", "")

        answers = [wanted(encode_prompt(ask(q), tokenizer, template)) for q in QUESTIONS]
        assert len(set(answers)) >= 3

        def chat(i: int) -> str:
            messages, streamed = ask(QUESTIONS[i % 4]), i % 3 == 0
            found = client.chat.completions.create(messages=messages, stream=streamed, **options)
            if not streamed:
                return found.choices[0].message.content
            chunks = (chunk.choices[0].delta.content for chunk in found if chunk.choices)
            return "".join(content or "" for content in chunks)

        with ThreadPoolExecutor(8) as pool:
            assert [*map(without_bytes, pool.map(chat, range(16)))] == answers * 4
        found = client.completions.create(prompt="Once", **options).choices[0].text
        assert without_bytes(found) == wanted(tokenizer.encode("Once"))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def test_lm_eval_scores_the_log_likelihoods_of_ours(tmp_path):
    """With the chat template and without, as pairs of context and continuation."""
    evaluator = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    run, tokenizer = make_run(tmp_path, "gpt2", "alpaca_2", block_size=256), TOKENIZERS["gpt2"]
    out = run_export(run, tmp_path / "out")
    theirs = evaluator.HFLM(pretrained=str(out), dtype="float32", device="cpu", batch_size=2)
    model = gpt2.load_model(run, kernels="torch")
    chat = theirs.apply_chat_template(ask("Why?"))
    assert theirs.tok_encode(chat) == encode_prompt(ask("Why?"), tokenizer, "alpaca_2")
    pairs = [("Once upon", " a time"), ("Why", " not?"), (chat, "So"), ("x", "\n\ny")]
    found = theirs.loglikelihood(
        [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    )
    for (context, more), (value, _) in zip(pairs, found, strict=True):
        # lm-eval counts white space at the end of a context to what follows.
        a, b = tokenizer.encode(context.rstrip()), tokenizer.encode(context + more)
        with torch.no_grad():
            rows = model(torch.tensor([b]))[0, :, :50257].log_softmax(-1)
        wanted = sum(float(rows[i - 1, b[i]]) for i in range(len(a), len(b)))
        assert math.isclose(value, wanted, rel_tol=1e-4)


def test_lm_eval_has_the_figures_of_evaluate_example_for_example(
    tmp_path, shared_data, monkeypatch
):
    """With the tasks of benchmarks/lm_eval, on the first examples of the real files."""
    evaluator = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer, n = TOKENIZERS["gpt2"], 200
    out = run_export(make_run(tmp_path, "gpt2", None, block_size=256), tmp_path / "out")
    model = gpt2.load_model(out, kernels="torch").eval()
    lines = {}
    for task in ("hellaswag", "lambada"):
        [path] = (shared_data / task).glob("*.jsonl.xz")
        lines[task] = [json.loads(line) for line in islice(lzma.open(path), n)]
    for row in lines["lambada"][::2]:  # what the model likes best, where that is a word
        idx = torch.tensor([tokenizer.encode(row["context"])])
        with torch.no_grad():
            word = tokenizer.decode([int(model(idx)[0, -1, :50257].argmax())])
        row["continuation"] = word.strip() if word[0] == " " and word.isascii() else "no"
    monkeypatch.chdir(tmp_path)
    for task, name in (("hellaswag", "hellaswag_val"), ("lambada", "lambada_test")):
        Path(f"data/eval/{task}").mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in lines[task])
        Path(f"data/eval/{task}/{name}.jsonl").write_text(text)
    tasks = ("hellaswag", "lambada")
    options = dict(tasks=tasks, samples="ours.jsonl", out="ours.json", device="cpu")
    evaluate(EvaluateConfig(model=str(out), **options), Single())
    found = evaluator.simple_evaluate(
        model=HFLM(pretrained=str(out), dtype="float32", device="cpu", batch_size=4),
        tasks=[f"gpt2_{task}" for task in tasks], log_samples=True, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(ROOT / "benchmarks" / "lm_eval")),
    )  # fmt: skip
    ours = json.loads(Path("ours.json").read_text())["results"]
    samples = [json.loads(line) for line in Path("ours.jsonl").read_text().splitlines()]
    for task in tasks:
        theirs = sorted(found["samples"][f"gpt2_{task}"], key=lambda sample: sample["doc_id"])
        mine = [sample for sample in samples if sample["task"] == task]
        assert len(mine) == len(theirs) == n
        for a, b in zip(mine, theirs, strict=True):
            losses = [a[key] for key in a if key.startswith("loss")]
            wanted = [-float(response[0]) for response in b["filtered_resps"]]
            assert losses == pytest.approx(wanted, rel=1e-4)
            assert a["acc"] == b["acc"]
            assert task == "lambada" or a["acc_norm_characters"] == b["acc_norm"]
        figures = found["results"][f"gpt2_{task}"]
        assert 0.1 < ours[task]["acc"] == pytest.approx(figures["acc,none"])
    assert ours["hellaswag"]["acc_norm_characters"] == pytest.approx(
        found["results"]["gpt2_hellaswag"]["acc_norm,none"]
    )
    assert ours["lambada"]["perplexity"] == pytest.approx(
        found["results"]["gpt2_lambada"]["perplexity,none"], rel=1e-4
    )
