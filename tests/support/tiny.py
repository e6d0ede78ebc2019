"""Tiny random models and a tokenizer made on the spot, and the chat templates of the tests."""

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[2] / "examples"
MAX_POSITIONS = 256

SPECIAL = [
    *("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]"),
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The structure of Llama 3's: the start token, headers, contents stripped, a date.
LLAMA3 = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday: {{ strftime_now('%d %b %Y') }}\n\n{{ system }}<|eot_id|>"
    "{% for m in rest %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
)
# Gemma's: the assistant is called model, there is no system role, contents are stripped.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
)
# Mistral's: no headers, the system message goes before the last user message, the roles must alternate.
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% set users = rest | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {% if system and m == users[-1] %}{{ system }}\n\n{% endif %}{{ m['content'] }}[/INST]"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Qwen 3's: an empty thought before the last reply, whose leading line feeds go; thoughts are cut out of earlier replies.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}"
    "{% set reply = m['content'].split('</think>')[-1].lstrip('\\n') %}"
    "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ reply }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
)
# Llama 2's: the system message inside the first user message, a space between the reply and its end.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + ((system if loop.first else '') + m['content']).strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

# Of every supported family, the least that has its parts: grouped heads, two kinds of attention layers, tied embeddings.
_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 32},
    "qwen2": {**_COMMON, "num_key_value_heads": 2},
    "qwen3": _GROUPED,
    "gemma": _GROUPED,
    "gemma2": {**_GROUPED, "query_pre_attn_scalar": 8, "sliding_window": 32},
    "gemma3_text": {**_GROUPED, "query_pre_attn_scalar": 8, "sliding_window": 32},
    "gpt2": {"n_embd": 32, "n_inner": 48, "n_layer": 3, "n_head": 4, "n_positions": MAX_POSITIONS},
    "gpt_neox": _COMMON,
}


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    messages = [m["content"] for row in read_jsonl(EXAMPLES / "pool.jsonl") for m in row["messages"]]
    tokenizer.train_from_iterator(messages, trainer)
    return tokenizer.to_str()


def make_tokenizer(
    template: str | dict[str, str] | None = CHATML, *, adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 512 tokens trained on the example pool."""
    backend = Tokenizer.from_str(_trained())
    if adds_bos:
        start = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[start])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=SPECIAL[3:]
    )
    tokenizer.chat_template = template
    return tokenizer


def save_model(folder: Path, family: str = "llama", *, template: str | None = CHATML, seed: int = 0) -> Path:
    """A folder as an operator would register it: a random model and the tokenizer."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(template)
    # Ids beyond the vocabulary, which some families' defaults name, are not accepted by all of them.
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **special, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Larger than the usual initial weights, so that samples differ.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pool_rows(count: int) -> list[dict[str, Any]]:
    """The first rows of the example pool; beyond its end they repeat with another id."""
    rows = read_jsonl(EXAMPLES / "pool.jsonl")
    return [{**rows[i % len(rows)], "id": f"row-{i}"} for i in range(count)]


def target_rows(count: int, source: str) -> list[dict[str, Any]]:
    """The last rows of the example pool of one kind."""
    rows = [row for row in read_jsonl(EXAMPLES / "pool.jsonl") if row["source"] == source]
    return rows[-count:]


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages that alternate between user and assistant, after the system's where there is one."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles: Sequence[str] = ("user", "assistant")
    return [*first, *({"role": roles[i % 2], "content": content} for i, content in enumerate(contents))]
