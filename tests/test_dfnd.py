"""DFND: the trainer, its optimizers, the data of selected images, the wild pool and the plot."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("lightning")
import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny_runs import IMAGES, Small, data_of, fit, loader_of

from kdkernels.cli import main
from kdkernels.data import Augment, ClutterDigits, FromDatasets, SampleIndex, SegmentedClutterDigits, SelectedImages, WildDigits, select_samples
from kdkernels.distill import DFND, DML, KD, Supervised, TeacherCache
from kdkernels.distill.engine import checkpoints
from kdkernels.distill.optimization import JointOptimizer
from kdkernels.distill.restore import restore
from kdkernels.models import TinyCNN
from kdkernels.plots.dfnd import plot_dfnd
from kdkernels.tasks import Segmentation

UNLABELLED = [image for image, _ in IMAGES]
POOL = [(255 * torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(100 + i))).to(torch.uint8) for i in range(30)]


def _teacher():
    torch.manual_seed(7)
    return Small(6)


def _dfnd(**options):
    torch.manual_seed(0)
    return DFND(Small(), _teacher(), **options)


def _matrix(weight, diagonal):
    """Return Q element by element."""
    classes = len(weight)
    matrix = torch.zeros(classes, classes, dtype=torch.float64)
    for i in range(classes):
        others = [j for j in range(classes) if j != i]
        matrix[i, others] = (1 - diagonal[i]) * weight[i].double().softmax(0)
        matrix[i, i] = diagonal[i]
    return matrix


# The loss and the optimizers.


@pytest.mark.parametrize("diagonal", [0.9, [0.9, 0.5, 1.0], None])
def test_loss_is_that_of_the_paper(diagonal):
    method = _dfnd(diagonal=diagonal, temperature=3.0, alpha=0.5, num_classes=3).double().eval()
    image = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    logits, losses = method.losses({"image": image})
    target = method.teacher(image)
    values = [1.0] * 3 if diagonal is None else [0.9] * 3 if diagonal == 0.9 else diagonal
    if method.noise is not None:
        method.noise.weight.data.uniform_(-1, 1)
        logits, losses = method.losses({"image": image})
    matrix = _matrix(torch.zeros(3, 2) if method.noise is None else method.noise.weight.data, values)
    noisy = (logits.softmax(1) @ matrix).log()
    assert losses["noisy_cross_entropy"].item() == pytest.approx(F.nll_loss(noisy, target.argmax(1)).item(), rel=1e-9, abs=0)
    want = 0.5 * 9 * F.kl_div((logits / 3).log_softmax(1), (target / 3).log_softmax(1), log_target=True, reduction="batchmean")
    assert losses["kl"].item() == pytest.approx(want.item(), rel=1e-9, abs=0)


def test_student_and_matrix_have_their_own_optimizers():
    """Two steps of Lightning equal those of an SGD and an Adam that are written out here."""
    method = _dfnd(diagonal=0.8, optimizer=lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.01), num_classes=3)
    reference = _dfnd(diagonal=0.8, num_classes=3)
    method.make_scheduler = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    trainer = fit(method, data_of(UNLABELLED, batch_size=12), max_epochs=2, num_sanity_val_steps=0)
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, JointOptimizer)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.005, 1e-3], rel=1e-9, abs=0)
    velocity = [torch.zeros_like(p) for p in reference.student.parameters()]
    mean, square = torch.zeros(3, 2), torch.zeros(3, 2)
    for step in (1, 2):
        reference.train()
        reference.zero_grad()
        sum(reference.losses({"image": torch.stack(UNLABELLED)})[1].values()).backward()
        with torch.no_grad():
            for p, v in zip(reference.student.parameters(), velocity, strict=True):
                v.mul_(0.9).add_(p.grad + 0.01 * p)
                p -= 0.5 * 0.1 ** (step - 1) * v
            weight = reference.noise.weight
            mean = 0.9 * mean + 0.1 * weight.grad
            square = 0.999 * square + 0.001 * weight.grad**2
            weight -= 1e-3 * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(method.state_dict()[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(method.noise.matrix().diagonal(), torch.full((3,), 0.8))
    assert method.noise.weight.detach().abs().max() > 1e-3


SCHEDULES = {
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, "max", patience=0),
    "CosineAnnealingWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_schedules_do_not_change_the_optimizer_of_the_matrix(name, optimizer):
    options = {"lr": 0.1, "momentum": 0.9} if optimizer is torch.optim.SGD else {"lr": 0.1}
    method = _dfnd(optimizer=lambda p: optimizer(p, **options), scheduler=SCHEDULES[name])
    seen = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            groups = trainer.optimizers[0].param_groups
            seen.append((groups[-1]["lr"], groups[-1]["betas"], groups[0]["lr"]))

    fit(method, data_of(UNLABELLED), max_epochs=3, callbacks=[Watch()])
    assert {(lr, betas) for lr, betas, _ in seen} == {(1e-3, (0.9, 0.999))}
    assert len({lr for *_, lr in seen}) > 1


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"fast_dev_run": True},
        {"overfit_batches": 1},
    ],
    ids=str,
)
def test_flags_of_lightning(options):
    method = _dfnd(diagonal=[0.9, 0.8, 1.0])
    fit(method, data_of(UNLABELLED), **options)
    matrix = method.noise.matrix()
    assert matrix.isfinite().all()
    torch.testing.assert_close(matrix.detach().diagonal().double(), torch.tensor([0.9, 0.8, 1.0], dtype=torch.float64), rtol=1e-6, atol=0)
    assert method.noise.weight.detach()[:2].abs().max() > 0  # trained; the third row has no errors to distribute


def test_lbfgs_trains_the_student():
    method = _dfnd(optimizer=lambda p: torch.optim.LBFGS(p, lr=0.1), scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0))
    fit(method, data_of(UNLABELLED))
    assert method.noise.weight.detach().abs().max() > 0


def test_labels_of_training_images_are_not_used():
    states = []
    for data in (data_of(), data_of(UNLABELLED), data_of([(image, (label + 1) % 3) for image, label in IMAGES])):
        method = _dfnd()
        fit(method, data)
        states.append(method.state_dict())
    for state in states[1:]:
        assert all(torch.equal(value, state[name]) for name, value in states[0].items() if "metrics" not in name)


def test_resumed_run_needs_the_same_optimizer(tmp_path):
    def run(optimizer, **options):
        method = _dfnd(optimizer=optimizer, scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0))
        trainer = L.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=checkpoints(tmp_path))
        trainer.fit(method, data_of(UNLABELLED), **options)

    run(lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.raises(ValueError, match="trained with SGD with Adam and ConstantLR, and cannot be resumed with AdamW with Adam"):
        run(torch.optim.AdamW, ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": None}, "DFND needs a teacher"),
        ({"teacher": [Small(), Small()]}, "DFND"),
        ({"diagonal": 1.5}, r"diagonal must lie in \[0, 1\], got 1\.5"),
        ({"diagonal": [0.5, math.nan]}, "diagonal must lie in"),
        ({"diagonal": []}, "diagonal must lie in"),
        ({"diagonal": [0.5]}, "one for each of at least two classes"),
        ({"diagonal": "0.5"}, "diagonal must be a number, a list of numbers, or None, got '0.5'"),
        ({"diagonal": True}, "diagonal must be a number"),
        ({"diagonal": [0.5, 0.5], "num_classes": 3}, r"one for each of the 3 classes, got the shape \(2,\)"),
        ({"num_classes": 1}, "num_classes must be an integer >= 2, got 1"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"alpha": -1.0}, "alpha, the weight"),
        ({"matrix_lr": 0.0}, "matrix_lr must be"),
        ({"task": Segmentation()}, "DFND needs the task Classification, got Segmentation"),
    ],
)
def test_invalid_options_raise(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        DFND(Small(), options.pop("teacher", Small()), **options)


def test_number_of_classes_is_checked_before_training():
    with pytest.raises(ValueError, match=r"diagonal gives 4 classes, but the teacher \(Small\) has 3"):
        fit(_dfnd(diagonal=[0.9] * 4), data_of(UNLABELLED))
    images = torch.stack(UNLABELLED)
    loaders = (loader_of(images, torch.zeros(12).long()),) * 2
    method, trainer = _dfnd(), L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match="DFND needs num_classes"):
        trainer.fit(method, *loaders)
    trainer.fit(_dfnd(num_classes=3), *loaders)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_of_the_optimizer_step_alike(copier):
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    optimizer = JointOptimizer(torch.optim.SGD(parameters[:1], lr=0.1, momentum=0.9), torch.optim.Adam(parameters[1:], lr=0.01))

    def step(o):
        for p in (p for group in o.param_groups for p in group["params"]):
            p.grad = p.detach() * 2
        o.step()
        return [p.detach().clone() for group in o.param_groups for p in group["params"]]

    step(optimizer)
    copied = copier(optimizer)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(step(optimizer), step(copied), strict=True))
    loaded = JointOptimizer(torch.optim.SGD(parameters[:1], lr=1.0, momentum=0.9), torch.optim.Adam(parameters[1:], lr=1.0))
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert loaded.scheduled.state is loaded.constant.state is loaded.state
    assert loaded.scheduled.param_groups[0] is loaded.param_groups[0]


def test_weight_averaging():
    """The callback copies the method before training; the modules must exist then."""
    data = ClutterDigits(train_size=8, val_size=8, test_size=8, batch_size=4)
    method = DFND(TinyCNN(4), TinyCNN(6))
    fit(method, data, callbacks=[EMAWeightAveraging()])
    assert method.noise.weight.isfinite().all()
    with pytest.raises(ValueError, match=r"EMAWeightAveraging copies the method before .*: give image_shape to DML"):
        fit(DML(Small(), [Small()]), FromDatasets(IMAGES, IMAGES, num_classes=3, batch_size=4), callbacks=[EMAWeightAveraging()])
    fit(DML(Small(), [Small()], image_shape=[3, 8, 8]), data_of(), callbacks=[EMAWeightAveraging()])


@pytest.mark.parametrize("make", [lambda: _dfnd(), lambda: DML(Small(), [Small()])], ids=["DFND", "DML"])
def test_fsdp_resumes(make, tmp_path):
    def run(epochs, **options):
        strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False)
        flags = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = L.Trainer(max_epochs=epochs, strategy=strategy, **flags)
        trainer.fit(make(), data_of(), **options)
        trainer.save_checkpoint(tmp_path / "f.ckpt")
        return trainer

    try:
        run(1)
        assert run(2, ckpt_path=tmp_path / "f.ckpt").global_step == 6
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_checkpoints_of_other_options_raise(tmp_path):
    def save(method):
        trainer = fit(method, data_of())
        trainer.save_checkpoint(tmp_path / "a.ckpt")

    def resume(method):
        L.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False).fit(
            method, data_of(), ckpt_path=tmp_path / "a.ckpt"
        )

    save(_dfnd())
    with pytest.raises(ValueError, match="the checkpoint has a noise adaptation matrix, but this method has diagonal=None"):
        resume(_dfnd(diagonal=None))
    save(KD(Small(), _teacher()))
    with pytest.raises(ValueError, match="the checkpoint has no noise adaptation matrix"):
        resume(_dfnd())


# The data of selected images.


def _original(**options):
    return FromDatasets(IMAGES, IMAGES, num_classes=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), batch_size=4, **options)


def test_training_images_are_the_selected_ones(tmp_path):
    index = select_samples(_teacher(), POOL, 9, tmp_path / "i.pt", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    for memory in (2.0, 0.0):
        data = SelectedImages(POOL, _original(), tmp_path / "i.pt", batch_size=9, max_memory=memory)
        data.setup()
        (batch,) = data.train_dataloader()
        assert "label" not in batch
        want = torch.stack([POOL[index.indices[i]] for i in batch["index"].tolist()])
        assert torch.equal(batch["image"], want)
        finished = data.finish(batch)["image"]
        normalized = (want.double() / 255 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
        torch.testing.assert_close(finished.double(), normalized, rtol=1e-5, atol=1e-5)
        validation = next(iter(data.val_dataloader()))
        assert torch.equal(validation["label"], torch.tensor([label for _, label in IMAGES[:9]]))
        assert (data.num_classes, data.image_shape, data.preprocessing()["mean"]) == (3, (3, 8, 8), [0.4, 0.5, 0.6])
        assert data.fingerprint() != data.fingerprint("val")


def test_without_index_all_images_are_used_and_labels_dropped():
    data = SelectedImages([(image, 0) for image in POOL], _original(), batch_size=30)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch.keys() == {"image", "index", "view", "share"}
    assert sorted(batch["index"].tolist()) == list(range(30))


def test_images_are_resized_to_those_of_the_data():
    large = [torch.full((3, 20, 30), 7 * i, dtype=torch.uint8) for i in range(4)]
    data = SelectedImages(large, _original(), batch_size=4)
    data.setup()
    (batch,) = data.train_dataloader()
    assert batch["image"].shape == (4, 3, 8, 8)
    assert sorted(batch["image"].flatten(1).float().mean(1).tolist()) == [0, 7, 14, 21]


def test_index_with_another_preprocessing_raises(tmp_path):
    """Also if the data are not normalised, or the pool was not resized."""
    normalization = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    select_samples(_teacher(), POOL, 5, tmp_path / "normalized.pt", **normalization)
    plain = FromDatasets(IMAGES, IMAGES, num_classes=3)
    with pytest.raises(ValueError, match=r"made with another mean \(\[0\.4, 0\.5, 0\.6\]\) than that of data \(None\)"):
        SelectedImages(POOL, plain, tmp_path / "normalized.pt").setup()
    large = [torch.full((3, 12, 12), 9 * i, dtype=torch.uint8) for i in range(9)]
    select_samples(_teacher(), large, 5, tmp_path / "large.pt")
    with pytest.raises(ValueError, match=r"made with images of size \[12, 12\], but those of data have \[8, 8\]"):
        SelectedImages(large, plain, tmp_path / "large.pt").setup()


def test_pool_of_two_dtypes_raises():
    mixed = [*(POOL * 9)[:256], *[image.float() / 255 for image in POOL]]  # the first chunk has one dtype
    with pytest.raises(ValueError, match="must have one dtype and one shape"):
        SelectedImages(mixed, _original()).setup()


def test_selection_is_made_when_training_begins(tmp_path):
    method = _dfnd()
    data = SelectedImages(POOL, _original(), tmp_path / "runs" / "i.pt", count=9, batch_size=3)
    fit(method, data)
    index = SampleIndex.load(tmp_path / "runs" / "i.pt")
    again = select_samples(_teacher(), POOL, 9, tmp_path / "j.pt", size=8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    assert torch.equal(index.indices, again.indices)
    assert index.provenance == again.provenance
    fit(_dfnd(), SelectedImages(POOL, _original(), tmp_path / "runs" / "i.pt", count=9, batch_size=3))  # uses the file


def test_wrong_data_raise(tmp_path):
    path = tmp_path / "i.pt"
    normalization = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    select_samples(_teacher(), POOL, 9, path, **normalization)
    select_samples(_teacher(), POOL, 9, tmp_path / "other_mean.pt")
    select_samples(_teacher(), POOL, 9, tmp_path / "other_size.pt", size=7, **normalization)
    torch.manual_seed(1)
    cases = (
        (lambda: fit(DFND(Small(), Small(6)), SelectedImages(POOL, _original(), path, batch_size=3)), "another teacher"),
        (lambda: SelectedImages(POOL[::-1], _original(), path).setup(), "another pool: the images 0 to 29 differ"),
        (lambda: SelectedImages(POOL[:20], _original(), path).setup(), "another pool"),
        (lambda: SelectedImages(POOL, _original(), path, count=8).setup(), r"another count \(count 9, now 8\)"),
        (lambda: SelectedImages(POOL, _original(), tmp_path / "none.pt").setup(), r"index: there is no file .*none\.pt': make it with"),
        (lambda: SelectedImages(POOL, _original(), tmp_path / "none.pt", count=5).setup(), "index: there is no file"),
        (lambda: SelectedImages(POOL, _original(), tmp_path / "other_mean.pt").setup(), r"other_mean\.pt' was made with another mean"),
        (lambda: SelectedImages(POOL, _original(), tmp_path / "other_size.pt").setup(), r"made with images of size \[7, 7\]"),
        (lambda: SelectedImages(POOL, _original(), tmp_path / "k.pt", count=31), "at most the number of images of the pool, 30"),
        (lambda: SelectedImages(POOL, _original(), tmp_path / "k.pt", count=0), "count must be at least 1"),
        (lambda: SelectedImages(POOL, _original(), select_batch_size=0), "select_batch_size must be at least 1"),
        (lambda: SelectedImages(POOL, _original(), max_memory="3"), "max_memory must be a number >= 0"),
        (lambda: SelectedImages(POOL, _original(), count=5), "count needs index"),
        (lambda: SelectedImages([], _original()), "pool must not be empty"),
        (lambda: SelectedImages(iter(POOL), _original()), "pool must be a map-style dataset"),
        (lambda: SelectedImages(POOL, POOL), "data must be a data module"),
        (lambda: SelectedImages([image[:1] for image in POOL], _original()).setup(), "must have 3 channels, as those of data, got 1"),
        (lambda: SelectedImages(WildDigits(5), SegmentedClutterDigits(5, 5, 5)).setup(), "SegmentedClutterDigits has label maps"),
    )
    for call, message in cases:
        with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
            call()
    assert {p.name for p in tmp_path.iterdir()} == {"i.pt", "other_mean.pt", "other_size.pt"}


@pytest.mark.parametrize(
    ("make", "data", "message"),
    [
        (lambda: DFND(Small(), Small(6), diagonal=[0.9, 0.8]), {}, "diagonal gives 2 classes, but the teacher"),
        (lambda: DFND(Small(), TinyCNN(4, num_classes=5)), {}, r"the data have 3 classes, but the teacher \(TinyCNN\) has 5"),
        (lambda: DFND(TinyCNN(4, num_classes=5), Small()), {}, "the data have 3 classes, but the student"),
        (lambda: DFND(Small(), Small()), {"num_classes": None}, "DFND needs num_classes"),
    ],
)
def test_networks_are_checked_before_the_selection(make, data, message, tmp_path):
    selected = SelectedImages(POOL, FromDatasets(IMAGES, IMAGES, **{"num_classes": 3} | data), tmp_path / "i.pt", count=5)
    with pytest.raises(ValueError, match=message):
        fit(make(), selected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_second_run_in_one_process_uses_the_index(precision, tmp_path):
    """Lightning casts the teacher in place."""
    teacher = _teacher()
    for _ in range(2):
        fit(DFND(Small(), teacher), SelectedImages(POOL, _original(), tmp_path / "i.pt", count=9, batch_size=3), precision=precision)


def test_the_original_training_images_are_not_needed():
    data = SelectedImages(POOL, FromDatasets(None, IMAGES, num_classes=3), batch_size=10)
    fit(_dfnd(), data)
    assert data.image_shape == (3, 8, 8)
    with pytest.raises(ValueError, match="FromDatasets has no split 'train'"):
        fit(_dfnd(), FromDatasets(None, IMAGES, num_classes=3))


def test_teacher_cache_of_selected_images(tmp_path):
    data = SelectedImages(POOL, _original(), tmp_path / "i.pt", count=9, batch_size=3)
    fit(_dfnd(teacher_cache=TeacherCache(tmp_path / "cache")), data, max_epochs=2)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_other_methods_train_on_selected_images():
    method = KD(Small(), _teacher())
    fit(method, SelectedImages(POOL, _original(), batch_size=10, augment=Augment(crop=1, flip=True)))
    with pytest.raises(ValueError, match="Supervised trains on labels alone"):
        fit(Supervised(Small()), SelectedImages(POOL, _original()))


# The wild pool.


def test_wild_images_depend_on_seed_and_position_only():
    pool = WildDigits(200, seed=3)
    images = pool.__getitems__(list(range(200)))
    assert all(torch.equal(pool[i], images[i]) for i in (0, 5, 199, -1))
    assert all(image.shape == (3, 32, 32) and image.dtype == torch.uint8 for image in images)
    assert torch.equal(WildDigits(1000, seed=3)[17], images[17])
    assert not torch.equal(WildDigits(200, seed=4)[17], images[17])
    for index in (200, -201):
        with pytest.raises(IndexError, match=f"the pool has 200 images, got the index {index}"):
            pool[index]
    assert len(list(WildDigits(3))) == 3


def test_wild_pool_has_the_stated_kinds():
    pool = WildDigits(4000)
    index = torch.arange(4000)
    kinds, labels = pool.kinds(index), pool.true_labels(index)
    shares = {"digit": 0.3, "part of a digit": 0.15, "two digits": 0.15, "scrambled digit": 0.1, "shape": 0.15, "photograph": 0.15}
    for name, share in shares.items():
        assert abs(kinds.count(name) / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)
    has_digit = torch.tensor([kind in ("digit", "part of a digit") for kind in kinds])
    assert torch.equal(labels >= 0, has_digit)
    assert labels[has_digit].bincount(minlength=10).min() > 100


def test_true_labels_are_those_of_the_digits():
    """A weak classifier of ClutterDigits recognises more of the whole digits than by chance."""
    torch.manual_seed(0)
    data = ClutterDigits(train_size=2000, val_size=100, test_size=100)
    method = Supervised(TinyCNN(16))
    fit(method, data, max_epochs=4)
    pool = WildDigits(600)
    index = torch.arange(600)
    whole = torch.tensor([kind == "digit" for kind in pool.kinds(index)])
    with torch.no_grad():
        predicted = method.eval()(data.normalize(torch.stack(pool.__getitems__(index.tolist())))).argmax(1)
    assert (predicted == pool.true_labels(index))[whole].float().mean() > 0.2  # by chance, 0.1 with a standard deviation of 0.022


# The command line and the plot.

CONFIG = """
model:
  class_path: kdkernels.distill.DFND
  init_args:
    student: {class_path: kdkernels.models.TinyCNN, init_args: {width: 4}}
    teacher: {class_path: kdkernels.models.TinyCNN, init_args: {width: 4}}
    diagonal: DIAGONAL
