"""The training engine: exact resume, kill -9, several processes, micro-batches, and full disks."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("lightning")
import lightning as L
import train_processes

from kdkernels import distill
from kdkernels.data import Augment, ClutterDigits
from kdkernels.distill import KD, Distiller, Supervised
from kdkernels.distill.engine import AtomicCheckpointIO, OutputCheck, checkpoints
from kdkernels.models import TinyCNN, load_weights

HERE = Path(__file__).parent


def _environment(**more):
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"} | more


# Resume.


class Student(nn.Module):
    """Has dropout, so random numbers of the forward pass must be the same after a resume."""

    def __init__(self):
        super().__init__()
        self.body, self.drop = TinyCNN(4), nn.Dropout(0.3)

    def forward(self, x):
        return self.body(self.drop(x))


class StopAfter(L.Callback):
    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches -= 1  # the last batch is trained on, but its checkpoint is not written
        if not self.batches:
            raise KeyboardInterrupt


def _run(folder, start=None, max_epochs=4, stop=None, accumulate=1, scheduler=None):
    torch.manual_seed(3 if start is None else 99)  # a resumed run takes its seed from the checkpoint
    method = KD(Student(), _teacher(), scheduler=scheduler)
    data = ClutterDigits(train_size=90, val_size=16, test_size=16, batch_size=16, augment=Augment(crop=2, flip=True, mixup=0.2))
    trainer = L.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
        callbacks=[*checkpoints(folder, every=1), *([StopAfter(stop)] if stop else [])],
        plugins=[AtomicCheckpointIO()],
    )
    try:
        trainer.fit(method, data, ckpt_path=start, weights_only=True)
    except (KeyboardInterrupt, SystemExit):
        assert stop
    return method.student.state_dict(), trainer


def _teacher():
    generator = torch.Generator().manual_seed(8)
    teacher = TinyCNN(6)
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return teacher


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Run four epochs of six batches without interruption."""
    return _run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("stop", [13, 2, 8, 19, 24], ids=lambda n: f"after checkpoint {n - 1} of 24")
def test_resumed_run_equals_uninterrupted_run(uninterrupted, tmp_path, stop):
    interrupted, _ = _run(tmp_path, stop=stop)
    assert stop == 24 or not all(torch.equal(uninterrupted[0][k], interrupted[k]) for k in interrupted)
    resumed, trainer = _run(tmp_path, start=tmp_path / "last.ckpt")
    assert trainer.global_step == uninterrupted[1].global_step
    assert trainer.current_epoch == 4
    assert all(torch.equal(uninterrupted[0][k], resumed[k]) for k in resumed)
    for name in ("train/loss_kl", "train/accuracy", "val/accuracy"):
        if stop % 6 == 1 or name == "val/accuracy":  # the mean of an epoch includes only the batches since the resume
            assert torch.equal(uninterrupted[1].callback_metrics[name], trainer.callback_metrics[name])


def test_two_and_two_epochs_equal_four_epochs(tmp_path):
    """A run of two epochs that is resumed for two more equals a run of four epochs."""

    def step_schedule(optimizer):
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3])

    uninterrupted_weights, _ = _run(tmp_path / "a", scheduler=step_schedule)
    _run(tmp_path / "b", max_epochs=2, scheduler=step_schedule)
    resumed, _ = _run(tmp_path / "b", start=tmp_path / "b" / "last.ckpt", scheduler=step_schedule)
    assert all(torch.equal(uninterrupted_weights[k], resumed[k]) for k in resumed)


def test_finished_run_can_be_extended(tmp_path):
    """The default schedule then reaches zero at the new end."""
    _run(tmp_path, max_epochs=2)
    _, trainer = _run(tmp_path, start=tmp_path / "last.ckpt", max_epochs=3)
    assert trainer.current_epoch == 3
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_resume_of_run_stopped_between_micro_batches_is_exact(tmp_path):
    """Checkpoints are written after optimizer steps.

    A run stopped between two steps resumes from the last one.
    """
    uninterrupted_weights, _ = _run(tmp_path / "a", accumulate=4)
    _run(tmp_path / "b", accumulate=4, stop=15)
    resumed, _ = _run(tmp_path / "b", start=tmp_path / "b" / "last.ckpt", accumulate=4)
    assert all(torch.equal(uninterrupted_weights[k], resumed[k]) for k in resumed)


