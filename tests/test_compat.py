"""Losses of other projects on the ops of this package, against transcriptions of their formulas."""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kdkernels
from kdkernels import compat

T, B, K = 4.0, 6, 10


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def same_loss_and_gradient(found, expected, *inputs, with_respect_to=1):
    """Compare two functions of the inputs: values and gradients of the first inputs."""
    results = []
    for function in (found, expected):
        given = [[y.clone().requires_grad_() for y in x] if isinstance(x, list) else x.clone().requires_grad_() for x in inputs]
        losses = function(*given)
        losses = losses if isinstance(losses, list) else [losses]
        flat = [y for x in given[:with_respect_to] for y in (x if isinstance(x, list) else [x])]
        weights = range(1, len(losses) + 1)
        total = sum(w * (loss * (1 + torch.arange(loss.numel()).view(loss.shape))).sum() for w, loss in zip(weights, losses, strict=True))
        results.append((losses, torch.autograd.grad(total, flat, allow_unused=True)))
    (a, gradients_a), (b, gradients_b) = results
    assert [x.shape for x in a] == [x.shape for x in b]
    for x, y in zip([*a, *gradients_a], [*b, *gradients_b], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-13)


# Logits.


def kl_sum(s, t, temperature, dim=1):
    """Sum over rows of sum_k p_t (log p_t - log p_s), from the definition."""
    p, q = (torch.softmax(x / temperature, dim) for x in (t, s))
    return (p * (p.log() - q.log())).sum()


def cross_entropy(s, labels):
    return -torch.log_softmax(s, 1)[torch.arange(len(labels)), labels].mean()


LABELS = torch.tensor([3, 0, 9, 1, 1, 5])
LOGITS = {"student": lambda x: {"fc": {"output": x}}, "teacher": lambda x: {"head": {"input": x}}}


def torchdistill_kd(**options):
    loss = compat.torchdistill.KDLoss("fc", "output", "head", "input", T, **options)
    return lambda s, t, targets=None: loss(LOGITS["student"](s), LOGITS["teacher"](t), targets)


KL = {  # the function of this package, and the other project's formula
    "RepDistiller": (compat.repdistiller.DistillKL(T), lambda s, t: T**2 * kl_sum(s, t, T) / B),
    "mdistiller": (lambda s, t: compat.mdistiller.kd_loss(s, t, T), lambda s, t: T**2 * kl_sum(s, t, T) / B),
    "attention-transfer": (
        lambda s, t: compat.attention_transfer.distillation(s, t, LABELS, T, 0.7),
        lambda s, t: 0.7 * T**2 * kl_sum(s, t, T) / B + 0.3 * cross_entropy(s, LABELS),
    ),
    "torchdistill, no alpha: without T^2": (torchdistill_kd(), lambda s, t: kl_sum(s, t, T) / B),
    "torchdistill, alpha 0: without T^2": (
        lambda s, t: torchdistill_kd(alpha=0)(s, t, LABELS),
        lambda s, t: kl_sum(s, t, T) / B,
    ),
    "torchdistill, no targets: without T^2 and beta": (torchdistill_kd(alpha=0.5, beta=7), lambda s, t: kl_sum(s, t, T) / B),
    "torchdistill": (
        lambda s, t: torchdistill_kd(alpha=0.4)(s, t, LABELS),
        lambda s, t: 0.4 * cross_entropy(s, LABELS) + 0.6 * T**2 * kl_sum(s, t, T) / B,
    ),
    "torchdistill, beta, mean": (
        lambda s, t: torchdistill_kd(alpha=0.4, beta=3, reduction="mean")(s, t, LABELS),
        lambda s, t: 0.4 * cross_entropy(s, LABELS) + 3 * T**2 * kl_sum(s, t, T) / (B * K),
    ),
    "modelopt, mean": (compat.modelopt.LogitsDistillationLoss(T, reduction="mean"), lambda s, t: T**2 * kl_sum(s, t, T) / (B * K)),
    "modelopt, batchmean": (compat.modelopt.LogitsDistillationLoss(T, reduction="batchmean"), lambda s, t: T**2 * kl_sum(s, t, T) / B),
    "modelopt, none": (
        compat.modelopt.LogitsDistillationLoss(T, reduction="none"),
        lambda s, t: T**2 * torch.stack([kl_sum(s[i : i + 1], t[i : i + 1], T) for i in range(B)]),
    ),
    "F.kl_div, mean": (
        lambda s, t: compat.functional.kl_div_of_logits(s, t, T, dim=1),
        lambda s, t: F.kl_div(F.log_softmax(s / T, 1), F.softmax(t / T, 1), reduction="mean"),
    ),
}