data:
  class_path: kdkernels.data.SelectedImages
  init_args:
    pool: {class_path: kdkernels.data.WildDigits, init_args: {count: 60}}
    data: {class_path: kdkernels.data.ClutterDigits, init_args: {train_size: 8, val_size: 20, test_size: 8}}
    index: runs/index.pt
    count: 20
    batch_size: 10
trainer: {max_epochs: 1, accelerator: cpu, enable_progress_bar: false, default_root_dir: runs}
"""


@pytest.mark.parametrize("diagonal", ["0.9", "[0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 0.0, 0.5, 0.5, 0.5]", "null"])
def test_fit_restore_and_plot(diagonal, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(CONFIG.replace("DIAGONAL", diagonal))
    assert main(["fit", "--config=c.yaml"]) == 0
    assert main(["fit", "--config=c.yaml", "--ckpt_path=last", "--trainer.max_epochs=2"]) == 0
    assert main(["test", "--config=c.yaml", "--ckpt_path=last"]) == 0
    method, data = restore("runs/last.ckpt")
    stored = torch.load("runs/last.ckpt", weights_only=True)["state_dict"]
    if diagonal == "null":
        assert method.noise is None
    else:
        assert torch.equal(method.noise.weight, stored["noise.weight"])
        assert stored["noise.weight"].abs().max() > 0
    assert "train" not in data.splits  # images are selected for training only
    capsys.readouterr()
    assert main(["plot", "dfnd", "--ckpt=runs/last.ckpt", "--out=dfnd.png", "--images=7"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "dfnd.png"
    assert (tmp_path / "dfnd.png").stat().st_size > 10_000
    shares = torch.tensor([[float(x) for x in line.split()[1:]] for line in printed[1:11]])
    assert shares.sum(0).tolist() == pytest.approx([100, 100], abs=0.1)
    index = SampleIndex.load("runs/index.pt")
    assert shares[:, 1].tolist() == pytest.approx((5 * index.labels.bincount(minlength=10)).tolist(), abs=0.01)
    assert main(["export", "--ckpt=runs/last.ckpt", "--out=student.pt2"]) == 0


def test_plot_of_another_run_raises(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(CONFIG.replace("DIAGONAL", "0.9"))
    assert main(["fit", "--config=c.yaml"]) == 0
    with pytest.raises(ValueError, match=r"images must lie in \[1, 100\], got 0"):
        plot_dfnd("runs/last.ckpt", "a.png", images=0)
    (tmp_path / "runs/index.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"runs/index\.pt"):
        plot_dfnd("runs/last.ckpt", "a.png")
    data = ["--data=kdkernels.data.ClutterDigits", "--data.train_size=20", "--data.val_size=20", "--data.test_size=8", "--data.batch_size=10"]
    assert main(["fit", "--model=kdkernels.distill.Supervised", "--model.student=TinyCNN", *data, "--trainer.max_epochs=1"]) == 0
    with pytest.raises(ValueError, match="must be a run of DFND, got Supervised"):
        plot_dfnd("runs/last/last.ckpt", "a.png")
    assert not (tmp_path / "a.png").exists()
