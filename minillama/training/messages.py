"""The lines that a run prints when it starts, when a signal stops it, and when it is finished."""

from pathlib import Path

from minillama.checkpoint.template_files import read_template
from minillama.generation.examples import demo_questions
from minillama.training.run import Run
from minillama.training.summary import Stopped, Summary, gigabytes


def describe_start(run: Run) -> str:
    """What is trained, for how long, and where it continues."""
    total = run.model.config.parameter_count()  # of the whole; a rank may hold a part
    for name, parameter in run.optimizer.parameters.items():
        if "lora_" in name:
            total += parameter.size
    text = (
        f"model: {total:,} parameters, {run.optimizer.num_trained:,} trained; "
        f"{run.train_batches.total_steps:,} steps on {run.num_devices} × {run.mesh.device.type}"
    )
    if run.resume_point is not None:
        directory = run.resume_point.directory
        state = run.resume_point.state
        text += f"\nresuming {directory} at step {state['step']}, {state['tokens']:,} tokens"
    return text


def describe_stop(stopped: Stopped, overwrite: bool = False) -> str:
    """Where a run stopped, and what can be typed next.

    overwrite: the command has --overwrite_output_dir. With it, it would start over.
    """
    command = "the same command"
    if overwrite:
        command += " without --overwrite_output_dir"
    remedy = f"{command} goes on from there"
    if not stopped.is_saved:
        remedy = f"no checkpoint holds that step: {command} goes on from the one before it"
    return f"stopped by {stopped.signal} after step {stopped.step}; {remedy}"


def closing_message(out_dir: Path, summary: Summary) -> str:
    """What came of the run, and the command to type next."""
    loss = "no finite loss"
    if summary["last_loss"] is not None:
        loss = f"loss {summary['last_loss']:.4f}"
    if summary["eval_loss"] is not None:
        loss += f", validation loss {summary['eval_loss']:.4f}"
    command = f"python generate.py --ckpt {out_dir}"
    command += " --chat" if read_template(out_dir / "final") else ' --prompt "Once upon a time"'
    if out_dir.name.startswith("demo"):
        command = f"python eval.py --task demo --ckpt {out_dir}   or   {command}"
    lines = [
        f"{summary['steps']:,} steps, {summary['tokens']:,} tokens, {loss}, "
        f"{summary['seconds']:.0f} s, {summary['tokens_per_second']:,.0f} tokens/s per device, "
        f"peak memory {gigabytes(summary['peak_memory_bytes'])}",
        *speed_table(summary),
        f"next: {command}",
    ]
    for question in demo_questions(out_dir / "final"):
        lines.append(f"  ask it: {question}")
    return "\n".join(lines)


def speed_table(summary: Summary) -> list[str]:
    """The speed of a run in the columns of published tables: names, and values below them.

    /s/p is a second and device ("processor"). A sample is a row of a batch. TFLOP/s are a device's.
    """
    if "samples_per_second" not in summary:  # of an earlier version
        return []
    per_device = summary["samples_per_second"] / summary["devices"]
    columns = {
        "samples/s": f"{summary['samples_per_second']:.3f}",
        "samples/s/p": f"{per_device:.3f}",
        "tokens/s/p": f"{summary['tokens_per_second']:.1f}",
        "s/step": f"{summary['step_seconds']:.4f}",
        "TFLOP/s": f"{summary['tflops']:.4f}",
    }
    names = [f"{name:>11}" for name in columns]
    values = [f"{value:>11}" for value in columns.values()]
    return ["  ".join(names), "  ".join(values)]
