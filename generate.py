"""Talk to a LLaMA: complete prompts, or hold a conversation."""

import json
import sys
import time
from pathlib import Path

from minillama import config, errors
from minillama.commandlines import GENERATION

EXAMPLES = """
  python generate.py --ckpt runs/demo --chat
  python generate.py --ckpt LLAMA_DIR --prompt "Once upon a time" --greedy --stream
  python generate.py --ckpt BASE_DIR --lora ADAPTER_DIR --template alpaca --prompt "Name three colours."
  python generate.py --ckpt LLAMA_DIR --prompt_file prompts.txt --output answers.jsonl

--ckpt is a Hugging Face LLaMA directory, a run directory (its final/, else its newest checkpoint) or a PEFT adapter directory.
In --chat: q, quit or exit ends; clear or new starts over; Ctrl-C stops."""


def parse(arguments: list[str]):
    parser = config.Parser(GENERATION, prog="generate.py", description=__doc__ + "\n" + EXAMPLES,
                           usage="python generate.py --ckpt DIR [options]")
    parser.add_model_flags()
    add = parser.add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may repeat")
    add("--prompt_ids", action="append", default=[], metavar='"1 15043"', help="a prompt as token ids; may repeat")
    add("--prompt_file", default="", metavar="FILE", help='prompts, one a line, or .jsonl records with "prompt"')
    add("--chat", action="store_true", help="hold a conversation in the terminal")
    add("--system", default="", metavar="TEXT", help="system text of the conversation, where the template has a place for it")
    add("--template", default="", metavar="NAME|none", help="prompt template (empty: the checkpoint's own, else none)")
    add("--max_new_tokens", type=int, default=0, metavar="N", help="most tokens to write [256, or what the context leaves]")
    add("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy [0.8]")
    add("--top_k", type=int, default=0, metavar="K", help="draw from the K most likely tokens (0: all) [0]")
    add("--top_p", type=float, default=0.95, metavar="P", help="draw from the most likely tokens of total probability P [0.95]")
    add("--repetition_penalty", type=float, default=1.0, metavar="R", help="above 1: less of what is already there [1.0]")
    add("--greedy", action="store_true", help="always the most likely token")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may repeat")
    add("--ignore_eos", action="store_true", help="do not end at the end-of-text token")
    add("--stream", action="store_true", help="print text as it comes")
    add("--output", default="", metavar="FILE.jsonl", help="write a record for each prompt")
    add("--seed", type=int, default=None, metavar="N", help="the same seed gives the same text")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    if not options.ckpt:
        raise errors.UserError("--ckpt DIR is missing; train one with `python train.py`, then `python generate.py --ckpt runs/demo --chat`")
    if not (options.chat or options.prompt or options.prompt_ids or options.prompt_file):
        raise errors.UserError("nothing to answer; give --prompt TEXT, --prompt_ids, --prompt_file FILE or --chat")
    from minillama.generation.loading import load_session
    from minillama.generation.sampling import Sampling

    sampling = Sampling(0.0 if options.greedy else options.temperature, options.top_k, options.top_p, options.repetition_penalty)
    session, path = load_session(options, sampling, options.max_new_tokens, options.template, options.ignore_eos, tuple(options.stop))
    print(f"{path} (template: {session.template})", file=sys.stderr)
    if options.chat:
        from minillama.generation.terminal import chat_in_terminal
        chat_in_terminal(session, options.system, options.seed)
        return
    records = [answer_one(session, prompt, options) for prompt in read_prompts(options)]
    if options.output:
        Path(options.output).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def read_prompts(options) -> list[str | list[int]]:
    """Texts and id lists, in the order of the flags and then the file."""
    prompts: list[str | list[int]] = list(options.prompt)
    for ids in options.prompt_ids:
        if not all(word.isdigit() for word in ids.split()):
            raise errors.UserError(f"--prompt_ids {ids!r}: expected whole numbers, such as \"1 15043 3186\"")
        prompts.append([int(word) for word in ids.split()])
    path = Path(options.prompt_file)
    if options.prompt_file and not path.is_file():
        raise errors.UserError(f"{path}: no such file")
    lines = path.read_text(encoding="utf-8").splitlines() if options.prompt_file else []
    return prompts + [_prompt_of(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]


def _prompt_of(line: str, path: Path, number: int) -> str:
    if path.suffix != ".jsonl":
        return line
    try:
        return json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        raise errors.UserError(f'{path}: line {number} is not a JSON object with "prompt"') from None


def answer_one(session, prompt: str | list[int], options) -> dict:
    """Answer one prompt, print it, and return its record."""
    from minillama.generation.session import Answer

    ids = prompt if isinstance(prompt, list) else session.encode_prompt(prompt)
    if ids and max(ids) >= session.model.config.vocab_size:
        raise errors.UserError(f"--prompt_ids: {max(ids)} is beyond the vocabulary of {session.model.config.vocab_size}")
    answer, began = Answer(ids), time.perf_counter()
    for text in session.stream(answer, options.seed):
        print(text if options.stream else "", end="", flush=True)
    print("" if options.stream else answer.text, flush=True)
    seconds = time.perf_counter() - began
    return {"prompt": prompt if isinstance(prompt, str) else session.tokenizer.decode(ids), "prompt_ids": ids,
            "completions": [answer.text], "completion_ids": [answer.ids], "finish_reason": [answer.finish_reason],
            "seconds": round(seconds, 4), "tokens_per_second": round(len(answer.ids) / seconds, 2)}


if __name__ == "__main__":
    errors.run(main, sys.argv[1:])