@pytest.mark.parametrize("found", KL.values(), ids=KL)
def test_kl_of_logits(found):
    same_loss_and_gradient(*found, 2 * randn(B, K), 2 * randn(B, K, seed=1))


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
@pytest.mark.parametrize("shape", [(B, K), (K,), (B, 7, K), (B, K, 3, 2)], ids=str)
def test_kl_div_of_logits(shape, reduction):
    dim = 1 if len(shape) == 4 else -1
    same_loss_and_gradient(
        lambda s, t: compat.functional.kl_div_of_logits(s, t, T, dim=dim, reduction=reduction),
        lambda s, t: F.kl_div(F.log_softmax(s / T, dim), F.softmax(t / T, dim), reduction=reduction),
        randn(*shape),
        randn(*shape, seed=1),
        with_respect_to=2,
    )


def test_rows_of_samples():
    """For [B, K, H, W], RepDistiller and torchdistill divide by B, mdistiller by all pixels."""
    s, t = randn(2, 5, 3, 4), randn(2, 5, 3, 4, seed=1)
    total = T**2 * kl_sum(s, t, T).item()
    assert compat.repdistiller.DistillKL(T)(s, t).item() == pytest.approx(total / 2, rel=1e-12, abs=0)
    assert compat.mdistiller.kd_loss(s, t, T).item() == pytest.approx(total / 24, rel=1e-12, abs=0)
    loss = compat.torchdistill.KDLoss("fc", "output", "head", "input", T, alpha=1.0, beta=1.0)
    labels = torch.randint(5, (2, 3, 4))
    found = loss(LOGITS["student"](s), LOGITS["teacher"](t), labels)
    assert found.item() == pytest.approx(total / 2 + F.cross_entropy(s, labels).item(), rel=1e-12, abs=0)


def jsd(s, t, beta, temperature=1.0):
    """Divergence of each row, from the definition."""
    p, q = (torch.softmax(x / temperature, -1) for x in (t, s))
    if beta in (0, 1):
        return (p * (p / q).log()).sum(-1) if beta == 0 else (q * (q / p).log()).sum(-1)
    m = beta * p + (1 - beta) * q
    return (beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()).sum(-1)


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
def test_jensen_shannon_divergence(beta):
    s, t = randn(2, 5, 7), randn(2, 5, 7, seed=1)
    labels = torch.tensor([[1, -100, 2, 3, -100], [-100, 0, 0, 6, 1]])
    kept = labels != -100
    trl = compat.trl.generalized_jsd_loss
    for options, expected in (
        ({}, lambda rows: rows.sum() / 2),
        ({"labels": labels}, lambda rows: rows[kept].sum() / 7),
        ({"labels": labels, "num_items_in_batch": 21}, lambda rows: rows[kept].sum() / 21),
        ({"labels": labels, "num_items_in_batch": torch.tensor(21), "reduction": "sum"}, lambda rows: rows[kept].sum() / 21),
        ({"labels": labels, "reduction": "sum"}, lambda rows: rows[kept].sum()),
        ({"reduction": "sum"}, lambda rows: rows.sum()),
        ({"labels": labels, "reduction": "mean"}, lambda rows: rows[kept].sum() / 49),
        ({"reduction": "mean"}, lambda rows: rows.mean() / 7),
    ):
        same_loss_and_gradient(
            lambda s, t, options=options: trl(s, t, beta=beta, temperature=2.0, **options),
            lambda s, t, expected=expected: expected(jsd(s, t, beta, 2.0)),
            s,
            t,
        )
    same_loss_and_gradient(
        lambda s, t: compat.liger.LigerJSD(beta, ignore_index=-1)(s.log_softmax(-1), t.log_softmax(-1), torch.tensor([0, -1, 3])),
        lambda s, t: jsd(s, t, beta)[[0, 2]].sum() / 2,
        s[0, :3],
        t[0, :3],
    )
    assert trl(s, t, labels=torch.full((2, 5), -100), beta=beta).item() == 0
    elements = trl(s, t, beta=beta, temperature=2.0, reduction="none")
    torch.testing.assert_close(elements.sum(-1), jsd(s, t, beta, 2.0))
    assert torch.equal(trl(s, t, labels=labels, beta=beta, temperature=2.0, reduction="none"), elements[kept])


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
@pytest.mark.parametrize("log_target", [False, True])
def test_liger_kl_div(reduction, log_target):
    def expected(s, t):
        target = t.log_softmax(1) if log_target else t.softmax(1)
        return F.kl_div(s.log_softmax(1), target.detach(), reduction=reduction, log_target=log_target)

    loss = compat.liger.LigerKLDIVLoss(reduction=reduction, log_target=log_target)
    same_loss_and_gradient(
        lambda s, t: loss(s.log_softmax(1), t.log_softmax(1) if log_target else t.softmax(1)), expected, randn(B, K), randn(B, K, seed=1)
    )
    if not log_target:
        one_hot = F.one_hot(torch.tensor([2, 0]), 3).double()
        found = compat.liger.LigerKLDIVLoss(reduction="sum")(randn(2, 3).log_softmax(1), one_hot)
        assert found.item() == pytest.approx(-randn(2, 3).log_softmax(1)[[0, 1], [2, 0]].sum().item(), rel=1e-8, abs=0)


