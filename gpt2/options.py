"""Options of the commands that do not train: prepare, sample, evaluate, export, show and others."""

from dataclasses import dataclass
from typing import Literal, get_args

from gpt2.config import Kernels, Precision, Sampling, check_numbers


@dataclass(frozen=True)
class _Generation(Sampling):
    """What the commands that generate have in common; each has defaults of its own."""

    max_new_tokens: int = 200
    seed: int | None = None  # the same seed gives the same text
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    kernels: Kernels = "auto"  # triton, cpp, torch; auto: the fastest that runs here
    # Of matmuls: bfloat16 reads half the bytes; fast: where the device has it in hardware; auto:
    # that on a GPU, float32 on a CPU.
    dtype: Precision = "auto"

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, at_least_1="max_new_tokens")


@dataclass(frozen=True)
class _OfModel:
    """The first option of a class is that of its last base."""

    # A run folder, a checkpoint, a Hugging Face folder or name (gpt2, gpt2-medium, ...), a file of
    # nanoGPT, build-nanogpt or llm.c.
    model: str


@dataclass(frozen=True)
class _OfModels:
    models: tuple[str, ...]  # run folders, checkpoints, Hugging Face folders or names


@dataclass(frozen=True)
class SampleConfig(_Generation, _OfModel):
    """Options of `gpt2-triton sample`."""

    temperature: float = 0.8  # 0 takes the most likely token always
    prompt: tuple[str, ...] = ("\n",)  # one or more; they are generated as one batch
    # Instead of prompt: a UTF-8 file, one prompt a line, or with blank lines between prompts.
    prompt_file: str = ""
    template: str = "auto"  # chat template of a prompt; auto: the model's, if it has one; or none
    num_samples: int = 1  # of each prompt
    stop: tuple[str, ...] = ()  # end before any of these texts
    # Print each row's log probability to stderr: the model's own, before the options above.
    log_probabilities: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not self.prompt and not self.prompt_file:
            raise ValueError("prompt is empty: give one or more, or a prompt_file")
        if not 1 <= self.num_samples <= 65536:
            raise ValueError(f"num_samples must lie in [1, 65536], got {self.num_samples}")


@dataclass(frozen=True)
class ChatConfig(_Generation, _OfModel):
    """Options of `gpt2-triton chat`."""

    temperature: float = 0.7  # 0 takes the most likely token always
    top_p: float | None = 0.95  # keep the most likely tokens that together reach this probability
    max_new_tokens: int = 256  # of an answer
    system: str = ""  # what stands before the conversation
    template: str = "auto"  # auto: the one saved with the model; or the name of one


@dataclass(frozen=True)
class CompareConfig(_Generation, _OfModels):
    """Options of `gpt2-triton compare`."""

    temperature: float = 0.0  # 0 takes the most likely token always
    max_new_tokens: int = 128
    seed: int = 0  # prompt number i has the seed SEED + i with every model
    prompts: str = "prompts.txt"  # UTF-8: one prompt a line, or with blank lines between prompts
    out: str = "compare"  # writes OUT.md and OUT.html
    system: str = ""  # what stands before a prompt, for models with a chat template
    batch_size: int = 8  # prompts that are generated together

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, at_least_1="batch_size")
        if not self.models:
            raise ValueError("models: give at least one")


Task = Literal["hellaswag", "wikitext2", "wikitext103", "lambada", "val"]


@dataclass(frozen=True)
class PrepareConfig:
    """Options of `gpt2-triton prepare`."""

    name: str = ""  # a registered data set; see the list above
    text: str = ""  # or a UTF-8 text file, or a folder of .txt, .text, .md and .raw files
    jsonl: str = ""  # or a file of one JSON object a line, or a JSON list of them, or a folder
    parquet: str = ""  # or a parquet file, or a folder of them
    # Or a data set on the Hugging Face hub, as NAME or NAME:CONFIG, which is streamed; or a folder
    # that datasets' save_to_disk wrote.
    hf: str = ""
    megatron: str = ""  # or NAME of Megatron's NAME.idx and NAME.bin, of GPT-2 tokens
    verify: str = ""  # or check this prepared folder: headers, sizes and hashes of its shards
    field: str = "text"  # of --jsonl, --parquet and --hf: the field that holds the text
    separator: str = "<|endoftext|>"  # of --text: what stands between documents; "": nothing does
    # A row without that field, or that is no JSON: error ends here, skip leaves it out and counts.
    bad_rows: Literal["error", "skip"] = "error"
    split: str = "train"  # of --hf: the split to read
    val: str = ""  # a file or folder (for --hf a split) that is val; default: see val_fraction
    # Below 100 text files each gives its end to val; otherwise a hash of a document's text decides.
    val_fraction: float | None = None  # part of your own data that becomes val; default 0.1
    max_documents: int | None = None  # read only this many, of each of the source's splits
    max_shards: int | None = None  # of a data set of token shards: fetch only this many for train
    out: str = ""  # folder to write; default data/NAME
    tokenizer: Literal["", "gpt2", "byte", "char"] = ""  # default: the data set's own, or gpt2
    shard_tokens: int = 100_000_000  # tokens in a shard; the last one of a split has fewer
    workers: int | None = None  # tokenizing threads; 0: none besides the main; default: one a CPU

    def __post_init__(self):
        sources = ("name", "text", "jsonl", "parquet", "hf", "megatron", "verify")
        if sum(bool(getattr(self, s)) for s in sources) != 1:
            raise ValueError(
                "give either the NAME of a data set or one of --text, --jsonl, --parquet, --hf, "
                "--megatron, --verify"
            )
        if self.val_fraction is not None and not 0.0 < self.val_fraction < 1.0:
            raise ValueError(f"val_fraction must lie in (0, 1), got {self.val_fraction}")
        if self.name and (self.val or self.val_fraction is not None):
            raise ValueError(f"val and val_fraction go with your own data; {self.name} has its own")
        if self.val and self.val_fraction is not None:
            raise ValueError("give either val or val_fraction, not both")
        if self.field != "text" and not (self.jsonl or self.parquet or self.hf):
            raise ValueError("field goes with jsonl, parquet and hf")
        if self.separator != PrepareConfig.separator and not self.text:
            raise ValueError("separator goes with text")
        if self.split != "train" and not self.hf:
            raise ValueError("split goes with hf")
        if self.megatron and self.tokenizer not in ("", "gpt2"):
            raise ValueError(
                f"megatron: it holds GPT-2 tokens, not the {self.tokenizer} tokenizer's"
            )
        counts = "shard_tokens max_documents max_shards"
        check_numbers(self, at_least_1=counts, at_least_0="workers")


