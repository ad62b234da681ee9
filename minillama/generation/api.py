"""The Python API of generation: `minillama.load`, and the object that it returns.

    model = minillama.load("runs/demo")
    model.generate("Which number is larger, 31 or 62?", greedy=True)       "62"

Keywords have the names and defaults of generate.py's flags: those of `load` are the fields of
`LoadOptions`, those of `generate`, `stream` and `chat` the fields of `GenerationConfig`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, overload

from minillama.chat import name_of
from minillama.checkpoint.template_files import resolve_template
from minillama.comm import Mesh
from minillama.generation.config import GenerationConfig
from minillama.generation.engine import ChatSession, Engine
from minillama.generation.loading import LoadOptions, load_engine
from minillama.model import Llama
from minillama.options import from_keywords
from minillama.tokenizer import Tokenizer


def load(
    ckpt: str | Path,
    *,
    template: str = "",
    devices: str | int | Sequence[str] = "",
    mesh: Mesh | None = None,
    **options: Any,
) -> "LoadedModel":
    """Load what --ckpt names: a Hugging Face directory, a run directory or an adapter.

    template: prompt template; "": the checkpoint's own; "none": the text as it is.
    devices: several devices, over which the layers are spread: 2, or "npu:0,npu:1", or a list.
    mesh: ranks that divide the model: `with comm.start() as mesh`, under torchrun. Each rank calls
        every method of the result with the same arguments, and gets the same text.
    options: base, lora (a list of adapters), tokenizer, device, dtype, ops; see `LoadOptions`.
    Raises UserError for what cannot be loaded, and for an unknown option.
    """
    names = devices if isinstance(devices, str | int) else ",".join(devices)
    keywords = {"ckpt": str(ckpt), "devices": str(names), **options}
    load_options = from_keywords(LoadOptions, keywords)
    config = GenerationConfig(template=template)
    own_devices = [mesh.device] if mesh else []
    return LoadedModel(load_engine(load_options, config, own_devices, mesh=mesh))


class LoadedModel:
    """A model with its tokenizer and prompt template, ready to complete prompts."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def model(self) -> Llama:
        """The `torch.nn.Module`: tokens (B, T) -> hidden states (B, T, C); see `Llama.logits`."""
        return self.engine.model

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    @property
    def template(self) -> str:
        """What the prompt template is called; "none" if there is none."""
        return name_of(self.engine.template)

    @overload
    def generate(self, prompt: str, **settings: Any) -> str: ...
    @overload
    def generate(self, prompt: list[str], **settings: Any) -> list[str]: ...

    def generate(
        self,
        prompt: str | list[str],
        *,
        system: str = "",
        batch_size: int = 8,
        seed: int | None = None,
        **settings: Any,
    ) -> str | list[str]:
        """Complete a prompt, or a list of prompts in batches of up to `batch_size`.

        settings: max_new_tokens, greedy, temperature, …; see `GenerationConfig`.
        seed: the same seed gives the same completion; None: a different one every time.
        """
        engine = self._with(settings)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        encoded = [engine.encode_prompt(text, system) for text in prompts]
        requests = engine.new_completions(encoded, num_samples=1)
        for _ in engine.stream_all(requests, batch_size, seed):
            pass
        texts = [completions[0].text for completions in requests.values()]
        return texts[0] if isinstance(prompt, str) else texts

    def stream(
        self, prompt: str, *, system: str = "", seed: int | None = None, **settings: Any
    ) -> Iterator[str]:
        """Complete a prompt, and yield the text while it is written."""
        engine = self._with(settings)
        completion = engine.new_completion(engine.encode_prompt(prompt, system))
        for piece in engine.stream([completion], seed):
            if piece.text:
                yield piece.text

    def chat(self, system: str = "", **settings: Any) -> ChatSession:
        """Begin a conversation: `.ask("…")` answers, `.reply("…")` yields the answer's text."""
        return ChatSession(self._with(settings), system)

    def _with(self, settings: Mapping[str, Any]) -> Engine:
        """The engine with some settings changed."""
        template = resolve_template(settings.get("template", self.engine.template))
        values = {**asdict(self.engine.config), **settings, "template": template}
        config = from_keywords(GenerationConfig, values)
        return replace(self.engine, config=config)
