# SPDX-License-Identifier: Apache-2.0
"""vLLM's Hugging Face renderer, which tokenizes only what a turn adds to an earlier one.

Every endpoint that takes text calls ``_tokenize_prompt`` (chat, completions, responses, messages),
so only this method is extended. A prompt goes to vLLM's own method unless it is plain text and its
tokenizer passed ``render.probe``. The class is put in place through vLLM's renderer registry.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from weakref import WeakSet

from tokenizers import Tokenizer
from transformers import TokenizersBackend
from vllm.inputs import TextPrompt, TokensPrompt
from vllm.logger import init_logger
from vllm.renderers.hf import HfRenderer, resolve_chat_template, safe_apply_chat_template
from vllm.renderers.params import TokenizeParams
from vllm.utils.async_utils import make_async

from vllm_stateful.adapters.frontend.detokenizer import try_tail_decoding
from vllm_stateful.adapters.frontend.identity import owned_name
from vllm_stateful.adapters.frontend.messages import ChatRenderer
from vllm_stateful.adapters.frontend.turn_context import note_salt, prompt_owner
from vllm_stateful.config import process_config
from vllm_stateful.observe.prompt_counts import PROMPT_COUNTS, Tokenized, Verified
from vllm_stateful.render.incremental_tokenizer import Encode, IncrementalTokenizer
from vllm_stateful.render.probe import count_leading, unsafe_reason
from vllm_stateful.render.safe_cuts import CutRules
from vllm_stateful.render.splicer import Splicer
from vllm_stateful.render.text_memory import TextMemory
from vllm_stateful.transport.prompt_ids import PromptTokenIds

logger = init_logger("vllm.stateful")

_memories: WeakSet[TextMemory] = WeakSet()
"""The text memories of this process. There is one, except in tests and with several models."""


class StatefulHfRenderer(HfRenderer):  # type: ignore[misc]
    """An ``HfRenderer`` with a memory of the texts that it tokenized."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stateful_config = process_config()
        self.tokenizer_off: str | None = None
        self._incremental = self._make_incremental()
        backend: Any = getattr(self.tokenizer, "_tokenizer", None)
        if isinstance(backend, Tokenizer):
            try_tail_decoding(backend)
        self._verifier = ThreadPoolExecutor(1, thread_name_prefix="stateful-verify")
        self._resources.callback(self._verifier.shutdown, wait=False)
        self._is_verifying = False
        # ``BaseRenderer.__init__`` binds this name to the synchronous method in a thread pool. The
        # request's context variables are not visible there.
        self._stock_tokenize_prompt_async: Any = self.__dict__["_tokenize_prompt_async"]
        self._tokenize_prompt_async = self._tokenize_prompt_in_context
        if "messages" not in self._stateful_config.disable:
            self._apply_chat_template_async = make_async(
                ChatRenderer(
                    safe_apply_chat_template,
                    resolve_chat_template,
                    self._stateful_config.verify_tokens,
                ),
                executor=self._executor,
            )

    # ---- may this tokenizer be used in parts? --------------------------------------------

    def _make_incremental(self) -> IncrementalTokenizer | None:
        started = time.perf_counter()
        made = self._try_incremental()
        if isinstance(made, str):
            self.tokenizer_off = made
            logger.warning("stateful: every prompt is tokenized in full: %s", made)
            return None
        logger.info(
            "stateful: prompts are tokenized in parts (%d safe tokens, tried in %.1f s)",
            len(made.rules.contents),
            time.perf_counter() - started,
        )
        PROMPT_COUNTS.watch_memory(lambda: made.memory.num_bytes)
        _memories.add(made.memory)
        return made

    def _try_incremental(self) -> IncrementalTokenizer | str:
        """A tokenizer that works in parts, or the reason why there is none."""
        if "tokenize" in self._stateful_config.disable:
            return "disabled (--stateful-disable tokenize)"
        tokenizer: Any = self.tokenizer
        if not isinstance(tokenizer, TokenizersBackend):
            return f"its tokenizer is a {type(tokenizer).__name__}, not a fast one"
        backend: Any = tokenizer._tokenizer
        if getattr(backend, "encode_special_tokens", False):
            return "its tokenizer splits special tokens"
        unknown = getattr(tokenizer, "unk_token_id", None)
        rules = CutRules.of(backend.get_added_tokens_decoder(), never=[unknown])
        vocab_size = max(tokenizer.max_token_id + 1, self.model_config.get_vocab_size())
        encode = self._encode_with(TokenizeParams(max_total_tokens=None))
        num_leading = count_leading(encode, rules)
        reason = unsafe_reason(encode, rules, num_leading, vocab_size)
        if reason is not None:
            return reason
        memory = TextMemory(self._stateful_config.render_bytes)
        return IncrementalTokenizer(rules, num_leading, vocab_size, memory, self._make_splicer())

    def _make_splicer(self) -> Splicer | None:
        if self._stateful_config.history != "generated":
            return None
        tokenizer: Any = self.tokenizer

        def decode(token_ids: Sequence[int]) -> str:
            return str(tokenizer.decode(list(token_ids), skip_special_tokens=False))

        return Splicer(decode, PROMPT_COUNTS.answered)

    # ---- one prompt ----------------------------------------------------------------------

    async def render_chat_async(self, *args: Any, **kwargs: Any) -> Any:
        """Render as vLLM does; note the cache salt, because nothing is shared across salts."""
        note_salt((kwargs.get("prompt_extras") or {}).get("cache_salt"))
        return await super().render_chat_async(*args, **kwargs)

    async def render_cmpl_async(self, *args: Any, **kwargs: Any) -> Any:
        """Render as vLLM does; note the cache salt, because nothing is shared across salts."""
        note_salt((kwargs.get("prompt_extras") or {}).get("cache_salt"))
        return await super().render_cmpl_async(*args, **kwargs)

    def _process_tokens(self, prompt: TokensPrompt, **options: Any) -> Any:
        """Process as vLLM does; names that a client gave to media are made its tenant's own."""
        return super()._process_tokens(_with_owned_names(prompt), **options)

    async def _process_tokens_async(self, prompt: TokensPrompt, **options: Any) -> Any:
        """Process as vLLM does; names that a client gave to media are made its tenant's own."""
        return await super()._process_tokens_async(_with_owned_names(prompt), **options)

    async def _tokenize_prompt_in_context(
        self, prompt: TextPrompt, params: TokenizeParams
    ) -> TokensPrompt:
        if self._why_stock(prompt, params) is not None:
            return await self._stock_tokenize_prompt_async(prompt, params)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._executor, self._tokenize_as, prompt, params, prompt_owner()
        )

    def _tokenize_prompt(self, prompt: TextPrompt, params: TokenizeParams) -> TokensPrompt:
        if (why := self._why_stock(prompt, params)) is not None:
            return self._tokenize_in_full(prompt, params, why)
        return self._tokenize_as(prompt, params, prompt_owner())

    def _why_stock(self, prompt: TextPrompt, params: TokenizeParams) -> Tokenized | None:
        """Why vLLM's own tokenization is used; None when ours is."""
        if self._incremental is None or self.tokenizer_off is not None:
            return Tokenized.TOKENIZER
        if params.truncate_prompt_tokens is not None or params.pad_prompt_tokens is not None:
            return Tokenized.PARAMETERS
        if params.do_lower_case or self._wants_offsets(prompt, params):
            return Tokenized.PARAMETERS
        if prompt.get("multi_modal_data") or prompt.get("_prompt_embeds"):
            return Tokenized.MULTIMODAL
        return None

    def _tokenize_in_full(
        self, prompt: TextPrompt, params: TokenizeParams, why: Tokenized
    ) -> TokensPrompt:
        PROMPT_COUNTS.tokenized(why)
        return super()._tokenize_prompt(prompt, params)

    def _tokenize_as(
        self, prompt: TextPrompt, params: TokenizeParams, owner: tuple[str, str]
    ) -> TokensPrompt:
        assert self._incremental is not None
        ids = self._incremental.tokenize(
            prompt["prompt"],
            self._encode_with(params),
            tenant=owner,
            add_special_tokens=params.add_special_tokens,
        )
        limit = params.max_input_tokens
        if ids is None or (limit is not None and len(ids) > limit):
            is_short = len(prompt["prompt"]) < self._incremental.min_bytes
            why = Tokenized.SHORT if is_short else Tokenized.UNUSUAL
            return self._tokenize_in_full(prompt, params, why)
        PROMPT_COUNTS.tokenized(
            Tokenized.INCREMENTAL if ids.num_parent_tokens else Tokenized.FULL,
            len(ids),
            ids.num_parent_tokens,
        )
        self._maybe_verify(prompt["prompt"], params, ids)
        made = self._build_tokens_prompt([], prompt)
        made["prompt_token_ids"] = ids
        return made

    def _encode_with(self, params: TokenizeParams) -> Encode:
        """A function that tokenizes a piece of text with vLLM, without a limit of its length.

        With a limit, vLLM would cut off what is too long, and a later text would continue that.
        """
        whole = replace(params, max_total_tokens=None, max_output_tokens=0)

        def encode(text: str, add_special_tokens: bool) -> list[int]:
            wanted = replace(whole, add_special_tokens=add_special_tokens)
            made = super(StatefulHfRenderer, self)._tokenize_prompt({"prompt": text}, wanted)
            return list(made["prompt_token_ids"])

        return encode

    def validate_token_ids(self, token_ids: Any, *, parameter: str | None = None) -> None:
        """Validate as vLLM does; skip ids of this renderer, which were checked when new."""
        if isinstance(token_ids, PromptTokenIds):
            return
        super().validate_token_ids(token_ids, parameter=parameter)

    # ---- watching ------------------------------------------------------------------------

    def _maybe_verify(self, text: str, params: TokenizeParams, ids: PromptTokenIds) -> None:
        """Tokenize a share of the prompts in full as well, without delay for the request."""
        share = self._stateful_config.verify_tokens
        if not ids.num_parent_tokens or ids.is_spliced:
            return
        if self._is_verifying or random.random() >= share:
            return
        self._is_verifying = True
        self._verifier.submit(self._verify, text, params, tuple(ids)).add_done_callback(_report)

    def _verify(self, text: str, params: TokenizeParams, ids: tuple[int, ...]) -> None:
        try:
            full = self._encode_with(params)(text, params.add_special_tokens)
        finally:
            self._is_verifying = False
        if tuple(full) == ids:
            PROMPT_COUNTS.verified(Verified.EQUAL)
            return
        PROMPT_COUNTS.verified(Verified.DIFFERENT)
        self.tokenizer_off = "a prompt tokenized in parts differed from the whole"
        assert self._incremental is not None
        self._incremental.memory.clear()
        logger.error(
            "stateful: MISMATCH: a prompt of %d tokens that was tokenized in parts has other "
            "token ids than in full. Tokenizing in parts is off until the server restarts. "
            "Please report the tokenizer.",
            len(full),
        )


def _with_owned_names(prompt: TokensPrompt) -> TokensPrompt:
    """The prompt, with names for its media that no other tenant's media have."""
    if not (given := prompt.get("multi_modal_uuids")):
        return prompt
    salt = prompt.get("cache_salt")
    owned: dict[str, Any] = {}
    for modality, names in given.items():
        if isinstance(names, str):
            owned[modality] = owned_name(names, salt)
        else:
            owned[modality] = [None if name is None else owned_name(name, salt) for name in names]
    return {**prompt, "multi_modal_uuids": owned}


def _report(done: Future[None]) -> None:
    if (error := done.exception()) is not None:
        logger.warning("stateful: a prompt could not be verified: %r", error)


def note_answer(state: Any) -> None:
    """Hook of ``finished-answer``: remember the ids that were generated for a prompt.

    Args:
        state: vLLM's ``RequestState`` of a finished request.
    """
    ids, detokenizer = state.prompt_token_ids, state.detokenizer
    if not isinstance(ids, PromptTokenIds) or not ids.version or detokenizer is None:
        return
    answer = tuple(detokenizer.output_token_ids)
    if not answer:  # vLLM 0.33 also calls this for requests that it has rejected
        return
    for memory in _memories:
        memory.add_answer(ids.version, answer)
