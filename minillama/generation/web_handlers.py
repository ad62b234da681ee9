"""What the events of the web page do: a message, Stop, Clear, and loading the page.

A handler changes the `Conversation` of its visitor, and returns what the page is to show then.
web.py connects the handlers with the page.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from minillama.chat import Turn, is_jinja
from minillama.errors import UserError
from minillama.generation.engine import ChatSession, Engine
from minillama.generation.web_conversation import Conversation, Messages

OWN_TEMPLATE = "the model's own"  # a chat template in Jinja, in the list of templates
SETTINGS = (
    "system",
    "template",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "max_new_tokens",
)
Shown = tuple[Any, ...]  # values for gradio's components
SECONDS_BETWEEN_UPDATES = 0.05  # of the page, while an answer is written


def template_name(engine: Engine) -> str:
    """The name of a model's template in the list of templates."""
    return OWN_TEMPLATE if is_jinja(engine.template) else engine.template


class Handlers:
    """What the page's events do.

    They return the values of `shown` in `build_page`: the message box, the messages, the note, the
    two buttons that take turns, and what the browser keeps.
    """

    def __init__(self, gradio: Any, engine: Engine, seed: int | None) -> None:
        self.gradio = gradio
        self.engine = engine
        self.seed = seed

    def ask(self, message: str, conversation: Conversation, *settings: Any) -> Iterator[Shown]:
        """Write an answer. An empty message does nothing, and one that is refused stays.

        settings: the values of `SETTINGS`.
        """
        message = message.strip()
        number = conversation.begin(message) if message else 0
        if number == 0:
            yield self.changed()
            return
        earlier = list(conversation.turns)
        is_shown = False
        try:
            chat = self.new_session(dict(zip(SETTINGS, settings, strict=True)))
            chat.turns = earlier[conversation.num_dropped :]
            chat.fit_prompt(message)  # raises UserError before anything is shown
            buttons = self.buttons(conversation.is_answering)
            is_shown = True
            yield ("", conversation.shown(), "", *buttons, self.gradio.skip())
            yield from self.answer(number, message, conversation, chat, earlier)
        except UserError as error:
            if not is_shown:
                conversation.withdraw(number)  # it still stands where it was typed
            yield self.changed(note=f"**Not answered:** {error}")
        finally:
            conversation.finish(number)

    def new_session(self, settings: dict[str, Any]) -> ChatSession:
        """Raises UserError for a setting that is out of range."""
        system = settings.pop("system")
        settings["top_k"] = int(settings["top_k"])
        settings["max_new_tokens"] = int(settings["max_new_tokens"])
        if settings["template"] == OWN_TEMPLATE:
            settings["template"] = self.engine.template
        settings["greedy"] = False  # temperature 0 says the same
        config = replace(self.engine.config, **settings)
        return ChatSession(replace(self.engine, config=config), system)

    def answer(
        self,
        number: int,
        message: str,
        conversation: Conversation,
        chat: ChatSession,
        earlier: list[Turn],
    ) -> Iterator[Shown]:
        """Write the answer `number` until it is complete, or Stop or Clear ends it.

        earlier: all turns before it, with those that the session does not see.
        """
        last_update = 0.0
        for _ in chat.reply(message, self.seed):
            turns = [*earlier, chat.turns[-1]]
            if not conversation.grow(number, turns, len(turns) - len(chat.turns)):
                return
            if time.monotonic() - last_update > SECONDS_BETWEEN_UPDATES:
                last_update = time.monotonic()
                yield self.changed(conversation.shown(), chat.note)
        yield self.changed(conversation.shown(), chat.note)

    def show(self, conversation: Conversation) -> Shown:
        """Show what is true when an event has ended, whatever was shown meanwhile."""
        message = conversation.take_unanswered() or self.gradio.skip()
        messages = conversation.shown()
        note = self.gradio.skip() if messages else ""
        buttons = self.buttons(conversation.is_answering)
        return (message, messages, note, *buttons, conversation.saved())

    def stop(self, conversation: Conversation) -> None:
        conversation.end()

    def clear(self, conversation: Conversation) -> Shown:
        conversation.clear()
        return self.show(conversation)

    def end_clear(self, conversation: Conversation) -> Shown:
        conversation.end_clear()
        return self.show(conversation)

    def restore(self, saved: Any, conversation: Conversation) -> Shown:
        """The page was loaded, perhaps again."""
        conversation.restore(saved)
        return self.show(conversation)

    def changed(self, messages: Messages | None = None, note: str | None = None) -> Shown:
        """The values of `shown` if only these change; None: it stays as it is.

        gradio changes the values that it is given, so each is made anew.
        """
        skip = self.gradio.skip
        shown_messages = skip() if messages is None else messages
        shown_note = skip() if note is None else note
        return (skip(), shown_messages, shown_note, skip(), skip(), skip())

    def buttons(self, is_answering: bool) -> tuple[Any, Any]:
        """Send and Stop, of which one is visible.

        gradio 6.17 does not show a component that was left out of the page, visible=False, when it
        becomes visible for the first time. One that is only hidden it shows.
        """
        update = self.gradio.update
        visible = update(visible=True)
        hidden = update(visible="hidden")
        return (hidden, visible) if is_answering else (visible, hidden)
