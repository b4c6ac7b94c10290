"""Pushing to the Hub: a model card that states only what is known, and one commit with everything a user needs.

A pushed folder holds the weights, the configuration, the image processor, the card and the five source files of
`HUB_FILES`, so that it loads on a machine without this package (`trust_remote_code=True`).
"""

import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    EvalResultEntry,
    HfApi,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
    get_token,
    metadata_load,
    metadata_save,
)
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id, yaml_dump
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from yaml import YAMLError

from hf_vit.checkpoints.processors import processor_of
from hf_vit.configuration_hf_vit import AUTO_MAP, HfViTConfig
from hf_vit.files.atomic import atomic_file
from hf_vit.files.output import mark
from hf_vit.image_processing_hf_vit import AUTO_MAP as PROCESSOR_AUTO_MAP
from hf_vit.image_processing_hf_vit import HfViTImageProcessor
from hf_vit.modeling_hf_vit import HfViTModel


logger = logging.getLogger(__name__)

# The modules of the model and its image processor, and every file that they import relatively.
_MODULES = [str(sys.modules[cls.__module__].__file__) for cls in (HfViTModel, HfViTImageProcessor)]
HUB_FILES = tuple(sorted({Path(each).name for path in _MODULES for each in (path, *get_relative_import_files(path))}))

_TAGS = ("vision-transformer", "hf_vit")
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
# What an earlier push may have left and `from_pretrained` would prefer, or mix, with the new weights.
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
# Words in the address of a source file -> the papers that its checkpoints come from (keys of the template).
_PAPERS = {
    "augreg": "augreg",
    "vit_models/sam": "sam",
    "gsam": "gsam",
    "big_vision": "big_vision",
    "vit_s16": "big_vision",
}

# the card


def write_model_card(
    folder: str | os.PathLike[str],
    *,
    repo_id: str | None = None,
    license: str | None = None,
    base_model: str | list[str] | None = None,
    datasets: str | list[str] | None = None,
    tags: Sequence[str] = (),
    source: str | None = None,
    source_sha256: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    results: Sequence[EvalResult] = (),
    limits: Sequence[str] = (),
) -> Path:
    """Write `README.md` for a saved model, and `.eval_results/` where results were measured on data sets of the Hub.

    The configuration, the image processor, the weights' headers and the certificate `parity.json` (`source`, `sha256`,
    `tensors`, `differences` by name, `bound`, `passed`) in the folder say the rest. What nobody has given is left out
    of the card, never guessed.

    Args:
        folder: holds `config.json` and the weights, as `save_pretrained` leaves them.
        repo_id: the repository it is meant for; the folder's name otherwise.
        license: of the weights, by its name on the Hub, such as `"apache-2.0"`.
        base_model: the Hub id of what was fine-tuned.
        datasets: Hub ids of the data trained on.
        tags: more tags.
        source: file name or address of the original checkpoint; `parity.json` says it, too.
        source_sha256: its digest.
        recipe: how it was trained, as name and value.
        results: what was measured; the first of each data set and configuration is its headline figure.
        limits: sentences on what the model should not be used for.
    Returns:
        The path of `README.md`.
    Raises:
        ValueError: if the folder holds no saved hf_vit model.
    """
    folder = Path(folder)
    config, parity = _config_of(folder), _json(folder / "parity.json")
    name = (repo_id or folder.resolve().name).split("/")[-1]
    assert config.architectures
    head = config.architectures[0]
    classifies = head == "HfViTForImageClassification"
    source, source_sha256 = source or parity.get("source"), source_sha256 or parity.get("sha256")
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag=_pipeline_tag(config),
        base_model=base_model,
        datasets=datasets,
        tags=[*_TAGS, *tags],
        model_name=name if results else None,
        eval_results=list(results) or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("model_card_template.md")),
        name=name,
        location=repo_id or folder.resolve().name,
        head=head,
        auto_class=next(auto for auto, path in AUTO_MAP.items() if str(path).endswith(f".{head}")),
        classifies=classifies,
        has_code=_sends_code(folder),
        config=config,
        parameters=_parameters(folder),
        processor=_json(folder / "preprocessor_config.json"),
        source=source,
        source_sha256=source_sha256,
        parity=parity,
        recipe=dict(recipe or {}),
        results=results,
        limits=limits,
        papers=_papers(source or "", head),
        pixels=_pixels,
    )
    _write_eval_results(folder, results)
    _write(folder / "README.md", mark(str(card)))
    return folder / "README.md"


