"""What a model can be asked: three examples, and the name that it is shown under.

A model of the demo answers the kinds of question that it was trained on, and no others. What it was
trained on stands in its minillama.json.
"""

from pathlib import Path

from minillama.checkpoint.template_files import read_about
from minillama.data import demo

BEGINNINGS = ("Once upon a time", "The three largest cities are", "Dear Sir or Madam,")
INSTRUCTIONS = (
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "Give me three tips for learning a language.",
)
CHINESE_INSTRUCTIONS = (
    "请用两句话解释天空为什么是蓝色的。",
    "写一首关于大海的短诗。",
    "给我三条学习语言的建议。",
)


def demo_questions(directory: Path | None) -> list[str]:
    """Three questions that a model of the demo should answer; [] for another model.

    directory: the model's or adapter's; None: it has none.
    """
    settings = read_about(directory).get("settings") if directory else None
    if not isinstance(settings, dict) or not isinstance(settings.get("data"), list):
        return []
    for name in demo.SUGGESTED:
        if name in settings["data"]:
            return demo.suggested_questions(name)
    return []


def example_messages(directory: Path | None, template: str) -> list[str]:
    """Three messages that a model of this directory and prompt template may be asked."""
    questions = demo_questions(directory)
    if questions:
        return questions
    if template in ("none", "raw"):  # the model continues text
        return list(BEGINNINGS)
    if template.startswith("chinese"):
        return list(CHINESE_INSTRUCTIONS)
    return list(INSTRUCTIONS)


def model_name(directory: Path | None) -> str:
    """The name of a model: that of its directory, or of the run that it belongs to."""
    if directory is None:
        return "a model"
    directory = directory.resolve()
    if directory.name == "final":
        return directory.parent.name
    if directory.parent.name == "checkpoints":
        return f"{directory.parents[1].name}, {directory.name}"
    return directory.name
