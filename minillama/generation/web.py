"""A conversation in the browser: the terminal's chat, with its settings beside it (extra `web`).

The page is served on 127.0.0.1 unless another address is named, to itself only (web_guard.py), and
gradio's usage reports to its makers are off. Each visitor's conversation is kept in the visitor's
own page. Answers are written one at a time.
"""

import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from minillama.chat import TEMPLATES, Turn, is_jinja
from minillama.errors import UserError
from minillama.generation.engine import ChatSession, Engine
from minillama.generation.web_guard import LOCAL_HOSTS, OwnPageOnly

OWN_TEMPLATE = "the model's own"  # a chat template in Jinja, in the list of templates


def serve(engine: Engine, system: str, seed: int | None, host: str, port: int) -> None:
    """Serve the page until Ctrl-C."""
    server = build_page(engine, system, seed)
    try:
        server.launch(
            server_name=host,
            server_port=port,
            share=False,
            mcp_server=False,
            ssr_mode=False,
            footer_links=[],
            run_history=False,
            quiet=True,
            prevent_thread_lock=True,
            app_kwargs={"middleware": [(OwnPageOnly, (host,), {})]},
        )
    except OSError:
        raise UserError(
            f"--port {port}: cannot be served on {host} (in use, or not allowed); name another one"
        ) from None
    if host not in LOCAL_HOSTS:
        print(f"warning: whoever reaches {host} can use this page", file=sys.stderr)
    print(f"http://{host}:{port}    Ctrl-C ends", flush=True)
    try:
        threading.Event().wait()
    finally:
        server.close(verbose=False)


def build_page(engine: Engine, system: str, seed: int | None) -> Any:
    """The page as gradio's Blocks. Raises UserError if gradio is not installed."""
    gradio = import_gradio()
    responder = Responder(engine, system, seed)
    with gradio.Blocks(title="minillama", analytics_enabled=False) as page:
        turns = gradio.State([])
        messages = gradio.Chatbot(
            label="conversation", render_markdown=False, height=420, buttons=["copy", "copy_all"]
        )
        question = gradio.Textbox(
            label="question", placeholder="Ask, and press Enter", autofocus=True
        )
        with gradio.Row():
            send = gradio.Button("Send")
            stop = gradio.Button("Stop")
            clear = gradio.Button("Clear")
        note = gradio.Markdown()
        with gradio.Row():
            controls = add_controls(gradio, engine)

        asking = gradio.on(
            [send.click, question.submit],
            responder.respond,
            inputs=[question, turns, *controls],
            outputs=[question, turns, messages, note],
            api_name="ask",
        )
        stop.click(None, cancels=asking)
        gradio.on(
            [clear.click, messages.clear],
            lambda: ([], [], ""),
            inputs=None,
            outputs=[turns, messages, note],
            cancels=asking,
        )
    return page


def import_gradio() -> Any:
    """gradio, with its usage reports off."""
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    try:
        import gradio
    except ImportError:
        raise UserError("--web needs gradio; pip install 'minillama[web]'") from None
    return gradio


def add_controls(gradio: Any, engine: Engine) -> list[Any]:
    """The settings beside the conversation, in the order of `Responder.respond`'s parameters."""
    sampling = engine.config.sampling
    context = engine.model.config.max_seq_len
    max_new_tokens = engine.config.max_new_tokens or min(256, context // 2)
    templates = ["none", *TEMPLATES]
    chosen = engine.template
    if is_jinja(chosen):
        templates.append(OWN_TEMPLATE)
        chosen = OWN_TEMPLATE
    penalty = sampling.repetition_penalty
    return [
        gradio.Dropdown(templates, value=chosen, label="template"),
        gradio.Slider(0, 2, sampling.temperature, label="temperature"),
        gradio.Slider(0, 200, sampling.top_k, step=1, label="top k"),
        gradio.Slider(0.05, 1, sampling.top_p, label="top p"),
        gradio.Slider(0.5, 2, penalty, label="repetition penalty"),
        gradio.Slider(1, context, max_new_tokens, step=1, label="most new tokens"),
    ]


class Responder:
    """Answers the page's questions."""

    def __init__(self, engine: Engine, system: str, seed: int | None) -> None:
        self.engine = engine
        self.system = system
        self.seed = seed

    def respond(
        self,
        question: str,
        turns: list[Turn],
        template: str,
        temperature: float,
        top_k: float,
        top_p: float,
        repetition_penalty: float,
        max_new_tokens: float,
    ) -> Iterator[tuple[str, list[Turn], list[dict[str, str]], str]]:
        """Yield an empty question box, the turns, the messages shown and the note."""
        if template == OWN_TEMPLATE:
            template = self.engine.template
        config = replace(
            self.engine.config,
            template=template,
            greedy=False,  # temperature 0 says the same
            temperature=temperature,
            top_k=int(top_k),
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            max_new_tokens=int(max_new_tokens),
        )
        chat = ChatSession(replace(self.engine, config=config), self.system)
        chat.turns = turns
        for _ in chat.reply(question, self.seed):
            yield "", chat.turns, shown_messages(chat.turns), chat.note


def shown_messages(turns: list[Turn]) -> list[dict[str, str]]:
    """The conversation as gradio's Chatbot shows it."""
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": turn.user})
        messages.append({"role": "assistant", "content": turn.answer or ""})
    return messages
