"""`generate`: it decodes a batch and draws every token from the mixture pi* of several models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..divergence import Divergence, ReverseKL, get_divergence
from .adapters import check_shared
from .beams import Beams, check_beams
from .candidates import Candidates, check_candidates
from .ensemble import Ensemble
from .generation_config import configured
from .masks import MaskFunction, Masks, ProcessorMasks, bad_words_of
from .memory import check_decoding
from .one_head import shared_head
from .options import (
    check_limits,
    check_vocab_size,
    first_history,
    off_at_corners,
    ready_options,
    support_cut,
)
from .penalties import Penalties
from .prompts import Prompts
from .responses import FINISH_REASONS, GenerateOutput, Responses
from .scores import check_scores
from .skipping import cuts_support, log_linear_coefficients, models_to_run, reads_reference
from .steps import draw_all
from .stopping import StoppingCriterion, check_stopping
from .streaming import streaming
from .totals import Resampler, check_resample_fn
from .values import ValueFunction, ValueGuide, ValueWeighting, value_count, value_source

__all__ = ["FINISH_REASONS", "GenerateOutput", "generate"]


# no_grad, not inference_mode: tensors made in inference mode could not enter a loss later.
@torch.no_grad()
@configured
def generate(
    ensemble: Ensemble,
    prompts: Prompts | None = None,
    *,
    weights: Sequence[float] | Sequence[Sequence[float]] | Tensor,
    input_ids: Tensor | Sequence[Tensor] | None = None,
    attention_mask: Tensor | Sequence[Tensor] | None = None,
    add_special_tokens: bool | None = None,
    divergence: str | Divergence = "reverse_kl",
    normalizer: str = "exact",
    sequence_history: bool = False,
    prefix_logprobs: Tensor | Sequence[Sequence[float]] | None = None,
    mixture_prefix_logprobs: Tensor | Sequence[float] | None = None,
    logit_scales: Sequence[float] | None = None,
    vocab_size: int | None = None,
    plausibility: float | str | Sequence[float] | Tensor | None = "auto",
    plausibility_tensor: int = 0,
    value_fn: ValueFunction | ValueGuide | None = None,
    value_weights: Sequence[float]
    | Sequence[Sequence[float]]
    | Tensor
    | ValueWeighting
    | None = None,
    mask_fn: MaskFunction | ProcessorMasks | None = None,
    bad_words_ids: Sequence[Sequence[int]] | None = None,
    logit_bias: Mapping[int, float] | Sequence[Mapping[int, float]] | None = None,
    repetition_penalty: float | Sequence[float] | Tensor = 1.0,
    resample_fn: Callable[[int, Tensor, Tensor, Tensor], Tensor | None] | Resampler | None = None,
    max_new_tokens: int = 20,
    min_new_tokens: int | None = None,
    max_time: float | None = None,
    num_return_sequences: int = 1,
    num_candidates: int | None = None,
    resample_below: float | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    do_sample: bool | None = None,
    temperature: float | Sequence[float] | Tensor = 1.0,
    top_k: int | Sequence[int] | Tensor | None = None,
    top_p: float | Sequence[float] | Tensor | None = None,
    min_p: float | Sequence[float] | Tensor | None = None,
    seed: int | Sequence[int] | Tensor | None = None,
    position: int | Sequence[int] | Tensor = 0,
    eos_token_id: int | Sequence[int] | Tensor | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    stopping_criteria: Sequence[StoppingCriterion] | StoppingCriterion | None = None,
    streamer: Any = None,
    use_cache: bool = True,
    one_head: bool | str = False,
    generation_config: Any = None,
    output_scores: bool = False,
    output_logits: bool = False,
    return_model_logprobs: bool = False,
    backend: str | None = None,
) -> GenerateOutput:
    """Draw responses from the policy that is optimal for a weighted sum of objectives.

    At each step pi*(s) = pi_ref(s) (f')^-1(-Z + sum_i w_i f'(pi_i(s) / pi_ref(s))) (MOD, arXiv
    2406.18853). `mod_fused.sample` documents divergence, normalizer, logit_scales, vocab_size,
    temperature, top_k, top_p, min_p and backend. weights, temperature, top_k, top_p,
    min_p, seed and position may differ from row to row. From the models' own generation configs
    only the end-of-sequence and padding ids are used.

    A model whose coefficient is 0 in every row does not run: under reverse KL the reference where
    the weights sum to one, and any policy of weight 0. It runs where return_model_logprobs, a
    `Resampler`, plausibility (the model of plausibility_tensor) or a value_fn with candidates
    needs it. Its end-of-sequence ids and its vocabulary count all the same.

    Args:
        ensemble: the models; B rows are decoded together.
        prompts: one prompt, a list of B prompts for all models, or one list of B prompts per model
            (no list for a reference that is None). A prompt is a string or a conversation, a list
            of messages {"role": ..., "content": text, or parts {"type": "text", "text": ...}}; a
            list whose first item is a message is one conversation. Each model's tokenizer encodes
            its own prompts. Conversations go through its chat template, with the generation prompt;
            if the last message is the assistant's, the response continues it.
        weights: [M] or [B, M].
        input_ids: instead of prompts: integer tensor [B, n] for all models, or a list with one per
            model.
        attention_mask: for input_ids, same form: 1 for tokens, 0 for padding on the left.
        add_special_tokens: for strings, as transformers' tokenizers take it. None keeps the tokens
            that the tokenizer puts in front of a text, without a second BOS where the text begins
            with one (as a rendered conversation may), and drops those that it puts behind (T5's or
            BERT's end of text).
        sequence_history: weigh whole responses, not the next token alone: the log-ratio of the
            response so far is added to each token's. It changes nothing for reverse KL, where it
            cancels. With normalizer="exact" Z normalises to the mixture's own mass of the response
            so far (`mod_fused.sample`, mixture_prefix_logprobs): of all rules that decode token by
            token it comes nearest the optimum over whole responses. "zero" is eq. 6 of the paper.
            With both pi* at weights [1, 0] is the first policy itself.
        prefix_logprobs: [B, M+1], with sequence_history, to go on with a response (see position):
            the response's log-probability so far under each model, reference first, which is the
            sum over T of model_logprobs. None: the response begins here.
        mixture_prefix_logprobs: [B], goes with it where the normalizer is exact: log pi* of the
            response so far, the sum over T of logprobs.
        plausibility: as in `mod_fused.sample`; None is off. "auto" is 1e-3 off reverse KL and off
            under it: an exact Z pours the mass that the policies' ratios leave over into tokens
            that the reference finds all but impossible, where these ratios are noise. It is off,
            too, for rows whose pi* is one of the models (one weight 1 and all others 0, or all 0),
            so that it is exactly that model, and in steps with a mask or with candidates, which may
            leave nothing plausible.
        plausibility_tensor: as in `mod_fused.sample`.
        value_fn: `value_fn(step, sequences)` returns values [J, B, V], or (values [J, B, K],
            value_ids [B, K]); sequences int64 [B, n + step] are the first model's prompts and the
            responses so far; step counts from 0 in every call, whatever position is. Or a
            `mod_fused.decoding.values.ValueGuide` such as `mod_fused.guidance.Guidance`, which
            holds trained scorers and their caches; it reads the first model's prompts.
        value_weights: [J] or [B, J], for value_fn. Or a `mod_fused.decoding.values.ValueWeighting`,
            which chooses them at each step, such as `mod_fused.guidance.WorstCaseWeights`.
        mask_fn: `mask_fn(step, sequences)` returns the tokens allowed next: bool [B, V], or packed
            int32 [B, ceil(V/32)].
        bad_words_ids: forbidden sequences of token ids: the last token of one is excluded where the
            prompt and the response so far end with the others. As in transformers, a lone
            end-of-sequence id forbids nothing.
        logit_bias: {token id: finite number}, or a list of B: added to log pi* before temperature.
            Rows that have one are not cut by plausibility="auto". Refused with num_candidates.
        repetition_penalty: above 0, one number or [B]: log pi* of each token that the first model's
            prompt or the response so far holds is multiplied by it, which makes these less likely
            above 1. (transformers and vLLM treat unnormalised logits so; log pi* has no sign to
            divide by.) logit_bias is added to the result. Refused with num_candidates.
        resample_fn: `resample_fn(step, sequences, lengths, reasons)`, called after each step, with
            sequences int64 [B, n + step + 1], lengths int64 [B] of the responses, and reasons int64
            [B], indices into FINISH_REASONS, 0 for rows that go on. It returns the rows to go on
            with, int64 [B], each any number of times or not at all, or None for all of them. Seeds
            and other parameters stay in their places. See `mod_fused.guidance.blockwise_best_of_k`.
            Or a `mod_fused.decoding.totals.Resampler`, which also gets the log-probabilities of the
            responses under every model and under what they were drawn from, and their values.
        max_new_tokens: the most tokens to draw per row.
        min_new_tokens: end-of-sequence tokens are not drawn before so many others. Stop strings,
            stopping_criteria and max_time end a row all the same, as in transformers.
        max_time: seconds from the call on, after which no further step begins. The first token is
            always drawn. Refused with num_candidates.
        num_return_sequences: K responses to each prompt, which is read once. There are B K rows:
            response k to prompt b is row b K + k. Parameters have one entry per prompt; functions
            get all rows. Response 0 has the prompt's seed, response k has
            SplitMix64(SplitMix64(seed) + k); the output holds all seeds. With num_beams: the best K
            responses found, the best first; at most num_beams.
        num_candidates: N responses are drawn to each prompt, with the seeds that N return sequences
            would have. Each weighs pi*(y) / q(y): its probability under the optimum over whole
            responses, over that with which it was drawn, after temperature, filters and masks. The
            K = num_return_sequences responses returned are K independent draws among the N by these
            weights; one may come more than once, each time with its own seed, and K may exceed N.
            The larger N, the nearer the responses come to

                pi*(y) ~ pi_ref(y)^(1 - sum w) prod_i pi_i(y)^w_i exp(sum_j v_j V_j(y))
                pi*(y) = pi_ref(y) (f')^-1(sum_i w_i f'(pi_i(y) / pi_ref(y)) + sum_j v_j V_j(y) - Z)

            (the first under reverse KL, up to a constant; the second for the others) over the
            responses of at most max_new_tokens that can be drawn: what plausibility, filters, masks
            or the candidates of value_fn exclude is outside the target. V_j(y) is the value that
            value_fn gave to the last token of the response: scorers are values of prefixes.
            Temperature, filters, normalizer and sequence_history change only the candidates. The
            output has the weights, the effective sample size and the normaliser. The choice has
            random numbers of its own: stream 2 of the prompt's seed, at the position of the first
            token. Refused with do_sample=False, temperature 0, weights of values that are chosen at
            each step, resample_fn, streamer, num_beams, prefix_logprobs and registered divergences.
        resample_below: of num_candidates, a share of N in [0, 1]: sequential Monte Carlo. Whenever
            the effective sample size of a prompt's candidates, weighed as prefixes, falls below it,
            they are resampled there and then (systematically), and all go on with equal weights; 1
            does so whenever the weights differ. Values are the twist. The target and the meaning
            of the weights stay (see `mod_fused.decoding.candidates`). It pays off where a prefix
            tells what the whole response will be worth, as good values do; elsewhere candidates are
            lost for nothing. None or 0: whole responses only. Random numbers: stream 3 of the
            prompt's seed, at the position of the token drawn last.
        num_beams: more than 1 searches for the likeliest responses under pi* with so many beams, as
            transformers' beam search does: it draws nothing. Functions get num_beams rows for each
            prompt. It cannot be combined with do_sample=True, temperature, top_k, top_p, min_p,
            seed, position, streamer or resample_fn. mask_fn excludes tokens, and what is left is
            not normalised anew. Ties go to the earlier beam, then to the lower token id. A beam
            that nothing can follow (NaN logits, everything masked) is dropped.
        length_penalty: of num_beams: responses are compared by the sum of log pi* over length **
            length_penalty, with the length in tokens of this call. Above 0 it favours long ones.
        early_stopping: of num_beams: True ends the search when num_beams responses have ended,
            False when the best beam at its present length scores below all of them, "never" when
            even the full length (length_penalty above 0) could not raise it above them.
        do_sample: False is temperature 0, the most likely token of pi*. None: True, but for
            num_beams.
        seed: int, or one int64 per row (list or tensor), or None for seeds from torch's generator.
            With one per row, a row's tokens depend on its own seed and prompt only, not on the rest
            of the batch.
        position: of the first token in its response, int or int64 [B] (list or tensor), below
            2^63: a row's noise is a function of seed and position, and position + step is the next
            token's. To go on with responses that ended by length, pass input_ids=out.sequences,
            attention_mask=out.attention_mask, seed=out.seeds and position=out.lengths (plus the
            position of that call): the two calls draw the tokens that one longer call would have
            drawn. Leave out the rows that ended.
        eos_token_id: id or ids that end a row; None: those of all models; an empty list: none.
        pad_token_id: fills a row behind its end; None: a tokenizer's or model's, else the first of
            eos_token_id, else an end-of-sequence id of the models, else 0.
        stop_strings: end a row after the first token with which its decoded response, special
            tokens included, holds one of them. Only the response of this call counts, decoded as
            the continuation of a text (see `GenerateOutput.texts`). Needs a tokenizer.
        stopping_criteria: transformers' `StoppingCriteriaList`, or functions `(input_ids, scores)
            -> bool [B]`, called after each token with int64 [B, n + step + 1], the first model's
            prompts and the responses so far: True ends the row. scores are those of the output, a
            tuple with a tensor for each step, or None without output_scores.
        streamer: `streamer(step, tokens)`, called after each step in which a row drew a token, with
            the tokens int64 [B] on the CPU; pad_token_id stands for rows that drew none (ended or
            invalid). Or a transformers streamer, for one row; its end() is called once, also when
            generate raises.
        use_cache: False recomputes the whole sequence at each step: for models without a KV cache.
        one_head: True: the last hidden states of the models that run are mixed, and their common
            head multiplies once in place of once for each. Under reverse KL log pi* is the same up
            to rounding (of the head's dtype). ValueError with the reason where it cannot be had:
            heads that differ in anything, a family that is not among
            `mod_fused.decoding.one_head.FAMILIES`, a soft-cap, other divergences, and all that
            needs the logits of every model: logit_scales, plausibility, return_model_logprobs,
            num_candidates, a `Resampler`, a value_fn that reads the reference. "auto": where it can
            be had. Nothing changes where only one model runs. Hooks on the head see the mixture.
        generation_config: a transformers `GenerationConfig` for all that is not passed here. What
            it leaves out has transformers' defaults: do_sample=False, top_k=50, 20 new tokens.
            Lengths count the first model's prompts. What `generate` does not do is refused by name,
            see docs/serving.md.
        output_scores, output_logits: return `GenerateOutput.scores` and `logits`. Refused with
            num_beams, num_candidates and resample_fn.
        return_model_logprobs: return log pi_ref and log pi_i of each token: all models run, and
            each step sums over every model's vocabulary once more.

    Returns:
        GenerateOutput. One host synchronisation per step tells whether all rows have ended; a beam
        search and resample_below have more. (In a batch with padding transformers adds its own, for
        its attention masks.)

    Raises:
        TypeError, ValueError: before any model runs, for arguments that do not fit; see
            `mod_fused.sample`. (Arguments that depend on the width of a plain callable's logits are
            checked after its first call.) TypeError for several responses or resample_fn with a
            callable that keeps its own state, which cannot be copied: pass use_cache=False.
    """
    with streaming(streamer) as stream:
        if not isinstance(ensemble, Ensemble):
            raise TypeError(f"ensemble must be a mod_fused.Ensemble, got {type(ensemble).__name__}")
        check_shared({**ensemble.places, **getattr(value_fn, "places", {})})
        searching = check_beams(
            num_beams,
            num_return_sequences,
            length_penalty,
            early_stopping,
            max_new_tokens,
            {
                "do_sample": do_sample,
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "min_p": min_p,
                "seed": seed,
                "position": position,
                "streamer": streamer,
                "resample_fn": resample_fn,
                "num_candidates": num_candidates,
                "output_scores": output_scores,
                "output_logits": output_logits,
            },
        )
        stopping = check_stopping(stopping_criteria, max_time, output_scores)
        scores = check_scores(output_scores, output_logits, resample_fn, num_candidates)
        copies = num_return_sequences if searching is None else searching.num_beams
        limits = check_limits(
            ensemble,
            max_new_tokens,
            copies,
            num_candidates,
            eos_token_id,
            pad_token_id,
            stop_strings,
            min_new_tokens,
        )
        vocab_size = check_vocab_size(vocab_size, ensemble)
        asks_totals = isinstance(resample_fn, Resampler)
        if value_fn is None and value_weights is not None:
            raise ValueError("value_weights were given without value_fn")
        if resample_below is not None and num_candidates is None:
            raise ValueError("resample_below was given without num_candidates")
        check_resample_fn(resample_fn, stream.active)

        running = models_to_run(
            ensemble.models,
            weights,
            divergence,
            plausibility=plausibility,
            plausibility_tensor=plausibility_tensor,
            value_fn=value_fn,
            all_models=return_model_logprobs or asks_totals,
        )
        ids, masks = ensemble.encode(
            prompts,
            input_ids=input_ids,
            attention_mask=attention_mask,
            pad_token_id=limits.pad_token_id,
            add_special_tokens=add_special_tokens,
            models={ensemble.first, *running},
        )
        batch, device, copies = len(ids[0]), ids[0].device, limits.copies
        length = limits.max_new_tokens
        check_decoding(
            [ensemble.models[i] for i in running],
            ids[-len(running) :],
            copies,
            length,
            use_cache,
            output_scores + output_logits,
        )
        head = shared_head(
            one_head,
            ensemble,
            running,
            log_linear_coefficients(ensemble.models, weights, copies),
            device,
            {
                "divergence": type(get_divergence(divergence)) is not ReverseKL,
                "logit_scales": logit_scales is not None,
                "plausibility": cuts_support(plausibility, divergence),
                "return_model_logprobs": return_model_logprobs,
                "num_candidates": num_candidates is not None,
                "resample_fn": asks_totals,
                "value_fn": reads_reference(value_fn),
            },
        )
        num_values = partial(value_count, value_fn)
        weighting = value_weights if isinstance(value_weights, ValueWeighting) else None
        if weighting is not None:
            weighting.check(divergence, num_values(None))
        options: dict[str, Any] = {
            "weights": weights,
            "value_weights": value_weights if weighting is None else None,
            "divergence": divergence,
            "normalizer": normalizer,
            "logit_scales": logit_scales,
            "plausibility": support_cut(plausibility, divergence),
            "plausibility_tensor": plausibility_tensor,
            "temperature": temperature if do_sample is None or do_sample else 0.0,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "seed": seed if searching is None else 0,  # no seeds are drawn for a search
            "position": position,
            "backend": backend,
        }
        highest = ensemble.vocab_size if vocab_size is None else vocab_size
        penalties = Penalties(logit_bias, repetition_penalty, batch, copies, highest, device)
        bad_words = bad_words_of(bad_words_ids, limits.eos_token_ids, highest, device)
        if num_candidates is not None:
            threshold = check_candidates(
                options,
                resample_below,
                value_fn,
                value_weights,
                resample_fn=resample_fn,
                streamer=streamer,
                prefix_logprobs=prefix_logprobs,
                mixture_prefix_logprobs=mixture_prefix_logprobs,
                max_time=True if stopping.timed else None,
                logit_bias=logit_bias,
                repetition_penalty=penalties.repetition,
            )
        options = ready_options(ensemble, options, num_values, limits, batch, device)
        automatic = isinstance(plausibility, str)
        if automatic and weighting is None and options["plausibility"] is not None:
            options["plausibility"] = off_at_corners(options, value_fn is not None)
        if automatic and options["plausibility"] is not None:
            options["plausibility"] = penalties.cut(options["plausibility"])
        options["vocab_size"] = vocab_size
        if head is not None:
            options |= {"weights": [1.0], "plausibility_tensor": 0}
        prefixes = prefix_logprobs, mixture_prefix_logprobs
        columns = len(ensemble.present)
        history = first_history(
            *prefixes, sequence_history, options, (batch, columns), copies, device
        )

        room: dict[str, Any] = {"max_new_tokens": length, "use_cache": use_cache}
        own = slice(-len(running), None)  # the first model's prompts come first, also if it rests
        state = ensemble.start(ids[own], masks[own], models=running, head=head, **room)
        has_reference = ensemble.models[0] is not None
        values = value_source(value_fn, ids[0], masks[0], vocab_size, has_reference, **room)
        if copies > 1 or resample_fn is not None:
            state.fork(copies)
            values.fork(copies)
        responses = Responses(
            ids[0].repeat_interleave(copies, dim=0),
            limits,
            tokenizer=ensemble.tokenizer,
            columns=columns if return_model_logprobs else 0,
            history=history,
            models=columns if asks_totals or num_candidates is not None else 0,
            stopping=stopping,
            scores=scores,
            mask=None if masks[0] is None else masks[0].repeat_interleave(copies, dim=0),
        )
        beams = None
        if searching is not None:
            beams = Beams(searching, responses, limits, options["logit_scales"])
        candidates = None
        if num_candidates is not None:
            candidates = Candidates(options, limits, has_reference, threshold)
            resample_fn = candidates if threshold else None
        excluding = Masks(mask_fn, limits, options, automatic, bad_words)
        functions = excluding, penalties, resample_fn
        draw_all(length, state, values, responses, options, stream, *functions, beams, weighting)
        if beams is not None:
            return beams.output(masks[0])
        mask = None if masks[0] is None else masks[0].repeat_interleave(limits.returned, dim=0)
        if candidates is None:
            return responses.output(mask, options["seed"])
        assert responses.totals is not None
        found, rows = candidates.finish(
            responses.sequences, responses.lengths, responses.totals, responses.valid
        )
        responses.select(rows)
        return replace(responses.output(mask, options["seed"][rows]), **found)