# Feature maps.


def attention_map(x, p=2):
    x = x.pow(p).mean(1).flatten(1)
    return x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)


def attention_loss(s, t, p=2):
    return (attention_map(s, p) - attention_map(t, p)).square().mean()


MAPS = [randn(B, c, h, h, seed=h + c) for c, h in ((8, 16), (16, 8), (32, 4))], [randn(B, c, h, h, seed=h) for c, h in ((12, 16), (16, 8), (20, 4))]


def test_attention_transfer():
    s, t = MAPS
    same_loss_and_gradient(compat.attention_transfer.at_loss, attention_loss, s[0], t[0])
    torch.testing.assert_close(compat.attention_transfer.at(s[0]), attention_map(s[0]))
    for p in (2, 4, 1, 3):  # an odd power keeps the sign

        def expected(s, t, p=p):
            return [attention_loss(a, b, p) for a, b in zip(s, t, strict=True)]

        same_loss_and_gradient(compat.repdistiller.Attention(p), expected, s, t)
        same_loss_and_gradient(lambda s, t, p=p: compat.mdistiller.at_loss(s, t, p), lambda s, t, e=expected: sum(e(s, t)), s, t)
    smaller = [F.adaptive_avg_pool2d(x, 3) for x in t]
    expected = [attention_loss(F.adaptive_avg_pool2d(a, 3), b) for a, b in zip(s, smaller, strict=True)]
    torch.testing.assert_close(compat.repdistiller.Attention()(s, smaller), expected)
    expected = [attention_loss(F.adaptive_avg_pool2d(b, 3), a) for a, b in zip(smaller, s, strict=True)]
    torch.testing.assert_close(compat.repdistiller.Attention()(smaller, s), expected)


@pytest.mark.parametrize("mode", ["code", "paper"])
def test_torchdistill_attention(mode):
    def ours(s, t):
        pairs = {
            "a": {"student": {"path": "layer3", "io": "output"}, "teacher": {"path": "body.3", "io": "output"}, "weight": 5},
            "b": {"student": {"path": "layer4", "io": "input"}, "teacher": {"path": "body.4", "io": "output"}},
        }
        loss = compat.torchdistill.ATLoss(pairs, mode=mode)
        return loss({"layer3": {"output": s[0]}, "layer4": {"input": s[1]}}, {"body.3": {"output": t[0]}, "body.4": {"output": t[1]}}, LABELS)

    def expected(s, t):
        if mode == "code":
            return 5 * attention_loss(s[0], t[0]) + attention_loss(s[1], t[1])
        norms = [(attention_map(a) - attention_map(b)).norm(dim=1).sum() for a, b in zip(s, t, strict=True)]
        return (5 * norms[0] + norms[1]) / B

    same_loss_and_gradient(ours, expected, *(x[:2] for x in MAPS))


