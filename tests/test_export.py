"""Exports, opened by the programs that they are for: transformers, and (slow, export_programs.py)
llama.cpp, `transformers serve` and lm-eval, which are installed for that."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import gpt2
from gpt2 import hf, lora
from gpt2.checkpoint import (
    describe_base,
    load_chat_template,
    load_tokenizer,
    save_checkpoint,
)
from gpt2.cli import parse
from gpt2.config import GPTConfig, LoRAConfig
from gpt2.data.chat import ChatError, encode_chat, encode_prompt, jinja, messages_from_row
from gpt2.data.conversations import read_rows
from gpt2.data.files import LeftOut
from gpt2.export import export
from gpt2.options import ExportConfig
from gpt2.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer

CHARS = "".join(
    map(chr, [*range(0x20, 0x7F), 0, 9, 10, 13, 0x1C, 0x85, 0xE9, 0x301, 0x3000, 0x1F600])
)
TOKENIZERS = {t.name: t for t in (GPT2Tokenizer(), ByteTokenizer(), CharTokenizer(CHARS))}
TALK = [
    {"role": "user", "content": " Add.\n", "input": "1, 2"},
    {"role": "assistant", "content": "3 "},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
]
HOSTILE = [
    "", " " * 5000, "\n" * 3000, " \t\n" * 500, "a  b\n\n c \u3000 d\x85", "can't WON'T 's'S",
    "<|endoftext|>", "<|endoftext|> a<|endoftext|>\n", "<|endof", "\x00\x01\x1c\x7f",
    "a .b , c ! n't", "\U0001f3f3\ufe0f\u200d\U0001f308e\u0301\ufb01", "\tdef f():\r\n\treturn 1",
    "1234567 " * 50,
]  # fmt: skip


def make_run(folder: Path, name: str, template=None, block_size=64, adapters=False) -> Path:
    """A run with a checkpoint of a random model; far from zero, so that answers differ."""
    torch.manual_seed(0)
    tokenizer = TOKENIZERS[name]
    config = GPTConfig(2, 2, 32, block_size=block_size, vocab_size=tokenizer.vocab_size)
    model = gpt2.GPT(config, "torch")
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    options = dict(
        tokenizer=tokenizer.to_dict(), train={"tokens_per_step": 100, "init_from": "gpt2"}
    )
    if adapters:
        save_checkpoint(folder / "base", 0, model, **options)
        lora.add_lora(model, LoRAConfig(rank=2), describe_base(folder / "base", model))
        for parameter in lora.adapter_parameters(model).values():
            parameter.data += 0.1 * torch.randn_like(parameter)
    save_checkpoint(folder / "run", 7, model, chat_template=template, **options)
    return folder / "run"


def run_export(run: Path, out: Path, **options) -> Path:
    export(ExportConfig(str(run), str(out), **options))
    return out


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """name, template -> (run, exported folder), each made once."""
    made = {}

    def get(name: str, template: str | None = None) -> tuple[Path, Path]:
        if (name, template) not in made:
            folder = tmp_path_factory.mktemp("export")
            run = make_run(folder, name, template)
            made[name, template] = run, run_export(run, folder / "out")
        return made[name, template]

    return get


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_folder_is_complete_and_transformers_computes_the_same(exported, name):
    run, out = exported(name)
    ours, theirs = gpt2.load_model(run, kernels="torch"), AutoModelForCausalLM.from_pretrained(out)
    idx = torch.randint(TOKENIZERS[name].vocab_size, (2, 64))
    with torch.no_grad():
        assert_close(theirs(idx).logits, ours(idx), rtol=1e-4, atol=1e-4)
        assert torch.equal(gpt2.load_model(out, kernels="torch")(idx), ours(idx))  # bare names
    files = {path.name: path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert set(files.values()) == {0o644} and files.keys() >= {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", "README.md",
    }  # fmt: skip
    eot, settings = TOKENIZERS[name].eot, theirs.generation_config
    assert (settings.eos_token_id, settings.pad_token_id) == (eot, eot)
    assert load_tokenizer(out).to_dict() == TOKENIZERS[name].to_dict()
    assert list(out.parent.glob(".*")) == []


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_and_texts_are_ours_on_hostile_text(exported, name):
    theirs, ours = AutoTokenizer.from_pretrained(exported(name)[1]), TOKENIZERS[name]
    known = st.characters(codec="utf-8") if name != "char" else st.sampled_from(CHARS)
    pieces = st.sampled_from([" ", "\n", "\n\n", "  ", "'s", "a", "1", "<|endoftext|>"])

    def check(text: str):
        ids = ours.encode(text, allow_special=True)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids)

    @given(st.lists(st.text(known) | pieces).map("".join))
    def check_any(text):
        check(text)

    @given(st.lists(st.integers(0, ours.vocab_size - 1)))
    def check_ids(ids):
        assert theirs.decode(ids) == ours.decode(ids)

    for text in HOSTILE:
        check("".join(c for c in text if name != "char" or c in CHARS))
    check_any()
    check_ids()
    if name == "char":
        with pytest.raises(Exception, match="UNK"):
            theirs("\u4e2d")


@pytest.mark.parametrize("name", ["gpt2", "byte"])
@pytest.mark.parametrize("template", ["user_assistant", "alpaca_2"])
def test_the_template_gives_the_tokens_and_the_mask_of_training(exported, name, template):
    out, ours = exported(name, template)[1], TOKENIZERS[name]
    theirs = AutoTokenizer.from_pretrained(out)
    system = [{"role": "system", "content": " Be\n\nkind. "}]
    for messages in (TALK, TALK[2:], system + TALK):
        found = theirs.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        tokens, learnt = encode_chat(messages, ours, template)
        assert found["input_ids"] == tokens
        assert found["assistant_masks"] == [int(x) for x in learnt]
        prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True)
        assert prompt["input_ids"] == encode_prompt(messages[:-1], ours, template)
    with pytest.raises(Exception, match="unknown role"):
        theirs.apply_chat_template([{"role": "tool", "content": "x"}])
    assert load_chat_template(out) == template


@pytest.mark.slow
@pytest.mark.parametrize("template", ["user_assistant", "alpaca_2"])
def test_the_template_gives_the_tokens_of_training_on_all_real_conversations(
    exported, template, shared_data
):
    theirs = AutoTokenizer.from_pretrained(exported("gpt2", template)[1])
    used = 0
    for _, row in read_rows(str(shared_data / "sft"), LeftOut()):
        messages = messages_from_row(row)
        try:
            tokens, _ = encode_chat(messages, TOKENIZERS["gpt2"], template)
        except ChatError:
            continue
        assert theirs.apply_chat_template(messages)["input_ids"] == tokens
        used += 1
    assert used == 60664


def test_an_older_checkpoint_keeps_its_template_and_the_export_says_what_differs(tmp_path, capsys):
    run = make_run(tmp_path, "gpt2", "alpaca")
    out = run_export(run, tmp_path / "out")
    assert "learnt template alpaca in pieces" in capsys.readouterr().out
    assert load_chat_template(run) == "alpaca" and jinja("alpaca") == jinja("alpaca_2")
    pieces, _ = encode_chat(TALK, TOKENIZERS["gpt2"], "alpaca")
    whole, _ = encode_chat(TALK, TOKENIZERS["gpt2"], "alpaca_2")
    assert 628 in pieces and 628 not in whole
    assert load_chat_template(out) == "alpaca_2"  # whoever reads the text has these tokens


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pipelines_write_and_chat_inside_the_context(exported, name):
    template = None if name == "char" else "user_assistant"
    run, out = exported(name, template)
    pipe, ours = pipeline("text-generation", model=str(out)), TOKENIZERS[name]
    model = gpt2.load_model(run, kernels="torch")
    options = dict(
        max_new_tokens=8, temperature=0, stop_tokens=() if ours.eot is None else (ours.eot,)
    )
    [tokens] = gpt2.generate(model, [ours.encode("Once")], **options)
    found = pipe("Once", max_new_tokens=8, do_sample=False, return_full_text=False)
    assert found[0]["generated_text"] == ours.decode(tokens)
    assert pipe("Once")[0]["generated_text"].startswith("Once")  # no limit: not beyond 64 tokens
    if template:
        prompt = encode_prompt(TALK[2:3], ours, template)
        [tokens] = gpt2.generate(model, [prompt], **options)
        found = pipe(TALK[2:3], max_new_tokens=8, do_sample=False)
        assert found[0]["generated_text"][-1]["content"] == ours.decode(tokens)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_written_and_verified(exported, tmp_path, dtype, capsys):
    run, _ = exported("byte", "user_assistant")
    out = run_export(run, tmp_path / "out", dtype=dtype, verify=True)
    assert f"tensors, equal in {dtype}" in capsys.readouterr().out
    ours, again = (gpt2.load_model(path, kernels="torch") for path in (run, out))
    for (name, a), b in zip(ours.named_parameters(), again.parameters(), strict=True):
        a, b = a[: ours.config.vocab_size], b[: ours.config.vocab_size]
        assert torch.equal(a.to(getattr(torch, dtype)).float(), b), name


def test_the_model_card_has_metadata_and_figures(tmp_path):
    run = make_run(tmp_path, "byte", "user_assistant")
    lines = [{"step": 7, "val/loss": 1.25}, {"step": 9, "val/loss": 9.0}]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (run / "receipt.json").write_text(json.dumps({"launches": [], "data": [{"path": "alpaca"}]}))
    (run / "evaluation_step_00000007.json").write_text('{"results": {"lambada": {"acc": 0.5}}}')
    card = (run_export(run, tmp_path / "out", license="mit") / "README.md").read_text()
    data = ModelCard(card).data
    assert (data.license, data.library_name) == ("mit", "transformers")
    assert (data.pipeline_tag, data.base_model) == ("text-generation", "openai-community/gpt2")
    assert data.datasets == ["tatsu-lab/alpaca"]
    for figure in ("| val/loss | 1.2500 |", "| tokens trained on | 700", "acc 0.5000"):
        assert figure in card
    for name in ("receipt.json", "evaluation_step_00000007.json", "metrics.jsonl"):
        (run / name).write_text('{"results": [')  # damaged: only the card has less
    assert "| steps | 7 |" in (run_export(run, tmp_path / "less") / "README.md").read_text()


def test_adapters_are_merged_and_that_is_said(tmp_path, capsys):
    run = make_run(tmp_path, "byte", "user_assistant", adapters=True)
    out = run_export(run, tmp_path / "out", verify=True)
    assert "adapters are merged" in capsys.readouterr().out
    idx = torch.arange(40)[None]
    with torch.no_grad():
        wanted = gpt2.load_model(run, kernels="torch")(idx)
        found = AutoModelForCausalLM.from_pretrained(out)(idx).logits
        assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        base = gpt2.load_model(tmp_path / "base", kernels="torch")(idx)
    assert (base - wanted).abs().max() > 0.01


def test_a_difference_is_found_and_nothing_stays(tmp_path, monkeypatch):
    run, write = make_run(tmp_path, "byte", "user_assistant"), hf.write_hf

    def spoil(change):
        def write_and_spoil(model, folder, *args, **options):
            write(model, folder, *args, **options)
            change(model, folder)

        monkeypatch.setattr(hf, "write_hf", write_and_spoil)

    def weight(model, folder):
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        path.write_bytes(content)

    def template(model, folder):
        path = folder / "chat_template.jinja"
        path.write_text(path.read_text().replace("user_after }}", "user_after + ' ' }}"))

    def tokenizer(model, folder):
        path = folder / "tokenizer.json"
        path.write_text(path.read_text().replace('"use_regex": false', '"use_regex": true'))

    def full(model, folder):
        raise OSError(28, "No space left on device", str(folder))

    def unnamed(model, folder):
        raise OSError("8 of 9 written")

    for change, message in (
        (weight, "other weights"), (template, "template gives other tokens"),
        (tokenizer, "tokenizer"), (full, "No space left"),
        (unnamed, r"not written \(8 of 9 written\): '.*out'"),
    ):  # fmt: skip
        spoil(change)
        with pytest.raises((ValueError, OSError), match=message):
            run_export(run, tmp_path / "out", verify=True)
        assert {path.name for path in tmp_path.iterdir()} == {"run"}
    monkeypatch.setattr(hf, "write_hf", write)
    (tmp_path / ".out.tmp").mkdir()  # of one that was killed
    run_export(run, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}
    with pytest.raises(OSError, match="exists already"):
        run_export(run, tmp_path / "out")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(dtype="q8_0"), "dtype of hf"),
        (dict(format="gguf", dtype="bfloat16"), "dtype of gguf"),
        (dict(out="x.gguf"), "goes with --format gguf"),
        (dict(out="x.gguf", format="gguf", push="me/x"), "without --push"),
        (dict(out=""), "name a folder"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    assert parse(ExportConfig, "", ["run", "--verify", "--out", "x"]).verify  # without a value
    with pytest.raises(ValueError, match=message):
        ExportConfig(**{"model": "run", "out": "out"} | options)


def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    model = gpt2.GPT(GPTConfig(1, 2, 24, block_size=16, vocab_size=257), "torch")
    model.transformer.ln_f.weight.data[0] = 1e6
    save_checkpoint(tmp_path / "run", 0, model, tokenizer={"name": "byte"}, train={})
    with pytest.raises(
        ValueError, match="in float16: ln_f.weight holds values that are not finite"
    ):
        run_export(tmp_path / "run", tmp_path / "out", dtype="float16")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs gguf: pip install -e '.\[export\]'"):
        run_export(tmp_path / "run", tmp_path / "out", format="gguf")
    monkeypatch.undo()
    pytest.importorskip("gguf")
    with pytest.raises(ValueError, match="q8_0 packs 32 numbers at a time, n_embd is 24"):
        run_export(tmp_path / "run", tmp_path / "out", format="gguf", dtype="q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_push_uploads_to_a_private_repository_and_a_failure_keeps_the_folder(exported, monkeypatch):
    run, out = exported("byte", "user_assistant")
    asked = []
    api = "huggingface_hub.HfApi."
    monkeypatch.setattr(api + "create_repo", lambda self, name, **o: asked.append((name, o)))
    monkeypatch.setattr(api + "upload_folder", lambda self, **o: asked.append(sorted(o)))
    run_export(run, out.with_name("pushed"), push="me/mine")
    assert asked == [("me/mine", {"private": True, "exist_ok": True}), ["folder_path", "repo_id"]]
    monkeypatch.undo()
    with pytest.raises(OSError, match="is written, but cannot be uploaded as me/mine"):
        run_export(run, out.with_name("kept"), push="me/mine")
    assert out.with_name("kept").exists()


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_gguf_holds_the_weights_the_tokens_and_the_template(
    exported, tmp_path, name, dtype, capsys
):
    gguf = pytest.importorskip("gguf")
    template = None if name == "char" else "alpaca_2"
    out = tmp_path / "out.gguf"
    run_export(exported(name, template)[0], out, format="gguf", dtype=dtype, verify=True)
    said = capsys.readouterr().out
    assert "rounds the context of 64 up to 256" in said and f"FROM {out}" in said
    reader = gguf.GGUFReader(out)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["gpt2.context_length"] == 64
    assert len(fields["tokenizer.ggml.tokens"]) == TOKENIZERS[name].vocab_size
    assert fields.get("tokenizer.ggml.eos_token_id") == TOKENIZERS[name].eot
    assert fields.get("tokenizer.chat_template") == (template and jinja(template, False))
    kinds = {tensor.tensor_type.name.lower() for tensor in reader.tensors}
    assert kinds == {"f32", dtype} and out.stat().st_mode & 0o777 == 0o644


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_llama_cpp_transformers_serve_and_lm_eval(tmp_path):
    """In a Python of its own beside this one's packages; GPT2_PROGRAMS names one that has them."""
    python = os.environ.get("GPT2_PROGRAMS")
    if python is None:
        subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
        python = tmp_path / "venv/bin/python"
        [site] = (tmp_path / "venv/lib").glob("*/site-packages")
        (site / "beside.pth").write_text(sysconfig.get_path("purelib"))
        packages = "gguf llama-cpp-python[server] lm-eval openai fastapi uvicorn python-multipart"
        packages = packages.split()
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    here = Path(__file__).parent
    options = ["-q", "-x", "-o", "addopts=", "-o", "filterwarnings=", "-p", "no:cacheprovider"]
    command = [python, "-m", "pytest", *options, here / "export_programs.py"]
    subprocess.run(command, check=True, cwd=here.parent, env=os.environ | {"PYTHONPATH": "."})
