"""A conversation with a model in the terminal; the answer appears as it is written.

    python examples/chat.py [--release DIR] [--system TEXT] [--no-thinking]
        [--effort high] [--tools TOOLS.json] [--max-new-tokens 512]
        [--temperature 1.0] [--top-p 1.0] [--seed 0] [--speculative]
        [--dtype bfloat16] [--keep-quantized] [--bytes] [--dim]

Each line is a message; the end of the input ends the conversation. What the model
thinks is dimmed in a terminal. `--tools` names a file with a list of functions in
OpenAI's schema: when the model calls one, its call is shown, and the next line is what
it returns. Effort and tools need the release's `encoding/encoding_dsv4.py`, which is
read and not run. Without a release, a tiny model with random weights answers in bytes
and makes no sense.

Each answer reads the whole conversation anew, since the format leaves older thinking
out. What others wrote cannot become a special token.
"""

import argparse
import json
import pathlib
import sys
import time

import jax
import numpy as np

import dsv4_eqx as dsv4
from dsv4_eqx import chat

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
END = "<｜end▁of▁sentence｜>"


def options():
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(description="A conversation with a model.")
    parser.add_argument("--release", help="a checkpoint's directory")
    parser.add_argument("--system", help="what the model is told before")
    parser.add_argument("--no-thinking", dest="thinking", action="store_false")
    parser.add_argument("--effort", help="how much it thinks: low, high or max")
    parser.add_argument("--tools", type=pathlib.Path, help="a JSON list of functions")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speculative", action="store_true", help="draft tokens")
    parser.add_argument("--dtype", help="of the weights; the embedding's by default")
    parser.add_argument("--keep-quantized", action="store_true")
    parser.add_argument("--bytes", action="store_true", help="a token for each byte")
    parser.add_argument("--dim", action="store_true", help="dim, though no terminal")
    return parser.parse_args()


def load(asked):
    """A model and what turns text into its tokens."""
    if asked.release is None:
        key = jax.random.key(asked.seed)
        model = dsv4.DeepSeekV4(dsv4.Config.tiny(), key=key)
        return model, dsv4.ByteTokenizer()
    model = dsv4.from_pretrained(
        asked.release, dtype=asked.dtype, keep_quantized=asked.keep_quantized
    )
    if asked.bytes:
        return model, dsv4.ByteTokenizer()
    return model, dsv4.load_tokenizer(asked.release)


class Screen:
    """The answer on the screen: thinking dimmed, calls as they are written."""

    def __init__(self, *, thinking, can_dim):
        self.parts, self.can_dim = chat.ReplyParts(thinking=thinking), can_dim

    def show(self, text):
        """More of the answer."""
        self._print(self.parts.feed(text))

    def close(self):
        """What was held back, where the answer was cut off."""
        self._print(self.parts.close())
        print(flush=True)

    def _print(self, parts):
        for part, text in parts:
            self.note(text, is_dim=part == "reasoning", end="")

    def note(self, text, *, is_dim=True, end="\n"):
        """Something that is not the answer."""
        dims = is_dim and self.can_dim
        print(f"{DIM}{text}{PLAIN}" if dims else text, end=end, flush=True)


def answer(asked, model, tokenizer, prompt, key):
    """Shows an answer as it comes; its whole text, and whether the model ended it."""
    screen = Screen(thinking=asked.thinking, can_dim=asked.dim or sys.stdout.isatty())
    stream = dsv4.generate_stream(
        model,
        np.array([prompt], np.int32),
        max_new_tokens=asked.max_new_tokens,
        sampling=dsv4.Sampling(temperature=asked.temperature, top_p=asked.top_p),
        key=key,
        speculative=asked.speculative,
    )
    ends = model.config.eos_token_id
    ends = [] if ends is None else np.atleast_1d(ends)
    new, shown, is_ended, begin = [], "", False, time.perf_counter()
    for (token,) in stream:
        if token < 0:  # of two tokens at once, the second was not drafted right
            continue
        new.append(int(token))
        is_ended = bool(np.isin(token, ends))
        text = tokenizer.decode(np.array(new[: len(new) - is_ended]))
        # A character may need several tokens: what is whole is shown.
        if not text.endswith("\ufffd"):
            screen.show(text[len(shown) :])
            shown = text
    seconds = time.perf_counter() - begin
    whole = tokenizer.decode(np.array(new[: len(new) - is_ended], np.int32))
    screen.show(whole[len(shown) :])
    screen.close()
    screen.note(f"[{len(new)} tokens, {len(new) / seconds:.1f} a second]")
    return whole + (END if is_ended else ""), is_ended


def results(calls):
    """The messages that say what the called functions return, line by line."""
    for call in calls:
        function = call["function"]
        line = input(f"{function['name']}({function['arguments']}) returns: ")
        yield {"role": "tool", "tool_call_id": call["id"], "content": line}


def turn(asked, model, tokenizer, settings, messages, key):
    """The messages of a turn: the model's, and those of the functions that it calls."""
    added = []
    while True:
        key, now = jax.random.split(key)
        prompt = chat.encode_ids([*messages, *added], tokenizer, **settings)
        text, is_ended = answer(asked, model, tokenizer, prompt, now)
        message = chat.parse(text, thinking=asked.thinking, partial=not is_ended)
        for i, call in enumerate(message["tool_calls"]):
            call["id"] = f"call_{len(added)}_{i}"
        added.append(message)
        if not message["tool_calls"]:
            return added
        added += results(message["tool_calls"])


def main():
    """Reads lines and answers them."""
    asked = options()
    texts = None if asked.release is None else chat.read_texts(asked.release)
    tools = None if asked.tools is None else json.loads(asked.tools.read_text())
    settings = dict(thinking=asked.thinking, effort=asked.effort)
    settings |= dict(tools=tools, texts=texts)
    messages = []
    if asked.system is not None:
        messages.append({"role": "system", "content": asked.system})
    chat.encode(messages, **settings)  # to say what is missing before anything is read
    model, tokenizer = load(asked)
    key = jax.random.key(asked.seed)
    while True:
        try:
            line = input("> ")
            if not line.strip():
                continue
            key, now = jax.random.split(key)
            said = [*messages, {"role": "user", "content": line}]
            added = turn(asked, model, tokenizer, settings, said, now)
        except EOFError:
            print()
            return
        except ValueError as error:
            # An answer that is not of the format is left out, and what it answers.
            if not str(error).startswith("parse: "):
                raise
            print(f"left out: {error}")
        else:
            messages = [*said, *added]


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError, OSError, OverflowError) as error:
        sys.exit(f"chat.py: {error}")
