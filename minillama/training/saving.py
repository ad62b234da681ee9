"""What a run saves: checkpoints to resume from, and final/.

Each holds the model, or its adapter, as a directory that opens by itself in transformers or peft.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path

from minillama.checkpoint import train_state
from minillama.checkpoint.hf_writer import save_model
from minillama.checkpoint.manifest import write_manifest
from minillama.checkpoint.template_files import write_template
from minillama.checkpoint.tokenizer_files import copy_tokenizer
from minillama.files import write_json
from minillama.lora import save_adapter
from minillama.output_directory import new_directory
from minillama.training.run import Run


def save_checkpoint(run: Run, step: int, tokens: int, skipped: int) -> str | None:
    """Write checkpoints/step-N. Returns why it was not written, or None.

    Called on every rank, because each writes its own part of the optimizer's state. The numbers are
    those that have been counted up to this step.
    """
    optimizer = run.optimizer.state()
    state = {
        "step": step,
        "tokens": tokens,
        "skipped": skipped,
        "updates": optimizer.num_updates,
        "rows_per_step": run.train_batches.rows_per_step,
        "loss_scale": optimizer.loss_scale,
        "fingerprints": run.inputs.fingerprints,
    }
    return train_state.save_state(
        run.out_dir,
        step,
        run.mesh,
        slices=optimizer.slices,
        state=state,
        write_model=partial(write_model, run),
        keep=run.config.save_total_limit,
    )


def write_final(run: Run) -> None:
    """Write final/, complete or absent. Called on every rank."""
    final = run.out_dir / "final"
    if not run.mesh.is_first:
        write_model(run, final)
        return
    with new_directory(final, replace=True) as directory:
        write_model(run, directory)
        write_manifest(directory)


def write_model(run: Run, directory: Path) -> None:
    """Write the model, or its adapter alone, and how it was made.

    Called on every rank: tensor ranks join their parts, stages send theirs to the first one, and
    the first rank writes.
    """
    grid = run.grid
    if not grid.data.is_first:
        return  # every data line has the same model
    base = str(run.base.resolve()) if run.base else ""
    if run.lora is None:
        save_model(run.model, directory, run.tokenizer, mesh=grid.tensor, stages=grid.stage)
    else:
        save_adapter(run.model, run.lora, directory, base, grid.tensor, grid.stage)
    if not run.mesh.is_first:
        return
    if run.lora is not None:
        copy_tokenizer(run.tokenizer.path, directory)
    about = {
        "template": write_template(directory, run.template),
        "made_by": "minillama train.py",
        "base": base,
        "settings": asdict(run.config),
    }
    write_json(directory / "minillama.json", about)
