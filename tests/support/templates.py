"""Chat templates of the kinds that do more than fill in contents, each with a twin that marks what the model generates.

In the sources, « and » stand where the twin has {% generation %} and {% endgeneration %}.
"""

from dataclasses import dataclass

_CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '\\n' if content or not loop.first }}"
    '{{ \'<tool_call>\\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}"
)
_LAST_USER = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
)
_THOUGHT = (
    "{% set content = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if not thought and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
)
_TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
_OTHERS = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\\n' }}"


@dataclass(frozen=True)
class Twins:
    """`thinks`: reasoning is rendered, at least in the last reply; `calls`: tool calls are; `system`: there is such a role."""

    source: str
    thinks: bool
    calls: bool
    system: bool = True

    @property
    def plain(self) -> str:
        return self.source.replace("«", "").replace("»", "")

    @property
    def marked(self) -> str:
        return self.source.replace("«", "{% generation %}").replace("»", "{% endgeneration %}")


# Thoughts stay after the user's last turn alone, and an empty one is written in the last reply that has none (Qwen3).
THINKING = Twins(
    _TOOLS
    + _LAST_USER
    + "{% for m in messages %}{% if m.role == 'assistant' %}"
    + _THOUGHT
    + "{% set late = loop.index0 > ns.last %}"
    "{{ '<|im_start|>assistant\\n' + ('<think>\\n\\n</think>\\n\\n' if late and loop.last and not thought.strip() else '') }}"
    "«{% if late and thought.strip() %}{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ content }}" + _CALLS + "<|im_end|>»{{ '\\n' }}{% else %}" + _OTHERS + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    thinks=True,
    calls=True,
)
# The prompt opens the thought itself (Qwen3.5, Nemotron); earlier replies have none.
PROMPTED = Twins(
    _TOOLS
    + _LAST_USER
    + "{% for m in messages %}{% if m.role == 'assistant' %}"
    + _THOUGHT
    + "{% set late = loop.index0 > ns.last %}{{ '<|im_start|>assistant\\n' + ('<think>\\n' if late else '') }}"
    "{% if late and not thought.strip() %}{{ '\\n</think>\\n\\n' }}{% endif %}"
    "«{% if late and thought.strip() %}{{ thought.strip() + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ content.strip() }}" + _CALLS + "<|im_end|>»{{ '\\n' }}{% else %}" + _OTHERS + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    thinks=True,
    calls=True,
)
# Thoughts are cut out of every reply; arguments are put after other text, so they must be text (DeepSeek).
CUTTING = Twins(
    "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '[/INST]' }}«{{ m.content.split('</think>')[-1] }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + '\\n' + c.function.arguments + '</call>' }}{% endfor %}"
    "{{ eos_token }}»{% elif m.role == 'tool' %}{{ '<result>' + m.content + '</result>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[/INST]{% endif %}",
    thinks=False,
    calls=True,
)
# No token ends a turn: the one that begins the next does (GLM). Every reply has a thought, maybe an empty one.
_ENDLESS_HEADER = "{{ '<|im_start|>' if loop.first or messages[loop.index0 - 1].role != 'assistant' }}"
ENDLESS = Twins(
    _LAST_USER + "{% for m in messages %}" + _ENDLESS_HEADER + "{% if m.role == 'assistant' %}"
    "{% set thought = (m.reasoning_content or '').strip() if loop.index0 > ns.last else '' %}"
    "assistant{% if not thought %}{{ '\\n<think></think>\\n' }}{% endif %}"
    "«{% if thought %}{{ '\\n<think>' + thought + '</think>\\n' }}{% endif %}{{ m.content.strip() }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name }}{% for k, v in c.function.arguments.items() %}"
    "{{ '<key>' + k + '</key><value>' + v | string + '</value>' }}{% endfor %}{{ '</call>' }}{% endfor %}"
    "{{ '<|im_start|>' if not loop.last }}»"
    "{% else %}{{ m.role + '\\n' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}",
    thinks=True,
    calls=True,
)
# A header for every part of a reply, and another token at the end of the last one (gpt-oss); `thinking` holds the thought.
CHANNELS = Twins(
    "{% set ns = namespace(name='') %}{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant"
    "«{% if m.thinking and loop.last %}{{ '<|start_header_id|>analysis<|end_header_id|>' + m.thinking + '<|eot_id|>' }}"
    "{{ '<|im_start|>assistant' }}{% endif %}"
    "{% if m.tool_calls %}{% set ns.name = m.tool_calls[0].function.name %}"
    "{{ ' to=' + ns.name + '<|start_header_id|>json<|end_header_id|>' + m.tool_calls[0].function.arguments | tojson }}"
    "{{ '<|eot_id|>' }}{% else %}{{ '<|start_header_id|>final<|end_header_id|>' + m.content }}"
    "{{ '</s>' if loop.last else '<|eot_id|>' }}{% endif %}»"
    "{% elif m.role == 'tool' %}{{ '<|im_start|>' + ns.name + ' to=assistant<|end_header_id|>' + m.content | tojson }}<|eot_id|>"
    "{% else %}{{ '<|im_start|>' + m.role + '<|end_header_id|>' + m.content }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}",
    thinks=True,
    calls=True,
)
# Contents are lists of parts (models of images and text).
LISTS = Twins(
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\\n' }}{% if m.role == 'assistant' %}"
    "«{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}<|im_end|>»{% else %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    thinks=False,
    calls=False,
)
# The roles must alternate, there is no system role, contents are stripped (Gemma).
ALTERNATING = Twins(
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
    "{% if m.role == 'assistant' %}<start_of_turn>model{{ '\\n' }}«{{ m.content | trim }}<end_of_turn>»{% else %}"
    "<start_of_turn>user{{ '\\n' }}{{ m.content | trim }}<end_of_turn>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model{{ '\\n' }}{% endif %}",
    thinks=False,
    calls=False,
    system=False,
)
TWINS = {
    "thinking": THINKING,
    "prompted": PROMPTED,
    "cutting": CUTTING,
    "endless": ENDLESS,
    "channels": CHANNELS,
    "lists": LISTS,
    "alternating": ALTERNATING,
}
