# SPDX-License-Identifier: Apache-2.0
"""Conversations with pictures or sounds, one engine in this process.

    python shown.py MODEL OUT OPTIONS

MODEL: a folder made by ``tiny_vision.build``. OPTIONS: of ``LLM``, as JSON. By conversation, for
each turn, goes to OUT as JSON: tokens of its prompt, tokens computed, the answer.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import tiny_vision

ANSWER, CHUNK = 24, 16
"""Tokens generated in a turn; tokens in a chunk, where prompts are computed in small ones."""
SYSTEM = {"role": "system", "content": "You look at what is shown, and you say what it is."}
TEXT = "Please look at this with care and say in plain words what it may be: "


@cache
def uri(seed: int) -> str:
    return tiny_vision.data_uri(tiny_vision.screenshot(seed))


def picture(seed: int | None, uuid: str | None = None) -> dict[str, Any]:
    """A part of a message. With a name and no seed it is one that was sent before."""
    shown = None if seed is None else {"url": uri(seed)}
    return {"type": "image_url", "image_url": shown} | ({"uuid": uuid} if uuid else {})


def asks(turn: int, *parts: Any) -> dict[str, Any]:
    """What the user says in a turn, and shows."""
    said = f"{turn}. {TEXT}"
    if not parts:
        return {"role": "user", "content": said}
    begins, ends = {"type": "text", "text": said}, {"type": "text", "text": "That is all."}
    return {"role": "user", "content": [begins, *parts, ends]}


ONE = [asks(1), asks(2), asks(3, picture(1)), asks(4), asks(5, picture(2))]
"""Screenshots in the third and the fifth turn."""
OTHER = [asks(1), asks(2), asks(3, picture(3)), asks(4)]
"""The same text, and something else is shown."""
PAIR = [asks(1, picture(4), picture(5)), asks(2)]
SWAPPED = [asks(1, picture(5), picture(4)), asks(2)]
NAMED = [asks(1, picture(6, "shot-6")), asks(2), asks(3, picture(7, "shot-7"))]
NAMED_ONLY = [asks(1, picture(None, "shot-6")), asks(2), asks(3, picture(None, "shot-7"))]


class Player:
    """An engine, and what it said."""

    def __init__(self, model: str, **options: Any) -> None:
        from vllm import LLM

        self.llm = LLM(
            model,
            dtype="float32",
            enforce_eager=True,
            max_model_len=4096,
            enable_prefix_caching=True,
            **options,
        )
        self.played: dict[str, list[Any]] = {}

    def play(self, name: str, questions: list[Any], session: str = "") -> None:
        """A turn for each question; the whole history is sent in each.

        Args:
            session: its id, where it is not its name.
        """
        history: list[Any] = [SYSTEM]
        for question in questions:
            history.append(question)
            (output,) = self.llm.chat(history, params(session or name), use_tqdm=False)
            history.append({"role": "assistant", "content": self.note(name, output)})

    def hear(self, name: str, sounds: list[int | None], session: str = "") -> None:
        """A turn for each; with a number something is heard in it.

        As arrays, for vLLM reads no audio file here.
        """
        tokenizer, heard = self.llm.get_tokenizer(), []
        history: list[Any] = [SYSTEM]
        for turn, seed in enumerate(sounds):
            heard += [] if seed is None else [(tiny_vision.sound(seed), 16000)]
            history.append(asks(turn, *([] if seed is None else [{"type": "audio"}])))
            text = tokenizer.apply_chat_template(
                history, tokenize=False, add_generation_prompt=True
            )
            prompt = {"prompt": text, "multi_modal_data": {"audio": list(heard)}}
            asked = prompt if heard else {"prompt": text}
            (output,) = self.llm.generate([asked], params(session or name), use_tqdm=False)
            history.append({"role": "assistant", "content": self.note(name, output)})

    def cut(self, name: str, num_chunks: int) -> None:
        """The client goes away when so many chunks of its prompt are computed, and asks again."""
        system = {"role": "system", "content": f"{name} is what this one is called."}
        history, engine = [system, asks(1, picture(num_chunks))], self.llm.llm_engine
        (request,) = self.llm.enqueue_chat(history, params(name), use_tqdm=False)
        for _ in range(num_chunks):
            engine.step()
        engine.abort_request([request], internal=True)
        while engine.has_unfinished_requests():
            engine.step()
        (output,) = self.llm.chat(history, params(name), use_tqdm=False)
        self.note(name, output)

    def note(self, name: str, output: Any) -> str:
        """What a turn cost and said. Returns the answer."""
        num, cached = len(output.prompt_token_ids), output.num_cached_tokens or 0
        said = str(output.outputs[0].text)
        self.played.setdefault(name, []).append([num, num - cached, said])
        return said


def params(session: str) -> Any:
    from vllm import SamplingParams

    ids = {"session_id": f"session-{session}"}
    return SamplingParams(temperature=0, max_tokens=ANSWER, extra_args=ids)


def main(model: str, out: Path, options: dict[str, Any]) -> None:
    player = Player(model, **options)
    if Path(model).name == "qwen2_audio":
        player.hear("one", [None, None, 1, None, 2])
        player.hear("other", [None, None, 3, None], session="one")
    elif options.get("max_num_batched_tokens") == CHUNK:
        player.play("one", ONE)
        for num_chunks in range(6, 11):
            player.cut(f"cut-{num_chunks:02d}", num_chunks)
    else:
        player.play("one", ONE)
        player.play("other", OTHER, session="one")
        player.play("pair", PAIR)
        player.play("swapped", SWAPPED, session="pair")
        player.play("named", NAMED)
        player.play("named-only", NAMED_ONLY, session="named")
    out.write_text(json.dumps(player.played))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