def test_last_checkpoint_is_that_of_the_last_epoch(tmp_path):
    """last.ckpt is written after each epoch, even if its metric was not the best."""

    class RecordCheckpoints(L.Callback):
        kept = []  # noqa: RUF012

        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch:
                steps = {k: torch.load(tmp_path / f"{k}.ckpt", weights_only=True)["global_step"] for k in ("last", "best")}
                self.kept.append((trainer.global_step, *steps.values()))

    class WorseEveryEpoch(Supervised):
        def validation_step(self, batch, batch_idx):
            self.log("val/accuracy", -float(self.current_epoch))

    trainer = L.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=[*checkpoints(tmp_path, "val/accuracy"), RecordCheckpoints()],
    )
    trainer.fit(WorseEveryEpoch(TinyCNN(2)), ClutterDigits(train_size=32, val_size=8, test_size=8, batch_size=16))
    assert RecordCheckpoints.kept == [(2, 2, 2), (4, 4, 2), (6, 6, 2)]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 8


INTERVAL = 3
CONFIG = f"""
    seed_everything: 1
    model:
      class_path: kdkernels.distill.KD
      init_args:
        student: {{class_path: kdkernels.models.TinyCNN, init_args: {{width: 2}}}}
        teacher: {{class_path: kdkernels.models.TinyCNN, init_args: {{width: 3}}}}
    data:
      class_path: kdkernels.data.ClutterDigits
      init_args:
        train_size: 200
        val_size: 20
        test_size: 20
        batch_size: 16
        augment: {{class_path: kdkernels.data.Augment, init_args: {{crop: 2, flip: true}}}}
    trainer:
      max_epochs: 6
      accelerator: cpu
      enable_progress_bar: false
      default_root_dir: out
      callbacks:
        - class_path: progress.Progress
    checkpoint_every: {INTERVAL}
    """
PROGRESS = """
    import os, time, lightning as L

    class Progress(L.Callback):
        "Writes the number of steps to a file, and sleeps so that there is time to kill the run."
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            with open("steps.tmp", "w") as file:
                file.write(str(trainer.global_step))
            os.replace("steps.tmp", "steps")
            time.sleep(0.02)
    """


