"""What a hostile file may cost, and that nothing grows: memory and seconds, measured in a process of its own."""

import zipfile

import pytest
from measuring import depth, run_alone
from npz_files import npy_header
from odd_images import png
from tiny_models import HOSTILE


@pytest.mark.reliability(row="I04")
def test_a_pixel_bomb_costs_nothing_at_any_door(figure, tmp_path):
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png(12_000, 12_000, bytes(1501) * 12_000))
    (tmp_path / "sound.png").write_bytes(png(12, 12, bytes(3) * 12))
    code = """
    import PIL.Image
    from hf_vit import HfViTImageProcessor
    from hf_vit.data.images import read_image, read_pixels
    from hf_vit.data.datasets import decode_images

    warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # Pillow's own, before ours
    processor, bomb, sound = HfViTImageProcessor(), *sys.argv[1:]
    doors = {
        "read_image": read_image,
        "read_pixels": read_pixels,
        "processor": lambda path: processor(Path(path)),
        "processor, opened": lambda path: processor(PIL.Image.open(path)),
        "dataset": lambda path: decode_images({"image": [{"path": path, "bytes": None}]}),
    }
    costs = []
    for name, door in doors.items():
        door(sound)
        with Costs() as cost:
            try:
                door(bomb)
            except ValueError as error:
                assert "expected at most 89,478,485 pixels" in str(error)
            else:
                raise AssertionError(name)
        costs.append((cost.seconds, cost.megabytes))
    answer(costs)
    """
    seconds, megabytes = map(max, zip(*run_alone(code, bomb, tmp_path / "sound.png"), strict=True))
    assert megabytes < 50
    figure("seconds", seconds, at_most=0.1)
    figure("MB", megabytes, at_most=50)


@pytest.mark.reliability(row="W03")
def test_a_zip_bomb_and_a_lying_header_cost_nothing(figure, tmp_path):
    mebibytes = depth(256, 2048)
    with (
        zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("w.npy", "w", force_zip64=True) as member,
    ):
        member.write(npy_header("<f4", (mebibytes << 18,)))
        for _ in range(mebibytes):
            member.write(bytes(1 << 20))
    with zipfile.ZipFile(tmp_path / "liar.npz", "w") as archive:
        archive.writestr("w.npy", npy_header("<f4", (1 << 40,)) + bytes(64))
    code = """
    from hf_vit import HfViTModel
    from hf_vit.checkpoints import convert_jax_checkpoint
    from hf_vit.files.errors import CheckpointError
    from hf_vit.files.npz import open_arrays

    folder, costs = Path(sys.argv[1]), []
    (folder / "text.npz").write_text("no weights")
    for name in ("text.npz", "bomb.npz", "liar.npz"):
        for door in (open_arrays, HfViTModel.from_pretrained, lambda path: convert_jax_checkpoint(path, folder / "m")):
            with Costs() as cost:
                try:
                    door(folder / name)
                except CheckpointError:
                    pass
                else:
                    raise AssertionError(name)
            costs += [(cost.seconds, cost.megabytes)] * (name != "text.npz")  # the first pays for imports
    assert not (folder / "m").exists()
    answer(costs)
    """
    seconds, megabytes = map(max, zip(*run_alone(code, tmp_path), strict=True))
    assert megabytes < 64
    figure("seconds", seconds, at_most=1.0)
    figure("MB", megabytes, at_most=64)


@pytest.mark.reliability(row="W05")
@pytest.mark.parametrize("kind", ["own", "transformers"])
def test_a_hostile_configuration_costs_nothing(kind, figure, tmp_path):
    code = """
    from tiny_models import HOSTILE, TINY, randomised
    from transformers import ViTConfig, ViTForImageClassification
    from hf_vit import HfViTConfig, HfViTForImageClassification
    from hf_vit.files.errors import CheckpointError

    folder = Path(sys.argv[1])
    stock = KIND == "transformers"
    model = ViTForImageClassification(ViTConfig(**TINY)) if stock else HfViTForImageClassification(HfViTConfig(**TINY))
    randomised(model).save_pretrained(folder)
    HfViTForImageClassification.from_pretrained(folder)
    stored, costs = json.loads((folder / "config.json").read_text()), []
    large = [{"hidden_size": 16_384, "num_hidden_layers": 20, "intermediate_size": 65_536}]
    if not stock:  # of a stock ViT the table of positions tells the size
        large.append({"image_size": 8_000})
    for fields in HOSTILE + large:
        (folder / "config.json").write_text(json.dumps({**stored, **fields}))
        with Costs() as cost:
            try:
                HfViTForImageClassification.from_pretrained(folder)
            except CheckpointError:
                pass
            else:
                raise AssertionError(str(fields))
        costs.append((cost.seconds, cost.megabytes))
    answer(costs)
    """
    costs = run_alone(code, tmp_path, KIND=kind)
    assert len(costs) > len(HOSTILE)
    seconds, megabytes = map(max, zip(*costs, strict=True))
    assert megabytes < 50
    figure("seconds", seconds, at_most=1.0)
    figure("MB", megabytes, at_most=50)


@pytest.mark.slow
@pytest.mark.reliability(row="L05")
def test_memory_does_not_grow_with_forwards_loads_and_steps(figure, tmp_path):
    code = """
    import gc, logging, os, torch
    from training_runs import make_trainer
    from hf_vit import HfViTForImageClassification
    from transformers import TrainerCallback
    from transformers.utils import logging as library_logging

    library_logging.disable_progress_bar()
    logging.disable(logging.CRITICAL)
    stdout, sys.stdout = sys.stdout, open(os.devnull, "w")
    folder, grown = Path(sys.argv[1]), {}

    def growth(action, count):
        for _ in range(max(count // 10, 20)):
            action()
        gc.collect()
        before = megabytes("VmRSS")
        for _ in range(count):
            action()
        gc.collect()
        return megabytes("VmRSS") - before

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (STEPS // 5, STEPS):
                gc.collect()
                grown.setdefault("training", []).append(megabytes("VmRSS"))

    trainer = make_trainer(folder / "out", max_steps=STEPS, logging_steps=100_000)
    trainer.add_callback(Watch())
    trainer.train()
    model = trainer.model.eval()
    pixels = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        forwards = growth(lambda: model(pixels), FORWARDS)
    model.save_pretrained(folder / "model")
    loads = growth(lambda: HfViTForImageClassification.from_pretrained(folder / "model"), LOADS)
    sys.stdout = stdout
    answer([forwards, loads, grown["training"][1] - grown["training"][0]])
    """
    counts = {"FORWARDS": depth(300, 3800), "LOADS": depth(30, 180), "STEPS": depth(100, 1400)}
    for (what, count), megabytes in zip(counts.items(), run_alone(code, tmp_path, **counts), strict=True):
        assert megabytes < 20
        figure(f"MB in {count:,} {what.lower()}", max(megabytes, 0.0), at_most=5)
