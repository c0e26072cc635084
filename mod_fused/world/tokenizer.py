"""The word-level tokenizer that the four models of the embedded world share."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .corpus import format_prompt, questions
from .lexicon import CORES, OPENERS, TAILS, TOPICS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
# A word carries the space before it, so joining the tokens of a text gives the text back.
_PIECE = r" ?\w+|[^\w\s]|\s"


def vocabulary() -> list[str]:
    """The special tokens and, sorted, every token that the grammar of `corpus` can produce."""
    phrases = [
        phrase for table in (CORES, OPENERS, TAILS) for kind in table.values() for phrase in kind
    ]
    phrases += [phrase for topic in TOPICS for phrase in (*topic.steps, topic.pun)]
    texts = [f" {phrase}" for phrase in phrases]
    texts += [f" {phrase[0].upper()}{phrase[1:]}.! " for phrase in phrases]
    texts += [
        format_prompt(question) for held_out in (False, True) for question in questions(held_out)
    ]
    return [
        PAD,
        BOS,
        EOS,
        UNK,
        *sorted({piece for text in texts for piece in re.findall(_PIECE, text)}),
    ]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that pads on the left and puts BOS in front; unknown words become UNK."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: index for index, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
