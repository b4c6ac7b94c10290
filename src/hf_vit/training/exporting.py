"""The finished model: its folder, its card, a summary of its metrics, the push to the Hub."""

import contextlib
import json
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub import EvalResult
from transformers import TrainerCallback

from hf_vit.files.atomic import atomic_folder
from hf_vit.files.output import CARD, TRAINING_FILES, mark, owned_files
from hf_vit.hub.push import push, write_model_card
from hf_vit.training.arguments import DataArguments, HfViTTrainingArguments
from hf_vit.training.command_line import effective_settings, format_settings
from hf_vit.training.curves import draw_curves
from hf_vit.training.sharding import is_sharded, whole


LOG = "log.jsonl"
_REPLACED = tuple(name for name in TRAINING_FILES if name != LOG)  # at the end of a training


class JsonLog(TrainerCallback):
    """Writes every log entry as a line of `log.jsonl`; resuming removes the lines after the checkpoint."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / LOG
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if state.global_step and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError):  # a last line may be cut
                    kept += [line] if json.loads(line)["step"] <= state.global_step else []
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            with (Path(args.output_dir) / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class TimeEstimate(TrainerCallback):
    """Prints, after the first steps, how long the training will take, if it is more than a minute."""

    FIRST = 3  # steps that are not typical

    def __init__(self) -> None:
        self._steps, self._started = 0, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps += 1
        if self._steps == self.FIRST:
            self._started = time.monotonic()
        if self._steps == 2 * self.FIRST and state.is_world_process_zero:
            seconds = (time.monotonic() - self._started) / self.FIRST
            rest = seconds * (state.max_steps - state.global_step)
            if rest > 60:  # seconds
                sys.stderr.write(f"time    {seconds:.2f} s a step, about {format_duration(rest)} left\n")


def format_duration(seconds: float) -> str:
    """Return a duration in the unit that suits it."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def export(
    trained: Any,
    folder: str | Path,
    *,
    task: Any,
    results: Mapping[str, Any],
    settings: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] = (),
    merge_adapters: bool = True,
) -> Path:
    """Write the finished model to `folder`: configuration, weights, processor, card, metrics, settings and curves.

    All processes must call it, because the weights may be sharded over them; the first one writes.

    Args:
        settings: How it was trained, for the card; its `dataset` is what `results` were measured on.
        history: Trainer's log, drawn as `training_curves.png`.
        merge_adapters: Merge adapters, so that the folder opens without PEFT; otherwise it is a PEFT adapter.
    """
    weights = whole(trained.state_dict()) if is_sharded(trained) else None
    if not PartialState().is_main_process:
        return Path(folder)
    is_adapter = hasattr(trained, "merge_and_unload") and not merge_adapters
    if hasattr(trained, "merge_and_unload") and merge_adapters:
        trained = trained.merge_and_unload()
    with atomic_folder(folder, owned=(*owned_files(folder), *_REPLACED)) as staging:
        trained.save_pretrained(staging, state_dict=weights)
        task.processor.save_pretrained(staging)
        (staging / "results.json").write_text(json.dumps(dict(results), indent=2) + "\n", encoding="utf-8")
        (staging / "recipe.toml").write_text(format_settings(settings), encoding="utf-8")
        if history:
            draw_curves(history, staging / "training_curves.png")
        if not is_adapter:  # PEFT has written its own card
            write_model_card(
                staging,
                repo_id=Path(folder).resolve().name,
                base_model=_hub_id(str(settings["fine-tuned from"])),
                datasets=_hub_id(str(settings["dataset"])),
                recipe=settings,
                results=_card_results(str(settings["dataset"]), results),
            )
        card = staging / CARD
        card.write_text(mark(card.read_text(encoding="utf-8")), encoding="utf-8")
    return Path(folder)


