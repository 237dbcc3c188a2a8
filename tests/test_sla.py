"""Self-supervised label augmentation: known answers, gradients and training."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kdkernels.nn import SLALoss, aggregate_rotations, four_rotations, joint_labels, sla_loss


def test_rotations_and_labels_are_sample_major():
    images = torch.arange(8.0).reshape(2, 1, 2, 2)
    assert four_rotations(images)[:4, 0].tolist() == [[[0, 1], [2, 3]], [[1, 3], [0, 2]], [[3, 2], [1, 0]], [[2, 0], [3, 1]]]
    assert torch.equal(four_rotations(images)[::4], images)
    assert torch.equal(four_rotations(images)[4:], four_rotations(images[1:]))
    assert joint_labels(torch.tensor([2, 0])).tolist() == [8, 9, 10, 11, 0, 1, 2, 3]
    one_hot = F.one_hot(torch.tensor([2, 0]), 3).double()
    assert torch.equal(joint_labels(one_hot), F.one_hot(joint_labels(torch.tensor([2, 0])), 12).double())


def test_known_aggregation():
    assert aggregate_rotations(torch.eye(4)).tolist() == [[1.0]]  # one image, one class
    # Two images and two classes. The entry of (image b, rotation k) and (class c, rotation j) is a
    # number with the digits b, k, c, j.
    b, k, c, j = torch.meshgrid(torch.arange(2), torch.arange(4), torch.arange(2), torch.arange(4), indexing="ij")
    joint = (1000.0 * b + 100 * k + 10 * c + j).reshape(8, 8)
    # For c = 0, the mean of 100 k + k over the rotations is 151.5.
    assert aggregate_rotations(joint).tolist() == [[151.5, 161.5], [1151.5, 1161.5]]


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), soft=st.booleans(), temperature=st.sampled_from([1.0, 4.0]))
def test_loss_is_the_sum_of_its_terms(seed, soft, temperature):
    """Compared with loops over images and rotations in float64."""
    torch.manual_seed(seed)
    batch, classes = 3, 5
    logits, joint = torch.randn(batch, classes, dtype=torch.float64), torch.randn(4 * batch, 4 * classes, dtype=torch.float64)
    labels = torch.rand(batch, classes, dtype=torch.float64).softmax(1) if soft else torch.randint(classes, (batch,))
    got = sla_loss(logits, joint, labels, temperature=temperature, alpha=0.3)
    want = 0.0
    for b in range(batch):
        probability = labels[b] if soft else F.one_hot(labels[b], classes).double()
        want = want - (probability * logits[b].log_softmax(0)).sum() / batch
        for k in range(4):
            want = want - (probability * joint[4 * b + k].log_softmax(0)[k::4]).sum() / (4 * batch)
        aggregated = sum(joint[4 * b + k, k::4] for k in range(4)) / 4
        target = (aggregated / temperature).softmax(0)
        want = want + 0.3 * temperature**2 / batch * (target * (target.log() - (logits[b] / temperature).log_softmax(0))).sum()
    assert got.item() == pytest.approx(want.item(), rel=1e-10, abs=0)


def test_aggregated_predictions_receive_no_gradient():
    logits, joint = torch.randn(2, 3, dtype=torch.float64, requires_grad=True), torch.randn(8, 12, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2])
    sla_loss(logits, joint, labels).backward()
    alone = joint.detach().requires_grad_()
    F.cross_entropy(alone, joint_labels(labels)).backward()
    torch.testing.assert_close(joint.grad, alone.grad)
    torch.autograd.gradcheck(lambda z: sla_loss(z, joint.detach(), labels, temperature=4.0), (logits,))
    half = SLALoss(temperature=4.0)(logits.detach().half(), joint.detach().half(), labels)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(
        sla_loss(logits.detach().half().double(), joint.detach().half().double(), labels, temperature=4.0).item(), rel=1e-5
    )


def test_labels_of_small_types_and_ignored_labels():
    """4 y + k does not fit into a byte; -100 is the label that F.cross_entropy ignores."""
    assert joint_labels(torch.tensor([200], dtype=torch.uint8)).tolist() == [800, 801, 802, 803]
    assert joint_labels(torch.tensor([20000], dtype=torch.int16)).tolist() == [80000, 80001, 80002, 80003]
    assert joint_labels(torch.tensor([-100, 1])).tolist() == [-100] * 4 + [4, 5, 6, 7]
    logits, joint, labels = torch.randn(2, 201), torch.randn(8, 804), torch.tensor([200, 3])
    assert sla_loss(logits, joint, labels.to(torch.uint8)) == sla_loss(logits, joint, labels)
    assert sla_loss(logits[:0], joint[:0], labels[:0]).item() == 0


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match=r"images must be square \[B, C, H, H\].*got list"):
        four_rotations([1])
    with pytest.raises(ValueError, match=r"images must be square \[B, C, H, H\].*got \(1, 3, 4, 6\)"):
        four_rotations(torch.zeros(1, 3, 4, 6))
    with pytest.raises(ValueError, match=r"joint logits must have the shape \[4 B, 4 K\], got \(4, 6\)"):
        aggregate_rotations(torch.zeros(4, 6))
    logits, joint, labels = torch.zeros(1, 3), torch.zeros(4, 12), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"got \(1, 3\) and \(4, 8\)"):
        sla_loss(logits, joint[:, :8], labels)
    with pytest.raises(ValueError, match="labels must have the shape"):
        sla_loss(logits, joint, labels[:0])
    for option in ("temperature", "alpha"):
        with pytest.raises(ValueError, match=f"{option} must be"):
            SLALoss(**{option: -1.0})


# Trainers.

pytest.importorskip("lightning")
from tiny_runs import data_of, fit  # noqa: E402

from kdkernels.data import Augment  # noqa: E402
from kdkernels.distill import FRSKD, SLA  # noqa: E402
from kdkernels.models import TinyCNN, load_weights  # noqa: E402
from kdkernels.tasks import Segmentation  # noqa: E402

BLOCKS = ["block1", "block2", "block3"]
BATCH = {"image": torch.rand(4, 3, 8, 8, dtype=torch.float64), "label": torch.tensor([0, 1, 2, 0])}


def _sla(**options):
    return SLA(TinyCNN(4, num_classes=3), ["block3"], **{"image_shape": [3, 8, 8]} | options)


def test_trainer_computes_the_pure_loss():
    method = _sla(temperature=4.0, alpha=0.5).double().eval()
    logits, joint = method.run_rotations(BATCH["image"])
    torch.testing.assert_close(logits, method(BATCH["image"]))
    want = sla_loss(logits, joint, BATCH["label"], temperature=4.0, alpha=0.5)
    assert sum(method.losses(BATCH)[1].values()).item() == pytest.approx(want.item(), rel=1e-10, abs=0)
    soft = BATCH | {"label": F.one_hot(BATCH["label"], 3).double()}
    assert sum(method.losses(soft)[1].values()).item() == pytest.approx(want.item(), rel=1e-10, abs=0)
    mixed = BATCH | {"mixed_label": torch.tensor([1, 1, 1, 1]), "mix": torch.tensor([0.0, 0.3, 1.0, 0.5], dtype=torch.float64)}
    expected = sum(
        weight * F.cross_entropy(joint[4 * b : 4 * b + 4], joint_labels(label[b : b + 1])) / 4
        for b in range(4)
        for weight, label in ((mixed["mix"][b], mixed["label"]), (1 - mixed["mix"][b], mixed["mixed_label"]))
    )
    assert method.losses(mixed)[1]["joint"].item() == pytest.approx(expected.item(), rel=1e-10, abs=0)


def test_which_parameter_receives_which_gradient():
    method = _sla().double()
    method.losses(BATCH)[1]["kl"].backward()
    assert all(p.grad is None for p in method.branches.parameters())
    assert all(p.grad is not None for p in method.student.parameters())
    method.zero_grad()
    method.losses(BATCH)[1]["joint"].backward()
    assert method.student.fc.weight.grad is None
    assert all(p.grad is not None for p in [*method.branches.parameters(), *method.student.block1.parameters()])


def test_frskd_with_sla_is_the_sum_of_both():
    """FRSKD's KL compares both pairs of predictions, as a mean, and SLA teaches both networks."""
    method = FRSKD(TinyCNN(4, num_classes=3), BLOCKS, 2.0, 100.0, 4.0, sla=True, sla_alpha=0.7, width=1, image_shape=[3, 8, 8]).double().eval()
    logits, outputs = method.run_branches(four_rotations(BATCH["image"]))
    student, teacher = logits[::4], outputs.logits[::4]
    label, (joint, joint_teacher) = BATCH["label"], outputs.joint
    want = sla_loss(student, joint, label, temperature=4.0, alpha=0.7) + sla_loss(teacher, joint_teacher, label, temperature=4.0, alpha=0.7)
    both = torch.cat([student, aggregate_rotations(joint)]), torch.cat([teacher, aggregate_rotations(joint_teacher)])
    p, log_q = (both[1] / 4).softmax(1), (both[0] / 4).log_softmax(1)
    want = want + 2 * 16 * (p * (p.log() - log_q)).sum(1).mean()
    for s, t in zip(outputs.features, outputs.teacher_features, strict=True):
        a, b = (F.normalize(x.square().mean(1).flatten(1)) for x in (s, t))
        want = want + 100 * (a - b).square().mean()
    got, terms = method.losses(BATCH)
    assert torch.equal(got, student)
    assert sum(terms.values()).item() == pytest.approx(want.item(), rel=1e-10, abs=0)
    terms = method.losses(BATCH)[1]
    (terms["kl"] + terms["features"]).backward()
    assert all(p.grad is None for p in [*method.branches.self_teacher.parameters(), *method.branches.joint_classifiers[1].parameters()])
    assert all(p.grad is not None for p in [*method.student.parameters(), *method.branches.joint_classifiers[0].parameters()])


