"""Talk to a LLaMA: complete prompts, or hold a conversation."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minillama import cli, threads
from minillama.compat import generation_flags
from minillama.errors import UserError
from minillama.files import parsing
from minillama.generation.modes import parse_modes
from minillama.json_values import check_encodable
from minillama.options import from_flags

if TYPE_CHECKING:  # torch is imported when the flags and prompts are known to be right
    from minillama.comm import Mesh
    from minillama.generation.engine import Engine
    from minillama.generation.prompts import Prompt

EXAMPLES = """
  python generate.py --ckpt runs/demo --chat
  python generate.py --ckpt LLAMA_DIR --prompt "Once upon a time" --greedy --stream
  python generate.py --ckpt BASE_DIR --lora ADAPTER_DIR --template alpaca --prompt "Name a colour."
  python generate.py --ckpt LLAMA_DIR --prompt_file prompts.txt --output answers.jsonl
  python generate.py --ckpt LLAMA_DIR --prompt "Once upon a time" --num_beams 4
  python generate.py --ckpt LLAMA_DIR --prompt "Once upon a time" --mode all
  python generate.py --ckpt LLAMA_DIR --web

--ckpt is a Hugging Face LLaMA directory, a run directory (its final/, else its newest checkpoint)
or a PEFT adapter directory.
In --chat: q, quit or exit ends; clear or new starts over; Ctrl-C stops an answer.
--output: a run that was interrupted goes on when the same command is given again."""


class Flag(NamedTuple):
    name: str
    kind: str | tuple[str, ...] | Callable[[str], Any]  # "switch", "list", choices, or a type
    default: Any
    metavar: str | None
    help: str


def rope_alpha(text: str) -> float:
    """ "auto" as 0, or a number from 1."""
    if text == "auto":
        return 0.0
    try:
        alpha = float(text)
    except ValueError:
        alpha = 0.0
    if not 1 <= alpha < 1e6:
        raise UserError(f"--rope_alpha: {text!r} is neither auto nor a number from 1")
    return alpha


# fmt: off
FLAGS = (
    Flag("prompt", "list", [], "TEXT", "a prompt; may repeat"),
    Flag("prompt_ids", "list", [], '"1 15043"', "a prompt as token ids; may repeat"),
    Flag("prompt_file", str, "", "FILE", 'prompts, one a line, or .jsonl records with "prompt"'),
    Flag("chat", "switch", False, None, "hold a conversation in the terminal"),
    Flag("web", "switch", False, None, "hold a conversation in the browser (extra `web`)"),
    Flag("host", str, "127.0.0.1", "ADDRESS",
         "address of --web; another one lets other machines in [127.0.0.1]"),
    Flag("port", int, 7860, "N", "port of --web [7860]"),
    Flag("system", str, "", "TEXT",
         "system text of the conversation, if the template has a place for it"),
    Flag("template", str, "", "NAME|FILE.jinja|none",
         "prompt template (empty: the checkpoint's own, else none)"),
    Flag("max_new_tokens", int, 0, "N",
         "most tokens to write [256, or what the context leaves]"),
    Flag("temperature", float, None, "T", "0 is greedy [0.8]"),
    Flag("top_k", int, None, "K", "sample from the K most likely tokens (0: all) [0]"),
    Flag("top_p", float, None, "P",
         "sample from the most likely tokens of total probability P [0.95]"),
    Flag("repetition_penalty", float, 1.0, "R", "above 1: less of what is already there [1.0]"),
    Flag("greedy", "switch", False, None, "always the most likely token"),
    Flag("mode", parse_modes, (), "all|A,B",
         "decode in several modes, one after the other: greedy, sample, beam, beam_sample"),
    Flag("num_samples", int, 1, "N", "completions of each prompt [1]"),
    Flag("num_beams", int, 1, "W",
         "beam search; a temperature, top_k or top_p makes it sample [1]"),
    Flag("length_penalty", float, 1.0, "X", "beams: scores are divided by length^X [1.0]"),
    Flag("early_stopping", ("true", "false", "never"), "false", None,
         "beams: when to stop; docs/decoding.md [false]"),
    Flag("prompt_lookup", int, 0, "N", "greedy: guess N tokens a step from the text so far [0]"),
    Flag("rope_alpha", rope_alpha, None, "auto|A",
         "go beyond the context: scale the rotary base by A^(D/(D-2))"),
    Flag("batch_size", int, 8, "N", "completions written at once [8]"),
    Flag("stop", "list", [], "TEXT", "end before this text; may repeat"),
    Flag("ignore_eos", "switch", False, None, "do not end at EOS"),
    Flag("stream", "switch", False, None, "print text as it comes"),
    Flag("output", str, "", "FILE.jsonl", "write a record for each prompt"),
    Flag("seed", int, None, "N", "the same seed gives the same text"),
)
# fmt: on

NO_END = (
    "note: the chat template writes no control token of this vocabulary behind an answer, so an "
    "answer may end only at --max_new_tokens or --stop TEXT"
)
FOR_PROMPTS = ("prompt", "prompt_ids", "prompt_file", "output", "num_samples")  # not for a chat


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags, with those of other systems as ours; `translation` has the rest of these."""
    parser = cli.Parser(
        prog="generate.py",
        description=f"{__doc__}\n{EXAMPLES}",
        usage="python generate.py --ckpt DIR [options]",
    )
    parser.add_model_flags()
    for flag in FLAGS:
        add_flag(parser, flag)
    generation_flags.TABLE.add_to(parser)
    options = parser.parse_args(arguments)
    translation = generation_flags.translate(vars(options))
    for name in generation_flags.TABLE.names:
        delattr(options, name)
    vars(options).update(translation.flags)
    options.translation = translation
    has_beams = options.num_beams > 1
    is_greedy = options.greedy or options.temperature == 0
    if is_greedy and not has_beams:
        parser.refuse(options, "where nothing is sampled", ("num_samples",))
    if options.num_beams == 1 and not options.mode:
        parser.refuse(options, "without --num_beams", ("length_penalty", "early_stopping"))
    if not options.web:
        parser.refuse(options, "without --web", ("host", "port"))
    if options.prompt_ids and not (options.prompt or options.prompt_file):
        parser.refuse(options, "with token ids, which are read as they are", ("system", "template"))
    if options.mode:
        names = ("web", "greedy", "output", "num_samples", "stream", "prompt_lookup")
        parser.refuse(options, "with --mode", names)
    elif options.chat:
        parser.refuse(options, "with --chat", ("web", *FOR_PROMPTS))
    if options.web:
        parser.refuse(options, "with --web", ("num_beams", "prompt_lookup", *FOR_PROMPTS))
    return options


