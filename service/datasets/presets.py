"""Ready-made targets: where on the hub each benchmark's examples are, and the template that makes conversations of its rows.

A preset takes the part of a benchmark that is there to learn from (train, validation, dev, exemplars), never a split that scores
are reported on: a selection that has seen the test questions could not be judged by them.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_COUNT = 1_000  # of samples that a job may ask for: so many of each group are in memory while they are chosen

_READ = (
    "Read the passage below and answer the question with a short phrase copied from the passage.\n\n"
    "Passage: {{ context | trim }}\n\nQuestion: {{ question | trim }}"
)
_SPAN = "{{ answers.text[0] | trim }}"
# The exemplars of a task follow its description, `Q: ...` and `A: Let's think step by step ...`; their number is `copy`. The
# paper's own files begin with a notice and a rule of dashes, and other copies have QUESTION and ANSWER in place of the letters.
_SHOTS = (
    "{% set shots = chain_of_thought_prompt.replace('QUESTION: ', 'Q: ').split('\\n\\nQ: ') %}"
    '{% set shot = shots[copy].split("Let\'s think step by step", 1) %}'
)
_FUNCTION = (
    "{% set parts = ('\\n' ~ code.replace('\\r\\n', '\\n').rstrip()).rsplit('\\ndef ', 1) %}"
    "{% set lines = parts[1].split('\\n', 1) %}{% set body = lines[1].strip('\\n') %}"
)
_DOCSTRING = (
    '{% set indent = body[:(body | length) - (body.lstrip() | length)] %}{{ indent }}"""{{ text | trim }}\n'
    '{% for test in test_list %}{{ indent }}{{ test }}\n{% endfor %}{{ indent }}"""'
)


class Spread(BaseModel):
    """What the samples of a target are spread over: each value has as many of them as any other, where it has as many rows."""

    model_config = ConfigDict(frozen=True)

    over: str = Field(examples=["language"])
    column: str = Field(description="The column that says it")
    until: str | None = Field(default=None, description="Only what stands before this in the column; null: all of it")


class HubSplit(BaseModel):
    """A split of a dataset on the hub."""

    model_config = ConfigDict(frozen=True)

    id: str = Field(examples=["openai/gsm8k"])
    config: str = Field(examples=["main"])
    split: str = Field(examples=["train"])


class Preset(BaseModel):
    """A ready-made target."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(examples=["gsm8k"])
    title: str
    hub: HubSplit
    why: str = Field(description="Why this split")
    template: dict[str, str] = Field(description="What makes a conversation of a row, as `template` of an upload")
    copies: Annotated[int, Field(ge=1)] = Field(
        default=1, description="How many samples a row holds; the template takes the one with the number `copy`, from 1"
    )
    spread: Spread | None = Field(default=None, description="null: samples are drawn from the whole split alike")
    samples: int = Field(description="How many there are", examples=[7473])
    count: int = Field(description="How many are taken where the request does not say", examples=[48])
    licence: str = Field(examples=["MIT"])
    homepage: str


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="gsm8k",
            title="Grade-school word problems, worked answers that end in `#### N`",
            hub=HubSplit(id="openai/gsm8k", config="main", split="train"),
            why="The benchmark has train and test only; scores are reported on test.",
            template={
                "user": "{{ question | trim }}",
                # Without the calculator's marks, `<<48/2=24>>`.
                "assistant": "{% for part in answer.split('<<') %}{{ part if loop.first else part.split('>>', 1)[1] }}"
                "{% endfor %}",
            },
            samples=7_473,
            count=48,
            licence="MIT",
            homepage="https://github.com/openai/grade-school-math",
        ),
        Preset(
            name="squad",
            title="Questions on English passages (SQuAD 1.1), answered by a phrase of the passage",
            hub=HubSplit(id="rajpurkar/squad", config="plain_text", split="train"),
            why="Scores are reported on validation, for the test split is not public; RDS+ draws its examples from train too.",
            template={"user": _READ, "assistant": _SPAN},
            samples=87_599,
            count=48,
            licence="CC BY-SA 4.0",
            homepage="https://rajpurkar.github.io/SQuAD-explorer/",
        ),
        Preset(
            name="mmlu",
            title="Multiple-choice questions of 57 subjects, answered by letter and option",
            hub=HubSplit(id="cais/mmlu", config="all", split="dev"),
            why="The five examples a subject that are shown to models before each question, as LESS uses them; scores are"
            " reported on test.",
            template={
                "user": "The following is a multiple choice question about {{ subject.replace('_', ' ') }}.\n\n"
                "{{ question | trim }}{% for choice in choices %}\n{{ 'ABCD'[loop.index0] }}. {{ choice | trim }}{% endfor %}"
                "\nAnswer:",
                # Not 'ABCD'[answer]: -1, an answer that is not public, would be D.
                "assistant": "{{ {0: 'A', 1: 'B', 2: 'C', 3: 'D'}[answer] }}. {{ choices[answer] | trim }}",
            },
            spread=Spread(over="subject", column="subject"),
            samples=285,
            count=57,
            licence="MIT",
            homepage="https://github.com/hendrycks/test",
        ),
        Preset(
            name="bbh",
            title="27 hard tasks of BIG-bench, answered step by step",
            hub=HubSplit(id="Joschka/big_bench_hard", config="few_shot_prompts", split="few_shot_prompts"),
            why="The three worked examples a task that are shown to models before each question, as LESS uses them; scores are"
            " reported on all other questions, of which there is one split.",
            template={
                "user": _SHOTS + "{{ (shots[0].split('-----\\n') | last) | trim }}\n\nQ: "
                "{{ (shot[0] | trim).removesuffix('ANSWER:').removesuffix('A:') | trim }}\nA:",
                "assistant": _SHOTS + "Let's think step by step{{ shot[1].rstrip() }}",
            },
            copies=3,
            spread=Spread(over="task", column="dataset_name"),
            samples=81,
            count=54,
            licence="MIT",
            homepage="https://github.com/suzgunmirac/BIG-Bench-Hard",
        ),
        Preset(
            name="tydiqa",
            title="Questions on passages of nine languages (TyDi QA, gold passage), answered by a phrase of the passage",
            hub=HubSplit(id="google-research-datasets/tydiqa", config="secondary_task", split="train"),
            why="Scores are reported on validation; LESS takes its examples from train too.",
            template={"user": _READ, "assistant": _SPAN},
            spread=Spread(over="language", column="id", until="-"),
            samples=49_881,
            count=54,
            licence="Apache-2.0",
            homepage="https://github.com/google-research-datasets/tydiqa",
        ),
        Preset(
            name="codex",
            title="Python functions to be completed, in the form of HumanEval: head and docstring, then the body",
            hub=HubSplit(id="google-research-datasets/mbpp", config="full", split="validation"),
            why="HumanEval (Codex) has a test split only, and its questions are left to the evaluation: these are of MBPP, in"
            " the same form.",
            template={
                "user": _FUNCTION + "Complete the following Python function. Reply with the body only.\n\n"
                "{{ (parts[0] ~ '\\ndef ' ~ lines[0]) | trim }}\n" + _DOCSTRING,
                "assistant": _FUNCTION + "{{ body }}",
            },
            samples=90,
            count=32,
            licence="CC BY 4.0",
            homepage="https://github.com/google-research/google-research/tree/master/mbpp",
        ),
    )
}
