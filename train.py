"""Train a LLaMA: from scratch, all of it, or low-rank adapters; on one device or many."""

import os
import shlex
import sys
from pathlib import Path

from minillama import cli, errors, threads, train_config
from minillama.compat import deepspeed
from minillama.compat import flags as other_systems

EXAMPLES = """
  python train.py                                    the demo: a small LLaMA from scratch, on data of its own, in two minutes
  python train.py --config demo_lora                 tune the demo with LoRA
  python train.py --config 7b_lora --dry_run         what a run would need
  torchrun --nproc_per_node 8 train.py --config 7b_lora --ckpt LLAMA_DIR --data alpaca_data.json --out_dir runs/a

Every key below may also stand in a TOML file given as --config FILE.toml; a flag wins over the file, the file over the default.
A run writes OUT_DIR/final (opens in transformers or peft), checkpoints/, metrics.jsonl, summary.json, train_config.json, loss.png.
The same command continues an interrupted run. Lists are comma-separated; [brackets] show defaults. Flags of FastChat, LLaMA-Factory,
Chinese-LLaMA-Alpaca and AscendSpeed (--model_name_or_path, --lora_target, …) are understood too."""


def parse(arguments: list[str]) -> tuple[train_config.TrainConfig, object]:
    usage = "python train.py [--config NAME|FILE] [--KEY VALUE …]"
    parser = cli.Parser(prog="train.py", description=__doc__ + "\n" + EXAMPLES, usage=usage)
    add = parser.add_argument
    add(
        "--config",
        default="",
        metavar="NAME|FILE",
        help="a preset (see --list_configs), a .toml, or a train_config.json",
    )
    add("--list_configs", action="store_true", help="print the presets, a line each")
    add(
        "--dry_run",
        action="store_true",
        help="print parameters, memory per rank and tokens per step, and stop",
    )
    add(
        "--show_batch",
        action="store_true",
        help="print the first batch with the trained tokens marked, and stop",
    )
    add(
        "--world_size",
        type=int,
        default=os.environ.get("WORLD_SIZE", "1"),
        metavar="N",
        help="with --dry_run: plan for N ranks",
    )
    add("--overwrite_output_dir", **cli.BOOLEAN, default=False, help="empty out_dir first")
    add("--deepspeed", default="", metavar="FILE", help="take settings from a DeepSpeed JSON file")
    cli.add_keys(parser)
    other_systems.add_flags(parser)
    found = parser.parse_args(arguments)
    if found.world_size < 1:
        raise errors.UserError(f"--world_size {found.world_size}: must be at least 1")
    flags = vars(found)
    brings_its_own = any(
        name in flags for name in ("ckpt", "data", "model", "init", "tokenizer", "dim")
    )
    source = flags["config"] or ("" if brings_its_own else "demo")
    if found.deepspeed:
        flags = deepspeed.read(Path(found.deepspeed), found.world_size) | flags
    flags = other_systems.keys_from(flags) | flags
    return train_config.resolve(source, flags, other_systems.RENAMED), found


def main(arguments: list[str]) -> None:
    settings, found = parse(arguments)
    if found.list_configs:
        for name, line in train_config.list_presets().items():
            print(f"{name:24}{line}")
        return
    from minillama import comm
    from minillama.training import run, trainer

    if found.dry_run:
        print(run.describe(settings, found.world_size))
        return
    ranks = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = f"torchrun --nproc_per_node {ranks} train.py" if ranks else "python train.py"
    run.check_inputs(settings, shlex.join([*launcher.split(), *arguments]))
    if not settings.out_dir and not found.show_batch:
        raise errors.UserError("name a run directory with --out_dir runs/NAME")
    run.refuse_what_cannot_fit(settings)
    with comm.start(settings.device) as mesh:
        if found.show_batch:
            mesh.print(trainer.show_first_batch(settings, mesh))
            return
        summary = trainer.train(settings, mesh, found.overwrite_output_dir)
        if summary is not None:
            mesh.print(run.closing_words(settings, summary))


if __name__ == "__main__":
    threads.prepare_environment()
    cli.run(main, sys.argv[1:])
