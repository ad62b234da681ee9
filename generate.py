"""Talk to a LLaMA: complete prompts, or hold a conversation."""

import contextlib
import hashlib
import json
import sys
from pathlib import Path

from minillama import cli, errors
from minillama.compat.flags import GENERATION

EXAMPLES = """
  python generate.py --ckpt runs/demo --chat
  python generate.py --ckpt LLAMA_DIR --prompt "Once upon a time" --greedy --stream
  python generate.py --ckpt BASE_DIR --lora ADAPTER_DIR --template alpaca --prompt "Name three colours."
  python generate.py --ckpt LLAMA_DIR --prompt_file prompts.txt --output answers.jsonl
  python generate.py --ckpt LLAMA_DIR --prompt "Once upon a time" --num_beams 4
  python generate.py --ckpt LLAMA_DIR --web

--ckpt is a Hugging Face LLaMA directory, a run directory (its final/, else its newest checkpoint) or a PEFT adapter directory.
In --chat: q, quit or exit ends; clear or new starts over; Ctrl-C stops an answer.
--output: a run that was interrupted goes on when the same command is given again."""


def parse(arguments: list[str]):
    parser = cli.Parser(
        GENERATION,
        prog="generate.py",
        description=__doc__ + "\n" + EXAMPLES,
        usage="python generate.py --ckpt DIR [options]",
    )
    parser.add_model_flags()
    add = parser.add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may repeat")
    add(
        "--prompt_ids",
        action="append",
        default=[],
        metavar='"1 15043"',
        help="a prompt as token ids; may repeat",
    )
    add(
        "--prompt_file",
        default="",
        metavar="FILE",
        help='prompts, one a line, or .jsonl records with "prompt"',
    )
    add("--chat", action="store_true", help="hold a conversation in the terminal")
    add("--web", action="store_true", help="hold a conversation in the browser (extra `web`)")
    add(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address of --web; another one lets other machines in [127.0.0.1]",
    )
    add("--port", type=int, default=7860, metavar="N", help="port of --web [7860]")
    add(
        "--system",
        default="",
        metavar="TEXT",
        help="system text of the conversation, where the template has a place for it",
    )
    add(
        "--template",
        default="",
        metavar="NAME|none",
        help="prompt template (empty: the checkpoint's own, else none)",
    )
    add(
        "--max_new_tokens",
        type=int,
        default=0,
        metavar="N",
        help="most tokens to write [256, or what the context leaves]",
    )
    add("--temperature", type=float, default=None, metavar="T", help="0 is greedy [0.8]")
    add(
        "--top_k",
        type=int,
        default=None,
        metavar="K",
        help="draw from the K most likely tokens (0: all) [0]",
    )
    add(
        "--top_p",
        type=float,
        default=None,
        metavar="P",
        help="draw from the most likely tokens of total probability P [0.95]",
    )
    add(
        "--repetition_penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1: less of what is already there [1.0]",
    )
    add("--greedy", action="store_true", help="always the most likely token")
    add("--num_samples", type=int, default=1, metavar="N", help="texts for each prompt [1]")
    add(
        "--num_beams",
        type=int,
        default=1,
        metavar="W",
        help="beam search; a temperature, top_k or top_p adds draws [1]",
    )
    add(
        "--length_penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="beams: scores are divided by length^X [1.0]",
    )
    add(
        "--early_stopping",
        default="false",
        choices=("true", "false", "never"),
        help="beams: when to stop; docs/decoding.md [false]",
    )
    add(
        "--rope_alpha",
        type=_alpha,
        default=None,
        metavar="auto|A",
        help="go beyond the context: stretch the rotary base by A^(D/(D-2))",
    )
    add("--batch_size", type=int, default=8, metavar="N", help="texts written at once [8]")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may repeat",
    )
    add("--ignore_eos", action="store_true", help="do not end at the end-of-text token")
    add("--stream", action="store_true", help="print text as it comes")
    add("--output", default="", metavar="FILE.jsonl", help="write a record for each prompt")
    add("--seed", type=int, default=None, metavar="N", help="the same seed gives the same text")
    options = parser.parse_args(arguments)
    one_text, instead = (
        options.num_beams == 1,
        ("prompt", "prompt_ids", "prompt_file", "output", "num_samples"),
    )
    for asked, reason, names in (
        (
            (options.greedy or options.temperature == 0) and one_text,
            "where nothing is drawn",
            ("num_samples",),
        ),
        (one_text, "without --num_beams", ("length_penalty", "early_stopping")),
        (options.chat, "with --chat", ("web", *instead)),
        (options.web, "with --web", ("num_beams", *instead)),
    ):
        if asked:
            parser.refuse(options, reason, names)
    return options


