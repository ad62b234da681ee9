"""A conversation in the browser: the same dialogue as in the terminal, with its settings beside it (extra `web`, gradio).

The page is served on 127.0.0.1 unless another address is asked for by name, and gradio's reports to its makers are off. Each
visitor's conversation lives in the visitor's own page; answers are written one at a time.
"""

import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from minillama import chat
from minillama.errors import UserError
from minillama.generation.engine import ChatSession, Engine
from minillama.generation.sampling import Sampling


def serve(session: Engine, system: str, seed: int | None, host: str, port: int) -> None:
    """Serve the page until Ctrl-C."""
    server = build_page(session, system, seed)
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
        )
    except OSError:
        raise UserError(
            f"--port {port}: cannot be served on {host} (in use, or not allowed); name another one"
        ) from None
    if host not in ("127.0.0.1", "::1", "localhost"):
        print(f"warning: whoever reaches {host} can use this page", file=sys.stderr)
    print(f"http://{host}:{port}    Ctrl-C ends", flush=True)
    try:
        threading.Event().wait()
    finally:
        server.close(verbose=False)


def build_page(session: Engine, system: str, seed: int | None) -> Any:
    """The page as gradio's Blocks. Raises UserError where gradio is not installed."""
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    try:
        import gradio
    except ImportError:
        raise UserError("--web needs gradio; pip install 'minillama[web]'") from None
    s, context = session.sampling, session.model.config.max_seq_len
    with gradio.Blocks(title="minillama", analytics_enabled=False) as page:
        rounds = gradio.State([])
        shown = gradio.Chatbot(
            label="conversation", render_markdown=False, height=420, buttons=["copy", "copy_all"]
        )
        question = gradio.Textbox(
            label="question", placeholder="Ask, and press Enter", autofocus=True
        )
        with gradio.Row():
            send, stop, clear = (gradio.Button(name) for name in ("Send", "Stop", "Clear"))
        note = gradio.Markdown()
        with gradio.Row():
            controls = [
                gradio.Dropdown(
                    ["none", *chat.TEMPLATES], value=session.template, label="template"
                ),
                gradio.Slider(0, 2, s.temperature, label="temperature"),
                gradio.Slider(0, 200, s.top_k, step=1, label="top k"),
                gradio.Slider(0.05, 1, s.top_p, label="top p"),
                gradio.Slider(0.5, 2, s.repetition_penalty, label="repetition penalty"),
                gradio.Slider(
                    1,
                    context,
                    session.max_new_tokens or min(256, context // 2),
                    step=1,
                    label="most new tokens",
                ),
            ]

        def ask(
            text: str,
            turns: list,
            template: str,
            temperature: float,
            top_k: float,
            top_p: float,
            penalty: float,
            most: float,
        ) -> Iterator[tuple]:
            sampling = Sampling(temperature, int(top_k), top_p, penalty)
            dialogue = ChatSession(
                replace(session, template=template, sampling=sampling, max_new_tokens=int(most)),
                system,
            )
            dialogue.turns = turns
            for _ in dialogue.reply(text, seed):
                messages = [
                    {"role": role, "content": words}
                    for turn in dialogue.turns
                    for role, words in (("user", turn.user), ("assistant", turn.answer))
                ]
                yield "", dialogue.turns, messages, dialogue.note

        asked = gradio.on(
            [send.click, question.submit],
            ask,
            [question, rounds, *controls],
            [question, rounds, shown, note],
        )
        stop.click(None, cancels=asked)
        gradio.on(
            [clear.click, shown.clear],
            lambda: ([], [], ""),
            None,
            [rounds, shown, note],
            cancels=asked,
        )
    return page