def fsp(first, second, pool):
    first = pool(first, second.shape[-1]) if first.shape[-1] > second.shape[-1] else first
    return torch.einsum("bihw,bjhw->bij", first, second) / second[0, 0].numel()


def test_fsp():
    s, t = MAPS[0], [x + 1 for x in MAPS[0]]

    def repdistiller(s, t):
        average = F.adaptive_avg_pool2d
        return [(fsp(s[i], s[i + 1], average) - fsp(t[i], t[i + 1], average)).square().mean() for i in range(2)]

    shapes = [x.shape for x in s]
    same_loss_and_gradient(compat.repdistiller.FSP(shapes, shapes), repdistiller, s, t)

    def torchdistill(s, t):
        pair = {f"{who}_{place}": {"path": place, "io": "output"} for who in ("student", "teacher") for place in ("first", "second")}
        loss = compat.torchdistill.FSPLoss({"pair": pair | {"weight": 3}})
        return loss(*({"first": {"output": x[0]}, "second": {"output": x[1]}} for x in (s, t)))

    def expected(s, t):
        difference = fsp(s[0], s[1], F.adaptive_max_pool2d) - fsp(t[0], t[1], F.adaptive_max_pool2d)
        return 3 * difference.norm(dim=1).sum() / B

    same_loss_and_gradient(torchdistill, expected, s[:2], t[:2])
    with pytest.raises(ValueError, match=r"same numbers of channels, got \[8, 16, 32\] and \[8, 16\]"):
        compat.repdistiller.FSP(shapes, shapes[:2])


def kdsvd(s, t, k):
    """RepDistiller's formula, with the signs of truncated_svd: the largest entry is positive."""

    def vectors(x, n):
        _, sigma, v = torch.linalg.svd(x.flatten(2).mT, full_matrices=False)
        v = v.mT[:, :, :n]
        largest = v.abs().argmax(1, keepdim=True)
        return F.normalize(sigma[:, :n], dim=1)[:, None], v * v.gather(1, largest).sign()

    losses, previous = [], None
    for a, b in zip(s, t, strict=True):
        (sigma, v_t), (_, v_s) = vectors(b, k), vectors(a, k + 3)
        cosine = v_s.mT @ v_t
        chosen = cosine.abs() == cosine.abs().amax(1, keepdim=True)
        v_s = v_s @ torch.where(chosen, cosine.sign(), 0)
        v_s, v_t = v_s * sigma, v_t * sigma
        if previous is not None:
            rbf = [torch.exp(-(x[:, :, None] - y[:, None]).square() / 8) for x, y in ((v_s, previous[0]), (v_t, previous[1]))]
            losses.append((rbf[0] - rbf[1].detach()).square().sum() / len(a))
        previous = v_s, v_t
    return losses


@pytest.mark.parametrize("k", [1, 2])
def test_kdsvd(k):
    s, t = MAPS[0], [randn(*x.shape, seed=50 + i) for i, x in enumerate(MAPS[0])]
    same_loss_and_gradient(compat.repdistiller.KDSVD(k), lambda s, t: kdsvd(s, t, k), s, t)


def test_kdsvd_with_dead_channels():
    """Every gradient is finite, where torch.svd's are NaN."""
    s = [x.relu() for x in MAPS[0]]
    for x in s:
        x[:, ::4] = 0
        x.requires_grad_()
    sum(compat.repdistiller.KDSVD()(s, [x.detach() + 0.1 for x in s])).backward()
    assert all(x.grad.isfinite().all() for x in s)
    assert any(x.grad.any() for x in s)


# Weights.

