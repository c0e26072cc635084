"""Models and tokenizers from folders and hub names: complete, or refused by name.

transformers and PEFT read the files. They only report tensors that are missing, unexpected or of
another shape, and fill in random weights; here such a checkpoint is an error.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .stacked_adapters import check_config, check_saved

# Options that say where files come from, the same for configs, models and tokenizers.
_FILE_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
_TOKENIZER_OPTIONS = (*_FILE_OPTIONS, "code_revision", "trust_remote_code")
# A folder with one of these is expected to hold a tokenizer.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
# Old versions of transformers saved it; new ones compute it.
_COMPUTED = re.compile(r"(^|\.)masked_bias$")
# Adapter parameters that may be missing: a count that is never saved, and one tensor that all
# layers share and that is saved once.
_NOT_SAVED = re.compile(r"\.ranknum\.|vblora_vector_bank")


def missing_folder(name: str) -> bool:
    """Whether a name can only be a folder (hub names are NAME or OWNER/NAME) but none is there."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    return is_path and not Path(name).is_dir()


def load_model(auto_class: Any, name: str, **options: Any) -> Any:
    """The model in a folder or on the hub, in evaluation mode: a checkpoint, or a PEFT adapter.

    Args:
        auto_class: one of transformers' Auto classes; adapters need AutoModelForCausalLM.
        name: folder or hub name.
        **options: for `auto_class.from_pretrained`. `use_safetensors` is True unless given, so that
            no pickle is loaded.

    Raises:
        OSError: files are missing or cannot be read.
        ValueError: tensors are missing, unexpected or of another shape.
        ImportError: a package that the model needs is not installed.
    """
    options = {"use_safetensors": True, **options}
    adapter = adapter_config(name, options)
    if adapter is None:
        return _load_whole(auto_class, name, options)
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"the adapter {name} does not name its base model")
    # The adapter's subfolder and revision do not apply to its base.
    base_options = {k: v for k, v in options.items() if k not in ("subfolder", "revision")}
    if adapter.get("revision"):
        base_options["revision"] = adapter["revision"]
    try:
        if adapter_config(base, base_options) is not None:
            raise ValueError(f"{base} is an adapter itself")
        model = _load_whole(auto_class, base, base_options)
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"the adapter {name} needs its base model {base} (base_model_name_or_path in its "
            f"adapter_config.json): {error}"
        ) from error
    return with_adapter(model, name, base, options)


def load_config(name: str, **options: Any) -> Any:
    """The configuration of config.json in a folder or on the hub.

    Raises:
        OSError: the file is missing, or transformers does not know its contents.
    """
    from transformers import AutoConfig

    known = {key: options[key] for key in _TOKENIZER_OPTIONS if key in options}
    with _reading("configuration", name):
        return AutoConfig.from_pretrained(name, **known)