def add_flag(parser: cli.Parser, flag: Flag) -> None:
    name = f"--{flag.name}"
    if flag.kind == "switch":
        parser.add_argument(name, action="store_true", help=flag.help)
        return
    settings: dict[str, Any] = {"type": flag.kind}
    if flag.kind == "list":
        settings = {"action": "append"}
    elif isinstance(flag.kind, tuple):
        settings = {"choices": flag.kind}
    parser.add_argument(
        name, default=flag.default, metavar=flag.metavar, help=flag.help, **settings
    )


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    check(options)
    prompts = read_prompts(options)
    from minillama.generation.ranks import start_tensor_ranks

    ranks = (options.tensor_parallel, options.device, options.devices)
    with start_tensor_ranks(*ranks, waits_for_person=options.chat) as mesh:
        answer(open_engine(options, mesh), prompts, options)


def answer(engine: "Engine", prompts: "list[Prompt]", options: argparse.Namespace) -> None:
    """Do what the flags ask for."""
    from minillama.chat import is_jinja, name_of
    from minillama.data.encode import end_of_answer
    from minillama.tokenizer import describe_bos

    about = f"template: {name_of(engine.template)}, {describe_bos(engine.tokenizer)}"
    print(f"{engine.path} ({about})", file=sys.stderr)
    if is_jinja(engine.template) and not end_of_answer(engine.tokenizer, engine.template):
        print(NO_END, file=sys.stderr)
    if options.web:
        from minillama.generation import web

        web.serve(engine, options.system, options.seed, options.host, options.port)
        return
    if options.mode:
        complete_in_modes(engine, prompts, options)
    elif prompts:
        complete(engine, prompts, options)
    if options.chat:
        from minillama.generation import terminal

        quit_words: tuple[str, ...] = terminal.QUIT_WORDS
        if options.translation.ends_at_empty_line:
            quit_words += ("",)
        terminal.chat_in_terminal(engine, options.system, options.seed, quit_words)