LOSSES = {  # losses in the names of convert_weight, of logits [B, K, 3], maps and pairs of maps
    "kdkernels.temperature_kl": lambda s, t: kdkernels.temperature_kl(s, t, T, dim=1),
    "attention_transfer.distillation": lambda s, t: compat.attention_transfer.distillation(s, t, torch.zeros(B, 3, dtype=torch.long), T, 1.0),
    "repdistiller.DistillKL": lambda s, t: compat.repdistiller.DistillKL(T)(s, t),
    "mdistiller.kd_loss": lambda s, t: compat.mdistiller.kd_loss(s, t, T),
    "torchdistill.KDLoss": lambda s, t: torchdistill_kd(alpha=1e-300, beta=1)(s, t, torch.zeros(B, 3, dtype=torch.long)),
    "torchdistill.KDLoss, without targets": torchdistill_kd(),
    "modelopt.LogitsDistillationLoss, batchmean": lambda s, t: compat.modelopt.LogitsDistillationLoss(T, reduction="batchmean")(s.mT, t.mT),
    "modelopt.LogitsDistillationLoss, mean": lambda s, t: compat.modelopt.LogitsDistillationLoss(T, reduction="mean")(s.mT, t.mT),
    "F.kl_div, batchmean": lambda s, t: compat.functional.kl_div_of_logits(s, t, T, dim=1, reduction="batchmean"),
    "F.kl_div, mean": lambda s, t: compat.functional.kl_div_of_logits(s, t, T, dim=1),
    "F.kl_div, sum": lambda s, t: compat.functional.kl_div_of_logits(s, t, T, dim=1, reduction="sum"),
    "liger.LigerKLDIVLoss, batchmean": lambda s, t: liger_kl(s, t, "batchmean"),
    "liger.LigerKLDIVLoss, mean": lambda s, t: liger_kl(s, t, "mean"),
    "kdkernels.temperature_kl, jsd": lambda s, t: kdkernels.temperature_kl(s, t, T, dim=1, direction="jsd"),
    "trl.generalized_jsd_loss": lambda s, t: compat.trl.generalized_jsd_loss(s.mT, t.mT, torch.zeros(B, 3), temperature=T),
    "trl.generalized_jsd_loss, without labels": lambda s, t: compat.trl.generalized_jsd_loss(s.mT, t.mT, temperature=T),
    "liger.LigerJSD": lambda s, t: compat.liger.LigerJSD()(*((x.mT / T).log_softmax(-1).flatten(0, 1) for x in (s, t))),
    "kdkernels.attention_transfer_loss": kdkernels.attention_transfer_loss,
    "attention_transfer.at_loss": compat.attention_transfer.at_loss,
    "repdistiller.Attention": lambda s, t: compat.repdistiller.Attention()([s], [t])[0],
    "mdistiller.at_loss": lambda s, t: compat.mdistiller.at_loss([s], [t], 2),
    "torchdistill.ATLoss, code": lambda s, t: torchdistill_at(s, t, "code"),
    "kdkernels.attention_transfer_loss, paper": lambda s, t: kdkernels.attention_transfer_loss(s, t, variant="paper"),
    "torchdistill.ATLoss, paper": lambda s, t: torchdistill_at(s, t, "paper"),
    "kdkernels.fsp_loss, repdistiller": lambda s, t: kdkernels.nn.fsp_loss([s[:2]], [t[:2]], variant="repdistiller"),
    "repdistiller.FSP": lambda s, t: compat.repdistiller.FSP([x.shape for x in s], [x.shape for x in t])(s[:2], t[:2])[0],
    "kdkernels.fsp_loss, paper": lambda s, t: kdkernels.nn.fsp_loss([s[:2], s[1:]], [t[:2], t[1:]]),
    "kdkernels.fsp_loss, sskd": lambda s, t: kdkernels.nn.fsp_loss([s[:2], s[1:]], [t[:2], t[1:]], variant="sskd"),
    "kdkernels.fsp_loss, torchdistill": lambda s, t: kdkernels.nn.fsp_loss([s[:2]], [t[:2]], variant="torchdistill"),
    "torchdistill.FSPLoss": lambda s, t: torchdistill_fsp(s, t),
    "kdkernels.svd_kd_loss, mean": lambda s, t: kdkernels.nn.svd_kd_loss(s, t, 2, loss="mean", align="student", extra=3),
    "kdkernels.svd_kd_loss, authors": lambda s, t: kdkernels.nn.svd_kd_loss(s, t, 2, align="student", extra=3),
    "repdistiller.KDSVD": lambda s, t: sum(compat.repdistiller.KDSVD(2)(s, t)),
}