def _alpha(text: str) -> float:
    """ "auto" as 0, or a number from 1."""
    with contextlib.suppress(ValueError):
        if text == "auto" or 1 <= float(text) < 1e6:
            return 0.0 if text == "auto" else float(text)
    raise errors.UserError(f"--rope_alpha: {text!r} is neither auto nor a number from 1")


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    if not options.ckpt:
        raise errors.UserError(
            "--ckpt DIR is missing; train one with `python train.py`, then `python generate.py --ckpt runs/demo --chat`"
        )
    if not (
        options.chat or options.web or options.prompt or options.prompt_ids or options.prompt_file
    ):
        raise errors.UserError(
            "nothing to answer; give --prompt TEXT, --prompt_ids, --prompt_file FILE, --chat or --web"
        )
    for name, least in (
        ("num_samples", 1),
        ("num_beams", 1),
        ("batch_size", 1),
        ("max_new_tokens", 0),
    ):
        if getattr(options, name) < least:
            raise errors.UserError(f"--{name} {getattr(options, name)}: must be at least {least}")
    if not abs(options.length_penalty) <= 10:
        raise errors.UserError(f"--length_penalty {options.length_penalty}: must be from -10 to 10")
    if "" in options.stop:
        raise errors.UserError(
            '--stop "": an empty text would end every answer at once; leave it out'
        )
    texts = read_prompts(options)
    session, path = open_session(options)
    print(f"{path} (template: {session.template})", file=sys.stderr)
    from minillama.generation import terminal, web

    if options.web:
        web.serve(session, options.system, options.seed, options.host, options.port)
    elif options.chat:
        terminal.chat_in_terminal(session, options.system, options.seed)
    else:
        answer_prompts(session, path, texts, options)


def open_session(options):
    """(the session that the flags describe, the directory in use)"""
    from minillama.generation import beam, loading
    from minillama.generation.sampling import Sampling

    said = {
        name: value
        for name in ("temperature", "top_k", "top_p")
        if (value := getattr(options, name)) is not None
    }
    if options.greedy:
        said["temperature"] = 0.0
    sampling = Sampling(**said, repetition_penalty=options.repetition_penalty)
    session, path = loading.load_engine(options, options.template)
    session.sampling, session.max_new_tokens, session.rope_alpha = (
        sampling,
        options.max_new_tokens,
        options.rope_alpha,
    )
    session.stop_texts = tuple(options.stop)
    session.stop_ids = () if options.ignore_eos else session.stop_ids
    if options.num_beams > 1:
        draws = sampling.temperature > 0 and bool(said)
        session.beams = beam.Beams(
            options.num_beams, options.length_penalty, options.early_stopping, draws
        )
    return session, path