def load_tokenizer(name: str, **options: Any) -> Any:
    """The tokenizer in a folder or on the hub; None where there is none.

    An adapter without one uses the tokenizer of its base model.

    Args:
        name: folder or hub name.
        **options: as for `load_model`; only those that say where files come from are used.

    Raises:
        OSError: a tokenizer's files are there but cannot be read.
    """
    from transformers import AutoTokenizer

    known = {key: options[key] for key in _TOKENIZER_OPTIONS if key in options}
    adapter = adapter_config(name, known) or {}
    if not has_tokenizer(name, known):
        base = adapter.get("base_model_name_or_path")
        known = {k: v for k, v in known.items() if k not in ("subfolder", "revision")}
        return load_tokenizer(base, **known) if base and base != name else None
    with _reading("tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(name, **known)
        # Without a vocabulary file some classes load the special tokens alone.
        if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
            raise ValueError("it has no vocabulary beyond special tokens: is a file missing?")
        tokenizer("a")  # encodes once, which reads the rest of its configuration
    return tokenizer


@contextmanager
def _reading(what: str, name: str) -> Iterator[None]:
    """Turn any error that a library raises about bad files into one line that names the files."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        words = str(error) or "no reason given"
        if not isinstance(error, (OSError, ValueError, RuntimeError)):
            words = f"{type(error).__name__}: {words}"
        raise OSError(
            f"cannot load the {what} of {name}: {textwrap.shorten(words, 300)}"
        ) from error


def adapter_config(name: str, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The contents of a PEFT adapter's adapter_config.json; None for other models."""
    from transformers.utils.peft_utils import find_adapter_config_file

    with _reading("model", name):
        if missing_folder(name):
            raise FileNotFoundError(f"the folder {name} does not exist")
        file = find_adapter_config_file(name, **_files(options))
        config = None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
        if file is not None and not isinstance(config, dict):
            raise ValueError("adapter_config.json holds no object")
    return config


def _files(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in _FILE_OPTIONS if options.get(key) is not None}


def _find(name: str, file: str, options: Mapping[str, Any]) -> Path | None:
    """Where the folder or hub repository has the file; None if it has none."""
    if Path(name).is_dir():
        path = Path(name) / (options.get("subfolder") or "") / file
        return path if path.exists() else None
    from transformers.utils import cached_file

    found = cached_file(
        name,
        file,
        **_files(options),
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _load_whole(auto_class: Any, name: str, options: dict[str, Any]) -> Any:
    files = _files(options)
    _refuse_pickle(name, "model", "pytorch_model", options)
    with _reading("model", name):
        # Do not raise at a wrong shape: `_check_report` names all faults in one message.
        model, report = auto_class.from_pretrained(
            name, **(options | {"output_loading_info": True, "ignore_mismatched_sizes": True})
        )
        if _find(name, "generation_config.json", options):  # transformers ignores a broken one
            from transformers import GenerationConfig

            _check_special_ids(GenerationConfig.from_pretrained(name, **files))
    prefix = getattr(model, "base_model_prefix", "")
    computed = {key for key, _ in model.named_buffers()}
    unexpected = [
        key
        for key in report["unexpected_keys"]
        if not {key, f"{prefix}.{key}"} & computed and not _COMPUTED.search(key)
    ]
    _check_report(name, report["missing_keys"], unexpected, report["mismatched_keys"])
    return model.eval()


def _refuse_pickle(name: str, safe: str, pickled: str, options: Mapping[str, Any]) -> None:
    """Refuse a checkpoint, or a shard of one, that exists only as a pickle."""
    if not options["use_safetensors"] or _find(name, f"{safe}.safetensors", options):
        return
    files = [f"{pickled}.bin", f"{pickled}.bin.index.json"]
    if index := _find(name, f"{safe}.safetensors.index.json", options):
        with _reading("model", name):
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [file for file in shards if not file.endswith(".safetensors")]
    for file in files:
        if index or _find(name, file, options):
            raise OSError(
                f"{name} holds a pickle ({file}), which may run any code and is not loaded: "
                "save it as safetensors"
            )


def _check_special_ids(config: Any) -> None:
    for key in ("eos_token_id", "pad_token_id"):
        value = getattr(config, key)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and type(token) is not int:
                raise ValueError(f"{key} in generation_config.json is {value!r}, expected integers")


def has_tokenizer(name: str, options: Mapping[str, Any]) -> bool:
    return any(_find(name, file, options) for file in _TOKENIZER_FILES)


def with_adapter(
    model: Any,
    name: str,
    base: str,
    options: dict[str, Any],
    shares_base: bool = False,
) -> Any:
    """The base model with the adapter's tensors, a `PeftModel`. `shares_base`: other models have
    the base's tensors too; refuse an adapter that would change them, before it does."""
    try:
        from peft import PeftConfig, get_peft_model
        from peft.utils import load_peft_weights, set_peft_model_state_dict
    except ImportError as error:
        raise ImportError(f"the adapter {name} needs PEFT: pip install peft") from error

    for file in ("model.safetensors", "model.safetensors.index.json"):
        if _find(name, file, options):
            raise ValueError(f"{name} holds a model ({file}) and an adapter: which one is meant?")
    _refuse_pickle(name, "adapter_model", "adapter_model", options)
    if not _find(name, "adapter_model.safetensors", options) and options["use_safetensors"]:
        raise OSError(f"cannot load the adapter {name}: it has no adapter_model.safetensors")
    files = _files(options)
    with _reading("adapter", name):
        config = PeftConfig.from_pretrained(name, **files)
        if config.task_type not in (None, "CAUSAL_LM"):
            raise ValueError(f"expected an adapter of a causal model, got {config.task_type}")
    if shares_base:
        check_config(name, config)
    config.inference_mode = True
    with _reading("adapter", name):
        weights = load_peft_weights(name, device="cpu", **files)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    if shares_base:
        check_saved(name, weights, dict(adapted.named_parameters()))
    with _reading("adapter", name):
        report: Any = set_peft_model_state_dict(adapted, weights)
    if not config.is_prompt_learning:  # PEFT loads that method's only tensor strictly
        own = {key for key, _ in adapted.named_parameters()}
        missing = [
            key
            for key in report.missing_keys
            if key in own and ".default" in key and not _NOT_SAVED.search(key)
        ]
        _check_report(name, missing, report.unexpected_keys, [], f" for {base}")
    return adapted.eval()


def _check_report(
    name: str,
    missing: Sequence[str],
    unexpected: Sequence[str],
    mismatched: Sequence[tuple[str, Sequence[int], Sequence[int]]],
    purpose: str = "",
) -> None:
    """Refuse a checkpoint whose tensors are not exactly those of its architecture."""
    shapes = [
        f"{key} ({list(found)} instead of {list(expected)})" for key, found, expected in mismatched
    ]
    faults = [
        f"{len(keys)} {what} ({_first(keys)})"
        for what, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
        )
        if keys
    ]
    if faults:
        raise ValueError(f"the checkpoint {name} has wrong tensors{purpose}: {', '.join(faults)}")


def _first(keys: Sequence[str], count: int = 3) -> str:
    """The first few names."""
    some = sorted(keys)
    return ", ".join(some[:count]) + (", ..." if len(some) > count else "")