@dataclass(frozen=True)
class EvaluateConfig(_OfModel):
    """Options of `gpt2-triton evaluate`."""

    tasks: tuple[Task, ...] = ("hellaswag", "wikitext2", "wikitext103", "lambada")  # which ones
    data_dir: str = "data/eval"  # where the tasks' files are looked for, and downloaded to
    data: str = ""  # of val: a folder with val shards; default: that of the run
    # Only so many: examples of hellaswag and lambada, evenly spaced; lines of text; windows of val.
    limit: int | None = None
    stride: int | None = None  # of text: tokens from window to window; default: half of block_size
    detokenize: bool = True  # of WikiText: undo its splitting into words first, as GPT-2's paper
    tokens_per_batch: int = 8192  # fed to the model at once
    out: str = ""  # JSON file to write; default: evaluation_<checkpoint>.json in the run's folder
    # JSON lines to write besides: what each example of hellaswag and lambada scored.
    samples: str = ""
    # Of matmuls. Published figures are of float32 or tf32; bfloat16 is faster on a GPU and moves
    # scores a little.
    dtype: Literal["float32", "tf32", "bfloat16"] = "float32"
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    kernels: Kernels = "auto"  # triton, cpp, torch; auto: the fastest that runs here

    def __post_init__(self):
        if not self.tasks:
            raise ValueError(f"tasks: name at least one of {', '.join(get_args(Task))}")
        check_numbers(self, at_least_1="limit stride tokens_per_batch")
        if self.data and "val" not in self.tasks:
            raise ValueError("data goes with the task val")
        if self.samples and not {"hellaswag", "lambada"} & {*self.tasks}:
            raise ValueError("samples are of the tasks hellaswag and lambada: name one of them")


GGUF_DTYPES = ("f32", "f16", "q8_0")


@dataclass(frozen=True)
class ExportConfig(_OfModel):
    """Options of `gpt2-triton export`."""

    out: str  # folder to write, or NAME.gguf; must not exist
    format: Literal["hf", "gguf"] = "hf"  # Hugging Face's folder; llama.cpp's file
    # Of the weights. hf: float32, float16 or bfloat16; gguf: f32, f16 or q8_0. Default: 32 bits
    dtype: Literal["", "float32", "float16", "bfloat16", "f32", "f16", "q8_0"] = ""
    verify: bool = False  # read what was written, and compare it with the model
    license: str = ""  # of the model card, as the hub names it: mit, apache-2.0, cc-by-nc-4.0, ...
    push: str = ""  # upload to this repository of the hub, OWNER/NAME; a new one is private

    def __post_init__(self):
        known = ("float32", "float16", "bfloat16") if self.format == "hf" else GGUF_DTYPES
        if self.dtype and self.dtype not in known:
            raise ValueError(f"dtype of {self.format}: one of {', '.join(known)}, not {self.dtype}")
        is_file = self.out.endswith(".gguf")
        if is_file and (self.format != "gguf" or self.push):
            raise ValueError("out: a .gguf file goes with --format gguf, and without --push")
        if not self.out.strip("/. "):
            raise ValueError("out: name a folder that is not there yet")


@dataclass(frozen=True)
class ShowBatchConfig:
    """Options of `gpt2-triton show`."""

    run: str  # a run's folder, or the YAML file of a recipe
    step: int = 0
    rank: int = 0
    world_size: int = 1
    rows: int = 4  # print at most so many rows

    def __post_init__(self):
        check_numbers(self, at_least_0="step rank", at_least_1="world_size rows")


@dataclass(frozen=True)
class ReportConfig:
    """Options of `gpt2-triton report`."""

    run: str  # a run's folder
    gpu_hour_price: float = 0.0  # what an hour of one GPU costs; 0: not known

    def __post_init__(self):
        check_numbers(self, at_least_0="gpu_hour_price")


@dataclass(frozen=True)
class VerifyConfig:
    """Options of `gpt2-triton verify`."""

    run: str  # a run's folder
    checkpoint: str = ""  # its name or path, or start for step 0; default: the newest but one
    steps: int = 0  # to repeat at least; 0: 10, and in any case up to the next logged loss
    # Largest relative difference of a loss. Default: 0 where machine, versions and ranks are those
    # of the run, on a CPU; else 1e-4 for float32 and 1e-2 for bfloat16.
    tolerance: float | None = None
    device: str = ""  # default: the run's option

    def __post_init__(self):
        check_numbers(self, at_least_0="steps tolerance")