def liger_kl(s, t, reduction):
    s, t = ((x.mT / T).log_softmax(-1).flatten(0, 1) for x in (s, t))
    return compat.liger.LigerKLDIVLoss(reduction=reduction)(s, t.exp())


def torchdistill_at(s, t, mode):
    where = {"path": "x", "io": "output"}
    return compat.torchdistill.ATLoss({"a": {"student": where, "teacher": where}}, mode=mode)({"x": {"output": s}}, {"x": {"output": t}})


def torchdistill_fsp(s, t):
    pair = {f"{who}_{place}": {"path": place, "io": "output"} for who in ("student", "teacher") for place in ("first", "second")}
    return compat.torchdistill.FSPLoss({"a": pair})(*({"first": {"output": x[0]}, "second": {"output": x[1]}} for x in (s, t)))


def test_convert_weight():
    """For each pair of losses of one quantity, the weighted losses are equal."""
    from kdkernels.compat.weights import _DEFINITIONS

    assert set(LOSSES) == set(_DEFINITIONS)
    maps = MAPS[0], [randn(*x.shape, seed=50 + i) for i, x in enumerate(MAPS[0])]
    inputs = {"attention": (maps[0][0], maps[1][0]), "FSP": maps, "SVD": maps, "": (randn(B, K, 3), randn(B, K, 3, seed=1))}
    sizes = {"temperature": T, "classes": K, "batch_size": B, "rows_per_sample": 3, "k": 2, "matrix_elements": 8 * 16 + 16 * 32}
    values, compared = {}, 0
    for name, definition in _DEFINITIONS.items():
        values[name] = LOSSES[name](*next(x for word, x in inputs.items() if word in definition.quantity)).item()
        for other, value in values.items():
            if _DEFINITIONS[other].quantity == definition.quantity:
                converted = compat.convert_weight(0.3, name, other, **sizes)
                assert converted * value == pytest.approx(0.3 * values[name], rel=1e-6, abs=0), (name, other)
                compared += name != other
    assert compared > 60


def test_ratios_of_the_docs():
    """The last column of the table in docs/migration.md, for T = 4 and C = 10, from the losses."""
    page = (Path(__file__).parent.parent / "docs/migration.md").read_text()
    rows = dict(re.findall(r"^\| ([^|]+) \| (?:yes|no) \| [^|]+ \| (?:[^|]+ = )?([\d.]+) \|$", page, flags=re.MULTILINE))
    s, t = randn(B, K), randn(B, K, seed=1)
    expected = kdkernels.temperature_kl(s, t, T)
    jsd = kdkernels.temperature_kl(s, t, T, direction="jsd")
    measured = {
        "RepDistiller, attention-transfer, torchdistill with targets": compat.repdistiller.DistillKL(T)(s, t) / expected,
        "mdistiller": compat.mdistiller.kd_loss(s, t, T) / expected,
        "torchdistill without targets or with alpha = 0": torchdistill_kd()(s, t) / expected,
        'modelopt, `reduction="batchmean"` (the default of 0.40)': compat.modelopt.LogitsDistillationLoss(T, "batchmean")(s, t) / expected,
        'modelopt, `reduction="mean"` (the default of 0.47)': compat.modelopt.LogitsDistillationLoss(T, "mean")(s, t) / expected,
        '`F.kl_div`, `reduction="batchmean"`': F.kl_div((s / T).log_softmax(1), (t / T).softmax(1), reduction="batchmean") / expected,
        '`F.kl_div`, `reduction="mean"` (the default)': F.kl_div((s / T).log_softmax(1), (t / T).softmax(1), reduction="mean") / expected,
        "TRL, Liger (JSD)": compat.trl.generalized_jsd_loss(s, t, torch.zeros(B), temperature=T) / jsd,
        "TRL without `labels`, logits [B, V]": compat.trl.generalized_jsd_loss(s, t, temperature=T) / jsd,
    }
    assert {name: float(shown) for name, shown in rows.items()} == pytest.approx({name: x.item() for name, x in measured.items()}, rel=1e-9, abs=0)