def test_training(tmp_path):
    method = SLA(TinyCNN(4, num_classes=3), ["block3"])
    trainer = fit(method, data_of(augment=Augment(crop=1, mixup=0.2)))
    assert {"val/accuracy", "val/accuracy_aggregated"} <= set(trainer.callback_metrics)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    plain = load_weights(TinyCNN(4, num_classes=3), tmp_path / "a.ckpt")
    assert all(torch.equal(v, method.student.state_dict()[k]) for k, v in plain.state_dict().items())


def test_invalid_options_raise_before_training():
    with pytest.raises(ValueError, match="SLA rotates images by 90 degrees, so they must be square, got 8x16"):
        _sla(image_shape=[3, 8, 16])
    wide = [(torch.rand(3, 8, 16), i % 3) for i in range(6)]
    with pytest.raises(ValueError, match="must be square, got 8x16"):
        fit(SLA(TinyCNN(4, num_classes=3), ["block3"]), data_of(wide))
    with pytest.raises(ValueError, match="SLA predicts how an image is rotated, which needs the task Classification, got Segmentation"):
        _sla(task=Segmentation())
    with pytest.raises(ValueError, match="student_taps must name one layer"):
        SLA(TinyCNN(4), BLOCKS)
    with pytest.raises(ValueError, match="temperature must"):
        _sla(temperature=0.0)
    with pytest.raises(ValueError, match="alpha, the weight of a term"):
        _sla(alpha=-1.0)
    unlabelled = torch.utils.data.DataLoader([{"image": image[:, :, :8]} for image, _ in wide], batch_size=2)
    with pytest.raises(ValueError, match="on labels, and the first training batch has none"):
        fit(_sla(), unlabelled)