def read_prompts(options) -> list[str | list[int]]:
    """Texts and id lists, in the order of the flags and then the file."""
    prompts: list[str | list[int]] = list(options.prompt)
    for ids in options.prompt_ids:
        if not all(word.isdecimal() for word in ids.split()):
            raise errors.UserError(
                f'--prompt_ids {ids!r}: expected whole numbers, such as "1 15043 3186"'
            )
        prompts.append([int(word) for word in ids.split()])
    path = Path(options.prompt_file)
    if options.prompt_file and not path.is_file():
        raise errors.UserError(f"{path}: no such file")
    with errors.parsing(
        path
    ):  # lines end at line feeds alone: JSON may hold other kinds of line break
        lines = path.read_text(encoding="utf-8-sig").split("\n") if options.prompt_file else []
    prompts += [
        _prompt_of(line, path, number) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if lines and not prompts:
        raise errors.UserError(f"{path}: holds no prompts")
    return prompts


def _prompt_of(line: str, path: Path, number: int) -> str:
    if path.suffix != ".jsonl":
        return line
    with contextlib.suppress(ValueError, KeyError, TypeError):
        if isinstance(prompt := json.loads(line)["prompt"], str):
            return prompt
    raise errors.UserError(f'{path}: line {number} is not a JSON object with the text "prompt"')


def answer_prompts(session, path: Path, texts: list[str | list[int]], options) -> None:
    """Answer all prompts; print the answers in order, or write a record for each to --output."""
    from tqdm import tqdm

    from minillama.generation.output_file import CompletionFile

    prompts = [
        text if isinstance(text, list) else session.encode_prompt(text, options.system)
        for text in texts
    ]
    if (
        highest := max((token for ids in prompts for token in ids), default=0)
    ) >= session.model.config.vocab_size:
        raise errors.UserError(
            f"--prompt_ids: {highest} is beyond the vocabulary of {session.model.config.vocab_size}"
        )
    file = (
        CompletionFile(Path(options.output), settings_of(session, path, prompts, options))
        if options.output
        else None
    )
    done = file.done if file else {}
    asked = {
        i: answers
        for i, answers in session.ask_all(prompts, options.num_samples).items()
        if i not in done
    }
    quiet, streaming = (
        bool(file and options.prompt_file),
        options.stream and options.num_samples == 1 and not session.beams,
    )
    unprinted = (
        [] if quiet or streaming else [answer for answers in asked.values() for answer in answers]
    )
    bar = tqdm(total=len(prompts), initial=len(done), unit="prompt", disable=not quiet)
    try:
        for number, text in session.write_all(
            asked, 1 if streaming else options.batch_size, options.seed
        ):
            is_done = all(answer.finish_reason for answer in asked[number])
            if streaming:
                print(text, end="\n" if is_done else "", flush=True)
            while unprinted and unprinted[0].finish_reason:
                print(unprinted.pop(0).text, flush=True)
            bar.update(is_done)
            if is_done and file:
                file.add(number, record_of(session, texts[number], asked[number]))
    except KeyboardInterrupt:
        print(*(answer.text for answer in unprinted if answer.text), sep="\n", flush=True)
        if file:
            print(
                f"\n{len(done)} of {len(prompts)} answers are in {file.partial}; the same command goes on",
                file=sys.stderr,
            )
        raise
    bar.close()
    if file:
        file.finish()


def settings_of(session, path: Path, prompts: list[list[int]], options) -> dict:
    """What an answer depends on: an interrupted file is continued only where all of it is the same."""
    from minillama.generation.loading import weights_checksum

    free = {
        "ckpt",
        "debug",
        "stream",
        "output",
        "batch_size",
        "device",
        "prompt",
        "prompt_ids",
        "prompt_file",
        "host",
        "port",
    }
    return {
        "checkpoint": str(path),
        "weights_sample_sha256": weights_checksum(session.model),
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        **{name: value for name, value in vars(options).items() if name not in free},
        "template": session.template,
    }


def record_of(session, text: str | list[int], answers: list) -> dict:
    """A prompt's line of --output."""
    ids, seconds = answers[0].prompt_ids, max(answer.seconds for answer in answers)
    record = {
        "prompt": text if isinstance(text, str) else session.tokenizer.decode(ids),
        "prompt_ids": ids,
        "completions": [answer.text for answer in answers],
        "completion_ids": [answer.ids for answer in answers],
        "finish_reason": [answer.finish_reason for answer in answers],
        "seconds": round(seconds, 4),
        "tokens_per_second": round(sum(len(answer.ids) for answer in answers) / seconds, 2),
    }
    return record | ({"scores": [answer.score for answer in answers]} if session.beams else {})


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