def complete(engine: "Engine", prompts: "list[Prompt]", options: argparse.Namespace) -> None:
    """Complete the prompts of the flags."""
    from minillama.generation.prompts import (
        PromptOptions,
        complete_prompts,
        encode_prompts,
        open_output,
    )

    prompt_ids = encode_prompts(engine, prompts, options.system)
    file = open_output(engine, prompt_ids, vars(options))
    can_stream = options.num_samples == 1 and options.num_beams == 1
    prompt_options = PromptOptions(
        options.num_samples,
        options.batch_size,
        options.seed,
        stream=options.stream and can_stream,
        show_progress=bool(options.output and options.prompt_file),
    )
    complete_prompts(engine, prompts, prompt_ids, prompt_options, file)


def complete_in_modes(
    engine: "Engine", prompts: "list[Prompt]", options: argparse.Namespace
) -> None:
    """Complete the prompts of the flags in each decoding mode."""
    from minillama.generation.modes import print_modes
    from minillama.generation.prompts import encode_prompts

    prompt_ids = encode_prompts(engine, prompts, options.system)
    print_modes(engine, prompts, prompt_ids, options.mode, options.seed)


def check(options: argparse.Namespace) -> None:
    """Raises UserError for a flag that is missing or out of range."""
    if not options.ckpt:
        raise UserError(
            "--ckpt DIR is missing; train one with `python train.py`, then "
            "`python generate.py --ckpt runs/demo --chat`"
        )
    has_prompt = options.prompt or options.prompt_ids or options.prompt_file
    if not (has_prompt or options.chat or options.web):
        raise UserError(
            "nothing to answer; give --prompt TEXT, --prompt_ids, --prompt_file FILE, "
            "--chat or --web"
        )
    if options.mode and not has_prompt:
        raise UserError("--mode completes prompts; give --prompt TEXT or --prompt_file FILE")
    if options.mode and options.temperature == 0:
        raise UserError("--temperature 0 leaves nothing to sample in --mode; leave it out")
    with parsing("--system"):
        check_encodable(options.system)
    if not 0 <= options.port <= 65535:
        raise UserError(f"--port {options.port}: must be from 0 to 65535")
    if options.web and options.tensor_parallel > 1:
        raise UserError("--web is for one process; --devices N in place of --tensor_parallel N")
    for name in ("num_samples", "num_beams", "batch_size", "tensor_parallel"):
        value = getattr(options, name)
        if value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")


def open_engine(options: argparse.Namespace, mesh: "Mesh | None" = None) -> "Engine":
    """The engine that the flags describe, divided among the ranks of `mesh`."""
    from minillama.generation.config import GenerationConfig
    from minillama.generation.loading import LoadOptions, load_engine

    config = from_flags(GenerationConfig, vars(options))
    texts = (options.prompt, options.prompt_file, options.chat, options.web, options.stop)
    load_options = from_flags(LoadOptions, vars(options))
    engine = load_engine(load_options, config, needs_text=any(texts), mesh=mesh)
    options.translation.check_numbers(engine.model.config)
    fallback = options.translation.fallback_template
    if engine.template == "none" and fallback and not options.template:
        print(f"note: the checkpoint names no template, so {fallback} is used", file=sys.stderr)
        engine = replace(engine, config=replace(engine.config, template=fallback))
    threads.use_threads_for(engine.model.config.parameter_count())
    return engine


def read_prompts(options: argparse.Namespace) -> "list[Prompt]":
    """The prompts in the order --prompt, --prompt_ids, --prompt_file."""
    prompts: list[Prompt] = list(options.prompt)
    for text in options.prompt_ids:
        words = text.split()
        if not all(word.isdecimal() for word in words):
            raise UserError(
                f'--prompt_ids {text!r}: expected whole numbers, such as "1 15043 3186"'
            )
        prompts.append([int(word) for word in words])
    if options.prompt_file:
        from minillama.generation.prompts import read_prompt_file

        prompts += read_prompt_file(Path(options.prompt_file))
        if not prompts:
            raise UserError(f"{options.prompt_file}: holds no prompts")
    return prompts


if __name__ == "__main__":
    threads.prepare_environment()
    cli.run(main, sys.argv[1:])