def test_known_weights():
    convert = compat.convert_weight
    assert convert(0.9, "F.kl_div, mean", "kdkernels.temperature_kl", temperature=4, classes=100) == pytest.approx(0.9 / 1600, abs=0)
    assert convert(1000, "attention_transfer.at_loss", "torchdistill.ATLoss, code") == 1000
    assert convert(1, "repdistiller.KDSVD", "kdkernels.svd_kd_loss, authors", k=4, batch_size=64) == 1 / 64


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("F.kl_div, mean", "kdkernels.temperature_kl"), {"temperature": 4}, "classes is needed to convert between these losses: C"),
        (("F.kl_div", "kdkernels.temperature_kl"), {}, "from_ must be one of 'kdkernels.temperature_kl', .*, got 'F.kl_div'"),
        (("torchdistill.ATLoss, paper", "repdistiller.Attention"), {}, "not proportional to each other"),
        (("F.kl_div, mean", "mdistiller.kd_loss"), {"temperature": 0}, "temperature must be"),
    ],
)
def test_weights_that_cannot_be_converted(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        compat.convert_weight(1.0, *arguments, **options)


def test_wrong_input_raises():
    with pytest.raises(TypeError, match="reduction"):
        compat.modelopt.LogitsDistillationLoss(4.0)
    with pytest.raises(ValueError, match="reduction must be"):
        compat.trl.generalized_jsd_loss(randn(1, 2, 3), randn(1, 2, 3), reduction="None")
    with pytest.raises(ValueError, match="size_average and reduce are deprecated"):
        compat.liger.LigerKLDIVLoss(1e-10, False)
    with pytest.raises(ValueError, match="mode must be"):
        compat.torchdistill.ATLoss({}, mode="sum")
    with pytest.raises(KeyError, match=r"student_io_dict has no module 'fc'; it has"):
        compat.torchdistill.KDLoss("fc", "output", "fc", "output", T)({"head": {"output": randn(2, 3)}}, {})
    with pytest.raises(ValueError, match="student and teacher must have the same classes"):
        compat.functional.kl_div_of_logits(randn(2, 3), randn(2, 4), reduction="none")
    for make in (compat.repdistiller.DistillKL, lambda T: compat.modelopt.LogitsDistillationLoss(T, reduction="mean")):
        with pytest.raises(ValueError, match="must be"):
            make(math.nan)


def test_half_precision():
    """float16 maps above 256, whose squares overflow, give the loss of float32."""
    s, t = (300 * randn(2, 3, 4, 4, seed=i) for i in range(2))
    for dtype in (torch.float16, torch.bfloat16):
        found = compat.repdistiller.Attention(2)([s.to(dtype)], [t.to(dtype)])[0]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), attention_loss(s.to(dtype).double(), t.to(dtype).double()), rtol=1e-5, atol=0)
        found = compat.repdistiller.Attention(3)([s.to(dtype)], [t.to(dtype)])[0]
        torch.testing.assert_close(found.double(), attention_loss(s.to(dtype).double(), t.to(dtype).double(), 3), rtol=1e-5, atol=0)


# What a user of the originals does, and what they refuse.


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("eps", [1e-10, 1e-3])
def test_liger_target_need_not_sum_to_one(eps, reduction):
    student = randn(4, 10).requires_grad_()
    target = randn(4, 10, seed=1).softmax(1)
    target = torch.stack([target[0], torch.zeros_like(target[1]), 0.9 * target[2], torch.eye(10, dtype=target.dtype)[3]])
    elements = target * (target.clamp(min=eps).log() - student.log_softmax(1))  # Liger's formula
    expected = {"none": elements, "sum": elements.sum(), "mean": elements.mean(), "batchmean": elements.sum() / 4}[reduction]
    found = compat.liger.LigerKLDIVLoss(eps=eps, reduction=reduction)(student.log_softmax(1), target)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(loss.sum(), student, retain_graph=True)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    assert not gradients[0][1].any()  # the row of padding


