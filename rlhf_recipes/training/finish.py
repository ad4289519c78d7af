"""The end of a training: result.json, card, pictures, and the summary with the command that usually follows."""

import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

from rlhf_recipes import ranks
from rlhf_recipes.commands import command
from rlhf_recipes.errors import first_line
from rlhf_recipes.overrides import written
from rlhf_recipes.references import adapter_sha256
from rlhf_recipes.run import Run
from rlhf_recipes.run_folder import write_atomically
from rlhf_recipes.secrets import redact
from rlhf_recipes.text import line


def finish(run: Run, trainer, *, main: str, before: dict, metrics: dict, counts: dict, **entries) -> float:
    """Write card and pictures of a training, then its result.json, end its checkpoints, print the summary.

    A card or picture that fails costs a warning, never the run; who is killed at one has not finished.

    Args:
        trainer: after training; its log history becomes curves.png.
        main: the metric that the run is about.
        before: metrics before training, name -> estimate.
        metrics: the same after training.
        counts: report of the data.
        entries: what else result.json says of this recipe.

    Returns:
        The value of the main metric, which makes the recipe an objective for sweeps.
    """
    from rlhf_recipes.training import callbacks, card, doctor, doctor_plot
    from rlhf_recipes.training.curves import plot_curves

    title = f"{run.recipe} · {run.dir.name}"
    watching = next((c for c in trainer.callback_handler.callbacks if isinstance(c, callbacks.Doctor)), None)
    if watching:
        seen = watching.record(before, metrics)
        entries["doctor"] = {**doctor.examine(seen), "facts": seen.facts}
        if watching.stopped:
            entries["stopped"] = watching.stopped
    left_out = next((c.count for c in trainer.callback_handler.callbacks if isinstance(c, callbacks.LeaveOut)), 0)
    if left_out:
        entries[callbacks.LeaveOut.KEY] = left_out
    result = run.record(
        main={"name": main, "before": before[main], "after": metrics[main]},
        before=before,
        metrics=metrics,
        counts=counts,
        seed=trainer.args.seed,
        steps=trainer.state.global_step,
        resumed_from=run.checkpoint and Path(run.checkpoint).name,
        global_batch=trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * ranks.world_size(),
        adapter_sha256=adapter_sha256(run.adapter),
        parent=run.parent and run.parent.lineage,
        **entries,
    )
    if ranks.is_first():
        with _spared("README.md"):
            write_atomically(run.dir / "README.md", card.write(result, run.config))
        with _spared("curves.png"):
            plot_curves(trainer.state.log_history, run.dir / "curves.png", title)
        if watching:
            with _spared("doctor.png"):
                doctor_plot.plot(seen, entries["doctor"]["findings"], run.dir / "doctor.png", title)
    run.write_result(result)
    if not ranks.is_first():
        return metrics[main].value
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, callbacks.Tracker):
            with _spared("the tracker's last table"):
                callback.finish(before, metrics)
    _print_summary(run, result)
    return metrics[main].value


@contextmanager
def _spared(file: str):
    """What is only looked at never takes the run with it."""
    try:
        yield
    except Exception as error:
        said = line(redact(f"{type(error).__name__}: {first_line(error)}"))
        print(
            f"warning: {file} was not written ({said}). The run is finished without it.", file=sys.stderr, flush=True
        )


def _print_summary(run: Run, result: dict) -> None:
    from rlhf_recipes.stats import format_estimate
    from rlhf_recipes.training import doctor

    main, where = result["main"], line(run.dir)
    peak = ", ".join(f"{gib} GiB {where}" for where, gib in result["peak_memory_gib"].items())
    print(f"\n{run.recipe} finished in {result['seconds']:.0f} s, peak {peak}.")
    name, before, after = line(main["name"].replace("_", " ")), main["before"], main["after"]
    print(f"  {name}: {format_estimate(before)} -> {format_estimate(after)}")
    if result.get("stopped"):
        print(f"  stopped   {line(result['stopped'])}")
    if result.get("steps_left_out"):
        print(f"  left out  {result['steps_left_out']} of {result['steps']} steps, whose gradient was not finite")
    if result.get("doctor"):
        print("\n".join(f"  doctor    {said}" for said in doctor.said(result["doctor"])))
    for sample in result.get("samples", []):
        said = textwrap.shorten(line(sample["completion"]), 80, placeholder=" …")
        print(f"  sample    {sample['reward']:+.3f}  {said or '(empty)'}")
    print(f"  adapter   {where}/adapter\n  curves    {where}/curves.png\n  result    {where}/result.json")
    print(f"  next      {line(next_command(run))}", flush=True)


def next_command(run: Run) -> str:
    """The command that usually follows this recipe."""
    if run.recipe == "sft":
        return f"{command('dpo')} {written('model.adapter', str(run.dir))}"
    if run.recipe == "reward":
        return f"{command('audit')} {written('reward_model', str(run.dir))}"
    return f"{command('evaluate')} {written('runs', [str(run.dir)])}"
