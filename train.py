"""Train a LLaMA: from scratch, all of it, or low-rank adapters; on one device or many."""

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minillama import cli, errors, launch, presets, threads, train_config
from minillama.compat import deepspeed, model_claims
from minillama.compat import flags as other_systems

EXAMPLES = """
  python train.py                              the demo: a small LLaMA from scratch, in two minutes
  python train.py --config demo_lora           tune the demo with LoRA
  python train.py --config 7b_lora --dry_run   what a run would need
  torchrun --nproc_per_node 8 train.py --config 7b_lora --ckpt LLAMA_DIR \\
      --data alpaca_data.json --out_dir runs/a

Every key below may also stand in a TOML file given as --config FILE.toml; a flag wins over the
file, the file over the default. Commas or spaces separate the parts of a list; [brackets] show
defaults. Flags of FastChat, LLaMA-Factory, Chinese-LLaMA-Alpaca and AscendSpeed
(--model_name_or_path, --lora_target, …) are understood too: docs/commands.md.

A run writes OUT_DIR/final (opens in transformers or peft), checkpoints/, metrics.jsonl,
trainer_log.jsonl, summary.json, train_config.json, inputs.json and loss.png. The same command
continues an interrupted run."""


def make_parser() -> cli.Parser:
    usage = "python train.py [--config NAME|FILE] [--KEY VALUE …]"
    parser = cli.Parser(prog="train.py", description=__doc__ + "\n" + EXAMPLES, usage=usage)
    add = parser.add_argument
    config = "a preset (see --list_configs), a .toml, or a train_config.json"
    add("--config", default="", metavar="NAME|FILE", help=config)
    add("--list_configs", action="store_true", help="print the presets, a line each")
    dry_run = "print parameters, memory per rank and tokens per step, and stop"
    add("--dry_run", action="store_true", help=dry_run)
    show_batch = "print the first batch with the trained tokens marked, and stop"
    add("--show_batch", action="store_true", help=show_batch)
    world_size = "with --dry_run: plan for N ranks (as many as hold the model together)"
    add("--world_size", type=int, default=None, metavar="N", help=world_size)
    add("--overwrite_output_dir", **cli.BOOLEAN, default=False, help="empty out_dir first")
    deepspeed_file = "take settings from a DeepSpeed JSON file"
    add("--deepspeed", nargs="?", const="", default="", metavar="FILE", help=deepspeed_file)
    cli.add_keys(parser)
    other_systems.add_flags(parser)
    return parser


def parse(arguments: list[str]) -> tuple[train_config.TrainConfig, argparse.Namespace]:
    """The settings: defaults, then the preset or file, then DeepSpeed's file, then the flags."""
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    if not parsed.dry_run:
        parser.refuse(parsed, "without --dry_run (torchrun starts ranks)", ("world_size",))
    if parsed.world_size is not None and parsed.world_size < 1:
        raise errors.UserError(f"--world_size {parsed.world_size}: must be at least 1")
    flags = vars(parsed)
    own_start = ("ckpt", "data", "model", "init", "tokenizer", "dim")
    is_own_run = any(name in flags for name in own_start)
    source = flags["config"] or ("" if is_own_run else "demo")
    file = read_deepspeed(flags)
    if file is not None:
        flags = file.keys | flags
    flags = other_systems.translate(flags)
    wants_zero3 = flags.get("zero_stage") == 3
    if wants_zero3:
        flags = flags | {"zero_stage": 2}
    config = presets.resolve(source, flags, other_systems.TABLE.renamed)
    parsed.world_size = parsed.world_size or ranks_of(config, parsed.dry_run)
    config = other_systems.with_global_batch_size(flags, config, parsed.world_size)
    other_systems.refuse_contradictions(flags, config)
    if file is not None:
        file.check(config, parsed.world_size)
    if wants_zero3:
        from minillama.training.zero3 import refuse_zero3

        refuse_zero3(config, parsed.world_size)
    return config, parsed


def ranks_of(config: train_config.TrainConfig, dry_run: bool) -> int:
    """The number of ranks. A plan without torchrun is for as many as hold the model together."""
    ranks = launch.world_size()
    if dry_run and ranks == 1:
        return config.tensor_parallel * config.pipeline_parallel
    return ranks


def read_deepspeed(flags: Mapping[str, Any]) -> deepspeed.DeepSpeedFile | None:
    """The DeepSpeed file of --deepspeed FILE, or of AscendSpeed's --deepspeed --deepspeed_config.

    A bare --deepspeed names none: it chose the launcher.
    """
    named = [flags["deepspeed"], *(flags["deepspeed_config"] or ())]
    paths = [Path(name) for name in named if name]
    if len(paths) > 1:
        raise errors.UserError("--deepspeed and --deepspeed_config: give one of them")
    return deepspeed.read(paths[0]) if paths else None


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0, or that of the signal which stopped training."""
    config, flags = parse(arguments)
    if flags.list_configs:
        listed = presets.list_presets()
        width = max(map(len, listed)) + 2
        for name, line in listed.items():
            print(f"{name:{width}}{line}")
        return 0
    from minillama import comm
    from minillama.training import architecture, dry_run, messages, model_building, run, trainer
    from minillama.training.summary import Stopped

    if config.adapter:
        model_building.refuse_other_adapter(config, vars(flags))
    if not flags.dry_run:
        run.check_inputs(config, f"{launch.launcher()} train.py {shlex.join(arguments)}")
    if model_claims.describes_model(vars(flags)):
        llama = architecture.model_config(config, architecture.find_base(config))
        model_claims.refuse_other_model(vars(flags), llama, config.tensor_parallel)
    if flags.dry_run:
        print(dry_run.describe(config, flags.world_size))
        return 0
    with comm.start(config.device, device_list=config.devices) as mesh:
        if flags.show_batch:
            mesh.print(dry_run.show_first_batch(config, mesh))
            return 0
        outcome = trainer.train(config, mesh, flags.overwrite_output_dir)
        if isinstance(outcome, Stopped):
            return outcome.exit_code
        mesh.print(messages.closing_message(Path(config.out_dir), outcome))
        return 0


if __name__ == "__main__":
    threads.prepare_environment()
    cli.run(main, sys.argv[1:])
