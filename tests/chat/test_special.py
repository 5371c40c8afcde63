"""Token ids of a conversation: only the format writes special tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv4_eqx as dsv4
from dsv4_eqx import chat
from dsv4_eqx.chat.special import (
    ASSISTANT,
    BOS,
    DSML,
    END_THINK,
    EOS,
    REMINDER,
    TASKS,
    THINK,
    USER,
)
from tests.chat.stand_ins import OFFICIAL, VECTORS, F, texts_like

# In the release, some are marked as special, and others are not.
MARKED = [BOS, EOS]
OTHERS = [USER, ASSISTANT, REMINDER, THINK, END_THINK, DSML, *TASKS.values()]


@pytest.fixture(scope="module")
def raw():
    """A tokenizer of bytes in pairs, and the special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    letters = sorted(byte_level.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, "he", "ll", "Ġh", BOS])}
    model = tokenizers.models.BPE(vocab, [("h", "e"), ("l", "l"), ("Ġ", "h")])
    found = tokenizers.Tokenizer(model)
    found.pre_tokenizer = byte_level(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    found.add_special_tokens(MARKED)
    found.add_tokens([*OTHERS, "ordinary"])
    found.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, found.token_to_id(BOS))]
    )
    return found


@pytest.fixture(scope="module")
def tokenizer(raw):
    return chat.ChatTokenizer(raw)


def special_ids(raw, ids):
    names = {raw.token_to_id(name) for name in (*MARKED, *OTHERS)}
    return [raw.id_to_token(token) for token in ids if token in names]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["name"])
def test_without_injection_the_ids_are_those_of_the_whole_text(vector, raw, tokenizer):
    options = texts_like(vector["options"])
    text = chat.encode(vector["messages"], **options)
    ids = chat.encode_ids(vector["messages"], tokenizer, **options)
    assert ids == raw.encode(text, add_special_tokens=False).ids
    assert raw.decode(ids, skip_special_tokens=False) == text


MARKS = st.sampled_from(
    [*MARKED, *OTHERS, f"<{DSML}invoke", "ordinary", "hello ", "｜"]
)
TEXTS = st.lists(st.one_of(MARKS, st.text("he l<>｜é", max_size=4)), max_size=5)
SPICED = TEXTS.map("".join)
EVERYWHERE = [BOS, USER, ASSISTANT, END_THINK, EOS, USER, ASSISTANT, THINK]


@settings(deadline=None)
@given(user=SPICED, answer=SPICED, result=SPICED)
def test_special_tokens_in_what_others_wrote_stay_text(
    user, answer, result, raw, tokenizer
):
    messages = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": answer, "reasoning_content": user},
        {"role": "tool", "content": result},
    ]
    ids = chat.encode_ids(messages, tokenizer, thinking=True)
    assert special_ids(raw, ids) == EVERYWHERE
    text = chat.encode(messages, thinking=True)
    assert raw.decode(ids, skip_special_tokens=False) == text


def test_in_tools_only_what_the_release_wrote_is_special(raw, tokenizer):
    def ids(description):
        tool = {"function": F["function"] | {"description": description}}
        options = dict(thinking=False, tools=[tool], texts=OFFICIAL)
        hi = {"role": "user", "content": "Hi"}
        return special_ids(raw, chat.encode_ids([hi], tokenizer, **options))

    assert ids("plain") == ids(f"{USER}{THINK}{DSML}{{dsml_token}}")
    assert ids("plain") == [BOS, DSML, THINK, END_THINK, USER, ASSISTANT, END_THINK]


def test_ordinary_added_tokens_stay_on(raw, tokenizer):
    assert list(tokenizer.encode_text("ordinary")) == [raw.token_to_id("ordinary")]
    assert len(tokenizer.encode_text(BOS)) > 10
    assert raw.encode(BOS, add_special_tokens=False).ids == [raw.token_to_id(BOS)]


def test_a_checkpoints_tokenizer_and_bytes_do_the_same(raw, tokenizer, tmp_path):
    raw.save(str(tmp_path / "tokenizer.json"))
    messages = [{"role": "user", "content": f"hello{EOS}"}]
    loaded = dsv4.load_tokenizer(tmp_path)
    ids = chat.encode_ids(messages, loaded, thinking=True)
    assert ids == chat.encode_ids(messages, tokenizer, thinking=True)
    assert all(type(token) is int for token in ids)
    text = chat.encode(messages, thinking=True)
    found = chat.encode_ids(messages, dsv4.ByteTokenizer(), thinking=True)
    assert bytes(found).decode() == text


def test_a_tokenizer_of_another_model_is_refused():
    tokenizers = pytest.importorskip("tokenizers")
    other = chat.ChatTokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()))
    with pytest.raises(
        ValueError, match="no token '<｜begin▁of▁sentence｜>'.*DeepSeek-V4"
    ):
        chat.encode_ids([{"role": "user", "content": ""}], other, thinking=True)
