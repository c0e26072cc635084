"""Tokenizers of the kinds that there are, each with a handful of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>")
_WORDS = "▁ a ▁a ▁cat cat ▁the s ▁dog . ▁. ' t n ▁n ▁▁".split()


def _numbered(tokens: Iterable[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate([*SPECIAL, *tokens])}


def _fast(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        **options,
    )


def metaspace() -> PreTrainedTokenizerFast:
    """SentencePiece as T5 has it: the space in front of the first token is dropped."""
    tokenizer = Tokenizer(models.BPE(_numbered(_WORDS), [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _fast(tokenizer)


def byte_fallback() -> PreTrainedTokenizerFast:
    """SentencePiece as Llama 2 has it: unknown characters as bytes, a run of them decoded whole."""
    vocab = _numbered([*(f"<0x{i:02X}>" for i in range(256)), *_WORDS])
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _fast(tokenizer)


def byte_level(**options: Any) -> PreTrainedTokenizerFast:
    """GPT-2's and Llama 3's, without merges: a character may be several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(_numbered(alphabet), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer, **options)


def cleaning() -> PreTrainedTokenizerFast:
    """BERT's: words joined by spaces, which clean-up takes away again, tokens later."""
    words = "a cat ##s the . ' t n s ve ##n ? ! , m re do".split()
    tokenizer = Tokenizer(models.WordPiece(_numbered(words), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return _fast(tokenizer, clean_up_tokenization_spaces=True)


def word_ends() -> PreTrainedTokenizerFast:
    """GPT-1's: a token says that its word ends, the space comes with the next one."""
    words = "a</w> cat</w> cat s</w> the</w> .</w> a t</w>".split()
    model = models.BPE(_numbered(words), [], unk_token="<unk>", end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder()
    return _fast(tokenizer)


def python_bytes() -> ByT5Tokenizer:
    """Written in Python: bytes, of which decoding leaves out what is no character."""
    return ByT5Tokenizer(extra_ids=0)


def framed(form: str, **options: Any) -> PreTrainedTokenizerFast:
    """Byte-level, with special tokens around a text: "<s> $A", "$A </s>", "<s> $A </s>"."""
    tokenizer = byte_level(**options)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[(t, i) for i, t in enumerate(SPECIAL) if t in form]
    )
    return tokenizer


ALL: dict[str, Callable[[], Any]] = {
    make.__name__: make  # type: ignore[attr-defined]
    for make in (metaspace, byte_fallback, byte_level, cleaning, word_ends, python_bytes)
}
