"""Train by a recipe in a folder that was claimed: looked through first, stopped well, told on the way."""

from __future__ import annotations

from pathlib import Path

from finetune_kit import distributed
from finetune_kit.recipe import Recipe
from finetune_kit.run_folder.claim import same_finished
from finetune_kit.run_folder.naming import is_unfinished
from finetune_kit.runs.save import Artifact
from finetune_kit.settings.schema import RecipeConfig
from finetune_kit.system.terminal import Console, console, doing
from finetune_kit.training import checkpoint, resources, stopping


def train(recipe: Recipe, settings: RecipeConfig, *, strict_resume: bool = False, out: Console = console) -> Artifact:
    """The recipe's artifact, in settings.train.output_dir. An unfinished run there resumes from its newest whole
    checkpoint; with `strict_resume` a broken one is an error, else it is passed over and told. Lines go to `out`.

    What would end the run late (rights on the Hub, shapes, optimizers) is looked for first. A signal, or an interrupt
    in a notebook, ends it after the step, with a checkpoint: Stopped. Raises FinetuneKitError.
    """
    from finetune_kit.planning.preflight import check_start

    folder = Path(settings.train.output_dir or "")
    if settings.hub.push:
        from finetune_kit.run_folder.upload import check_access

        with doing("asking the Hub"):
            distributed.from_main(lambda: check_access(settings.hub.model_id or "", settings.hub.private))
    with doing("starting"):
        distributed.from_main(lambda: check_start(settings))
    what = f"{recipe.name} of {settings.model.name_or_path} on {settings.data.path}, into {folder}"
    out.print(what, style="bold", markup=False)
    if (twin := same_finished(settings, folder)) is not None:
        out.print(f"note: {twin} holds a finished run of these very settings; this one trains again.", markup=False)
    if is_unfinished(folder):
        found = distributed.from_main(lambda: checkpoint.newest_whole(folder, strict_resume))
        where = f"resumes from step {checkpoint.step_of(found)}" if found else "starts over: it had no checkpoint yet"
        out.print(f"{folder} holds an unfinished run of these settings, which {where}.", markup=False)
    with doing("starting"):
        import torch  # noqa: F401  # they take seconds to import: the silence has a name
        import transformers  # noqa: F401
    with stopping.stop_on_signals(folder), resources.disk_errors(folder, "A file of the run"):
        with doing(f"running {recipe.name}"):
            artifact: Artifact = recipe.run(settings)
        distributed.finish()
    return artifact