def finish(
    trained: Any,
    *,
    task: Any,
    results: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    arguments: tuple[Any, DataArguments, HfViTTrainingArguments],
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Export the finished model and push it where requested; all processes must call it.

    Returns:
        A summary for the user; empty on all processes but the first.
    """
    model_args, data_args, args = arguments
    settings = card_settings(*arguments, task=task) | dict(settings or {})
    results = dict(results) | {"split": task.split}
    folder = export(
        trained,
        args.output_dir,
        task=task,
        results=results,
        settings=settings,
        history=history,
        merge_adapters=model_args.merge_adapters,
    )
    if not PartialState().is_main_process:
        return ""
    done = f"{summarize(results, task)}; the model is in {folder}"
    if args.push_to_hub or data_args.dry_run:
        repo_id = args.hub_model_id or folder.resolve().name
        if hasattr(trained, "peft_config") and not model_args.merge_adapters:
            return done + _push_adapter(folder, repo_id, args, dry_run=data_args.dry_run)
        push(folder, repo_id, private=args.hub_private_repo, token=args.hub_token, dry_run=data_args.dry_run)
        done += f", ready for {repo_id}; nothing was sent" if data_args.dry_run else f" and on the Hub as {repo_id}"
    return done


def _push_adapter(folder: Path, repo_id: str, args: HfViTTrainingArguments, *, dry_run: bool) -> str:
    """Push a PEFT adapter folder as it is, without checkpoints and logs."""
    if dry_run:
        return f", a PEFT adapter ready for {repo_id}; nothing was sent"
    from huggingface_hub import HfApi

    api = HfApi(library_name="hf_vit", token=args.hub_token)
    repo_id = api.create_repo(repo_id, private=args.hub_private_repo, exist_ok=True).repo_id
    names = [*_REPLACED, CARD, "preprocessor_config.json"]
    api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=names)
    return f" and on the Hub as the PEFT adapter {repo_id}"


def summarize(results: Mapping[str, Any], task: Any) -> str:
    """Return the metrics of the held-out part in one sentence, an accuracy with its 95 % interval."""
    count = len(task.test)
    what = f"on {count} held-out images"
    loss = f"loss {results['eval_loss']:.4f}"
    if "eval_accuracy" in results:
        accuracy = results["eval_accuracy"]
        low, high = wilson_interval(accuracy, count)
        ece = f", calibration error {results['eval_ece']:.2%}" if "eval_ece" in results else ""
        return f"accuracy {accuracy:.2%} {what} (95 % interval {low:.1%} to {high:.1%}), {loss}{ece}"
    others = {name[5:]: value for name, value in results.items() if name in ("eval_map", "eval_micro_f1", "eval_mae")}
    others |= {"R2": results["eval_r2"]} if "eval_r2" in results else {}
    return ", ".join([loss, *(f"{name} {value:.4f}" for name, value in others.items())]) + f" {what}"


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % interval of a share that was measured on `count` images.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def card_settings(
    model_args: Any, data_args: DataArguments, args: HfViTTrainingArguments, *, task: Any = None
) -> dict[str, Any]:
    """Return the settings that were in force, as plain values for the model card."""
    settings = effective_settings(model_args, data_args, args)
    settings.pop("model_name_or_path", None)
    found = {
        "fine-tuned from": _public_name(model_args.model_name_or_path),
        **settings,
        "dataset": _public_name(data_args.dataset),
    }
    if task is not None:
        config = task.model.config
        found["image_size"] = config.image_size if isinstance(config.image_size, int) else list(config.image_size)
        found["hidden_dropout_prob"] = config.hidden_dropout_prob
        found["images"] = task.split["images"]
        found["evaluated on"] = task.split["evaluated_on"]
    found["precision"] = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    found.pop("bf16", None), found.pop("fp16", None)
    return found | {"processes": args.world_size}


def _public_name(source: str) -> str:
    """Return a Hub id or an address as it is; of a local file or folder only its name."""
    return Path(source).resolve().name if Path(source).exists() else source


def _hub_id(name: str) -> str | None:
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def _card_results(dataset: str, results: Mapping[str, Any]) -> list[EvalResult]:
    names = {
        "eval_accuracy": ("accuracy", "top-1 accuracy"),
        "eval_top5_accuracy": ("accuracy", "top-5 accuracy"),
        "eval_map": ("mean_average_precision", "mean average precision"),
        "eval_mae": ("mae", "mean absolute error"),
    }
    split = results.get("split") or {}
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split.get("evaluated_on", "test"),
            metric_type=kind,
            metric_name=name,
            metric_value=round(results[key], 4),
        )
        for key, (kind, name) in names.items()
        if key in results
    ]
