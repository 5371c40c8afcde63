"""The chat format of DeepSeek-V4: a conversation as the model's prompt, and back.

`encode` writes messages as text, `encode_ids` as token ids in which untrusted text
cannot become a special token, `parse` reads what the model answered, and `ReplyParts`
does so while it is being written. The long texts for tools and effort are the
checkpoint's own: `read_texts` reads them.
"""

from dsv4_eqx.chat.encoding import encode as encode
from dsv4_eqx.chat.encoding import encode_ids as encode_ids
from dsv4_eqx.chat.parsing import parse as parse
from dsv4_eqx.chat.reply_parts import ReplyParts as ReplyParts
from dsv4_eqx.chat.special import ChatTokenizer as ChatTokenizer
from dsv4_eqx.chat.texts import ChatTexts as ChatTexts
from dsv4_eqx.chat.texts import read_texts as read_texts
