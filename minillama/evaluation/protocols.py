"""A protocol is everything that turns a question into a number: the prompt, the shots before it, what is scored, and what wins.

The same model gets quite different accuracies from different protocols, so a score without its protocol's name means little.

    ascend            AscendSpeed's own evaluation (Ascend NPU systems)
    chinese_alpaca    Chinese-LLaMA-Alpaca-2's: chat template, no shots, penalised scores
    hendrycks         the MMLU authors' own code
    lm_eval           EleutherAI's lm-evaluation-harness, tasks `mmlu`, `boolq` and rolling perplexity

Rules: `likelihood` takes the choice with the largest log p(choice | prompt), tokens as in the encoding of prompt + choice; `next` compares
one token, the last of the choice by itself; `penalised` adds the logits of " A" and of "A" behind a colon, after the repetition penalty
1.1 over the prompt and temperature 0.2 of that system's generation; `written` lets the model write one token and looks for a letter in
it. Of equal scores the first choice wins. Every prompt begins with the tokenizer's begin token, if it has one.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from minillama.errors import UserError, closest

LETTERS = {letter: f" {letter}" for letter in "ABCD"}
OPTIONS = "\nA. {A}\nB. {B}\nC. {C}\nD. {D}"
ENGLISH = "The following are multiple choice questions (with answers) about"
BOOLQ = "{passage}\nQuestion: {question}?\nAnswer:"
SYSTEM = "You are a helpful assistant. 你是一个乐于助人的助手。"
PENALTY, TEMPERATURE = 1.1, 0.2


@dataclass(frozen=True)
class Protocol:
    """Texts are formatted with a question's fields, {subject} (with spaces) and {key} (the subject's name in file names)."""

    question: str
    choices: dict[str, str] = field(default_factory=LETTERS.copy)  # answer -> the text that stands for it
    rule: str = "likelihood"
    header: str = ""
    shot: str = ""
    n_shots: int = 0
    only_with_shots: bool = False  # is the header left out where there are no shots?
    around: str = "{}"             # what stands around the whole prompt
    letters: tuple[str, ...] = ()  # `written`: patterns tried in turn at the start of what was written

    def prompt(self, question: dict[str, str], shots: list[dict[str, str]]) -> str:
        header = self.header if shots or not self.only_with_shots else ""
        return self.around.format(header.format(**question) + "".join(self.shot.format(**shot) for shot in shots)
                                  + self.question.format(**question))


CHINESE = Protocol("{question}" + OPTIONS + "\n答案是什么？ ", rule="penalised", only_with_shots=True,
                   header="以下是中国关于{key}考试的单项选择题，请选出其中的正确答案。\n\n",
                   shot="{question}" + OPTIONS + "\n答案：{answer}\n\n", around=f"[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n{{}} [/INST]")
# task -> name -> protocol, the default first
PROTOCOLS: dict[str, dict[str, Protocol]] = {
    "boolq": {
        "ascend": Protocol(BOOLQ, {"yes": "Yes", "no": "No"}, rule="next"),
        "lm_eval": Protocol(BOOLQ, {"no": " no", "yes": " yes"}),
    },
    "mmlu": {
        "hendrycks": Protocol("{question}" + OPTIONS + "\nAnswer:", header=ENGLISH + "  {subject}.\n\n", n_shots=5,
                              shot="{question}" + OPTIONS + "\nAnswer: {answer}\n\n"),
        "lm_eval": Protocol("{stripped}" + OPTIONS + "\nAnswer:", header=ENGLISH + " {subject}.\n\n", n_shots=5,
                            shot="{stripped}" + OPTIONS + "\nAnswer: {answer}\n\n"),
        "ascend": Protocol("\n\n{question}" + OPTIONS + "\nAnswer:", header=ENGLISH + "  {subject}.", n_shots=5, rule="written",
                           shot="\n{question}" + OPTIONS + "\nAnswer: {answer}", letters=(r".*([A|B|C|D])\.", r"([A|B|C|D])")),
    },
    "ceval": {
        "chinese_alpaca": CHINESE,
        "ascend": Protocol("问：{question}" + OPTIONS + "\n答：", header="请从下列选择题中选择正确的选项。\n\n", n_shots=5, rule="written",
                           shot="问：{question}" + OPTIONS + "\n答：{answer}\n\n", letters=(r"([ABCD])$",)),
    },
    "cmmlu": {"chinese_alpaca": CHINESE},
}


def find_protocol(task: str, name: str) -> tuple[str, Protocol]:
    """(name, protocol) of a task; "": its default."""
    known = PROTOCOLS[task]
    name = name or next(iter(known))
    if name not in known:
        raise UserError(f"{task} has no protocol {name!r}{closest(name, known)}; protocols: {', '.join(known)}")
    return name, known[name]


def continuations(protocol: Protocol, tokenizer: Any, prompt: str) -> list[list[int]]:
    """The ids whose probability is read for each choice; two one-token ones for each under `penalised`."""
    if protocol.rule == "likelihood":
        whole = len(tokenizer.encode(prompt))
        return [tokenizer.encode(prompt + text)[whole:] for text in protocol.choices.values()]
    alone = [[tokenizer.encode(text.strip())[-1]] for text in protocol.choices.values()]
    bare = [[tokenizer.encode("：" + text.strip())[-1]] for text in protocol.choices.values()] if protocol.rule == "penalised" else []
    return alone + bare


def decide(protocol: Protocol, tokenizer: Any, query: Any, reading: Any) -> tuple[str, dict[str, float]]:
    """(the answer taken, "" where there is none; a score for each choice) of a `scoring.Query` and its `scoring.Reading`."""
    values = reading.logprobs
    if protocol.rule == "penalised":
        seen, n = set(query.context), len(protocol.choices)
        logits = [logit if token not in seen else logit / PENALTY if logit > 0 else logit * PENALTY
                  for (token,), logit in zip(query.continuations, reading.logits, strict=True)]
        values = [(logits[i] + logits[i + n]) / TEMPERATURE for i in range(n)]
    scores = dict(zip(protocol.choices, values, strict=True))
    if protocol.rule != "written":
        return max(scores, key=scores.get), scores
    text = tokenizer.decode([reading.greedy])
    found = next(filter(None, (re.match(pattern, text) for pattern in protocol.letters)), None)
    return found[1] if found else "", scores
