"""A tokenizer with chat templates of several kinds, each with generation markers and without, and conversations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

# As Qwen's earlier templates: a default system message, tools in it, tool calls and their responses.
CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nBe of use.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {%- set thought = message.reasoning_content %}
        {%- if thought %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif %}
        {%- if message.content %}{{- message.content }}{%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' }}{{- call.function | tojson }}{{- '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# No separate end of a turn but the text's; nothing stands behind it, and a text begins with a token of its own.
INST = """\
{{- '<|begin|>' }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- ' ' + message.content + '<|endoftext|>' }}{%- endgeneration %}
    {%- else %}
        {{- '[INST] ' + message.content + ' [/INST]' }}
    {%- endif %}
{%- endfor %}
"""
# A header in special tokens and a content that the template strips.
HEADERS = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '<|sep|>\\n\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content | trim + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message.content | trim + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|sep|>\\n\\n' }}{%- endif %}
"""
# As Qwen3's: an empty thought in the last turn, and no thoughts before the user's last message.
THINKING = """\
{%- set last = namespace(user=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {%- set thought = message.reasoning_content or '' %}
        {%- if loop.index0 > last.user %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif %}
        {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# Whose messages have parts.
PARTS = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {%- for part in message.content %}{{- part.text }}{%- endfor %}{{- '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {%- for part in message.content %}{{- part.text }}{%- endfor %}{{- '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
TEMPLATES = {"chatml": CHATML, "inst": INST, "headers": HEADERS, "thinking": THINKING, "parts": PARTS}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|sep|>", "<|begin|>")


def without_markers(template: str) -> str:
    """The same template as published ones are."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "{%- if true %}{%- endif %}", template)


def write_tokenizer(path: Path, template: str | None) -> Path:
    """A byte-level tokenizer, some merges that cross the borders of turns, and a template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("\u010a", "\u010a"), ("h", "e"), ("a", "n"), ("\u0120", "t")]  # two line feeds, he, an, space t
    vocab = {symbol: rank for rank, symbol in enumerate([*alphabet, *map("".join, merges)])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=list(SPECIAL)
    )
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return path


def message(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"x": {}}}}}]
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"x": 3, "why": "<|im_end|> déjà"}}}]
CHATS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [message("user", "Hello"), message("assistant", "Good day.")]},
    "system": {
        "messages": [message("system", "Be brief."), message("user", "the"), message("assistant", "\n\nthan  \n")]
    },
    "many turns": {
        "messages": [
            message("user", "Hello"),
            message("assistant", "one"),
            message("user", "and?"),
            message("assistant", "two."),
            message("user", "文字 ✓"),
            message("assistant", "déjà vu 文字 🙂"),
        ]
    },
    "same answers": {
        "messages": [message("user", "a"), message("assistant", "a")] * 3 + [message("user", "assistant\n")]
    },
    "empty answer": {"messages": [message("user", "Say nothing."), message("assistant", "")]},
    "the end in the answer": {"messages": [message("user", "How?"), message("assistant", "a<|im_end|>\nb")]},
}
WITH_TOOLS: dict[str, dict[str, Any]] = {
    "tools": {
        "messages": [
            message("system", "Count."),
            message("user", "1 + 2?"),
            message("assistant", None, tool_calls=CALL, reasoning_content="add them"),
            message("tool", "3"),
            message("assistant", "It is 3.", reasoning_content="done\n\nreally"),
            message("user", "thanks"),
            message("assistant", "then", tool_calls=CALL),
        ],
        "tools": TOOLS,
    },
    "two answers in turn": {
        "messages": [message("user", "Hello"), message("assistant", "one"), message("assistant", "two.")]
    },
}


def in_parts(chat: dict[str, Any]) -> dict[str, Any]:
    """A conversation whose contents are lists, as those of models that see pictures."""
    halves = [(each, each["content"][:2], each["content"][2:]) for each in chat["messages"]]
    parts = [each | {"content": [{"type": "text", "text": text} for text in texts]} for each, *texts in halves]
    return chat | {"messages": parts}


OF_PARTS = {f"{name} in parts": in_parts(chat) for name, chat in CHATS.items()}