def _fit(folder, *more, **options):
    command = [sys.executable, "-m", "kdkernels", "fit", "--config", "config.yaml", *more]
    return subprocess.Popen(command, cwd=folder, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def test_run_killed_at_a_random_step_resumes_exactly(tmp_path):
    weights = {}
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(textwrap.dedent(CONFIG))
        (folder / "progress.py").write_text(textwrap.dedent(PROGRESS))
        process = _fit(folder)
        if name == "killed":
            moment = random.SystemRandom().randrange(INTERVAL, 70)
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and process.poll() is None:
                if (folder / "steps").exists() and int((folder / "steps").read_text()) >= moment:
                    break
                time.sleep(random.SystemRandom().random() * 0.02)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert process.returncode == -signal.SIGKILL
            done = int((folder / "steps").read_text())
            kept = torch.load(folder / "out" / "last.ckpt", weights_only=True)["global_step"]
            assert done - kept <= INTERVAL
            process = _fit(folder, "--ckpt_path", "last")
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        weights[name] = torch.load(folder / "out" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(v, weights["killed"][k]) for k, v in weights["whole"].items()), f"killed at step {moment}"


# Several processes, micro-batches.


def _train(out, batch_size, accumulate=1, strategy="none"):
    out.mkdir()
    launcher = [] if strategy == "none" else ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(_free_port())]
    script = [str(HERE / "train_processes.py"), str(out), str(batch_size), str(accumulate), strategy]
    run = subprocess.run([sys.executable, *launcher, *script], env=_environment(), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr


def _free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Train for two epochs of 43 samples with batches of 16 in one process."""
    out = tmp_path_factory.mktemp("one") / "out"
    _train(out, 16)
    return out


def _load(folder, method):
    return torch.load(folder / f"{method}.ckpt", weights_only=True)["state_dict"], torch.load(folder / f"{method}.metrics", weights_only=True)


def test_all_methods_are_covered():
    exported = {getattr(distill, name) for name in distill.__all__}
    methods = {c.__name__ for c in exported if isinstance(c, type) and issubclass(c, Distiller) and c is not Distiller}
    assert methods == set(train_processes.METHODS)


@pytest.mark.parametrize(("batch_size", "accumulate", "strategy"), [(4, 4, "none"), (8, 1, "ddp"), (4, 2, "ddp")])
def test_training_does_not_depend_on_micro_batches_and_processes(one_process, tmp_path, batch_size, accumulate, strategy):
    """Batches of 16, 16 and 11 samples are split into micro-batches and over processes, evenly or
    not. In float64 the results agree up to rounding.
    """
    _train(tmp_path / "out", batch_size, accumulate, strategy)
    for method in train_processes.METHODS:
        expected, metrics = _load(one_process, method)
        actual, split_metrics = _load(tmp_path / "out", method)
        # Rounding errors of the maps are amplified by small gaps between their singular values, and
        # by the similarity of student and teacher.
        tolerance = dict(rtol=1e-8, atol=1e-11) if method == "SVDKD" else dict(rtol=1e-11, atol=1e-13)
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], **tolerance)
        for name in ("val/accuracy", "val/cross_entropy"):  # float32 sums
            assert split_metrics[name] == pytest.approx(metrics[name], rel=1e-6, abs=0)


def test_fsdp_gives_the_same_weights_and_unsharded_checkpoints(one_process, tmp_path):
    _train(tmp_path / "out", 8, strategy="fsdp")
    methods = {path.stem for path in (tmp_path / "out").glob("*.ckpt")}
    assert methods == set(train_processes.METHODS) - {"GradientAttentionTransfer", "SVDKD"}
    for name in ("GradientAttentionTransfer", "SVDKD"):
        method_without_fsdp = train_processes.METHODS[name]({})
        method_without_fsdp._device_mesh = object()
        with pytest.raises(ValueError, match=f"{name} needs two backward passes, and FSDP"):
            method_without_fsdp.configure_model()
    for method in methods:
        expected, _ = _load(one_process, method)
        actual, _ = _load(tmp_path / "out", method)
        for name in expected:
            torch.testing.assert_close(actual[name].double(), expected[name], rtol=2e-4, atol=2e-5)  # float32, six steps
        student = load_weights(train_processes.METHODS[method]({}).student, tmp_path / "out" / f"{method}.ckpt")
        assert all(torch.equal(value, actual[f"student.{name}"]) for name, value in student.state_dict().items())


# Disks.


def test_interrupted_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path, writer = tmp_path / "last.ckpt", AtomicCheckpointIO()
    writer.save_checkpoint({"step": torch.tensor(1)}, path)

    def fail_with_full_disk(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail_with_full_disk)
    with pytest.raises(OSError, match="No space left"):
        writer.save_checkpoint({"step": torch.tensor(2)}, path)
    assert torch.load(path, weights_only=True)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_full_disk_raises_before_training(tmp_path, monkeypatch):
    def fail_with_full_disk(handle, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail_with_full_disk)
    with pytest.raises(OSError, match=r"need \d+ MiB in .*, but cannot be written: No space left on device, \d+ MiB are free") as error:
        _run(tmp_path)
    assert error.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_disk_with_too_little_space_raises_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2**30, 2**30 - 2**20, 2**20))
    with pytest.raises(OSError, match=r"need \d+ MiB in .*, but cannot be written: No space left on device, 1 MiB are free"):
        _run(tmp_path)


def test_file_size_limit_is_an_error_before_training(tmp_path):
    """The operating system limits the file size of a separate process."""
    (tmp_path / "config.yaml").write_text(textwrap.dedent(CONFIG))
    (tmp_path / "progress.py").write_text(textwrap.dedent(PROGRESS))
    process = _fit(tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "kdkernels fit: [Errno 27] checkpoints and logs need" in output
    assert not (tmp_path / "steps").exists()


def test_unwritable_folder_raises_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"checkpoints and logs need .* in .*/file/run, but cannot be written: Not a directory"):
        _run(tmp_path / "file" / "run")
    OutputCheck.check(tmp_path / "new" / "folder", 2**20)
    assert not list((tmp_path / "new" / "folder").iterdir())