@pytest.mark.parametrize("loss", [compat.liger.LigerKLDIVLoss(), compat.liger.LigerJSD()])
def test_liger_takes_rows_only(loss):
    with pytest.raises(ValueError, match=r"must have the shape \[BT, V\], as in Liger, got \[2, 3, 4\]"):
        loss(randn(2, 3, 4), randn(2, 3, 4))
    with pytest.raises(ValueError, match="both arguments must have the same shape"):
        loss(randn(3, 4), randn(2, 4))


def test_liger_labels_of_another_shape():
    with pytest.raises(ValueError, match=r"shift_labels must have the shape \[3\], a label for each row, got \[2\]"):
        compat.liger.LigerJSD()(randn(3, 4), randn(3, 4), torch.zeros(2))


def test_sizes_that_the_originals_refuse():
    where = {"path": "x", "io": "output"}
    at = compat.torchdistill.ATLoss({"a": {"student": where, "teacher": where}})
    wide, small = randn(2, 3, 8, 8), randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"one spatial size, got \[8, 8\] and \[4, 4\]"):
        compat.attention_transfer.at_loss(wide, small)
    with pytest.raises(ValueError, match="one spatial size"):
        at({"x": {"output": wide}}, {"x": {"output": small}})
    for p in (2, 3):
        with pytest.raises(ValueError, match="one spatial size"):
            compat.mdistiller.at_loss([randn(2, 3, 8, 6)], [randn(2, 3, 4, 9)], p)
    for maps in ([randn(2, 3, 8, 4), randn(2, 5, 4, 2)], [randn(2, 3, 4, 8), randn(2, 5, 4, 4)]):
        with pytest.raises(ValueError, match=r"as in RepDistiller|one spatial size"):
            compat.repdistiller.FSP([m.shape for m in maps], [m.shape for m in maps])(maps, maps)
    with pytest.raises(ValueError, match="same number of feature maps, got 2 and 1"):
        compat.repdistiller.FSP([wide.shape] * 2, [wide.shape] * 2)([wide, wide], [wide])


def test_empty_batches_have_a_loss_of_zero():
    maps = [torch.zeros(0, 3, 8, 8, requires_grad=True), torch.zeros(0, 5, 4, 4, requires_grad=True)]
    where = {f"{who}_{place}": {"path": place, "io": "o"} for who in ("student", "teacher") for place in ("first", "second")}
    values = {"first": {"o": maps[0]}, "second": {"o": maps[1]}}
    losses = [
        sum(compat.repdistiller.FSP([m.shape for m in maps], [m.shape for m in maps])(maps, maps)),
        compat.torchdistill.FSPLoss({"a": where})(values, values),
        *(sum(compat.repdistiller.Attention(p)(maps, maps)) for p in (2, 3)),
        *(kdkernels.nn.fsp_loss([maps], [maps], variant=variant) for variant in ("paper", "sskd")),
    ]
    for loss in losses:
        assert loss.item() == 0
        loss.backward()


def test_temperature_of_elements_is_a_number():
    with pytest.raises(TypeError, match=r"temperature must be a number for reduction='none', got a tensor of shape \[4\]"):
        compat.functional.kl_div_of_logits(randn(4, 4), randn(4, 4), torch.ones(4), reduction="none")


def test_losses_have_the_bases_and_attributes_of_the_originals():
    kd = compat.torchdistill.KDLoss("fc", "output", "head", "input", temperature=4.0)
    assert isinstance(kd, torch.nn.KLDivLoss)
    assert (kd.student_module_path, kd.student_module_io, kd.teacher_module_path, kd.teacher_module_io) == ("fc", "output", "head", "input")
    assert isinstance(compat.liger.LigerKLDIVLoss(), torch.nn.KLDivLoss)
    loss = compat.modelopt.LogitsDistillationLoss(2.0, reduction="mean")
    assert isinstance(loss, torch.nn.modules.loss._Loss)
    assert (loss._temperature, loss._reduction) == (2.0, "mean")
    with pytest.raises(KeyError, match=r"has no 'output' of the module 'fc'; it has \['x'\]"):
        kd({"fc": {"x": None}}, {})
    with pytest.raises(TypeError, match="classes"):
        compat.convert_weight(1, "F.kl_div, mean", "kdkernels.temperature_kl", temperature=4, classes=10.5)