def write_stock_card(
    folder: Path, *, name: str, license: str | None, source: str, pixels: float | None = None
) -> None:
    """Write the card of a folder that transformers' own ViT opens; what is not known is left out.

    Args:
        source: File name or address of the original checkpoint.
        pixels: Largest difference of the stock image processor's pixels from those of the model's protocol.
    """
    parity = _json(folder / "parity.json")
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["vision-transformer"],
    )
    lines = [
        *("---", data.to_yaml(), "---", "", f"# {name}", ""),
        f"Converted from `{source}` for transformers' `ViTForImageClassification`. It needs no other code.",
        *("", "```python", "from transformers import pipeline", ""),
        *(f'pipeline("image-classification", model="{name}")("image.jpg")', "```"),
    ]
    if parity:
        difference = f"{parity['differences']['logits']:.1e}"
        lines += ["", f"Checkpoint sha256: `{parity['sha256']}`. Largest difference of this model's logits in "]
        lines[-1] += f"transformers from an independent computation: {difference}."
    if pixels:
        lines += [
            "",
            "Limits: transformers resizes images in its own way. Its pixels, from -1 to 1, differ by ",
        ]
        lines[-1] += f"up to {pixels:.2g} from those that the model was trained on, measured on an image of noise."
    _write(folder / "README.md", mark("\n".join(lines) + "\n"))


def _pipeline_tag(config: HfViTConfig) -> str:
    classifies = config.architectures == ["HfViTForImageClassification"]
    return "image-classification" if classifies else "image-feature-extraction"


def _write_eval_results(folder: Path, results: Sequence[EvalResult]) -> None:
    """Write the headline figure of each Hub data set (an id with an owner) as `.eval_results/OWNER-NAME.yaml`."""
    headlines: dict[tuple[str, str], EvalResult] = {}
    for result in results:
        if "/" in result.dataset_type:
            headlines.setdefault((result.dataset_type, result.dataset_config or "default"), result)
    by_dataset: dict[str, list[EvalResultEntry]] = {}
    for (dataset, task), result in headlines.items():
        said = [result.metric_name or result.metric_type, result.dataset_split and f"split {result.dataset_split}"]
        entry = EvalResultEntry(
            dataset_id=dataset,
            task_id=task,
            value=result.metric_value,
            dataset_revision=result.dataset_revision,
            source_url=result.source_url,
            source_name=result.source_name,
            notes=", ".join(filter(None, said)),
        )
        by_dataset.setdefault(dataset, []).append(entry)
    for dataset, entries in by_dataset.items():
        path = folder / ".eval_results" / f"{dataset.replace('/', '-')}.yaml"
        path.parent.mkdir(exist_ok=True)
        _write(path, yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False))


def _papers(source: str, head: str) -> list[str]:
    """Return which papers to cite: the model's own, the source's, the pre-training's."""
    papers = ["vit", *(paper for word, paper in _PAPERS.items() if word in source)]
    return papers + (["simmim"] if head == "HfViTForMaskedImageModeling" else [])


def _parameters(folder: Path) -> int:
    """Return the number of parameters, from the headers of the weight files."""
    count = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a mapping)
                size = 1
                for length in weights.get_slice(name).get_shape():
                    size *= length
                count += size
    return count


def _config_of(folder: Path) -> HfViTConfig:
    fields = _json(folder / "config.json")
    if fields.get("model_type") != "hf_vit" or not fields.get("architectures"):
        raise ValueError(
            f"{folder}: expected a config.json with model_type hf_vit and architectures, got "
            f"{fields.get('model_type', 'none')}: load the model with from_pretrained and save_pretrained it there"
        )
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: expected weights (*.safetensors), got none: save the model there")
    return HfViTConfig.from_pretrained(folder)


def _pixels(size: Any) -> str:
    """Return a size as a card says it: `224x224`, `16x16`, `256 on the shorter side`."""
    if isinstance(size, Mapping):
        if "shortest_edge" in size:
            return f"{size['shortest_edge']} on the shorter side"
        size = (size["height"], size["width"])
    height, width = (size, size) if isinstance(size, int) else size
    return f"{height}x{width}"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# the push


