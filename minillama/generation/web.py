"""A conversation in the browser: the terminal's chat, with its settings beside it (extra `web`).

The page is served on 127.0.0.1 unless another address is named, to itself only (web_guard.py), and
gradio's usage reports to its makers are off. Answers are written one at a time. A visitor's
conversation is kept by the visitor's browser, so that it is still there when the page is loaded
again; web_conversation.py says how Stop and Clear end an answer.
"""

import inspect
import os
import signal
import sys
import threading
import warnings
from typing import Any

from minillama.chat import TEMPLATES
from minillama.errors import UserError
from minillama.generation.engine import Engine
from minillama.generation.examples import example_messages, model_name
from minillama.generation.web_conversation import Conversation, as_typed
from minillama.generation.web_guard import LOCAL_HOSTS, OwnPageOnly
from minillama.generation.web_handlers import Handlers, template_name

FONT = ["system-ui", "sans-serif"]  # of the visitor's machine: nothing is loaded from elsewhere
MONOSPACED = ["ui-monospace", "monospace"]
STYLE = """
.gradio-container { width: 100% !important; max-width: 60rem !important; margin: auto }
@media (max-width: 600px) { .gradio-container { padding: 0.5rem !important } }
"""
QUIET: dict[str, Any] = {"show_progress": "hidden"}  # of an event: no animation over the page
# Of the events that wait for each other: one at a time, in the order in which they were sent.
IN_TURN: dict[str, Any] = {**QUIET, "concurrency_id": "answers", "concurrency_limit": 1}
EMPTY = "Ask something, or take one of these:"


def serve(engine: Engine, system: str, seed: int | None, host: str, port: int) -> None:
    """Serve the page until Ctrl-C."""
    gradio = import_gradio()
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # a visitor who leaves ends no server
    server = build_page(engine, system, seed)
    newer_options = {}
    if "run_history" in inspect.signature(server.launch).parameters:
        newer_options["run_history"] = False  # what visitors asked
    try:
        server.launch(
            server_name=host,
            server_port=port,
            share=False,
            mcp_server=False,
            ssr_mode=False,
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
            app_kwargs={"middleware": [(OwnPageOnly, (host,), {})]},
            theme=gradio.themes.Default(font=FONT, font_mono=MONOSPACED),
            css=STYLE,
            **newer_options,
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


def import_gradio() -> Any:
    """gradio, with its usage reports off. Raises UserError if it is not installed."""
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    warnings.filterwarnings("ignore", module="gradio")  # they are for its makers
    try:
        import gradio
    except ImportError:
        raise UserError("--web needs gradio; pip install 'minillama[web]'") from None
    return gradio


def build_page(engine: Engine, system: str, seed: int | None) -> Any:
    """The page as gradio's Blocks. Raises UserError if gradio is not installed."""
    gradio = import_gradio()
    name = model_name(engine.path)
    handlers = Handlers(gradio, engine, seed)
    examples = example_messages(engine.path, engine.template)
    template = template_name(engine)
    title = f"## {as_typed(name)}\nminillama, prompt template: {as_typed(template)}"

    def take_example(event: gradio.SelectData) -> str:  # type: ignore[name-defined]
        return event.value["text"]

    with gradio.Blocks(title=f"{name} · minillama", analytics_enabled=False) as page:
        gradio.Markdown(title)
        conversation = gradio.State(Conversation())
        saved = gradio.BrowserState()
        messages = gradio.Chatbot(
            label="conversation",
            height="60vh",
            buttons=["copy", "copy_all"],
            group_consecutive_messages=False,
            placeholder=EMPTY,
            examples=[{"text": text} for text in examples],
        )
        message, send, stop, clear = add_message_row(gradio)
        note = gradio.Markdown()
        with gradio.Accordion("Settings", open=False):
            controls = add_controls(gradio, engine, system)

        shown = [message, messages, note, send, stop, saved]
        question = [message, conversation, *controls]
        sent = [send.click, message.submit]
        answered = gradio.on(sent, handlers.ask, question, shown, **IN_TURN)
        taken = messages.example_select(take_example, None, message, **QUIET)
        example_answered = taken.then(handlers.ask, question, shown, **IN_TURN)
        for end in (answered, example_answered):
            end.then(handlers.show, conversation, shown, **QUIET)
        stop.click(handlers.stop, conversation, None, **QUIET)
        cleared = gradio.on(
            [clear.click, messages.clear], handlers.clear, conversation, shown, **QUIET
        )
        cleared.then(handlers.end_clear, conversation, shown, **IN_TURN)
        page.load(handlers.restore, [saved, conversation], shown, **QUIET)
    return page


def add_message_row(gradio: Any) -> tuple[Any, Any, Any, Any]:
    """The message box, and the buttons Send, Stop and Clear. On a phone they are two rows."""
    with gradio.Row(equal_height=True):
        message = gradio.Textbox(
            label="message",
            show_label=False,
            container=False,
            placeholder="Ask, and press Enter",
            autofocus=True,
            max_lines=8,
            scale=6,
            min_width=300,
        )
        send = gradio.Button("Send", variant="primary", min_width=80)
        stop = gradio.Button("Stop", variant="stop", min_width=80, visible="hidden")
        clear = gradio.Button("Clear", min_width=80)
    return message, send, stop, clear


def add_controls(gradio: Any, engine: Engine, system: str) -> list[Any]:
    """The settings below the conversation, in the order of `SETTINGS`."""
    sampling = engine.config.sampling
    context = engine.model.config.max_seq_len
    max_new_tokens = engine.config.max_new_tokens or min(256, context // 2)
    template = template_name(engine)
    templates = list(dict.fromkeys([template, "none", *TEMPLATES]))
    penalty = sampling.repetition_penalty
    return [
        gradio.Textbox(system, label="system text", lines=2),
        gradio.Dropdown(templates, value=template, label="template"),
        gradio.Slider(0, 2, sampling.temperature, label="temperature"),
        gradio.Slider(0, 200, sampling.top_k, step=1, label="top k"),
        gradio.Slider(0.05, 1, sampling.top_p, label="top p"),
        gradio.Slider(0.5, 2, penalty, label="repetition penalty"),
        gradio.Slider(1, context, max_new_tokens, step=1, label="most new tokens"),
    ]
