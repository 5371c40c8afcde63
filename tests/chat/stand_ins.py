"""Stand-ins for the long texts, and a file that holds them as a checkpoint's does."""

import hashlib
import json
import pathlib

from dsv4_eqx.chat import ChatTexts, texts

VECTORS = json.loads(
    (pathlib.Path(__file__).parents[1] / "data" / "chat_vectors.json").read_text()
)
F = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
}
ABSOLUTE, BEYOND = "Think much.\n\n", "Think \u2014 more.\n\n"
TOOLS = (
    'Write a "<{dsml_token}tool_calls>" block, after {thinking_start_token} and '
    "{thinking_end_token}.\n\n{tool_schemas}\n\nFollow them.\n"
)
OFFICIAL = ChatTexts({"low": "", "high": ABSOLUTE, "max": BEYOND}, TOOLS)
PREVIEW = ChatTexts({"high": "", "max": ABSOLUTE}, TOOLS)


def filled_tools(*tools):
    """What introduces tools, by hand."""
    schemas = "\n".join(json.dumps(tool["function"]) for tool in tools)
    text = TOOLS.replace("{dsml_token}", "｜DSML｜").replace("{tool_schemas}", schemas)
    return text.replace("{thinking_start_token}", "<think>").replace(
        "{thinking_end_token}", "</think>"
    )


def texts_like(options):
    """The options of a vector as `encode` takes them."""
    options = dict(options)
    family = options.pop("family", "official")
    return options | {"texts": PREVIEW if family == "preview" else OFFICIAL}


def write_encoding(directory, source):
    """A checkpoint's directory with a program of this source."""
    (directory / "encoding").mkdir()
    path = directory / "encoding" / "encoding_dsv4.py"
    path.write_text(source)
    return path


def accept_stand_ins(monkeypatch):
    """Takes the stand-ins for the release's texts."""

    def of(text):
        return len(text.encode()), hashlib.sha256(text.encode()).hexdigest()

    efforts = {"low": of(""), "high": of(ABSOLUTE), "max": of(BEYOND)}
    monkeypatch.setattr(texts, "_OF_EFFORTS", efforts)
    monkeypatch.setattr(texts, "_ABSOLUTE", of(ABSOLUTE))
    monkeypatch.setattr(texts, "_OF_TOOLS", of(filled_tools()))