def push(
    model: PreTrainedModel | str | os.PathLike[str],
    repo_id: str,
    *,
    processor: Any = None,
    include_code: bool = True,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    dry_run: bool = False,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    max_shard_size: int | str = "5GB",
    tags: str | Sequence[str] | None = None,
) -> CommitInfo | Path:
    """Push a model with its image processor, code and card in one commit; running it again sends only what changed.

    A folder is completed in place and then is what is pushed, but for training's leftovers (checkpoints, pickles).
    The text of a card that is in the folder, or of a model's repository, stays; its metadata are made to fit.
    Weight files of an earlier push that the new ones do not overwrite are deleted in the same commit.

    Args:
        model: a model, or a folder where one is saved.
        repo_id: `"owner/name"`, or `"name"` for the token's own account; created where it does not exist.
        processor: the image processor; that of the checkpoint which the model came from otherwise.
        include_code: whether the repository loads without this package.
        revision: branch to push to, created where it does not exist.
        private: whether a new repository is private.
        dry_run: only write the folder: the given one, or for a model a new one with the repository's name.
    Returns:
        The commit; with `dry_run` the folder.
    Raises:
        LocalTokenNotFoundError: if there is no token.
        ValueError: if a folder holds no saved hf_vit model, or `repo_id` is no name of a repository.
        FileExistsError: if `dry_run` would write a model into a folder that is not empty.
    """
    validate_repo_id(repo_id)
    given = None if isinstance(model, PreTrainedModel) else Path(model)
    tags = [tags] if isinstance(tags, str) else tags or ()
    with tempfile.TemporaryDirectory() as temporary:
        if not dry_run:
            token = _token(token)
            folder = given or Path(temporary) / repo_id.split("/")[-1]
        else:
            folder = given or Path(repo_id.split("/")[-1])
            if given is None and folder.is_dir() and any(folder.iterdir()):
                raise FileExistsError(f"{folder} is not empty: the dry run writes the model there; move it away")
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            processor = processor or processor_of(model.name_or_path or "", model.config)
        _complete(folder, repo_id, processor=processor, include_code=include_code, tags=tags)
        if dry_run:
            return folder
        api = HfApi(library_name="hf_vit", token=token)
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            remote = set(api.list_repo_files(repo_id, revision=revision))
            if given is None and "README.md" in remote:  # somebody's words, perhaps
                card = api.hf_hub_download(repo_id, "README.md", revision=revision)
                shutil.copyfile(card, folder / "README.md")
                _complete_metadata(folder, tags)
            return api.create_commit(
                repo_id,
                _operations(folder, remote),
                commit_message=commit_message or "Upload model, image processor, code and card",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403):
                error.append_to_message(f"\nThe token may not write to {repo_id}: {_HOW_TO_LOG_IN}")
            raise


_HOW_TO_LOG_IN = (
    "make a token with write access at https://huggingface.co/settings/tokens, then run `hf auth login`, set HF_TOKEN "
    "or pass token=...; dry_run=True writes the folder without one"
)


def _token(token: str | bool | None) -> str:
    known = token if isinstance(token, str) else None if token is False else get_token()
    if not known:
        raise LocalTokenNotFoundError(f"no token for the Hub: {_HOW_TO_LOG_IN}")
    return known


def _complete(folder: Path, repo_id: str, *, processor: Any, include_code: bool, tags: Sequence[str]) -> None:
    """Add to a saved model what a repository has besides; the text of an existing card stays."""
    _config_of(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    for name in HUB_FILES:
        if include_code:
            shutil.copyfile(Path(__file__).parents[1] / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    _set_auto_map(folder / "config.json", AUTO_MAP if include_code else None)
    _set_auto_map(folder / "preprocessor_config.json", PROCESSOR_AUTO_MAP if include_code else None)
    if (folder / "README.md").exists():
        _complete_metadata(folder, tags)
    else:
        write_model_card(folder, repo_id=repo_id, tags=tags)


def _complete_metadata(folder: Path, tags: Sequence[str]) -> None:
    """Add to an existing card the metadata by which the Hub opens the model; its text stays."""
    path = folder / "README.md"
    try:
        known = metadata_load(path) or {}
    except (ValueError, YAMLError) as error:
        raise ValueError(f"{path}: its metadata are no YAML between two lines of ---: {error}") from error
    old = known.get("tags") or []
    old = [old] if isinstance(old, str) else list(old)
    new = {"library_name": "transformers", "pipeline_tag": _pipeline_tag(_config_of(folder))}
    new["tags"] = [*old, *(tag for tag in (*_TAGS, *tags) if tag not in old)]
    if known != known | new:
        with atomic_file(path) as temporary:
            shutil.copyfile(path, temporary)
            metadata_save(temporary, known | new)


def _set_auto_map(path: Path, auto_map: dict[str, Any] | None) -> None:
    if path.is_file():
        fields = {name: value for name, value in _json(path).items() if name != "auto_map"}
        fields |= {"auto_map": auto_map} if auto_map else {}
        _write(path, json.dumps(fields, indent=2, sort_keys=True) + "\n")


def _sends_code(folder: Path) -> bool:
    return "auto_map" in _json(folder / "config.json") and all((folder / name).is_file() for name in HUB_FILES)


def _operations(folder: Path, remote: set[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Return the operations of the commit: the files of the folder, and deletions of replaced weights and code."""
    code = set(HUB_FILES) if _sends_code(folder) else set()
    names = {
        path.relative_to(folder).as_posix()
        for path in [*folder.glob("*"), *folder.glob(".eval_results/*.yaml")]
        if path.is_file() and (not path.name.startswith(".") or path.parent != folder)
    }
    names = {
        name for name in names if Path(name).suffix not in _PICKLES and (Path(name).suffix != ".py" or name in code)
    }
    replaced = {name for name in remote if _WEIGHTS.fullmatch(name) or name in HUB_FILES} - names
    return [CommitOperationAdd(name, folder / name) for name in sorted(names)] + [
        CommitOperationDelete(name) for name in sorted(replaced)
    ]
